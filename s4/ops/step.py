"""One step of a recurrence, and a few in a row."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from s4.ops import dispatch
from s4.ops.kept import Kept, kept_at
from s4.system import Recurrence, discretize, system

_library = torch.library.Library("s4", "FRAGMENT")  # thinner than custom_op: a step takes microseconds
_library.define(
    "step(Tensor a, Tensor F, Tensor G, Tensor B, Tensor C, Tensor D, Tensor x, Tensor u, str backend)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "step_kept(Tensor?[] system, Tensor D, Tensor x, Tensor u, float rate, str discretization, str backend)"
    " -> (Tensor, Tensor)"
)
_RANK = 2  # of A, at most, that backends are written for


def plain(
    recurrence: Recurrence, D: Float[Tensor, "H"], x: Float[Tensor, "B H N"], u: Float[Tensor, "B H"]
) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H N"]]:
    """(y, x) with x = A x + B u and y = C x + D u, in O(N r) a channel and in real arithmetic."""
    a, F, G, B, C = recurrence
    re, im = x.chunk(2, -1)
    a_re, a_im = a.chunk(2, -1)
    moved = torch.cat([a_re * re - a_im * im, a_re * im + a_im * re], -1) + B * u[..., None]
    for r in range(F.shape[0]):
        moved = moved + F[r] * (G[r] * x).sum(-1, keepdim=True)
    return (C[0] * moved).sum(-1) + D * u, moved


def advance(
    systems: tuple[Any, ...], D: Tensor, x: Tensor, u: Tensor, backend: str, kept: Kept | None
) -> tuple[Tensor, Tensor]:
    """`plain`, from the parameters of `s4.system.system`: the outputs and the next state.

    Args:
        systems: the arguments of `s4.system.system`.
        D, x, u: as in `plain`; D may be of another dtype.
        backend: who computes, "auto" or one of `s4.kernel.backends()`.
        kept: what keeps the recurrence between steps, or None where parameters are in training.
    """
    if kept is not None and dispatch.keeps(D, x, u):
        made = kept.of(*identity(systems, D, backend))
        if (both := made.get("rounded")) is None:
            own = D.detach().resolve_neg().to(x.dtype, copy=True, memory_format=torch.contiguous_format)
            both = made["rounded"] = _rounded(systems, D, x), own
        recurrence, D = both
        module = dispatch.implementation("step", backend, D.device)
        if module is not None and len(recurrence.F) <= _RANK:
            # Without an operator, whose call takes a third of the time of a step.
            y, after = module.step(*recurrence, D, *[t.resolve_neg().contiguous() for t in (x, u)])
            return y, after
        with dispatch.full_precision(u.device):
            return plain(recurrence, D, x, u)
    *parameters, rate, discretization = systems
    P = parameters[5]
    still = dispatch.unwatched(D) and (P is None or len(P) <= _RANK)
    fused = still and dispatch.fused("step", backend, D.device.type)
    if fused and kept is not None and dispatch.compiling() and not dispatch.exporting():
        return step_kept(parameters, D.to(x.dtype), x, u, rate, discretization, backend)
    with dispatch.full_precision(u.device):
        recurrence, D = discretize(system(*systems)).to(x.dtype, D.device), D.to(x.dtype)
        return step(*recurrence, D, x, u, backend) if fused else plain(recurrence, D, x, u)


def identity(systems: tuple[Any, ...], D: Tensor, backend: str) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The tensors and the options that everything kept was made from."""
    return [p for p in (*systems[:6], D) if p is not None], (*systems[6:], D.dtype, backend)


def run(
    recurrence: Recurrence,
    D: Tensor,
    x: Tensor | None,
    u: Float[Tensor, "B L H"],
    backend: str,
    resets: Bool[Tensor, "B L"] | None = None,
) -> tuple[Float[Tensor, "B L H"], Float[Tensor, "B H N"]]:
    """The outputs of a few steps, and the state after them, from the state x or zero."""
    x = u.new_zeros(u.shape[0], *recurrence.B.shape) if x is None else x
    recurrence = recurrence.to(u.dtype, D.device)
    fused = dispatch.unwatched(D) and len(recurrence.F) <= _RANK
    fused = fused and dispatch.fused("step", backend, D.device.type)
    y = []
    for t, u_t in enumerate(u.unbind(1)):
        if resets is not None:
            x = torch.where(resets[:, t, None, None], 0, x)
        y_t, x = step(*recurrence, D, x, u_t, backend) if fused else plain(recurrence, D, x, u_t)
        y.append(y_t)
    return torch.stack(y, 1), x


def _rounded(systems: tuple[Any, ...], D: Tensor, x: Tensor) -> Recurrence:
    """The recurrence in the precision of x, checked: what a backend reads through pointers is all there."""
    recurrence = discretize(system(*systems)).to(x.dtype)
    (_, H, N), rank = x.shape, len(recurrence.F)
    shapes = [(H, N), (rank, H, N), (rank, H, N), (H, N), (1, H, N), (H,)]
    if (given := [tuple(part.shape) for part in (*recurrence, D)]) != shapes:
        raise ValueError(f"parameters must be those of {H} channels of {N} states, {shapes}, got {given}")
    kinds = {type(part) for part in recurrence}, {p.device for p in systems[:6] if p is not None}
    if kinds != ({Tensor}, {x.device}):
        raise ValueError(f"parameters must be plain tensors on {x.device}, got {kinds}")
    return recurrence.to(x.dtype, D.device)


def _step(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, x: Tensor, u: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    (H, N), rank, batch = a.shape, F.shape[0], u.shape[0]
    operands = (a, F, G, B, C, D, x, u)
    shapes = [(H, N), (rank, H, N), (rank, H, N), (H, N), (1, H, N), (H,), (batch, H, N), (batch, H)]
    if [t.shape for t in operands] != shapes or len({t.dtype for t in operands}) > 1 or N % 2:
        given = [*map(tuple, (t.shape for t in operands))]
        raise ValueError(f"need operands of shapes {shapes}, N even, of one dtype, got {given}")
    module = dispatch.implementation("step", backend, u.device)
    if module is None:
        return plain(Recurrence(a, F, G, B, C), D, x, u)
    return module.step(*map(dispatch.plain_memory, operands))


def _step_kept(
    parameters: Sequence[Tensor | None],
    D: Tensor,
    x: Tensor,
    u: Tensor,
    rate: float,
    discretization: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kept = kept_at("step", parameters[0])
    made = kept.of(*identity((*parameters, rate, discretization), D, backend))
    recurrence: Recurrence | None = made.get("rounded")
    if recurrence is None:
        recurrence = made["rounded"] = _rounded((*parameters, rate, discretization), D, x)
    return _step(*recurrence, D, x, u, backend)


for _kind in ("CPU", "CUDA"):
    _library.impl("step", _step, _kind)
    _library.impl("step_kept", _step_kept, _kind)
step = torch.ops.s4.step.default  # `plain` without gradients
# The same from the parameters, as `s4.system.system` takes them, for torch.compile, which cannot see whether
# they changed: what they come to is kept here until they do.
step_kept = torch.ops.s4.step_kept.default


@torch.library.register_fake("s4::step", lib=_library)  # type: ignore[untyped-decorator]
def _(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, x: Tensor, u: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), x.new_empty(x.shape)


@torch.library.register_fake("s4::step_kept", lib=_library)  # type: ignore[untyped-decorator]
def _(
    parameters: Sequence[Tensor | None],
    D: Tensor,
    x: Tensor,
    u: Tensor,
    rate: float,
    discretization: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), x.new_empty(x.shape)
