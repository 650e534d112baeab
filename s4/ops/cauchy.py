"""Cauchy sums: sum over n of v_n / (z - w_n) + conj(v_n) / (z - conj(w_n)), at nodes z (S4 section 3.3).

Here v (G, q, n) are q right-hand sides over the same poles w (G, n), at nodes z (G, l) or, for all groups,
(1, l).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from s4.backends import naive
from s4.ops import dispatch
from s4.precision import product

definition = naive.cauchy  # of (..., n), (..., l) and (..., n), with n l numbers in memory
_BLOCK = 1 << 20  # elements of one block of 1 / (z - w)


def plain(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """Sums (G, q, l) of products with blocks of 1/(z-w), in memory that does not grow with n l.

    Conjugates are physical: inside an operator under torch.compile, lazy ones are read as if not conjugated.
    """
    vc = v.conj_physical()
    out = v.new_empty(*v.shape[:2], z.shape[1])
    for nodes, R, S in _blocks(z, w):
        out[..., nodes] = product(v, R) + product(vc, S)
    return out


def plain_backward(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, z and w; that of z is empty unless asked for."""
    vc = v.conj_physical()
    grad_v, grad_w = torch.zeros_like(v), torch.zeros_like(w)
    grad_z = torch.zeros_like(z) if need_z else z.new_empty(0)
    for nodes, R, S in _blocks(z, w):
        g = grad[..., nodes]
        gc = g.conj_physical()
        grad_v += product(g, R.conj_physical().mT) + product(gc, S.mT)
        R2, S2 = R * R, S * S  # the derivatives of R and S in w and conj(w)
        grad_w += (vc * (product(g, R2.conj_physical().mT) + product(gc, S2.mT))).sum(-2)
        if need_z:
            at_nodes = (g * (product(v, R2) + product(vc, S2)).conj_physical()).sum(-2)
            grad_z[..., nodes] = -at_nodes.sum_to_size(z.shape[0], at_nodes.shape[1])
    return grad_v, grad_z, grad_w


def _blocks(z: Tensor, w: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """1/(z-w) and 1/(z-conj w), each (G, n, nodes), made anew in every pass instead of kept."""
    width = max(1, _BLOCK // max(1, w.numel()))
    for start in range(0, z.shape[1], width):
        nodes = slice(start, start + width)
        at = z[:, None, nodes]
        yield nodes, 1 / (at - w[..., None]), 1 / (at - w[..., None].conj_physical())


def _checked(v: Tensor, z: Tensor, w: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
    """As a backend reads them; raises unless shapes, dtypes and devices fit: some read raw memory."""
    tensors, shape = (v, z, w, *grads), (*v.shape[:2], z.shape[-1])
    given = [(tuple(t.shape), t.dtype, str(t.device)) for t in tensors]
    alike = len({(t.dtype, t.device) for t in (v, z, w)}) == 1
    fits = v.dim() == 3 and w.shape == (v.shape[0], v.shape[2]) and z.dim() == 2
    if not alike or not fits or z.shape[0] not in (1, v.shape[0]):
        raise ValueError(f"need v (G, q, n), z (1 or G, l), w (G, n) of one dtype and device, got {given}")
    if any((g.shape, g.dtype, g.device) != (shape, v.dtype, v.device) for g in grads):
        raise ValueError(f"need grad {shape} of {v.dtype} on {v.device}, got {given[-1]}")
    return tuple(map(dispatch.plain_memory, tensors))


@torch.library.custom_op("s4::cauchy", mutates_args=())
def cauchy(v: Tensor, z: Tensor, w: Tensor, backend: str) -> Tensor:
    """Sums (G, q, l); who computes is chosen inside, so that a graph holds the name asked for."""
    v, z, w = _checked(v, z, w)
    module = dispatch.implementation("cauchy", backend, v.device)
    return plain(v, z, w) if module is None else module.cauchy(v, z, w)


@torch.library.custom_op("s4::cauchy_backward", mutates_args=())
def cauchy_backward(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, z and w; that of z is empty unless asked for."""
    v, z, w, grad = _checked(v, z, w, grad)
    module = dispatch.implementation("cauchy", backend, v.device)
    return getattr(module, "cauchy_backward", plain_backward)(grad, v, z, w, need_z)


@cauchy.register_fake
def _(v: Tensor, z: Tensor, w: Tensor, backend: str) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[1], z.shape[1])


@cauchy_backward.register_fake
def _(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), z.new_empty(z.shape if need_z else 0), w.new_empty(w.shape)


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    v, z, w, ctx.backend = inputs
    ctx.save_for_backward(v, z, w)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if dispatch.recorded(grad):
        return *dispatch.through(_definition, ctx.saved_tensors, grad), None
    need_z = ctx.needs_input_grad[1]
    grad_v, grad_z, grad_w = cauchy_backward(grad, *ctx.saved_tensors, need_z, ctx.backend)
    return grad_v, grad_z if need_z else None, grad_w, None


def _definition(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return definition(v, z[:, None], w[:, None])


cauchy.register_autograd(_gradients, setup_context=_save)
