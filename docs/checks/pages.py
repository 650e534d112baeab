"""The code of the pages, run as a reader would: the blocks of a page in their order, in one process.

`python docs/checks/pages.py docs/start.md` runs one page, in a temporary folder. Of its fenced blocks

- `python` is run. A comment `# (8, 10)` behind an assignment is the shape of its first target: it is checked.
- `sh` is run by bash in that folder. `$S4_REPOSITORY` is the clone, for what only a clone has.
- `py` with a title, the path of a file, is an excerpt of that file: `test_excerpts.py` looks it up.
- `text` and others are not run: output, installations, and what needs another machine.

A comment `<!-- setup` with Python up to `-->`, each on a line of its own, is run too. The reader does not
see it: it stands for what he has, such as data or a model.
"""

import ast
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "api").glob("*.md")])
_PIECE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\s`]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```$"
    r"|^<!-- setup\n(?P<setup>.*?)^-->$",
    re.DOTALL | re.MULTILINE,
)


class Piece(NamedTuple):
    """One piece of a page: its language, "python" for hidden setup too, its code, its first line."""

    language: str
    code: str
    line: int


def pieces(page: Path) -> list[Piece]:
    """The fenced blocks and the hidden setup of a page, in their order."""
    text = page.read_text()
    found = []
    for match in _PIECE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        code = match["setup"] if match["code"] is None else match["code"]
        indent = len(match["indent"] or "")
        code = "\n".join(each[indent:] for each in code.split("\n"))
        found.append(Piece("python" if match["setup"] else match["language"], code, line))
    return found


def run(page: Path) -> None:
    """Run the Python and the commands of a page in the current folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for piece in pieces(page):
        if piece.language == "sh":
            subprocess.run(["bash", "-euo", "pipefail", "-c", piece.code], check=True)
        elif piece.language == "python":
            for statement in ast.parse(piece.code).body:
                _run(statement, piece, page, names)


def _run(statement: ast.stmt, piece: Piece, page: Path, names: dict[str, Any]) -> None:
    last = piece.code.splitlines()[(statement.end_lineno or 0) - 1]
    ast.increment_lineno(statement, piece.line - 1)  # a traceback names the line of the page
    exec(compile(ast.Module([statement], []), str(page), "exec"), names)
    said = re.search(r"#\s+(\(\d+(?:, \d+)*,?\))$", last)
    if said and isinstance(statement, ast.Assign):
        target = statement.targets[0]
        first = ast.unparse(target.elts[0] if isinstance(target, ast.Tuple) else target)
        shape = tuple(eval(first, names).shape)
        if shape != ast.literal_eval(said[1]):
            raise ValueError(f"{page}, line {statement.end_lineno}: says {said[1]}, is {shape}")


if __name__ == "__main__":
    page = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("S4_REPOSITORY", str(ROOT))
        os.chdir(folder)
        run(page)
