"""The options that a layer has, and the checks of those that it is made with."""

from typing import Any

import torch
from torch import Tensor

from s4 import hippo
from s4.checks import check_option

VARIANTS = {"dplr": "bilinear", "diag": "zoh"}  # and the discretisation of each, unless told
MODES = ("auto", "fft", "scan")
DTYPES = {"float32": torch.float32, "float64": torch.float64}
_PAPERS = {"s4": "dplr", "s4d": "diag"}  # names that the papers give the variants


def initialisation(variant: Any, init: Any, d_state: int) -> str | tuple[Tensor, ...]:
    """A name that the variant has, or one's own tensors, of a variant that exists."""
    if isinstance(variant, str) and variant in _PAPERS:
        raise ValueError(
            f"variant must be 'dplr' or 'diag', got {variant!r}: it is {_PAPERS[variant]!r} here"
        )
    check_option("variant", variant, VARIANTS)
    if isinstance(init, str):
        check_option("init", init, hippo.names(variant), f" for variant={variant!r}")
        return init
    Lambda, P, B = hippo.own(init, variant, d_state)
    return (Lambda, P, B) if variant == "dplr" else (Lambda, B)


def dtype(given: torch.dtype | str | None) -> torch.dtype:
    """Of parameters: torch's default where none is given."""
    found: Any = torch.get_default_dtype() if given is None else given
    found = DTYPES.get(str(found).removeprefix("torch."), found)
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {given if given else found}")
    return found
