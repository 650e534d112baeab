"""The notebooks run, put out what is written in them, and have pages with their pictures."""

import re
from pathlib import Path

import nbformat
import notebooks
import pytest
from nbformat import NotebookNode

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_OF_A_MACHINE = re.compile(r"/(?:home|root|tmp|work|usr|Users)/|site-packages|Warning|0x[0-9a-f]{6}")


def outputs(notebook: NotebookNode) -> list[list[tuple[str, str]]]:
    """Of each cell of code what it puts out: its kind, and its text with numbers left out."""
    return [
        [(each.output_type, _NUMBER.sub("0", each.get("text", ""))) for each in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_puts_out_what_is_written_in_it(path: Path, tmp_path: Path) -> None:
    written = nbformat.read(path, as_version=4)
    assert outputs(notebooks.execute(path, tmp_path)) == outputs(written), "run `make notebooks`"
    assert not list(tmp_path.iterdir())  # it leaves nothing in the reader's folder


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_of_no_machine(path: Path) -> None:
    written = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 250_000
    assert notebooks.tidy(nbformat.read(path, as_version=4)).metadata == written.metadata
    for cell in written.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr"
            assert not _OF_A_MACHINE.search(
                output.get("text", "") + str(output.get("data", {}).get("text/plain"))
            )


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_of_a_notebook_has_all_of_it(path: Path) -> None:
    written = nbformat.read(path, as_version=4)
    text, pictures = notebooks.markdown(written, path.stem)
    assert text.startswith("# ")  # the title, and only then where to download it
    assert f"({path.name})" in text.split("\n\n")[1]
    parts = [cell.source for cell in written.cells]
    parts += [
        output["text"].rstrip()
        for cell in written.cells
        for output in cell.get("outputs", [])
        if "text" in output
    ]
    for part in parts[1:]:
        assert part in text
    assert re.findall(r"\]\(([^)]+\.png)\)", text) == list(pictures)
    drawn = [output for cell in written.cells for output in cell.get("outputs", []) if "data" in output]
    assert len(drawn) == len(pictures)
    for picture in pictures.values():
        assert picture.startswith(b"\x89PNG")
