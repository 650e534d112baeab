"""The three ways to run one system, as a diagram: docs/assets/ways.svg."""

import matplotlib.pyplot as plt
import style
from matplotlib.axes import Axes

STEPS, CHUNK = 9, 3
INPUT, STATE, OUTPUT = 0.0, 1.0, 2.0  # heights
Place = tuple[float, float]


def nodes(axis: Axes, height: float, color: str, places: list[float], size: float = 70) -> None:
    """A row of dots."""
    axis.scatter(places, [height] * len(places), s=size, color=color, zorder=3, linewidths=0)


def edge(axis: Axes, start: Place, end: Place, color: str, width: float = 1.0) -> None:
    """An arrow from dot to dot."""
    arrow = {"arrowstyle": "-|>", "color": color, "lw": width}
    arrow |= {"shrinkA": 4, "shrinkB": 5, "mutation_scale": 7}
    axis.annotate("", xy=end, xytext=start, arrowprops=arrow)


def convolution(axis: Axes) -> None:
    """Every output from all inputs so far; the lines of one output are drawn strong."""
    for t in range(STEPS):
        width, alpha = (1.6, 1.0) if t == STEPS - 3 else (0.5, 0.4)
        for j in range(t + 1):
            axis.plot([j, t], [INPUT, OUTPUT], color=style.ORANGE, lw=width, alpha=alpha)


def recurrence(axis: Axes) -> None:
    """From state to state."""
    for t in range(STEPS):
        edge(axis, (t, INPUT), (t, STATE), style.GREY)
        edge(axis, (t, STATE), (t, OUTPUT), style.GREY)
        if t:
            edge(axis, (t - 1, STATE), (t, STATE), style.BLUE, 1.6)
    nodes(axis, STATE, style.BLUE, list(range(STEPS)))


def scan(axis: Axes) -> None:
    """A convolution in each chunk, states between them."""
    places = [c * CHUNK - 0.5 for c in range(STEPS // CHUNK + 1)]
    for c, place in enumerate(places[:-1]):
        own = range(c * CHUNK, (c + 1) * CHUNK)
        axis.axvspan(place + 0.06, place + CHUNK - 0.06, color=style.GREY, alpha=0.1, linewidth=0)
        for t in own:
            for j in range(c * CHUNK, t + 1):
                axis.plot([j, t], [INPUT, OUTPUT], color=style.ORANGE, lw=0.9, alpha=0.8)
            if c:
                axis.plot([place, t], [STATE, OUTPUT], color=style.BLUE, lw=1)
            axis.plot([t, place + CHUNK], [INPUT, STATE], color=style.BLUE, lw=1, alpha=0.6)
        if c:
            edge(axis, (place, STATE), (place + CHUNK, STATE), style.BLUE, 1.6)
    nodes(axis, STATE, style.BLUE, places[1:])


def main() -> None:
    """Draw them."""
    figure, axes = plt.subplots(3, figsize=(style.WIDTH, 4.9))
    titles = ("convolution: all outputs at once", "recurrence: one step at a time", "scan: chunk by chunk")
    for axis, title, draw in zip(axes, titles, (convolution, recurrence, scan), strict=True):
        draw(axis)
        nodes(axis, INPUT, style.GREY, list(range(STEPS)), 45)
        nodes(axis, OUTPUT, style.GREEN, list(range(STEPS)), 45)
        axis.set(xlim=(-1.2, STEPS + 0.1), ylim=(-0.35, 2.35))
        axis.set_title(title, loc="left")
        axis.text(-1.15, INPUT, "u", va="center", fontsize=12, style="italic")
        axis.text(-1.15, OUTPUT, "y", va="center", fontsize=12, style="italic", color=style.GREEN)
        if draw is not convolution:
            axis.text(-1.15, STATE, "x", va="center", fontsize=12, style="italic", color=style.BLUE)
        axis.axis("off")
    style.save(figure, "ways")


if __name__ == "__main__":
    main()
