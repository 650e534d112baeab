#!/usr/bin/env python3
"""The C++ code under the sanitizers of g++, address and undefined (tests) and thread: make sanitize.

Needs g++ with its sanitizers, and an environment with the test extra. A copy of the repository is built in
build/sanitize, so that the libraries here stay as they are. Status 1 if anything is reported.
"""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitize"
PARTS = ("s4", "tests", "examples", "benchmarks", "pyproject.toml", "setup.py")
LEVELS = {"base": ["-DS4_BYTES=16"]}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {f"v{i}": [f"-march=x86-64-v{i}", f"-DS4_BYTES={size}"] for i, size in ((3, 32), (4, 64))}
TESTS = ("backends", "kernel", "scan", "scan_inputs", "fuzz")  # at each instruction set
THEIR_OWN = ("cpu", "cpu_scan", "step", "kept", "varying")  # which go through them, or need only one
LEFT_OUT = ("in_two_gigabytes", "hold_no_more")  # these measure memory, of which sanitizers take much
OPTIONS = {
    "ASAN_OPTIONS": "halt_on_error=1:detect_leaks=0",  # Python leaks; the driver is checked for that
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "OMP_NUM_THREADS": "2",
}


def run(what: str, command: list[str], **variables: str) -> bool:
    """Whether a command ended well; its output goes to the log of `what`."""
    log, began = FOLDER / f"{what.replace(' ', '-')}.log", time.monotonic()
    with log.open("w") as file:
        environment = os.environ | OPTIONS | variables
        status = subprocess.run(command, cwd=FOLDER, env=environment, stdout=file, stderr=file).returncode
    text = log.read_text(errors="replace")
    ok = status == 0 and "Sanitizer" not in text and "runtime error" not in text
    told = text.strip().rsplit("\n", 1)[-1][:60] if ok else f"status {status}, see {log.relative_to(ROOT)}"
    print(f"{what:<24} {'ok' if ok else 'FAILED':<8} {time.monotonic() - began:5.0f} s  {told}", flush=True)
    return ok


def library(name: str) -> str:
    """Where g++ has a library, to be loaded before Python."""
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()


def driver(kind: str, level: str) -> bool:
    """Every function from several threads: tests/native_threads.cpp."""
    program = str(FOLDER / f"{kind.split(',')[0]}-{level}")
    options = ["-std=c++17", "-O1", "-g", "-pthread", f"-fsanitize={kind}", "-fno-sanitize-recover"]
    options += [f'-DS4_LEVEL="{level}"', *LEVELS[level], "tests/native_threads.cpp", "-o", program]
    name = f"{kind.split(',')[0]} {level}"
    return run(f"build {name}", ["g++", *options]) and run(name, [program], ASAN_OPTIONS="halt_on_error=1")


def main() -> None:
    """Build, then run the drivers and the tests at each instruction set that this processor has."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for part in PARTS:
        (FOLDER / part).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, FOLDER / part, **({"ignore": ignore} if copy is shutil.copytree else {}))
    python = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if not run("build", python, S4_SANITIZE="address,undefined"):
        sys.exit(1)
    ask = "from s4.backends import cpu; print(*cpu.levels())"
    preload = {"LD_PRELOAD": " ".join(map(library, ("libasan.so", "libubsan.so", "libstdc++.so")))}
    variables = os.environ | OPTIONS | preload
    asked = [sys.executable, "-c", ask]
    found = subprocess.run(asked, cwd=FOLDER, env=variables, capture_output=True, text=True)
    levels = found.stdout.split()
    if not levels:
        sys.exit(f"no library was built, or none loads, see {FOLDER / 'build.log'}\n{found.stderr}")
    good = []
    for level in levels:
        good += [driver("thread", level), driver("address,undefined", level)]
        names = (*TESTS, *THEIR_OWN) if level == levels[-1] else TESTS
        tests = [f"tests/test_{name}.py" for name in names]
        command = [sys.executable, "-m", "pytest", "-q", "--capture=sys", "-p", "no:cacheprovider"]
        command += ["-k", f"not {' and not '.join(LEFT_OUT)}", *tests]
        good.append(run(f"tests {level}", command, S4_LEVEL=level, **preload))
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
