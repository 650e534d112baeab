"""Sequences in chunks: how long those are, outputs by a scan over them, and states after chosen inputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from s4.ops import dispatch
from s4.ops import scan as scans
from s4.ops.maps import Maps, maps, power
from s4.ops.segments import fitting
from s4.padding import last_start, last_steps, padding, right_aligned
from s4.powers import Propagator
from s4.precision import add_product, moved, product
from s4.system import Recurrence

_MANY = 1 << 16  # inputs a channel, for which longer chunks repay their larger maps, where those are kept


def chunk_length(B: int, L: int, N: int, price: int = 0) -> int:
    """T, a power of two: the products cost 2T + 4N + 4N^2/T flop an input, the maps some T N^2 a channel.

    `price` is that of making maps for these inputs alone, 1 for diagonal systems, 2 for others: of B L inputs
    they then are to take no more than the products do. It is 0 where the maps serve later calls, too.
    """
    most = max(N if B * L < _MANY else 2 * N, 32)
    T = 1
    while min(L, most) > T and (T < 8 or price * 4 * T * T < B * L):
        T *= 2
    return T


def scan(
    u: Float[Tensor, "B L H"],
    recurrence: Recurrence,
    D: Float[Tensor, "H"],
    x: Float[Tensor, "B H N"] | None = None,
    products: torch.dtype | None = None,
    backend: str = "auto",
    *,
    return_state: bool = True,
    kept: dict[Any, Any] | None = None,
    resets: Bool[Tensor, "B L"] | None = None,
) -> tuple[Float[Tensor, "B L H"], Float[Tensor, "B H N"] | None]:
    """Outputs, and the state after the last input if asked for, from the state x or zero.

    Args:
        u: inputs.
        recurrence: the systems; with two rows C, the second runs backward in time, from zero.
        D: what an input adds to its own output.
        x: the state before the first input.
        products: the dtype of the large products' factors, if not that of u. The recurrence keeps that of u.
        backend: who computes, "auto" or one of `s4.kernel.backends()`.
        return_state: whether the state is wanted; None is returned in its place otherwise. With resets it
            must be False.
        kept: where maps of this recurrence are kept for later calls.
        resets: where the state is zero before the input.
    """
    B, L, H = u.shape
    N = recurrence.B.shape[-1]
    one_graph = dispatch.opaque()
    apart = recurrence.a.device != u.device  # which has no float64: `kept` then is for this call
    made = {} if kept is None else kept
    T = _length(u, recurrence, backend, kept is None or apart, resets)
    name = "maps" if resets is None else "maps of segments"
    length, both = made.get(name, (0, None))
    if both is None or length != T:
        both = maps(recurrence, D, T, u.dtype, backend)
        made[name] = T, both
    ahead: Maps = both[0]
    behind: Maps | None = both[1]
    before = u.new_zeros(H, B, N) if x is None else x.transpose(0, 1)
    options = products or u.dtype, backend, resets
    run = scans.plain if dispatch.transformed() else scans.operator
    y, last = run(u, before, *ahead, False, *options)
    if behind is not None:
        later, _ = run(u, torch.zeros_like(before), *behind, True, *options)
        y = y + later
    if not return_state:
        return y, None
    rest = L % T
    if not one_graph and rest == 0:
        return y, last.transpose(0, 1)
    # From the state before the ragged chunk to that after its inputs.
    if one_graph:
        driven = product(last_steps(u, rest, T).permute(2, 0, 1), ahead.inward)
    else:
        driven = product(u[:, L - rest :].permute(2, 0, 1), ahead.inward[:, T - rest :])
    if not (one_graph or apart or dispatch.fused("maps", backend, u.device.type)):
        steps = torch.full((B,), rest, device=u.device)
        return y, Propagator(recurrence).advance(last.transpose(0, 1), steps, T - 1) + driven.transpose(0, 1)
    length, onward = made.get("rest", (None, None))
    if length is None or length != rest:  # None first: a graph cannot compare it with a symbolic number
        if apart and not one_graph:
            onward = Propagator(recurrence).power(rest).mT.to(u.dtype)
        else:
            onward = power(*recurrence, recurrence.a.new_zeros(len(recurrence.a)), rest, u.dtype, backend)
        onward = onward.to(u.device)
        made["rest"] = rest, onward
    return y, add_product(driven, last, onward).transpose(0, 1)


def _length(u: Tensor, recurrence: Recurrence, backend: str, single: bool, resets: Tensor | None) -> int:
    """T that suits these inputs; `single` where the maps are for them alone."""
    (B, L, _), N = u.shape, recurrence.B.shape[-1]
    if dispatch.opaque():  # one for all lengths, whatever is left of them
        return chunk_length(1, _MANY - 1, N // 2)
    price = 0  # of maps that serve later calls, too, or are made in plain PyTorch, at the same price at any T
    if single and dispatch.fused("maps", backend, recurrence.a.device.type):
        price = 2 if len(recurrence.F) else 1
    T = chunk_length(B, L, N, price)
    if resets is None or not len(resets) or resets.is_meta or type(resets) is not Tensor:
        return T  # also where there are shapes and no numbers
    return fitting(resets, T, N)


def last_state(
    u: Float[Tensor, "B L H"],
    recurrence: Recurrence,
    D: Float[Tensor, "H"],
    x: Float[Tensor, "B H N"] | None,
    lengths: Int[Tensor, "B"] | None,
    resets: Bool[Tensor, "B L"] | None,
    backend: str,
    kept: dict[Any, Any] | None,
) -> Float[Tensor, "B H N"]:
    """The state after the last input, of padded sequences their own last one, from the state x or zero."""
    if x is not None and not (lengths is None and resets is None):
        last = torch.full_like(u[:, 0, 0], u.shape[1], dtype=torch.long) if lengths is None else lengths
        return states(u, recurrence, D, x, last[:, None] - 1, resets, backend, kept)[:, 0]
    if resets is not None:  # from zero, what lies before the last segment is as if it were not there
        u = torch.where(padding(last_start(resets, lengths), u.shape[1])[..., None], u, 0)
    u = u if lengths is None else right_aligned(u, lengths)
    _, after = scan(u, recurrence, D, x, None, backend, kept=kept)
    assert after is not None
    return after


def states(
    u: Float[Tensor, "B L H"],
    recurrence: Recurrence,
    D: Float[Tensor, "H"],
    x: Float[Tensor, "B H N"] | None,
    positions: Int[Tensor, "B P"],
    resets: Bool[Tensor, "B L"] | None,
    backend: str,
    kept: dict[Any, Any] | None,
) -> Float[Tensor, "B P H N"]:
    """The states after these inputs of each sequence, from the state x or zero; at -1 that before the first.

    From the states before each chunk: to one of those, A^j for the j inputs of the chunk up to the position,
    and what these inputs drive.
    """
    B, _, H = u.shape
    N, P = recurrence.B.shape[-1], positions.shape[1]
    made = {} if kept is None else kept
    single = kept is None or recurrence.a.device != u.device
    T = _length(u, recurrence, backend, single, None)
    length, both = made.get("maps", (0, None))
    if both is None or length != T:
        both = maps(recurrence, D, T, u.dtype, backend)
        made["maps"] = T, both
    ahead: Maps = both[0]
    before = u.new_zeros(H, B, N) if x is None else x.transpose(0, 1)
    run = plain if dispatch.transformed() else operator
    found, driven, steps = run(u, before, ahead.inward, ahead.onward, positions, resets)
    if len(recurrence.F) == 0 and recurrence.a.device == u.device and not dispatch.opaque():
        rows = found.permute(1, 2, 0, 3).flatten(0, 1)  # diagonal powers are numbers, not matrices
        after = Propagator(recurrence).advance(rows, steps.flatten(), T).view(B, P, H, N)
        return after + driven.permute(1, 2, 0, 3)
    length, powers = made.get("powers", (0, []))
    if length != T:
        powers = [*_powers(recurrence, T // 2, u, backend), ahead.onward]
        made["powers"] = T, powers
    after, left = found.flatten(1, 2), steps.flatten()[:, None]
    for j, onward in enumerate(powers):  # A, A^2, A^4, ..., by the bits of each number
        after = torch.where((left >> j) % 2 == 1, product(after, onward), after)
    return (after + driven.flatten(1, 2)).view(H, B, P, N).permute(1, 2, 0, 3)


def _powers(recurrence: Recurrence, most: int, like: Tensor, backend: str) -> list[Tensor]:
    """A, A^2, A^4, ... up to a power of two, (H, N, N) each, applied to rows from the right."""
    exponents = [1 << j for j in range(most.bit_length())]
    if dispatch.opaque() or dispatch.fused("maps", backend, recurrence.a.device.type):
        D = recurrence.a.new_zeros(len(recurrence.a))
        found = [power(*recurrence, D, t, like.dtype, backend) for t in exponents]
    else:
        propagator = Propagator(recurrence)
        found = [propagator.power(t).mT.to(like.dtype) for t in exponents]
    return found if recurrence.a.device == like.device else moved(found, like.device)


class _Chunked(NamedTuple):
    """Sequences in chunks from the first input on, whatever is reset, and where positions lie in them.

    Shapes: U (H, B, c, T), the inputs; driving (B, c, T), those that count for the state after their chunk;
    ends (B, c), whether the state before does not. Of each position: chunk (B, P), its own; kept (B, P),
    whether the state before that counts; slots and inside (B, P, T), the last T inputs, and which of them do.
    """

    U: Tensor
    driving: Tensor
    ends: Tensor | None
    chunk: Tensor
    kept: Tensor
    slots: Tensor
    inside: Tensor


def _in_chunks(u: Tensor, positions: Tensor, resets: Tensor | None, T: int) -> _Chunked:
    U, t = scans.chunked(scans.rows(u, None, T), T), positions.clamp(min=0)
    steps = torch.arange(U.shape[2] * T, device=u.device)
    chunk, kept, ends = t // T, positions >= 0, None
    since, driving = T * chunk, torch.ones_like(steps, dtype=torch.bool).view(1, -1, T)
    if resets is not None:
        latest = torch.where(resets, steps[: u.shape[1]], -1).cummax(1).values  # reset up to each input
        last = latest[:, steps[T - 1 :: T].clamp(max=u.shape[1] - 1)]  # of each chunk, if it has one
        driving, ends = steps.view(-1, T) >= last[:, :, None], last >= steps[::T]
        begun = latest.gather(1, t)
        kept, since = kept & (begun < since), torch.maximum(since, begun)
    slots = t[:, :, None] + torch.arange(1 - T, 1, device=u.device)
    inside = (slots >= since[:, :, None]) & (positions >= 0)[:, :, None]
    return _Chunked(U, driving, ends, chunk, kept, slots.clamp(min=0), inside)


def plain(
    u: Tensor, x: Tensor, inward: Tensor, onward: Tensor, positions: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each position, all (H, B, P, N): the state before its chunk, and what the chunk drives up to it.

    And how many inputs of the chunk that is, (B, P).
    """
    (H, B, N), T, P = x.shape, inward.shape[1], positions.shape[1]
    U, driving, ends, chunk, kept, slots, inside = _in_chunks(u, positions, resets, T)
    S = product(torch.where(driving, U, 0).flatten(1, 2), inward).view(*U.shape[:3], N)
    X, _ = scans.recur(S, x, onward.contiguous(), ends, False)
    found = X.gather(2, chunk[None, :, :, None].expand(H, B, P, N))
    found = torch.where(kept[..., None], found, 0)
    found = torch.where((positions < 0)[..., None], x[:, :, None], found)
    window = U.flatten(2).gather(2, slots.flatten(1).expand(H, B, P * T)).view(H, B, P, T)
    driven = product(torch.where(inside, window, 0).flatten(1, 2), inward).view(H, B, P, N)
    return found, driven, torch.where(positions < 0, 0, positions % T + 1)


def plain_backward(
    grads: Sequence[Tensor], inputs: Sequence[Tensor], positions: Tensor, resets: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of the first four inputs of `plain`: those of the states pass the chunks the other way."""
    (u, x, inward, onward), (of_found, of_driven) = inputs, grads
    (H, B, N), T, P = x.shape, inward.shape[1], positions.shape[1]
    U, driving, ends, chunk, kept, slots, inside = _in_chunks(u, positions, resets, T)
    rows = torch.where(driving, U, 0).flatten(1, 2)
    S = product(rows, inward).view(*U.shape[:3], N)
    X, _ = scans.recur(S, x, onward.contiguous(), ends, False)
    at = chunk[None, :, :, None].expand(H, B, P, N)
    S = torch.zeros_like(X).scatter_add(2, at, torch.where(kept[..., None], of_found, 0))
    Z, of_x = scans.recur(S, torch.zeros_like(x), onward.mT.contiguous(), ends, True)
    of_x = of_x + torch.where((positions < 0)[..., None], of_found, 0).sum(2)
    X = X if ends is None else torch.where(ends[..., None], 0, X)
    X, Z, of_driven, slots = X.flatten(1, 2), Z.flatten(1, 2), of_driven.flatten(1, 2), slots.flatten(1)
    slots = slots.expand(H, B, P * T)
    window = torch.where(inside, U.flatten(2).gather(2, slots).view(H, B, P, T), 0).flatten(1, 2)
    of_inward = product(rows.mT, Z) + product(window.mT, of_driven)
    of_window = torch.where(inside, product(of_driven, inward.mT).view(H, B, P, T), 0)
    of_U = torch.where(driving, product(Z, inward.mT).view(U.shape), 0).flatten(2)
    of_U = of_U.scatter_add(2, slots, of_window.flatten(2))[..., : u.shape[1]]
    return scans.steps(of_U, None), of_x, of_inward, product(X.mT, Z)


@torch.library.custom_op("s4::states", mutates_args=())
def operator(
    u: Tensor, x: Tensor, inward: Tensor, onward: Tensor, positions: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dispatch.refuse_tangents()
    found, driven, steps = plain(u, x, inward, onward, positions, resets)
    return found.contiguous(), driven.contiguous(), steps


@torch.library.custom_op("s4::states_backward", mutates_args=())
def operator_backward(
    grads: Sequence[Tensor], inputs: Sequence[Tensor], positions: Tensor, resets: Tensor | None
) -> list[Tensor]:
    """Gradients of u, x, inward and onward."""
    with dispatch.full_precision(positions.device):
        return [t.contiguous() for t in plain_backward(grads, inputs, positions, resets)]


def _of(positions: Tensor, resets: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """`plain` of what it is differentiated by."""

    def run(u: Tensor, x: Tensor, inward: Tensor, onward: Tensor) -> tuple[Tensor, Tensor]:
        found, driven, _ = plain(u, x, inward, onward, positions, resets)
        return found, driven

    return run


@operator.register_fake
def _(
    u: Tensor, x: Tensor, inward: Tensor, onward: Tensor, positions: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:2], positions.shape[1], x.shape[2])
    return u.new_empty(shape), u.new_empty(shape), positions.new_empty(positions.shape)


@operator_backward.register_fake
def _(
    grads: Sequence[Tensor], inputs: Sequence[Tensor], positions: Tensor, resets: Tensor | None
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in inputs]


def _save(ctx, inputs: tuple[Tensor | None, ...], output: Any) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _gradients(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    *inputs, positions, resets = ctx.saved_tensors
    if dispatch.recorded(*grads[:2]):
        return *dispatch.through(_of(positions, resets), inputs, grads[:2]), None, None
    return *operator_backward(list(grads[:2]), inputs, positions, resets), None, None


operator.register_autograd(_gradients, setup_context=_save)
