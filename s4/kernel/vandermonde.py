"""Vandermonde products over conjugate pairs."""

import math

import torch
from torch import Tensor

from s4.checks import check_integer
from s4.kernel.cauchy import check_sums
from s4.ops import dispatch, response
from s4.precision import WITHOUT_FLOAT64
from s4.system import readout, stack


def vandermonde(v: Tensor, x: Tensor, L: int) -> Tensor:
    """2 Re of the sum over n of v_n exp(x_n l), for l = 0, ..., L-1 (S4D equation 7).

    It is computed in double precision, as the phase x l grows with l and must be known to far better than 1.
    It takes no memory of n L numbers, as it is the response of a diagonal recurrence. Leading dimensions
    broadcast.

    Args:
        v: weights, complex (..., n).
        x: exponents, complex (..., n), one of each conjugate pair.
        L: number of steps, 0 or more.

    Returns:
        real (..., L), differentiable in v and x.

    Raises:
        TypeError: an argument is not complex, dtypes differ, or L is not an integer.
        ValueError: the last dimensions differ, devices differ, or L is negative.

    Examples:
        >>> v, x = torch.tensor([0.5 + 0j]), torch.tensor([1j * torch.pi / 3])
        >>> vandermonde(v, x, 4)  # cos(pi l / 3)
        tensor([ 1.0000,  0.5000, -0.5000, -1.0000])
    """
    check_sums({"v": v, "x": x})
    if v.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"v and x must have one length of the last dimension, got {v.shape[-1]} and {x.shape[-1]}"
        )
    check_integer("L", L, 0)
    batch, n = torch.broadcast_shapes(v.shape[:-1], x.shape[:-1]), v.shape[-1]
    # The last leading dimension, where it is of v alone, is that of right-hand sides with the same exponents.
    shared = len(batch) > 0 and (x.dim() < 2 or x.shape[-2] == 1)
    groups, q = (batch[:-1], batch[-1]) if shared else (batch, 1)
    x = x.squeeze(-2) if shared and x.dim() > 1 else x
    G = math.prod(groups)
    device = v.device
    if device.type in WITHOUT_FLOAT64:
        v, x = v.cpu(), x.cpu()
    one = stack(torch.ones(G, n, dtype=torch.complex128, device=x.device))
    a = stack(torch.exp(x.to(torch.complex128).expand(*groups, n).reshape(G, n)))
    C = readout(v.to(torch.complex128).expand(*batch, n).reshape(G, q, n)).transpose(0, 1)
    none = a.new_zeros(0, *a.shape)
    # Not v.dtype.to_real(), which torch 2.11 cannot compile.
    real = torch.float32 if v.dtype == torch.complex64 else torch.float64
    with dispatch.full_precision(v.device):
        K = response.plain(a, none, none, one[:, None], C, L, real)[:, 0]
    return K.transpose(0, 1).reshape(*batch, L).to(device)
