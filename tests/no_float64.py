"""A device without float64 that needs no hardware: to Python code it is Apple's MPS, as torch names it.

Its tensors hold their numbers in the CPU's memory, and every operation of torch on them passes through here.
It refuses what an MPS refuses, float64, complex128 and tensors of the CPU among its own, and counts the
copies between the two. `s4` sees `tensor.device.type == "mps"`, and nothing of it is replaced.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oracle
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from s4 import S4Layer, checks, generation, model

MPS = torch.device("mps", 0)
# What the tensors are to C++: of all types but the CPU and meta the one whose guard, which autograd asks for,
# every build of torch has.
INNER = torch.device("lazy", 0)
WIDE = (torch.float64, torch.complex128)
aten = torch.ops.aten

H, N, B, L = 4, 8, 2, 41
LAYERS: dict[str, dict[str, Any]] = {
    "dplr": {},
    "rank two, both ways": {"init": "legt", "bidirectional": True},
    "diag": {"variant": "diag"},
    "diag, both ways": {"variant": "diag", "bidirectional": True},
}
VALUE, GRADIENT = 1e-4, 1e-3  # of float32, as in test_devices.py
LAZY = {aten._conj.default: aten.conj_physical.default, aten._neg_view.default: aten.neg.default}


def refuse(dtype: torch.dtype) -> None:
    if dtype in WIDE:
        raise TypeError(f"Cannot convert a MPS Tensor to {dtype}: the MPS framework doesn't support it")


class OnDevice(Tensor):
    """A tensor on the device; `numbers`, those of it, in the CPU's memory."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnDevice":
        assert type(numbers) is Tensor
        refuse(numbers.dtype)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=INNER,
        )
        made.numbers = numbers
        return made

    device = property(lambda self: MPS)
    is_mps = property(lambda self: True)

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def __repr__(self) -> str:
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a tensor on the device outside of it")


class Device(TorchDispatchMode):
    """The device, while it is there: counts of the copies `sent` to it and `fetched` from it, and of bytes.

    `ran` has the names of the operations that it ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()
        self.forget()

    def forget(self) -> None:
        self.sent = self.fetched = 0
        self.bytes_sent = self.bytes_fetched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on = [t for t in tensors if isinstance(t, OnDevice)]
        to = kwargs.get("device")
        there = bool(on) if to is None else torch.device(to).type in (MPS.type, INNER.type)
        if not on and not there:
            return func(*args, **kwargs)
        if func.namespace == "s4":
            if func._schema.name not in OPDEFS:
                raise NotImplementedError(f"Could not run {func} with arguments from the 'MPS' backend")
            with self:  # its body, which runs on any device
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        if on and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # the operations that it is made of
                return func.decompose(*args, **kwargs)
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        plain = tree_map(lambda t: t.numbers if isinstance(t, OnDevice) else t, (args, kwargs))
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copied(func, args, plain, there)
        for t in tensors:
            if not isinstance(t, OnDevice) and (t.dim() or t.dtype in WIDE):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, in {func}, got {t.dtype} on cpu"
                )
        self.ran.add(func.name())
        known = {id(t.numbers): t for t in on}  # what is changed in place is what comes out
        # Beneath autograd, where this runs, the marks of lazy conjugates and negatives are not read.
        out = LAZY.get(func, func)(*plain[0], **plain[1])

        def wrapped(t: Any) -> Any:
            return known[id(t)] if id(t) in known else OnDevice(t) if isinstance(t, Tensor) else t

        return tree_map(wrapped, out)

    def _copied(self, func: Any, args: Any, plain: Any, there: bool) -> Any:
        """A copy that may cross. To the device, the CPU rounds it first; from it, it is never rounded."""
        source = args[0] if func is aten._to_copy.default else args[1]
        there = there if func is aten._to_copy.default else isinstance(args[0], OnDevice)
        out = func(*plain[0], **plain[1])
        if isinstance(source, OnDevice) and not there:
            if out.dtype != source.dtype:
                raise TypeError(f"a copy from the device to {out.dtype} of the CPU converts on the device")
            self.fetched += 1
            self.bytes_fetched += source.nbytes
        elif there and not isinstance(source, OnDevice):
            self.sent += 1
            self.bytes_sent += source.numel() * out.element_size()
        else:
            self.ran.add(func.name())
        if func is aten.copy_.default:
            return args[0]
        return OnDevice(out) if there else out


@contextmanager
def device_without_float64(monkeypatch: Any) -> Iterator[Device]:
    """The device; `Tensor.to` learns of it, as C++ refuses the name of one that it is not built for."""
    to = Tensor.to
    for module in (checks, generation, model):  # the numbers are looked at as those of any other device
        unread = module.unread
        monkeypatch.setattr(module, "unread", lambda t, f=unread: not isinstance(t, OnDevice) and f(t))

    def inner(value: Any) -> Any:
        named = isinstance(value, (str, torch.device)) and torch.device(value).type == MPS.type
        return INNER if named else value

    def moved(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *map(inner, args), **{key: inner(value) for key, value in kwargs.items()})

    monkeypatch.setattr(Tensor, "to", moved)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: True)  # autocast asks
    with Device() as device:
        yield device


@functools.cache
def _functions() -> dict[str, tuple[str | None, str]]:
    """Of each operation of torch, by name: the one that it is left to, and the devices it is written for."""
    source = Path(torch.__file__).parents[1] / "torchgen/packaged/ATen/native/native_functions.yaml"
    found = {}
    for block in re.split(r"^- func: ", source.read_text(), flags=re.MULTILINE)[1:]:
        other = re.search(r"^  structured_delegate: (\S+)", block, re.MULTILINE)
        devices = re.search(r"^  dispatch:\n((?:    .*\n)+)", block, re.MULTILINE)
        name = block.split("(")[0]
        found[name] = other and other[1], devices[1] if devices else "Composite"
    return found


def unwritten(operations: Iterable[str]) -> list[str]:
    """Those of torch's operations that this version has not written for MPS."""
    missing = []
    for operation in operations:
        other, devices = _functions()[operation.removeprefix("aten::")]
        if other is not None:
            _, devices = _functions()[other]
        keys = re.findall(r"^ +([\w, ]+):", devices, re.MULTILINE) if ":" in devices else [devices]
        if not any("MPS" in key or "Composite" in key for key in keys):
            missing.append(operation)
    return sorted(missing)


def build(name: str, **options: Any) -> S4Layer:
    layer = S4Layer(H, N, **LAYERS[name], **options).to("mps")
    assert all(p.device == MPS for p in layer.parameters())
    return layer


def sent(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape).to("mps").requires_grad_(**options)


def back(t: Tensor) -> Tensor:
    """A result's numbers, which have to be on the device."""
    assert isinstance(t, OnDevice), "not on the device"
    return t.numbers


def double(t: Tensor) -> Tensor:
    return back(t.detach()).double()


def truth(
    layer: S4Layer, u: Tensor, state: Tensor | None = None, rate: float = 1.0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The oracle's outputs and last state, and what to differentiate by: parameters, u, state."""
    found = {name: double(p).requires_grad_() for name, p in layer.named_parameters()}
    inputs = [double(t).requires_grad_() for t in (u, state) if t is not None]
    y, last = oracle.forward(oracle.discrete(found, layer.discretization, rate), *inputs)
    return y, last, [*found.values(), *inputs]
