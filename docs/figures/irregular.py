"""A wave sampled at random times, with its gaps and without them: docs/assets/irregular.svg."""

import matplotlib.pyplot as plt
import numpy as np
import style


def main() -> None:
    """Draw it."""
    gaps = 0.1 + 0.9 * np.random.default_rng(3).exponential(size=40)
    times = np.cumsum(gaps)
    values = np.sin(2 * np.pi * times / 7)
    fine = np.linspace(times[0], times[-1], 600)
    figure, (told, untold) = plt.subplots(2, figsize=(style.WIDTH, 3.4), sharex=True, sharey=True)
    told.plot(fine, np.sin(2 * np.pi * fine / 7), color=style.GREY, lw=1)
    told.plot(times, values, "o", color=style.BLUE, ms=4)
    told.set_title("told the gaps: a wave")
    even = np.linspace(times[0], times[-1], len(times))
    untold.plot(even, values, "-", color=style.GREY, lw=1)
    untold.plot(even, values, "o", color=style.ORANGE, ms=4)
    untold.set_title("not told: the same inputs, one step each")
    untold.set_xlabel("time")
    for axis in (told, untold):
        axis.set(yticks=[-1, 0, 1])
    style.save(figure, "irregular")


if __name__ == "__main__":
    main()
