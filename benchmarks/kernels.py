"""Which backend is fastest, and how much memory does it take?

    pip install -e ".[test]"
    python benchmarks/kernels.py [--budget SECONDS] [--device cuda] [--official DIR]

Times the sums and `S4Layer.kernel`, forward and forward with backward, beside two baselines: the sums
broadcast in plain PyTorch ("naive"), and the original formula of a DPLR kernel, four broadcast Cauchy sums at
L/2 + 1 roots of unity. Prints a table; writes JSON and plots of time and memory to benchmarks/results/.
"""

import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import s4
from s4 import S4Layer
from s4.kernel._choice import BACKENDS, best
from s4.kernel.dplr import krylov_kernel, sums_pay
from s4.ssm import Propagator, discretize

RESULTS = Path(__file__).parent / "results"
BROADCAST_LIMIT = 2**26  # elements H n L above which baselines that hold them several times are left out
MIN_ROUNDS, MAX_ROUNDS = 3, 50


@dataclass
class Cell:
    """One measurement: milliseconds (median and quartiles over repeats) and MiB above the start."""

    what: str
    who: str
    H: int
    N: int
    L: int
    backward: bool
    ms: float
    ms_low: float
    ms_high: float
    mib: float


def original_kernel(v: Tensor, w: Tensor, L: int) -> Tensor:
    """The published formula: v (4, H, n) residues of the four sums, w (H, n) poles, broadcast."""
    node = torch.exp(-2j * torch.pi * torch.arange(L // 2 + 1, device=w.device) / L).to(w.dtype)
    z = 2 * (1 - node) / (1 + node + 1e-6)
    r = s4.kernel.cauchy(v, z, w, backend="naive")
    return torch.fft.irfft((r[0] - r[1] * r[2] / (1 + r[3])) * 2 / (1 + node + 1e-6), L)


def official_module(folder: Path) -> ModuleType:
    """models/s4/s4.py of a checkout of the original repository."""
    if not (folder / "models" / "s4" / "s4.py").is_file():
        raise FileNotFoundError(f"--official: no models/s4/s4.py in {folder}, which must be a checkout of it")
    sys.path.insert(0, str(folder))
    try:
        return import_module("models.s4.s4")
    finally:
        sys.path.remove(str(folder))


def official_sums(folder: Path) -> dict[str, Callable[..., Tensor]]:
    """The Cauchy and Vandermonde sums of a checkout of the original repository."""
    models = official_module(folder)
    return {"cauchy": models.cauchy_naive, "vandermonde": models.log_vandermonde_naive}


@dataclass
class Contender:
    """Who computes what, the parameters to differentiate by, and a gradient; without one, of the squares."""

    who: str
    run: Callable[[], Tensor]
    parameters: list[Tensor]
    gradient: Tensor | None = None


def contenders(
    H: int, N: int, L: int, device: torch.device, official: Path | None
) -> Iterator[tuple[str, list[Contender]]]:
    """What is computed at one size, and by whom."""
    n = N // 2
    v = torch.randn(H, 4, n, dtype=torch.complex64, device=device, requires_grad=True)
    w = torch.complex(-torch.rand(H, n) - 0.1, torch.randn(H, n)).to(device).requires_grad_()
    x = (0.01 * w.detach()).requires_grad_()
    z = torch.polar(torch.ones(L // 2 + 1), torch.linspace(0, torch.pi, L // 2 + 1)).to(device)
    rows = v.detach().transpose(0, 1).contiguous().requires_grad_()
    broadcast = H * n * L <= BROADCAST_LIMIT
    fused = [b for b, module in BACKENDS.items() if b != "naive" and module.status(device) is True]
    sums = [*(["naive"] if broadcast else []), *fused, "auto"]

    def cauchy(backend: str) -> Tensor:
        return s4.kernel.cauchy(v, z, w[:, None], backend=backend).abs()

    def vandermonde(backend: str) -> Tensor:
        return s4.kernel.vandermonde(v[:, :1], x[:, None], L, backend=backend)

    official = official if broadcast else None
    original = official_sums(official) if official else {}
    found = [Contender(name, partial(cauchy, name), [v, w]) for name in sums]
    if original:
        found.append(Contender("official", lambda: original["cauchy"](rows, z, w).abs(), [rows, w]))
    yield "cauchy", found
    found = [Contender(name, partial(vandermonde, name), [v, x]) for name in sums]
    if original:
        found.append(Contender("official", lambda: original["vandermonde"](v[:, 0], x, L), [v, x]))
    yield "vandermonde", found
    for what, variant in (("S4 kernel", "dplr"), ("S4D kernel", "diag")):
        layer = S4Layer(H, N, variant=variant, device=device)
        parameters = list(layer.parameters())
        found = [Contender(f"{b} sums", partial(_layer_kernel, layer, b, L), parameters) for b in fused]
        found.append(Contender("powers", partial(_powers, layer, L), parameters))
        found.append(Contender("auto", partial(_layer_kernel, layer, "auto", L), parameters))
        if what == "S4 kernel" and broadcast:
            found.append(Contender("original formula", lambda: original_kernel(rows, w, L), [rows, w]))
        yield what, found


def _layer_kernel(layer: S4Layer, backend: str, L: int) -> Tensor:
    layer.backend = backend
    return layer.kernel(L)


def _powers(layer: S4Layer, L: int) -> Tensor:
    recurrence = discretize(layer._system(rate=1.0), layer.discretization)
    return krylov_kernel(Propagator(recurrence), L, layer.D.dtype)[0]


def once(contender: Contender, backward: bool) -> float:
    """Milliseconds of one run, which leaves no gradients behind: the next peak counts them as taken anew."""
    device = contender.parameters[0].device
    _synchronize(device)
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        y = contender.run()
    if backward and contender.gradient is not None:
        y.backward(contender.gradient)
    elif backward:
        y.square().sum().backward()
    _synchronize(device)
    milliseconds = 1e3 * (time.perf_counter() - start)
    for p in contender.parameters:
        p.grad = None
    return milliseconds


def measure(
    found: list[Contender], backward: bool, seconds: float, stop: float
) -> Iterator[tuple[str, list[float]]]:
    """Who, and [median, quartiles] in milliseconds and the peak in MiB above the start.

    Contenders take turns, so that what else the machine does meets all of them.
    """
    memory, times = {}, {}
    for contender in found:
        if time.monotonic() > stop:
            return
        once(contender, backward)
        peak = Peak(contender.parameters[0].device)
        times[contender.who] = [once(contender, backward)]
        memory[contender.who] = peak.above_start()
    spent = dict.fromkeys(times, 0.0)
    for done in range(1, MAX_ROUNDS):
        for contender in found:
            if (done < MIN_ROUNDS or spent[contender.who] < 1e3 * seconds) and time.monotonic() < stop:
                times[contender.who].append(once(contender, backward))
                spent[contender.who] += times[contender.who][-1]
    for who, values in times.items():
        if len(values) >= MIN_ROUNDS:
            low, median, high = statistics.quantiles(values, n=4)
            yield who, [median, low, high, memory[who]]


class Peak:
    """Memory taken since the start: of the device, or the resident set of this process (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would hide what this one takes
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
            self.start = self._status("VmRSS")

    def above_start(self) -> float:
        """MiB between the start and the highest point since."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20 - self.start
        return self._status("VmHWM") - self.start

    @staticmethod
    def _status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def show(cells: list[Cell]) -> None:
    """One line a measurement; speed against the broadcast baseline of the same cell."""
    baseline = {
        (c.what, c.H, c.N, c.L, c.backward): c.ms for c in cells if c.who in ("naive", "original formula")
    }
    table = Table()
    for column in ("what", "who", "H", "N", "L", "pass", "ms", "quartiles", "MiB", "x baseline"):
        table.add_column(column, justify="right")
    for c in cells:
        base = baseline.get((c.what, c.H, c.N, c.L, c.backward))
        table.add_row(
            c.what, c.who, str(c.H), str(c.N), str(c.L), "fwd+bwd" if c.backward else "fwd",
            f"{c.ms:.2f}", f"{c.ms_low:.2f} - {c.ms_high:.2f}", f"{c.mib:.0f}",
            f"{base / c.ms:.1f}" if base else "",
        )  # fmt: skip
    Console(width=120).print(table)


def pick(what: str, N: int, L: int, device: torch.device) -> str:
    """The contender that "auto" is."""
    sums = best(device)
    if what in ("cauchy", "vandermonde"):
        return sums
    return f"{sums} sums" if what == "S4 kernel" and sums_pay(N, L, torch.float32, device.type) else "powers"


def verdict(cells: list[Cell], device: torch.device) -> str:
    """How often what "auto" picks was the fastest, or within a tenth of it; and where it was not."""
    groups: dict[tuple[str, int, int, int, bool], dict[str, float]] = {}
    for c in cells:
        if c.who != "auto":  # the same code as its pick, so that the two differ by noise alone
            groups.setdefault((c.what, c.H, c.N, c.L, c.backward), {})[c.who] = c.ms
    judged, missed = 0, []
    for (what, H, N, L, backward), times in groups.items():
        picked, fastest = pick(what, N, L, device), min(times, key=lambda who: times[who])
        if picked in times:
            judged += 1
            if times[picked] > 1.1 * times[fastest]:
                kind = "fwd+bwd" if backward else "fwd"
                missed.append(
                    f"{what} H={H} N={N} L={L} {kind}: {fastest} {times[picked] / times[fastest]:.2f}x"
                )
    good = f"auto picks the fastest, or within 10% of it, in {judged - len(missed)} of {judged} cells"
    return "; not in ".join([good, *missed])


def plot(cells: list[Cell], file: Path) -> None:
    """Time and memory of forward and backward against L, log-log, one line a contender."""
    kinds = list(dict.fromkeys(c.what for c in cells))
    states = sorted({c.N for c in cells})
    H, N = max(c.H for c in cells), states[len(states) // 2]
    figure, axes = plt.subplots(
        2, len(kinds), figsize=(4 * len(kinds), 7), layout="constrained", squeeze=False
    )
    for column, what in enumerate(kinds):
        for who in dict.fromkeys(c.who for c in cells if c.what == what):
            points = [c for c in cells if (c.what, c.who, c.H, c.N, c.backward) == (what, who, H, N, True)]
            for axis, values in zip(
                axes[:, column], ([c.ms for c in points], [c.mib for c in points]), strict=True
            ):
                axis.loglog([c.L for c in points], values, marker="o", label=who)
        axes[0, column].set(title=f"{what}, H = {H}, N = {N}", ylabel="ms, forward + backward")
        axes[1, column].set(xlabel="L", ylabel="peak MiB")
        axes[0, column].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def provenance(device: str) -> dict[str, object]:
    """What measured: commit, machine and version."""
    describe = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty"]
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip(),
        "machine": f"{machine}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "torch": str(torch.__version__),
    }


def main(
    budget: float = 900.0,
    seconds: float = 0.5,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    widths: list[int] = [32, 128],  # noqa: B006  # read only; a tuple has no command-line form
    states: list[int] = [16, 64, 256],  # noqa: B006
    lengths: list[int] = [256, 1024, 4096, 16384],  # noqa: B006
    official: Path | None = None,
    name: str = "kernels",
) -> None:
    """Time the kernel backends side by side, and write benchmarks/results/NAME-DEVICE.json and .png.

    Args:
        budget: seconds after which no further measurement starts.
        seconds: spent on one contender of one cell, between 3 and 50 runs.
        device: cpu or cuda.
        widths: numbers of channels H.
        states: state sizes N.
        lengths: sequence lengths L.
        official: a checkout of the original S4 repository, to run its sums in the same table.
        name: of the files written.
    """
    torch.manual_seed(0)
    sizes = [(H, N, L) for H in widths for N in states for L in lengths]
    stop, cells = time.monotonic() + budget, []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(sizes))
        for H, N, L in sizes:
            progress.update(task, description=f"H {H}, N {N}, L {L}")
            for what, found in contenders(H, N, L, torch.device(device), official):
                for backward in (False, True):
                    for who, values in measure(found, backward, seconds, stop):
                        cells.append(Cell(what, who, H, N, L, backward, *values))
            progress.advance(task)
    if not cells:
        raise SystemExit(f"nothing was measured in a budget of {budget:g} seconds: raise --budget")
    show(cells)
    summary = verdict(cells, torch.device(device))
    Console().print(summary)
    result = provenance(device) | {
        "auto": summary,
        "cells": [asdict(cell) for cell in cells],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}-{device}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(cells, RESULTS / f"{name}-{device}.png")


if __name__ == "__main__":
    auto_cli(main)
