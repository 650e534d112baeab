"""The sums as PyTorch operators: what torch.compile, torch.export and autograd see of every backend.

Canonical shapes, contiguous where a backend sees them: v (G, q, n), z (1 or G, l), w and x (G, n), sums
(G, q, l). A backend is a module with `status(device)`, `cauchy`, `cauchy_backward`, `vandermonde` and
`vandermonde_backward`. The choice is made inside, so that a graph holds the name that was asked for.
"""

import torch
from torch import Tensor

from s4.kernel._choice import choose


def _check(v: Tensor, z: Tensor | None, w: Tensor) -> None:
    """Raise unless shapes, dtypes and devices are those of the contract: some backends read raw memory."""
    groups = z is None or (z.dim() == 2 and z.shape[0] in (1, v.shape[0]))
    alike = all(t is None or (t.dtype == v.dtype and t.device == v.device) for t in (z, w))
    if v.dim() != 3 or w.shape != (v.shape[0], v.shape[2]) or not groups or not alike:
        shapes = [tuple(t.shape) for t in (v, z, w) if t is not None]
        raise ValueError(
            f"need v (G, q, n), z (1 or G, l), w or x (G, n) of one dtype and device, got {shapes}"
        )


def _plain(t: Tensor) -> Tensor:
    """The numbers themselves in memory, no lazy conjugation or negation, contiguous."""
    return t.resolve_conj().resolve_neg().contiguous()


@torch.library.custom_op("s4::cauchy", mutates_args=())
def cauchy(v: Tensor, z: Tensor, w: Tensor, backend: str) -> Tensor:
    """Sums (G, q, l)."""
    _check(v, z, w)
    return choose(backend, v.device).cauchy(_plain(v), _plain(z), _plain(w))


@torch.library.custom_op("s4::cauchy_backward", mutates_args=())
def cauchy_backward(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, z and w; that of z is empty unless asked for."""
    _check(v, z, w)
    return choose(backend, v.device).cauchy_backward(_plain(grad), _plain(v), _plain(z), _plain(w), need_z)


@torch.library.custom_op("s4::vandermonde", mutates_args=())
def vandermonde(v: Tensor, x: Tensor, L: int, backend: str) -> Tensor:
    """Products (G, q, L), real."""
    _check(v, None, x)
    return choose(backend, v.device).vandermonde(_plain(v), _plain(x), L)


@torch.library.custom_op("s4::vandermonde_backward", mutates_args=())
def vandermonde_backward(grad: Tensor, v: Tensor, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of v and x."""
    _check(v, None, x)
    return choose(backend, v.device).vandermonde_backward(_plain(grad), _plain(v), _plain(x))


@cauchy.register_fake
def _(v: Tensor, z: Tensor, w: Tensor, backend: str) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[1], z.shape[1])


@cauchy_backward.register_fake
def _(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), z.new_empty(z.shape if need_z else 0), w.new_empty(w.shape)


@vandermonde.register_fake
def _(v: Tensor, x: Tensor, L: int, backend: str) -> Tensor:
    return torch.empty(v.shape[0], v.shape[1], L, dtype=v.dtype.to_real(), device=v.device)


@vandermonde_backward.register_fake
def _(grad: Tensor, v: Tensor, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), x.new_empty(x.shape)


def _save_cauchy(ctx, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    v, z, w, ctx.backend = inputs
    ctx.save_for_backward(v, z, w)


def _cauchy_gradients(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:  # type: ignore[no-untyped-def]
    need_z = ctx.needs_input_grad[1]
    grad_v, grad_z, grad_w = cauchy_backward(grad, *ctx.saved_tensors, need_z, ctx.backend)
    return grad_v, grad_z if need_z else None, grad_w, None


def _save_vandermonde(ctx, inputs: tuple[Tensor, Tensor, int, str], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    v, x, _, ctx.backend = inputs
    ctx.save_for_backward(v, x)


def _vandermonde_gradients(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
    return *vandermonde_backward(grad, *ctx.saved_tensors, ctx.backend), None, None


cauchy.register_autograd(_cauchy_gradients, setup_context=_save_cauchy)
vandermonde.register_autograd(_vandermonde_gradients, setup_context=_save_vandermonde)
