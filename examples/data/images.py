"""Images read pixel by pixel."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from data.base import SequenceData, Spec, hold_out
from data.batches import Batch
from data.parquet import check_integers, parquet_files, rows
from data.storage import DataError

PERMUTATION_SEED = 42  # the one pixel order of permuted MNIST


@dataclass(frozen=True)
class Source:
    """A set of labelled images: where it comes from and the shape of one image."""

    height: int
    width: int
    channels: int
    classes: int = 10
    hub: str = ""
    column: str = ""

    @property
    def length(self) -> int:
        """Steps of the sequence, one a pixel."""
        return self.height * self.width


SOURCES = {
    "digits": Source(8, 8, 1),
    "mnist": Source(28, 28, 1, hub="ylecun/mnist", column="image"),
    "cifar10": Source(32, 32, 3, hub="uoft-cs/cifar10", column="img"),
}


class SequentialImages(SequenceData):
    """An image data set read pixel by pixel, one row of the image after the other.

    Args:
        dataset: digits (scikit-learn's 8x8 digits, nothing to download), mnist, or cifar10.
        path: a folder with train.parquet and test.parquet in the hub's schema; without it the hub is asked.
        permute: read the pixels in one fixed random order (permuted MNIST).
        grayscale: read colours as their luminance (the Image task of the Long Range Arena).
        batch_size: training examples a step, on each device.
        eval_batch_size: examples a step in validation and test.
        validation: fraction of the training images of each class held out for validation.
        cache_dir: where the decoded images are kept; without it ~/.cache/s4-examples.
        seed: order of the training images.
    """

    splits = ("train", "test")

    def __init__(
        self,
        dataset: Literal["digits", "mnist", "cifar10"] = "digits",
        path: Path | None = None,
        permute: bool = False,
        grayscale: bool = False,
        batch_size: int = 50,
        eval_batch_size: int = 200,
        validation: float = 0.1,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < validation <= 0.5:
            raise ValueError(f"data.validation must be in (0, 0.5], got {validation}")
        self.dataset, self.source = dataset, SOURCES[dataset]
        self.permute, self.grayscale, self.validation = permute, grayscale, validation
        channels = 1 if grayscale else self.source.channels
        spec = Spec("label", channels, self.source.classes)
        super().__init__(
            spec, path if dataset != "digits" else None, batch_size, eval_batch_size, cache_dir, seed
        )
        length = self.source.length
        order = np.random.default_rng(PERMUTATION_SEED).permutation(length) if permute else np.arange(length)
        self.pixels = torch.from_numpy(order)

    def content(self) -> dict[str, Any]:
        """The data set, and what its images are decoded to."""
        return {"dataset": self.dataset, "grayscale": self.grayscale}

    def options(self) -> dict[str, Any]:
        """The order of the pixels and the part held out."""
        return {"permute": self.permute, "validation": self.validation}

    def files(self, split: str) -> list[Path]:
        """Checked parquet files."""
        return parquet_files(self.path, split, (self.source.column, "label")) if self.path else []

    def build(self, split: str) -> dict[str, Tensor]:
        """images uint8 (n, L, C), labels int64 (n,), mean and std float32 (C,)."""
        images, labels = _digits(split) if self.dataset == "digits" else self._decoded(split)
        return {"images": images, "labels": labels, **_statistics(images)}

    def partition(self) -> dict[str, tuple[str, np.ndarray]]:
        """Some of the training images of each class are for validation."""
        return self.held_out(self.validation)

    def fetch(self, split: str, rows: Tensor) -> Batch:
        """uint8 images (B, L, C)."""
        tensors = self.tensors[split]
        return Batch(tensors["images"].index_select(0, rows), tensors["labels"].index_select(0, rows))

    def transform(self, batch: Batch, training: bool) -> Batch:
        """Normalised."""
        return batch._replace(inputs=self.normalize(batch.inputs))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, L, C) in image order to float32 (B, L, C) in reading order, mean 0 and variance 1."""
        device, train = images.device, self.tensors["train"]
        if self.permute:
            images = images.index_select(1, self.pixels.to(device))
        return (images.float() - train["mean"].to(device)) / train["std"].to(device)

    def _decoded(self, split: str) -> tuple[Tensor, Tensor]:
        import datasets  # only here: the embedded digits do without

        source, columns = self.source, (self.source.column, "label")
        size = f"{source.height}x{source.width}"
        expected = f"{size} images in column {source.column!r} and integers in column 'label'"
        with rows(source.hub, self.path, split, columns, expected) as table:
            check_integers(table, "label")
            table = table.cast_column(source.column, datasets.Image())
            channels = self.spec.d_input
            images = torch.empty(len(table), source.height, source.width, channels, dtype=torch.uint8)
            start = 0
            batches = track(
                table.iter(512),
                f"decoding {self.path or source.hub} {split}",
                total=-(-len(table) // 512),
                transient=True,
                disable=not sys.stdout.isatty(),
            )
            for batch in batches:
                if None in batch[source.column]:
                    raise ValueError(f"row {start + batch[source.column].index(None)} has no image")
                arrays = np.stack(
                    [np.asarray(i.convert("L" if channels == 1 else "RGB")) for i in batch[source.column]]
                )
                images[start : start + len(arrays)] = torch.from_numpy(arrays).view(-1, *images.shape[1:])
                start += len(arrays)
            labels = torch.tensor(table["label"][:], dtype=torch.int64)
        if not len(labels) or labels.min() < 0 or labels.max() >= source.classes:
            raise DataError(
                f"{self.path or source.hub} {split}: expected labels 0 to {source.classes - 1}, "
                f"got {labels.unique().tolist()[:5]}"
            )
        return images.view(len(labels), source.length, channels), labels


def _digits(split: str) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = dict(zip(("train", "test"), hold_out(digits.target, 0.2), strict=True))[split]
    images = torch.from_numpy(digits.images[rows].astype(np.uint8)).view(len(rows), -1, 1)
    return images, torch.from_numpy(digits.target[rows])


def _statistics(images: Tensor) -> dict[str, Tensor]:
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(2)]).double()
    weights, levels = counts / counts.sum(1, keepdim=True), torch.arange(256.0, dtype=torch.float64)
    mean = weights @ levels
    std = (weights @ levels.square() - mean.square()).clamp_min(1e-6).sqrt()
    return {"mean": mean.float(), "std": std.float()}
