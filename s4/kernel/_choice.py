"""Which backend runs: what the user named, or the best that can."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def backends() -> dict[str, bool | str]:
    """Each backend's name with True where it can run, or else the reason why not."""
    return {"naive": True, "torch": True}


def choose(backend: str, table: Mapping[str, T]) -> T:
    """The table's entry for a backend; "auto" takes "torch", which runs on every device."""
    check_backend(backend)
    return table["torch" if backend == "auto" else backend]


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or can run here."""
    known = backends()
    if backend == "auto":
        return
    if not isinstance(backend, str) or backend not in known:
        raise ValueError(f"backend must be one of {', '.join(map(repr, ['auto', *known]))}, got {backend!r}")
    if known[backend] is not True:
        raise ValueError(f"backend {backend!r} cannot run: {known[backend]}")
