"""What ranks of a process group hand each other: sums, and states from one piece of a sequence to another."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s4.ops import dispatch
from s4.powers import Propagator
from s4.system import Recurrence


class Ring(NamedTuple):
    """The ranks of a group, in the order of their pieces, and which of them this one is."""

    group: Any
    rank: int
    size: int


class Sum(torch.autograd.Function):
    """The sum over the ranks, on all of them; so is its gradient."""

    @staticmethod
    def forward(ctx, t: Tensor, group: Any) -> Tensor:  # type: ignore[no-untyped-def]
        import torch.distributed as dist

        ctx.group = group
        t = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(t, group=group)
        return t

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return Sum.apply(grad, ctx.group), None


def gathered(t: Tensor, ring: Ring) -> Tensor:
    """(ranks, *shape) of all ranks' tensors."""
    import torch.distributed as dist

    found = t.new_empty(ring.size, *t.shape)
    dist.all_gather(list(found), t.contiguous(), ring.group)
    return found


class Way(NamedTuple):
    """What lies between the pieces of a sequence: how far, in steps, states are handed on.

    Shapes: steps (ranks, B), those of each piece, more by `FAR` where nothing passes it. `most` is the number
    in all pieces; `rank` is this one; `return_state` asks for the state after the last piece, too.
    """

    steps: Tensor
    most: int
    rank: int
    return_state: bool


FAR = 1 << 40  # steps, which no state survives
_BLOCK = 1 << 16  # numbers of a power of the matrices that are powered at once


def hand(recurrence: Recurrence, parts: Tensor, x: Tensor | None, way: Way, ring: Ring) -> tuple[Tensor, ...]:
    """The states before and behind a rank's piece, and after the whole sequence, where there are such.

    By one gathering of all ranks' parts, and in the gradient another.

    Args:
        recurrence: the systems, in float64.
        parts: (1 or 2, B, H, N), what this piece adds to the state after it and, if bidirectional, before it.
        x: (B, H, N), the state before the first piece, the same on all ranks, or None for zero.
        way: how far it is.
        ring: the ranks.
    """
    a, F, G, _, _ = recurrence
    found: tuple[Tensor, ...] = _Hand.apply(parts, x, a, F, G, way, ring)
    return found


class _Hand(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, parts: Tensor, x: Tensor | None, a: Tensor, F: Tensor, G: Tensor, way: Way, ring: Ring
    ) -> tuple[Tensor, ...]:
        parts = gathered(parts, ring)
        ctx.save_for_backward(parts, x, a, F, G, way.steps)
        ctx.way, ctx.ring = way[1:], ring
        return _in_blocks(partial(_states, way=way), a, F, G, x, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        parts, x, a, F, G, steps = ctx.saved_tensors
        grads_of_all = gathered(torch.stack(grads), ctx.ring)
        run = partial(_gradients, way=Way(steps, *ctx.way))
        grad_parts, *others = _in_blocks(run, a, F, G, x, parts, grads_of_all)
        grad_x = others.pop() if x is not None else None
        return grad_parts, grad_x, *others, None, None


def _in_blocks(run: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """`run` of tensors (..., H, N), a few channels at a time, as powers of all would take much memory."""
    assert tensors[0] is not None
    H, N = tensors[0].shape
    h = max(1, _BLOCK // N**2)
    blocks = [
        run(*(None if t is None else t[..., start : start + h, :] for t in tensors))
        for start in range(0, H, h)
    ]
    return tuple(torch.cat(found, -2) for found in zip(*blocks, strict=True))


def _states(a: Tensor, F: Tensor, G: Tensor, x: Tensor | None, parts: Tensor, way: Way) -> tuple[Tensor, ...]:
    """`hand` from all ranks' parts (ranks, 1 or 2, B, H, N); sums in float64, rounded at the end."""
    steps, _, rank, return_state = way
    ends = steps.cumsum(0)
    starts = ends - steps
    before, since = parts[:, 0].double(), ends
    if x is not None:  # as if a piece of no length added it
        before, since = torch.cat([x.double()[None], before]), torch.cat([torch.zeros_like(ends[:1]), ends])
    first = rank + (x is not None)
    found = [_moved(a, F, G, before[:first], starts[rank] - since[:first], way)]
    if parts.shape[1] == 2:
        later = parts[rank + 1 :, 1].double()
        found.append(_moved(a, F, G, later, starts[rank + 1 :] - ends[rank], way))
    if return_state:
        found.append(_moved(a, F, G, before, ends[-1] - since, way))
    return tuple(state.to(parts.dtype) for state in found)


def _gradients(
    a: Tensor, F: Tensor, G: Tensor, x: Tensor | None, parts: Tensor, grads: Tensor, way: Way
) -> tuple[Tensor, ...]:
    """Of this rank's parts, and its shares of those of a, F, G and x, from all ranks' (ranks, ., B, H, N).

    The parts of one rank reach the states of others: transposed, as far as they came, by A^T = conj(a) + G F.
    """
    steps, _, rank, return_state = way
    ends = steps.cumsum(0)
    starts = ends - steps
    re, im = a.chunk(2, -1)
    transposed = torch.cat([re, -im], -1), G, F
    ahead, distance = grads[rank + 1 :, 0].double(), starts[rank + 1 :] - ends[rank]
    if return_state:
        ahead = torch.cat([ahead, grads[:, -1].double().sum(0, keepdim=True)])
        distance = torch.cat([distance, ends[-1:] - ends[rank]])
    found = [_moved(*transposed, ahead, distance, way)]
    if parts.shape[1] == 2:
        found.append(_moved(*transposed, grads[:rank, 1].double(), starts[rank] - ends[:rank], way))

    def own(a: Tensor, F: Tensor, G: Tensor, x: Tensor | None = None) -> tuple[Tensor, ...]:
        return _states(a, F, G, x, parts, way)

    shares = dispatch.pulled(own, (a, F, G) if x is None else (a, F, G, x), tuple(grads[rank].unbind()))
    return torch.stack(found).to(parts.dtype), *shares


def _moved(a: Tensor, F: Tensor, G: Tensor, x: Tensor, steps: Tensor, way: Way) -> Tensor:
    """The sum over k of A^steps_k x_k, of x (k, B, H, N) and steps (k, B), those that are not too far."""
    if x.shape[0] == 0:
        return x.sum(0)
    far = steps >= FAR
    x = torch.where(far[..., None, None], 0, x)
    steps = steps.masked_fill(far, 0).flatten()
    moved = Propagator(Recurrence(a, F, G, a, a[None])).advance(x.flatten(0, 1), steps, way.most)
    return moved.view_as(x).sum(0)
