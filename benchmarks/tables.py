"""The tables of results in the pages, written from the files of results: no number is typed by hand.

    python benchmarks/tables.py           # writes every table of every page anew
    python benchmarks/tables.py --check   # writes nothing; names the pages that would change, exit code 1

A page says where a table goes by two comments, `<!-- table: layer-cpu -->` and `<!-- end -->`; what is
between them is replaced. Numbers come from `benchmarks/results/*.json` and `examples/results/`. Needs nothing
but Python.
"""

import argparse
import re
from pathlib import Path

from make_tables import TABLES, examples
from make_tables.source import ROOT

MARKED = re.compile(
    r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n)(?P<table>.*?)(?P<end><!-- end -->)", re.DOTALL
)


def markdown(name: str) -> str:
    """A table as Markdown, with an empty line on each side.

    Raises:
        ValueError: there is no such table, or its rows differ in length.
    """
    if name not in TABLES:
        raise ValueError(f"no table {name!r}: there are {', '.join(TABLES)}")
    head, *rows = [list(row) for row in TABLES[name]()]
    if any(len(row) != len(head) for row in rows):
        raise ValueError(
            f"table {name}: rows of {sorted({len(row) for row in rows})} cells below {len(head)}"
        )
    lines = [f"| {' | '.join(line)} |\n" for line in (head, *rows)]
    return "\n" + lines[0] + "|---" * len(head) + "|\n" + "".join(lines[1:]) + "\n"


def written(text: str) -> str:
    """A page with its tables as the results have them.

    Raises:
        ValueError: a marker without its end, or of no table.
    """
    if text.count("<!-- table: ") != len(MARKED.findall(text)):
        raise ValueError("a `<!-- table: NAME -->` has no `<!-- end -->`")

    def table(m: re.Match[str]) -> str:
        new = examples.runs(m["table"]) if m["name"] == "runs" else markdown(m["name"])
        return m["begin"] + new + m["end"]

    return MARKED.sub(table, text)


def pages() -> list[Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    """Write, or with --check compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page would change")
    check, changed, failed = parser.parse_args().check, 0, 0
    for page in pages():
        text, name = page.read_text(), page.relative_to(ROOT)
        try:
            new = written(text)
        except ValueError as error:  # the other pages are written all the same
            failed += 1
            print(f"{name}: {error}")
            continue
        if new != text:
            changed += 1
            print(f"{name}: {'is not what the results say' if check else 'written'}")
            if not check:
                page.write_text(new)
    return int(failed > 0 or (check and changed > 0))


if __name__ == "__main__":
    raise SystemExit(main())
