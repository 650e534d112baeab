"""Backend "triton": the fused Cauchy sums of `kernels.py`, for GPUs with no CUDA toolkit beside them.

On a CPU it runs only in Triton's interpreter (TRITON_INTERPRET=1 before the import), which is for tests.
"""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_BLOCK = 128  # nodes of a program, one a thread
_WARPS = 4
_PROGRAMS = 1024  # are enough for a GPU: with fewer, a reduction over nodes is split


def status(device: torch.device) -> bool | str:
    """True if tensors on this device can be computed, or else the reason why not."""
    try:
        from triton import knobs
    except ImportError as error:
        return f"cannot import triton ({error}): run pip install 's4-pytorch[triton]'"
    if knobs.runtime.interpret:
        return _probe(device) if device.type == "cpu" else f"interpreted on the CPU, not on {device}"
    if device.type != "cuda":
        return f"computes on GPUs only, not on {device}"
    if not torch.cuda.is_available():
        return "needs a GPU and a build of torch for it"
    return _probe(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)


@functools.cache
def _probe(device: torch.device) -> bool | str:
    """Whether a kernel runs: Triton also needs a C compiler, and a driver that it knows how to talk to."""
    try:
        with _disable_current_modes():  # a fake tensor has no memory to launch on
            one = torch.ones(1, 1, 1, dtype=torch.complex64, device=device)
            cauchy(one, 2 * one[0], one[0])
    except Exception as error:  # compilers, loaders and drivers each raise their own
        return f"cannot compile or launch: {error}"
    return True


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    (G, q, n), nodes = v.shape, z.shape[1]
    out = v.new_empty(G, q, nodes)
    if v.numel() == 0 or nodes == 0:
        return out.zero_()
    Q = _rows(q)
    programs = G * _cdiv(q, Q) * _cdiv(nodes, _BLOCK)
    _launch("cauchy", programs, [v, z, w, out], [q, n, nodes, _step(z)], Q=Q)
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
    inputs, sizes = [grad, v, z, w], [q, n, nodes, _step(z)]
    given, numbers = [*inputs, grad_v, grad_w], [G, *sizes, splits]
    _launch("cauchy_backward", programs * splits, given, numbers, Q=Q, POLES=POLES)
    grad_z = z.new_empty(0)
    if need_z:
        grad_z = z.new_empty(G, nodes)
        _launch("cauchy_backward_nodes", G * node_blocks, [*inputs, grad_z], sizes, Q=Q)
        grad_z = grad_z.sum_to_size(z.shape)
    return _total(grad_v), grad_z, _total(grad_w)


def _launch(name: str, programs: int, tensors: list[Tensor], sizes: list[int], **tiles: int) -> None:
    from s4.backends.triton import kernels

    real = map(torch.view_as_real, tensors)
    kernel = getattr(kernels, name)
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](*real, *sizes, **tiles, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=True)


def _step(z: Tensor) -> int:
    return 0 if z.shape[0] == 1 else z.shape[1]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _rows(q: int) -> int:
    """Rows of a program: a power of two, as Triton's tiles are; more rows than 8 do not fit the registers."""
    return min(8, 1 << (q - 1).bit_length())


def _poles(v: Tensor, Q: int) -> int:
    """Poles of a program of a backward, as many as its registers hold."""
    most = 64 // v.element_size()  # 8, or 4 in double precision
    return min(most, max(1, 2 * most // Q))


def _splits(programs: int, blocks: int) -> int:
    """Into how many parts to split a reduction over `blocks`: by shapes alone, so that results repeat.

    A part has at least 8 blocks, as adding up across threads at the end costs about as much as one.
    """
    return min(_cdiv(blocks, 8), _cdiv(_PROGRAMS, programs))


def _total(parts: Tensor) -> Tensor:
    return parts.sum(0) if len(parts) > 1 else parts[0]
