"""One step of a recurrence, and what parameters come to, kept from one step to the next."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from s4.backends import cpu
from s4.ops import dispatch
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
_KEPT = 256  # systems, also of layers that are no more, until others take their place
_kept: OrderedDict[object, "Kept"] = OrderedDict()  # by addresses of parameters, and options


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
    systems: tuple[Any, ...], D: Tensor, x: Tensor, u: Tensor, backend: str, kept: "Kept | None"
) -> tuple[Tensor, Tensor]:
    """`plain`, from the parameters of `s4.system.system`: the outputs and the next state.

    Args:
        systems: the arguments of `s4.system.system`.
        D, x, u: as in `plain`.
        backend: who computes, "auto" or one of `s4.kernel.backends()`.
        kept: what keeps the recurrence between steps, or None where parameters are in training.
    """
    if kept is not None and dispatch.keeps(D, x, u):
        tensors = [p for p in systems[:6] if p is not None]
        recurrence = kept.get(tensors, (*systems[6:], D.dtype), lambda: _made(systems, D, x))
        module = dispatch.implementation("step", backend, D.device)
        if module is not None and len(recurrence.F) <= _RANK:
            # Without an operator, whose call takes a third of the time of a step.
            y, after = module.step(*recurrence, *[t.resolve_neg().contiguous() for t in (D, x, u)])
            return y, after
        with dispatch.full_precision(u.device):
            return plain(recurrence, D, x, u)
    P = systems[5]
    still = dispatch.unwatched(D) and (P is None or len(P) <= _RANK)
    fused = still and dispatch.fused("step", backend, D.device.type)
    if fused and kept is not None and dispatch.compiling() and not dispatch.exporting():
        return step_kept(systems[:6], D, x, u, *systems[6:], backend)
    with dispatch.full_precision(u.device):
        recurrence = discretize(system(*systems)).to(D.dtype)
        return step(*recurrence, D, x, u, backend) if fused else plain(recurrence, D, x, u)


def _made(systems: tuple[Any, ...], D: Tensor, x: Tensor) -> Recurrence:
    """The recurrence in the precision of D, checked: what a backend reads through pointers is all there."""
    recurrence = discretize(system(*systems)).to(D.dtype)
    (_, H, N), rank = x.shape, len(recurrence.F)
    shapes = [(H, N), (rank, H, N), (rank, H, N), (H, N), (1, H, N), (H,)]
    if (given := [tuple(part.shape) for part in (*recurrence, D)]) != shapes:
        raise ValueError(f"parameters must be those of {H} channels of {N} states, {shapes}, got {given}")
    return recurrence


class Kept:
    """The recurrence of one layer, until its parameters change. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._entry: tuple[object, object, Recurrence] | None = None

    def get(self, tensors: Sequence[Tensor], options: object, make: Callable[[], Recurrence]) -> Recurrence:
        """The one last made, if options and numbers are still the same, or else a new one.

        On the CPU the numbers themselves are compared with copies, so that no way to change a parameter goes
        unseen; elsewhere, where that would wait for the device, memory addresses and versions, which miss
        changes of `parameter.data` in place. Of inference tensors, without a version, nothing is kept there.
        """
        entry = self._entry
        if tensors[0].device.type == "cpu":
            if entry is not None and entry[0] == options:
                held = entry[1]
                if isinstance(held, cpu.Snapshot) and held.matches(tensors):
                    return entry[2]
            self._entry = options, cpu.Snapshot(tensors), (made := make())
            return made
        if any(t.is_inference() for t in tensors):
            return make()
        key = options, *((t.data_ptr(), t._version, t.dtype) for t in tensors)
        if entry is None or entry[0] != key:
            entry = (
                key,
                [t.detach() for t in tensors],
                make(),
            )  # so that no other comes to lie at their address
            self._entry = entry
        return entry[2]

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()


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
    tensors = [t for t in parameters if t is not None]
    key = *(t.data_ptr() for t in tensors), rate, discretization, D.dtype
    kept = _kept.setdefault(key, Kept())
    recurrence = kept.get(
        tensors,
        (rate, discretization, D.dtype),
        lambda: _made((*parameters, rate, discretization), D, x),
    )
    _kept[key] = kept  # another thread may have dropped it
    _kept.move_to_end(key)
    while len(_kept) > _KEPT:
        _kept.popitem(last=False)
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
