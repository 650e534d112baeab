"""Sums, powers and the scan as PyTorch operators: what torch.compile, torch.export and autograd see of them.

Of the sums, canonical shapes, contiguous where a backend sees them: v (G, q, n), z (1 or G, l), w (G, n),
sums (G, q, l). A backend is a module with `status(device)`, `cauchy` and `cauchy_backward`. The choice is
made inside, so that a graph holds the name asked for.

Powers of A = diag(a) + F G, with a (H, N), F and G (r, H, N) as in `s4.ssm.Recurrence`, all float64, are of
the CPU only: elsewhere `s4.ssm.Propagator` makes them of matrix products.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from s4.backends import cpu, naive
from s4.kernel._choice import choose
from s4.ssm import Propagator, Recurrence


def _check(v: Tensor, z: Tensor, w: Tensor, grad: Tensor | None = None) -> None:
    """Raise unless shapes, dtypes and devices are those of the contract: some backends read raw memory."""
    groups = z.dim() == 2 and z.shape[0] in (1, v.shape[0])
    alike = all(t.dtype == v.dtype and t.device == v.device for t in (z, w))
    if v.dim() != 3 or w.shape != (v.shape[0], v.shape[2]) or not groups or not alike:
        shapes = [tuple(t.shape) for t in (v, z, w)]
        raise ValueError(f"need v (G, q, n), z (1 or G, l), w (G, n) of one dtype and device, got {shapes}")
    if grad is not None:
        _check_gradient(grad, (*v.shape[:2], z.shape[1]), v.dtype, v.device)


def _check_gradient(grad: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if grad.shape != shape or grad.dtype != dtype or grad.device != device:
        raise ValueError(
            f"need grad {shape} of {dtype} on {device}, "
            f"got {tuple(grad.shape)} of {grad.dtype} on {grad.device}"
        )


def _numbers(t: Tensor) -> Tensor:
    """The numbers themselves in memory, no lazy conjugation or negation, at any strides."""
    return t.resolve_conj().resolve_neg()


def _plain(t: Tensor) -> Tensor:
    """As `_numbers`, contiguous."""
    return _numbers(t).contiguous()


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


@cauchy.register_fake
def _(v: Tensor, z: Tensor, w: Tensor, backend: str) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[1], z.shape[1])


@cauchy_backward.register_fake
def _(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), z.new_empty(z.shape if need_z else 0), w.new_empty(w.shape)


def _differentiable(
    plain: Callable[..., Any], inputs: Sequence[Tensor], grad: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of a map written in plain PyTorch, for the rare case that they have gradients themselves."""
    wanted = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(
        plain(*inputs), wanted, grad, create_graph=True, allow_unused=True, materialize_grads=True
    )
    found: Iterator[Tensor] = iter(grads)
    return tuple(next(found) if t.requires_grad else None for t in inputs)


def _save_cauchy(ctx, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    v, z, w, ctx.backend = inputs
    ctx.save_for_backward(v, z, w)


def _cauchy_gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        return *_differentiable(_naive_cauchy, ctx.saved_tensors, grad), None
    need_z = ctx.needs_input_grad[1]
    grad_v, grad_z, grad_w = cauchy_backward(grad, *ctx.saved_tensors, need_z, ctx.backend)
    return grad_v, grad_z if need_z else None, grad_w, None


def _naive_cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    return naive.cauchy(v, z[:, None], w[:, None])


cauchy.register_autograd(_cauchy_gradients, setup_context=_save_cauchy)


def _check_powers(a: Tensor, F: Tensor, G: Tensor, X: Tensor, *rows: Tensor) -> None:
    """Raise unless the operands of `krylov` or `chunk` are what raw memory is read as."""
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
    return cpu.response(_plain(a), _plain(F), _plain(G), _plain(X), _plain(C), L, dtype)


@torch.library.custom_op("s4::krylov_backward", mutates_args=())
def krylov_backward(
    grad: Tensor, a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, F, G, X and C."""
    _check_powers(a, F, G, X, C)
    dtype = torch.float32 if grad.dtype == torch.float32 else torch.float64
    _check_gradient(grad, (C.shape[0], X.shape[1], a.shape[0], grad.shape[-1]), dtype, a.device)
    return cpu.response_backward(_plain(grad), _plain(a), _plain(F), _plain(G), _plain(X), _plain(C))


@krylov.register_fake
def _(a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor, L: int, dtype: torch.dtype) -> Tensor:
    return a.new_empty(C.shape[0], X.shape[1], a.shape[0], L, dtype=dtype)


@krylov_backward.register_fake
def _(
    grad: Tensor, a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (a, F, G, X, C))  # type: ignore[return-value]


def _check_chunk(a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor) -> None:
    _check_powers(a, F, G, B[:, None], C)
    if D.shape != a.shape[:1] or D.dtype != torch.float64 or C.shape[0] > 2:
        raise ValueError(f"need D (H,) float64 and C (1 or 2, H, N), got {tuple(D.shape)}, {tuple(C.shape)}")


def _chunk_shapes(a: Tensor, C: Tensor, T: int) -> tuple[Any, ...]:
    (H, N), c = a.shape, C.shape[0]
    return (c, H, 2 * T - 1), (H, T, N), (c, H, T, N), (H, N, N)


@torch.library.custom_op("s4::chunk", mutates_args=())
def chunk(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, T: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The maps of a chunk of T steps, as `s4.scan.chunks` defines them, of B (H, N), C (c, H, N) and D (H,).

    taps (c, H, 2T-1), inward (H, T, N), outward (c, H, T, N), onward (H, N, N), in dtype.
    """
    _check_chunk(a, F, G, B, C, D)
    return cpu.maps(_plain(a), _plain(F), _plain(G), _plain(B), _plain(C), _plain(D), T, dtype)


@torch.library.custom_op("s4::chunk_backward", mutates_args=())
def chunk_backward(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a, F, G, B, C and D."""
    a, F, G, B, C, D = inputs
    _check_chunk(a, F, G, B, C, D)
    for grad, shape in zip(grads, _chunk_shapes(a, C, grads[1].shape[1]), strict=True):
        _check_gradient(grad, shape, grads[0].dtype, a.device)
    taps, inward, outward, onward = map(_plain, grads)
    return list(cpu.maps_backward((taps, inward, outward, onward), tuple(map(_plain, inputs))))


@chunk.register_fake
def _(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, T: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(a.new_empty(s, dtype=dtype) for s in _chunk_shapes(a, C, T))  # type: ignore[return-value]


@chunk_backward.register_fake
def _(grads: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in inputs]


def _check_scan(u: Tensor, *others: Tensor) -> None:
    """Raise unless x, taps, inward, outward, onward and, where given, gradients of y and x fit u."""
    (B, L, H), (T, N) = u.shape, others[2].shape[1:]
    shapes = ((H, B, N), (H, 2 * T - 1), (H, T, N), (H, T, N), (H, N, N), (B, L, H), (H, B, N))[: len(others)]
    alike = all(t.dtype == u.dtype and t.device.type == "cpu" for t in (u, *others))
    if tuple(tuple(t.shape) for t in others) != shapes or not alike:
        given = [tuple(t.shape) for t in others]
        raise ValueError(f"need operands of shapes {shapes}, of one dtype, on cpu, got {given}")


@torch.library.custom_op("s4::scan", mutates_args=())
def scan(
    u: Tensor, x: Tensor, taps: Tensor, inward: Tensor, outward: Tensor, onward: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The chunked scan of `s4.scan`, which gives it its gradient: (B, L, H) outputs, (H, B, N) states."""
    _check_scan(u, x, taps, inward, outward, onward)
    return cpu.scan(
        _numbers(u), _plain(x), _plain(taps), _plain(inward), _plain(outward), _plain(onward), reverse
    )


@torch.library.custom_op("s4::scan_backward", mutates_args=())
def scan_backward(grads: Sequence[Tensor], inputs: Sequence[Tensor], reverse: bool) -> list[Tensor]:
    """Gradients of the tensors that `scan` took."""
    u, x, *maps = inputs
    _check_scan(u, x, *maps, *grads)
    given = _numbers(u), *map(_plain, (x, *maps))
    return list(cpu.scan_backward((_numbers(grads[0]), _plain(grads[1])), given, reverse))


@scan.register_fake
def _(
    u: Tensor, x: Tensor, taps: Tensor, inward: Tensor, outward: Tensor, onward: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), x.new_empty(x.shape)


@scan_backward.register_fake
def _(grads: Sequence[Tensor], inputs: Sequence[Tensor], reverse: bool) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in inputs]


def _save_krylov(ctx, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.L, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _krylov_gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        plain = partial(_plain_krylov, L=ctx.L, dtype=ctx.dtype)
        return *_differentiable(plain, ctx.saved_tensors, grad), None, None
    return *krylov_backward(grad, *ctx.saved_tensors), None, None


def _plain_krylov(
    a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor, L: int, dtype: torch.dtype
) -> Tensor:
    return Propagator(Recurrence(a, F, G, X[:, 0], C)).response(X.mT, L, dtype)


def _save_chunk(ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.T, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _chunk_gradients(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        plain = partial(plain_chunk, T=ctx.T, dtype=ctx.dtype)
        return *_differentiable(plain, ctx.saved_tensors, grads), None, None
    return *chunk_backward(list(grads), list(ctx.saved_tensors)), None, None


def plain_chunk(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, T: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `chunk` gives, by matrix products on any device."""
    propagator = Propagator(Recurrence(a, F, G, B, C))
    columns, rows = propagator.columns(T).mT, propagator.rows(T)
    K = torch.einsum("htn,chn->cht", columns, C)
    ahead = pad(torch.cat([K[0, :, :1] + D[:, None], K[0, :, 1:]], -1), (T - 1, 0))
    taps, outward = ahead[None], rows[:1]
    if C.shape[0] == 2:  # backward in time, from lag -1
        behind = torch.cat([C[1, :, None], rows[1, :, :-1]], 1).flip(1)
        taps = torch.stack([ahead, pad(K[1, :, : T - 1].flip(-1), (0, T))])
        outward = torch.stack([rows[0], behind])
    maps = taps, columns.flip(1), outward, propagator.power(T).mT
    return tuple(part.to(dtype) for part in maps)  # type: ignore[return-value]


krylov.register_autograd(_krylov_gradients, setup_context=_save_krylov)
chunk.register_autograd(_chunk_gradients, setup_context=_save_chunk)
