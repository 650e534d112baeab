"""One layer seen three ways, and what it costs: `python docs/figures/views.py` redraws docs/assets/views.svg.

Above, a response to a signal by `forward`, `step` and `dense()`. Below, milliseconds of a training pass
against the length, of benchmarks/results/layer-cpu.json.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from style import BLUE, GREEN, GREY, ORANGE, RED, WIDTH, save

from s4 import S4Layer

ROOT = Path(__file__).parents[2]


def views(axis: Axes) -> None:
    """forward, step and dense of one channel."""
    torch.manual_seed(3)
    layer = S4Layer(1, 32, dt_min=0.02, dt_max=0.02, dtype=torch.float64).eval()
    t = torch.arange(160, dtype=torch.float64)
    u = ((t > 20) & (t < 60)).double()[None, :, None]
    with torch.no_grad():
        y = layer(u)[0, :, 0]
        state, steps = layer.initial_state(1), []
        for u_t in u.unbind(1):
            y_t, state = layer.step(u_t, state)
            steps.append(float(y_t))
        A, B, C, D = (m[0] for m in layer.dense())
        x, dense = torch.zeros_like(B), []
        for value in u[0, :, 0]:
            x = A @ x + B * value
            dense.append(float(C @ x + D * value))
    apart = max((y - torch.tensor(other, dtype=y.dtype)).abs().max().item() for other in (steps, dense))
    assert apart < 1e-10
    scale = float(y.abs().max())
    axis.plot(t, u[0, :, 0], color=GREY, linewidth=1.5, label="input")
    axis.plot(t, y / scale, color=BLUE, linewidth=2.5, label="forward: a convolution")
    axis.plot(
        t[::6], torch.tensor(steps)[::6] / scale, "o", color=ORANGE, markersize=6, label="step: a recurrence"
    )
    axis.plot(
        t[3::6],
        torch.tensor(dense)[3::6] / scale,
        "x",
        color=GREEN,
        markersize=6,
        mew=2,
        label="dense(): matrices A, B, C, D",
    )
    axis.set(
        xlabel="time step",
        title="One system, three views, the same outputs",
        ylim=(-2.6, 1.15),
        yticks=[-1, 0, 1],
    )
    axis.legend(loc="lower left")


def costs(axis: Axes) -> None:
    """A training pass of one layer against the length of the sequence."""
    cells = json.loads((ROOT / "benchmarks" / "results" / "layer-cpu.json").read_text())["cells"]
    shown = {
        "original formula": ("original formula", RED, "^"),
        "attention": ("attention", GREY, "s"),
        "LSTM": ("LSTM", ORANGE, "d"),
        "S4 auto": ("S4, this library", BLUE, "o"),
    }
    for who, (label, color, marker) in shown.items():
        of = [c for c in cells if c["who"] == who and c["backward"] and c["B"] == 1]
        axis.loglog([c["L"] for c in of], [c["ms"] for c in of], marker=marker, color=color, linewidth=2)
        x, y = of[-1]["L"] * 1.15, of[-1]["ms"]
        if who == "original formula":  # above its line, as that of attention crosses what is behind it
            x, y = of[0]["L"], 2.0 * of[-1]["ms"]
        axis.text(x, y, label, color=color, va="center")
    axis.set(
        xlabel="length of the sequence",
        ylabel="forward and backward",
        title="One layer on two CPU cores, in milliseconds",
    )
    axis.set(
        xlim=(3000, 2.2e6),
        ylim=(10, 30000),
        xticks=[4096, 16384, 65536],
        xticklabels=["4,096", "16,384", "65,536"],
    )
    axis.set(yticks=[10, 100, 1000, 10000], yticklabels=["10", "100", "1,000", "10,000"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def main() -> None:
    """Draw and write."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(WIDTH, 5.8))
    views(above)
    costs(below)
    save(figure, "views")


if __name__ == "__main__":
    main()
