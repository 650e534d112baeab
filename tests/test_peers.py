"""The benchmark of other libraries' layers: who takes part, what is measured, what is said of the others."""

import json
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning", reason="the benchmarks need the extra 'examples'")

import harness
import peers
from contenders import libraries

H, N = 4, 6

# Of the original repository's models/s4/s4.py: what is called, with its parameters' names, shapes and signs.
OFFICIAL = """
import torch
from torch import nn

has_pykeops = has_cuda_extension = False
SSMKernelDPLR = SSMKernelDiag = None

class Kernel(nn.Module):
    def __init__(self, H, N, low_rank):
        super().__init__()
        n, self.disc = N // 2, "zoh"
        self.inv_dt = nn.Parameter(torch.empty(H, 1).uniform_(-1, 0))
        self.A_real = nn.Parameter(torch.full((1, n), -0.7))
        self.A_imag = nn.Parameter(3.0 * torch.arange(n)[None])
        self.B = nn.Parameter(torch.randn(1, 1, n, 2))
        self.C = nn.Parameter(torch.randn(1, H, n, 2))
        if low_rank:
            self.P = nn.Parameter(torch.randn(1, 1, n, 2))

    def matrices(self):
        def both(x):
            x = torch.view_as_complex(x)
            return torch.cat([x, x.conj()], -1)
        dt = self.inv_dt[:, :, None].exp()
        half = torch.complex(-self.A_real.exp(), -self.A_imag)
        A, B = torch.diag_embed(torch.cat([half, half.conj()], -1)), both(self.B)[0, 0][:, None]
        one = torch.eye(A.shape[-1])
        if hasattr(self, "P"):
            P = both(self.P)[0]
            A = A - P[:, :, None] * P.conj()[:, None]
            left = torch.linalg.inv(one - dt / 2 * A)
            return left @ (one + dt / 2 * A), left @ (dt * B), both(self.C)[0]
        step = torch.matrix_exp(dt * A)
        return step, torch.linalg.solve(A, (step - one) @ B), both(self.C)[0]

    def forward(self, L):
        A, x, C = self.matrices()
        k = []
        for _ in range(L):
            k.append((C[:, None] @ x).real[:, 0, 0])
            x = A @ x
        return torch.stack(k, -1)[None], None

class FFTConv(nn.Module):
    def __init__(self, d_model, l_max, d_state, mode, init, n_ssm, activation, transposed, backend):
        super().__init__()
        assert (activation, transposed, backend, n_ssm) == (None, False, "naive", 1)
        assert init == {"dplr": "legs", "diag": "diag-lin"}[mode]
        self.d_model, self.D = d_model, nn.Parameter(torch.randn(1, d_model))
        self.kernel = Kernel(d_model, d_state, mode == "dplr")

    def forward(self, u):
        k = self.kernel(L=u.shape[1])[0][0]
        f = torch.fft.rfft(u.mT, 2 * u.shape[1]) * torch.fft.rfft(k, 2 * u.shape[1])
        return torch.fft.irfft(f)[..., :u.shape[1]].mT + u * self.D, None

    def setup_step(self):
        self.system = self.kernel.matrices()

    def default_state(self, batch):
        return torch.zeros(batch, *self.system[2].shape, dtype=self.system[2].dtype)

    def step(self, u, state):
        A, B, C = self.system
        state = (A @ state[..., None] + B * u[..., None, None])[..., 0]
        return (C * state).sum(-1).real + u * self.D, state
"""


class FakeS5(nn.Module):
    """As s5.S5, with complex parameters and an imprecise float32."""

    def __init__(self, width: int, state_width: int) -> None:
        super().__init__()
        self.width, self.seq = width, nn.Module()
        self.seq.Lambda = nn.Parameter(torch.polar(torch.full((state_width,), 0.9), torch.rand(state_width)))
        self.seq.B = nn.Parameter(torch.randn(state_width, width, dtype=torch.complex64))
        self.seq.forward_rnn = self.one

    def one(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.seq.Lambda * state + self.seq.B @ u.to(state)
        return (self.seq.B.mH @ state).real, state

    def forward(self, u: Tensor) -> Tensor:
        state, y = u.new_zeros(u.shape[0], len(self.seq.Lambda)).to(self.seq.Lambda), []
        for u_t in u.unbind(1):
            y_t, state = torch.vmap(self.one)(u_t, state)
            y.append(y_t)
        return torch.stack(y, 1)


class FakeMamba(nn.Module):
    """As mamba_ssm.Mamba: a step takes (B, 1, H) and two states, which it changes in place."""

    def __init__(self, d_model: int, d_state: int, expand: int, headdim: int = 1) -> None:
        super().__init__()
        self.d_model, self.shape = d_model, (expand * d_model // headdim, headdim * d_state)
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, u: Tensor) -> Tensor:
        return self.linear(u)

    def allocate_inference_cache(self, batch: int, longest: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(batch, self.d_model, 4), torch.zeros(batch, *self.shape)

    def step(self, u: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert u.shape[1] == 1
        return self.linear(u), conv, ssm.add_(1)


class FakeAttention(nn.Module):
    """As a layer of fla.layers: outputs, attention weights and a cache, which it changes in place."""

    def __init__(self, hidden_size: int, num_heads: int, layer_idx: int, **more: Any) -> None:
        super().__init__()
        self.hidden_size, self.heads, self.layer = hidden_size, num_heads, layer_idx
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, u: Tensor, past_key_values: Any = None, use_cache: bool = False) -> tuple[Any, ...]:
        if use_cache:
            head = self.hidden_size // self.heads
            past_key_values[:] = [
                {"recurrent_state": u.new_ones(len(u), self.heads, head, head), "conv": None}
            ]
        return self.linear(u), None, past_key_values


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Packages that are said to be installed; stand-ins for them can be imported."""
    here: dict[str, str] = {"torch": torch.__version__}

    def version(package: str) -> str:
        if package not in here:
            raise metadata.PackageNotFoundError(package)
        return here[package]

    monkeypatch.setattr(libraries.metadata, "version", version)
    for name, content in {
        "s5": {"S5": FakeS5},
        "mamba_ssm": {"Mamba": FakeMamba, "Mamba2": FakeMamba},
        "fla": {},
        "fla.layers": {"GatedLinearAttention": FakeAttention, "GatedDeltaNet": FakeAttention},
        "fla.models": {},
        "fla.models.utils": {"Cache": list},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return here


def test_who_is_here_is_measured_and_of_the_others_it_is_said_why_not(
    installed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed |= {"s5-pytorch": "0.2", "flash-linear-attention": "1"}
    (tmp_path / "models" / "s4").mkdir(parents=True)
    (tmp_path / "models" / "s4" / "s4.py").write_text(OFFICIAL)
    names = ("models", "models.s4", "models.s4.s4")
    with mock.patch.dict(sys.modules):
        for name in names:
            sys.modules.pop(name, None)
        file = tmp_path / "peers.json"
        peers.main(seconds=0.0, device="cpu", shapes=[(2, H, 5)], d_state=N, official=tmp_path, out=file)
    found = json.loads(file.read_text())
    assert found["complete"]
    assert not found["failures"]
    who = ["S4", "S4D", "GRU", "LSTM", "S5", "official S4 naive", "official S4D naive"]
    for what in peers.WORK:
        cells = {c["who"]: c for c in found["cells"] if c["what"] == what}
        assert list(cells) == who
        assert all(0 < c["ms_low"] <= c["ms"] <= c["ms_high"] for c in cells.values())
        states = [cells[name]["state"] for name in who]
        assert states == [H * N, H * N, H, 2 * H, 2 * H, 2 * H * N, 2 * H * N]
        assert cells["GRU"]["parameters"] == sum(p.numel() for p in nn.GRU(H, H).parameters())
    assert [e["who"] for e in found["errors"]] == who
    for e in found["errors"]:
        # float32 has 6e-8 and the systems are small; a wrong sign or order shows as 0.1 or more.
        assert 0 < max(e["output"], e["gradient"]) < 1e-3, e
        assert e["step"] < 1e-3, e
        assert (e["kernel"] is None) == (e["who"] in ("GRU", "LSTM", "S5")), e
        assert e["kernel"] is None or 0 < e["kernel"] < 1e-3, e
    assert found["versions"]["s5-pytorch"] == "0.2"
    assert found["absent"] == {
        "mamba-ssm": "not installed: pip install mamba-ssm",
        "flash-linear-attention": "needs a GPU",
    }
    assert "pip install mamba-ssm" in capsys.readouterr().out


def test_layers_that_need_a_gpu_have_the_state_of_s4(installed: dict[str, str]) -> None:
    heads, width = 4, 32
    for make in (libraries.mamba, libraries.fla):
        for peer in make(width, width // heads, 5):
            u = torch.randn(2, 3, width)
            y = peer.step(u[:, 0], peer.start(2))[0]
            assert torch.allclose(y, peer(u)[:, 0], atol=1e-5)
            conv = 4 * width if make is libraries.mamba else 0
            assert peer.numbers() == width * width // heads + conv
            assert peer.no_float64
            exact = peers.errors(peer, 2, 5)
            assert exact["output"] == exact["gradient"] == peer.no_float64
            assert exact["kernel"] is None
            assert exact["step"] < 1e-5


def test_a_package_that_fails_costs_nobody_else_a_place(installed: dict[str, str]) -> None:
    def broken(*size: int) -> None:
        raise ImportError("libcudart.so is not here\nand more")

    absent: dict[str, str] = {"s5-pytorch": "not installed"}
    kinds = libraries.LIBRARIES | {"mamba-ssm": (broken, False)}
    with mock.patch.object(libraries, "LIBRARIES", kinds):
        found = libraries.peers(None, absent, torch.device("cpu"), H, N, 5)
    assert [peer.who for peer in found] == ["S4", "S4D", "GRU", "LSTM"]
    assert absent["mamba-ssm"] == "ImportError: libcudart.so is not here"
    assert libraries.versions(None)[1]["original"].startswith("not given: --official")


def test_the_originals_sums_sit_out_where_they_do_not_fit() -> None:
    official = SimpleNamespace(
        layers=lambda *size: {f"official S4 {b}": nn.Identity() for b in ("naive", "cuda")}
    )
    for L, count in ((1 << 14, 2), (1 << 15, 1)):
        assert len(libraries.original(official, 128, 64, L)) == count


def test_a_step_is_one_of_those_that_were_timed() -> None:
    measured = harness.Measured(32.0, 16.0, 48.0, 7.0)
    assert peers.each(measured, "step") == harness.Measured(2.0, 1.0, 3.0, 7.0)
    assert peers.each(measured, "forward") == measured


def test_refusals() -> None:
    with (
        mock.patch.object(sys, "argv", ["peers", "--d_state", "3"]),
        pytest.raises(SystemExit, match="--d_state: a state size must be even, got 3"),
    ):
        harness.run(peers.main)
