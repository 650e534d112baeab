"""Batches of sequences of several lengths, padded on the right."""

import torch
from torch import Tensor


def padding(lengths: Tensor, L: int) -> Tensor:
    """(B, L), True past the end of each right-padded sequence."""
    return torch.arange(L, device=lengths.device) >= lengths[:, None]


def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """x (B, L, ...) with zeros past the lengths, also where it holds NaN or tokens that do not exist."""
    past = padding(lengths, x.shape[1]).view(*x.shape[:2], *(1,) * (x.dim() - 2))
    return torch.where(past, x.new_zeros(()), x)  # half the traffic of masked_fill, which copies first
