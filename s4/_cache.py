"""A value computed from tensors, kept until one of them changes."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from s4.backends import cpu

T = TypeVar("T")


class Cache(Generic[T]):
    """One value, of one set of tensors. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._entry: tuple[object, cpu.Snapshot | list[Tensor], T] | None = None

    def get(self, tensors: Sequence[Tensor], options: object, make: Callable[[], T]) -> T:
        """The value last made, if options and numbers are still the same, or else a new one.

        On the CPU the numbers themselves are compared with copies, so that no way to change a parameter goes
        unseen; elsewhere, where that would wait for the device, memory addresses and versions, which miss
        changes of `parameter.data` in place. Of inference tensors, without a version, nothing is kept there.
        """
        entry = self._entry
        held: cpu.Snapshot | list[Tensor]
        if tensors[0].device.type == "cpu":
            key: object = options
            if entry is not None and entry[0] == key and _same(entry[1], tensors):
                return entry[2]
            held = cpu.Snapshot(tensors)
        elif any(t.is_inference() for t in tensors):
            return make()
        else:
            key = options, *((t.data_ptr(), t._version, t.dtype) for t in tensors)
            if entry is not None and entry[0] == key:
                return entry[2]
            held = [t.detach() for t in tensors]  # so that no other comes to lie at their address
        value = make()
        self._entry = key, held, value
        return value

    def __reduce__(self) -> tuple[type["Cache[T]"], tuple[()]]:
        return Cache, ()


def _same(held: cpu.Snapshot | list[Tensor], tensors: Sequence[Tensor]) -> bool:
    return isinstance(held, cpu.Snapshot) and held.matches(tensors)


def usable(parameter: Tensor) -> bool:
    """Whether a value may be kept: nothing is differentiated, traced or captured, which keeps it itself."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(parameter) is not torch.nn.Parameter:
        return False
    if parameter.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return parameter.device.type == "cpu"


def watched(*tensors: Tensor) -> bool:
    """Whether anything follows operators from outside, and has to see one: subclasses, modes, a trace."""
    return (
        any(type(t) is not Tensor for t in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._get_tracing_state() is not None
    )
