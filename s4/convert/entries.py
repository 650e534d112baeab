"""A state dict while it is converted: its tensors by key, and what became of each."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPED = ("state_dict", "model", "model_state_dict")  # Lightning, the original's example.py, many others

# Names that torch.compile, FSDP and activation checkpointing put between those of modules.
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Entries(Mapping[str, Tensor]):
    """The tensors of a state dict.

    Attributes:
        became: what was made of each key that was read, in words.

    Raises:
        TypeError: what was given is no state dict.
        ValueError: a tensor is there twice, under the name of a module and of a wrapper around it.
    """

    def __init__(self, state_dict: Any) -> None:
        if isinstance(state_dict, nn.Module):
            raise TypeError("state_dict must be a dict of tensors, got a module: give module.state_dict()")
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"state_dict must be a dict of tensors by name, got {type(state_dict).__name__}: "
                "s4.convert.load reads one from a file"
            )
        for name in _WRAPPED:
            if isinstance(state_dict.get(name), Mapping):
                state_dict = state_dict[name]
        for key, value in state_dict.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise TypeError(
                    f"state_dict must hold tensors by name, got {key!r}: {type(value).__name__}. Of a "
                    "checkpoint give the part that holds the weights, of a module its state_dict()"
                )
        self._tensors: dict[str, Tensor] = {unwrapped(k): value for k, value in state_dict.items()}
        if len(self._tensors) < len(state_dict):
            twice = [key for key in state_dict if unwrapped(key) != key and unwrapped(key) in state_dict]
            raise ValueError(f"state_dict has the same twice, with {some(twice)} and without: leave out one")
        self.became: dict[str, str] = {}

    @classmethod
    def of(cls, state_dict: Any) -> "Entries":
        """The entries of a state dict. `Entries` come back as they are, so that a caller sees what became."""
        return state_dict if isinstance(state_dict, Entries) else cls(state_dict)

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def under(self, prefix: str) -> list[str]:
        """The keys that begin with a prefix, without it."""
        return [key[len(prefix) :] for key in self._tensors if key.startswith(prefix)]

    def take(self, key: str, became: str, *shapes: tuple[int, ...]) -> Tensor:
        """A tensor, detached, and a note of what it became.

        Args:
            key: its name.
            became: the note.
            shapes: those it may have; -1 is any size of at least 1. None given: any.

        Raises:
            ValueError: there is none, or it is of another shape, not real or not finite.
        """
        if key not in self._tensors:
            raise ValueError(f"{key} is missing: the state dict has {some(self._near(key))}")
        value = self._tensors[key].detach()
        if shapes and not any(_fits(value.shape, shape) for shape in shapes):
            wanted = " or ".join(str(shape).replace("-1", "any") for shape in shapes)
            raise ValueError(f"{key} must have shape {wanted}, got {tuple(value.shape)}")
        if value.is_complex() or value.dtype is torch.bool:
            raise ValueError(f"{key} must hold real numbers, got {value.dtype}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{key} is not finite: it has nan or inf, so no layer can be made of it")
        self.became[key] = became
        return value

    def unread(self) -> list[str]:
        """The keys that were not taken."""
        return [key for key in self._tensors if key not in self.became]

    def check_known(self, *prefixes: str) -> None:
        """That all was taken of what is directly under these prefixes; with none, of all.

        Raises:
            ValueError: it was not; the message has the keys.
        """
        places = [prefix[:-1] for prefix in prefixes]
        left = [key for key in self.unread() if not prefixes or key.rpartition(".")[0] in places]
        if left:
            raise ValueError(f"{some(left)}: of these keys nothing is known, so they cannot be converted")

    def _near(self, key: str) -> list[str]:
        """The keys in the same place, or all."""
        prefix = key.rpartition(".")[0]
        return [each for each in self._tensors if each.rpartition(".")[0] == prefix] or list(self._tensors)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Modules are made on the CPU, whatever the default is, and draw none of the user's random numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        yield


def unwrapped(key: str) -> str:
    """A name without what torch puts into it."""
    return _WRAPPERS.sub("", key)


def _fits(shape: torch.Size, wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        n == w or (w == -1 and n > 0) for n, w in zip(shape, wanted, strict=True)
    )


def some(keys: Iterable[str]) -> str:
    """Up to eight names in a message."""
    keys = list(keys)
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "") or "no keys"
