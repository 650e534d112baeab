"""Kernels of new layers, three channels of every initialisation: docs/assets/kernels.svg."""

import matplotlib.pyplot as plt
import style
import torch

from s4 import S4Layer
from s4.hippo import names

DT, STEPS, N = 1e-3, 2500, 64
EVERY = 5  # of the steps is drawn


def main() -> None:
    """Draw them."""
    figure, axes = plt.subplots(3, 2, figsize=(style.WIDTH, 4.8), sharex=True)
    s = torch.arange(STEPS) * DT
    for column, variant in zip(axes.T, ("dplr", "diag"), strict=True):
        for axis, init in zip(column, names(variant), strict=True):
            torch.manual_seed(5)
            layer = S4Layer(3, N, variant=variant, init=init, dt_min=DT, dt_max=DT, dtype=torch.float64)
            with torch.no_grad():
                kernels = layer.kernel(STEPS) / DT
            for kernel, color in zip(kernels, style.COLORS, strict=False):
                axis.plot(s[::EVERY], kernel[::EVERY], color=color, linewidth=0.8)
            reach = 1.2 * kernels[:, 60:].abs().max().item()  # the first steps of legs are far higher
            axis.set(ylim=(-reach, reach), yticks=(0,), xlim=(0, STEPS * DT))
            axis.set_title(f"{variant}, {init}", loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("lag (steps times dt)")
    style.save(figure, "kernels")


if __name__ == "__main__":
    main()
