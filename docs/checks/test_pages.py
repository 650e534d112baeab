"""The site builds without a warning, the code of every page runs, and nothing is loaded from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, ROOT, pieces

LANGUAGES = {"python", "py", "sh", "text", "json", "yaml", "toml", "cpp", "csv", "bibtex"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    code = pieces(page)
    assert {piece.language for piece in code} <= LANGUAGES
    if not any(piece.language in ("python", "sh") for piece in code):
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "checks" / "pages.py", page],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "MPLBACKEND": "agg", "S4_REPOSITORY": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_it_builds_without_a_warning(warnings: str) -> None:
    assert not warnings


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r"""(?:<(?:script|img|iframe)[^>]*\ssrc|<link[^>]*\shref)=["']?(?:https?:)?//[^"'\s>]+"""
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    found = {hit for page in pages for hit in loads.findall(page.read_text())}
    assert not {hit for hit in found if 'rel="canonical"' not in hit}
