"""What ranks of a process group hand each other: sums, and states from one piece of a sequence to another."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s4.ops import dispatch
from s4.ops.advance import advance
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


def _moved(a: Tensor, F: Tensor, G: Tensor, x: Tensor, steps: Tensor, most: int) -> Tensor:
    """The sum over k of A^steps_k x_k, of x (k, B, H, N) and steps (k, B)."""
    if x.shape[0] == 0:
        return x.sum(0)
    recurrence = Recurrence(a, F, G, a, a[None])
    found = advance(recurrence, x.flatten(0, 1), steps.flatten(), most)
    return found.view_as(x).sum(0)


class Handed(torch.autograd.Function):
    """The states before and behind a rank's piece, and after the whole sequence, from those of all pieces."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        parts: Tensor,
        x: Tensor | None,
        a: Tensor,
        F: Tensor,
        G: Tensor,
        steps: Tensor,
        most: int,
        return_state: bool,
        ring: Ring,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        parts = gathered(parts, ring)
        ctx.save_for_backward(parts, x, a, F, G, steps)
        ctx.most, ctx.return_state, ctx.ring = most, return_state, ring
        return _states(a, F, G, x, parts, steps, most, return_state, ring.rank)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        parts, x, a, F, G, steps = ctx.saved_tensors
        rank, most = ctx.ring.rank, ctx.most
        present = True, parts.shape[1] == 2, ctx.return_state
        own = [g for g, there in zip(grads, present, strict=True) if there]
        ahead, *rest = gathered(torch.stack(own), ctx.ring).unbind(1)

        ends = steps.cumsum(0)
        starts, total = ends - steps, ends[-1]
        # A^T = conj(a) + G F: the transposed steps from where a state went to where it came from.
        re, im = a.chunk(2, -1)
        transposed = torch.cat([re, -im], -1), G, F
        given, to = [ahead[rank + 1 :].double()], [starts[rank + 1 :] - ends[rank]]
        if ctx.return_state:
            given.append(rest[-1].double().sum(0, keepdim=True))
            to.append((total - ends[rank])[None])
        found = [_moved(*transposed, torch.cat(given), torch.cat(to), most)]
        if parts.shape[1] == 2:
            found.append(_moved(*transposed, rest[0][:rank].double(), starts[rank] - ends[:rank], most))
        grad_parts = torch.stack(found).to(parts.dtype)

        def own_states(a: Tensor, F: Tensor, G: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
            first = x[0] if x else None
            states = _states(a, F, G, first, parts, steps, most, ctx.return_state, rank)
            return tuple(state for state in states if state is not None)

        inputs = (a, F, G) if x is None else (a, F, G, x)
        *shares, grad_x = [*dispatch.pulled(own_states, inputs, tuple(own)), None][
            : len(inputs) + (x is None)
        ]
        return grad_parts, grad_x, *shares, None, None, None, None


def _states(
    a: Tensor,
    F: Tensor,
    G: Tensor,
    x: Tensor | None,
    parts: Tensor,
    steps: Tensor,
    most: int,
    return_state: bool,
    rank: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of what all pieces add, parts (ranks, 1 or 2, B, H, N): the states before and behind one, and the last.

    In float64, rounded at the end.
    """
    ends = steps.cumsum(0)
    starts, total, dtype = ends - steps, ends[-1:], parts.dtype
    ahead = parts[:, 0].double()

    def reached(some: Tensor, at: Tensor, since: Tensor) -> Tensor:
        if x is not None:
            some, since = torch.cat([x.double()[None], some]), torch.cat([torch.zeros_like(total), since])
        return _moved(a, F, G, some, at - since, most).to(dtype)

    before = reached(ahead[:rank], starts[rank], ends[:rank])
    last = reached(ahead, total[0], ends) if return_state else None
    if parts.shape[1] == 1:
        return before, None, last
    later = parts[rank + 1 :, 1].double()
    return before, _moved(a, F, G, later, starts[rank + 1 :] - ends[rank], most).to(dtype), last
