"""Which backend runs: what the user named, or the best that can."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from s4.backends import cpu, cuda, keops, naive, triton
from s4.kernel import _torch

F = TypeVar("F", bound=Callable[..., Any])

BACKENDS: dict[str, ModuleType] = {
    "naive": naive,
    "torch": _torch,
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "keops": keops,
}
# Of "auto", by type of device: the first that can run there, or else "torch", which can everywhere.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton", "keops")}


def backends() -> dict[str, bool | str]:
    """Each backend's name with True where it can run here, on any device, or else the reason why not."""
    return {name: _state(module) for name, module in BACKENDS.items()}


def _state(module: ModuleType) -> bool | str:
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    states: list[bool | str] = [module.status(device) for device in devices]
    return True if True in states else states[-1]


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or can run on some device here, saying why not."""
    if backend == "auto":
        return
    if not isinstance(backend, str) or backend not in BACKENDS:
        names = ", ".join(map(repr, ["auto", *BACKENDS]))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")
    state = _state(BACKENDS[backend])  # of this one alone: to probe another may take seconds
    if state is not True:
        raise ValueError(f"backend {backend!r} cannot run: {state}")


def best(device: torch.device) -> str:
    """The name of what "auto" runs on a device."""
    names = _PREFERENCE.get(device.type, ())
    return next((name for name in names if BACKENDS[name].status(device) is True), "torch")


def _constant(function: F) -> F:
    """What torch.compiler.assume_constant_result does, without its import of torch._dynamo, of a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def has_fused_sums(device_type: str) -> bool:
    """Whether "auto" can be a fused backend on this type of device; a constant to torch.compile."""
    return not transformed() and best(torch.device(device_type)) != "torch"


@_constant
def has_fused_powers(device_type: str) -> bool:
    """Whether the powers and scan of `_ops` run on this type of device; a constant to torch.compile."""
    return not transformed() and cpu.status(torch.device(device_type)) is True


@_constant
def has_autocast(device_type: str) -> bool:
    """Whether torch.autocast knows this type of device; torch 2.9 compiles the answer, not the question."""
    return torch.amp.is_autocast_available(device_type)


@_constant
def exporting() -> bool:
    """Inside torch.export; asked itself, torch 2.9 says so of torch.compile too."""
    return torch.compiler.is_exporting()


def transformed() -> bool:
    """Inside torch.func or forward-mode AD, which cannot see through custom operators."""
    return maybe_current_level() is not None or forward_ad._current_level >= 0


def choose(backend: str, device: torch.device) -> ModuleType:
    """The backend to run on a device: "auto" takes the best that can.

    Raises:
        ValueError: an unknown backend, or one that cannot run there; the message says why.
    """
    check_backend(backend)
    if backend == "auto":
        backend = best(device)
    state = BACKENDS[backend].status(device)
    if state is not True:
        raise ValueError(f"backend {backend!r} cannot run: {state}")
    return BACKENDS[backend]
