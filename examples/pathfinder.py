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

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from parallel import run_blocks
from PIL import Image, ImageDraw

if TYPE_CHECKING:  # the processes that make images do without
    from torch import Tensor

DASHES, DISTRACTOR_DASHES = 14, 4  # of a long path, of a short one
COUNT = 200_000  # images of the published data sets, 80% for training, 10% each for validation and test
FOLDER = "curv_contour_length_14"  # of the published data, the hard images

_SCALE = 2  # finer grid that is drawn on
_TURNS = 360  # directions of a path's first dash
_DASH_TRIALS, _PATH_TRIALS, _PLACE_TRIALS = 3, 5, 1024
_ATTEMPTS = 256  # at most so many pairs of paths are tried side by side
_BLOCK = 50  # images a worker makes at a time


@dataclass(frozen=True)
class Setting:
    """The published numbers for one size of image; lengths in pixels.

    Args:
        size: of a side.
        border: kept free of paths.
        margins: kept free around a dash, one of these for each image.
        distance: between the first ends of the two long paths.
        radius: of a dot.
        length: of a dash.
        thickness: of a dash.
        continuity: how straight paths are: a turn by x has a probability of cos(continuity x) squared.
        distractors: short paths, or fewer where there is no room.
        brightness: of long paths; a dot has 1, and the brightest pixel becomes white.
        distractor_brightness: of short paths.
    """

    size: int
    border: int
    margins: tuple[int, ...]
    distance: int
    radius: float
    length: int
    thickness: float
    continuity: float
    distractors: int
    brightness: float
    distractor_brightness: float


SETTINGS = {
    32: Setting(32, 1, (1,), 7, 1.5, 2, 0.5, 1.0, 5, 1.5, 2.0),
    64: Setting(64, 1, (1,), 12, 2.5, 5, 1.0, 1.8, 5, 0.8, 0.8),
    128: Setting(128, 1, (2, 3), 20, 3.0, 5, 1.5, 1.8, 8, 0.9, 0.9),
    256: Setting(256, 22, (3,), 27, 5.0, 5, 2.0, 1.8, 7, 1.0, 1.0),
}


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


def read(path: Path, size: int, *, workers: int | None = None) -> dict[str, "Tensor"]:
    """What `generate` returns, from a published folder such as lra_release/pathfinder32.

    Args:
        path: holds FOLDER, with metadata/*.npy and imgs/.
        size: pixels of a side.
        workers: processes; None for one a core.

    Raises:
        OSError: if an image cannot be read.
        ValueError: if the folder holds something else.
    """
    files, labels = [], []
    # Text in spite of its name. The names are numbers.
    for file in sorted(
        (path / FOLDER / "metadata").glob("*.npy"), key=lambda file: (len(file.stem), file.stem)
    ):
        for line in file.read_text(errors="replace").splitlines():
            folder, name, _, label = [*line.split()[:4], "", "", "", ""][:4]
            if label not in ("0", "1"):
                raise ValueError(f"{file}: expected folder, name, number and label 0 or 1, got {line[:60]!r}")
            files.append(path / FOLDER / folder / name)
            labels.append(int(label))
    if not files:
        raise ValueError(f"{path} has no {FOLDER}/metadata/*.npy")
    load = partial(_loaded, tuple(files), tuple(labels), size)
    return _gathered(run_blocks(load, len(files), 1000, workers, f"reading {path}"), size, len(files))


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


class _Path(NamedTuple):
    """Where on the canvas the dashes of a path are, and their directions: both (dashes,)."""

    positions: np.ndarray
    directions: np.ndarray


class _Growing:
    """Paths that grow side by side, each with a canvas of what it must not come to lie on."""

    def __init__(self, blocked: np.ndarray, dashes: int) -> None:
        self.blocked = blocked  # (paths, pixels) uint8
        self.pivots = np.zeros(len(blocked), np.int64)  # where the gap before the newest dash turned
        self.positions = np.zeros((len(blocked), dashes), np.int64)
        self.directions = np.zeros((len(blocked), dashes), np.int64)

    def path(self, row: int) -> _Path:
        """One of them."""
        return _Path(self.positions[row], self.directions[row])


class _Canvas:
    """Where paths of one margin are drawn: a flat array of pixels in a frame so wide that nothing leaves it.

    Positions and offsets are indices of that array. Directions are numbers: below 360 of a first dash, whose
    position is its begin; then one for each step from a pivot to the end of the dash behind it, which is the
    position of that dash. `ink` and `mask` (directions, patch) are a dash, and what lies within its margin.
    """

    def __init__(self, setting: Setting, margin: int) -> None:
        self.setting = setting
        length, step = setting.length, setting.length + margin
        reach = step + math.ceil(setting.thickness)
        self.frame = reach + 2 * margin
        self.width = setting.size + 2 * self.frame
        steps = np.unique(np.rint(step * _vectors(np.arange(0, 2 * np.pi, 1 / step))), axis=0)
        self.angles = np.concatenate([np.deg2rad(np.arange(_TURNS)), np.arctan2(*steps.T)])
        self.steps = self._offset(steps)
        self.advance = self._offset((step + margin) * _vectors(self.angles))  # from a pivot to the next
        self.back = self._offset(-margin * _vectors(self.angles))  # from the begin of a dash to its pivot
        bend = np.abs(self.angles[:, None] - self.angles[_TURNS:]) % (2 * np.pi)
        bend = np.minimum(np.minimum(bend, 2 * np.pi - bend) * setting.continuity, np.pi / 2)
        # Likely steps after each direction, and their likelihood.
        self.choices, self.likelihood = _nonzero(np.round(np.cos(bend) ** 2, 12))
        self.patch, self.disk = self._square(reach), self._offset(_disk(margin))
        drawn = np.concatenate([self.angles[:_TURNS], self.angles[_TURNS:] + np.pi])
        lines = np.stack([_line(reach, angle, length, setting.thickness) for angle in drawn])
        self.ink = _reduced(lines)
        masks = _reduced(_dilated(lines, _disk(margin * _SCALE)))
        pixels, self.mask = _nonzero(masks)
        self.around = self.patch[pixels]
        # Of a first dash: offsets of what its margin covers wholly; first and last row and column of that.
        whole = [np.argwhere(mask.reshape(2 * reach + 1, -1) == 255) - reach for mask in masks[:_TURNS]]
        self.cores = [self._offset(points) for points in whole]
        self.extents = np.stack([(points.min(0), points.max(0)) for points in whole])
        border = np.full((self.width, self.width), 255, np.uint8)
        inner = slice(self.frame + setting.border, self.width - self.frame - setting.border)
        border[inner, inner] = 0
        self.border = border.ravel()

    def pair(self, generator: np.random.Generator) -> tuple[list[_Path], np.ndarray]:
        """Two long paths, and what they block (pixels,): the first of many attempts that gets through."""
        number = 16
        while (found := self._attempts(generator, number)) is None:
            number = min(2 * number, _ATTEMPTS)
        return found

    def _attempts(self, generator: np.random.Generator, number: int) -> tuple[list[_Path], np.ndarray] | None:
        setting = self.setting
        # What a path must not come to lie on is everything but its own newest dash.
        paths = _Growing(np.tile(self.border, (2 * number, 1)), DASHES)
        directions = generator.integers(_TURNS, size=2 * number)
        low = 2 * setting.distance - self.extents[directions[:number], 0]
        high = setting.size - 2 * setting.distance - self.extents[directions[:number], 1]
        rows = np.flatnonzero((low < high).all(1))
        begins = generator.integers(low[rows], high[rows])
        away = setting.distance * _vectors(generator.uniform(0, 2 * np.pi, len(rows)))
        for points, own, other in ((begins, 0, number), (begins + away, number, 0)):
            positions = self._offset(points + self.frame)
            fits = self._fits(paths, rows + own, positions, directions[rows + own])
            rows, positions = rows[fits], positions[fits]
            self._begin(paths, rows + own, positions, directions[rows + own])
            self._block(paths, rows + other, positions, directions[rows + own])
            begins, away = begins[fits], away[fits]
        for dash in range(1, DASHES):
            for own, other in ((0, number), (number, 0)):
                rows = self._extend(generator, paths, rows + own, dash) - own
                if not len(rows):
                    return None
                self._block(paths, rows + other, *self._dashes(paths, rows + own, dash))
        row = rows[:1]
        self._block(paths, row, *self._dashes(paths, row, DASHES - 1))
        return [paths.path(row[0]), paths.path(row[0] + number)], paths.blocked[row[0]]

    def distractors(self, generator: np.random.Generator, blocked: np.ndarray) -> list[_Path]:
        """Short paths in what room (pixels,) is left."""
        found, row = [], np.zeros(1, np.int64)
        for _ in range(self.setting.distractors):
            for _ in range(_PATH_TRIALS):
                direction = generator.integers(_TURNS, size=1)
                position = self._room(generator, blocked, int(direction[0]))
                if position is None:
                    continue
                paths = _Growing(blocked[None].copy(), DISTRACTOR_DASHES)
                self._begin(paths, row, position, direction)
                if all(
                    len(self._extend(generator, paths, row, dash)) for dash in range(1, DISTRACTOR_DASHES)
                ):
                    self._block(paths, row, *self._dashes(paths, row, DISTRACTOR_DASHES - 1))
                    blocked = paths.blocked[0]
                    found.append(paths.path(0))
                    break
        return found

    def image(self, long_paths: list[_Path], short_paths: list[_Path], dots: list[int]) -> np.ndarray:
        """Everything drawn, as (size, size) uint8."""
        setting, canvas = self.setting, np.zeros(len(self.border))
        for paths, brightness in (
            (long_paths, setting.brightness),
            (short_paths, setting.distractor_brightness),
        ):
            for path in paths:
                for position, direction in zip(path.positions, path.directions, strict=True):
                    patch = position + self.patch
                    canvas[patch] = np.maximum(canvas[patch], brightness / 255 * self.ink[direction])
        offsets, ink = self._dot
        for position in dots:
            canvas[position + offsets] = np.maximum(canvas[position + offsets], ink)
        inner = slice(self.frame, self.frame + setting.size)
        image = canvas.reshape(self.width, self.width)[inner, inner]
        return (image * (255 / image.max()) + 0.5).astype(np.uint8)

    def point(self, position: int) -> np.ndarray:
        """Row and column of a position (2,)."""
        return np.array(divmod(position, self.width)) - self.frame

    def segments(self, path: _Path) -> np.ndarray:
        """Begin and end of each dash of a path (dashes, 2, 2)."""
        points = np.stack([self.point(position) for position in path.positions]).astype(float)
        along = self.setting.length * _vectors(self.angles[path.directions])
        first = (path.directions < _TURNS)[:, None]
        return np.stack([np.where(first, points, points - along), np.where(first, points + along, points)], 1)

    def _begin(
        self, paths: _Growing, rows: np.ndarray, positions: np.ndarray, directions: np.ndarray
    ) -> None:
        paths.positions[rows, 0], paths.directions[rows, 0] = positions, directions
        paths.pivots[rows] = positions + self.back[directions]

    def _extend(
        self, generator: np.random.Generator, paths: _Growing, rows: np.ndarray, dash: int
    ) -> np.ndarray:
        """Add a dash to those of some paths that have room for it, and block the dash before; their rows."""
        positions, directions = self._dashes(paths, rows, dash - 1)
        pivots = paths.pivots[rows] + self.advance[directions]
        steps = self.choices[directions]
        ends = pivots[:, None] + self.steps[steps]
        near = self._seen(paths, rows, ends[:, :, None] + self.disk).max(2)
        likelihood = (self.likelihood[directions] * (1 - near / 255)).cumsum(1)
        chosen = np.full(len(rows), -1)
        waiting = np.flatnonzero(likelihood[:, -1] > 1e-4)
        for _ in range(_DASH_TRIALS if len(waiting) else 0):
            drawn = generator.random(len(waiting)) * likelihood[waiting, -1]
            choice = (likelihood[waiting] <= drawn[:, None]).sum(1)
            fits = self._fits(paths, rows[waiting], ends[waiting, choice], steps[waiting, choice] + _TURNS)
            chosen[waiting[fits]] = choice[fits]
            waiting = waiting[~fits]
        grown = np.flatnonzero(chosen >= 0)
        rows = rows[grown]
        self._block(paths, rows, positions[grown], directions[grown])
        paths.pivots[rows] = pivots[grown]
        paths.positions[rows, dash] = ends[grown, chosen[grown]]
        paths.directions[rows, dash] = steps[grown, chosen[grown]] + _TURNS
        return rows

    def _room(self, generator: np.random.Generator, blocked: np.ndarray, direction: int) -> np.ndarray | None:
        """A random position (1,) from which a dash and its margin lie on nothing blocked, if one is found."""
        for _ in range(4):
            points = generator.integers(self.setting.size, size=(_PLACE_TRIALS // 4, 2))
            positions = self._offset(points + self.frame)
            room = np.flatnonzero(blocked[positions[:, None] + self.cores[direction]].max(1) < 77)
            if len(room):
                return positions[room[:1]]
        return None

    def _dashes(self, paths: _Growing, rows: np.ndarray, dash: int) -> tuple[np.ndarray, np.ndarray]:
        return paths.positions[rows, dash], paths.directions[rows, dash]

    def _seen(self, paths: _Growing, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        """What is blocked at positions (rows, ...) of the canvases of some paths."""
        first = (rows * len(self.border)).reshape(-1, *[1] * (index.ndim - 1))
        return paths.blocked.ravel().take(first + index)

    def _fits(
        self, paths: _Growing, rows: np.ndarray, positions: np.ndarray, directions: np.ndarray
    ) -> np.ndarray:
        """Whether dashes and their margins lie on nothing blocked, nearly, for each of some paths."""
        seen = self._seen(paths, rows, positions[:, None] + self.around[directions])
        return np.add(seen, self.mask[directions], dtype=np.uint16).max(1) < 1.8 * 255

    def _block(
        self, paths: _Growing, rows: np.ndarray, positions: np.ndarray, directions: np.ndarray
    ) -> None:
        """Block dashes with their margins on the canvases of some paths."""
        index = (rows * len(self.border) + positions)[:, None] + self.around[directions]
        blocked = paths.blocked.ravel()
        blocked[index] = np.maximum(blocked.take(index), self.mask[directions])

    def _offset(self, points: np.ndarray) -> np.ndarray:
        """Rows and columns (..., 2), rounded, as offsets (...)."""
        return (np.rint(points) @ (self.width, 1)).astype(np.int64)

    def _square(self, reach: int) -> np.ndarray:
        rows = np.arange(-reach, reach + 1)
        return (rows[:, None] * self.width + rows).ravel()

    @cached_property
    def _dot(self) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and ink of a dot."""
        reach = math.ceil(self.setting.radius) + 3
        fine = np.zeros((2 * reach * _SCALE + 1,) * 2, np.uint8)
        fine[tuple((_disk(self.setting.radius * _SCALE) + reach * _SCALE).T)] = 255
        return self._square(reach), _reduced(fine[None])[0] / 255


_canvas = lru_cache(_Canvas)


def _vectors(angles: np.ndarray | float) -> np.ndarray:
    """Rows and columns (..., 2) of unit vectors."""
    return np.stack([np.sin(angles), np.cos(angles)], -1)


def _disk(radius: float) -> np.ndarray:
    """Integer points (n, 2) within a radius."""
    rows = np.arange(-int(radius), int(radius) + 1)
    points = np.stack(np.meshgrid(rows, rows, indexing="ij"), -1).reshape(-1, 2)
    return points[(points**2).sum(1) <= radius**2]


def _line(reach: int, angle: float, length: int, thickness: float) -> np.ndarray:
    """A dash on the finer grid, from the middle of a square of twice `reach` pixels and one."""
    image = Image.new("L", (2 * reach * _SCALE + 1,) * 2)
    middle = np.full(2, reach * _SCALE)
    end = middle + np.rint(length * _SCALE * _vectors(angle)).astype(int)
    ImageDraw.Draw(image).line(
        [*middle.tolist(), *end[::-1].tolist()], fill=255, width=round(thickness * _SCALE)
    )
    return np.asarray(image)


def _nonzero(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values of what is not zero in a table (n, m), as two tables (n, most) padded with zeros."""
    columns = np.argsort(-table.astype(float), axis=1, kind="stable")[
        :, : np.count_nonzero(table, axis=1).max()
    ]
    return columns, np.take_along_axis(table, columns, 1)


def _dilated(images: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Images (n, h, w) with each pixel as bright as the brightest among its neighbours at some points."""
    wide = np.abs(points).max()
    padded = np.pad(images, ((0, 0), (wide, wide), (wide, wide)))
    height, width = images.shape[1:]
    result = np.zeros_like(images)
    for row, column in points + wide:
        np.maximum(result, padded[:, row : row + height, column : column + width], out=result)
    return result


def _reduced(images: np.ndarray) -> np.ndarray:
    """Images (n, h, h) of the finer grid as pixels, flat (n, p * p)."""
    side = images.shape[1] // _SCALE + 1
    small = [Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS) for image in images]
    return np.stack([np.asarray(image).ravel() for image in small])


def _pictures(seed: int, size: int, rows: range) -> tuple[np.ndarray, list[int]]:
    pictures = [draw(seed, size, row) for row in rows]
    return np.stack([picture.image for picture in pictures]), [picture.label for picture in pictures]


def _loaded(
    files: tuple[Path, ...], labels: tuple[int, ...], size: int, rows: range
) -> tuple[np.ndarray, list[int]]:
    images = np.empty((len(rows), size, size), np.uint8)
    for image, row in zip(images, rows, strict=True):
        with Image.open(files[row]) as file:
            if file.size != (size, size):
                raise ValueError(f"{files[row]} is {file.size[0]}x{file.size[1]}, expected {size}x{size}")
            image[:] = np.asarray(file.convert("L"))
    return images, [labels[row] for row in rows]


def _gathered(blocks: Iterable[tuple[np.ndarray, list[int]]], size: int, count: int) -> dict[str, "Tensor"]:
    import torch

    images, labels = np.empty((count, size * size, 1), np.uint8), []
    for block, block_labels in blocks:
        images[len(labels) : len(labels) + len(block)] = block.reshape(len(block), -1, 1)
        labels += block_labels
    return {"images": torch.from_numpy(images), "labels": torch.tensor(labels, dtype=torch.int64)}


def main(size: int = 32, seed: int = 0, show: Path = Path("pathfinder.png")) -> None:
    """Write a figure of the first images.

    Args:
        size: pixels of a side: 32, 64, 128 or 256.
        seed: of the images.
        show: the file to write.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout="constrained")
    images = generate(seed, size, axes.size, workers=1)
    for axis, image, label in zip(axes.flat, images["images"], images["labels"], strict=True):
        axis.imshow(image.numpy().reshape(size, size), cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[], title="joined" if label else "not joined")
    figure.savefig(show, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
