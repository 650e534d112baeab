"""Backend "torch": plain PyTorch on any device, in memory that does not grow with n times the output.

Conjugates are physical: inside an operator under torch.compile, lazy ones are read as if not conjugated.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements of one block of 1 / (z - w)


def status(device: torch.device) -> bool | str:
    """True: it runs everywhere."""
    return True


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    vc = v.conj_physical()
    out = v.new_empty(*v.shape[:2], z.shape[1])
    for nodes, R, S in _blocks(z, w):
        out[..., nodes] = v @ R + vc @ S
    return out


def cauchy_backward(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    vc = v.conj_physical()
    grad_v, grad_w = torch.zeros_like(v), torch.zeros_like(w)
    grad_z = torch.zeros_like(z) if need_z else z.new_empty(0)
    for nodes, R, S in _blocks(z, w):
        g = grad[..., nodes]
        gc = g.conj_physical()
        grad_v += g @ R.conj_physical().mT + gc @ S.mT
        R2, S2 = R * R, S * S
        grad_w += (vc * (g @ R2.conj_physical().mT + gc @ S2.mT)).sum(-2)
        if need_z:
            at_nodes = (g * (v @ R2 + vc @ S2).conj_physical()).sum(-2)
            grad_z[..., nodes] = -at_nodes.sum_to_size(z.shape[0], at_nodes.shape[1])
    return grad_v, grad_z, grad_w


def _blocks(z: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """1/(z-w) and 1/(z-conj w), each (G, n, nodes), rebuilt in every pass instead of kept."""
    width = max(1, _CHUNK // max(1, w.numel()))
    for start in range(0, z.shape[1], width):
        nodes = slice(start, start + width)
        at = z[:, None, nodes]
        yield nodes, 1 / (at - w[..., None]), 1 / (at - w[..., None].conj_physical())


def vandermonde(v: Tensor, x: Tensor, L: int) -> Tensor:
    G, q = v.shape[:2]
    short, long = _factors(x, L)
    left = 2 * v[:, :, None] * long.mT[:, None]  # (G, q, a, n)
    left = torch.cat([left.real, -left.imag], -1).flatten(1, 2)
    right = torch.cat([short.real, short.imag], 1)
    product = _product(left.to(v.dtype.to_real()), right.to(v.dtype.to_real()))
    return product.view(G, q, long.shape[2] * short.shape[2])[..., :L].contiguous()


def vandermonde_backward(grad: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    G, q, n = v.shape
    L = grad.shape[2]
    short, long = _factors(x, L)
    T = short.shape[2]
    b = torch.arange(T, device=x.device, dtype=torch.float64)
    a = long.shape[2]
    padded = torch.nn.functional.pad(grad, (0, a * T - L)).view(G, q * a, T)
    right = torch.cat([short.real, short.imag, b * short.real, b * short.imag], 1)
    sums = _product(padded, right.mT.to(grad.dtype)).double().view(G, q, a, 4, n)  # over b, for each a
    Y, Z = torch.complex(sums[..., 0, :], sums[..., 1, :]), torch.complex(sums[..., 2, :], sums[..., 3, :])
    jump, step = long.mT[:, None], T * torch.arange(a, device=x.device)[:, None]
    grad_v = 2 * (jump * Y).sum(2).conj_physical()
    grad_x = 2 * (v * (jump * (Z + step * Y)).sum(2)).sum(1).conj_physical()
    return grad_v.to(v.dtype), grad_x.to(x.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in their own precision: autocast reaches into operators, and would take bfloat16."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _factors(x: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """e^(x b) for b < T (G, n, T) and e^(x a T) for a < L / T, with T about sqrt(L), in double precision.

    In double, as a phase x l must be known to far better than 1 and grows with l.
    """
    T = 2 ** round(math.log2(max(L, 1)) / 2)
    x = x.to(torch.complex128)
    return _powers(x, T), _powers(x * T, -(-L // T))


def _powers(x: Tensor, count: int) -> Tensor:
    """e^(x b) for b < count, (G, n) to (G, n, count), by doubling."""
    E = torch.ones_like(x)[..., None]
    while E.shape[-1] < count:
        more = E[..., : count - E.shape[-1]]
        E = torch.cat([E, more * torch.exp(x * E.shape[-1])[..., None]], -1)
    return E[..., :count]
