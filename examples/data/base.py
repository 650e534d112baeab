"""What all data sets share: the data module."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from data.batches import Batch, padded
from data.loader import Loader
from data.storage import DataError, cached, default_cache

SPLIT_SEED = 0  # which rows are held out never depends on the seed of a run


@dataclass(frozen=True)
class Spec:
    """What a model must know of its data.

    Args:
        kind: of the targets: a label of each sequence, or tokens or real values of each position.
        d_input: channels of real inputs, or the size of the vocabulary.
        d_output: labels, the size of the vocabulary, or channels of real targets.
        tokens: the inputs are tokens.
        pairs: each row is a pair of sequences.
        tests: names of the test sets.
    """

    kind: Literal["label", "token", "value"]
    d_input: int
    d_output: int
    tokens: bool = False
    pairs: bool = False
    tests: tuple[str, ...] = ("test",)


class SequenceData(pl.LightningDataModule):
    """A data set of sequences, made into tensors once, which are cached and memory-mapped from then on.

    A data set says in `build` how its tensors are made, in `content` which options they depend on, in
    `partition` which rows are for what, in `fetch` how rows become a batch, and in `transform` what is
    better done on the device.

    Args:
        spec: what the model must know.
        path: a folder with the data; without it they are fetched or made.
        batch_size: training sequences a step, on each device.
        eval_batch_size: sequences a step in validation and test.
        cache_dir: where tensors are kept; without it ~/.cache/s4-examples.
        seed: order of the training sequences.
    """

    splits: tuple[str, ...] = ("train", "val", "test")  # what `build` can make
    version = 1  # raise when what `build` makes changes
    shift = 1  # training rows move by a random number below this, another one each epoch

    def __init__(
        self,
        spec: Spec,
        path: Path | None,
        batch_size: int,
        eval_batch_size: int,
        cache_dir: Path | None,
        seed: int,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size < 1:
                raise ValueError(f"data.{name} must be at least 1, got {size}")
        self.spec, self.path, self.seed = spec, path, seed
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.cache_dir = cache_dir or default_cache()

    def content(self) -> dict[str, Any]:
        """Options that the tensors of `build` depend on."""
        return {}

    def options(self) -> dict[str, Any]:
        """Other options that decide which rows there are, and their order."""
        return {}

    def files(self, split: str) -> list[Path]:
        """The files in `path` that a split is made from, checked to be there."""
        return []

    def build(self, split: str) -> dict[str, Tensor]:
        """The tensors of a split.

        Raises:
            DataError: if the files cannot be read or hold something else.
        """
        raise NotImplementedError

    def partition(self) -> dict[str, tuple[str, np.ndarray]]:
        """For train, val and test: the split and its rows."""
        return {split: (split, np.arange(self.number(split))) for split in self.splits}

    def held_out(self, fraction: float) -> dict[str, tuple[str, np.ndarray]]:
        """A `partition` in which this part of the training rows of each class is for validation."""
        train, val = hold_out(self.tensors["train"]["labels"].numpy(), fraction)
        test = np.arange(self.number("test"))
        return {"train": ("train", train), "val": ("train", val), "test": ("test", test)}

    def number(self, split: str) -> int:
        """Rows of a split."""
        return len(self.tensors[split]["labels"])

    def lengths(self, split: str) -> np.ndarray | None:
        """Lengths of all rows of a split, if they differ."""
        return None

    def fetch(self, split: str, rows: Tensor) -> Batch:
        """The batch of some rows (B,)."""
        raise NotImplementedError

    def transform(self, batch: Batch, training: bool) -> Batch:
        """What remains to be done to a batch on its device."""
        return batch

    def encode(self, text: str) -> Tensor:
        """Tokens (L,) of a text."""
        raise DataError(f"{self._name()} is no text to go on from")

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens (L,)."""
        raise DataError(f"{self._name()} is no text")

    def prepare_data(self) -> None:
        """Make and cache all splits (on one process; the others wait)."""
        for split in self.splits:
            self._open(split)

    def setup(self, stage: str) -> None:
        """Open the cached splits and divide the rows."""
        self.tensors = {split: self._open(split) for split in self.splits}
        self.parts = self.partition()
        devices = self.trainer.world_size if self.trainer else 1
        batches = self._batches_a_step()
        number = len(self.parts["train"][1])
        if stage == "fit" and number < self.batch_size * devices * batches:
            raise DataError(
                f"{self._name()} has {number} training sequences, fewer than one batch of "
                f"data.batch_size={self.batch_size} on {devices} device{'s' * (devices > 1)}"
                + f", {batches} times a step"
                * (batches > 1)
            )
        if not len(self.parts["val"][1]):
            raise DataError(f"{self._name()} has no sequences for validation beside {number} for training")

    def state_dict(self) -> dict[str, Any]:
        """What decides about inputs and targets; Lightning keeps it in checkpoints."""
        return {**self.content(), **self.options()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to test weights on other data than they were trained for.

        Raises:
            DataError: if the checkpoint was written with other options.
        """
        own = self.state_dict()
        if differing := [name for name, was in state_dict.items() if own.get(name) != was]:
            was, now = ({name: side.get(name) for name in differing} for side in (state_dict, own))
            raise DataError(
                f"the checkpoint was written with data options {was}, this run has {now}; give the same, or "
                "use the config.yaml of its run as the recipe"
            )

    def train_dataloader(self) -> Loader:
        """Shuffled training batches."""
        return self._loader("train", training=True)

    def val_dataloader(self) -> Loader:
        """Sequences kept from training."""
        return self._loader("val")

    def test_dataloader(self) -> Loader | list[Loader]:
        """The test sequences, one loader for each of `spec.tests`."""
        return self._loader("test")

    def predict_dataloader(self) -> Loader:
        """The test sequences, in their own order."""
        split, rows = self.parts["test"]
        return Loader(lambda chosen: self.fetch(split, chosen), rows, self.eval_batch_size)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Transform and pad on the device: fewer bytes are moved there, and it is faster."""
        batch = self.transform(batch, self.trainer is not None and self.trainer.training)
        return padded(batch, self.spec.tokens)

    def _loader(self, part: str, training: bool = False) -> Loader:
        split, rows = self.parts[part]
        lengths = self.lengths(split)
        if lengths is not None and not training:
            rows = rows[np.argsort(lengths[rows], kind="stable")]
        return Loader(
            lambda chosen: self.fetch(split, chosen),
            rows,
            self.batch_size if training else self.eval_batch_size,
            lengths=lengths,
            shuffle=training,
            drop_last=training,
            shift=self.shift,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            parts=self._batches_a_step() if training else 1,
            content={**self.content(), **self.options(), "digest": self.tensors[split]["digest"]},
        )

    def _batches_a_step(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def _name(self) -> str:
        return str(self.content().get("dataset", type(self).__name__))

    def _open(self, split: str) -> dict[str, Any]:
        parts: list[object] = [self.version, type(self).__name__, self.content(), split]
        if self.path:
            parts += [
                (file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files(split)
            ]
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return cached(self.cache_dir / f"{self._name()}-{split}-{key}.pt", lambda: self.build(split))


def hold_out(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows kept and rows held out: round(fraction * n) of the n of each class, the same on every call."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        held[rows[: round(fraction * len(rows))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
