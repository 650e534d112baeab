"""The tables of results in the pages are what the files of results say; every table is shown."""

from pathlib import Path

import pytest
import tables
from make_tables.source import number


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: str(page.relative_to(tables.ROOT)))
def test_tables_are_what_the_results_say(page: Path) -> None:
    text = page.read_text()
    assert tables.written(text) == text, "python benchmarks/tables.py writes them anew"


def test_every_table_is_shown() -> None:
    shown = {m["name"] for page in tables.pages() for m in tables.MARKED.finditer(page.read_text())}
    assert shown == {*tables.TABLES, "runs"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.0579, "0.058"),
        (0.5, "0.5"),
        (0.996, "1.0"),
        (3.39, "3.4"),
        (9.97, "10"),
        (11881.9, "11,882"),
    ],
)
def test_numbers_keep_two_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_wrong_number_is_replaced_and_words_stay() -> None:
    row = (
        "| `digits` | - | 12.34%; a note | 7 (25 epochs) | 1 s, alone | here | 9 | abc "
        "| [log](results/digits) |\n"
    )
    want = (
        "| `digits` | - | 97.77%; a note | 500 (25 epochs) | 48 s, alone | here | 0 | 131e9ad "
        "| [log](results/digits) |\n"
    )
    page = "<!-- table: runs -->\n{}<!-- end -->"
    assert tables.written(page.format(row)) == page.format(want)


@pytest.mark.parametrize(
    ("text", "match"),
    [("<!-- table: paper -->\n\nand no end", "end"), ("<!-- table: nowhere -->\n<!-- end -->", "nowhere")],
)
def test_wrong_markers_are_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tables.written(text)
