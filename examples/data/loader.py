"""The loader: rows in an order that depends on the seed and the epoch alone, from any place in it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch
from data.storage import DataError


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
        if devices := saved.pop("devices", None):  # as checkpoints have it that are older than `parts`
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
