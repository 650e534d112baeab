"""S4Layer: forward, state, step, kernel and dense are one system, the oracle's, in value and gradient."""

import math

import oracle
import pytest
import torch
from layer_cases import CASES, CAUSAL, PAIR, SMALL, Case, H, build, ids, inputs, parameters, system
from torch import Tensor

from s4 import S4Layer


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
