"""The options that a layer has, and the checks of those that it is made with."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from s4 import hippo
from s4.checks import check_integer, check_number, check_option, unread

VARIANTS = {"dplr": "bilinear", "diag": "zoh"}  # and the discretisation of each, unless told
MODES = ("auto", "fft", "scan")
# Dtypes of parameters, and those of the states and sequences of such a layer. The mathematics is in float64.
COMPUTED = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in COMPUTED}
# Of -Re Lambda at initialisation: LegT and FouT have none, and its logarithm is a parameter.
_MIN_DECAY = 1e-4
_LARGEST = torch.finfo(torch.float16).max  # 65504
_PAPERS = {"s4": "dplr", "s4d": "diag"}  # names that the papers give the variants


def check_sizes(d_model: Any, d_state: Any, n_ssm: Any) -> None:
    """Numbers of channels, states and systems that go with each other."""
    check_integer("d_model", d_model, 1)
    check_integer("d_state", d_state, 2)
    check_integer("n_ssm", n_ssm, 1)
    if d_state % 2:
        raise ValueError(f"d_state must be even, as modes come in conjugate pairs, got {d_state}")
    if d_model % n_ssm:
        raise ValueError(f"n_ssm must divide d_model ({d_model}), got {n_ssm}")


def check_steps(dt_min: Any, dt_max: Any) -> None:
    """A range of step sizes."""
    check_number("dt_min", dt_min, 0, above=True)
    check_number(f"dt_max, with dt_min={dt_min},", dt_max, dt_min)


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
    """The dtype of parameters: torch's default where none is given."""
    found: Any = torch.get_default_dtype() if given is None else given
    found = DTYPES.get(str(found).removeprefix("torch."), found)
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        raise TypeError(
            "dtype must be torch.float64, torch.float32, torch.bfloat16 or torch.float16, "
            f"got {given if given else found}"
        )
    return found


def start(init: str | tuple[Tensor, ...], variant: str, d_state: int) -> dict[str, Tensor]:
    """What A and B begin with, by the names of a layer's parameters."""
    Lambda, P, B = hippo.start(init, variant, d_state)
    low_rank = {"P": torch.view_as_real(P)[:, None]} if len(P) else {}
    decay = torch.log((-Lambda.real).clamp(min=_MIN_DECAY))
    return {"A_imag": Lambda.imag, "B": torch.view_as_real(B), "log_A_real": decay, **low_rank}


def wide(*parameters: Tensor) -> torch.dtype:
    """The dtype that holds all of these without rounding, float32 at least."""
    return reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)


def unfilled(parameter: Tensor) -> Tensor:
    """Memory for the numbers of a parameter to be drawn in, before they are rounded to its own dtype."""
    return torch.empty_like(parameter, dtype=wide(parameter))


def check_range(name: str, value: Tensor, init: Any, d_state: int) -> None:
    """Raise ValueError if a parameter of a layer has numbers that float16 has not.

    Those of A grow as N^2: Lambda of "legs", "legt" and "inv" reaches N^2 / pi, past 65504 above N = 452.
    """
    if not fits_float16(value):
        kind = f"init={init!r}" if isinstance(init, str) else "an init of one's own"
        raise ValueError(
            f"{name} of a layer with {kind} and d_state={d_state} reaches {float(value.abs().max()):.5g}, "
            f"and float16 ends at {_LARGEST:.5g}: use bfloat16 or float32, or a smaller d_state"
        )


def fits_float16(value: Tensor) -> bool:
    """Whether no number is too large for float16, as far as they can be read."""
    return unread(value) or value.numel() == 0 or not bool(value.abs().max() > _LARGEST)
