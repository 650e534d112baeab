"""Options of a layer: checked when they are set, told by `config`, and added to from outside."""

import json
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

import s4.kernel
from s4 import S4Layer, backends, hippo, system
from s4.ops import cauchy as plain_cauchy

OWN = {
    "dplr": (torch.tensor([-0.5 + 1j, -0.2 + 4j]), torch.randn(3, 2) + 1j, torch.ones(2) + 0j),
    "diag": (torch.tensor([-0.5 + 1j, 0 + 4j]), torch.ones(2) + 0j),
}
LAYERS: dict[str, dict[str, Any]] = {
    "dplr": {},
    "two systems": {"init": "legt", "n_ssm": 2, "dt_min": 0.01, "mode": "scan"},
    "diag": {"variant": "diag", "init": "inv", "discretization": "bilinear", "dtype": torch.float64},
    "both ways": {"bidirectional": True, "backend": "torch"},
    "own": {"d_state": 4, "init": OWN["dplr"]},
    "own diag": {"d_state": 4, "variant": "diag", "init": OWN["diag"], "dtype": "float64"},
}


def same(a: S4Layer, b: S4Layer) -> None:
    """The same outputs for the same numbers, and the same options."""
    b.load_state_dict(a.state_dict())
    u = torch.randn(2, 40, a.d_model, dtype=a.D.dtype)
    assert torch.equal(a(u), b(u))
    assert a.config() == b.config()


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_layer_is_made_again_from_its_configuration(options: dict[str, Any]) -> None:
    """As the dict itself, and as a JSON file has it; one's own numbers are in it, bit by bit."""
    layer = S4Layer(4, **{"d_state": 8, **options})
    same(layer, S4Layer(**layer.config()))
    again = S4Layer(**json.loads(json.dumps(layer.config())))
    same(layer, again)
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    again.reset_parameters()
    for a, b in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


SETTINGS = [
    ({}, "discretization", "zoh", "discretization.*bilinear.*dplr.*zoh"),
    ({}, "discretization", None, "discretization.*None"),
    ({}, "mode", "bogus", "mode.*auto.*bogus"),
    ({}, "mode", ["fft"], "mode.*fft"),
    ({}, "backend", "magic", "backend.*torch.*magic"),
    ({"variant": "diag"}, "discretization", "tustin", "discretization.*zoh.*tustin"),
]


@pytest.mark.parametrize(("options", "name", "value", "match"), SETTINGS)
def test_an_option_is_checked_when_it_is_set(
    options: dict[str, Any], name: str, value: object, match: str
) -> None:
    layer = S4Layer(4, 8, **options)
    before = layer.config()
    with pytest.raises(ValueError, match=match):
        setattr(layer, name, value)
    assert layer.config() == before


@pytest.mark.parametrize(
    "name",
    ["d_model", "d_state", "variant", "init", "dt_min", "dt_max", "n_ssm", "bidirectional", "dtype"],
)
def test_what_parameters_follow_from_is_read_only(name: str) -> None:
    layer = S4Layer(4, 8)
    with pytest.raises(AttributeError, match=f"{name} is read-only"):
        setattr(layer, name, layer.config()[name])


@pytest.mark.parametrize("value", ["zoh", "bilinear"])
def test_modes_are_one_system_after_an_option_was_set(value: str) -> None:
    layer = S4Layer(4, 8, variant="diag", dtype=torch.float64).eval()
    u = torch.randn(2, 70, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.step(u[:, 0], layer.initial_state(2))  # what is kept is of the old one
        layer.discretization = value
        found = []
        for mode in ("fft", "scan"):
            layer.mode = mode
            found.append(layer(u))
        oracle.close(found[0], found[1], 1e-9)
        oracle.close(layer.step(u[:, 0], layer.initial_state(2))[0], found[0][:, 0], 1e-9)


@pytest.mark.parametrize(("name", "hint"), [("s4", "dplr"), ("s4d", "diag")])
def test_names_of_the_papers_are_told_what_they_are_here(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"variant.*{name}.*{hint}"):
        S4Layer(4, 8, variant=name)


def test_parameters_mean() -> None:
    layer = S4Layer(6, 8, n_ssm=2, init="legt", dtype=torch.float64)
    assert (layer.dt.shape, layer.Lambda.shape) == ((6,), (2, 4))
    oracle.close(layer.dt, layer.log_dt.exp(), 1e-15)
    oracle.close(layer.Lambda, torch.complex(-layer.log_A_real.exp(), layer.A_imag), 1e-15)
    layer.Lambda.abs().sum().backward()
    assert layer.A_imag.grad is not None


# Of one's own initialisation, what is refused, and what the message says.
P3 = torch.zeros(3, 2) + 0j
REFUSED = {
    "of the other variant": ({"variant": "diag", "init": OWN["dplr"]}, ValueError, r"Lambda, B\)"),
    "no tensors": ({"init": (1, 2, 3)}, (TypeError, ValueError), "Lambda of init"),
    "real": ({"init": (OWN["dplr"][0].real, *OWN["dplr"][1:])}, TypeError, "Lambda.*complex.*float32"),
    "too few modes": ({"d_state": 6, "init": OWN["dplr"]}, ValueError, r"Lambda.*d_state=6.*\(2,\)"),
    "no rank": (
        {"init": (OWN["dplr"][0], P3[:0], OWN["dplr"][2])},
        ValueError,
        r"P .*\(0, 2\)",
    ),
    "a vector P": (
        {"init": (OWN["dplr"][0], P3[0], OWN["dplr"][2])},
        ValueError,
        r"P .*\(2,\)",
    ),
    "unstable": ({"init": (-OWN["dplr"][0], *OWN["dplr"][1:])}, ValueError, "Lambda.*positive.*0.5"),
    "nan": ({"init": (*OWN["dplr"][:2], OWN["dplr"][2] * torch.nan)}, ValueError, "B .*finite"),
    "a number": ({"init": [3]}, ValueError, r"init must be a name, 'legs'.*\[3\]"),
}


@pytest.mark.parametrize(("options", "kind", "match"), REFUSED.values(), ids=REFUSED)
def test_ones_own_initialisation_is_checked(options: dict[str, Any], kind: Any, match: str) -> None:
    with pytest.raises(kind, match=match):
        S4Layer(4, **{"d_state": 4, **options})


@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.parametrize("variant", OWN)
def test_ones_own_initialisation_of_any_rank_is_the_system(variant: str, mode: str) -> None:
    """Rank 3 in every mode, and in a step: the dense recurrence, in value."""
    layer = S4Layer(3, 4, variant=variant, init=OWN[variant], mode=mode, dtype=torch.float64).eval()
    want = OWN[variant][0].to(torch.complex128)
    oracle.close(layer.Lambda[0].imag, want.imag, 1e-6)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    truth = oracle.discrete(parameters, layer.discretization)
    u = torch.randn(2, 50, 3, dtype=torch.float64)
    with torch.no_grad():
        y, state = layer(u, return_state=True)
        x, steps = layer.initial_state(2), []
        for u_t in u.unbind(1):
            y_t, x = layer.step(u_t, x)
            steps.append(y_t)
    K = oracle.kernel(truth, 50)[0]
    wanted = torch.stack(
        [sum(K[:, j] * u[:, t - j] for j in range(t + 1)) + layer.D.detach() * u[:, t] for t in range(50)], 1
    )
    oracle.close(y, wanted, 1e-9)
    oracle.close(torch.stack(steps, 1), wanted, 1e-9)
    oracle.close(state, x, 1e-9)


def backward_euler(systems: system.System) -> system.Recurrence:
    """Abar = (I - dt A)^-1, Bbar = dt Abar B, of diagonal systems: a discretisation of the user's own."""
    Lambda, _, B, C, dt, _ = systems
    a = 1 / (1 - Lambda * dt[:, None])
    none = dt.new_zeros(0, *B.shape[:-1], 2 * B.shape[-1])
    return system.Recurrence(
        system.stack(a), none, none, system.stack(a * B * dt[:, None]), system.readout(C)
    )


def test_a_discretisation_is_added_by_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(system.DISCRETIZATIONS, "euler", system.Discretization(backward_euler))
    layer = S4Layer(3, 4, variant="diag", discretization="euler", dtype=torch.float64)
    Lambda, dt = layer.Lambda.detach(), layer.dt.detach()
    B, C = oracle.complex128(layer.B), oracle.complex128(layer.C[0])
    a = 1 / (1 - dt[:, None] * Lambda)
    powers = a[..., None] ** torch.arange(1, 31)
    want = 2 * torch.einsum("hn,hnl->hl", C * B * dt[:, None], powers).real
    for method in ("auto", "sums", "powers"):
        oracle.close(layer.kernel(30, method=method), want, 1e-10)
    u = torch.randn(2, 30, 3, dtype=torch.float64)
    y = layer(u)
    for mode in ("fft", "scan"):
        layer.mode = mode
        oracle.close(layer(u), y, 1e-9)
    with pytest.raises(ValueError, match=r"discretization.*dplr.*euler"):
        S4Layer(3, 4, discretization="euler")


def test_a_discretisation_without_a_resolvent_has_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    line = system.Discretization(system.bilinear, low_rank=True)
    monkeypatch.setitem(system.DISCRETIZATIONS, "powers only", line)
    layer = S4Layer(3, 8, discretization="powers only", dtype=torch.float64)
    want = layer.kernel(20)
    with pytest.raises(ValueError, match=r"sums.*powers only"):
        layer.kernel(20, method="sums")
    layer.discretization = "bilinear"
    oracle.close(layer.kernel(20, method="sums"), want, 1e-9)


@pytest.mark.parametrize("with_backward", [True, False])
def test_a_backend_is_added_by_one_line(with_backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of one operation: it serves that, plain PyTorch the rest, and "auto" takes it if told to."""
    calls: list[str] = []

    def response(a: Tensor, F: Tensor, G: Tensor, X: Tensor, C: Tensor, L: int, dtype: torch.dtype) -> Tensor:
        calls.append("response")
        A, columns = system.dense(system.Recurrence(a, F, G, X[:, 0], C)), [X.mT]
        for _ in range(L - 1):
            columns.append(A @ columns[-1])
        return torch.einsum("chn,lhnq->cqhl", C, torch.stack(columns)).to(dtype)

    def cauchy(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
        calls.append("cauchy")
        return plain_cauchy.plain(v, z, w)

    toy = SimpleNamespace(
        status=lambda device: device.type == "cpu" or "no", cauchy=cauchy, response=response
    )
    if with_backward:
        toy.cauchy_backward = plain_cauchy.plain_backward
    monkeypatch.setitem(backends.BACKENDS, "toy", toy)
    layer = S4Layer(3, 8, backend="toy", dtype=torch.float64)
    other = S4Layer(**{**layer.config(), "backend": "torch"})
    other.load_state_dict(layer.state_dict())
    u = torch.randn(2, 25, 3, dtype=torch.float64)
    for mode in ("fft", "scan"):
        layer.mode = other.mode = mode
        grads = []
        for each in (layer, other):
            each.zero_grad()
            each(u).square().sum().backward()
            grads.append([p.grad for p in each.parameters()])
        for got, want in zip(*grads, strict=True):
            oracle.close(got, want, 1e-8)
    assert calls == ["cauchy"]
    oracle.close(layer.kernel(25, method="powers"), other.kernel(25), 1e-9)
    assert calls == ["cauchy", "response"]
    assert s4.kernel.backends()["toy"]["response"] is True
    assert "plain PyTorch" in s4.kernel.backends()["toy"]["step"]
    monkeypatch.setitem(backends.AUTO["response"], "cpu", ("toy",))
    S4Layer(3, 8, variant="diag").kernel(10).sum().backward()
    assert calls == ["cauchy", "response", "response"]


def test_a_named_backend_is_all_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="torch" computes nothing by native code, in no mode and in no step."""
    for name in ("cauchy", "response", "maps", "scan", "step"):
        monkeypatch.setattr(backends.cpu, name, lambda *_: pytest.fail("native code ran"))
    for backend in ("torch", "naive"):
        for variant in ("dplr", "diag"):
            layer = S4Layer(3, 8, variant=variant, backend=backend).eval()
            u = torch.randn(2, 30, 3)
            for mode in ("fft", "scan", "auto"):
                layer.mode = mode
                layer(u).sum().backward()
            with torch.no_grad():
                layer(u, return_state=True)
                layer.step(u[:, 0], layer.initial_state(2))
            for method in s4.kernel.METHODS:
                layer.kernel(9, method=method)


def test_initialisations_are_one_record_each() -> None:
    assert hippo.names("dplr") == ("legs", "legt", "fout")
    assert hippo.names("diag") == ("legs", "lin", "inv")
    assert {name for v in ("dplr", "diag") for name in hippo.names(v)} == set(hippo.INITS)


def test_an_initialisation_is_added_by_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def ring(N: int) -> tuple[Tensor, Tensor]:
        Lambda = -1 + 1j * torch.arange(N // 2, dtype=torch.float64)
        return Lambda, torch.ones_like(Lambda)

    monkeypatch.setitem(hippo.INITS, "ring", hippo.Init(diagonal=ring))
    layer = S4Layer(2, 6, variant="diag", init="ring")
    oracle.close(layer.Lambda[0].detach(), torch.tensor([-1 + 0j, -1 + 1j, -1 + 2j]), 1e-6)
    with pytest.raises(ValueError, match=r"init.*legs.*fout.*ring"):
        S4Layer(2, 6, init="ring")
