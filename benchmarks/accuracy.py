"""How exact is float32? Kernels, and the convolution against the recurrence, beside dense float64 truth.

    pip install -e ".[test]"
    python benchmarks/accuracy.py [--quick true] [--out FILE.json]

Prints a table of the largest errors as fractions of the largest value, and writes it with machine, versions
and commit.
"""

import json
import sys
from pathlib import Path

import torch
from harness import ROOT, provenance, result_file, run
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from s4 import S4Layer

sys.path.insert(0, str(ROOT / "tests"))

import oracle  # the float64 truth of the test suite, which shares no code with s4

BOUND = 1e-5
DT_RANGE = (1e-4, 1e-1)
CASES = [
    ("dplr", "legs", "auto"),
    ("dplr", "legs", "torch"),
    ("dplr", "fout", "torch"),
    ("dplr", "legt", "auto"),
    ("dplr", "fout", "auto"),
    ("diag", "legs", "auto"),
    ("diag", "lin", "auto"),
    ("diag", "inv", "auto"),
]


def layer_with_spread_dt(variant: str, init: str, N: int, backend: str, channels: int = 7) -> S4Layer:
    """A float32 layer whose channels cover the whole range of dt."""
    layer = S4Layer(channels, N, variant=variant, init=init, backend=backend)
    with torch.no_grad():
        ends = torch.tensor(DT_RANGE).log()
        layer.log_dt.copy_(torch.linspace(float(ends[0]), float(ends[1]), channels))
    return layer


def kernel_error(layer: S4Layer, truth: Tensor) -> float:
    """Largest |K - truth| of a channel over its largest |truth|, worst of all channels."""
    with torch.no_grad():
        error = (layer.kernel(truth.shape[-1]).double() - truth).abs().amax(-1)
    return float((error / truth.abs().amax(-1)).max())


def step_error(variant: str, dtype: torch.dtype, L: int = 4096) -> float:
    """Largest difference between forward and step over L steps of unit-variance noise, absolute."""
    layer = S4Layer(16, 64, variant=variant, dtype=dtype)
    u, state, worst = torch.randn(2, L, 16, dtype=dtype), layer.initial_state(2), 0.0
    with torch.no_grad():
        y = layer(u)
        for t in range(L):
            y_t, state = layer.step(u[:, t], state)
            worst = max(worst, float((y_t - y[:, t]).abs().max()))
    return worst


def main(quick: bool = False, out: Path | None = None, replace: bool = False) -> None:
    """Measure the largest errors of float32 beside dense float64 truth.

    Args:
        quick: leave out L = 65536.
        out: file of results; without it ~/.cache/s4/benchmarks/accuracy-cpu.json.
        replace: write over a committed result.
    """
    file = result_file("accuracy", "cpu", out, replace)
    lengths = (1024, 16384) if quick else (1024, 16384, 65536)
    torch.manual_seed(0)
    rows = []
    for N in (64, 256):
        for variant, init, backend in track(CASES, f"N = {N}", console=Console(stderr=True)):
            layer = layer_with_spread_dt(variant, init, N, backend)
            system = oracle.discrete(dict(layer.named_parameters()), layer.discretization)
            with torch.no_grad():
                truth = oracle.long_kernel(system, max(lengths))[0]
            errors = {L: kernel_error(layer, truth[:, :L]) for L in lengths}
            rows.append({"variant": variant, "init": init, "backend": backend, "N": N, "error": errors})
    steps = {
        f"{variant} {str(dtype).removeprefix('torch.')}": step_error(variant, dtype)
        for variant in ("dplr", "diag")
        for dtype in (torch.float32, torch.float64)
    }
    show(rows, steps, lengths)
    result = {
        **provenance(torch.device("cpu")),
        "dt": DT_RANGE,
        "kernel": rows,
        "forward_against_step_at_4096": steps,
    }
    file.write_text(json.dumps(result, indent=1) + "\n")
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"results: {file}", markup=False)


def show(rows: list[dict], steps: dict[str, float], lengths: tuple[int, ...]) -> None:
    """The tables on the terminal."""
    table = Table(title=f"float32 kernel: error / max |K|, dt {DT_RANGE[0]} to {DT_RANGE[1]}, bound {BOUND}")
    for column in ("variant", "init", "backend", "N", *(f"L = {L}" for L in lengths)):
        table.add_column(column, justify="right")
    for row in rows:
        errors = [f"{'[red]' if e > BOUND else ''}{e:.1e}" for e in row["error"].values()]
        table.add_row(row["variant"], row["init"], row["backend"], str(row["N"]), *errors)
    console = Console()
    console.print(table)
    for name, error in steps.items():
        console.print(f"forward against step, L = 4096, {name}: {error:.1e}")


if __name__ == "__main__":
    run(main)
