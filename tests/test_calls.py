"""How many of our functions a reader has to follow: through `forward` in each mode, and through `step`.

`python tests/test_calls.py` lists them.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch

import s4.kernel
from s4 import S4Layer

ROOT = str(Path(s4.__file__).parent)


class Calls(NamedTuple):
    """The deepest chain of our frames below the first, and all functions entered, as file:name."""

    chain: list[str]
    entered: list[str]


def files(names: list[str]) -> set[str]:
    return {name.split(":")[0] for name in names}


def trace(run: Callable[[], object]) -> Calls:
    """Calls of `run` after two to warm up, on one thread."""
    run(), run()
    chain: list[str] = []
    entered: dict[str, None] = {}

    def name(frame: FrameType) -> str | None:
        code = frame.f_code
        if not code.co_filename.startswith(ROOT):
            return None
        if code.co_name.startswith("<"):  # a comprehension is part of its function, as Python 3.12 has it
            return None
        return f"{code.co_filename[len(ROOT) + 1 :]}:{getattr(code, 'co_qualname', code.co_name)}"

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal chain
        if event != "call" or (here := name(frame)) is None:
            return
        entered[here] = None
        ours, at = [], frame.f_back
        while at is not None:
            ours.append(name(at))
            at = at.f_back
        below = [here, *filter(None, ours)][::-1][1:]
        if len(below) > len(chain):
            chain = below

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return Calls(chain, list(entered))


def measured(way: str) -> Calls:
    """Of a fresh layer: "fft" and "scan" at L = 1000, "step" as a trained layer generates."""
    layer = S4Layer(16, 64, mode="auto" if way == "step" else way)
    if way == "step":
        layer.eval()
        u, state = torch.randn(1, 16), layer.initial_state(1)
        with torch.no_grad():
            return trace(lambda: layer.step(u, state))
    u = torch.randn(2, 1000, 16)
    return trace(lambda: layer(u))


# Way, and at most: frames in the deepest chain below, in files; functions entered in all, in files.
LIMITS = {"fft": (6, 5, 36, 9), "scan": (7, 5, 35, 10), "step": (4, 4, 14, 6)}
REPORT = """
import subprocess
import sys
sys.path.insert(0, {tests!r})
from test_calls import files, measured
for way in {ways!r}:
    calls = measured(way)
    print(way, len(calls.chain), len(files(calls.chain)), len(calls.entered), len(files(calls.entered)))
"""


@pytest.mark.skipif(isinstance(s4.kernel.backends()["cpu"], str), reason="counts the way of the fused code")
def test_a_layer_can_be_followed() -> None:
    """In a process of its own: the shape checks of pytest are functions, too."""
    program = REPORT.format(tests=str(Path(__file__).parent), ways=tuple(LIMITS))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {way: tuple(map(int, counts)) for way, *counts in map(str.split, done.stdout.splitlines())}
    assert found.keys() == LIMITS.keys()
    for way, limits in LIMITS.items():
        assert all(n <= most for n, most in zip(found[way], limits, strict=True)), (way, found[way])


if __name__ == "__main__":
    for each in LIMITS:
        calls = measured(each)
        print(f"{each}: a chain of {len(calls.chain)} in {len(files(calls.chain))} files,", end=" ")
        print(f"{len(calls.entered)} functions in {len(files(calls.entered))} files")
        print("  " + " > ".join(calls.chain), *calls.entered, sep="\n  ")
