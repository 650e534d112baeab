"""The response C A^l X of recurrences, for l = 0, ..., L-1: their convolution kernel, for X = B.

A = diag(a) + sum over r of F_r G_r as in `s4.system.Recurrence`: a (H, N), F and G (r, H, N), X (H, q, N)
and C (c, H, N).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from s4.ops import dispatch, step
from s4.powers import Propagator
from s4.system import Recurrence


def response(
    recurrence: Recurrence, L: int, dtype: torch.dtype, backend: str = "auto", X: Tensor | None = None
) -> Tensor:
    """C A^l X for l < L, (c, q, H, L) in dtype, of recurrences in float64 and X (H, q, N), or B if None."""
    a, F, G, B, C = recurrence
    inputs = a, F, G, B[:, None] if X is None else X, C
    if dispatch.fused("response", backend, a.device.type) or dispatch.opaque():
        return operator(*inputs, L, dtype, backend)
    return plain(*inputs, L, dtype)


def continuation(
    recurrence: Recurrence, x: Float[Tensor, "B H N"], L: int, backend: str = "auto"
) -> Float[Tensor, "B H {L}"]:
    """C A^(l+1) x for l < L, in the dtype of x: what a state adds to the next L outputs."""
    before = x.to(recurrence.a.dtype)
    nothing = before.new_zeros(before.shape[:2])
    _, moved = step.plain(recurrence, recurrence.a.new_zeros(len(recurrence.a)), before, nothing)
    return response(recurrence, L, x.dtype, backend, moved.transpose(0, 1))[0]


def plain(a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor, L: int, dtype: torch.dtype) -> Tensor:
    """(c, q, H, L): rows C A^(a T) times columns A^b X, with l = a T + b."""
    return Propagator(Recurrence(a, F, G, a, C)).response(X.mT, L, dtype)


def checked(a: Tensor, F: Tensor, G: Tensor, X: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """As a backend reads them; raises unless they are what it reads raw memory as."""
    H, N = a.shape
    fits = F.shape == G.shape == (F.shape[0], H, N) and X.shape == (H, X.shape[1], N) and N % 2 == 0
    tensors = (a, F, G, X, *rows)
    fits = fits and {(H, N)}.issuperset(tuple(C.shape[1:]) for C in rows)
    if not fits or {(t.dtype, t.device) for t in tensors} != {(torch.float64, a.device)}:
        given = [(tuple(t.shape), t.dtype, str(t.device)) for t in tensors]
        raise ValueError(
            f"need a (H, N), F and G (r, H, N), X (H, q, N), C (c, H, N), float64 on one device, got {given}"
        )
    return tuple(map(dispatch.plain_memory, tensors))


@torch.library.custom_op("s4::response", mutates_args=())
def operator(
    a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor, L: int, dtype: torch.dtype, backend: str
) -> Tensor:
    operands = checked(a, F, G, X, C)
    module = dispatch.implementation("response", backend, a.device)
    run: Callable[..., Tensor] = plain if module is None else module.response
    return run(*operands, L, dtype).contiguous()


@torch.library.custom_op("s4::response_backward", mutates_args=())
def operator_backward(
    grad: Tensor, a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    operands = checked(a, F, G, X, C)
    shape = (C.shape[0], X.shape[1], a.shape[0])
    if (
        grad.shape[:-1] != shape
        or grad.dtype not in (torch.float32, torch.float64)
        or grad.device != a.device
    ):
        got = f"{tuple(grad.shape)} of {grad.dtype} on {grad.device}"
        raise ValueError(f"need grad {(*shape, 'L')} of float32 or float64 on {a.device}, got {got}")
    module = dispatch.implementation("response", backend, a.device)
    if backward := getattr(module, "response_backward", None):
        return tuple(backward(dispatch.plain_memory(grad), *operands))
    run = partial(plain, L=grad.shape[-1], dtype=grad.dtype)
    return tuple(dispatch.pulled(run, operands, grad))  # type: ignore[return-value]


@operator.register_fake
def _(
    a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor, L: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return a.new_empty(C.shape[0], X.shape[1], a.shape[0], L, dtype=dtype)


@operator_backward.register_fake
def _(
    grad: Tensor, a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (a, F, G, X, C))  # type: ignore[return-value]


def _save(ctx, inputs: tuple[Any, ...], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.L, ctx.dtype, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if dispatch.recorded(grad):
        run = partial(plain, L=ctx.L, dtype=ctx.dtype)
        return *dispatch.through(run, ctx.saved_tensors, grad), None, None, None
    return *operator_backward(grad, *ctx.saved_tensors, ctx.backend), None, None, None


operator.register_autograd(_gradients, setup_context=_save)
