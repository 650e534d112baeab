"""How near is each operation to what one core can do?

    python benchmarks/floors.py [--budget SECONDS] [--out FILE.json]

A layer runs forward and backward, and every operation that it calls is recorded with its inputs. Each is
then run alone, many times, on one thread. What counts is the least time that the processor spent on it,
without the time in which it did something else. Two floors are beside it, their rates measured the same way:

- bytes: those of all inputs and outputs, once, at the rate of a large copy, read and written;
- flops: those that `FlopCounterMode` counts, at the rate of a matrix product of the same precision.

`share` is the larger floor over the time. Products of matrices can come near 1. Reciprocals and exponentials
cannot: a flop of theirs is no fused multiplication and addition. What fits a cache can be faster than its
bytes from memory. An FFT convolution is PyTorch's own, and not among them. Prints a table and writes JSON.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Budget, Report, result_file, run, show
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from s4 import S4Layer


@dataclass
class Cell:
    """One operation: milliseconds, and what it reads, writes and computes."""

    operation: str
    case: str
    dtype: str
    ms: float
    bytes: int
    flops: int


class Recorded(TorchDispatchMode):
    """Keeps the operators of s4 that run, the last call of each, with what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note it, and let it run."""
        if func.namespace == "s4":
            self.calls[func._schema.name.removeprefix("s4::")] = (func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def cases(H: int, N: int, B: int, L: int) -> dict[str, Callable[[], Tensor]]:
    """What calls the operations; together they call each of them."""
    torch.manual_seed(0)
    layer, u = S4Layer(H, N, mode="scan"), torch.randn(B, L, H)
    gaps = 0.5 + torch.rand(B, L)

    @torch.no_grad()
    def step() -> Tensor:
        return layer.step(u[:, 0], layer.initial_state(B))[0]

    size = f"B = {B}, L = {L:,}"
    return {
        f"scan, {size}": lambda: layer(u),
        f"kernel by sums, L = {L // 4:,}": lambda: layer.kernel(L // 4, method="sums"),
        f"kernel by powers, L = {4 * L:,}": lambda: layer.kernel(4 * L, method="powers"),
        f"irregular steps, {size}": lambda: layer(u, rate=gaps),
        f"step, B = {B}": step,
    }


def recorded(call: Callable[[], Tensor]) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The operators of a case, forward and backward."""
    with Recorded() as mode:
        y = call()
        if y.requires_grad:
            y.backward(torch.randn_like(y))
    return mode.calls


def rates(quick: bool) -> dict[str, float]:
    """GB/s of a copy, read and written, and Gflop/s of products by dtype."""
    sizes, seconds = ((64,), 0.0) if quick else ((128, 256, 384, 512), 0.3)
    source = torch.randn(2**12 if quick else 2**24)
    target = torch.empty_like(source)
    found = {"copy GB/s": 2e-6 * source.nbytes / least(lambda: target.copy_(source), 3 * seconds)}
    for dtype in (torch.float32, torch.float64):
        products = []
        for size in sizes:
            A = torch.randn(size, size, dtype=dtype)
            products.append(2e-6 * size**3 / least(lambda A=A: A @ A, seconds))
        found[f"product Gflop/s, {str(dtype).removeprefix('torch.')}"] = max(products)
    return found


def floors(found: dict[str, float], c: Cell) -> dict[str, float]:
    """Milliseconds of its bytes and of its flops alone, and the larger of them over its time."""
    bytes_ms = 1e-6 * c.bytes / found["copy GB/s"]
    flops_ms = 1e-6 * c.flops / found[f"product Gflop/s, {c.dtype}"]
    return {
        "floor: bytes": bytes_ms,
        "floor: flops": flops_ms,
        "share": max(bytes_ms, flops_ms) / c.ms if c.ms else 0.0,
    }


def least(call: Callable[[], Any], seconds: float) -> float:
    """Milliseconds of this thread on the processor in the fastest of at least 3 runs."""
    times: list[float] = []
    call()
    while len(times) < 3 or (sum(times) < seconds and len(times) < 1000):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return 1e3 * min(times)


def measured(case: str, call: Callable[[], Tensor], seconds: float) -> Iterable[Cell]:
    """The operations of a case."""
    for name, (function, args, kwargs) in recorded(call).items():
        with torch.no_grad():
            output = function(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        tensors = [*inputs, *(t for t in tree_leaves(output) if isinstance(t, Tensor))]
        wide = any(t.dtype in (torch.float64, torch.complex128) for t in inputs)
        dtype = torch.float64 if wide else torch.float32
        ms = least(lambda f=function, a=args, k=kwargs: f(*a, **k), seconds)
        flops = flop_registry[function._overloadpacket](*args, **kwargs, out_val=output)
        moved = sum(t.nbytes for t in tensors)
        yield Cell(name, case, str(dtype).removeprefix("torch."), ms, moved, flops)


def main(
    budget: PositiveFloat = 300.0,
    seconds: NonNegativeFloat = 1.0,
    d_model: PositiveInt = 128,
    d_state: PositiveInt = 64,
    batch: PositiveInt = 16,
    length: PositiveInt = 1024,
    out: Path | None = None,
    replace: bool = False,
) -> None:
    """Time the operations beside their floors.

    Args:
        budget: seconds after which no further case starts.
        seconds: spent on one operation, at least 3 runs.
        d_model: H, channels.
        d_state: N, state size, even.
        batch: B, sequences.
        length: L, inputs of each.
        out: file of results; without it ~/.cache/s4/benchmarks/floors-cpu.json.
        replace: write over a committed result.
    """
    file = result_file("floors", "cpu", out, replace)
    if d_state % 2:
        raise SystemExit(f"--d_state: a state size must be even, got {d_state}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found, todo = rates(quick=seconds == 0), cases(d_model, d_state, batch, length)
        with Report(
            file, torch.device("cpu"), Budget(budget), len(todo), d_model=d_model, d_state=d_state
        ) as report:
            for case, call in todo.items():
                if not report.begin(case):
                    break
                report.add(measured(case, call, seconds), {}, 0)
                found = {name: max(rate, found[name]) for name, rate in rates(quick=seconds == 0).items()}
    finally:
        torch.set_num_threads(threads)
    rows = [asdict(c) | floors(found, c) for c in report.cells]
    show(
        ("operation", "case", "dtype", "ms", "bytes alone", "flops alone", "share"),
        (
            (
                r["operation"], r["case"], r["dtype"], f"{r['ms']:.3f}", f"{r['floor: bytes']:.3f}",
                f"{r['floor: flops']:.3f}", f"{r['share']:.0%}",
            )
            for r in rows
        ),
    )  # fmt: skip
    report.write(rows, rates=found)
    report.finish()


if __name__ == "__main__":
    run(main)
