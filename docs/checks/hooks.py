"""What mkdocs does with the pages: formulas as MathML, and files of the repository as files of the site."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

sys.path.append(str(Path(__file__).parent))  # mkdocs loads this file by its path alone
import notebooks

ROOT = Path(__file__).parents[2]
# Pages that stand elsewhere in the repository, and their names in the site.
ELSEWHERE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
}
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*(?:\\\((.*?)\\\)|\\\[(.*?)\\\])\s*</\1>', re.DOTALL)
_NAMED = re.compile(r"<mi>(?:log|exp|sin|cos|max|min)</mi>")  # functions, which want some space
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
_OUTSIDE = re.compile(r"\]\((?:\.\./)+((?!\.\.)[^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the notebooks, pages that stand elsewhere, and the files that pages link to: `../s4/hippo.py`."""
    for file in notebooks.pages(files, config):
        files.append(file)
    for source, name in ELSEWHERE.items():
        files.append(File.generated(config, name, content=_as_in_docs(source)))
    linked = {
        link
        for page in files.documentation_pages()
        for link in _OUTSIDE.findall(page.content_string)
        if not (ROOT / "docs" / link).exists() and link not in ELSEWHERE
    }
    for link in sorted(linked):
        if not (ROOT / link).is_file():
            raise FileNotFoundError(f"a page links to {link}, which the repository has not")
        files.append(File.generated(config, f"repository/{link}", abs_src_path=str(ROOT / link)))
    return files


def _as_in_docs(source: str) -> str:
    """A page that stands elsewhere, with links that lead on from docs/; folders are no links in the site."""

    def link(match: re.Match[str]) -> str:
        picture, words, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = os.path.normpath(Path(source).parent / target)
        if (ROOT / path).is_dir():
            return words
        path = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
        return f"{picture}[{words}]({path}{anchor})"

    return _LINK.sub(link, (ROOT / source).read_text())


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to files of the repository at their copies in the site."""
    up = "../" * page.file.src_uri.count("/")

    def inner(match: re.Match[str]) -> str:
        inside = ELSEWHERE.get(match[1], f"repository/{match[1]}")
        return f"]({up}{inside}" if files.get_file_from_path(inside) else match[0]

    return _OUTSIDE.sub(inner, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Write each formula as MathML, which browsers show without a script."""

    def mathml(match: re.Match[str]) -> str:
        inline, block = match[2], match[3]
        source = (inline or block).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        written = convert(source, display="inline" if inline else "block")
        # A prime stands close.
        written = written.replace("<mi>&#x02032;</mi>", '<mo class="prime">&#x02032;</mo>')
        return _NAMED.sub(r'<mspace width="0.17em"/>\g<0><mspace width="0.17em"/>', written)

    return _FORMULA.sub(mathml, html)
