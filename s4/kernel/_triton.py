"""Backend "triton": the fused sums of `_triton_kernels.py`, for GPUs with no CUDA toolkit beside them.

On a CPU it runs only in Triton's interpreter (TRITON_INTERPRET=1 before the import), which is for tests.
"""

import functools
import math
from types import ModuleType

import torch
from torch import Tensor

_BLOCK = 128  # nodes or steps of a program, one a thread
_JUMPS = 8  # blocks of steps that share what is loaded for a pole
_PROGRAMS = 1024  # are enough for a GPU: with fewer, a reduction over nodes is split


def status(device: torch.device) -> bool | str:
    """True if tensors on this device can be computed, or else the reason why not."""
    try:
        import triton
    except ImportError as error:
        return f"cannot import triton ({error}): pip install 's4-pytorch[triton]'"
    if triton.knobs.runtime.interpret:
        return device.type == "cpu" or f"computes on the CPU while TRITON_INTERPRET is set, not on {device}"
    if device.type != "cuda":
        return f"computes on GPUs only, not on {device}"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _probe(index)


@functools.cache
def _probe(index: int) -> bool | str:
    """What a first launch says: Triton compiles its launcher with a C compiler, which may be missing."""
    if not torch.version.hip and torch.cuda.get_device_capability(index) < (8, 0):
        return f"needs compute capability 8.0, {torch.cuda.get_device_name(index)} has less"
    one = torch.ones(1, 1, 1, dtype=torch.complex64, device=torch.device("cuda", index))
    try:
        cauchy(one, 2 * one[0], one[0])
    except Exception as error:  # of any kind: compilers, drivers and loaders each have their own
        return f"cannot compile or launch: {error}"
    return True


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    (G, q, n), nodes = v.shape, z.shape[1]
    out = v.new_empty(G, q, nodes)
    if v.numel() == 0 or nodes == 0:
        return out.zero_()
    Q = _rows(q)
    programs = G * _cdiv(q, Q) * _cdiv(nodes, _BLOCK)
    sizes = (q, n, nodes, 0 if z.shape[0] == 1 else nodes)
    with torch.cuda.device_of(v):
        _kernels().cauchy[(programs,)](*_real(v, z, w, out), *sizes, Q=Q, BLOCK=_BLOCK)
    return out


def cauchy_backward(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (G, q, n), nodes = v.shape, z.shape[1]
    if v.numel() == 0 or nodes == 0:
        return torch.zeros_like(v), torch.zeros_like(z) if need_z else z.new_empty(0), torch.zeros_like(w)
    Q = _rows(q)
    POLES = _poles(v, Q)
    node_blocks, row_blocks = _cdiv(nodes, _BLOCK), _cdiv(q, Q)
    programs = G * row_blocks * _cdiv(n, POLES)
    splits = _splits(programs, node_blocks)
    grad_v, grad_w = v.new_empty(splits, G, q, n), w.new_empty(splits * row_blocks, G, n)
    grad_z = z.new_empty(G if need_z else 0, nodes)
    inputs, sizes = _real(grad, v, z, w), (q, n, nodes, 0 if z.shape[0] == 1 else nodes)
    with torch.cuda.device_of(v):
        _kernels().cauchy_backward[(programs * splits,)](
            *inputs, *_real(grad_v, grad_w), G, *sizes, splits, Q=Q, POLES=POLES, BLOCK=_BLOCK
        )
        if need_z:
            _kernels().cauchy_backward_nodes[(G * node_blocks,)](
                *inputs, *_real(grad_z), *sizes, Q=Q, BLOCK=_BLOCK
            )
    grad_z = grad_z.sum_to_size(z.shape) if need_z else z.new_empty(0)
    return _total(grad_v), grad_z, _total(grad_w)


def vandermonde(v: Tensor, x: Tensor, L: int) -> Tensor:
    G, q, n = v.shape
    out = torch.empty(G, q, L, dtype=v.dtype.to_real(), device=v.device)
    if v.numel() == 0 or L == 0:
        return out.zero_()
    Q = _rows(q)
    short, long = _factors(x, L)
    width, jumps = short.shape[2], long.shape[2]
    programs = G * _cdiv(q, Q) * _cdiv(jumps, _JUMPS) * _cdiv(width, _BLOCK)
    with torch.cuda.device_of(v):
        _kernels().vandermonde[(programs,)](
            *_real(v, short, long), out, q, n, L, width, jumps, Q=Q, JUMPS=_JUMPS, BLOCK=_BLOCK
        )
    return out


def vandermonde_backward(grad: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    (G, q, n), L = v.shape, grad.shape[2]
    if v.numel() == 0 or L == 0:
        return torch.zeros_like(v), torch.zeros_like(x)
    Q = _rows(q)
    POLES = _poles(v, Q)
    short, long = _factors(x, L)
    width, jumps = short.shape[2], long.shape[2]
    short_blocks, row_blocks = _cdiv(width, _BLOCK), _cdiv(q, Q)
    programs = G * row_blocks * _cdiv(n, POLES) * short_blocks
    splits = _splits(programs, jumps)
    parts = splits * short_blocks
    grad_v, grad_x = v.new_empty(parts, G, q, n), x.new_empty(parts * row_blocks, G, n)
    with torch.cuda.device_of(v):
        _kernels().vandermonde_backward[(programs * splits,)](
            grad,
            *_real(v, short, long, grad_v, grad_x),
            *(G, q, n, L, width, jumps, splits),
            Q=Q,
            POLES=POLES,
            BLOCK=_BLOCK,
        )
    return _total(grad_v), _total(grad_x)


def _kernels() -> ModuleType:
    from s4.kernel import _triton_kernels

    return _triton_kernels


def _real(*tensors: Tensor) -> list[Tensor]:
    return [torch.view_as_real(t) for t in tensors]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _rows(q: int) -> int:
    """Rows of a program: a power of two, as Triton's tiles are; more rows than 8 do not fit the registers."""
    return min(8, 1 << (q - 1).bit_length())


def _poles(v: Tensor, Q: int) -> int:
    """Poles of a program of a backward: of 16 tiles of sums in registers, or 8 in double precision."""
    return max(1, (128 // v.element_size()) // Q)


def _splits(programs: int, blocks: int) -> int:
    """Into how many parts to split a reduction over `blocks`: by shapes alone, so that results repeat."""
    return min(blocks, _cdiv(_PROGRAMS, programs))


def _total(parts: Tensor) -> Tensor:
    return parts.sum(0) if len(parts) > 1 else parts[0]


def _factors(x: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """e^(x b) for b < T (G, n, T) and e^(x a T) for a < L / T, with T about sqrt(L) but at least a block.

    Rounded from double precision, as a phase x l must be known to far better than 1 and grows with l.
    """
    T = min(L, max(_BLOCK, 2 ** round(math.log2(L) / 2)))
    x = x[..., None]
    step = torch.arange(max(T, _cdiv(L, T)), dtype=torch.float64, device=x.device)
    short = torch.exp(x.to(torch.complex128) * step[:T])
    long = torch.exp(x.to(torch.complex128) * (step[: _cdiv(L, T)] * T))
    return short.to(x.dtype), long.to(x.dtype)
