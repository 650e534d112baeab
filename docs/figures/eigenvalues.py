"""The diagonal of legs beside the eigenvalues of its whole A; frequencies of every initialisation.

Draws docs/assets/eigenvalues.svg.
"""

import matplotlib.pyplot as plt
import style
import torch

from s4.hippo import dplr, names, start

N = 32


def main() -> None:
    """Draw them."""
    figure, (plane, line) = plt.subplots(1, 2, figsize=(style.WIDTH, 3.2), width_ratios=(1, 1.15))
    Lambda, _, _ = dplr("legs", N)
    both = torch.cat([Lambda, Lambda.conj()])
    plane.plot(-torch.arange(1, N + 1), torch.zeros(N), "x", color=style.BLUE, markersize=4, label="of A")
    plane.plot(both.real, both.imag, "o", color=style.ORANGE, markersize=3, label="of the diagonal")
    plane.axhline(0, color=style.GREY, linewidth=0.5, zorder=0)
    plane.set(xlabel="real part", ylabel="imaginary part", xlim=(-34, 3))
    plane.set_title(f"legs, N = {N}", loc="left")
    plane.legend(loc="upper left", fontsize=9, handletextpad=0.2, borderaxespad=0)
    rows = [(variant, init) for variant in ("dplr", "diag") for init in names(variant)]
    for row, (variant, init) in enumerate(rows):
        frequency = start(init, variant, N)[0].imag
        color = style.ORANGE if variant == "dplr" else style.BLUE
        line.plot(frequency, torch.full_like(frequency, -row), "|", color=color, markersize=13)
    line.set_xscale("symlog", linthresh=1)
    line.set(yticks=range(0, -len(rows), -1), xlabel="frequency Im Λ", xlim=(-0.2, 600), ylim=(-5.6, 0.6))
    line.set_yticklabels([f"{variant}, {init}" for variant, init in rows])
    line.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    line.spines["left"].set_visible(False)
    line.tick_params(axis="y", length=0)
    style.save(figure, "eigenvalues")


if __name__ == "__main__":
    main()
