"""What the parameters of a layer come to, kept from one call to the next until they change."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from s4.backends import cpu


class Kept:
    """Things made of some tensors, by name, for as long as those hold the same numbers.

    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._entry: tuple[object, object, dict[Any, Any]] | None = None

    def of(self, tensors: Sequence[Tensor], options: object) -> dict[Any, Any]:
        """What was made of these tensors with these options, for the caller to add to; empty if they changed.

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
            self._entry = entry = options, cpu.Snapshot(tensors), {}
            return entry[2]
        if any(t.is_inference() for t in tensors):
            return {}
        key = options, *((t.data_ptr(), t._version, t.dtype) for t in tensors)
        if entry is None or entry[0] != key:
            held = [t.detach() for t in tensors]  # so that no other comes to lie at their address
            self._entry = entry = key, held, {}
        return entry[2]

    def clear(self) -> None:
        """Let all of it go."""
        self._entry = None

    def __reduce__(self) -> tuple[type["Kept"], tuple[()]]:
        return Kept, ()


# By a parameter, for as long as that lives, and by whom: what operators keep, which know no layer.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def kept_at(whom: str, parameter: Tensor | None) -> Kept:
    """What an operator keeps of the layer that this is a parameter of."""
    found: Kept = _kept.setdefault(parameter, {}).setdefault(whom, Kept())
    return found
