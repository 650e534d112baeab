"""Many steps of a recurrence without inputs, as many for each sequence as it asks for."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from s4.ops import dispatch
from s4.powers import Propagator
from s4.system import Recurrence


def advance(
    recurrence: Recurrence, x: Float[Tensor, "B H N"], steps: Int[Tensor, "B"], longest: int
) -> Float[Tensor, "B H N"]:
    """A^steps x, with a number of steps, at most `longest`, for each sequence of the batch."""
    a, F, G, _, _ = recurrence
    run = operator if dispatch.opaque() else plain
    return run(a, F, G, x, steps, longest)


def plain(a: Tensor, F: Tensor, G: Tensor, x: Tensor, steps: Tensor, longest: int) -> Tensor:
    """By the powers A, A^2, A^4, ... and the bits of each number."""
    return Propagator(Recurrence(a, F, G, a, a[None])).advance(x, steps, longest)


def _of(steps: Tensor, longest: int) -> Callable[..., Tensor]:
    """`plain` of what it is differentiated by."""

    def run(a: Tensor, F: Tensor, G: Tensor, x: Tensor) -> Tensor:
        return plain(a, F, G, x, steps, longest)

    return run


@torch.library.custom_op("s4::advance", mutates_args=())
def operator(a: Tensor, F: Tensor, G: Tensor, x: Tensor, steps: Tensor, longest: int) -> Tensor:
    """`plain`, for a graph that serves every length."""
    dispatch.refuse_tangents()
    return plain(a, F, G, x, steps, longest).clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("s4::advance_backward", mutates_args=())
def operator_backward(
    grad: Tensor, a: Tensor, F: Tensor, G: Tensor, x: Tensor, steps: Tensor, longest: int
) -> list[Tensor]:
    """Gradients of a, F, G and x."""
    return dispatch.pulled(_of(steps, longest), (a, F, G, x), grad)


@operator.register_fake
def _(a: Tensor, F: Tensor, G: Tensor, x: Tensor, steps: Tensor, longest: int) -> Tensor:
    return x.new_empty(x.shape)


@operator_backward.register_fake
def _(grad: Tensor, a: Tensor, F: Tensor, G: Tensor, x: Tensor, steps: Tensor, longest: int) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (a, F, G, x)]


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.longest = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    *inputs, steps = ctx.saved_tensors
    if dispatch.recorded(grad):
        return *dispatch.through(_of(steps, ctx.longest), inputs, grad), None, None
    return *operator_backward(grad, *inputs, steps, ctx.longest), None, None


operator.register_autograd(_gradients, setup_context=_save)
