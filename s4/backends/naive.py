"""Backend "naive": the definitions, materialised. The truth the other backends are tested against."""

import torch
from torch import Tensor


def status(device: torch.device) -> bool | str:
    """True: it runs everywhere."""
    return True


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Sum over n of v_n / (z - w_n) + conj(v_n) / (z - conj(w_n)): v, w (..., n), z (..., l) to (..., l)."""
    v, w = v[..., :, None], w[..., :, None]
    z = z[..., None, :]
    return (v / (z - w) + v.conj() / (z - w.conj())).sum(-2)
