"""Files of results with what measured them, and tables."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from harness.timing import Budget

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"  # those that are committed


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


def provenance(device: torch.device) -> dict[str, str]:
    """What measured: commit, machine and versions. $S4_COMMIT names the commit of a copy."""
    commit = _printed("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    machine = platform.processor() or platform.machine()
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    if device.type == "cuda":
        machine = torch.cuda.get_device_name()
        versions["cuda"] = str(torch.version.cuda)
        driver = _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        versions["driver"] = driver.splitlines()[0] if driver else "unknown"
    return {
        "commit": os.environ.get("S4_COMMIT") or commit or "unknown",
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
