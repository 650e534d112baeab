"""Backend "naive": the definitions, materialised. The truth the other backends are tested against."""

import torch
from torch import Tensor


def status(device: torch.device) -> bool | str:
    """True: it runs everywhere."""
    return True


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    v, w = v[..., :, None], w[..., :, None]
    z = z[..., None, :]
    return (v / (z - w) + v.conj() / (z - w.conj())).sum(-2)


def vandermonde(v: Tensor, x: Tensor, L: int) -> Tensor:
    steps = torch.arange(L, device=x.device, dtype=torch.float64)
    powers = torch.exp(x.to(torch.complex128)[..., :, None] * steps)  # in double: a phase grows with L
    return 2 * (v[..., :, None] * powers).sum(-2).real.to(v.real.dtype)
