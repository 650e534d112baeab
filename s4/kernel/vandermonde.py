"""Vandermonde products over conjugate pairs: the contract, and the choice of who computes them."""

import math

import torch
from torch import Tensor

from s4.checks import check_integer
from s4.kernel import _torch
from s4.kernel._choice import check_backend
from s4.kernel.cauchy import check_sums


def vandermonde(v: Tensor, x: Tensor, L: int, backend: str = "auto") -> Tensor:
    """2 Re of the sum over n of v_n exp(x_n l), for l = 0, ..., L-1 (S4D equation 7).

    Leading dimensions broadcast.

    Args:
        v: weights, complex (..., n).
        x: exponents, complex (..., n), one of each conjugate pair.
        L: number of steps, 0 or more.
        backend: "auto" or one of `s4.kernel.backends()`.

    Returns:
        real (..., L), differentiable in v and x.

    Raises:
        TypeError: an argument is not complex, dtypes differ, or L is not an integer.
        ValueError: the last dimensions differ, devices differ, L is negative, or the backend cannot run.
    """
    check_sums({"v": v, "x": x})
    if v.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"v and x must have one length of the last dimension, got {v.shape[-1]} and {x.shape[-1]}"
        )
    check_integer("L", L, 0)
    check_backend(backend)
    batch = torch.broadcast_shapes(v.shape[:-1], x.shape[:-1])
    # The last leading dimension, where it is of v alone, is that of right-hand sides over the same poles.
    shared = len(batch) > 0 and (x.dim() < 2 or x.shape[-2] == 1)
    groups, q = (batch[:-1], batch[-1]) if shared else (batch, 1)
    x = x.squeeze(-2) if shared and x.dim() > 1 else x
    G, n = math.prod(groups), v.shape[-1]
    v, x = v.expand(*batch, n).reshape(G, q, n), x.expand(*groups, n).reshape(G, n)
    return _torch.vandermonde(v, x, L).view(*batch, L)
