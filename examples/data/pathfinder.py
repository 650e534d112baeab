"""Pathfinder of the Long Range Arena: are two dots the ends of one dashed path, or of two?

Made as the Long Range Arena defines its hard images of 32, 64, 128 (Path-X) and 256 pixels a side, or read
from its published folders (Tay et al., arXiv 2011.04006; github.com/google-research/long-range-arena at
commit 211e07d, whose lra_benchmarks/data/pathfinder.py lists settings of github.com/drewlinsley/pathfinder,
here at ab9c130, by Linsley et al., arXiv 1805.08315). `python examples/pathfinder.py --size 128` shows
some.

An image has two paths of 14 dashes and some of 4. A path grows dash by dash: a gap of two margins, in which
it turns by a random angle (small ones are likelier), then the next dash, with a margin to all that was
drawn before. One thing differs: in the original a new dash of a long path may lie on the newest of the
other, and a short path on the last dash of one of them. Here no dash lies on another. With margins of one
pixel, at 32 pixels often, at 64 rarely, paths still go through each other's gaps, as in the original.
"""

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from data.dashes import Canvas, Setting
from data.parallel import run_blocks

if TYPE_CHECKING:  # the processes that make images do without
    from torch import Tensor

COUNT = 200_000  # images of the published data sets, 80% for training, 10% each for validation and test
FOLDER = "curv_contour_length_14"  # of the published data, the hard images

_BLOCK = 50  # images a worker makes at a time


SETTINGS = {
    32: Setting(32, 1, (1,), 7, 1.5, 2, 0.5, 1.0, 5, 1.5, 2.0),
    64: Setting(64, 1, (1,), 12, 2.5, 5, 1.0, 1.8, 5, 0.8, 0.8),
    128: Setting(128, 1, (2, 3), 20, 3.0, 5, 1.5, 1.8, 8, 0.9, 0.9),
    256: Setting(256, 22, (3,), 27, 5.0, 5, 2.0, 1.8, 7, 1.0, 1.0),
}

_canvas = lru_cache(Canvas)


class Picture(NamedTuple):
    """An image and what is in it.

    Shapes: image (size, size) uint8; label 0 or 1; dots (2, 2) the row and column of each; paths: for each,
    the long ones first, the begin and end of its dashes in order, (dashes, 2, 2).
    """

    image: np.ndarray
    label: int
    dots: np.ndarray
    paths: list[np.ndarray]


def generate(
    seed: int, size: int = 32, count: int = COUNT, *, workers: int | None = None
) -> dict[str, "Tensor"]:
    """Random images, the same for a seed whatever the number of processes.

    Args:
        seed: of the images.
        size: pixels of a side, one of SETTINGS.
        count: images, n.
        workers: processes; None for one a core.

    Returns:
        `images` uint8 (n, size * size, 1), row by row; `labels` int64 (n,), 1 where a path joins the dots.

    Raises:
        ValueError: for another size.
    """
    if size not in SETTINGS:
        raise ValueError(f"size must be one of {', '.join(map(str, SETTINGS))}, got {size}")
    return _gathered(
        run_blocks(partial(_pictures, seed, size), count, _BLOCK, workers, f"making Pathfinder {size}"),
        size,
        count,
    )


def read(path: Path, size: int) -> dict[str, "Tensor"]:
    """What `generate` returns, from a published folder such as lra_release/pathfinder32.

    Args:
        path: holds FOLDER, with metadata/*.npy and imgs/.
        size: pixels of a side.

    Raises:
        OSError: if an image cannot be read.
        ValueError: if the folder holds something else.
    """
    files: list[Path] = []
    labels: list[int] = []
    lists = (path / FOLDER / "metadata").glob("*.npy")  # text, named by numbers
    for file in sorted(lists, key=lambda file: (len(file.stem), file.stem)):
        for line in file.read_text(errors="replace").splitlines():
            folder, name, _, label = [*line.split()[:4], "", "", "", ""][:4]
            if label not in ("0", "1"):
                raise ValueError(f"{file}: expected folder, name, number and label 0 or 1, got {line[:60]!r}")
            files.append(path / FOLDER / folder / name)
            labels.append(int(label))
    if not files:
        raise ValueError(f"{path} has no {FOLDER}/metadata/*.npy")
    load = partial(_loaded, files, labels, size)
    return _gathered(run_blocks(load, len(files), 1000, 1, f"reading {path}"), size, len(files))


def draw(seed: int, size: int, row: int) -> Picture:
    """The image in a row of `generate`, with what is in it."""
    setting, generator = SETTINGS[size], np.random.default_rng([seed, size, row])
    label = int(generator.integers(2))
    canvas = _canvas(setting, setting.margins[generator.integers(len(setting.margins))])
    long_paths, blocked = canvas.pair(generator)
    short_paths = canvas.distractors(generator, blocked)
    first = int(generator.integers(2))
    begun, ended = long_paths[first], long_paths[first if label else 1 - first]
    dots = [begun.positions[0], ended.positions[-1]]
    return Picture(
        canvas.image(long_paths, short_paths, dots),
        label,
        np.stack([canvas.point(dot) for dot in dots]),
        [canvas.segments(path) for path in (*long_paths, *short_paths)],
    )


def _pictures(seed: int, size: int, rows: range) -> tuple[np.ndarray, list[int]]:
    pictures = [draw(seed, size, row) for row in rows]
    return np.stack([picture.image for picture in pictures]), [picture.label for picture in pictures]


def _loaded(files: list[Path], labels: list[int], size: int, rows: range) -> tuple[np.ndarray, list[int]]:
    images = np.empty((len(rows), size, size), np.uint8)
    for image, row in zip(images, rows, strict=True):
        with Image.open(files[row]) as file:
            if file.size != (size, size):
                raise ValueError(f"{files[row]} is {file.size[0]}x{file.size[1]}, expected {size}x{size}")
            image[:] = np.asarray(file.convert("L"))
    return images, [labels[row] for row in rows]


def _gathered(blocks: Iterable[tuple[np.ndarray, list[int]]], size: int, count: int) -> dict[str, "Tensor"]:
    import torch

    images = np.empty((count, size * size, 1), np.uint8)
    labels: list[int] = []
    for block, block_labels in blocks:
        images[len(labels) : len(labels) + len(block)] = block.reshape(len(block), -1, 1)
        labels += block_labels
    return {"images": torch.from_numpy(images), "labels": torch.tensor(labels, dtype=torch.int64)}
