"""Pathfinder: labels by flood fill, geometry and ink against the published settings."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="the examples need the extra 'examples'")

from data import pathfinder
from data.pathfinder import Picture, draw, generate, read
from PIL import Image, ImageDraw
from scipy import ndimage

# Size: margins, distance of the first ends, radius of a dot, length and thickness of a dash, most it can turn
# in a gap, short paths, border, brightness of long and short paths; as the Long Range Arena publishes them.
PUBLISHED = {
    32: ({1}, 7, 1.5, 2, 0.5, 90, 5, 1, (1.5, 2.0)),
    64: ({1}, 12, 2.5, 5, 1.0, 50, 5, 1, (0.8, 0.8)),
    128: ({2, 3}, 20, 3.0, 5, 1.5, 50, 8, 1, (0.9, 0.9)),
    256: ({3}, 27, 5.0, 5, 2.0, 50, 7, 22, (1.0, 1.0)),
}
NUMBER = {32: 60, 64: 4, 128: 12, 256: 30}


@pytest.fixture(scope="module", params=PUBLISHED)
def size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def pictures(size: int) -> list[Picture]:
    return [draw(0, size, row) for row in range(NUMBER[size])]


def undashed(picture: Picture, scale: int = 8) -> np.ndarray:
    """Paths without gaps, as thin lines on a finer grid."""
    side = len(picture.image) * scale
    canvas = Image.new("L", (side, side))
    for path in picture.paths:
        points = (path.reshape(-1, 2)[:, ::-1] + 0.5) * scale
        ImageDraw.Draw(canvas).line([tuple(point) for point in points.tolist()], fill=255, width=2)
    return np.asarray(canvas) > 0


def distance(points: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """From each point (n, 2) to the nearest of the segments (m, 2, 2)."""
    begin, along = segments[:, 0], segments[:, 1] - segments[:, 0]
    offset = points[:, None] - begin
    part = ((offset * along).sum(-1) / (along**2).sum(-1)).clip(0, 1)
    return np.linalg.norm(offset - part[..., None] * along, axis=-1).min(1)


def test_label_by_flood_fill(size: int, pictures: list[Picture]) -> None:
    """Where no path passes through a gap of another, the dots are in one filled region if the label is 1."""
    apart = 0
    for picture in pictures:
        regions, number = ndimage.label(undashed(picture), structure=np.ones((3, 3)))
        if number < len(picture.paths):
            continue
        apart += 1
        found = []
        for row, column in ((picture.dots + 0.5) * 8).astype(int):
            near = regions[row - 2 : row + 3, column - 2 : column + 3]
            found.append(np.bincount(near[near > 0]).argmax())
        assert (found[0] == found[1]) == (picture.label == 1)
    # Gaps of two pixels, between dashes half a pixel wide, let others through.
    assert apart >= (0.25 if size == 32 else 1) * len(pictures)


def test_no_dash_crosses_another(pictures: list[Picture]) -> None:
    for picture in pictures:
        dashes = np.concatenate(picture.paths)
        begin, along = dashes[:, 0], dashes[:, 1] - dashes[:, 0]
        # Whether the ends of each dash are on different sides of the line through each other dash.
        side = [
            along[:, 0] * (point[:, None, 1] - begin[:, 1]) - along[:, 1] * (point[:, None, 0] - begin[:, 0])
            for point in (dashes[:, 0], dashes[:, 1])
        ]
        astride = side[0] * side[1] < -1e-9
        assert not (astride & astride.T).any()


def test_dots_are_ends_of_long_paths(pictures: list[Picture]) -> None:
    """One dot is where a long path begins, the other where the same or the other ends."""
    for picture in pictures:
        begins = np.stack([path[0, 0] for path in picture.paths[:2]])
        ends = np.stack([path[-1, -1] for path in picture.paths[:2]])
        first, second = (
            np.linalg.norm(points - dot, axis=1)
            for points, dot in zip((begins, ends), picture.dots, strict=True)
        )
        assert first.min() == 0
        assert second.min() == 0
        assert (first.argmin() == second.argmin()) == (picture.label == 1)


def test_published_geometry(size: int, pictures: list[Picture]) -> None:
    margins, apart, _, length, _, turn, shorts, border, _ = PUBLISHED[size]
    found, numbers = set(), []
    for picture in pictures:
        assert [len(path) for path in picture.paths] == [14] * 2 + [4] * (len(picture.paths) - 2)
        numbers.append(len(picture.paths) - 2)
        begins = np.stack([path[0, 0] for path in picture.paths[:2]])
        assert abs(np.linalg.norm(begins[0] - begins[1]) - apart) < 1  # both are whole pixels
        assert begins[0].min() > 2 * apart - length - 4
        assert begins[0].max() < size - 2 * apart + length + 4
        gaps = []
        for path in picture.paths:
            along = path[:, 1] - path[:, 0]
            np.testing.assert_allclose(np.linalg.norm(along, axis=1), length)
            assert path.min() > border - 1
            assert path.max() < size - border
            gaps += np.linalg.norm(path[1:, 0] - path[:-1, 1], axis=1).tolist()
            angles = np.arctan2(*along.T)
            bends = np.abs((np.diff(angles) + np.pi) % (2 * np.pi) - np.pi)
            assert np.rad2deg(bends).max() < turn + 1e-6
        found.add(round(np.median(gaps) / 2))
    assert found == margins
    assert max(numbers) == shorts
    assert np.mean(numbers) > 0.8 * shorts


def test_turns_as_likely_as_published() -> None:
    """With room all around, turns x have a density of cos(1.8 x)^2, so a mean size of (pi/4 - 1/pi) / 1.8."""
    turns = []
    for row in range(40):
        for path in draw(1, 256, row).paths:
            angles = np.arctan2(*(path[:, 1] - path[:, 0]).T)
            turns += np.abs((np.diff(angles) + np.pi) % (2 * np.pi) - np.pi).tolist()
    assert abs(np.mean(turns) / ((math.pi / 4 - 1 / math.pi) / 1.8) - 1) < 0.1


def test_ink(size: int, pictures: list[Picture]) -> None:
    """Ink lies on the dashes and dots and nowhere else, about as much as they have area."""
    _, _, radius, length, thickness, *_, brightness = PUBLISHED[size]
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)
    for picture in pictures[:2]:
        assert picture.image.dtype == np.uint8
        assert picture.image.shape == (size, size)
        assert picture.image.max() == 255
        segments = np.concatenate(picture.paths)
        from_dot = np.linalg.norm(grid[:, None] - picture.dots, axis=-1).min(1)
        from_ink = np.minimum(distance(grid, segments) - thickness / 2, from_dot - radius)
        image = picture.image.ravel()
        assert image[from_ink > 2].max() < 32
        rows, columns = np.rint(segments.mean(1)).astype(int).T
        assert picture.image[rows, columns].min() > 48
        assert image[from_dot < radius - 1].min() > 200
        long, short = (thickness * (length + 0.5) * 14 * value for value in brightness)
        expected = 2 * math.pi * radius**2 + 2 * long + (len(picture.paths) - 2) * short * 4 / 14
        assert abs(image.sum() / 255 / expected - 1) < 0.25


def test_brightness(size: int, pictures: list[Picture]) -> None:
    """Long and short paths differ as published, by the median over their dashes."""
    means = []
    for chosen in (slice(2), slice(2, None)):
        points = [(picture, path.mean(1)) for picture in pictures for path in picture.paths[chosen]]
        found = [picture.image[tuple(np.rint(middle).astype(int).T)] for picture, middle in points]
        means.append(np.median(np.concatenate(found)))
    long, short = PUBLISHED[size][-1]
    assert abs(means[0] / means[1] / (long / short) - 1) < 0.1


@pytest.fixture(scope="module")
def made() -> dict[str, torch.Tensor]:
    return generate(3, 32, 120, workers=1)


def test_tensors(made: dict[str, torch.Tensor]) -> None:
    assert made["images"].shape == (120, 1024, 1)
    assert made["images"].dtype == torch.uint8
    assert made["labels"].dtype == torch.int64
    assert len(made["images"].flatten(1).unique(dim=0)) == 120
    picture = draw(3, 32, 57)
    assert np.array_equal(made["images"][57].view(32, 32), picture.image)
    assert made["labels"][57] == picture.label


def test_balanced(made: dict[str, torch.Tensor]) -> None:
    """Labels are a fair coin's: within four standard deviations of half and half."""
    assert made["labels"].unique().tolist() == [0, 1]
    assert abs(int(made["labels"].sum()) - 60) < 4 * 30**0.5


def test_seed_decides_not_the_processes(made: dict[str, torch.Tensor]) -> None:
    again = generate(3, 32, 60, workers=2)
    assert all(torch.equal(again[name], made[name][:60]) for name in again)
    assert not torch.equal(generate(4, 32, 1, workers=1)["images"], made["images"][:1])


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match="one of 32, 64, 128, 256, got 48"):
        generate(0, 48, 1)


def write_published(folder: Path, images: np.ndarray, labels: list[int]) -> Path:
    """Images in the published layout, in blocks named 2 and 10."""
    (folder / pathfinder.FOLDER / "metadata").mkdir(parents=True)
    for block, rows in ((2, range(3)), (10, range(3, len(labels)))):
        (folder / pathfinder.FOLDER / f"imgs/{block}").mkdir(parents=True)
        lines = []
        for row in rows:
            name = f"sample_{row}.png"
            Image.fromarray(images[row]).save(folder / pathfinder.FOLDER / f"imgs/{block}/{name}")
            lines.append(f"imgs/{block} {name} {row} {labels[row]} 1.0 14 4 2 0.5 1 1\n")
        (folder / pathfinder.FOLDER / f"metadata/{block}.npy").write_text("".join(lines))
    return folder


def test_reads_published_folders(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8)
    folder = write_published(tmp_path, images, labels := [1, 0, 0, 1, 1])
    data = read(folder, 32)
    assert torch.equal(data["images"], torch.from_numpy(images).view(5, 1024, 1))
    assert data["labels"].tolist() == labels
    with pytest.raises(ValueError, match=r"sample_0.png is 32x32, expected 64x64"):
        read(folder, 64)
    (folder / pathfinder.FOLDER / "metadata/2.npy").write_text("imgs/2 sample_0.png 0 7\n")
    with pytest.raises(ValueError, match=r"2.npy: expected folder, name, number and label 0 or 1, got 'imgs"):
        read(folder, 32)
    with pytest.raises(ValueError, match="has no curv_contour_length_14"):
        read(tmp_path / "elsewhere", 32)


def test_shows_images(tmp_path: Path) -> None:
    for package in ("jsonargparse", "matplotlib"):
        pytest.importorskip(package, reason="the examples need the extra 'examples'")
    import pathfinder as example

    example.main(size=32, show=tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as figure:
        assert figure.size == (1200, 640)
