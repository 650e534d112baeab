"""What the scenes of sequence_ranks.py share: how they are kept, layers, inputs, and cuts of a sequence."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from s4 import S4Layer

CUTS = [(5, 0, 17, 3), (0, 9, 1, 6), (8, 8, 8, 8)]
SCENES: dict[str, Callable[[], None]] = {}


def scene(*arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Under its name and these arguments, which it is called with."""

    def enter(play: Callable[..., None]) -> Callable[..., None]:
        SCENES[" ".join([play.__name__, *map(str, arguments)])] = partial(play, *arguments)
        return play

    return enter


def layer(variant: str = "dplr", mode: str = "auto", both: bool = False, **options: Any) -> S4Layer:
    return S4Layer(3, 6, variant=variant, mode=mode, bidirectional=both, **options).double()


def inputs(batch: int, pieces: Sequence[int], width: int = 3) -> Tensor:
    return torch.randn(batch, sum(pieces), width, dtype=torch.float64)


def ends(pieces: Sequence[int]) -> Tensor:
    """Of six sequences: in every piece, at its edges, nothing at all."""
    L = sum(pieces)
    return torch.tensor([L, pieces[0], L - 1, 0, 1, L // 2 + 1])
