"""Which backend runs: what the user named, or the best that can."""

from types import ModuleType

import torch
from torch._C._functorch import maybe_current_level

from s4.kernel import _cpu, _cuda, _naive, _torch

BACKENDS: dict[str, ModuleType] = {"naive": _naive, "torch": _torch, "cpu": _cpu, "cuda": _cuda}
_PREFERENCE = ("cpu", "cuda", "torch")  # of "auto": the first that can run on the tensors' device


def backends() -> dict[str, bool | str]:
    """Each backend's name with True where it can run here, on any device, or else the reason why not."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    found: dict[str, bool | str] = {}
    for name, module in BACKENDS.items():
        states = [module.status(device) for device in devices]
        found[name] = True if True in states else states[-1]
    return found


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or can run on some device here, saying why not."""
    if backend == "auto":
        return
    known = backends()
    if not isinstance(backend, str) or backend not in known:
        raise ValueError(f"backend must be one of {', '.join(map(repr, ['auto', *known]))}, got {backend!r}")
    if known[backend] is not True:
        raise ValueError(f"backend {backend!r} cannot run: {known[backend]}")


def best(device: torch.device) -> str:
    """The name of what "auto" runs on a device."""
    return next(name for name in _PREFERENCE if BACKENDS[name].status(device) is True)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_fused_sums(device_type: str) -> bool:
    """Whether "auto" can be a fused backend on this type of device; a constant to torch.compile.

    Not inside torch.func.grad and vmap, which cannot see through custom operators.
    """
    return maybe_current_level() is None and best(torch.device(device_type)) != "torch"


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
