"""Which way: who computes an operation, which way a layer takes, and who is watching what torch does.

The file that asks torch whether it exports, transforms, differentiates or casts.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, maybe_current_level
from torch.autograd import forward_ad

from s4.backends import AUTO, BACKENDS, OPERATIONS
from s4.checks import unread
from s4.precision import WITHOUT_FLOAT64, constant
from s4.system import Recurrence

# max(B, 8) L from which a scan takes less time than an FFT convolution, by d_state, on a CPU with the fused
# code: measured, with backward. Of diagonal systems, whose kernels take less, max(B, 2) L.
_LEAST = {16: 1024, 32: 2048, 64: 6144, 128: 18432}
# max(B, 2) L up to which a convolution takes less time than a scan, where kernel and maps are kept.
_SHORT = 1024
_DENSE = 8  # inputs a reset, below which a convolution takes less time than a scan
_STEPS = 32  # B L up to which steps take less time than a convolution, without a state
# Nodes over d_state^2 up to which Cauchy sums take less time than powers (benchmarks/kernels.py): on two
# cores, where both are fused, and on an H200, where sums are and powers are not, measured to 16,384.
_SUMS = {"cpu": 1 / 8, "cuda": 4.0}

F = TypeVar("F", bound=Callable[..., Any])

_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "ipu", "maia", "privateuseone")
_AUTOCAST = {kind for kind in _KINDS if torch.amp.is_autocast_available(kind)}


def backends() -> dict[str, dict[str, bool | str] | str]:
    """What each backend can compute on this machine. "torch" is the plain definition of every operation.

    Returns:
        by the name of each backend a dict of operations, each with True or the reason why not; or a string,
        the reason why the backend cannot run here at all.

    Examples:
        >>> backends()["torch"]["scan"]
        True
    """
    found: dict[str, dict[str, bool | str] | str] = {}
    for name, module in BACKENDS.items():
        state = state_of(name, *_devices())
        plain = "has none of its own: plain PyTorch"
        own = {o: True if name == "torch" or hasattr(module, o) else plain for o in OPERATIONS}
        found[name] = own if state is True else str(state)
    return found


def _devices() -> list[torch.device]:
    """A device of each type there is here."""
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def state_of(backend: str, *devices: torch.device) -> bool | str:
    """True if a backend can run on one of these devices, or else the reason why not."""
    states: list[bool | str] = [BACKENDS[backend].status(device) for device in devices]
    return True if True in states else states[-1]


@constant
def refusal(backend: str, device_type: str) -> str:
    """Why a backend cannot run on this type of device; empty if it can, and where nothing is computed."""
    state = device_type == "meta" or state_of(backend, torch.device(device_type))
    return "" if state is True else f"backend {backend!r} cannot run: {state}"


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or can run on some device here, saying why not."""
    if backend == "auto":
        return
    if not isinstance(backend, str) or backend not in BACKENDS:
        names = ", ".join(map(repr, ["auto", *BACKENDS]))
        raise ValueError(f"backend must be one of {names}, got {backend!r}")
    state = state_of(backend, *_devices())  # of this one alone: to probe another may take seconds
    if state is not True:
        raise ValueError(f"backend {backend!r} cannot run: {state}")


def refuse_tangents() -> None:
    """Raise RuntimeError inside an operator in forward mode, where it would lose the tangents without a word.

    A layer takes plain definitions there; a program that was compiled or exported before holds operators.
    """
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "forward-mode derivatives do not pass through the operators of s4 that a compiled or exported "
            "program holds: differentiate the layer itself, or compile what differentiates it"
        )


def implementation(operation: str, backend: str, device: torch.device) -> Any | None:
    """The module that computes an operation on a device, or None for the plain definition.

    Raises:
        ValueError: an unknown backend, or one that cannot run there; the message says why.
        RuntimeError: in forward mode, as `refuse_tangents` does.
    """
    if forward_ad._current_level >= 0:
        refuse_tangents()
    if backend == "auto":
        names = AUTO[operation].get(device.type, ())
        backend = next((name for name in names if BACKENDS[name].status(device) is True), "torch")
    else:
        check_backend(backend)
        state = device.type == "meta" or BACKENDS[backend].status(device)
        if state is not True:
            raise ValueError(f"backend {backend!r} cannot run: {state}")
    module = BACKENDS[backend]
    return module if hasattr(module, operation) else None


@constant
def fused(operation: str, backend: str, device_type: str) -> bool:
    """Whether a backend computes an operation on this type of device, not plain PyTorch."""
    return not transformed() and implementation(operation, backend, torch.device(device_type)) is not None


def opaque() -> bool:
    """Whether what goes by the bits of a length has to be one operator: where a graph serves every length."""
    if not torch.compiler.is_compiling() or transformed():
        return False
    if exporting_onnx():
        raise ValueError(
            "S4 layers go to ONNX as constants: s4.deploy.export(model, 'model.onnx', max_length=...)"
        )
    return True


@constant
def transformed() -> bool:
    """Inside torch.func or forward-mode AD, which cannot see through custom operators."""
    return maybe_current_level() is not None or forward_ad._current_level >= 0


def way(
    mode: str,
    backend: str,
    recurrence: Recurrence,
    batch: int,
    L: int,
    stateful: bool,
    kept: bool,
    device_type: str,
    resets: Tensor | None = None,
) -> str:
    """How a sequence on a device is processed: "fft", by convolution; "scan"; or "steps", one by one.

    What "auto" expects to be faster was measured on a CPU. A state that goes in or comes out is free in a
    scan and costs the convolution several times as much again. A few steps need neither. What an earlier call
    made and kept is free. Without the fused code the maps of a chunk take several times as long. With a reset
    in every eight steps chunks get too short.

    Where the device has no float64, states always are a scan's: its maps, made on the CPU, serve all there is
    to compute, and what a state adds to the outputs of a convolution would need that precision.
    """
    if isinstance(L, Tensor):
        raise TypeError("torch.jit.trace takes S4 layers as constants: trace s4.deploy.freeze(model, ...)")
    if stateful and device_type in WITHOUT_FLOAT64:
        return "scan"
    if mode != "auto":
        return mode
    sizes = [size for size in _LEAST if recurrence.a.shape[1] <= size]
    if torch.compiler.is_compiling():  # one way for all shapes, as a graph has no branches
        local = device_type == "cpu" and backend == "auto" and bool(sizes)
        return "scan" if stateful or local else "fft"
    local = device_type == "cpu" and len(recurrence.C) == 1 and backend == "auto"
    if local and 0 < L <= _few(stateful, kept) and (stateful or batch * L <= _STEPS):
        return "steps"
    if stateful:
        return "scan"
    readable = device_type == "cpu" and resets is not None and not unread(resets)
    if readable and resets is not None and _DENSE * int(resets.sum()) > batch * L:
        return "fft"
    if local and kept:
        return "fft" if L <= 32 or max(batch, 2) * L <= _SHORT else "scan"
    if device_type != "cpu" or backend != "auto":
        return "fft"
    price = 1 if fused("scan", backend, "cpu") else 4
    inputs = max(batch, 8 if len(recurrence.F) else 2) * L
    long = bool(sizes) and inputs >= _LEAST[sizes[0]] * price and 4 * recurrence.a.shape[1] <= L
    return "scan" if long else "fft"


def _few(stateful: bool, kept: bool) -> int:
    """Steps that take less time one by one."""
    return 4 * (1 + stateful) if kept or not torch.is_grad_enabled() else 1 + stateful


def takes_sums(d_state: int, nodes: int, device_type: str) -> bool:
    """Whether the kernel of a DPLR layer comes by Cauchy sums at this many nodes, not by powers.

    Powers take O(N^2 sqrt(L) + N L) flops a channel where fused, O(N^3 log L + N L) where not; sums O(N L) at
    a higher price, which only fused ones repay. A graph that serves every length takes powers.
    """
    return (
        not torch.compiler.is_compiling()
        and nodes <= _SUMS.get(device_type, 1.0) * d_state**2
        and fused("cauchy", "auto", device_type)
    )


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast, where the device has one."""
    return torch.autocast(device.type, enabled=False) if device.type in _AUTOCAST else nullcontext()


def product_dtype(like: Tensor) -> torch.dtype:
    """Of the large products of a scan: that of a parameter, or bfloat16 where autocast asks for it."""
    kind = like.device.type
    if kind not in _AUTOCAST or not torch.is_autocast_enabled(kind):
        return like.dtype
    lower = torch.get_autocast_dtype(kind)
    return lower if (like.dtype, lower) == (torch.float32, torch.bfloat16) else like.dtype


@constant
def exporting() -> bool:
    """Inside torch.export; asked itself, torch 2.9 says so of torch.compile too."""
    return torch.compiler.is_exporting()


def compiling() -> bool:
    """Inside torch.compile or torch.export."""
    return torch.compiler.is_compiling()


@constant
def exporting_onnx() -> bool:
    """Inside torch.onnx.export."""
    return "torch.onnx._internal.exporter._flags" in sys.modules and torch.onnx.is_in_onnx_export()


def keeps(parameter: Tensor, *tensors: Tensor) -> bool:
    """Whether what parameters come to may be kept for the next call, made without operators.

    Not where something is differentiated, traced or captured, which keeps it itself, nor where a subclass or
    a mode of torch has to see what is done.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if maybe_current_level() is not None or forward_ad._current_level >= 0:  # as `transformed`
        return False
    if type(parameter) not in (Tensor, torch.nn.Parameter) or not {Tensor}.issuperset(map(type, tensors)):
        return False
    if torch._C._len_torch_dispatch_stack() or torch._ops._len_torch_dispatch_stack_pre_dispatch():
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    if parameter.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return parameter.device.type == "cpu" or parameter.device.type in WITHOUT_FLOAT64


def recorded(*grads: Tensor) -> bool:
    """In a gradient, whether that has derivatives itself or is transformed, and only its definition serves.

    Gradients in a batch, as torch.autograd.grad(is_grads_batched=True) has them, are a transform of torch's
    that no level tells of.
    """
    if torch.is_grad_enabled() or transformed():
        return True
    return not compiling() and any(map(is_legacy_batchedtensor, grads))


def unwatched(parameter: Tensor) -> bool:
    """Whether nothing is differentiated, and a parameter is a plain tensor, not one of a subclass."""
    return not torch.is_grad_enabled() and type(parameter) in (Tensor, torch.nn.Parameter)


def through(plain: Callable[..., Any], inputs: Sequence[Tensor], grads: Any) -> tuple[Tensor | None, ...]:
    """Gradients of a map by its plain definition, themselves differentiable where that is asked for."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        wanted = [t for t in inputs if t.requires_grad]
        outputs = plain(*inputs)
        pairs = zip(outputs, grads, strict=True) if isinstance(outputs, tuple) else [(outputs, grads)]
        pairs = [pair for pair in pairs if pair[0].requires_grad]  # the others are constants
        found: Iterator[Tensor] = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=again,
                allow_unused=True,
                materialize_grads=True,
            )
            if pairs
            else [torch.zeros_like(t) for t in wanted]
        )
    return tuple(next(found) if t.requires_grad else None for t in inputs)


def pulled(plain: Callable[..., Any], inputs: Sequence[Tensor], grads: Any) -> list[Tensor]:
    """Gradients of a map by its plain definition inside an operator, where autograd records nothing."""
    back = torch.func.vjp(plain, *inputs)[1]
    return [g.clone(memory_format=torch.contiguous_format) for g in back(grads)]  # of no input's memory


def plain_memory(t: Tensor) -> Tensor:
    """The numbers themselves, no lazy conjugation or negation, contiguous: what a backend reads as memory."""
    return t.resolve_conj().resolve_neg().contiguous()


def eager(function: F) -> F:
    """What torch.compile leaves to Python, with no import of torch._dynamo where nothing is compiled."""
    disabled: Callable[..., Any] | None = None  # made once: to make it takes longer than most calls

    @wraps(function)
    def run(*given: Any) -> Any:
        nonlocal disabled
        if disabled is None and "torch._dynamo" in sys.modules:
            disabled = torch.compiler.disable(function)
        return (disabled or function)(*given)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def recomputing() -> bool:
    """Inside a backward pass, in which activation checkpointing runs a forward pass again."""
    return torch._C._current_graph_task_id() != -1


def recomputable(training: bool) -> Callable[..., Any] | bool | None:
    """None where a forward pass is not checkpointed: where it keeps all for its gradient, or has none.

    Else a function that lives as long as it may be run again, or True where that cannot be told; False where
    it hardly is, in evaluation without gradients.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is not None:
        unpack: Callable[..., Any] = hooks[1]
        return unpack
    return None if torch.is_grad_enabled() else training


def gradients(t: Tensor) -> str:
    """What is recorded of a tensor."""
    if not torch.is_grad_enabled():
        return "no gradients"
    return "gradients, also of the input" if t.requires_grad else "gradients"
