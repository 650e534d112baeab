"""The figures of the site are what their scripts draw, and every one is shown."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import style
from pages import PAGES, ROOT

FIGURES = ROOT / "docs" / "figures"
# Not here: `style` draws nothing, `guides` runs pages, and test_memory.py has the matrices.
OTHERS = ("style", "guides", "memory_matrices")
SCRIPTS = [file for file in sorted(FIGURES.glob("*.py")) if file.stem not in OTHERS]


def curves(file: Path) -> np.ndarray:
    """The coordinates of what is drawn inside the axes."""
    paths = re.findall(r'<path d="([^"]*)" clip-path', file.read_text())
    return np.array([float(number) for path in paths for number in re.findall(r"-?\d+\.?\d*", path)])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_figure_is_what_its_script_draws(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = style.ASSETS / f"{script.stem}.svg"
    monkeypatch.setattr(style, "ASSETS", tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    drawn = curves(tmp_path / kept.name)
    assert drawn.shape == curves(kept).shape, f"python {script.relative_to(ROOT)}"
    assert np.allclose(drawn, curves(kept), rtol=0, atol=1), f"python {script.relative_to(ROOT)}"  # of 360


def test_every_figure_is_shown() -> None:
    text = "".join(page.read_text() for page in [*PAGES, ROOT / "mkdocs.yml"])
    assert not [file.name for file in style.ASSETS.glob("*.svg") if f"assets/{file.name}" not in text]
