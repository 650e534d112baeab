"""Redraw the figures that guides draw themselves: python docs/figures/guides.py [page ...].

Each page is run in a temporary folder, as its check runs it, in the look of the other figures. What it saves
goes to docs/assets.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import style  # noqa: F401  its look is that of every figure drawn from here on

DOCS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DOCS / "checks"))
import pages  # noqa: E402

FIGURES = {"audio": "hum.svg", "classification": "reading.svg", "forecasting": "forecast.svg"}


def main(names: list[str]) -> None:
    """Run the pages of these names, or all that draw."""
    os.environ |= {"S4_REPOSITORY": str(pages.ROOT), "SOURCE_DATE_EPOCH": "0"}  # no date in the files
    for name in names or FIGURES:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            pages.run(DOCS / f"{name}.md")
            shutil.copy(FIGURES[name], DOCS / "assets")
            os.chdir(DOCS)


if __name__ == "__main__":
    main(sys.argv[1:])
