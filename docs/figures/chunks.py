"""The layer as a matrix from inputs to outputs, cut in chunks: docs/assets/chunks.svg."""

import matplotlib.pyplot as plt
import style
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

CHUNKS, T, N = 4, 1.0, 0.18  # drawn sizes, in chunks


def block(axis: Axes, left: float, top: float, width: float, height: float, color: str) -> None:
    """A block of a matrix, y downwards."""
    axis.add_patch(Rectangle((left, top), width, height, facecolor=color, alpha=0.6, linewidth=0))


def triangle(axis: Axes, left: float, top: float) -> None:
    """A lower triangle: the convolution within a chunk."""
    corners = [(left, top), (left, top + T), (left + T, top + T)]
    axis.add_patch(Polygon(corners, facecolor=style.ORANGE, alpha=0.7, linewidth=0))


def below(axis: Axes, row: int, column: int) -> None:
    """A block of rank N: a thin part, from the state to outputs, times a flat one, from inputs to it.

    Between the two stand powers of A, for the chunks that lie between.
    """
    gap, top = 0.06, row + 0.06
    block(axis, column + gap, top, N, T - 2 * gap, style.BLUE)
    if row - column > 1:
        block(axis, column + gap + N + 0.03, top, N, N, style.GREEN)
    start = gap + 2 * N + 0.06
    block(axis, column + start, top, T - gap - start, N, style.PURPLE)


def main() -> None:
    """Draw it."""
    figure, axis = plt.subplots(figsize=(style.WIDTH, 2.8))
    for row in range(CHUNKS):
        triangle(axis, row, row)
        for column in range(row):
            below(axis, row, column)
    for k in range(CHUNKS + 1):
        axis.plot([0, CHUNKS], [k, k], color=style.GREY, lw=0.7)
        axis.plot([k, k], [0, CHUNKS], color=style.GREY, lw=0.7)
    for k in range(CHUNKS):
        axis.text(k + 0.5, -0.12, f"u{'₁₂₃₄'[k]}", ha="center", fontsize=11)
        axis.text(-0.15, k + 0.5, f"y{'₁₂₃₄'[k]}", va="center", ha="right", fontsize=11)
    x = CHUNKS + 0.3
    triangle(axis, x, 0.0)
    axis.text(x + 1.15, 0.5, "within a chunk:\nToep(K)", va="center", fontsize=9.5)
    block(axis, x, 1.5, T - 0.1, N, style.PURPLE)
    axis.text(x + 1.15, 1.5 + N / 2, "inputs to state:\nT columns AᵇB", va="center", fontsize=9.5)
    block(axis, x, 2.3, N, T - 0.1, style.BLUE)
    axis.text(x + 1.15, 2.75, "state to outputs:\nT rows CAᵇ", va="center", fontsize=9.5)
    block(axis, x, 3.55, N, N, style.GREEN)
    axis.text(x + 1.15, 3.55 + N / 2, "chunks in between:\npowers of A", va="center", fontsize=9.5)
    axis.set(xlim=(-0.6, CHUNKS + 4.0), ylim=(CHUNKS + 0.1, -0.4), aspect="equal")
    axis.axis("off")
    style.save(figure, "chunks")


if __name__ == "__main__":
    main()
