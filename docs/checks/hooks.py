"""What mkdocs does with the pages: formulas as MathML, and files of the repository as files of the site."""

import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

sys.path.append(str(Path(__file__).parent))  # mkdocs loads this file by its path alone
import notebooks

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*(?:\\\((.*?)\\\)|\\\[(.*?)\\\])\s*</\1>', re.DOTALL)
_NAMED = re.compile(r"<mi>(?:log|exp|sin|cos|max|min)</mi>")  # functions, which want some space
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
_OUTSIDE = re.compile(r"\]\((?:\.\./)+((?!\.\.)[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the notebooks and of the root, and the files that pages link to: `../s4/hippo.py`."""
    for file in notebooks.pages(files, config):
        files.append(file)
    for source, name in ROOT_PAGES.items():
        text = _LINK.sub(lambda link: f"]({_of_the_root(link[1])}", (ROOT / source).read_text())
        files.append(File.generated(config, name, content=text))
    linked = {
        link
        for page in files.documentation_pages()
        for link in _OUTSIDE.findall(page.content_string)
        if not (ROOT / "docs" / link).exists()
    }
    for link in sorted(linked):
        if not (ROOT / link).is_file():
            raise FileNotFoundError(f"a page links to {link}, which the repository has not")
        files.append(File.generated(config, f"repository/{link}", abs_src_path=str(ROOT / link)))
    return files


def _of_the_root(link: str) -> str:
    """Where a link of a page of the root leads from docs/."""
    return ROOT_PAGES.get(link) or (link.removeprefix("docs/") if link.startswith("docs/") else f"../{link}")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to files of the repository at their copies in the site."""
    up = "../" * page.file.src_uri.count("/")

    def inside(match: re.Match[str]) -> str:
        known = files.get_file_from_path(f"repository/{match[1]}")
        return f"]({up}repository/{match[1]}" if known else match[0]

    return _OUTSIDE.sub(inside, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Write each formula as MathML, which browsers show without a script."""

    def mathml(match: re.Match[str]) -> str:
        inline, block = match[2], match[3]
        source = (inline or block).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        written = convert(source, display="inline" if inline else "block")
        written = written.replace("<mi>&#x02032;</mi>", "<mo>&#x02032;</mo>")  # a prime stands close
        return _NAMED.sub(r'<mspace width="0.17em"/>\g<0><mspace width="0.17em"/>', written)

    return _FORMULA.sub(mathml, html)
