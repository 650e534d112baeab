"""The linear maps of one chunk of T steps, which `scan` applies to chunk after chunk.

With rows u_c of T inputs, y_c of T outputs and x_c, the state before them:

    y_c     = u_c Toep(K_0, ..., K_{T-1}) + x_c [C A, ..., C A^T]
    x_{c+1} = u_c [A^{T-1} B, ..., B]     + x_c A^T
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from s4.ops import dispatch
from s4.ops.response import checked
from s4.powers import Propagator
from s4.precision import moved
from s4.system import Recurrence


class Maps(NamedTuple):
    """One system a channel, applied to rows from the right.

    Shapes: taps (H, 2T-1), the kernel at lags 1-T, ..., T-1; inward (H, T, N), inputs to the next state;
    outward (H, T, N), state to outputs, transposed; onward (H, N, N), state to the next state.
    """

    taps: Tensor
    inward: Tensor
    outward: Tensor
    onward: Tensor


def maps(
    recurrence: Recurrence, D: Tensor, T: int, dtype: torch.dtype, backend: str = "auto"
) -> tuple[Maps, Maps | None]:
    """The maps forward in time, with D (H,) the tap at lag 0, and backward if there is a second row C.

    On the device of D, by one copy where the recurrence is on another.
    """
    where = recurrence.a.device
    inputs = *recurrence, D.to(where).to(recurrence.a.dtype)
    if dispatch.fused("maps", backend, where.type):
        taps, inward, outward, onward = operator(*inputs, T, dtype, backend)
    else:
        taps, inward, outward, onward = plain(*inputs, T, dtype)
    if where != D.device:
        taps, inward, outward, onward = moved([taps, inward, outward, onward], D.device)
    ahead = Maps(taps[0], inward, outward[0], onward)
    return ahead, Maps(taps[1], inward.flip(1), outward[1], onward) if len(taps) == 2 else None


def plain(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, T: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """taps (c, H, 2T-1), inward (H, T, N), outward (c, H, T, N), onward (H, N, N), of B (H, N), C (c, H, N).

    Backward in time, from the second row C, the maps are strict: a chunk, its inputs from the last to the
    first, gives y_t = sum over j > t of K_{j-t-1} u_j, as lag 0 meets the input just after an output. So its
    taps lie at lags from -1 down, and its rows are C, C A, ..., C A^(T-1).
    """
    propagator = Propagator(Recurrence(a, F, G, B, C))
    columns, rows = propagator.columns(T).mT, propagator.rows(T)
    K = torch.einsum("htn,chn->cht", columns, C)
    ahead = pad(torch.cat([K[0, :, :1] + D[:, None], K[0, :, 1:]], -1), (T - 1, 0))
    taps, outward = ahead[None], rows[:1]
    if C.shape[0] == 2:
        strict = torch.cat([C[1, :, None], rows[1, :, :-1]], 1).flip(1)
        taps = torch.stack([ahead, pad(K[1, :, : T - 1].flip(-1), (0, T))])
        outward = torch.stack([rows[0], strict])
    found = taps, columns.flip(1), outward, propagator.power(T).mT
    return tuple(part.to(dtype).contiguous() for part in found)  # type: ignore[return-value]


def _checked(a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor) -> tuple[Tensor, ...]:
    a, F, G, X, C = checked(a, F, G, B[:, None], C)
    if D.shape != a.shape[:1] or D.dtype != a.dtype or C.shape[0] > 2:
        raise ValueError(
            f"need D (H,) {a.dtype} and C (1 or 2, H, N), got {tuple(D.shape)}, {tuple(C.shape)}"
        )
    return a, F, G, X[:, 0], C, dispatch.plain_memory(D)


def _shapes(a: Tensor, C: Tensor, T: int) -> tuple[Any, ...]:
    (H, N), c = a.shape, C.shape[0]
    return (c, H, 2 * T - 1), (H, T, N), (c, H, T, N), (H, N, N)


@torch.library.custom_op("s4::maps", mutates_args=())
def operator(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, T: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    operands = _checked(a, F, G, B, C, D)
    module = dispatch.implementation("maps", backend, a.device)
    run: Callable[..., Any] = plain if module is None else module.maps
    return run(*operands, T, dtype)


@torch.library.custom_op("s4::maps_backward", mutates_args=())
def operator_backward(grads: Sequence[Tensor], inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    """Gradients of a, F, G, B, C and D."""
    operands, T = _checked(*inputs), grads[1].shape[1]
    a, C = operands[0], operands[4]
    kinds = {(g.dtype, g.device) for g in grads}
    if [g.shape for g in grads] != list(_shapes(a, C, T)) or len(kinds) > 1 or grads[0].device != a.device:
        raise ValueError(f"need gradients {_shapes(a, C, T)}, got {[tuple(g.shape) for g in grads]}, {kinds}")
    grads = tuple(map(dispatch.plain_memory, grads))
    module = dispatch.implementation("maps", backend, a.device)
    if backward := getattr(module, "maps_backward", None):
        return list(backward(grads, operands))
    return dispatch.pulled(partial(plain, T=T, dtype=grads[0].dtype), operands, grads)


@operator.register_fake
def _(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, T: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(a.new_empty(s, dtype=dtype) for s in _shapes(a, C, T))  # type: ignore[return-value]


@operator_backward.register_fake
def _(grads: Sequence[Tensor], inputs: Sequence[Tensor], backend: str) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in inputs]


def _save(ctx, inputs: tuple[Any, ...], output: Any) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.T, ctx.dtype, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if dispatch.recorded(*grads):
        run = partial(plain, T=ctx.T, dtype=ctx.dtype)
        return *dispatch.through(run, ctx.saved_tensors, grads), None, None, None
    return *operator_backward(list(grads), list(ctx.saved_tensors), ctx.backend), None, None, None


operator.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("s4::power", mutates_args=())
def power(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, T: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """The map `onward` alone, (H, N, N), of the inputs of `operator`; T from 0, of any size in one graph."""
    if T == 0:
        return torch.eye(a.shape[1], dtype=dtype, device=a.device).repeat(a.shape[0], 1, 1)
    onward: Tensor = operator(a, F, G, B, C, D, T, dtype, backend)[3]
    return onward


@torch.library.custom_op("s4::power_backward", mutates_args=())
def power_backward(grad: Tensor, inputs: Sequence[Tensor], T: int, backend: str) -> list[Tensor]:
    """Gradients of a, F, G, B, C and D."""
    if T == 0:
        return [torch.zeros_like(t) for t in inputs]
    none = [grad.new_zeros(shape) for shape in _shapes(inputs[0], inputs[4], T)[:3]]
    return list(operator_backward([*none, grad], inputs, backend))


@power.register_fake
def _(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, T: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return a.new_empty(*a.shape, a.shape[1], dtype=dtype)


@power_backward.register_fake
def _(grad: Tensor, inputs: Sequence[Tensor], T: int, backend: str) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in inputs]


def _gradients_of_power(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    if dispatch.recorded(grad):
        if ctx.T == 0:
            return *map(torch.zeros_like, ctx.saved_tensors), None, None, None

        def onward(a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
            return plain(a, F, G, B, C, D, ctx.T, ctx.dtype)[3]

        return *dispatch.through(onward, ctx.saved_tensors, grad), None, None, None
    return *power_backward(grad, list(ctx.saved_tensors), ctx.T, ctx.backend), None, None, None


power.register_autograd(_gradients_of_power, setup_context=_save)
