"""Programs run in processes of their own, as a user would start them."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def process(program: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(running: subprocess.Popen[str]) -> str:
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err[-3000:]
    assert "Traceback" not in err, err[-3000:]  # as from a handler at exit
    return out.strip()


def once(tmp_path_factory: pytest.TempPathFactory, name: str, play: Callable[[Path], None]) -> Path:
    """A folder with what `play` writes into it, once for all tests of all workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # which all workers share
    found = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            found.mkdir()
            play(found)
    return found


def lines(script: str, *arguments: str) -> list[list[Any]]:
    """What a script of this folder prints, each line a list; it imports s4 without the checks of shapes."""
    folder = Path(__file__).parent
    program = f"import runpy, sys; sys.path.insert(0, {str(folder)!r}); "
    program += f"runpy.run_path({str(folder / script)!r}, run_name='__main__')"
    return [json.loads(line) for line in printed(process(program, *arguments)).splitlines()]
