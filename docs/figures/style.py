"""What the figures of the site share: a look for light and dark pages and phones, the same bytes each time.

A figure is 5 inches wide, so that its letters can be read on a phone, and its paper is transparent. Its greys
and colours have enough contrast on white and on the site's dark background.
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

ASSETS = Path(__file__).parents[1] / "assets"
WIDTH = 5.0
GREY, ORANGE, BLUE, GREEN, PURPLE, RED = "#808080", "#e8710a", "#3b82f6", "#12a150", "#a855f7", "#e5484d"
COLORS = [ORANGE, BLUE, GREEN, PURPLE, RED]

plt.rcParams.update(
    {
        "axes.edgecolor": GREY,
        "axes.labelcolor": GREY,
        "axes.prop_cycle": mpl.cycler(color=COLORS),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": GREY,
        "axes.titlesize": 11,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "legend.frameon": False,
        "legend.labelcolor": GREY,
        "savefig.transparent": True,
        "svg.fonttype": "path",  # the same on every machine
        "svg.hashsalt": "s4",
        "text.color": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
    }
)


def save(figure: Figure, name: str) -> None:
    """Write it as docs/assets/NAME.svg, the same bytes each time."""
    ASSETS.mkdir(exist_ok=True)
    figure.savefig(ASSETS / f"{name}.svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
