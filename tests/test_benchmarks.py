"""The benchmark scripts run, and the files they write hold what the terminal showed."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from scripts import ROOT, run

pytest.importorskip("lightning", reason="the benchmarks need the extra 'examples'")

import convert
import floors
import generation
import half
import harness
import kernels
import layer
import memory
import sequences
import training

from s4 import S4Layer

# Of the original repository's models/s4/s4.py: what the benchmarks call, with the arguments they give.
OFFICIAL = """
import torch

has_pykeops, has_cuda_extension = True, False  # on a CPU neither is to be called

def cauchy_naive(v, z, w):
    w, v = torch.cat([w, w.conj()], -1), torch.cat([v, v.conj()], -1)
    return (v[..., None] / (z[..., None, :] - w[..., None])).sum(-2)

def log_vandermonde_naive(v, x, L):
    return 2 * (v[..., None] * torch.exp(x[..., None] * torch.arange(L))).sum(-2).real

class SSMKernelDPLR(torch.nn.Module):
    inits = ("legs",)

    def __init__(self, d_model, l_max, d_state, n_ssm, init, backend):
        super().__init__()
        assert backend == "naive" and init in self.inits and n_ssm == 1
        self.D = torch.nn.Parameter(torch.ones(d_model))

    def forward(self, L):
        return self.D[:, None] * torch.ones(L), None

class SSMKernelDiag(SSMKernelDPLR):
    inits = ("diag-lin",)

class FFTConv(torch.nn.Module):
    def __init__(self, d_model, l_max, activation="gelu", transposed=True, mode="dplr", **kernel):
        super().__init__()
        assert activation is None and not transposed
        kinds = {"dplr": SSMKernelDPLR, "diag": SSMKernelDiag}
        self.kernel = kinds[mode](d_model, l_max, **kernel)

    def forward(self, x):
        return x * self.kernel.D, None
"""


def refused(capsys: pytest.CaptureFixture[str], script: ModuleType, *arguments: str) -> str:
    """The message, of one line, with which a script ends before it measures."""
    with (
        mock.patch.object(sys, "argv", ["script", *arguments]),
        mock.patch.object(harness.Report, "__enter__", side_effect=AssertionError),
        mock.patch.object(layer, "milliseconds", side_effect=AssertionError),
        pytest.raises(SystemExit) as ended,
    ):
        harness.run(script.main)
    message = str(ended.value)
    assert len(message.splitlines()) == 1
    assert capsys.readouterr().out == ""
    return message


def test_kernels(tmp_path: Path) -> None:
    """A table, a plot, a file with every cell; a stand-in with the original's interface takes part."""
    (tmp_path / "models" / "s4").mkdir(parents=True)
    (tmp_path / "models" / "s4" / "s4.py").write_text(OFFICIAL)
    done = run(
        "benchmarks/kernels.py", "--widths", "2", "--states", "4", "--lengths", "8,33", "--seconds", "0",
        "--device", "cpu", "--official", str(tmp_path), "--out", str(tmp_path / "kernels.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "auto picks the fastest" in done.stdout
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.png").stat().st_size > 0
    assert result["torch"]
    assert result["complete"] is True
    assert result["failures"] == {}
    official = [(what, "official naive") for what in ("cauchy", "S4 kernel", "S4D kernel")]
    for what, who in (*official, ("S4 kernel", "original formula")):
        cells = [c for c in result["cells"] if (c["what"], c["who"]) == (what, who)]
        assert {(c["L"], c["backward"]) for c in cells} == {(8, False), (8, True), (33, False), (33, True)}
        assert all(0 < c["ms_low"] <= c["ms"] <= c["ms_high"] for c in cells)
    assert {c["who"] for c in result["cells"] if c["what"] == "S4D kernel"} >= {
        "sums",
        "powers",
        "auto",
    }


def test_a_run_that_is_cut_short_leaves_what_it_had(tmp_path: Path) -> None:
    """By its budget, which it says was too small, and by what would end any process."""
    file = tmp_path / "kernels.json"
    sizes = "--widths", "2", "--states", "4", "--lengths", "8,16,32,64", "--device", "cpu", "--out", str(file)
    done = run("benchmarks/kernels.py", *sizes, "--seconds", "0.5", "--budget", "4", "--plots", "false")
    said = re.search(r"(\d+)% of the cells .* budget of 4 seconds; .* --budget (\d+)", done.stderr)
    assert said is not None, done.stderr
    assert int(said[1]) < 100
    assert 4 < int(said[2]) < 2000
    assert json.loads(file.read_text())["complete"] is False
    file.unlink()
    process = subprocess.Popen(
        [sys.executable, "benchmarks/kernels.py", *sizes, "--seconds", "30"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(2400):
            if file.exists() or process.poll() is not None:
                break
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    assert json.loads(file.read_text())["cells"]


def test_layer(tmp_path: Path) -> None:
    """Everyone takes part in both passes; ratios and floors follow."""
    (tmp_path / "models" / "s4").mkdir(parents=True)
    (tmp_path / "models" / "s4" / "s4.py").write_text(OFFICIAL)
    done = run(
        "benchmarks/layer.py", "--shapes", "[[2, 64, 8], [1, 64, 33]]", "--d_state", "4", "--seconds", "0",
        "--device", "cpu", "--official", str(tmp_path), "--out", str(tmp_path / "layer.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "auto is within 15% of the faster mode in" in done.stdout
    assert (tmp_path / "layer.png").stat().st_size > 0
    result = json.loads((tmp_path / "layer.json").read_text())
    for name in [f"{s} {mode}" for s in ("S4", "S4D") for mode in ("fft", "scan", "auto")] + [
        "LSTM", "attention", "bare FFT", "original formula", "official S4 naive", "official S4D naive",
    ]:  # fmt: skip
        sizes = [(c["B"], c["L"], c["backward"]) for c in result["cells"] if c["who"] == name]
        assert sizes == [(2, 8, False), (2, 8, True), (1, 33, False), (1, 33, True)], name
    for c in result["cells"]:
        assert 0 < c["ms_low"] <= c["ms"] <= c["ms_high"]
        for base in ("bare FFT", "original formula"):
            other = next(
                o for o in result["cells"]
                if [o[k] for k in ("who", "B", "L", "backward")] == [base, c["B"], c["L"], c["backward"]]
            )  # fmt: skip
            assert c[f"times {base}"] == pytest.approx(other["ms"] / c["ms"])
        moved = (20 if c["backward"] else 8) * c["B"] * 64 * c["L"]
        assert c["dtype"] == "float32"
        assert bool(c["took"]) == c["who"].endswith(" auto")
        assert c["floor: bytes"] == pytest.approx(1e-6 * moved / result["rates"]["copy GB/s"])


# Held for a sequence: keys and values of 4 positions; h and c; the layers' states, the sum and the count.
MIB = {
    "Transformer": 2 * 2 * 4 * 64 * 4 / 2**20,
    "LSTM": 2 * 2 * 64 * 4 / 2**20,
    "S4": (2 * 64 * 4 * 4 + 64 * 4 + 8) / 2**20,
}


def test_generation(tmp_path: Path) -> None:
    """All contenders at all sizes, alike in parameters, with what they hold; the cache where it fits."""
    done = run(
        "benchmarks/generation.py", "--contexts", "4,1024", "--batches", "1,2", "--d_model", "64",
        "--n_layers", "2", "--d_state", "4", "--seconds", "0", "--cache_gib", "0.0005", "--device", "cpu",
        "--out", str(tmp_path / "generation.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert (tmp_path / "generation.png").stat().st_size > 0
    cells = json.loads((tmp_path / "generation.json").read_text())["cells"]
    where = {who: {(c["batch"], c["context"]) for c in cells if c["who"] == who} for who in MIB}
    assert where["S4"] == where["LSTM"] == {(1, 4), (1, 1024), (2, 4), (2, 1024)}
    assert where["Transformer"] == {(1, 4), (2, 4)}
    target = next(c["parameters"] for c in cells if c["who"] == "Transformer")
    for c in cells:
        assert abs(c["parameters"] / target - 1) < 0.05
        assert 0 < c["low"] <= c["tokens_per_second"] <= c["high"]
        assert c["held_mib"] == pytest.approx(c["batch"] * MIB[c["who"]], rel=1e-9)
    base = {c["batch"]: c["tokens_per_second"] for c in cells if c["who"] == "Transformer"}
    assert [c["times_transformer"] for c in cells] == [
        pytest.approx(c["tokens_per_second"] / base[c["batch"]]) if c["context"] == 4 else None for c in cells
    ]


def test_layer_says_where_auto_is_wrong_and_who_sits_out() -> None:
    def cell(who: str, ms: float, L: int = 8) -> object:
        return layer.Cell(ms, ms, ms, 1.0, who, 1, 64, 4, L, "float32", True)

    cells = [cell("S4 fft", 10), cell("S4 scan", 5), cell("S4 auto", 5.7), cell("attention", 3000, 16)]
    cells += [cell("S4D fft", 5), cell("S4D scan", 10), cell("S4D auto", 6)]
    said = layer.verdict(cells)
    assert "in 1 of 2 cells" in said
    assert "S4D (1, 64, 8) float32 forward + backward: 1.20 times" in said
    assert "S4 (" not in said
    fits = layer.fits
    assert fits(cells, "attention", (2, 64, 32), "float32", True, 24.1, 1.0)
    assert not fits(cells, "attention", (2, 64, 32), "float32", True, 23.9, 1.0)
    assert not fits(cells, "S4 fft", (4, 64, 8), "float32", True, 1.0, 3.9 / 1024)
    assert fits(cells, "S4 fft", (4, 64, 8), "float32", True, 1.0, 4.1 / 1024)
    assert fits(cells, "LSTM", (1, 64, 8), "float32", True, 0.0, 0.0)


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (kernels, "--lengths [0]", "lengths v>0"),
        (kernels, "--lengths 256,0", "lengths v>0"),
        (kernels, "--lengths ''", "--lengths at least one"),
        (kernels, "--lengths=[]", "--lengths at least one"),
        (kernels, "--widths=-1", "widths v>0"),
        (kernels, "--states 3", "--states must be even 3"),
        (kernels, "--budget 0", "budget v>0"),
        (kernels, "--seconds -1", "seconds v>=0"),
        (kernels, "--device gpu", "device gpu"),
        (kernels, "--device cuda", "--device finds no GPU --device cpu"),
        (kernels, "--official nowhere", "--official there is no folder nowhere"),
        (kernels, "--official {here}", "--official no models/s4/s4.py"),
        (kernels, "--out results.txt", "--out .json results.txt"),
        (kernels, "--out /dev/null/x.json", "--out cannot write /dev/null"),
        (kernels, f"--out {harness.RESULTS}/kernels-cpu.json", "committed result --replace true"),
        (kernels, "--no-such-option 1", "no-such-option"),
        (convert, "", "--official give a checkout"),
        (convert, "--official nowhere", "--official there is no folder nowhere"),
        (convert, "--official {here}", "--official no models/s4/s4.py"),
        (layer, "--shapes [[1,65,8]]", "--shapes multiple of 64 65"),
        (layer, "--shapes [[1,64,-8]]", "shapes v>0"),
        (layer, "--shapes [1,64,8]", "shapes tuple"),
        (layer, "--d_state 3", "--d_state must be even 3"),
        (layer, "--dtypes float16", "dtypes float16"),
        (generation, "--batches [0]", "batches v>0"),
        (generation, "--contexts 4,-1", "contexts v>0"),
        (generation, "--d_state 3", "--d_state must be even 3"),
        (generation, "--d_model 65", "--d_model multiple of 64 65"),
        (generation, "--d_model 64 --n_layers 1 --contexts 2 --expand 1", "LSTM has raise --expand"),
        (training, "--recipes digits,nix", "--recipes there is no recipe nix scifar"),
        (training, "--paths '{{scifar: nowhere}}'", "--paths scifar there is no folder nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_refused_in_a_line_before_anything_is_measured(
    script: ModuleType, arguments: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    message = refused(capsys, script, *shlex.split(arguments.format(here=tmp_path)))
    for word in words.split():
        assert word in message


@pytest.mark.parametrize(
    "given", ["--lengths 256,1024", "--lengths=256,1024", "--lengths [256,1024]", "--lengths=[256,1024]"]
)
def test_lists_are_taken_with_brackets_and_without(given: str) -> None:
    found: list[list[int]] = []

    def main(lengths: list[int] = [1], words: list[str] = ["a"]) -> None:  # noqa: B006
        found.append([*lengths, len(words)])

    with mock.patch.object(sys, "argv", ["script", *given.split(), "--words", "b,c"]):
        harness.run(main)
    assert found == [[256, 1024, 2]]


def test_results_go_outside_the_tree_and_over_committed_ones_only_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S4_CACHE_DIR", str(tmp_path))
    assert harness.result_file("kernels", "cpu", None, False) == tmp_path / "benchmarks" / "kernels-cpu.json"
    committed = harness.RESULTS / "kernels-cpu.json"
    assert committed.is_file()
    assert harness.result_file("kernels", "cpu", committed, True) == committed
    new = tmp_path / "new" / "folder" / "x.json"
    assert harness.result_file("kernels", "cpu", new, False) == new


def test_compiling_at_first_use_is_not_charged_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(harness.timing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(harness.timing.time, "perf_counter", lambda: now[0])
    calls: list[int] = []

    def compiled_at_first() -> torch.Tensor:
        now[0] += 0.01 if calls else 100.0
        calls.append(0)
        return parameter * 2

    parameter = torch.ones(1, requires_grad=True)
    budget = harness.Budget(10.0)
    measured, failed = harness.measure(
        [harness.Contender("it", compiled_at_first, [parameter])], False, 0.0, budget
    )
    assert failed == {}
    assert measured["it"].ms == pytest.approx(10)
    assert budget.spent() == pytest.approx(0.01 * len(calls))


def test_who_fails_costs_nobody_else_a_measurement() -> None:
    def fails() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    parameter = torch.ones(1, requires_grad=True)
    found = [
        harness.Contender("fails", fails, [parameter]),
        harness.Contender("works", lambda: parameter * 2, [parameter]),
    ]
    measured, failed = harness.measure(found, True, 0.0, harness.Budget(60.0))
    assert list(measured) == ["works"]
    assert failed == {"fails": "OutOfMemoryError: CUDA out of memory."}


def test_training_on_made_images_needs_no_data_set() -> None:
    """And they come in the recipe's batches."""
    recipe = {"task": "images", "data": {"dataset": "cifar10", "batch_size": 5}}
    with ExitStack() as made:
        data = training.data_of(recipe, None, made)
        batch = next(training.batches(data, torch.device("cpu")))
        assert batch.inputs.shape == (5, 1024, 3)
        assert len(data.train_dataloader()) >= training.HELD


def test_generation_names_a_budget_that_is_too_small(tmp_path: Path) -> None:
    done = run(
        "benchmarks/generation.py", "--d_model", "64", "--n_layers", "1", "--contexts", "2", "--batches", "1",
        "--device", "cpu", "--budget", "1e-9", "--out", str(tmp_path / "none.json"),
    )  # fmt: skip
    assert done.returncode == 1
    assert "0% of the cells" in done.stderr
    assert "--budget" in done.stderr


# Those that are run; `make gpu-bundle` by hand, as it downloads.
SCRIPTS = [
    "accuracy", "compiled", "convert", "deploy", "distributed", "floors", "generation", "gpu", "gpu_bundle",
    "half", "kernels", "layer", "memory", "peers", "sequences", "tables", "training",
]  # fmt: skip


HELP = """
import contextlib, io, runpy, sys
sys.path.insert(0, "benchmarks")
for script in sys.argv[1:]:
    sys.argv, out = [script, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(f"benchmarks/{script}.py", run_name="__main__")
    except SystemExit as ended:
        print(script, ended.code, "--" in out.getvalue())
"""


def test_help() -> None:
    """Of each script, in one process, as imports take seconds."""
    done = run("-c", HELP, *SCRIPTS)
    assert done.stdout.splitlines() == [f"{script} 0 True" for script in SCRIPTS], done.stderr
    assert sorted(SCRIPTS) == sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py"))


def test_sequences(tmp_path: Path) -> None:
    file = tmp_path / "sequences.json"
    sequences.main(seconds=0.0, threads=1, part=32, out=file)
    found = json.loads(file.read_text())
    assert found["complete"]
    assert not found["failures"]
    assert {cell["who"] for cell in found["cells"]} >= {"plain", "0.01", "rate (B, L)", "states (B, 16)"}
    for row in found["errors"]:
        bound = 1e-10 if row["dtype"] == "float64" else 1e-4
        assert max(row["value"], row["gradient"]) < bound, row


def test_floors(tmp_path: Path) -> None:
    """Every operation that a layer has; bytes and flops of a scan by hand."""
    file, (H, N, B, L) = tmp_path / "floors.json", (2, 8, 2, 64)
    floors.main(seconds=0.0, d_model=H, d_state=N, batch=B, length=L, out=file)
    found = json.loads(file.read_text())
    cells = {cell["operation"]: cell for cell in found["cells"]}
    both = {f"{name}{way}" for name in ("maps", "scan", "response", "varying") for way in ("", "_backward")}
    assert found["complete"]
    assert set(cells) == {*both, "cauchy", "cauchy_backward", "step"}
    scan, rate = cells["scan"], found["rates"]["product Gflop/s, float32"]
    T = next(t for t in range(1, L) if scan["flops"] == B * H * L // t * (2 * t * t + 4 * t * N + 2 * N * N))
    maps = H * (T * T + 2 * T * N + N * N)  # taps as a Toeplitz matrix or as T numbers
    assert 4 * 2 * B * L * H < scan["bytes"] <= 4 * (2 * B * L * H + maps + 3 * B * H * N)
    assert scan["floor: flops"] == pytest.approx(1e-6 * scan["flops"] / rate)
    assert scan["share"] == pytest.approx(max(scan["floor: flops"], scan["floor: bytes"]) / scan["ms"])


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_memory_tells_what_a_readout_of_samples_finds(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "NOISE", noise)
    lags, generator = torch.tensor([0.0, 20.0, 60.0, 150.0]), torch.Generator().manual_seed(0)
    said = memory.told("dplr", "legt", 8, 1e-2, lags.double())
    spectrum = torch.fft.rfft(torch.randn(40_000, generator=generator, dtype=torch.float64))
    spectrum[round(40_000 * memory.BANDWIDTH) :] = 0
    u = torch.fft.irfft(spectrum)
    system = S4Layer(1, 8, init="legt", dt_min=1e-2, dt_max=1e-2, dtype=torch.float64).requires_grad_(False)
    at = 2000 + torch.randint(len(u) - 2000, (1, 20_000), generator=generator)
    x = system.states(u[None, :, None], at)[0, :, 0]
    x += noise * x.std(0) * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    for lag, expected in zip(lags.long(), said, strict=True):
        wanted = u[at[0] - lag]
        left = wanted - x @ torch.linalg.lstsq(x, wanted[:, None]).solution[:, 0]
        assert float(expected) == pytest.approx(1 - float(left.var() / wanted.var()), abs=0.03)
    assert (said[1] > 0.99) == (noise < 0.1)
    assert said[3] < 0.2  # the window is 100 steps


def test_memory_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LAG", 5)
    monkeypatch.setattr(memory, "LENGTH", 200)
    options = {"variant": "diag", "init": "lin", "d_state": 16, "dt_min": 1e-1, "dt_max": 1e-1}
    before, after = (memory.delay(options, 0, steps)["r2"] for steps in (0, 60))
    assert before < 0.3
    assert 0.7 < after < 1


def test_what_rounding_costs() -> None:
    """Given the rounded numbers, no more than the rounding of outputs."""
    for row in half.fresh(4, 16, 3):
        eps = torch.finfo(getattr(torch, row["dtype"])).eps
        assert row["error"]["kernel"] < 1e-6
        assert row["error"]["output in float32"] < 1e-6 < row["error"]["output"] < eps
        assert all(0 <= least <= most < 1 for least, most in row["rounding"].values())
        assert min(row["rounding"][name][1] for name in ("log_dt", "A_imag", "C", "D", "all")) > 0
