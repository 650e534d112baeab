"""What the benchmarks share: their command lines, timing side by side, memory, and files of results."""

import argparse
import ctypes
import inspect
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_origin

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"  # those that are committed
MIN_ROUNDS, MAX_ROUNDS = 3, 50
SAMPLE_MS = 10.0  # of one timing on a GPU, which runs on while the next operations are queued


# Command lines


def run(main: Callable[..., None]) -> None:
    """Call main with the command line; a list may be given as 256,1024 as well as [256,1024].

    Raises:
        SystemExit: a wrong option, in one line.
    """
    kinds = {name: p.annotation for name, p in inspect.signature(main).parameters.items()}
    lists = {f"--{name}" for name, kind in kinds.items() if get_origin(kind) is list}
    arguments: list[str] = []
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        if name in lists and equals:
            argument = f"{name}={_bracketed(name, value)}"
        elif arguments and arguments[-1] in lists:
            argument = _bracketed(arguments[-1], argument)
        arguments.append(argument)
    try:
        auto_cli(main, args=arguments, exit_on_error=False)
    except argparse.ArgumentError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}; see --help") from None


def _bracketed(option: str, text: str) -> str:
    if not text.strip("[] "):
        raise SystemExit(f"{option}: give at least one value")
    return text if text.startswith(("[", "--")) else f"[{text}]"


def usable(device: str) -> torch.device:
    """The device, if it is there.

    Raises:
        SystemExit: no such GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device cuda: torch {torch.__version__} finds no GPU; use --device cpu")
    return torch.device(device)


def folder(option: str, path: Path | None) -> Path | None:
    """A folder that exists, or None.

    Raises:
        SystemExit: it does not exist.
    """
    if path is not None and not path.is_dir():
        raise SystemExit(f"{option}: there is no folder {path}")
    return path


def result_file(name: str, device: str, out: Path | None, replace: bool) -> Path:
    """Where results go: `out`, or else $S4_CACHE_DIR or ~/.cache/s4, in benchmarks/NAME-DEVICE.json.

    Raises:
        SystemExit: it cannot be written, or would replace a committed result.
    """
    cache = Path(os.environ.get("S4_CACHE_DIR") or Path.home() / ".cache" / "s4")
    file = out or cache / "benchmarks" / f"{name}-{device}.json"
    if file.suffix != ".json":
        raise SystemExit(f"--out: the name of the file must end in .json, got {file}")
    if file.exists() and file.resolve().is_relative_to(RESULTS) and not replace:
        raise SystemExit(f"--out: {file} is a committed result; --replace true writes over it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".part").touch()
        file.with_suffix(".part").unlink()
    except OSError as error:
        raise SystemExit(f"--out: cannot write to {file.parent}: {error.strerror}") from None
    return file


# Time and memory


@dataclass
class Contender:
    """Who computes what, the parameters to differentiate by, and a gradient; without one, of the squares."""

    who: str
    run: Callable[[], Tensor]
    parameters: list[Tensor]
    gradient: Tensor | None = None
    autocast: torch.dtype | None = None

    def once(self, backward: bool) -> None:
        """One run, which leaves no gradients behind: the next peak counts them as taken anew."""
        kind = self.parameters[0].device.type
        reduced = torch.autocast(kind, self.autocast) if self.autocast else nullcontext()
        with torch.set_grad_enabled(backward), reduced:
            y = self.run()
            loss = y.square().sum() if backward and self.gradient is None else None
        if loss is not None:
            loss.backward()
        elif backward:
            y.backward(self.gradient)
        for p in self.parameters:
            p.grad = None


@dataclass
class Measured:
    """Milliseconds (median and quartiles over repeats) and peak MiB above the start."""

    ms: float
    ms_low: float
    ms_high: float
    mib: float


class Budget:
    """Seconds that measuring may take. What a first run takes longer than the next, to compile, is free."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._began, self._free = seconds, time.monotonic(), 0.0

    def begin(self) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def end(self) -> None:
        """Nothing more is to be measured."""
        self.seconds = 0.0

    def spent(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self._began - self._free

    def over(self) -> bool:
        """Whether nothing more is to be started."""
        return self.spent() >= self.seconds

    def spare(self, first: float, second: float) -> None:
        """Leave out what the first run of something took longer than the second."""
        self._free += max(0.0, first - second)

    def enough(self, part: float) -> int:
        """Seconds that all would take, judged by the part that is done."""
        return math.ceil(1.1 * max(self.spent(), self.seconds) / part)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def lost(device: torch.device) -> bool:
    """Whether an error has left the GPU unusable for this process."""
    try:
        synchronize(device)
    except RuntimeError:
        return True
    return False


def milliseconds(contender: Contender, backward: bool, times: int = 1) -> float:
    """Of one run, averaged over so many in a row."""
    device = contender.parameters[0].device
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        contender.once(backward)
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / times


def measure(
    found: Sequence[Contender], backward: bool, seconds: float, budget: Budget
) -> tuple[dict[str, Measured], dict[str, str]]:
    """What each contender took, and the messages of those that failed.

    Contenders take turns, so that what else the machine does meets all of them.
    """
    memory: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    turns: dict[str, int] = {}
    failed: dict[str, str] = {}
    for contender in found:
        if budget.over():
            break
        device = contender.parameters[0].device
        try:
            first = milliseconds(contender, backward)
            peak = Peak(device)
            second = milliseconds(contender, backward)
        except (
            Exception
        ) as error:  # out of memory, a kernel that fails, whatever a compiler of kernels raises
            failed[contender.who] = first_line(error)
            if lost(device):
                budget.end()
            continue
        budget.spare(first / 1e3, second / 1e3)
        memory[contender.who], times[contender.who] = peak.above_start(), [second]
        turns[contender.who] = max(1, min(10, int(SAMPLE_MS / second))) if device.type == "cuda" else 1
    spent = dict.fromkeys(times, 0.0)
    for done in range(1, MAX_ROUNDS):
        for contender in found:
            who = contender.who
            if who in times and (done < MIN_ROUNDS or spent[who] < 1e3 * seconds) and not budget.over():
                times[who].append(milliseconds(contender, backward, turns[who]))
                spent[who] += times[who][-1] * turns[who]
    measured = {}
    for who, values in times.items():
        if len(values) >= MIN_ROUNDS:
            low, median, high = statistics.quantiles(values, n=4)
            measured[who] = Measured(median, low, high, memory[who])
    return measured, failed


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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


# Results


def provenance(device: torch.device) -> dict[str, str]:
    """What measured: commit, machine and versions. $S4_COMMIT names the commit where there is no git."""
    commit = _printed("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    machine = platform.processor() or platform.machine()
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
        versions["cuda"] = str(torch.version.cuda)
        driver = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        versions["driver"] = driver.splitlines()[0] if driver else "unknown"
    return {
        "commit": commit or os.environ.get("S4_COMMIT", "unknown"),
        "machine": f"{machine}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        **versions,
    }


def _printed(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class Report:
    """A file of results, written anew after every measurement, so that a run cut short leaves what it had."""

    def __init__(self, file: Path, device: torch.device, budget: Budget, total: int, **more: object) -> None:
        self.file, self.budget, self.total, self.done = file, budget, total, 0.0
        self.cells: list[Any] = []
        self.failures: dict[str, str] = {}
        self._more = {**provenance(device), **more}
        self._progress = Progress(console=Console(stderr=True))
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> "Report":
        self.budget.begin()
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def begin(self, what: str) -> bool:
        """Show what comes next; False if there is no time for it."""
        self._progress.update(self._task, description=what)
        return not self.budget.over()

    def add(self, cells: Iterable[Any], failures: Mapping[str, str], contenders: int) -> None:
        """The cells of one size, and who failed at it, of so many contenders."""
        before = len(self.cells)
        self.cells += cells
        self.failures |= failures
        self.done += (len(self.cells) - before + len(failures)) / contenders if contenders else 1
        self._progress.advance(self._task)
        self.write()

    def write(self, cells: Sequence[dict[str, object]] | None = None, **more: object) -> None:
        """All of it; cells as dictionaries where there is more to say of them than they hold."""
        self._more |= more
        content = {
            **self._more,
            "complete": self._complete(),
            "failures": self.failures,
            "cells": cells if cells is not None else [asdict(cell) for cell in self.cells],
        }
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.file)

    def _complete(self) -> bool:
        return self.done > self.total - 1e-6

    def finish(self) -> None:
        """Say what is missing.

        Raises:
            SystemExit: nothing was measured, or something failed.
        """
        seconds, errors = self.budget.seconds, Console(stderr=True, soft_wrap=True, highlight=False)
        for where, message in self.failures.items():
            errors.print(f"failed: {where}: {message}", markup=False)
        if not self._complete():
            part = max(self.done / self.total, 0.01)
            said = (
                f"{self.done / self.total:.0%} of the cells were measured in a budget of {seconds:g} seconds"
            )
            errors.print(f"{said}; all would take about --budget {self.budget.enough(part)}")
        if self.failures or not self.cells:
            raise SystemExit(1)
        errors.print(f"results: {self.file}", markup=False)


def show(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """A table, its columns to the right."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=max(150, Console().width)).print(table)
