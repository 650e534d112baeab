"""S4Layer: forward, state, step, kernel and dense are one system, the oracle's, in value and gradient."""

import copy
import io
import math
import pickle
from typing import NamedTuple

import oracle
import pytest
import torch
from torch import Tensor

from s4 import S4Layer, hippo

H = 4


class Case(NamedTuple):
    variant: str
    init: str
    discretization: str | None
    d_state: int
    n_ssm: int
    bidirectional: bool
    L: int
    rate: float

    @property
    def method(self) -> str:
        return self.discretization or ("zoh" if self.variant == "diag" else "bilinear")


CASES = [
    Case("dplr", "legs", None, 2, 1, False, 1, 1.0),
    Case("dplr", "legs", None, 64, 2, False, 97, 1.0),
    Case("dplr", "legs", "bilinear", 256, 1, False, 31, 0.5),
    Case("dplr", "legs", None, 16, 4, True, 64, 1.0),
    Case("dplr", "legs", None, 6, 1, True, 1, 2.0),
    Case("dplr", "legs", None, 10, 2, False, 41, 30.0),
    Case("dplr", "legt", None, 2, 4, False, 30, 1.0),
    Case("dplr", "legt", None, 32, 2, True, 53, 0.5),
    Case("dplr", "legt", None, 256, 1, False, 16, 1.0),
    Case("dplr", "fout", None, 4, 2, False, 2, 1.0),
    Case("dplr", "fout", "bilinear", 64, 1, False, 128, 2.0),
    Case("dplr", "fout", None, 16, 1, True, 33, 1.0),
    Case("diag", "legs", "zoh", 2, 1, False, 1, 1.0),
    Case("diag", "legs", None, 64, 2, False, 97, 1.0),
    Case("diag", "legs", "bilinear", 16, 4, True, 64, 1.0),
    Case("diag", "legs", "zoh", 256, 1, False, 31, 0.5),
    Case("diag", "lin", "zoh", 32, 1, True, 53, 1.0),
    Case("diag", "lin", "bilinear", 64, 2, False, 30, 2.0),
    Case("diag", "inv", "zoh", 16, 1, False, 128, 1.0),
    Case("diag", "inv", "bilinear", 6, 4, True, 33, 1.0),
    Case("diag", "inv", "bilinear", 10, 2, False, 41, 30.0),
]
CAUSAL = [case for case in CASES if not case.bidirectional]
SMALL = [case for case in CASES if case.d_state <= 64 and case.L <= 64]


def ids(case: Case) -> str:
    direction = "both" if case.bidirectional else "causal"
    parts = (
        case.variant,
        case.init,
        case.method,
        f"N{case.d_state}",
        f"{case.n_ssm}ssm",
        direction,
        f"L{case.L}",
        f"x{case.rate:g}",
    )
    return "-".join(parts)


def build(case: Case, dtype: torch.dtype = torch.float64) -> S4Layer:
    """A layer whose SSMs differ from each other and from their initialisation."""
    variant, init, discretization, d_state, n_ssm, bidirectional, _, _ = case
    layer = S4Layer(
        H,
        d_state,
        variant=variant,
        init=init,
        discretization=discretization,
        n_ssm=n_ssm,
        bidirectional=bidirectional,
        dtype=dtype,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return layer


def parameters(layer: S4Layer) -> dict[str, Tensor]:
    return {
        name: value.detach().double().clone().requires_grad_() for name, value in layer.named_parameters()
    }


def system(layer: S4Layer, case: Case) -> oracle.Discrete:
    """The oracle's view of a layer, out of autograd's reach."""
    with torch.no_grad():
        return oracle.discrete(parameters(layer), case.method, case.rate)


def inputs(case: Case, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """u (B, L, H) and an incoming state (B, H, N)."""
    return torch.randn(batch, case.L, H).to(dtype), torch.randn(batch, H, case.d_state).to(dtype)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_dense_is_the_discretised_system(case: Case) -> None:
    layer = build(case)
    A, B, C, D = layer.dense(rate=case.rate)
    want = system(layer, case)
    assert {A.dtype, B.dtype, C.dtype, D.dtype} == {torch.float64}
    oracle.close(A, want.A, 1e-11)
    oracle.close(B, want.B, 1e-10)
    oracle.close(C, want.C if case.bidirectional else want.C[0], 1e-14)
    oracle.close(D, want.D, 0)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_kernel_is_the_impulse_response(case: Case) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        layer = build(case, dtype)
        want = oracle.kernel(system(layer, case), case.L)
        got = layer.kernel(case.L, rate=case.rate)
        assert got.dtype == dtype
        oracle.close(got, want if case.bidirectional else want[0], tolerance)


@pytest.mark.parametrize(
    ("variant", "init", "N", "L"),
    [
        ("dplr", "legs", 64, 1024),
        ("dplr", "legs", 256, 16384),
        ("dplr", "legt", 64, 16384),
        ("dplr", "fout", 64, 65536),
        ("diag", "legs", 256, 16384),
        ("diag", "lin", 64, 65536),
        ("diag", "inv", 64, 1024),
    ],
)
def test_float32_kernels_at_full_length(variant: str, init: str, N: int, L: int) -> None:
    """Within 1e-5 of each channel's largest value, for steps over three decades."""
    layer = S4Layer(H, N, variant=variant, init=init, dtype=torch.float32)
    with torch.no_grad():
        layer.log_dt.copy_(torch.tensor([1e-4, 1e-3, 1e-2, 1e-1]).log())
        method = "zoh" if variant == "diag" else "bilinear"
        want = oracle.long_kernel(oracle.discrete(parameters(layer), method), L)[0]
        got = layer.kernel(L)
    for channel in range(H):
        oracle.close(got[channel], want[channel], 1e-5, f"channel {channel}")


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_forward_is_the_recurrence(case: Case) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        layer = build(case, dtype)
        u, _ = inputs(case, dtype=dtype)
        want, state = oracle.forward(system(layer, case), u)
        got = layer(u, rate=case.rate)
        assert got.dtype == dtype
        oracle.close(got, want, tolerance)
        if not case.bidirectional:
            again, last = layer(u, rate=case.rate, return_state=True)
            assert last.dtype == dtype
            oracle.close(again, want, tolerance)
            oracle.close(last, state, tolerance)


@pytest.mark.parametrize("case", CAUSAL, ids=ids)
def test_forward_goes_on_from_a_state(case: Case) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        layer = build(case, dtype)
        u, x = inputs(case, dtype=dtype)
        want, want_state = oracle.forward(system(layer, case), u, x)
        y, state = layer(u, x, rate=case.rate, return_state=True)
        oracle.close(y, want, tolerance)
        oracle.close(state, want_state, tolerance)
        oracle.close(layer(u, x, rate=case.rate), want, tolerance)


@pytest.mark.parametrize("case", CAUSAL, ids=ids)
def test_step_is_the_recurrence(case: Case) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        layer = build(case, dtype)
        u, x = inputs(case, dtype=dtype)
        want, want_state = oracle.forward(system(layer, case), u, x)
        outputs = []
        for t in range(case.L):
            y, x = layer.step(u[:, t], x, rate=case.rate)
            assert y.dtype == x.dtype == dtype
            outputs.append(y)
        oracle.close(torch.stack(outputs, 1), want, tolerance)
        oracle.close(x, want_state, tolerance)


@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_gradients_are_those_of_the_recurrence(case: Case) -> None:
    """Of every parameter, the input and the state, through outputs and last state at once; then by steps."""
    layer = build(case)
    u, x = inputs(case)
    weight, weight_state = torch.randn_like(u), torch.randn_like(x)

    def gradients(y: Tensor, state: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = (y * weight).sum()
        if not case.bidirectional:
            loss = loss + (state * weight_state).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=case.bidirectional)
        return dict(zip(leaves, grads, strict=True))

    def leaves(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return values | {"u": u.clone().requires_grad_(), "state": x.clone().requires_grad_()}

    theirs = leaves(parameters(layer))
    y, state = oracle.forward(
        oracle.discrete(theirs, case.method, case.rate),
        theirs["u"],
        None if case.bidirectional else theirs["state"],
    )
    want = gradients(y, state, theirs)

    ours = leaves(dict(layer.named_parameters()))
    if case.bidirectional:
        got = gradients(layer(ours["u"], rate=case.rate), ours["state"], ours)
    else:
        got = gradients(*layer(ours["u"], ours["state"], rate=case.rate, return_state=True), ours)
    for name, grad in want.items():
        if grad is not None:
            oracle.close(got[name], grad, 1e-8, name)

    if not case.bidirectional:
        x, outputs = ours["state"], []
        for t in range(case.L):
            y_t, x = layer.step(ours["u"][:, t], x, rate=case.rate)
            outputs.append(y_t)
        got = gradients(torch.stack(outputs, 1), x, ours)
        for name, grad in want.items():
            oracle.close(got[name], grad, 1e-8, f"stepped {name}")


TINY = [
    Case("dplr", "legs", None, 4, 1, False, 5, 1.0),
    Case("dplr", "legt", None, 4, 2, True, 4, 1.0),
    Case("diag", "lin", None, 4, 2, False, 5, 1.0),
    Case("diag", "inv", "bilinear", 4, 1, True, 4, 1.0),
]


@pytest.mark.parametrize("case", TINY, ids=ids)
def test_gradcheck(case: Case) -> None:
    layer = build(case)
    u, x = (t.requires_grad_() for t in inputs(case, batch=1))
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(u: Tensor, x: Tensor, *values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        keywords = {} if case.bidirectional else {"state": x, "return_state": True}
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (u,), keywords)

    assert torch.autograd.gradcheck(run, (u, x, *values), fast_mode=True)


PAIR = [CASES[1], CASES[13]]  # one case a variant where the axis in question matters, the variant less


@pytest.mark.parametrize("case", [*PAIR, CASES[9], CASES[10]], ids=ids)
def test_chunks_are_the_whole(case: Case) -> None:
    """In value and gradient, for chunks of every kind: one step, none, a prime number, the rest."""
    layer = build(case)
    u, x = inputs(case)
    u.requires_grad_(), x.requires_grad_()
    weight = torch.randn_like(u)
    y, last = layer(u, x, return_state=True)
    leaves = [u, x, *layer.parameters()]
    want = torch.autograd.grad((y * weight).sum() + last.square().sum(), leaves)
    state, pieces, start = x, [], 0
    for size in (1, 0, 7, 1, 32, case.L):
        piece, state = layer(u[:, start : start + size], state, return_state=True)
        pieces.append(piece)
        start += size
    got_y = torch.cat(pieces, 1)
    oracle.close(got_y, y, 1e-9)
    oracle.close(state, last, 1e-9)
    got = torch.autograd.grad((got_y * weight).sum() + state.square().sum(), leaves)
    for name, g, w in zip(["u", "state", *dict(layer.named_parameters())], got, want, strict=True):
        oracle.close(g, w, 1e-8, name)


@pytest.mark.parametrize("case", [*PAIR, CASES[3], CASES[16]], ids=ids)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_padded_is_unpadded(case: Case, dtype: torch.dtype) -> None:
    """Each sequence alone, from its own state to its own end; what lies past an end is not looked at."""
    layer = build(case)
    sizes = [case.L, 1, 0, case.L // 2, case.L - 1]
    u, x = inputs(case, batch=len(sizes))
    for b, size in enumerate(sizes):
        u[b, size:] = 1e4 * torch.randn(case.L - size, H)
    u.requires_grad_()
    lengths = torch.tensor(sizes, dtype=dtype)
    if case.bidirectional:
        y, last = layer(u, lengths=lengths, rate=case.rate), None
    else:
        y, last = layer(u, x, lengths=lengths, rate=case.rate, return_state=True)
    assert y.shape == u.shape
    for b, size in enumerate(sizes):
        want, state = oracle.forward(
            system(layer, case), u[b : b + 1, :size], None if case.bidirectional else x[b : b + 1]
        )
        oracle.close(y[b : b + 1, :size], want, 1e-9)
        assert (y[b, size:] == 0).all()
        if last is not None:
            oracle.close(last[b : b + 1], state, 1e-9)
    (grad,) = torch.autograd.grad(y.square().sum() + (0 if last is None else last.square().sum()), u)
    for b, size in enumerate(sizes):
        assert (grad[b, size:] == 0).all()
        assert (grad[b, :size] != 0).all()


NARROW = [torch.uint8, torch.int8, torch.int16, torch.int32]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", [*PAIR, CASES[3]], ids=ids)
def test_narrow_lengths_are_lengths(case: Case, dtype: torch.dtype) -> None:
    """L and the distances to it need not fit the dtype of the lengths."""
    layer = build(case)
    u, x = inputs(case._replace(L=300))
    sizes = [100, 50]
    keywords = {} if case.bidirectional else {"state": x, "return_state": True}
    want = layer(u, lengths=torch.tensor(sizes), **keywords)
    got = layer(u, lengths=torch.tensor(sizes, dtype=dtype), **keywords)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    y = got if case.bidirectional else got[0]
    for b, size in enumerate(sizes):
        assert (y[b, size:] == 0).all()
        assert (y[b, :size] != 0).all()


def test_padding_of_the_state_without_an_incoming_one() -> None:
    case = CASES[1]
    layer = build(case)
    u, _ = inputs(case, batch=3)
    lengths = torch.tensor([0, 40, 97])
    _, last = layer(u, lengths=lengths, return_state=True)
    assert (last[0] == 0).all()
    for b in (1, 2):
        _, want = oracle.forward(system(layer, case), u[b : b + 1, : lengths[b]])
        oracle.close(last[b : b + 1], want, 1e-9)


def test_padding_may_hold_nan() -> None:
    """A batch may come out of torch.empty, or of a log of garbage."""
    layer = build(CASES[1])
    u, _ = inputs(CASES[1])
    u[1, 50:] = math.nan
    y, state = layer(u, lengths=torch.tensor([97, 50]), return_state=True)
    assert torch.isfinite(y).all()
    assert torch.isfinite(state).all()


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[18]], ids=ids)
def test_causality(case: Case) -> None:
    """A change at t is felt from t on only, unless the layer looks both ways."""
    layer = build(case)
    u, _ = inputs(case)
    other = u.clone()
    other[:, 20] += 100
    change = (layer(other) - layer(u)).abs().amax((0, 2))
    assert (change[20:24] > 1e-3).all()
    assert (change[:20] > 1e-3).all() if case.bidirectional else (change[:20] < 1e-9).all()


@pytest.mark.parametrize(
    ("variant", "dtype", "tolerance", "L"),
    [
        ("dplr", torch.float32, 1e-4, 4096),
        ("dplr", torch.float64, 1e-9, 4096),
        ("diag", torch.float32, 1e-4, 4096),
        ("diag", torch.float64, 1e-9, 1024),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")  # ten thousand steps
def test_convolution_and_recurrence_agree_over_thousands_of_steps(
    variant: str, dtype: torch.dtype, tolerance: float, L: int
) -> None:
    layer = S4Layer(8, 64, variant=variant, dtype=dtype)
    u = torch.randn(1, L, 8, dtype=dtype)
    x, outputs = layer.initial_state(1), []
    with torch.no_grad():
        y, last = layer(u, return_state=True)
        for t in range(L):
            y_t, x = layer.step(u[:, t], x)
            outputs.append(y_t)
    oracle.close(torch.stack(outputs, 1), y, tolerance)
    oracle.close(x, last, tolerance)


@pytest.mark.parametrize("rate", [0.25, 3.0])
@pytest.mark.parametrize("case", PAIR, ids=ids)
def test_rate_multiplies_dt(case: Case, rate: float) -> None:
    layer = build(case)
    u, x = inputs(case)
    got = (*layer(u, x, rate=rate, return_state=True), layer.kernel(9, rate=rate), *layer.dense(rate=rate))
    stepped = layer.step(u[:, 0], x, rate=rate)
    with torch.no_grad():
        layer.log_dt += math.log(rate)
    want = (*layer(u, x, return_state=True), layer.kernel(9), *layer.dense())
    for g, w in zip((*got, *stepped), (*want, *layer.step(u[:, 0], x)), strict=True):
        oracle.close(g, w, 1e-10)


def test_half_rate_resamples_the_same_system() -> None:
    """The kernel at half the step: one function of time, on a grid twice as fine, at half the weight."""
    layer = S4Layer(2, 16, variant="diag", init="lin", dt_min=1e-3, dt_max=2e-3, dtype=torch.float64)
    coarse, fine = layer.kernel(200), layer.kernel(400, rate=0.5)
    oracle.close(fine[:, ::2] + fine[:, 1::2], coarse, 0.05)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[12], CASES[19]], ids=ids)
def test_empty_sequences_and_batches(case: Case) -> None:
    layer = build(case)
    _, x = inputs(case)
    for batch, L in ((2, 0), (0, 7), (0, 0)):
        u = torch.randn(batch, L, H).double().requires_grad_()
        y = layer(u)
        assert y.shape == (batch, L, H)
        y.sum().backward()
        assert layer(u, lengths=torch.zeros(batch, dtype=torch.long)).shape == (batch, L, H)
        if not case.bidirectional:
            _, state = layer(u, x[:batch], return_state=True)
            assert torch.equal(state, x[:batch])
            assert torch.equal(layer(u, return_state=True)[1], layer.initial_state(batch))
    directions = (2,) if case.bidirectional else ()
    assert layer.kernel(0).shape == (*directions, H, 0)
    if not case.bidirectional:
        y, state = layer.step(torch.zeros(0, H).double(), layer.initial_state(0))
        assert y.shape == (0, H)
        assert state.shape == (0, H, case.d_state)


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=ids)
def test_hostile_strides(case: Case) -> None:
    layer = build(case)
    base = torch.randn(case.L * 2, 2 * H, 3).double()
    variants = {
        "transposed": base[: case.L, :H].permute(2, 0, 1),
        "sliced": base.permute(2, 0, 1)[:, 1::2, ::2],
        "expanded batch": base[:1, : case.L if case.L < 2 * H else 2 * H, :1].expand(3, 2 * H, H),
        "expanded time": base[:3, :1, :1].expand(3, case.L, H),
        "flipped": base[: case.L, :H].permute(2, 0, 1).flip(1),
    }
    for name, u in variants.items():
        oracle.close(layer(u), layer(u.contiguous()), 1e-12, name)
    if not case.bidirectional:
        u = variants["transposed"]
        x = torch.randn(case.d_state, H, 3).double().permute(2, 1, 0)
        got, want = layer(u, x, return_state=True), layer(u.contiguous(), x.contiguous(), return_state=True)
        for g, w in zip(got, want, strict=True):
            oracle.close(g, w, 1e-12)
        for g, w in zip(
            layer.step(u[:, 3], x), layer.step(u[:, 3].contiguous(), x.contiguous()), strict=True
        ):
            oracle.close(g, w, 1e-12)
        expanded = x[:1].expand(3, -1, -1)
        oracle.close(layer(u, expanded), layer(u, expanded.contiguous()), 1e-12)


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


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[7], CASES[13], CASES[19]], ids=ids)
def test_meta_device_gives_shapes(case: Case) -> None:
    layer = build(case, torch.float32).to("meta")
    u, x = (t.to("meta") for t in inputs(case, dtype=torch.float32))
    directions = (2,) if case.bidirectional else ()
    shapes = [(layer(u), u.shape), (layer.kernel(7), (*directions, H, 7))]
    if not case.bidirectional:
        y, state = layer(u, x, return_state=True)
        shapes += [(y, u.shape), (state, x.shape)]
        y, state = layer.step(u[:, 0], layer.initial_state(2))
        shapes += [(y, (2, H)), (state, x.shape)]
    for value, shape in shapes:
        assert value.is_meta
        assert value.dtype == torch.float32
        assert tuple(value.shape) == tuple(shape)


def test_default_device_meta_makes_a_layer_there() -> None:
    with torch.device("meta"):
        layer = S4Layer(H, 8)
        assert layer(torch.empty(2, 5, H)).shape == (2, 5, H)
    assert all(p.is_meta for p in layer.parameters())


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[13]], ids=ids)
def test_output_has_the_dtype_of_the_input_and_state_that_of_the_parameters(
    case: Case, input_dtype: torch.dtype
) -> None:
    layer = build(case, torch.float32)
    u, x = inputs(case, dtype=torch.float32)
    u = u.to(input_dtype)
    y = layer(u)
    assert y.dtype == input_dtype
    # The arithmetic is float32 throughout: only the output is rounded.
    oracle.close(y, layer(u.float()).to(input_dtype), 1e-3 if input_dtype == torch.bfloat16 else 1e-6)
    if not case.bidirectional:
        y, state = layer(u, x, return_state=True)
        y_t, state_t = layer.step(u[:, 0], x)
        assert y.dtype == y_t.dtype == input_dtype
        assert state.dtype == state_t.dtype == torch.float32
        oracle.close(state, layer(u.float(), x, return_state=True)[1], 1e-6)


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[13]], ids=ids)
def test_autocast_leaves_the_arithmetic_alone(case: Case) -> None:
    layer = build(case, torch.float32)
    u, x = inputs(case, dtype=torch.float32)
    u.requires_grad_()

    def everything() -> list[Tensor]:
        values = [layer(u), layer.kernel(7), *layer.dense()]
        if not case.bidirectional:
            values += [*layer(u, x, return_state=True), *layer.step(u[:, 0], x)]
        return values

    want = everything()
    with torch.autocast("cpu", torch.bfloat16):
        got = everything()
        grad = torch.autograd.grad(got[0].square().sum(), u)[0]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype
        assert torch.equal(g, w)
    oracle.close(grad, torch.autograd.grad(want[0].square().sum(), u)[0], 1e-6)


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


@pytest.mark.parametrize("backend", ["naive", "torch", "auto"])
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[7], CASES[13], CASES[19]], ids=ids)
def test_every_backend_gives_the_same_layer(case: Case, backend: str) -> None:
    layer = build(case)
    layer.backend = backend
    u, _ = inputs(case)
    y = layer(u, rate=case.rate)
    y.square().sum().backward()
    theirs = parameters(layer)
    want, _ = oracle.forward(oracle.discrete(theirs, case.method, case.rate), u)
    want.square().sum().backward()
    oracle.close(y, want, 1e-9)
    for name, parameter in layer.named_parameters():
        oracle.close(parameter.grad, theirs[name].grad, 1e-8, name)


def test_length_is_free() -> None:
    """The same parameters at any length: a longer kernel begins with the shorter one."""
    layer = build(CASES[1])
    long = layer.kernel(1000)
    for L in (1, 2, 64, 65, 997):
        oracle.close(layer.kernel(L), long[:, :L], 1e-9)


@pytest.mark.promise("torch.func and forward mode", "`vmap` of `grad`: a gradient for each sequence")
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[13]], ids=ids)
def test_gradients_of_each_sequence_alone(case: Case) -> None:
    """torch.func's vmap of grad, as differential privacy needs it."""
    layer = build(case)
    u, _ = inputs(case, batch=3)
    values = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], u: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (u[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, u)
    for b in range(3):
        want = torch.autograd.grad(layer(u[b : b + 1]).square().sum(), list(layer.parameters()))
        for name, grad in zip(values, want, strict=True):
            oracle.close(got[name][b], grad, 1e-9, name)
