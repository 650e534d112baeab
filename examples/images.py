"""Images as sequences of pixels: decoded once into a uint8 tensor, cached, and read a batch at a time."""

import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from rich.progress import track
from storage import UNREADABLE, atomic_save
from torch import Tensor

SPLIT_SEED = 0  # which images are held out never depends on the seed of a run
PERMUTATION_SEED = 42  # the one pixel order of permuted MNIST
CACHE_VERSION = 2  # raise when the content of a cache file changes


class DataError(Exception):
    """Data that cannot be used; the message says what was found and what was expected."""


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


class TensorLoader:
    """Batches `(images, labels)` of rows of tensors, in an order that depends on (seed, epoch) only.

    Lightning calls `set_epoch` through `sampler`, and keeps `state_dict` in its checkpoints: an interrupted
    epoch goes on with the very next batch. Ranks read disjoint rows; with `drop_last` all the same number.

    Args:
        images: (n, L, C), any dtype; may be memory-mapped.
        labels: (n,).
        rows: the rows to read.
        batch_size: rows a batch, on each rank.
        shuffle: a new order each epoch, else the order of `rows`.
        drop_last: leave out the rows that do not fill a batch on every rank.
        content: what else must be equal in a run that goes on from a place in these data.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        rows: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        content: dict[str, Any] | None = None,
    ) -> None:
        self.images, self.labels, self.rows = images, labels, rows
        self.batch_size, self.shuffle, self.drop_last = batch_size, shuffle, drop_last
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.content = content or {}
        self.epoch = 0
        self.position = 0  # batches of this epoch already handed out
        self._start = 0  # where the next pass begins: 0, unless resumed

    batch_sampler = None  # Lightning looks for it beside `sampler`

    @property
    def sampler(self) -> "TensorLoader":
        """What Lightning calls `set_epoch` on."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begin `epoch`, unless this epoch is the one being resumed."""
        if epoch != self.epoch:
            self.epoch, self.position, self._start = epoch, 0, 0

    def order(self) -> Tensor:
        """This rank's rows of the current epoch, in the order they are read."""
        rows = self.rows
        if self.shuffle:
            rows = np.random.default_rng([self.seed, self.epoch]).permutation(rows)
        if self.drop_last:
            rows = rows[: len(rows) - len(rows) % (self.batch_size * self.world_size)]
        return torch.from_numpy(rows[self.rank :: self.world_size].astype(np.int64))

    def __len__(self) -> int:
        if self.drop_last:
            return len(self.rows) // (self.batch_size * self.world_size)
        return -(-len(self.rows[self.rank :: self.world_size]) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.order().split(self.batch_size)
        start, self._start = self._start, 0
        for index in range(start, len(batches)):
            self.position = index + 1
            yield self.images.index_select(0, batches[index]), self.labels.index_select(0, batches[index])

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and what must be equal for that place to mean anything."""
        return {"epoch": self.epoch, "position": self.position, "identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place `state_dict` saved.

        Raises:
            DataError: if the data, batch size, seed or number of ranks are not those of the saved run.
        """
        saved, own = state["identity"], self._identity()
        if differing := [name for name in {**own, **saved} if saved.get(name) != own.get(name)]:
            was, now = ({name: side.get(name) for name in differing} for side in (saved, own))
            raise DataError(
                f"cannot resume at the same batch: the checkpoint was written with {was}, "
                f"this run has {now}; use the same data, data options, seed and number of devices"
            )
        self.epoch, self.position, self._start = state["epoch"], state["position"], state["position"]

    def _identity(self) -> dict[str, Any]:
        return {
            **self.content,
            "rows": len(self.rows),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "devices": self.world_size,
        }


class SequentialImages(pl.LightningDataModule):
    """An image data set read pixel by pixel, one row of the image after the other.

    Args:
        dataset: digits (scikit-learn's 8x8 digits, nothing to download), mnist, or cifar10 (RGB).
        path: a folder with train.parquet and test.parquet in the hub's schema; without it the hub is asked.
        permute: read the pixels in one fixed random order (permuted MNIST).
        batch_size: training examples a step, on each device.
        eval_batch_size: examples a step in validation and test.
        validation: fraction of the training images of each class held out for validation.
        cache_dir: where the decoded images are kept; without it ~/.cache/s4-examples.
        seed: order of the training images.
    """

    def __init__(
        self,
        dataset: Literal["digits", "mnist", "cifar10"] = "digits",
        path: Path | None = None,
        permute: bool = False,
        batch_size: int = 50,
        eval_batch_size: int = 200,
        validation: float = 0.1,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size < 1:
                raise ValueError(f"data.{name} must be at least 1, got {size}")
        if not 0 < validation <= 0.5:
            raise ValueError(f"data.validation must be in (0, 0.5], got {validation}")
        self.dataset, self.source, self.path = dataset, SOURCES[dataset], path
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.permute, self.validation = permute, validation
        self.cache_dir = cache_dir or _default_cache()
        length = self.source.length
        self.pixels = (
            np.random.default_rng(PERMUTATION_SEED).permutation(length) if permute else np.arange(length)
        )

    def prepare_data(self) -> None:
        """Decode and cache both splits (on one process; the others wait)."""
        for split in ("train", "test"):
            self._images(split)

    def setup(self, stage: str) -> None:
        """Open the cached splits and hold out the validation rows."""
        self.train, self.test = self._images("train"), self._images("test")
        self.mean, self.std = self.train["mean"], self.train["std"]
        self.train_rows, self.val_rows = hold_out(self.train["labels"].numpy(), self.validation)
        if len(self.train_rows) < self.batch_size:
            raise DataError(
                f"{self.dataset} has {len(self.train_rows)} training images, "
                f"fewer than one batch of data.batch_size={self.batch_size}"
            )
        if not len(self.val_rows):
            raise DataError(
                f"data.validation={self.validation} holds out none of {len(self.train_rows)} training images"
            )

    def train_dataloader(self) -> TensorLoader:
        """Shuffled training batches."""
        return self._loader(self.train, self.train_rows, self.batch_size, training=True)

    def val_dataloader(self) -> TensorLoader:
        """The held-out part of the training images."""
        return self._loader(self.train, self.val_rows, self.eval_batch_size)

    def test_dataloader(self) -> TensorLoader:
        """The test images, in their own order."""
        return self._loader(self.test, np.arange(len(self.test["labels"])), self.eval_batch_size)

    def predict_dataloader(self) -> TensorLoader:
        """The test images, in their own order."""
        return self.test_dataloader()

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Normalise on the device: a quarter of the bytes to move."""
        images, labels = batch
        return self.normalize(images), labels

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, L, C) in image order to float32 (B, L, C) in reading order, mean 0 and variance 1."""
        pixels = torch.from_numpy(self.pixels).to(images.device)
        images = images.index_select(1, pixels).float()
        return (images - self.mean.to(images.device)) / self.std.to(images.device)

    def _loader(
        self, split: dict[str, Any], rows: np.ndarray, batch_size: int, training: bool = False
    ) -> TensorLoader:
        return TensorLoader(
            split["images"],
            split["labels"],
            rows,
            batch_size,
            shuffle=training,
            drop_last=training,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            content={
                "dataset": self.dataset,
                "permute": self.permute,
                "validation": self.validation,
                "digest": split["digest"],
            },
        )

    def _images(self, split: str) -> dict[str, Any]:
        if self.dataset == "digits":
            return _digits(split)
        file = self.cache_dir / f"{self.dataset}-{split}-{fingerprint(self.source, self.path, split)}.pt"
        try:
            content = torch.load(file, mmap=True, weights_only=True)
            if _is_decoded(content, self.source):
                return content
        except UNREADABLE:  # absent, or damaged by something other than this program: built anew
            pass
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)  # before the decoding, which takes a while
            atomic_save(decode(self.source, self.path, split), file)
            return torch.load(file, mmap=True, weights_only=True)
        except OSError as error:
            raise DataError(
                f"cannot keep decoded images in data.cache_dir {self.cache_dir}: {_first_line(error)}; "
                "expected a folder that can be written, with room for them"
            ) from error


def hold_out(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows kept and rows held out: round(fraction * n) of the n of each class, the same on every call."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        held[rows[: round(fraction * len(rows))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def fingerprint(source: Source, path: Path | None, split: str) -> str:
    """Names the cache file: changes with the version of its format and with the files it is made from."""
    parts: list[object] = [CACHE_VERSION, source, split]
    for file in _parquet_files(source, path, split) if path else ():
        status = file.stat()
        parts += [file.resolve(), status.st_size, status.st_mtime_ns]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def decode(source: Source, path: Path | None, split: str) -> dict[str, Any]:
    """Decode every image: `images` uint8 (n, L, C), `labels` int64 (n,), `mean` and `std` float32 (C,),
    and `digest`, a hash of images and labels.

    Raises:
        DataError: if the files cannot be read or hold something else.
    """
    import datasets  # only here: the embedded digits do without

    where = str(path or source.hub)
    datasets.disable_progress_bars()
    try:
        # A local folder is converted in a scratch folder, as its decoded form is cached by us.
        with tempfile.TemporaryDirectory() as scratch:
            if path:
                files = [str(file) for file in _parquet_files(source, path, split)]
                rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=scratch)
            else:
                rows = datasets.load_dataset(source.hub, split=split)
            if not re.match("u?int", kind := str(getattr(rows.features["label"], "dtype", "of no type"))):
                raise ValueError(f"column 'label' is {kind}")
            rows = rows.cast_column(source.column, datasets.Image())
            images = torch.empty(len(rows), source.height, source.width, source.channels, dtype=torch.uint8)
            mode, start = "L" if source.channels == 1 else "RGB", 0
            batches = track(
                rows.iter(512),
                f"decoding {where} {split}",
                total=-(-len(rows) // 512),
                transient=True,
                disable=not sys.stdout.isatty(),
            )
            for batch in batches:
                if None in batch[source.column]:
                    raise ValueError(f"row {start + batch[source.column].index(None)} has no image")
                arrays = np.stack([np.asarray(image.convert(mode)) for image in batch[source.column]])
                images[start : start + len(arrays)] = torch.from_numpy(arrays).view(-1, *images.shape[1:])
                start += len(arrays)
            labels = torch.tensor(rows["label"][:], dtype=torch.int64)
    except (*UNREADABLE, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot read {split} images from {where}: {_first_line(error)}; "
            f"expected {source.height}x{source.width} images in column {source.column!r} "
            "and integers in column 'label'"
        ) from error
    if not len(labels) or labels.min() < 0 or labels.max() >= source.classes:
        raise DataError(
            f"{where} {split}: expected labels 0 to {source.classes - 1}, got {labels.unique().tolist()[:5]}"
        )
    return _with_statistics(images.view(len(labels), source.length, source.channels), labels)


def _parquet_files(source: Source, path: Path, split: str) -> list[Path]:
    """The parquet files of a split, checked: they are there once, can be read, and have the columns."""
    import pyarrow
    import pyarrow.parquet

    expected = f"expected {split}.parquet with columns {source.column!r} and 'label'"
    if not path.is_dir():
        raise DataError(f"data.path {path} is not a folder; {expected}")
    files, sets = [], {}  # sets: (folder, number of parts) to the parts that are there
    for file in sorted(path.rglob(f"{split}*.parquet")):
        if match := re.fullmatch(rf"{split}(?:-(\d+)-of-(\d+)(?:-\w+)?)?\.parquet", file.name):
            sets.setdefault((file.parent, int(match[2] or 1)), []).append(int(match[1] or 0))
            files.append(file)
    if not files:
        raise DataError(f"data.path {path} has no {split}.parquet; {expected}")
    if len(sets) > 1 or any(parts != list(range(number)) for (_, number), parts in sets.items()):
        names = ", ".join(str(file.relative_to(path)) for file in files)
        raise DataError(
            f"data.path {path} must hold every part of {split} just once, got {names}; {expected}"
        )
    for file in files:
        try:
            columns = pyarrow.parquet.read_schema(file).names
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"cannot read {file}: {_first_line(error)}; {expected}") from error
        if missing := {source.column, "label"} - set(columns):
            raise DataError(f"{file} has no column {sorted(missing)}, only {columns}; {expected}")
    return files


def _digits(split: str) -> dict[str, Any]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = dict(zip(("train", "test"), hold_out(digits.target, 0.2), strict=True))[split]
    images = torch.from_numpy(digits.images[rows].astype(np.uint8)).view(len(rows), -1, 1)
    return _with_statistics(images, torch.from_numpy(digits.target[rows]))


def _with_statistics(images: Tensor, labels: Tensor) -> dict[str, Any]:
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(2)]).double()
    weights, levels = counts / counts.sum(1, keepdim=True), torch.arange(256.0, dtype=torch.float64)
    mean = weights @ levels
    std = (weights @ levels.square() - mean.square()).clamp_min(1e-6).sqrt()
    digest = hashlib.sha256(images.numpy())
    digest.update(labels.numpy())
    return {
        "images": images,
        "labels": labels,
        "mean": mean.float(),
        "std": std.float(),
        "digest": digest.hexdigest()[:16],  # of the content alone: a folder may move
    }


def _is_decoded(content: object, source: Source) -> bool:
    """Whether a cache file holds what `decode` returns."""
    if not isinstance(content, dict) or not isinstance(content.get("labels"), Tensor):
        return False
    number = content["labels"].numel()
    layout = {
        "images": (torch.uint8, (number, source.length, source.channels)),
        "labels": (torch.int64, (number,)),
        "mean": (torch.float32, (source.channels,)),
        "std": (torch.float32, (source.channels,)),
    }
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    found = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    return found == layout and isinstance(content.get("digest"), str)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "s4-examples"
