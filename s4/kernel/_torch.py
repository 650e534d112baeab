"""Backend "torch": plain PyTorch on any device, in memory that does not grow with n times the output."""

import torch
from torch import Tensor

from s4.ssm import Propagator, Recurrence, readout, stack

_CHUNK = 1 << 20  # elements of one block of 1 / (z - w)


class _Cauchy(torch.autograd.Function):
    """Sums v (G, q, n) over poles w (G, n) at nodes z (G or 1, l), a block of nodes at a time.

    Both passes rebuild the blocks R = 1/(z-w) and S = 1/(z-conj w) instead of keeping them.
    """

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def forward(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
        vc = v.conj().resolve_conj()
        out = v.new_empty(*v.shape[:2], z.shape[-1])
        for nodes, R, S in _blocks(z, w):
            out[..., nodes] = v @ R + vc @ S
        return out

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        v, z, w = ctx.saved_tensors
        vc = v.conj().resolve_conj()
        grad_v, grad_w = torch.zeros_like(v), torch.zeros_like(w)
        grad_z = z.new_zeros(v.shape[0], z.shape[-1])
        for nodes, R, S in _blocks(z, w):
            gl = g[..., nodes]
            glc = gl.conj().resolve_conj()
            grad_v += gl @ R.mH + glc @ S.mT
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                R2, S2 = R * R, S * S
                grad_w += (vc * (gl @ R2.mH + glc @ S2.mT)).sum(-2)
                if ctx.needs_input_grad[1]:
                    grad_z[..., nodes] = -(gl * (v @ R2 + vc @ S2).conj()).sum(-2)
        return grad_v, grad_z.sum_to_size(z.shape), grad_w


def _blocks(z: Tensor, w: Tensor):  # type: ignore[no-untyped-def]
    width = max(1, _CHUNK // max(1, w.numel()))
    for start in range(0, z.shape[-1], width):
        nodes = slice(start, start + width)
        at = z[:, None, nodes]
        yield nodes, 1 / (at - w[..., None]), 1 / (at - w[..., None].conj())


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(v.shape[:-1], z.shape[:-1], w.shape[:-1])
    # Sums over the same poles and nodes, the last leading dimension of v, become one product.
    shared = bool(batch) and all(t.dim() < 2 or t.shape[-2] == 1 for t in (z, w))
    groups, q = (batch[:-1], batch[-1]) if shared else (batch, 1)
    G = 1
    for size in groups:
        G *= size
    v = v.expand(*batch, v.shape[-1]).reshape(G, q, v.shape[-1])
    w = (w.squeeze(-2) if shared and w.dim() > 1 else w).expand(*groups, w.shape[-1]).reshape(G, w.shape[-1])
    z = z.squeeze(-2) if shared and z.dim() > 1 else z
    z = (
        z.reshape(1, -1)
        if z.numel() == z.shape[-1]
        else z.expand(*groups, z.shape[-1]).reshape(G, z.shape[-1])
    )
    return _Cauchy.apply(v, z, w).view(*batch, z.shape[-1])


def vandermonde(v: Tensor, x: Tensor, L: int) -> Tensor:
    batch = torch.broadcast_shapes(v.shape[:-1], x.shape[:-1])
    n = v.shape[-1]
    a = torch.exp(x.to(torch.complex128)).expand(*batch, n).reshape(-1, n)
    none = a.real.new_zeros(0, a.shape[0], 2 * n)
    rows = readout(v.to(torch.complex128).expand(*batch, n).reshape(1, -1, n))
    ones = stack(torch.ones_like(a))
    powers = Propagator(Recurrence(stack(a), none, none, ones, rows))
    return powers.response(ones[..., None], L, v.real.dtype).view(*batch, L)
