"""Backend "cuda": the Cauchy sums of `kernels.cu`, compiled at first use by NVRTC through cuda.core.

The binary for an architecture is kept in a cache folder, $S4_CACHE_DIR or the user's own. Kernels run on
torch's current stream and work in torch's memory, without synchronising: a CUDA graph records them, if the
same operation has run once before the capture, as a capture can load no code.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_INSTALL = 'pip install "s4-pytorch[cuda]"'
_SUFFIX = {torch.complex64: "c64", torch.complex128: "c128"}
_SOURCE = Path(__file__).with_name("kernels.cu")
_THREADS, _NODE_THREADS = 128, 256  # kThreads and kNodeThreads of the source
_OPTIONS = {"std": "c++17"}  # nothing that makes arithmetic faster and wrong
_ROWS = 6  # right-hand sides at once, at most
_BLOCKS = 2048  # that fill any GPU, with little left over at the end
_SHORT = 16  # nodes of one thread, at least, where there are as many
_LONGEST = 1024  # nodes that one block adds up: bounds the rounding of long sums

_lock = threading.Lock()
_kernels: dict[tuple[int, str], Any] = {}  # by device and name: those that have run
_modules: dict[int, Any] = {}
_states: dict[int, bool | str] = {}


def status(device: torch.device) -> bool | str:
    """True if tensors on this device can be computed, or else the reason why not, found by a launch.

    Raises:
        RuntimeError: asked for the first time while a CUDA graph is captured.
    """
    if device.type == "cuda" and device.index in _states:
        return _states[device.index]
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "needs an NVIDIA GPU and a build of torch for it"
    if device.type != "cuda":
        return f"computes on CUDA devices only, not on {device}"
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _states:
        with torch.cuda.device(index):
            _refuse_capture("backend 'cuda'")
            _states[index] = _probe(torch.device("cuda", index))
    return _states[index]


def _probe(device: torch.device) -> bool | str:
    try:
        import cuda.bindings.nvrtc
        import cuda.core  # noqa: F401
    except ImportError as error:
        return f"needs cuda.core ({error}): {_INSTALL}"
    one = torch.ones(1, 1, 1, dtype=torch.complex64, device=device)
    try:
        sums = cauchy(one, 3 * one[0], one[0]).item()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, the others remain: the user sees the reason
        return f"{type(error).__name__}: {str(error).strip()} ({_INSTALL} brings NVRTC)"
    return True if sums == 1 else f"computes {sums} where it should compute 1 on {device}"


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    G, q, n = v.shape
    out = v.new_empty(G, q, z.shape[1])
    tasks, threads = _by_nodes(G, z.shape[1])
    for first, rows in _row_blocks(q):
        tensors = [v[:, first:], z, w, out[:, first:]]
        _launch(f"cauchy_{_SUFFIX[v.dtype]}_{rows}", tasks, threads, tensors, [G, q, n, *_nodes(z)])
    return out


def cauchy_backward(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    G, q, n = v.shape
    suffix, sizes = _SUFFIX[v.dtype], [G, q, n, *_nodes(z)]
    tasks, lanes, parts, span = _by_poles(G, n, z.shape[1])
    blocks = _row_blocks(q)
    parts_v, parts_w = v.new_empty(parts, G, q, n), w.new_empty(len(blocks), parts, G, n)
    grad_z = z.new_zeros(G, z.shape[1]) if need_z else z.new_empty(0)
    for i, (first, rows) in enumerate(blocks):
        given = [grad[:, first:], v[:, first:], z, w]
        found = [parts_v[:, :, first:], parts_w[i]]
        name = f"cauchy_backward_{suffix}_{rows}"
        _launch(name, tasks, _THREADS, [*given, *found], [*sizes, lanes, parts, span])
        if need_z:
            name = f"cauchy_backward_nodes_{suffix}_{rows}"
            _launch(name, *_by_nodes(G, z.shape[1]), [*given, grad_z], sizes)
    return parts_v.sum(0), grad_z.sum_to_size(z.shape) if need_z else grad_z, parts_w.sum((0, 1))


def _nodes(z: Tensor) -> list[int]:
    """How many nodes a group has, and how far on the next group's begin: 0 where they are shared."""
    return [z.shape[1], 0 if z.shape[0] == 1 else z.shape[1]]


def _row_blocks(q: int) -> list[tuple[int, int]]:
    """First row and number of rows of blocks as equal as can be, of at most `_ROWS`."""
    count = -(-q // _ROWS)
    edges = (i * q // count for i in range(count + 1 if count else 0))
    return [(first, last - first) for first, last in itertools.pairwise(edges)]


def _by_nodes(G: int, nodes: int) -> tuple[int, int]:
    """Blocks and threads in each where a thread is a node: as few idle as whole warps allow."""
    blocks = max(1, -(-nodes // _NODE_THREADS))
    warps = -(-nodes // (32 * blocks))
    return G * blocks if nodes else 0, 32 * max(1, warps)


def _by_poles(G: int, n: int, nodes: int) -> tuple[int, int, int, int]:
    """Blocks where a thread is a pole, poles in each, and the parts of how many nodes there are.

    Of the sizes alone, not of the device: sums are added up in the same order everywhere.
    """
    lanes = min(32, 1 << max(0, n - 1).bit_length())
    tiles = G * -(-n // lanes)
    least = _THREADS // lanes * _SHORT
    parts = max(min(-(-_BLOCKS // max(1, tiles)), nodes // least), -(-nodes // max(_LONGEST, least)), 1)
    span = max(1, -(-nodes // parts))
    parts = max(1, -(-nodes // span))
    return parts * tiles, lanes, parts, span


def _launch(name: str, blocks: int, threads: int, tensors: list[Tensor], sizes: list[int]) -> None:
    """Run a kernel on the current stream of the tensors' device."""
    if blocks == 0:
        return
    from cuda.core import Device, LaunchConfig, launch

    device = tensors[0].device
    with torch.cuda.device(device):
        # A thread new to CUDA has no context yet, which the driver asks for.
        Device(device.index).set_current()
        kernel = _kernel(device, name)
        config = LaunchConfig(grid=min(blocks, 2**31 - 1), block=threads)
        pointers = [t.data_ptr() for t in tensors]
        launch(_Stream(torch.cuda.current_stream().cuda_stream), config, kernel, *pointers, *sizes)


class _Stream:
    """A stream of torch's, as cuda.core's protocol has it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def _refuse_capture(what: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} loads code at first use, which a CUDA graph cannot record: "
            "run the same operation once before the capture"
        )


def _kernel(device: torch.device, name: str) -> Any:
    key = (device.index, name)
    if key not in _kernels:
        _refuse_capture(f"kernel {name!r} of backend 'cuda'")
        with _lock:
            if device.index not in _modules:
                _modules[device.index] = _module(device)
            _kernels[key] = _modules[device.index].get_kernel(name)
    return _kernels[key]


def _module(device: torch.device) -> Any:
    from cuda.bindings import nvrtc
    from cuda.core import ObjectCode

    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}"
    _, *version = nvrtc.nvrtcVersion()
    return ObjectCode.from_cubin(_cubin(arch, f"nvrtc {version}", functools.partial(_compile, arch)))


def _compile(arch: str) -> bytes:
    from cuda.core import Program, ProgramOptions

    program = Program(_SOURCE.read_text(encoding="utf-8"), "c++", ProgramOptions(arch=arch, **_OPTIONS))
    return bytes(program.compile("cubin").code)


def _cubin(arch: str, compiler: str, compile: Callable[[], bytes]) -> bytes:
    """The binary for an architecture: from the cache folder, or compiled and put there if it can be written.

    A file ends with its own hash, so that a damaged one is made anew, and is renamed into place when it is
    whole: other processes see all of it or nothing.
    """
    source = "\n".join([arch, compiler, str(_OPTIONS), _SOURCE.read_text(encoding="utf-8")])
    folder = _cache_folder()
    path = folder / f"sums-{arch}-{hashlib.sha256(source.encode()).hexdigest()[:32]}.cubin"
    with contextlib.suppress(OSError):
        stored = path.read_bytes()
        code, digest = stored[:-32], stored[-32:]
        if code and hashlib.sha256(code).digest() == digest:
            return code
    code = compile()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(code + hashlib.sha256(code).digest())
            os.replace(name, path)
        except OSError:
            os.unlink(name)
    return code


def _cache_folder() -> Path:
    if named := os.environ.get("S4_CACHE_DIR"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or os.path.expanduser("~"), "s4", "cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "s4")
