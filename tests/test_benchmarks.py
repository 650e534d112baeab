"""The benchmark scripts run, and the files they write hold what the terminal showed."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
OFFICIAL = """
import torch

def cauchy_naive(v, z, w):
    w, v = torch.cat([w, w.conj()], -1), torch.cat([v, v.conj()], -1)
    return (v[..., None] / (z[..., None, :] - w[..., None])).sum(-2)

def log_vandermonde_naive(v, x, L):
    return 2 * (v[..., None] * torch.exp(x[..., None] * torch.arange(L))).sum(-2).real

class S4Block(torch.nn.Module):
    def __init__(self, d_model, final_act="glu", transposed=True, **layer_args):
        super().__init__()
        assert final_act is None and not transposed and layer_args.pop("activation") is None
        assert set(layer_args) == {"d_state", "l_max", "mode"}
        self.D = torch.nn.Parameter(torch.ones(d_model))

    def forward(self, x):
        return x * self.D, None
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
    assert "auto picks the fastest" in done.stdout
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


def test_layer(tmp_path: Path) -> None:
    """Everyone takes part in both passes; ratios and floors follow."""
    (tmp_path / "models" / "s4").mkdir(parents=True)
    (tmp_path / "models" / "s4" / "s4.py").write_text(OFFICIAL)
    done = run(
        "benchmarks/layer.py", "--shapes", "[[2, 64, 8], [1, 64, 33]]", "--d_state", "4",
        "--seconds", "0", "--device", "cpu", "--official", str(tmp_path), "--name", str(tmp_path / "layer"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "auto is within 15% of the faster mode in" in done.stdout
    assert (tmp_path / "layer-cpu.png").stat().st_size > 0
    result = json.loads((tmp_path / "layer-cpu.json").read_text())
    for name in [f"{s} {mode}" for s in ("S4", "S4D") for mode in ("fft", "scan", "auto")] + [
        "LSTM", "attention", "bare FFT", "original formula", "official S4", "official S4D",
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
        "benchmarks/generation.py", "--contexts", "[4, 1024]", "--batches", "[1, 2]", "--d_model", "64",
        "--n_layers", "2", "--d_state", "4", "--seconds", "0", "--cache_gib", "0.0005", "--device", "cpu",
        "--name", str(tmp_path / "generation"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    assert (tmp_path / "generation-cpu.png").stat().st_size > 0
    cells = json.loads((tmp_path / "generation-cpu.json").read_text())["cells"]
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


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("layer")


def test_layer_says_where_auto_is_wrong_and_who_sits_out(layer: ModuleType) -> None:
    def cell(who: str, ms: float, L: int = 8) -> object:
        return layer.Cell(who, 1, 64, 4, L, True, ms, ms, ms, 1.0)

    cells = [cell("S4 fft", 10), cell("S4 scan", 5), cell("S4 auto", 5.7), cell("attention", 3000, 16)]
    cells += [cell("S4D fft", 5), cell("S4D scan", 10), cell("S4D auto", 6)]
    said = layer.verdict(cells)
    assert "in 1 of 2 cells" in said
    assert "S4D (1, 64, 8) forward + backward: 1.20 times" in said
    assert "S4 (" not in said
    fits = layer.fits
    assert fits(cells, "attention", (2, 64, 32), True, 24.1, 1.0)
    assert not fits(cells, "attention", (2, 64, 32), True, 23.9, 1.0)
    assert not fits(cells, "S4 fft", (4, 64, 8), True, 1.0, 3.9 / 1024)
    assert fits(cells, "S4 fft", (4, 64, 8), True, 1.0, 4.1 / 1024)
    assert fits(cells, "LSTM", (1, 64, 8), True, 0.0, 0.0)


def test_layer_names_what_is_wrong(layer: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"multiple of 64.*65"):
        layer.main(device="cpu", shapes=[(1, 65, 8)], seconds=0)
    with pytest.raises(SystemExit, match="raise --budget"):
        layer.main(device="cpu", shapes=[(1, 64, 8)], seconds=0, budget=0)
    with pytest.raises(FileNotFoundError, match=r"no models/s4/s4\.py in"):
        layer.main(device="cpu", shapes=[(1, 64, 8)], seconds=0, official=tmp_path)


def test_the_bare_convolution_and_the_attention_are_causal(layer: ModuleType) -> None:
    torch.manual_seed(0)
    u, k = torch.randn(2, 3, 9).double(), torch.randn(3, 9).double()
    want = torch.zeros_like(u)
    for t in range(9):
        for j in range(t + 1):
            want[..., t] += k[:, t - j] * u[..., j]
    assert torch.allclose(layer.fft_convolution(u, k), want, atol=1e-12)
    attention, x = layer.CausalAttention(64), torch.randn(1, 9, 64)
    assert torch.allclose(attention(x)[:, :5], attention(x[:, :5]), atol=1e-5)
    assert not torch.allclose(attention(x)[:, 5:], attention(x[:, 5:]), atol=1e-3)


@pytest.fixture
def generation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("generation")


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"budget": 0.0}, "raise --budget"),
        ({"expand": 1}, "LSTM has .* raise --expand"),
        ({"d_model": 65}, "--d_model must be a multiple of 64.*65"),
    ],
    ids=str,
)
def test_generation_names_what_is_wrong(
    generation: ModuleType, argument: dict[str, float], match: str
) -> None:
    with pytest.raises(SystemExit, match=match):
        generation.main(**{"d_model": 64, "n_layers": 1, "contexts": [2], "device": "cpu"} | argument)


def test_the_transformer_with_a_cache_is_a_transformer(generation: ModuleType) -> None:
    """Token by token into an empty cache it gives what attention under a triangular mask gives at once."""
    torch.manual_seed(0)
    B, L, heads, width, layers = 3, 7, 2, 128, 2
    sizes = generation.Sizes(width, layers, 4, "dplr", 11, 2, L)
    model = generation.Transformer(sizes, 2 * width).double()
    tokens = torch.randint(11, (B, L))
    x = model.encoder(tokens) + model.position
    for i, mixer in enumerate(model.mixers):
        q, k, v = mixer.qkv(model.norms[2 * i](x)).view(B, L, 3, heads, width // heads).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / (width // heads) ** 0.5
        weight = torch.softmax(scores.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf), -1)
        x = x + mixer.out(torch.einsum("bhij,bjhd->bihd", weight, v).flatten(2))
        x = x + model.perceptrons[i](model.norms[2 * i + 1](x))
    want = model.decoder(model.norms[-1](x))
    with torch.no_grad():
        cache = torch.full((layers, 2, B, heads, L, width // heads), torch.nan).double()
        got = torch.stack([model.step(tokens[:, t], cache, t) for t in range(L)], 1)
    assert torch.allclose(got, want, atol=1e-12)
    assert (want[:, 1:] - want[:, :1]).abs().max() > 0.1


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "benchmarks").glob("*.py")))
def test_help(script: str) -> None:
    done = run(f"benchmarks/{script}", "--help")
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout
