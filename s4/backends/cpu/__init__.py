"""Backend "cpu": the fused C++ code of `native.h`, called through ctypes.

Shared libraries, one for each instruction set, are built when the package is installed with a C++ compiler at
hand. They link neither torch nor Python, so one build serves every version of both.
"""

import ctypes
import functools
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_INTERFACE = 6  # of the libraries; raised with every change of their functions, there and here
_LEVELS = ("base", "v3", "v4")  # instruction sets that there may be code for, each with all of those before
_ASKED = os.environ.get("S4_LEVEL", "")  # which of them is to run; empty: the best
_HINT = (
    "with a C++ compiler (g++ or clang++) on the path, "
    "run pip install --force-reinstall --no-cache-dir --no-deps -e . in a clone"
)
_PLAIN = {Tensor, torch.nn.Parameter}  # a subclass may hold no numbers of its own
_SUFFIX = {torch.complex64: "c64", torch.complex128: "c128", torch.float32: "f32", torch.float64: "f64"}


@functools.cache
def _library() -> ctypes.CDLL | str:
    """That of S4_LEVEL, or the best that was built and that this processor has; or why there is none."""
    base = _load("base")
    if isinstance(base, str):
        return base
    have = levels()
    return _refusal(have) or _load(_ASKED or have[-1])


def levels() -> list[str]:
    """Instruction sets that were built and that this processor has, the best last."""
    base = _load("base")
    if isinstance(base, str):
        return []
    best = base.s4_processor().decode()
    return [name for name in _LEVELS[: _LEVELS.index(best) + 1] if _file(name)]


def _refusal(have: Sequence[str]) -> str:
    """Why S4_LEVEL cannot be had where these are what runs, the best last; empty if it can."""
    if _ASKED and _ASKED not in _LEVELS:
        return f"S4_LEVEL must be one of {', '.join(_LEVELS)}, got {_ASKED!r}"
    if _ASKED and _ASKED not in have:
        return f"S4_LEVEL is {_ASKED!r}, and the best that this processor and this build have is {have[-1]!r}"
    return ""


def _file(level: str) -> Path | None:
    file = Path(__file__).parent / f"_native_{level}.so"
    return file if file.is_file() else None


def _elsewhere() -> str:
    """The reason where the folder of a clone hides an installed s4 with the libraries; empty if none is."""
    here, inside = Path(__file__).parents[3], Path(*__name__.split("."), "_native_base.so")
    for path in sys.path:
        if (Path(path) / inside).is_file():
            return (
                f"not built: this is s4 of {here}, which hides the one in {path}: leave this folder, "
                "or pip install -e . in it"
            )
    return ""


@functools.cache
def _load(level: str) -> ctypes.CDLL | str:
    """The library of an instruction set, ready to run, or the reason why not."""
    if (file := _file(level)) is None:
        return _elsewhere() or f"not built: {_HINT}"
    try:
        library = ctypes.CDLL(str(file))
        library.s4_level.restype = library.s4_processor.restype = ctypes.c_char_p
        if library.s4_interface() == _INTERFACE:
            library.s4_pool(_pool())
            if hasattr(os, "register_at_fork"):  # a child has the pool, but not its threads
                os.register_at_fork(after_in_child=lambda: library.s4_pool(ctypes.c_void_p()))
            return library
        reason = "it was built of another version"
    except (OSError, AttributeError) as error:  # AttributeError: a version with no such function
        reason = str(error)
    return f"cannot use {file.name}: {reason}; {_HINT}"


def _pool() -> ctypes.c_void_p:
    """How the OpenMP runtime that torch loads for all to see starts threads; null if there is none."""
    found = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
    return ctypes.c_void_p() if found is None else ctypes.cast(found, ctypes.c_void_p)


def level() -> str:
    """The instruction set that runs, or the reason why none does."""
    library = _library()
    return library if isinstance(library, str) else library.s4_level().decode()


def status(device: torch.device) -> bool | str:
    """True if tensors on this device can be computed, or else the reason why not."""
    if device.type != "cpu":
        return f"computes on the CPU only, not on {device}"
    library = _library()
    return library if isinstance(library, str) else True


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    G, q, n = v.shape
    out = v.new_empty(G, q, z.shape[1])
    _call("cauchy", v.dtype, [v, z, w, out], [G, q, n, z.shape[1], z.shape[0]])
    return out


def cauchy_backward(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    G, q, n = v.shape
    grad_v, grad_w = torch.empty_like(v), torch.empty_like(w)
    grad_z = z.new_empty(G, z.shape[1]) if need_z else None
    sizes = [G, q, n, z.shape[1], z.shape[0]]
    _call("cauchy_backward", v.dtype, [grad, v, z, w, grad_v, grad_w, grad_z], sizes)
    return grad_v, z.new_empty(0) if grad_z is None else grad_z.sum_to_size(z.shape), grad_w


def response(a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor, L: int, dtype: torch.dtype) -> Tensor:
    """C A^l X for l < L, (c, q, H, L) in dtype, of A = diag(a) + F G; X (H, q, N) and C (c, H, N)."""
    c, q = C.shape[0], X.shape[1]
    out = a.new_empty(c, q, a.shape[0], L, dtype=dtype)
    _call("response", dtype, [a, F, G, X, C, out], [len(a), a.shape[1] // 2, len(F), q, c, L])
    return out


def response_backward(
    grad: Tensor, a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    make = torch.zeros_like if grad.shape[3] == 0 else torch.empty_like
    grads = make(a), make(F), make(G), make(X), make(C)
    sizes = [len(a), a.shape[1] // 2, len(F), X.shape[1], C.shape[0], grad.shape[3]]
    _call("response_backward", grad.dtype, [a, F, G, X, C, grad, *grads], sizes)
    return grads


def maps(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, T: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """taps (c, H, 2T-1), inward (H, T, N), outward (c, H, T, N), onward (H, N, N): see `s4.ops.maps`."""
    (H, N), c = a.shape, C.shape[0]
    shapes = ((c, H, 2 * T - 1), (H, T, N), (c, H, T, N), (H, N, N))
    taps, inward, outward, onward = found = tuple(a.new_empty(shape, dtype=dtype) for shape in shapes)
    _call("maps", dtype, [a, F, G, B, C, D, *found], [len(a), a.shape[1] // 2, len(F), c, T])
    return taps, inward, outward, onward


def maps_backward(
    grads: tuple[Tensor, Tensor, Tensor, Tensor], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    a, F, _, _, C, _ = inputs
    found = tuple(map(torch.empty_like, inputs))
    sizes = [len(a), a.shape[1] // 2, len(F), C.shape[0], grads[1].shape[1]]
    _call("maps_backward", grads[0].dtype, [*inputs, *grads, *found], sizes)
    return found


def scan(
    u: Tensor,
    x: Tensor,
    taps: Tensor,
    inward: Tensor,
    outward: Tensor,
    onward: Tensor,
    reverse: bool,
    table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H) and the state after the last whole chunk (H, B, N); shapes as in `s4.ops.scan`."""
    y, last = u.new_empty(u.shape), torch.empty_like(x)
    (B, L, H), (T, N) = u.shape, inward.shape[1:]
    sizes = [H, B, L, N, T, int(reverse), 0 if table is None else table.shape[2], *u.stride()]
    _call("scan", u.dtype, [u, x, taps, inward, outward, onward, y, last, table], sizes)
    return y, last


def scan_backward(
    grads: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...], reverse: bool, table: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of the six tensors that `scan` took, from those of its two outputs."""
    (u, _, _, inward, _, _), found = inputs, tuple(t.new_empty(t.shape) for t in inputs)
    (B, L, H), (T, N) = u.shape, inward.shape[1:]
    sizes = [
        H,
        B,
        L,
        N,
        T,
        int(reverse),
        0 if table is None else table.shape[2],
        *u.stride(),
        *grads[0].stride(),
    ]
    _call("scan_backward", u.dtype, [*inputs, *grads, *found, table], sizes)
    return found


def step(
    a: Tensor, F: Tensor, G: Tensor, B: Tensor, C: Tensor, D: Tensor, x: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H) and the next state (B, H, N) of one step; shapes as in `s4.ops.step`, rank at most 2."""
    y, moved = torch.empty_like(u), torch.empty_like(x)
    batch, H, N = x.shape
    _call("step", u.dtype, [a, F, G, B, C, D, x, u, y, moved], [batch, H, N // 2, F.shape[0]])
    return y, moved


def varying(
    u: Tensor,
    rate: Tensor,
    x: Tensor,
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt: Tensor,
    resets: Tensor | None,
    positions: Tensor,
    discretization: str,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H) and states (B, P, H, N); shapes as in `s4.ops.varying`, rank at most 2."""
    y, states = torch.empty_like(u), x.new_empty(*positions.shape, *x.shape[1:])
    tensors = [u, rate, x, Lambda, P, B, C, D, dt, resets, positions, y, states]
    _call("varying", u.dtype, tensors, _sizes(u, Lambda, P, positions, discretization))
    return y, states


def varying_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    resets: Tensor | None,
    positions: Tensor,
    discretization: str,
) -> tuple[Tensor, ...]:
    """Gradients of the nine inputs of `varying` from u to dt."""
    u, _, _, Lambda, P, *_ = inputs
    found = tuple(map(torch.empty_like, inputs))
    tensors = [*grads, *inputs, resets, positions, *found]
    _call("varying_backward", u.dtype, tensors, _sizes(u, Lambda, P, positions, discretization))
    return found


def _sizes(u: Tensor, Lambda: Tensor, P: Tensor, positions: Tensor, discretization: str) -> list[int]:
    return [*u.shape, Lambda.shape[1] // 2, len(P), positions.shape[1], int(discretization == "zoh")]


class Snapshot:
    """The numbers of some tensors, to compare with at every step: what that takes is made ready."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        self._kinds = [(t.dtype, t.shape) for t in tensors]
        self._addresses = [t.data_ptr() for t in self._copies]
        self._count = len(tensors)
        self._sizes = (ctypes.c_int64 * self._count)(*(t.nbytes for t in self._copies))

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are as many, of the same dtypes and shapes, contiguous, and hold the same numbers.

        Bit by bit; where the library is missing a nan never is the same.
        """
        if len(tensors) != self._count:
            return False
        for t, (dtype, shape) in zip(tensors, self._kinds, strict=True):
            if t.dtype is not dtype or t.shape != shape or not t.is_contiguous() or t.is_neg():
                return False
            if type(t) not in _PLAIN or not t.is_cpu:
                return False
        library = _library()
        if isinstance(library, str):
            return all(map(torch.equal, tensors, self._copies))
        addresses = (ctypes.c_void_p * (2 * self._count))(*[t.data_ptr() for t in tensors], *self._addresses)
        return bool(library.s4_same(addresses, self._sizes, ctypes.c_int64(self._count)))


def _call(name: str, dtype: torch.dtype, tensors: Sequence[Tensor | None], sizes: Sequence[int]) -> None:
    """A function of the library, which takes addresses and sizes, how many are addresses, and of threads."""
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    function = getattr(library, f"s4_{name}_{_SUFFIX[dtype]}")
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    values = struct.pack(f"{len(addresses) + len(sizes)}q", *addresses, *sizes)  # faster than ctypes
    if function(values, len(addresses), torch.get_num_threads()):
        raise MemoryError(f"backend 'cpu' ran out of memory in {name} of shape {list(sizes)}")
