"""A signal, and what states of the HiPPO measures say of it at the end: docs/assets/reconstruction.svg."""

import math

import matplotlib.pyplot as plt
import style
import torch
from torch import Tensor

from s4 import S4Layer
from s4.hippo import from_modes, reconstruct

DT, STEPS, N = 1e-3, 3000, 32
TITLES = {
    "legs": "legs: all of the past, ever coarser",
    "legt": "legt: a window of 1, by polynomials",
    "fout": "fout: a window of 1, by a Fourier series",
}


def signal() -> Tensor:
    """(STEPS,) waves of up to 3 periods in a time of 1, faded in from zero."""
    t = (torch.arange(STEPS, dtype=torch.float64) + 0.5) * DT
    frequency = torch.linspace(0.3, 3, 9, dtype=torch.float64)
    phase = torch.rand(9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    waves = torch.sin(2 * math.pi * (frequency * t[:, None] + phase)).sum(-1) / 2
    return (1 - torch.exp(-((5 * t) ** 3))) * waves


def remembered(measure: str, u: Tensor) -> tuple[Tensor, Tensor]:
    """Times and values of what the state after the last input says."""
    layer = S4Layer(1, N, init=measure, dt_min=DT, dt_max=DT, dtype=torch.float64).requires_grad_(False)
    _, state = layer(u[None, :, None], return_state=True)
    steps = STEPS if measure == "legs" else round(1 / DT)
    lags = (torch.arange(steps, dtype=torch.float64) + 0.5) * DT
    return STEPS * DT - lags, reconstruct(measure, from_modes(measure, state)[0, 0], lags)


def main() -> None:
    """Draw it."""
    u = signal()
    t = (torch.arange(STEPS) + 0.5) * DT
    figure, axes = plt.subplots(3, figsize=(style.WIDTH, 4.6), sharex=True)
    for axis, (measure, title) in zip(axes, TITLES.items(), strict=True):
        axis.plot(t, u, color=style.GREY, linewidth=3, alpha=0.45)
        axis.plot(*remembered(measure, u), color=style.ORANGE, linewidth=1.4)
        if measure != "legs":
            axis.axvspan((STEPS - 1 / DT) * DT, STEPS * DT, color=style.BLUE, alpha=0.12, linewidth=0)
        axis.set_title(title, loc="left")
        axis.set(ylim=(-3, 3), yticks=(-2, 0, 2), xlim=(0, STEPS * DT))
    axes[-1].set_xlabel(f"time (steps times dt); N = {N}")
    style.save(figure, "reconstruction")


if __name__ == "__main__":
    main()
