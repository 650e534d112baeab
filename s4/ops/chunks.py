"""Sequences in chunks: how long those are, outputs by a scan over them, and states after chosen inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from s4.ops import dispatch
from s4.ops import scan as scans
from s4.ops.maps import Maps, maps, power
from s4.ops.segments import fitting, in_chunks
from s4.padding import last_steps
from s4.powers import Propagator
from s4.precision import add_product, product
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
        return_state: None stands for the state otherwise; not with resets.
        kept: where maps of this recurrence are kept for later calls.
        resets: where the state is zero before the input.
    """
    B, L, H = u.shape
    N = recurrence.B.shape[-1]
    one_graph = dispatch.opaque()
    apart = recurrence.a.device != u.device  # which has no float64: `kept` then is for this call
    made = {} if kept is None else kept
    T = _length(u, recurrence, backend, kept is None or apart, resets)
    length, both = made.get("maps", (0, None))
    if both is None or length != T:
        both = maps(recurrence, D, T, u.dtype, backend)
        made["maps"] = T, both
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
    if length is None or length != rest:  # None apart, as a graph would ask whether one is the other
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
    return T if resets is None else fitting(resets, T, N)


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
    T, both = made.get("maps", (0, None))
    if both is None:
        T = _length(u, recurrence, backend, kept is None, resets)
        both = maps(recurrence, D, T, u.dtype, backend)
        made["maps"] = T, both
    ahead: Maps = both[0]
    before = u.new_zeros(H, B, N) if x is None else x.transpose(0, 1)
    run = plain if dispatch.transformed() else operator
    found, driven, steps = run(u, before, ahead.inward, ahead.onward, positions, resets)
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
    return [onward.to(like.device) for onward in found]


def plain(
    u: Tensor, x: Tensor, inward: Tensor, onward: Tensor, positions: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """For each position, all (H, B, P, N): the state before its chunk, and what the chunk drives up to it.

    And how many inputs of the chunk that is, (B, P).
    """
    (H, B, N), T, P = x.shape, inward.shape[1], positions.shape[1]
    chunks = None if resets is None or not u.shape[1] else in_chunks(resets, T)
    U = scans.chunked(scans.rows(u, chunks, T), T)
    X, _ = scans.states(U, x, inward, onward, None if chunks is None else chunks.fresh)
    slot = positions.clamp(min=0)
    if chunks is not None:
        slot = chunks.place.gather(1, slot)
    chunk, first = slot // T, positions < 0
    found = X.gather(2, chunk[None, :, :, None].expand(H, B, P, N))
    found = torch.where(first[..., None], x[:, :, None], found)
    source = slot[:, :, None] + torch.arange(1 - T, 1, device=u.device)
    inside = (source >= T * chunk[:, :, None]) & ~first[:, :, None]
    window = U.flatten(2).gather(2, source.clamp(min=0).view(1, B, P * T).expand(H, B, P * T))
    window = torch.where(inside, window.view(H, B, P, T), 0)
    driven = product(window.flatten(1, 2), inward).view(H, B, P, N)
    return found, driven, torch.where(first, 0, slot % T + 1)


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
        return dispatch.pulled(_of(positions, resets), inputs, tuple(grads))


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
