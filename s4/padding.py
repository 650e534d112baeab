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


def right_aligned(x: Tensor, lengths: Tensor) -> Tensor:
    """Right-padded x (B, L, H), each sequence moved to the right, so that all end with their last input."""
    L = x.shape[1]
    source = torch.arange(L, device=x.device)[:, None] - (L - lengths[:, None, None])
    return x.gather(1, source.clamp(min=0).expand_as(x)).masked_fill(source < 0, 0)


def last_steps(x: Tensor, some: int, T: int) -> Tensor:
    """The last T steps of x (B, L, H), zero but for the last few: of one size, however many those are."""
    L = x.shape[1]
    at = torch.arange(L - T, L, device=x.device)
    source = x if L > 0 else x.new_zeros(x.shape[0], 1, x.shape[2])
    return torch.where((at >= L - some)[:, None], source.index_select(1, at.clamp(min=0)), 0)
