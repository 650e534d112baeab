"""How much of the input of some steps ago the state of a new layer tells: docs/assets/recall.svg.

Computed by benchmarks/memory.py, at more lags than its table has.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import style
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import memory

LAGS = torch.cat([torch.arange(0, 1000, 10), torch.arange(1000, 3001, 20)]).double()


def main() -> None:
    """Draw it."""
    figure, axes = plt.subplots(2, figsize=(style.WIDTH, 4.6), sharex=True, sharey=True)
    for axis, variant in zip(axes, ("dplr", "diag"), strict=True):
        inits = [init for v, init in memory.INITS if v == variant]
        for init, color in zip(inits, style.COLORS, strict=False):
            values = 100 * memory.told(variant, init, 64, memory.DT, LAGS)
            axis.plot(LAGS, values, color=color, linewidth=1.6, label=init)
        axis.legend(title=variant, loc="upper right", title_fontproperties={"size": 11})
        axis.get_legend().get_title().set_color(style.GREY)
        axis.set(ylim=(0, 104), xlim=(0, 3000), yticks=(0, 50, 100), ylabel="told, %")
        axis.grid(color=style.GREY, alpha=0.2, linewidth=0.6)
    axes[-1].set_xlabel("lag in steps; dt = 0.001, N = 64")
    style.save(figure, "recall")


if __name__ == "__main__":
    main()
