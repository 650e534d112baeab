"""ListOps, Pathfinder and Path-X of the Long Range Arena (arXiv 2011.04006): made here, or as published."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from data import listops, pathfinder
from data.base import SPLIT_SEED, SequenceData, Spec
from data.batches import Batch, Ragged
from data.storage import DataError, first_line

MADE_SEED = 0  # of what is made, which the seed of a run does not change


class _Made(SequenceData):
    """Rows made at once, or read from a folder: the first train, the next validate, the last test."""

    def __init__(
        self,
        spec: Spec,
        path: Path | None,
        train_size: int,
        val_size: int,
        batch_size: int,
        eval_batch_size: int,
        cache_dir: Path | None,
        seed: int,
    ) -> None:
        for name, size in (("train_size", train_size), ("val_size", val_size)):
            if size < 1:
                raise ValueError(f"data.{name} must be at least 1, got {size}")
        self.train_size, self.val_size = train_size, val_size
        super().__init__(spec, path, batch_size, eval_batch_size, cache_dir, seed)
        if path is None:
            self.splits = ("all",)

    def content(self) -> dict[str, Any]:
        """How many are made; a folder has its own number."""
        return {} if self.path else {"made": self.train_size + 2 * self.val_size}

    def options(self) -> dict[str, Any]:
        """How many of those are to train."""
        return {} if self.path else {"train_size": self.train_size}

    def partition(self) -> dict[str, tuple[str, np.ndarray]]:
        """One row after the other, as they are independent."""
        if self.path:
            return super().partition()
        return self._divided(np.arange(self.number("all")), self.train_size)

    def _divided(self, rows: np.ndarray, train_size: int) -> dict[str, tuple[str, np.ndarray]]:
        middle = train_size + (len(rows) - train_size) // 2
        parts = np.split(rows, (train_size, middle))
        return {part: ("all", chosen) for part, chosen in zip(("train", "val", "test"), parts, strict=True)}


class ListOps(_Made):
    """Nested lists of digits under MIN, MAX, MED and SM, of 500 to 2,000 tokens, to be told their value.

    Args:
        path: a folder with the published basic_train.tsv, basic_val.tsv and basic_test.tsv; without it
            expressions are made.
        train_size: expressions made to train with.
        val_size: expressions made for validation, and as many for the test.
        batch_size: training expressions a step, on each device.
        eval_batch_size: expressions a step in validation and test.
        cache_dir: where tokens are kept; without it ~/.cache/s4-examples.
        seed: order of the training expressions.
    """

    def __init__(
        self,
        path: Path | None = None,
        train_size: int = listops.SPLITS["train"],
        val_size: int = listops.SPLITS["val"],
        batch_size: int = 32,
        eval_batch_size: int = 64,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        spec = Spec("label", len(listops.VOCABULARY), listops.CLASSES, tokens=True)
        super().__init__(spec, path, train_size, val_size, batch_size, eval_batch_size, cache_dir, seed)

    def content(self) -> dict[str, Any]:
        """The expressions."""
        return {"dataset": "listops", **super().content()}

    def files(self, split: str) -> list[Path]:
        """The published file."""
        file = self.path / f"basic_{split}.tsv" if self.path else None
        if file and not file.is_file():
            raise DataError(f"data.path {self.path} has no {file.name}; expected columns Source and Target")
        return [file] if file else []

    def build(self, split: str) -> dict[str, Tensor]:
        """tokens uint8 (total,), offsets int64 (n + 1,), labels int64 (n,)."""
        if not self.path:
            return listops.generate(MADE_SEED, self.train_size + 2 * self.val_size)
        try:
            return listops.read(*self.files(split))
        except (ValueError, OSError) as error:
            raise DataError(f"cannot read {split} of {self.path}: {first_line(error)}") from error

    def lengths(self, split: str) -> np.ndarray:
        """Tokens of each expression."""
        return self.tensors[split]["offsets"].diff().numpy()

    def fetch(self, split: str, rows: Tensor) -> Batch:
        """uint8 tokens (B, L), padded."""
        tensors = self.tensors[split]
        tokens, lengths = Ragged(tensors["tokens"], tensors["offsets"]).gather(rows, listops.MAX_LENGTH)
        return Batch(tokens, tensors["labels"].index_select(0, rows), lengths)

    def transform(self, batch: Batch, training: bool) -> Batch:
        """Tokens as int64."""
        return batch._replace(inputs=batch.inputs.long())


class Pathfinder(_Made):
    """Images of two dots and dashed paths, read pixel by pixel: does a path join the dots?

    Args:
        size: pixels of a side; the task with 128 is known as Path-X.
        path: a folder of the published data, such as lra_release/pathfinder32, of whose hard images a tenth
            is for validation and a tenth for the test; without it images are made.
        train_size: images made to train with.
        val_size: images made for validation, and as many for the test.
        batch_size: training images a step, on each device.
        eval_batch_size: images a step in validation and test.
        cache_dir: where images are kept; without it ~/.cache/s4-examples.
        seed: order of the training images.
    """

    splits = ("all",)

    def __init__(
        self,
        size: Literal[32, 64, 128, 256] = 32,
        path: Path | None = None,
        train_size: int = pathfinder.COUNT * 8 // 10,
        val_size: int = pathfinder.COUNT // 10,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        self.size = size
        spec = Spec("label", 1, 2)
        super().__init__(spec, path, train_size, val_size, batch_size, eval_batch_size, cache_dir, seed)

    def content(self) -> dict[str, Any]:
        """The images."""
        return {"dataset": f"pathfinder{self.size}", **super().content()}

    def files(self, split: str) -> list[Path]:
        """The lists of the published images."""
        return sorted((self.path / pathfinder.FOLDER / "metadata").glob("*.npy")) if self.path else []

    def build(self, split: str) -> dict[str, Tensor]:
        """images uint8 (n, size * size, 1), labels int64 (n,)."""
        if not self.path:
            return pathfinder.generate(MADE_SEED, self.size, self.train_size + 2 * self.val_size)
        try:
            return pathfinder.read(self.path, self.size)
        except (ValueError, OSError) as error:
            raise DataError(f"cannot read data.path {self.path}: {first_line(error)}") from error

    def partition(self) -> dict[str, tuple[str, np.ndarray]]:
        """Images of a folder in one fixed random order, 80% to train."""
        if not self.path:
            return super().partition()
        rows = np.random.default_rng(SPLIT_SEED).permutation(self.number("all"))
        return self._divided(rows, len(rows) * 8 // 10)

    def fetch(self, split: str, rows: Tensor) -> Batch:
        """uint8 images (B, L, 1)."""
        tensors = self.tensors[split]
        return Batch(tensors["images"].index_select(0, rows), tensors["labels"].index_select(0, rows))

    def transform(self, batch: Batch, training: bool) -> Batch:
        """float32 from -1 for black to 1 for white."""
        return batch._replace(inputs=batch.inputs.float() / 127.5 - 1)
