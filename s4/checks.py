"""Checks of public arguments: TypeError for a wrong kind, ValueError for a wrong value, naming them."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level

_MOST = 2**40  # of a size: beyond it no machine has the memory, and products of sizes overflow
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def kind_of(value: Any) -> str:
    """What a message says that it got: the shape of a tensor, the type of anything else."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def unread(tensor: Tensor) -> bool:
    """Whether numbers cannot be looked at: torch compiles, traces or transforms, or there are none."""
    if torch.compiler.is_compiling() or maybe_current_level() is not None:
        return True
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    return tensor.is_meta or type(tensor) not in (Tensor, torch.nn.Parameter)


def check_option(name: str, value: Any, options: Iterable[str], where: str = "") -> None:
    """One of the options."""
    options = tuple(options)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}{where}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_integer(name: str, value: Any, least: int) -> None:
    """An integer of at least `least`, and no larger than any size."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if not torch.compiler.is_compiling() and value > _MOST:  # which would bound a length of a program
        raise ValueError(f"{name} must be at most {_MOST}, got {value}")


def check_number(name: str, value: Any, least: float | int, *, above: bool = False) -> None:
    """A finite number of at least `least`, or above it."""
    if not isinstance(value, (Real, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number: Any = value
    if not (number > least if above else number >= least) or not number < math.inf:
        raise ValueError(f"{name} must be finite and {'above' if above else 'at least'} {least}, got {value}")


def check_module(name: str, value: Any) -> None:
    """A torch module."""
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {value!r}")


def _elsewhere(name: str, value: Tensor, like: Tensor) -> ValueError:
    return ValueError(f"{name} must be on the parameters' device {like.device}, got {value.device}")


def check_features(name: str, value: Any, like: Tensor | int, *dims: str) -> None:
    """A floating-point tensor of shape (*dims, d_model) on the device of the parameter `like` (d_model,).

    Or of width `like` on any device: parameters of other modules may come only when those are called.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    width = like.shape[0] if isinstance(like, Tensor) else like
    if value.dim() != len(dims) + 1 or value.shape[-1] != width:
        raise ValueError(f"{name} must have shape ({', '.join(dims)}, {width}), got {tuple(value.shape)}")
    if isinstance(like, Tensor) and value.device != like.device:
        raise _elsewhere(name, value, like)


def check_kind(name: str, value: Tensor, parameters: Iterable[Tensor], error: RuntimeError) -> None:
    """Raise TypeError if torch's error may come from another dtype or device than that of plain parameters.

    Not before: hooks, autocast and the modules themselves may well take it.
    """
    device = value.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if cast or not (value.is_floating_point() or "dtype" in str(error)):  # tokens are of no parameter's
        return
    plain = [p for p in parameters if type(p) in (Tensor, torch.nn.Parameter)]
    kind, kinds = f"{value.dtype} on {value.device}", {f"{p.dtype} on {p.device}" for p in plain}
    if type(error) is RuntimeError and kinds - {kind}:  # no subclass: out of memory, a device that is lost
        takes = ", ".join(sorted(kinds))
        raise TypeError(f"{name} must suit parameters of {takes}, got {kind}: {error}") from error


def check_tensor(name: str, value: Any) -> None:
    """A tensor, of whatever kind."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_state(
    name: str, value: Any, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """A tensor of this shape, on the device of the parameter `like` and of its dtype, if none is given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype != (dtype or like.dtype):
        hint = ""
        if value.dtype in (torch.bfloat16, torch.float16):
            hint = (
                ": a state is never rounded; a policy of FSDP must have cast_forward_inputs=False, "
                "of FSDP1 also cast_root_forward_inputs=False"
            )
        raise TypeError(f"{name} must have dtype {dtype or like.dtype}, got {value.dtype}{hint}")
    if value.device != like.device:
        raise _elsewhere(name, value, like)


def check_integers(name: str, value: Any, *dims: str) -> None:
    """A tensor of integers with these dimensions."""
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")
    if value.dim() != len(dims):
        raise ValueError(f"{name} must have shape ({', '.join(dims)}), got {tuple(value.shape)}")


def check_lengths(lengths: Any, batch: int, L: int, like: Tensor) -> Tensor:
    """`batch` integers in 0..L, returned as int64. Where numbers are `unread`, so is the range."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in _INTEGERS:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be a tensor of integers, got {got}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), got {tuple(lengths.shape)}")
    if lengths.device != like.device:
        raise _elsewhere("lengths", lengths, like)
    lengths = lengths.long()
    if not unread(lengths) and bool(((lengths < 0) | (lengths > L)).any()):
        raise ValueError(f"lengths must lie in 0..{L}, the length of the batch, got {lengths.tolist()}")
    return lengths


def check_rate(rate: Tensor, batch: int, L: int, like: Tensor, lengths: Tensor | None) -> Tensor:
    """Finite numbers above 0, (batch,) or (batch, L), returned as (batch, L).

    Past the lengths they may be anything, and become 1.
    """
    if not rate.is_floating_point():
        raise TypeError(f"rate must be a number or a floating-point tensor, got {rate.dtype}")
    if rate.shape not in ((batch,), (batch, L)):
        takes = f"({batch},) or ({batch}, {L})"
        raise ValueError(f"rate must be a number or have shape {takes}, got {tuple(rate.shape)}")
    if rate.device != like.device:
        raise _elsewhere("rate", rate, like)
    rate = rate if rate.dim() == 2 else rate[:, None].expand(batch, L)
    if lengths is not None:
        rate = torch.where(torch.arange(L, device=rate.device) >= lengths[:, None], 1, rate)
    if not unread(rate) and not bool((fit := (rate > 0) & (rate < math.inf)).all()):
        b, t = (~fit).nonzero()[0].tolist()
        raise ValueError(
            f"rate must be finite and above 0, got {rate[b, t].item()} at [{b}, {t}]; it may be 1 in padding "
            "and at the first input, which has none before it"
        )
    return rate


def check_positions(positions: Any, batch: int, L: int, like: Tensor) -> Tensor:
    """(batch, P) integers in -1..L-1, returned as int64."""
    if not isinstance(positions, Tensor) or positions.dtype not in _INTEGERS:
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions must be a tensor of integers, got {got}")
    if positions.dim() != 2 or positions.shape[0] != batch:
        raise ValueError(f"positions must have shape ({batch}, P), got {tuple(positions.shape)}")
    if positions.device != like.device:
        raise _elsewhere("positions", positions, like)
    positions = positions.long()
    if not unread(positions) and bool(((positions < -1) | (positions >= L)).any()):
        raise ValueError(
            f"positions must lie in -1..{L - 1}, those of the inputs, or -1 for before the first, got "
            f"{int(positions.min())}..{int(positions.max())}"
        )
    return positions


def check_resets(resets: Any, batch: int, L: int, like: Tensor) -> Tensor | None:
    """(batch, L) booleans. None where there are no inputs, and so none that begins anew."""
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        got = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"resets must be a tensor of booleans, got {got}")
    if resets.shape != (batch, L):
        raise ValueError(f"resets must have shape ({batch}, {L}), got {tuple(resets.shape)}")
    if resets.device != like.device:
        raise _elsewhere("resets", resets, like)
    return resets if L else None


def check_sequence(
    u: Any,
    state: Any,
    lengths: Any,
    resets: Any,
    rate: Any,
    like: Tensor,
    d_state: int,
    dtype: torch.dtype,
    total: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Any]:
    """What a layer with a parameter `like` (d_model,) is given; lengths, resets and rate as it takes them.

    `total` is the length of the sequence where u is a piece of one.
    """
    check_features("u", u, like, "batch", "length")
    batch, L, d_model = u.shape
    if state is not None:
        check_state("state", state, (batch, d_model, d_state), like, dtype)
    if lengths is not None:
        lengths = check_lengths(lengths, batch, L if total is None else total, like)
    if resets is not None:
        resets = check_resets(resets, batch, L, like)
    if isinstance(rate, Tensor):
        rate = check_rate(rate, batch, L, like, lengths)
    return lengths, resets, rate
