#!/usr/bin/env python3
"""The suite on every Python, torch and instruction set that is promised: before a release, make compat.

A row is an environment and what is set in it. Environments, the log of each row and table.md, the last result
of every row, are in build/compat. Environments are used again, brought up to date; delete them to begin anew.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "compat"
COLUMNS = ("row", "Python", "torch", "triton", "passed", "failed", "skipped", "minutes", "date", "commit")
VERSIONS = """
import json, platform
from importlib import metadata
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return "none"
import torch
print(json.dumps({"Python": platform.python_version(), "torch": torch.__version__,
                  "triton": version("triton"), "capability": torch.backends.cpu.get_cpu_capability()}))
"""


class Row(NamedTuple):
    """One run of the suite: the Python, what pip is asked for, and the instruction set of s4 and of torch."""

    python: str
    torch: str = "torch"
    level: str = ""
    capability: str = ""


ROWS = {
    "oldest": Row("3.10", "torch==2.9.*"),
    "cpu": Row("3.11", "torch==2.13.0+cpu"),
    "3.11": Row("3.11"),
    "3.12": Row("3.12"),
    "3.13": Row("3.13"),
    "base": Row("3.11", level="base", capability="default"),
    "v3": Row("3.11", level="v3", capability="avx2"),
    "v4": Row("3.11", level="v4", capability="avx512"),
}
CAPABILITIES = ["default", "avx2", "avx512"]  # each with all that those before have


class NoResult(Exception):
    """Why a row has no result."""


def interpreter(version: str) -> str:
    """A Python of this version: python3.X on the path, or the newest of pyenv's.

    Raises:
        NoResult: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    newest = sorted(pyenv.glob(f"{version}.*"), key=lambda path: path.name.split(".")[-1].zfill(3))[::-1]
    for python in (shutil.which(f"python{version}"), *(folder / "bin" / "python" for folder in newest)):
        # Asked, as what is on the path may be a shim that leads nowhere.
        ask = [str(python), "-c", "import sys; print(*sys.version_info[:2], sep='.')"]
        if python and subprocess.run(ask, capture_output=True, text=True).stdout.strip() == version:
            return str(python)
    raise NoResult(f"no python{version} on the path or in {pyenv}")


def environment(row: Row, log: Path, limit: float) -> Path:
    """The Python of the row's environment, made or brought up to date.

    Raises:
        NoResult: it cannot be made.
    """
    folder = FOLDER / f"python{row.python}-{row.torch.replace('==', '-').removesuffix('.*')}"
    python = folder / "bin" / "python"
    make = [] if python.exists() else [[interpreter(row.python), "-m", "venv", str(folder)]]
    install = [str(python), "-m", "pip", "install", "-q", "--upgrade", "-e", ".[test]", row.torch]
    for command in (*make, install):
        if run(command, log, limit):
            raise NoResult(f"failed: {' '.join(command[1:])}, see {log.relative_to(ROOT)}")
    return python


def run(command: list[str], log: Path, limit: float, **variables: str) -> int:
    """The status of a command whose output goes to the log.

    Raises:
        NoResult: it took longer than the limit, in seconds, and was killed with all that it had started.
    """
    with log.open("a") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | variables, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            raise NoResult(f"stopped after {limit / 60:g} minutes, see {log.relative_to(ROOT)}") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def measure(name: str, limit: float, ready: dict[tuple[str, str], Path]) -> dict[str, str]:
    """One row of the table; `ready` has the environments that this call has made ready."""
    row, log, began = ROWS[name], FOLDER / f"{name}.log", time.monotonic()
    log.unlink(missing_ok=True)
    result = {"row": name, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
    try:
        python = ready.get(row[:2]) or environment(row, log, limit)
        ready[row[:2]] = python
        asked = subprocess.run([str(python), "-c", VERSIONS], capture_output=True, text=True, check=True)
        versions = json.loads(asked.stdout)
        result |= {key: versions[key] for key in ("Python", "torch", "triton")}
        best = versions["capability"].lower()
        best = best if best in CAPABILITIES else "default"
        if row.capability and row.capability not in CAPABILITIES[: CAPABILITIES.index(best) + 1]:
            raise NoResult(f"this processor has {best}, not {row.capability}")
        levels = {"S4_LEVEL": row.level, "ATEN_CPU_CAPABILITY": row.capability} if row.level else {}
        suite = [str(python), "-m", "pytest", "-q", "-n", os.environ.get("WORKERS", "auto")]
        status = run(suite, log, limit, OMP_NUM_THREADS="1", **levels)
        text = log.read_text(errors="replace")
        ends = re.findall(r"^.*\d passed.* in [\d.]+s.*$", text, re.MULTILINE)
        if status not in (0, 1) or not ends:
            raise NoResult(f"pytest ended with status {status}, see {log.relative_to(ROOT)}")
        counts = {what: number for number, what in re.findall(r"(\d+) (\w+?)s?\b", ends[-1])}
        failed = int(counts.get("failed", 0)) + int(counts.get("error", 0))
        result |= {"passed": counts["passed"], "failed": str(failed), "skipped": counts.get("skipped", "0")}
        tests = Counter(re.findall(r"^(?:FAILED|ERROR) ([^\[\s]+)", text, re.MULTILINE))
        result["notes"] = ", ".join(f"{number} {test}" for test, number in tests.items())
    except (NoResult, OSError, subprocess.SubprocessError) as error:
        result["notes"] = f"no result: {error}"
    return result | {"minutes": f"{(time.monotonic() - began) / 60:.0f}"}


def commit() -> str:
    """What is checked out, with -dirty for changes that are not committed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def table() -> str:
    """The last result of each row that was ever run, in Markdown."""
    files = [file for name in ROWS if (file := FOLDER / f"{name}.json").is_file()]
    results = [json.loads(file.read_text()) for file in files]
    lines = [f"{processor()}, {os.cpu_count()} cores, {platform.platform()}", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(result.get(column, "") for column in COLUMNS) + " |" for result in results]
    notes = [f"- {result['row']}: {result['notes']}" for result in results if result.get("notes")]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def processor() -> str:
    """Its name."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def main() -> None:
    """Run the rows that are named, or all; status 1 if one of them failed or did not run."""
    known = "\n".join(f"  {name:<8} {' '.join(filter(None, row))}" for name, row in ROWS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"rows:\n{known}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="the rows to run; all if none is named")
    parser.add_argument(
        "--minutes", type=float, default=90, help="the most that installing, and testing, may take"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.rows) - set(ROWS)):
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through every finally
    FOLDER.mkdir(parents=True, exist_ok=True)
    ready: dict[tuple[str, str], Path] = {}
    results = []
    try:
        for name in options.rows or ROWS:
            print(f"{name} ...", flush=True)
            results.append(measure(name, 60 * options.minutes, ready))
            (FOLDER / f"{name}.json").write_text(json.dumps(results[-1]))
    finally:
        (FOLDER / "table.md").write_text(table() + "\n")
        print(f"\n{table()}\n\nalso in {FOLDER.relative_to(ROOT) / 'table.md'}")
    sys.exit(any(result.get("failed") != "0" for result in results))


if __name__ == "__main__":
    main()
