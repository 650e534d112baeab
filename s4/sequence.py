"""A whole sequence through a layer: by convolution, by a scan over chunks, or step by step."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from s4 import kernel
from s4.ops import dispatch, step
from s4.ops.chunks import last_state, scan, states
from s4.ops.convolve import convolve
from s4.ops.kept import Kept, kept_at
from s4.ops.response import continuation
from s4.ops.varying import varying
from s4.padding import zero_padding
from s4.system import discretize, system


def sequence(
    systems: tuple[Any, ...],
    D: Float[Tensor, "H"],
    u: Float[Tensor, "B L H"],
    x: Float[Tensor, "B H N"] | None,
    lengths: Int[Tensor, "B"] | None,
    resets: Bool[Tensor, "B L"] | None,
    mode: str,
    products: torch.dtype,
    backend: str,
    return_state: bool,
    kept: Kept | None,
) -> tuple[Float[Tensor, "B L H"], Float[Tensor, "B H N"] | None]:
    """Outputs, zero past the lengths, and the state after the last input if asked for.

    Args:
        systems: the arguments of `s4.system.system`.
        D: what an input adds to its own output, in the dtype of the parameter.
        u: inputs, zero past the lengths.
        x: the state before the first input; None is zero.
        lengths: of right-padded sequences; None where all have the length of u.
        resets: where the state is zero before the input.
        mode: "fft", "scan" or "auto".
        products: the dtype of the factors of a scan's large products.
        backend: who computes, "auto" or one of `s4.kernel.backends()`.
        return_state: whether the state is wanted.
        kept: what keeps what parameters come to between calls, or None where they are in training.
    """
    *parameters, rate, discretization = systems
    if isinstance(rate, Tensor):
        return _irregular(systems, D, u, x, lengths, resets, backend, return_state)
    made: dict[Any, Any] | None = None
    if kept is not None and D.is_cpu:
        if dispatch.opaque() and not dispatch.exporting() and dispatch.unwatched(D):
            options = discretization, mode, products, backend, return_state
            told = rate * torch.ones((), dtype=torch.float64)  # a number would be a constant of the graph
            y, after = operator(parameters, D, u, x, lengths, resets, told, *options)
            return y, after if return_state else None
        if dispatch.keeps(D, u, u if x is None else x):
            made = kept.of(*step.identity(systems, D, backend))
    D = D.to(u.dtype)
    batch, L, _ = u.shape
    found = {} if made is None else made
    if "recurrence" not in found:
        found["system"] = system(*systems)
        found["recurrence"] = discretize(found["system"])
        if found["system"].dt.device != u.device:
            made = found  # for this call: it crosses to a device without float64 once
    recurrence, after = found["recurrence"], None
    stateful = return_state or x is not None
    keeps = made is not None
    way = dispatch.way(mode, backend, recurrence, batch, L, stateful, keeps, u.device.type, resets)
    if way == "steps":
        y, after = step.run(recurrence, D, x, u, backend, resets)
    elif way == "scan":
        whole = return_state and lengths is None and resets is None
        y, after = scan(u, recurrence, D, x, products, backend, return_state=whole, kept=made, resets=resets)
    else:
        length, k = found.get("kernel", (None, None))
        if length != L:
            k = kernel.kernel(found["system"], recurrence, L, D.dtype, method="auto", backend=backend)
            k = k.to(u.device)
            found["kernel"] = L, k
        y = convolve(
            u, k, D, None if x is None else continuation(recurrence, _begun(x, resets), L, backend), resets
        )
    if lengths is not None:
        y = zero_padding(y, lengths)
    if not return_state:
        return y, None
    if after is None or lengths is not None:
        after = last_state(u, recurrence, D, x, lengths, resets, backend, made)
    return y, after


def _at_rate(systems: tuple[Any, ...], rate: float) -> tuple[Any, ...]:
    """The arguments of `s4.system.system` with another rate."""
    *parameters, _, discretization = systems
    return *parameters, rate, discretization


def _begun(x: Tensor, resets: Tensor | None) -> Tensor:
    """The state x, 0 where the first input is a reset: were it nan, gradients of parameters would be."""
    return x if resets is None else torch.where(resets[:, :1, None], 0, x)


def _ends(u: Tensor, lengths: Tensor | None) -> Tensor:
    """The last position of each sequence, (B, 1); -1 of an empty one."""
    if lengths is None:
        return torch.full((u.shape[0], 1), u.shape[1] - 1, device=u.device)
    return lengths[:, None] - 1


def _irregular(
    systems: tuple[Any, ...],
    D: Tensor,
    u: Tensor,
    x: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    backend: str,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`sequence`, with a rate (B, L) of each step: a system that varies in time, the same in every mode."""
    *_, rate, _ = systems
    ends = _ends(u, lengths) if return_state else None
    one = system(*_at_rate(systems, 1.0))
    y, after = varying(one, D.to(u.dtype), u, rate, x, resets, ends, backend)
    if lengths is not None:
        y = zero_padding(y, lengths)
    return y, None if after is None else after[:, 0]


def states_at(
    systems: tuple[Any, ...],
    D: Float[Tensor, "H"],
    u: Float[Tensor, "B L H"],
    x: Float[Tensor, "B H N"] | None,
    positions: Int[Tensor, "B P"],
    resets: Bool[Tensor, "B L"] | None,
    backend: str,
) -> Float[Tensor, "B P H N"]:
    """The states after these inputs; at -1 that before the first. Arguments as those of `sequence`."""
    *_, rate, _ = systems
    D = D.to(u.dtype)
    if isinstance(rate, Tensor):
        one = system(*_at_rate(systems, 1.0))
        found = varying(one, D, u, rate, x, resets, positions, backend)[1]
        assert found is not None
        return found
    return states(u, discretize(system(*systems)), D, x, positions, resets, backend, None)


@torch.library.custom_op("s4::sequence_kept", mutates_args=())
def operator(
    systems: Sequence[Tensor | None],
    D: Tensor,
    u: Tensor,
    x: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    rate: Tensor,
    discretization: str,
    mode: str,
    products: torch.dtype,
    backend: str,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """In evaluation, for torch.compile, which cannot see whether parameters changed: kept until they do.

    The way is chosen inside, by the numbers, so that one graph serves all shapes. The state is empty unless
    asked for.
    """
    dispatch.refuse_tangents()
    options = mode, products, backend, return_state
    kept = kept_at("sequence", systems[0])
    told = *systems, rate.item(), discretization
    y, after = sequence(told, D, u, x, lengths, resets, *options, kept)
    return y.contiguous(), u.new_empty(0) if after is None else after.contiguous()


@operator.register_fake
def _(
    systems: Sequence[Tensor | None],
    D: Tensor,
    u: Tensor,
    x: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    rate: Tensor,
    discretization: str,
    mode: str,
    products: torch.dtype,
    backend: str,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    Lambda = systems[1]
    assert Lambda is not None
    shape = (u.shape[0], D.shape[0], 2 * Lambda.shape[1]) if return_state else (0,)
    return u.new_empty(u.shape), u.new_empty(shape)
