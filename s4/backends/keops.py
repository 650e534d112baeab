"""Backend "keops": sums that KeOps compiles at first use, for the CPU or a CUDA device (the extra "keops").

In real arithmetic, with no memory in n times the output. A formula takes four right-hand sides at a time over
the same denominators, whatever the sizes, so it compiles once for each dtype and device.
"""

import atexit
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LANES = 4  # right-hand sides in one formula: as many as a DPLR kernel has
_LOCK = threading.RLock()  # KeOps keeps the arguments of a call in one object for all threads
_COMPILED: set[tuple[str, torch.dtype, torch.device]] = set()
_AT_EXIT = contextlib.ExitStack()


def _times_v(re: str, im: str) -> str:
    """The complex product with v, all real parts first."""
    return f"Concat({re}*Extract(v,0,4)-{im}*Extract(v,4,4),{re}*Extract(v,4,4)+{im}*Extract(v,0,4))"


# 1 / (i - j) and its square.
_R = ("(Elem(i-j,0)*Inv(SqNorm2(i-j)))", "(Minus(Elem(i-j,1))*Inv(SqNorm2(i-j)))")
_R2 = (f"(Square({_R[0]})-Square({_R[1]}))", f"(IntCst(2)*{_R[0]}*{_R[1]})")
# Each with the real dimensions of i, j and v; sums are over j.
_FORMULAS = {
    "cauchy": (_times_v(*_R), (2, 2, 8)),
    "cauchy_backward": (f"Concat({_times_v(*_R)},{_times_v(*_R2)})", (2, 2, 8)),
}


def status(device: torch.device) -> bool | str:
    """True if tensors on this device can be computed, or else the reason why not.

    Found by computing a sum, which compiles it where KeOps has not done so before (seconds).
    """
    if device.type not in ("cpu", "cuda"):
        return f"computes on the CPU and on CUDA devices, not on {device}"
    return _probe(device.type)


@functools.cache
def _probe(kind: str) -> bool | str:
    if importlib.util.find_spec("pykeops") is None:
        return 'needs pykeops: pip install "s4-pytorch[keops]"'
    if kind == "cuda" and (crash := _crash(kind)):
        return crash
    with ThreadPoolExecutor(1) as thread:  # where no mode of torch is active, such as that of tracing
        return thread.submit(_try, kind).result()


def _crash(kind: str) -> str:
    """How a process that tries it dies, nothing if it lives: KeOps 2.3 with NVRTC 13 can take Python down."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from s4.backends import keops; keops._try({kind!r})"
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode >= 0:
        return ""  # of what it raises the attempt in this process tells
    name = signal.Signals(-done.returncode).name
    where = next(
        (line.strip() for line in done.stderr.splitlines() if "File" in line), "it does not say where"
    )
    return f"KeOps ends the process with {name} when it compiles for {kind} ({where})"


def _try(kind: str) -> bool | str:
    try:
        with _LOCK, _quiet():
            cuda = importlib.import_module("pykeops.config").pykeops_cuda
        if kind == "cuda" and not cuda.get_use_cuda():
            return (
                f"KeOps finds no CUDA ({cuda.cuda_message or 'it does not say why'}): "
                "libcuda and libnvrtc must be where the loader looks, such as in LD_LIBRARY_PATH"
            )
        one = torch.ones(1, 1, 1, dtype=torch.complex128, device=kind)
        found = cauchy(one, 3 * one[0], one[0]).item()
    except OSError as error:
        return (
            f"cannot write to the cache folder of KeOps ({error}): set KEOPS_CACHE_FOLDER to one that can be"
        )
    except ImportError as error:
        return (
            f"KeOps cannot compile or load its code ({error}): "
            "put g++ on the path, or another C++ compiler's name in CXX"
        )
    except Exception as error:  # whatever else a broken installation raises is a reason as well
        return f"KeOps does not run: {type(error).__name__}: {error}"
    return abs(found - 1) < 1e-12 or f"KeOps computes 1/2 + 1/2 as {found}"


def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
    if v.numel() == 0 or z.numel() == 0:
        return v.new_zeros(*v.shape[:2], z.shape[1])
    re, im = _reduce("cauchy", torch.view_as_real(z), _pairs(w), _pairs(v))
    return torch.complex(re, im)


def cauchy_backward(
    grad: Tensor, v: Tensor, z: Tensor, w: Tensor, need_z: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over nodes at poles are the same sums with the parts of nodes and poles exchanged."""
    if v.numel() == 0 or z.numel() == 0:
        return torch.zeros_like(v), torch.zeros_like(z) if need_z else z.new_empty(0), torch.zeros_like(w)
    nodes, poles = torch.view_as_real(z), _pairs(w)
    conj = torch.view_as_real(grad.conj_physical())
    re, im, re2, im2 = _reduce("cauchy_backward", poles, nodes, conj).unflatten(-1, (-1, 2))
    # At w and at conj w; 1/(w - z) is -1/(z - w).
    grad_v = -torch.complex(re[..., 0] + re[..., 1], im[..., 1] - im[..., 0])
    at_pairs = torch.complex(re2[..., 0] + re2[..., 1], im2[..., 1] - im2[..., 0])
    grad_w = (v.conj_physical() * at_pairs).sum(1)
    if not need_z:
        return grad_v, z.new_empty(0), grad_w
    _, _, re2, im2 = _reduce("cauchy_backward", nodes, poles, _pairs(v))
    grad_z = -(grad * torch.complex(re2, -im2)).sum(1)
    return grad_v, grad_z.sum_to_size(z.shape), grad_w


def _pairs(w: Tensor) -> Tensor:
    """(..., n) to the real (..., 2 n, 2): every number, then its conjugate."""
    return torch.view_as_real(torch.stack([w, w.conj_physical()], -1).flatten(-2))


def _reduce(name: str, i: Tensor, j: Tensor, v: Tensor) -> Tensor:
    """A formula at i (1 or G, M, .), summed over j (1 or G, N, .) with v (G, q, N, .): (., G, q, M)."""
    blocks = []
    for lanes in v.split(_LANES, 1):
        k = lanes.shape[1]
        columns = torch.nn.functional.pad(lanes.permute(0, 2, 3, 1), (0, _LANES - k)).flatten(2)
        sums = _call(name, i.contiguous(), j.contiguous(), columns.contiguous())
        blocks.append(sums.unflatten(2, (-1, _LANES))[..., :k].permute(2, 0, 3, 1))
    return torch.cat(blocks, 2)


def _call(name: str, i: Tensor, j: Tensor, v: Tensor) -> Tensor:
    """The only call of KeOps. It must see no empty tensor and no two dtypes, as the public sums ensure."""
    if max(t.numel() for t in (i, j, v)) >= 2**31:
        raise ValueError(
            f"backend 'keops' has 32-bit indices: too many numbers in v of shape {tuple(v.shape)}"
        )
    key = (name, v.dtype, v.device)
    with _LOCK, contextlib.nullcontext() if key in _COMPILED else _quiet():
        if v.device.type == "cuda":  # KeOps runs on the null stream, which does not wait for others
            torch.cuda.current_stream(v.device).synchronize()
        sums: Tensor = _formula(name)(i, j, v, backend="CPU" if v.device.type == "cpu" else "GPU_1D")
        _COMPILED.add(key)
    return sums


@functools.cache
def _formula(name: str) -> Callable[..., Tensor]:
    formula, (i, j, v) = _FORMULAS[name]
    aliases = [f"i=Vi(0,{i})", f"j=Vj(1,{j})", f"v=Vj(2,{v})"]
    genred = importlib.import_module("pykeops.torch").Genred
    # With groups, KeOps 2.3 adds one by one whatever its other schemes say, and loses digits at large L.
    return genred(
        formula, aliases, reduction_op="Sum", axis=1, sum_scheme="kahan_scheme", use_fast_math=False
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Imports and compilations by one process at a time, with nothing printed."""
    with _cache_lock():
        modules = _modules()
        before = [module.verbose for module in modules]
        try:
            for module in modules:
                module.verbose = False
            yield
        finally:
            for module, verbose in zip(modules, before, strict=True):
                module.verbose = verbose


@functools.cache
def _modules() -> tuple[Any, Any]:
    """pykeops and keopscore, which hold their own verbosity; imported in silence, on first use."""
    imported = "pykeops" in sys.modules
    settings = {name: os.environ.get(name) for name in ("PYKEOPS_VERBOSE", "KEOPS_VERBOSE")}
    os.environ.update(dict.fromkeys(settings, "0"))  # read at import
    try:
        importlib.import_module("pykeops.torch")
    finally:
        for name, value in settings.items():
            del os.environ[name]
            os.environ.update({} if value is None else {name: value})
    modules = sys.modules["pykeops"], sys.modules["keopscore"]
    if not imported:
        for module, value in zip(modules, settings.values(), strict=True):
            vars(module)["verbose"] = value != "0"
    # KeOps rewrites its index of formulas at exit, while others may read it: the lock comes first.
    atexit.register(lambda: _AT_EXIT.enter_context(_cache_lock()))
    return modules


@contextlib.contextmanager
def _cache_lock() -> Iterator[None]:
    """Keeps other processes out of KeOps's cache folder, as far as they ask."""
    import fcntl  # not on Windows, where pykeops does not run either

    folder = os.environ.get("KEOPS_CACHE_FOLDER")
    if folder is None:
        folder = str(Path.home() / ".cache" / f"keops{importlib.metadata.version('keopscore')}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / "s4.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
