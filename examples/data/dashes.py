"""Dashed paths on a canvas: how those of Pathfinder grow, keep out of each other's way and are drawn.

The method of github.com/drewlinsley/pathfinder (commit ab9c130; Linsley et al., arXiv 1805.08315).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

DASHES, DISTRACTOR_DASHES = 14, 4  # of a long path, of a short one

_SCALE = 2  # finer grid that is drawn on
_TURNS = 360  # directions of a path's first dash
_DASH_TRIALS, _PATH_TRIALS, _PLACE_TRIALS = 3, 5, 1024
_ATTEMPTS = 256  # at most so many pairs of paths are tried side by side


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


class DashedPath(NamedTuple):
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

    def path(self, row: int) -> DashedPath:
        """One of them."""
        return DashedPath(self.positions[row], self.directions[row])


class Canvas:
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

    def pair(self, generator: np.random.Generator) -> tuple[list[DashedPath], np.ndarray]:
        """Two long paths, and what they block (pixels,): the first of many attempts that gets through."""
        number = 16
        while (found := self._attempts(generator, number)) is None:
            number = min(2 * number, _ATTEMPTS)
        return found

    def _attempts(
        self, generator: np.random.Generator, number: int
    ) -> tuple[list[DashedPath], np.ndarray] | None:
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

    def distractors(self, generator: np.random.Generator, blocked: np.ndarray) -> list[DashedPath]:
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

    def image(
        self, long_paths: list[DashedPath], short_paths: list[DashedPath], dots: list[int]
    ) -> np.ndarray:
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

    def segments(self, path: DashedPath) -> np.ndarray:
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
