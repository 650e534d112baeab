"""What a page shows as a file's code stands in that file.

A block that begins with ```py title="s4/hippo.py" is an excerpt: each run of its lines is a run of lines of
that file, at any indentation. A line `...` stands for what is left out; the order is that of the file.
"""

import re
import textwrap
from pathlib import Path

import pytest
from pages import PAGES, ROOT

_EXCERPT = re.compile(r"^```py(?![a-z])(?P<title>[^\n]*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def missing(code: str, source: str) -> str | None:
    """The first run of lines that the source has not, behind the ones before it; None if it has all."""
    lines, after = [line.strip() for line in source.splitlines()], 0
    for run in re.split(r"^\s*\.\.\.\n", code, flags=re.MULTILINE):
        wanted = [line.strip() for line in textwrap.dedent(run).strip("\n").splitlines()]
        starts = (i for i in range(after, len(lines)) if lines[i : i + len(wanted)] == wanted)
        if (start := next(starts, None)) is None:
            return run
        after = start + len(wanted)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_excerpts_are_in_their_files(page: Path) -> None:
    for excerpt in _EXCERPT.finditer(page.read_text()):
        named = re.search(r'title="([^"]+)"', excerpt["title"])
        assert named, f"{page}: an excerpt names its file, title=..., got {excerpt['title']!r}"
        lost = missing(excerpt["code"], (ROOT / named[1]).read_text())
        assert lost is None, f"{page}: {named[1]} has not these lines:\n{lost}"


def test_lines_that_a_file_has_not_are_found() -> None:
    source = "def f(x):\n    y = x + 1\n    z = y\n    return z\n"
    assert missing("y = x + 1\n...\nreturn z\n", source) is None
    assert missing("def f(x):\n    y = x + 1\n", source) is None
    assert missing("y = x + 1\nreturn z\n", source) == "y = x + 1\nreturn z\n"  # not one behind the other
    assert missing("return z\n...\ny = x + 1\n", source) == "y = x + 1\n"  # in another order
    assert missing("y = x + 2\n", source) == "y = x + 2\n"
