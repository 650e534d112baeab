"""What all data sets share: batches, a loader that resumes, and the data module."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from data.storage import DataError, cached, default_cache

SPLIT_SEED = 0  # which rows are held out never depends on the seed of a run


class Batch(NamedTuple):
    """Some rows of a data set.

    Shapes: inputs (B, L, C) real numbers or (B, L) tokens, for pairs (B, 2, L); targets (B,) labels, or
    (B, M) tokens or (B, M, C') real numbers for the last M positions; lengths (B,) or (B, 2) of right-padded
    inputs, None where none is padded; rate, the step between two inputs as a multiple of that in training: a
    number or, of (B, L) inputs, the step before each, above 0 also behind their end.
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None = None
    rate: float | Tensor = 1.0


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


class Ragged:
    """Rows of different lengths, one behind the other.

    Args:
        values: (total, ...), may be memory-mapped.
        offsets: (n + 1,) integers, where each row begins, and the end.
    """

    def __init__(self, values: Tensor, offsets: Tensor) -> None:
        self.values, self.offsets = values, offsets

    @property
    def lengths(self) -> Tensor:
        """(n,) of all rows."""
        return self.offsets.diff()

    def gather(self, rows: Tensor, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Values (B, L, ...) of some rows (B,), at most `limit` each, zeros behind them; lengths (B,)."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        if limit is not None:
            lengths = lengths.clamp(max=limit)
        steps = torch.arange(int(lengths.max()) if len(rows) else 0)
        padding = steps >= lengths[:, None]
        index = (starts[:, None] + steps).masked_fill_(padding, 0)
        values = self.values[index]
        values[padding] = 0
        return values, lengths


class Loader:
    """Batches of rows, in an order that depends on (seed, epoch) only.

    Lightning calls `set_epoch` through `sampler`, and keeps `state_dict` in its checkpoints: an interrupted
    epoch goes on with the very next batch. Ranks read disjoint rows; with `drop_last` all the same number.
    A step has `together` rows, the same ones however many ranks and parts they are divided among.

    Args:
        fetch: from row numbers (B,) to a batch.
        rows: the rows to read.
        batch_size: rows a batch, on each rank.
        lengths: (n,) of all rows, to put rows of similar length into a batch when shuffled.
        shuffle: a new order each epoch, else the order of `rows`.
        drop_last: leave out the rows that do not fill a step.
        shift: when shuffled, move all rows of an epoch by one random number below this.
        parts: batches on each rank whose gradients are added up to one step.
        content: what else must be equal in a run that goes on from a place in these data.
    """

    pool = 32  # batches among which rows are sorted by length

    def __init__(
        self,
        fetch: Callable[[Tensor], Batch],
        rows: np.ndarray,
        batch_size: int,
        *,
        lengths: np.ndarray | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        shift: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        parts: int = 1,
        content: dict[str, Any] | None = None,
    ) -> None:
        self.fetch, self.rows, self.lengths = fetch, rows, lengths
        self.batch_size, self.shuffle, self.drop_last, self.shift = batch_size, shuffle, drop_last, shift
        self.seed, self.rank, self.world_size, self.parts = seed, rank, world_size, parts
        self.together = batch_size * world_size * parts
        self.content = content or {}
        self.epoch = 0
        self.position = 0  # batches of this epoch already handed out
        self._start = 0  # where the next pass begins: 0, unless resumed

    batch_sampler = None  # Lightning looks for it beside `sampler`

    @property
    def sampler(self) -> "Loader":
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
            generator = np.random.default_rng([self.seed, self.epoch])
            rows = generator.permutation(rows)
            if self.lengths is not None:
                rows = self._by_length(rows, generator)
            rows = rows + generator.integers(self.shift)
        if self.drop_last:
            rows = rows[: len(rows) - len(rows) % self.together]
        return torch.from_numpy(rows[self.rank :: self.world_size].astype(np.int64))

    def _by_length(self, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Batches of similar lengths: rows sorted within pools, then whole batches shuffled, a part last."""
        together = self.together
        pools = np.split(rows, range(self.pool * together, len(rows), self.pool * together))
        rows = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        whole = len(rows) // together
        batches = rows[: whole * together].reshape(whole, together)
        return np.concatenate([generator.permutation(batches).ravel(), rows[whole * together :]])

    def __len__(self) -> int:
        if self.drop_last:
            return len(self.rows) // self.together * self.parts
        return -(-len(self.rows[self.rank :: self.world_size]) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        batches = self.order().split(self.batch_size)
        start, self._start = self._start, 0
        for index in range(start, len(self)):
            self.position = index + 1
            yield self.fetch(batches[index])

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, and what must be equal for that place to mean anything."""
        place = {"epoch": self.epoch, "position": self.position, "parts": self.parts}
        return {**place, "identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place `state_dict` saved.

        Raises:
            DataError: if the data, the rows of a step or the seed are not those of the saved run.
        """
        own, parts = self._identity(), state.get("parts", self.parts)
        saved = dict(state["identity"])
        if devices := saved.pop("devices", None):  # what was kept of it before the number could change
            saved["rows_a_step"] = saved.pop("batch_size") * devices * parts
        if differing := [name for name in {**own, **saved} if saved.get(name) != own.get(name)]:
            was, now = ({name: side.get(name) for name in differing} for side in (saved, own))
            raise DataError(
                f"cannot resume at the same batch: the checkpoint was written with {was}, "
                f"this run has {now}; use the same data, data options and seed, and "
                "the same product of data.batch_size, devices and trainer.accumulate_grad_batches"
            )
        steps, rest = divmod(state["position"], parts)
        if rest and parts != self.parts:
            raise DataError(
                f"the checkpoint is {rest} of {parts} batches into a step: go on with "
                f"trainer.accumulate_grad_batches={parts}, got {self.parts}"
            )
        self.epoch, self.position = state["epoch"], steps * self.parts + rest
        self._start = self.position

    def _identity(self) -> dict[str, Any]:
        return {
            **self.content,
            "rows": len(self.rows),
            "rows_a_step": self.together,
            "seed": self.seed,
        }


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
        """Options that decide about the rows and their order otherwise."""
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
        """On the device, where there are fewer bytes to move and more hands."""
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


def padded(batch: Batch, tokens: bool) -> Batch:
    """A ragged batch, zeros behind its inputs, ones behind rates, to the next of eight lengths an octave.

    Few shapes let memory be used again, of which hundreds of shapes leave fragments.
    """
    if batch.lengths is None:
        return batch
    inputs = batch.inputs if tokens else batch.inputs.mT
    length = inputs.shape[-1]
    step = 2 ** max(0, length.bit_length() - 4)
    missing = (0, -length % step)
    inputs, rate = torch.nn.functional.pad(inputs, missing), batch.rate
    if isinstance(rate, Tensor):
        rate = torch.nn.functional.pad(rate, missing, value=1.0)
    return batch._replace(inputs=inputs if tokens else inputs.mT.contiguous(), rate=rate)


def hold_out(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows kept and rows held out: round(fraction * n) of the n of each class, the same on every call."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        held[rows[: round(fraction * len(rows))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
