"""Draw images of Pathfinder into a figure: python examples/pathfinder.py [--options]."""

from pathlib import Path

import matplotlib.pyplot as plt
from data.pathfinder import generate
from jsonargparse import auto_cli


def main(size: int = 32, seed: int = 0, show: Path = Path("pathfinder.png")) -> None:
    """Write a figure of the first images.

    Args:
        size: pixels of a side: 32, 64, 128 or 256.
        seed: of the images.
        show: the file to write.
    """
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout="constrained")
    images = generate(seed, size, axes.size, workers=1)
    for axis, image, label in zip(axes.flat, images["images"], images["labels"], strict=True):
        axis.imshow(image.numpy().reshape(size, size), cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[], title="joined" if label else "not joined")
    figure.savefig(show, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    auto_cli(main)
