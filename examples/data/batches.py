"""Batches of sequences, and rows of different lengths that they are made of."""

from typing import NamedTuple

import torch
from torch import Tensor


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


def padded(batch: Batch, tokens: bool) -> Batch:
    """A ragged batch, its length rounded up to one of eight an octave: zeros fill inputs, ones fill rates.

    With few shapes an allocator uses its memory again; hundreds of them would leave it in fragments.
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
