"""The API reference: its list has everything that is public, and each name has its place on a page."""

import re
from pathlib import Path

import pytest
from reference import PAGE, page
from shapes import NAMES, public_name

from s4.convert.__main__ import parser

MODULES = {"s4", "s4.pretrained", "s4.info", "s4.distributed", "s4.kernel"}  # pages with no docstring of it


def test_the_list_is_of_now() -> None:
    assert PAGE.read_text() == page(), "run: python docs/checks/reference.py"


def test_every_public_name_is_described(site: Path) -> None:
    text = "".join(file.read_text() for file in (site / "api").rglob("*.html"))
    ids = set(re.findall(r'id="(s4\.[\w.]+)"', text))
    described = {public_name(name, "s4") for name in NAMES - MODULES}
    fields = {name for name in described if name and name.startswith("s4.transformers.S4Config.")}
    assert described - fields <= ids
    assert len(ids) > 100


def test_the_options_of_the_command_line_are_those_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    assert f"```text\n{parser().format_help()}```" in (PAGE.parent / "commands.md").read_text()


@pytest.mark.parametrize(
    ("name", "path", "means"),
    [
        ("S4Layer.forward", "s4.block.S4Block.forward", "s4.S4Layer.forward"),
        ("forward", "s4.layer.S4Layer.step", "s4.S4Layer.forward"),
        ("transition", "s4.hippo.dplr", "s4.hippo.transition"),
        ("from_pretrained", "s4.pretrained.Pretrained.config", "s4.pretrained.Pretrained.from_pretrained"),
        ("S4Model.from_pretrained", "s4.hippo", "s4.pretrained.Pretrained.from_pretrained"),
        ("from_s4", "s4.transformers.config.S4Config", "s4.transformers.S4Config.from_s4"),
        ("lengths", "s4.layer.S4Layer.step", None),
        ("S4Block", "s4.convert.blocks.block", None),  # the original's
        ("s4.S4Block", "s4.convert.blocks.block", "s4.S4Block"),
    ],
)
def test_what_a_name_means_in_a_docstring(name: str, path: str, means: str | None) -> None:
    assert public_name(name, path) == means
