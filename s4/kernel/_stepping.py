"""One step of a recurrence as PyTorch operators, by the fused code of the CPU; without gradients."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from s4._cache import Cache
from s4.backends import cpu
from s4.ssm import Recurrence, discretize, system

_library = torch.library.Library("s4", "FRAGMENT")  # thinner than custom_op: a step takes microseconds
_library.define(
    "step(Tensor a, Tensor F, Tensor G, Tensor B, Tensor C, Tensor D, Tensor x, Tensor u) -> (Tensor, Tensor)"
)
_library.define(
    "step_kept(Tensor?[] system, Tensor D, Tensor x, Tensor u, float rate, str discretization)"
    " -> (Tensor, Tensor)"
)
_KEPT = 256  # systems, also of layers that are no more, until others take their place
_kept: OrderedDict[object, Cache[Recurrence]] = OrderedDict()  # by addresses of parameters, and options


def check_shapes(recurrence: Recurrence, H: int, N: int) -> None:
    """Raise ValueError unless the systems are of H channels of N states: what C++ reads is all there."""
    rank = recurrence.F.shape[0]
    shapes = [(H, N), (rank, H, N), (rank, H, N), (H, N), (1, H, N)]
    if (given := [tuple(part.shape) for part in recurrence]) != shapes:
        raise ValueError(f"parameters must be those of {H} channels of {N} states, {shapes}, got {given}")


def _step(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, x: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    (H, N), rank, batch = a.shape, F.shape[0], u.shape[0]
    operands = (a, F, G, B, C, D, x, u)
    shapes = [(H, N), (rank, H, N), (rank, H, N), (H, N), (1, H, N), (H,), (batch, H, N), (batch, H)]
    given = [t.shape for t in operands]
    if given != shapes or len({t.dtype for t in operands}) > 1 or N % 2 or rank > 2:
        raise ValueError(
            f"need operands of shapes {shapes}, N even, rank at most 2, of one dtype, "
            f"got {[*map(tuple, given)]}"
        )
    return cpu.step(*(t.contiguous() for t in operands))


def _step_kept(
    parameters: Sequence[Tensor | None], D: Tensor, x: Tensor, u: Tensor, rate: float, discretization: str
) -> tuple[Tensor, Tensor]:
    log_dt, log_A_real, A_imag, B, C, P = parameters
    tensors = [t for t in parameters if t is not None]
    key = *(t.data_ptr() for t in tensors), rate, discretization
    cache = _kept.setdefault(key, Cache())
    recurrence = cache.get(
        tensors,
        (rate, discretization),
        lambda: discretize(system(log_dt, log_A_real, A_imag, B, C, P, rate), discretization).to(D.dtype),  # type: ignore[arg-type]
    )
    _kept[key] = cache
    _kept.move_to_end(key)
    while len(_kept) > _KEPT:
        _kept.popitem(last=False)
    return _step(*recurrence, D, x, u)


_library.impl("step", _step, "CPU")
_library.impl("step_kept", _step_kept, "CPU")
step = torch.ops.s4.step.default  # (y, x) as `s4.ssm.step` gives them, with D u in y; it has no gradient
# The same from the parameters, as `s4.ssm.system` takes them, for torch.compile, which cannot see whether
# they changed: what they come to is kept here until they do.
step_kept = torch.ops.s4.step_kept.default


@torch.library.register_fake("s4::step", lib=_library)  # type: ignore[untyped-decorator]
def _(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, x: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), x.new_empty(x.shape)


@torch.library.register_fake("s4::step_kept", lib=_library)  # type: ignore[untyped-decorator]
def _(
    parameters: Sequence[Tensor | None], D: Tensor, x: Tensor, u: Tensor, rate: float, discretization: str
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), x.new_empty(x.shape)
