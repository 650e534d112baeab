"""Sums and powers as PyTorch operators: what torch.compile, torch.export and autograd see of the backends.

Of the sums, canonical shapes, contiguous where a backend sees them: v (G, q, n), z (1 or G, l), w and x
(G, n), sums (G, q, l). A backend is a module with `status(device)`, `cauchy`, `cauchy_backward`,
`vandermonde` and `vandermonde_backward`. The choice is made inside, so that a graph holds the name asked for.

Powers of A = diag(a) + F G, with a (H, N), F and G (r, H, N) as in `s4.ssm.Recurrence`, all float64, are of
the CPU only: elsewhere `s4.ssm.Propagator` makes them of matrix products.
"""

from typing import Any

import torch
from torch import Tensor

from s4.kernel import _cpu
from s4.kernel._choice import choose


def _check(v: Tensor, z: Tensor | None, w: Tensor, grad: Tensor | None = None) -> None:
    """Raise unless shapes, dtypes and devices are those of the contract: some backends read raw memory."""
    groups = z is None or (z.dim() == 2 and z.shape[0] in (1, v.shape[0]))
    alike = all(t is None or (t.dtype == v.dtype and t.device == v.device) for t in (z, w))
    if v.dim() != 3 or w.shape != (v.shape[0], v.shape[2]) or not groups or not alike:
        shapes = [tuple(t.shape) for t in (v, z, w) if t is not None]
        raise ValueError(
            f"need v (G, q, n), z (1 or G, l), w or x (G, n) of one dtype and device, got {shapes}"
        )
    if grad is not None:
        length = grad.shape[-1] if z is None else z.shape[1]
        _check_gradient(grad, (*v.shape[:2], length), v.dtype.to_real() if z is None else v.dtype, v.device)


def _check_gradient(grad: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if grad.shape != shape or grad.dtype != dtype or grad.device != device:
        raise ValueError(
            f"need grad {shape} of {dtype} on {device}, "
            f"got {tuple(grad.shape)} of {grad.dtype} on {grad.device}"
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
    _check(v, z, w, grad)
    return choose(backend, v.device).cauchy_backward(_plain(grad), _plain(v), _plain(z), _plain(w), need_z)


@torch.library.custom_op("s4::vandermonde", mutates_args=())
def vandermonde(v: Tensor, x: Tensor, L: int, backend: str) -> Tensor:
    """Products (G, q, L), real."""
    _check(v, None, x)
    return choose(backend, v.device).vandermonde(_plain(v), _plain(x), L)


@torch.library.custom_op("s4::vandermonde_backward", mutates_args=())
def vandermonde_backward(grad: Tensor, v: Tensor, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of v and x."""
    _check(v, None, x, grad)
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


def _check_powers(a: Tensor, F: Tensor, G: Tensor, X: Tensor, *rows: Tensor) -> None:
    """Raise unless the operands of `krylov` or `orbit` are what raw memory is read as."""
    H, N = a.shape
    shapes = F.shape == G.shape == (F.shape[0], H, N) and X.shape == (H, X.shape[1], N)
    shapes = shapes and all(C.shape == (C.shape[0], H, N) for C in rows) and N % 2 == 0
    if not shapes or any(t.dtype != torch.float64 or t.device.type != "cpu" for t in (a, F, G, X, *rows)):
        given = [tuple(t.shape) for t in (a, F, G, X, *rows)]
        raise ValueError(
            f"need a (H, N), F and G (r, H, N), X (H, q, N), C (c, H, N), float64 on cpu, got {given}"
        )


@torch.library.custom_op("s4::krylov", mutates_args=())
def krylov(a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor, L: int, dtype: torch.dtype) -> Tensor:
    """C A^l X for l < L: (c, q, H, L) in float32 or float64, of X (H, q, N) and C (c, H, N)."""
    _check_powers(a, F, G, X, C)
    return _cpu.krylov(_plain(a), _plain(F), _plain(G), _plain(X), _plain(C), L, dtype)


@torch.library.custom_op("s4::krylov_backward", mutates_args=())
def krylov_backward(
    grad: Tensor, a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, F, G, X and C."""
    _check_powers(a, F, G, X, C)
    dtype = torch.float32 if grad.dtype == torch.float32 else torch.float64
    _check_gradient(grad, (C.shape[0], X.shape[1], a.shape[0], grad.shape[-1]), dtype, a.device)
    return _cpu.krylov_backward(_plain(grad), _plain(a), _plain(F), _plain(G), _plain(X), _plain(C))


@torch.library.custom_op("s4::orbit", mutates_args=())
def orbit(a: Tensor, F: Tensor, G: Tensor, X: Tensor, T: int) -> Tensor:
    """A^t X for t < T: (H, q, T, N), of X (H, q, N)."""
    _check_powers(a, F, G, X)
    return _cpu.orbit(_plain(a), _plain(F), _plain(G), _plain(X), T)


@torch.library.custom_op("s4::orbit_backward", mutates_args=())
def orbit_backward(
    grad: Tensor, a: Tensor, F: Tensor, G: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, F, G and X, given the orbit."""
    _check_powers(a, F, G, out.flatten(1, 2))
    _check_gradient(grad, tuple(out.shape), torch.float64, a.device)
    return _cpu.orbit_backward(_plain(grad), _plain(a), _plain(F), _plain(G), _plain(out))


@krylov.register_fake
def _(a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor, L: int, dtype: torch.dtype) -> Tensor:
    return a.new_empty(C.shape[0], X.shape[1], a.shape[0], L, dtype=dtype)


@krylov_backward.register_fake
def _(
    grad: Tensor, a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (a, F, G, X, C))  # type: ignore[return-value]


@orbit.register_fake
def _(a: Tensor, F: Tensor, G: Tensor, X: Tensor, T: int) -> Tensor:
    return a.new_empty(X.shape[0], X.shape[1], T, X.shape[2])


@orbit_backward.register_fake
def _(grad: Tensor, a: Tensor, F: Tensor, G: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    H, q, _, N = out.shape
    return a.new_empty(a.shape), F.new_empty(F.shape), G.new_empty(G.shape), a.new_empty(H, q, N)


def _save_krylov(ctx, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:5])


def _krylov_gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    return *krylov_backward(grad, *ctx.saved_tensors), None, None


def _save_orbit(ctx, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:3], output)


def _orbit_gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    return *orbit_backward(grad, *ctx.saved_tensors), None


krylov.register_autograd(_krylov_gradients, setup_context=_save_krylov)
orbit.register_autograd(_orbit_gradients, setup_context=_save_orbit)
