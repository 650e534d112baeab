"""A value computed from tensors, kept until one of them changes."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from s4.kernel import _cpu

T = TypeVar("T")


class Cache(Generic[T]):
    """One value, of one set of tensors. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._entry: tuple[object, Sequence[Tensor], T] | None = None

    def get(self, tensors: Sequence[Tensor], options: object, make: Callable[[], T]) -> T:
        """The value last made, if options and numbers are still the same, or else a new one.

        On the CPU the numbers themselves are compared with copies, so that no way to change a parameter goes
        unseen; elsewhere, where that would wait for the device, memory addresses and versions, which miss
        changes of `parameter.data` in place. Of inference tensors, without a version, nothing is kept there.
        """
        on_cpu = tensors[0].device.type == "cpu"
        if not on_cpu and any(t.is_inference() for t in tensors):
            return make()
        key = options if on_cpu else (options, *((t.data_ptr(), t._version, t.dtype) for t in tensors))
        entry = self._entry
        if entry is not None and entry[0] == key and (not on_cpu or _unchanged(tensors, entry[1])):
            return entry[2]
        # Elsewhere the tensors are held, so that no other comes to lie at their address.
        copies = [t.detach().clone() if on_cpu else t.detach() for t in tensors]
        value = make()
        self._entry = key, copies, value
        return value

    def __reduce__(self) -> tuple[type["Cache[T]"], tuple[()]]:
        return Cache, ()


def _unchanged(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
    for t, copy in zip(tensors, copies, strict=True):
        if t.dtype != copy.dtype or t.shape != copy.shape or not t.is_contiguous() or t.is_neg():
            return False
    return _cpu.same(tensors, copies)


def usable(parameter: Tensor) -> bool:
    """Whether a value may be kept: nothing is differentiated, traced or captured, which keeps it itself."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(parameter) is not torch.nn.Parameter:
        return False
    if parameter.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return parameter.device.type == "cpu"
