"""S4Layer as a module: what its parameters start from, what changes them, copies, files and devices."""

import copy
import io
import math
import pickle

import oracle
import pytest
import torch
from layer_cases import CASES, PAIR, Case, H, build, ids, inputs, system

from s4 import S4Layer, hippo


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[13]], ids=ids)
def test_nothing_changes_a_parameter_or_an_input(case: Case) -> None:
    layer = build(case)
    u, x = inputs(case)
    before = copy.deepcopy(layer.state_dict())
    versions = [p._version for p in layer.parameters()]
    u_before, x_before = u.clone(), x.clone()
    layer(u)
    layer(u[:, :5], rate=2.0)
    layer(u, lengths=torch.tensor([3, 50]))
    layer.kernel(2 * case.L), layer.dense()
    if not case.bidirectional:
        layer(u, x, return_state=True)
        layer(u, x, lengths=torch.tensor([3, 50]), return_state=True)
        layer.step(u[:, 0], x)
    after = layer.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert versions == [p._version for p in layer.parameters()]
    assert torch.equal(u, u_before)
    assert torch.equal(x, x_before)


@pytest.mark.parametrize("case", PAIR, ids=ids)
def test_nothing_stale_is_kept(case: Case) -> None:
    """Parameters that change, by any means, change every view of the system at once."""
    layer, other = build(case), build(case)
    u, x = inputs(case)
    with torch.inference_mode():
        layer(u, x, return_state=True), layer.step(u[:, 0], x), layer.kernel(5), layer.dense()
    layer.load_state_dict(other.state_dict())
    for got, want in (
        (layer(u, x), other(u, x)),
        (layer.kernel(5), other.kernel(5)),
        (layer.dense()[0], other.dense()[0]),
        (layer.step(u[:, 0], x)[0], other.step(u[:, 0], x)[0]),
    ):
        assert torch.equal(got, want)
    layer(u).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_initial_state_is_zero_and_does_nothing() -> None:
    layer = build(CASES[1])
    u, _ = inputs(CASES[1])
    zero = layer.initial_state(2)
    assert zero.shape == (2, H, 64)
    assert zero.dtype == torch.float64
    assert (zero == 0).all()
    assert build(CASES[1], torch.float32).initial_state(3).dtype == torch.float32
    oracle.close(layer(u, zero), layer(u), 1e-12)


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[13]], ids=ids)
def test_state_dict_holds_real_tensors_and_comes_back(case: Case) -> None:
    layer, other = build(case), build(case)
    state = layer.state_dict()
    want = {
        "log_dt": (H,),
        "log_A_real": (case.n_ssm, case.d_state // 2),
        "A_imag": (case.n_ssm, case.d_state // 2),
    }
    want |= {
        "B": (case.n_ssm, case.d_state // 2, 2),
        "C": (1 + case.bidirectional, H, case.d_state // 2, 2),
        "D": (H,),
    }
    if case.variant == "dplr":
        want["P"] = (1, case.n_ssm, case.d_state // 2, 2)
    assert {name: tuple(value.shape) for name, value in state.items()} == want
    assert all(not value.is_complex() for value in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    u, _ = inputs(case)
    assert not torch.equal(build(case)(u), layer(u))
    assert torch.equal(other(u), layer(u))


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[13]], ids=ids)
def test_copies_and_pickles(case: Case) -> None:
    """After use with gradients too, when a kept result would be a non-leaf tensor."""
    layer = build(case)
    u, x = inputs(case)
    layer(u).sum().backward()
    if not case.bidirectional:
        layer.step(u[:, 0], x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(u), layer(u))
        assert all(p is not q for p, q in zip(other.parameters(), layer.parameters(), strict=True))


def test_double_and_to_move_everything() -> None:
    layer = build(CASES[1], torch.float32)
    u, x = inputs(CASES[1])
    layer(u.float())
    for moved in (copy.deepcopy(layer).double(), copy.deepcopy(layer).to(torch.float64)):
        y, state = moved(u, x, return_state=True)
        want, want_state = oracle.forward(system(layer, CASES[1]), u, x)
        oracle.close(y, want, 1e-9)
        oracle.close(state, want_state, 1e-9)
        assert moved.initial_state(1).dtype == torch.float64
    assert copy.deepcopy(layer).double().float()(u.float()).dtype == torch.float32


def test_meta_device_then_reset() -> None:
    layer = S4Layer(H, 8, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(torch.randn(1, 9, H))).all()


def test_default_device_meta_makes_a_layer_there() -> None:
    with torch.device("meta"):
        layer = S4Layer(H, 8)
        assert layer(torch.empty(2, 5, H)).shape == (2, 5, H)
    assert all(p.is_meta for p in layer.parameters())


@pytest.mark.parametrize(
    ("init", "variant"),
    [
        ("legs", "dplr"),
        ("legt", "dplr"),
        ("fout", "dplr"),
        ("legs", "diag"),
        ("lin", "diag"),
        ("inv", "diag"),
    ],
)
def test_initialisation(init: str, variant: str) -> None:
    layer = S4Layer(
        512, 16, variant=variant, init=init, n_ssm=2, dt_min=0.01, dt_max=0.5, dtype=torch.float64
    )
    Lambda, *P, B = hippo.dplr(init, 16) if variant == "dplr" else hippo.diag(init, 16)
    for ssm in range(2):
        oracle.close(-layer.log_A_real[ssm].exp(), Lambda.real.clamp(max=-1e-4), 1e-12)
        oracle.close(layer.A_imag[ssm], Lambda.imag, 1e-14)
        oracle.close(oracle.complex128(layer.B[ssm]), B, 1e-14)
        if P:
            oracle.close(oracle.complex128(layer.P[:, ssm]), P[0], 1e-14)
    dt = layer.log_dt.exp()
    assert dt.min() >= 0.01
    assert dt.max() <= 0.5
    # Log-uniform: half of the steps lie below the geometric mean of the ends, a fifth of them near each end.
    position = (layer.log_dt - math.log(0.01)) / math.log(50)
    assert abs(position.mean() - 0.5) < 0.06
    assert abs(position.var() - 1 / 12) < 0.02
    assert layer.C.std() > 0.3
    assert abs(layer.C.mean()) < 0.1
    first = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert not torch.equal(first["log_dt"], layer.log_dt)
    assert not torch.equal(first["C"], layer.C)
    torch.manual_seed(3)
    layer.reset_parameters()
    again = copy.deepcopy(layer.state_dict())
    torch.manual_seed(3)
    layer.reset_parameters()
    assert all(torch.equal(again[name], value) for name, value in layer.state_dict().items())


def test_one_channel_is_one_system() -> None:
    """Channels do not mix: a layer's channel is the layer made of that channel alone."""
    layer = build(CASES[1])
    u, _ = inputs(CASES[1])
    full = layer(u)
    other = u.clone()
    other[..., 2] = 7.0
    changed = layer(other)
    assert torch.allclose(changed[..., [0, 1, 3]], full[..., [0, 1, 3]], atol=1e-12)
    assert not torch.allclose(changed[..., 2], full[..., 2])


def test_repr_shows_the_shapes() -> None:
    text = repr(S4Layer(6, 10, variant="diag", init="inv", n_ssm=3, bidirectional=True))
    options = ("S4Layer(", "d_model=6", "d_state=10", "'diag'", "'inv'", "n_ssm=3", "bidirectional=True")
    shapes = ("log_dt (6,)", "log_A_real (3, 5)", "A_imag (3, 5)", "B (3, 5, 2)", "C (2, 6, 5, 2)", "D (6,)")
    assert [part for part in (*options, *shapes) if part not in text] == []
    assert "P (2, 1, 5, 2)" in repr(S4Layer(6, 10, init="legt"))


def test_length_is_free() -> None:
    """The same parameters at any length: a longer kernel begins with the shorter one."""
    layer = build(CASES[1])
    long = layer.kernel(1000)
    for L in (1, 2, 64, 65, 997):
        oracle.close(layer.kernel(L), long[:, :L], 1e-9)
