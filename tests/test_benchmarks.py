"""The benchmark scripts run, and the files they write hold what the terminal showed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OFFICIAL = """
import torch

def cauchy_naive(v, z, w):
    w, v = torch.cat([w, w.conj()], -1), torch.cat([v, v.conj()], -1)
    return (v[..., None] / (z[..., None, :] - w[..., None])).sum(-2)

def log_vandermonde_naive(v, x, L):
    return 2 * (v[..., None] * torch.exp(x[..., None] * torch.arange(L))).sum(-2).real
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_kernels(tmp_path: Path) -> None:
    """A table, a plot, a file with every cell; a stand-in with the original's interface takes part."""
    (tmp_path / "models" / "s4").mkdir(parents=True)
    (tmp_path / "models" / "s4" / "s4.py").write_text(OFFICIAL)
    done = run(
        "benchmarks/kernels.py", "--widths", "[2]", "--states", "[4]", "--lengths", "[8, 33]",
        "--seconds", "0", "--device", "cpu", "--official", str(tmp_path), "--name", str(tmp_path / "kernels"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "auto is the fastest" in done.stdout
    result = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert (tmp_path / "kernels-cpu.png").stat().st_size > 0
    assert result["torch"]
    for what, who in (("cauchy", "official"), ("vandermonde", "official"), ("S4 kernel", "original formula")):
        cells = [c for c in result["cells"] if (c["what"], c["who"]) == (what, who)]
        assert {(c["L"], c["backward"]) for c in cells} == {(8, False), (8, True), (33, False), (33, True)}
        assert all(0 < c["ms_low"] <= c["ms"] <= c["ms_high"] for c in cells)
    assert {c["who"] for c in result["cells"] if c["what"] == "S4D kernel"} >= {
        "torch sums",
        "powers",
        "auto",
    }


def test_kernels_stops_at_its_budget_and_names_what_is_wrong(tmp_path: Path) -> None:
    done = run("benchmarks/kernels.py", "--budget", "0", "--device", "cpu", "--name", str(tmp_path / "none"))
    assert done.returncode != 0
    assert "raise --budget" in done.stderr
    done = run(
        "benchmarks/kernels.py", "--official", str(tmp_path), "--device", "cpu", "--name", str(tmp_path / "x")
    )
    assert done.returncode != 0
    assert "no models/s4/s4.py in" in done.stderr


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "benchmarks").glob("*.py")))
def test_help(script: str) -> None:
    done = run(f"benchmarks/{script}", "--help")
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout
