"""Timing side by side, within a budget, and memory."""

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS = 3, 50
SAMPLE_MS = 10.0  # of one timing on a GPU, which runs on while the next operations are queued


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
        except Exception as error:  # out of memory, or whatever a kernel or its compiler raises
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
