"""Backend "cpu": the fused C++ sums of `_cpu.cpp`, called through ctypes.

The shared library is built when the package is installed with a C++ compiler at hand. It links neither torch
nor Python, so one build serves every version of both.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

_SUFFIX = {torch.complex64: "c64", torch.complex128: "c128"}


@functools.cache
def _library() -> ctypes.CDLL | str:
    files = sorted(Path(__file__).parent.glob("_cpu_native*.so")) + sorted(
        Path(__file__).parent.glob("_cpu_native*.dylib")
    )
    if not files:
        return (
            "not built: with a C++ compiler (g++ or clang++) on the path, "
            "run pip install --force-reinstall --no-cache-dir --no-deps s4-pytorch"
        )
    try:
        return ctypes.CDLL(str(files[0]))
    except OSError as error:
        return f"cannot load {files[0].name}: {error}"


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


def vandermonde(v: Tensor, x: Tensor, L: int) -> Tensor:
    G, q, n = v.shape
    out = torch.empty(G, q, L, dtype=v.dtype.to_real(), device=v.device)
    _call("vandermonde", v.dtype, [v, x, out], [G, q, n, L])
    return out


def vandermonde_backward(grad: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    G, q, n = v.shape
    grad_v, grad_x = torch.empty_like(v), torch.empty_like(x)
    _call("vandermonde_backward", v.dtype, [grad, v, x, grad_v, grad_x], [G, q, n, grad.shape[2]])
    return grad_v, grad_x


def _call(name: str, dtype: torch.dtype, tensors: list[Tensor | None], sizes: list[int]) -> None:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    function = getattr(library, f"s4_{name}_{_SUFFIX[dtype]}")
    if function(*pointers, *map(ctypes.c_int64, sizes), ctypes.c_int(torch.get_num_threads())):
        raise MemoryError(f"backend 'cpu' ran out of memory in {name} of shape {sizes}")
