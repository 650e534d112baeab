"""Forward-mode derivatives, by torch.func and by dual numbers, and the other transforms of torch.func.

The truth is the derivative of the oracle's loops, or that a layer is linear in its inputs and its state.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap

import s4.kernel
from s4 import S4Block, S4Layer, S4Model, State

H, N, B, L = 3, 8, 2, 41
LENGTHS = torch.tensor([13, L])
LAYERS: dict[str, dict[str, Any]] = {
    "dplr": {},
    "rank two, both ways": {"init": "legt", "bidirectional": True},
    "diag": {"variant": "diag"},
    "diag, both ways": {"variant": "diag", "bidirectional": True},
}
MODES = ("fft", "scan", "auto")
VALUE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of derivatives, as in test_devices.py


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> S4Layer:
    return S4Layer(H, N, dtype=dtype, **LAYERS[name], **options)


def duals(f: Callable[..., Any], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tangents of f by dual numbers, without torch.func; each has to be there."""
    with forward_ad.dual_level():
        out = f(*map(forward_ad.make_dual, at, along))
        found = [forward_ad.unpack_dual(y).tangent for y in (out if isinstance(out, tuple) else (out,))]
    assert all(t is not None for t in found)
    return tuple(found)


def tangents(f: Callable[..., Any], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """By torch.func, once found to be those of dual numbers."""
    _, found = jvp(f, at, along)
    found = found if isinstance(found, tuple) else (found,)
    for a, b in zip(duals(f, at, along), found, strict=True):
        oracle.close(a, b, 1e-12 if b.dtype == torch.float64 else 1e-4)
    return found


def of_parameters(module: nn.Module, call: str = "forward") -> tuple[list[str], tuple[Tensor, ...], Any]:
    """Names and numbers of a module's parameters, and a method of it as a function of them first."""

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = module

        def forward(self, *args: Any, **keywords: Any) -> Any:
            return getattr(self.held, call)(*args, **keywords)

    names = [name for name, _ in module.named_parameters()]
    numbers = tuple(p.detach().clone() for p in module.parameters())
    outer, count = Calls(), len(names)

    def f(*values: Any, **keywords: Any) -> Any:
        given = {f"held.{name}": p for name, p in zip(names, values[:count], strict=True)}
        return functional_call(outer, given, values[count:], keywords)

    return names, numbers, f


def along(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(map(torch.randn_like, tensors))


@pytest.mark.promise(
    "torch.func and forward mode", "the tangent of a layer in its inputs is the layer itself"
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_own_tangent(name: str, mode: str) -> None:
    """Also where calls before have kept what the parameters come to, and with padding and a state."""
    layer = build(name, mode=mode)
    for training in (True, False):
        layer.train(training)
        with torch.set_grad_enabled(training):
            for n in (1, 4, L):
                u, v = torch.randn(2, B, n, H, dtype=torch.float64)
                want = layer(v)
                oracle.close(tangents(layer, (u,), (v,))[0], want, 1e-10)
            want = layer(v, lengths=LENGTHS)
            oracle.close(tangents(lambda u: layer(u, lengths=LENGTHS), (u,), (v,))[0], want, 1e-10)
            if layer.bidirectional:
                continue
            x, z = torch.randn(2, B, H, N, dtype=torch.float64)
            for lengths in (None, LENGTHS):
                run = lambda u, x, n=lengths: layer(u, x, lengths=n, return_state=True)  # noqa: E731
                for got, wanted in zip(tangents(run, (u, x), (v, z)), run(v, z), strict=True):
                    oracle.close(got, wanted, 1e-10)
            for got, wanted in zip(
                tangents(layer.step, (u[:, 0], x), (v[:, 0], z)), layer.step(v[:, 0], z), strict=True
            ):
                oracle.close(got, wanted, 1e-10)


@pytest.mark.promise(
    "torch.func and forward mode", "jvp and dual numbers through forward, by every parameter"
)
@pytest.mark.parametrize("dtype", VALUE, ids=str)
@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.parametrize("name", LAYERS)
def test_forward_by_parameters(name: str, mode: str, dtype: torch.dtype) -> None:
    layer = build(name, dtype, mode=mode)
    names, numbers, f = of_parameters(layer)
    at = (*numbers, torch.randn(B, L, H, dtype=dtype))
    ahead = along(at)

    def truth(*values: Tensor) -> tuple[Tensor, Tensor]:
        found = dict(zip(names, values[:-1], strict=True))
        return oracle.forward(oracle.discrete(found, layer.discretization), values[-1])

    _, want = jvp(truth, *(tuple(t.double() for t in part) for part in (at, ahead)))
    if layer.bidirectional:
        oracle.close(tangents(f, at, ahead)[0], want[0], VALUE[dtype])
        return
    got = tangents(lambda *values: f(*values, return_state=True), at, ahead)
    for found, wanted in zip(got, want, strict=True):
        oracle.close(found, wanted, VALUE[dtype])


@pytest.mark.promise("torch.func and forward mode", "jvp and dual numbers through step, kernel and dense")
@pytest.mark.parametrize("name", LAYERS)
def test_other_methods_by_parameters(name: str) -> None:
    layer = build(name).eval()
    names, numbers, kernel = of_parameters(layer, "kernel")
    ahead = along(numbers)

    def system(*values: Tensor) -> oracle.Discrete:
        return oracle.discrete(dict(zip(names, values, strict=True)), layer.discretization)

    _, want = jvp(lambda *p: oracle.kernel(system(*p), 30), numbers, ahead)
    for method in s4.kernel.METHODS:
        (got,) = tangents(lambda *p, m=method: kernel(*p, 30, method=m), numbers, ahead)
        oracle.close(got if layer.bidirectional else got[None], want, 1e-8, method)
    _, want = jvp(lambda *p: tuple(system(*p))[:2], numbers, ahead)
    got = tangents(of_parameters(layer, "dense")[2], numbers, ahead)
    for found, wanted in zip(got, want, strict=False):
        oracle.close(found, wanted, 1e-8)
    if layer.bidirectional:
        return
    u, x = torch.randn(B, H, dtype=torch.float64), torch.randn(B, H, N, dtype=torch.float64)
    with torch.no_grad():
        layer.step(u, x)  # which keeps the recurrence
    at = (*numbers, u, x)
    ahead = along(at)

    def truth(*values: Tensor) -> tuple[Tensor, Tensor]:
        y, last = oracle.forward(system(*values[:-2]), values[-2][:, None], values[-1])
        return y[:, 0], last

    _, want = jvp(truth, at, ahead)
    with torch.no_grad():
        for got, wanted in zip(tangents(of_parameters(layer, "step")[2], at, ahead), want, strict=True):
            oracle.close(got, wanted, 1e-8)


@pytest.mark.promise("torch.func and forward mode", "dual numbers in the place of parameters; dt and Lambda")
def test_dual_numbers_in_the_place_of_parameters() -> None:
    layer = build("dplr").eval()
    names, numbers, f = of_parameters(layer)
    u, ahead = torch.randn(B, L, H, dtype=torch.float64), along(numbers)
    _, want = jvp(lambda *p: f(*p, u), numbers, ahead)
    by_name = dict(zip(names, ahead, strict=True))
    with forward_ad.dual_level():
        for name, p, v in zip(names, numbers, ahead, strict=True):
            delattr(layer, name)
            setattr(layer, name, forward_ad.make_dual(p, v))
        y, dt, Lambda = (forward_ad.unpack_dual(t) for t in (layer(u), layer.dt, layer.Lambda))
        oracle.close(y.tangent, want, 1e-12)
        oracle.close(dt.tangent, dt.primal * by_name["log_dt"], 1e-14)
        parts = Lambda.primal.real * by_name["log_A_real"], by_name["A_imag"]
        oracle.close(Lambda.tangent, torch.complex(*parts), 1e-14)


@pytest.mark.promise(
    "torch.func and forward mode", "hessian, and its products with a vector in all four orders"
)
@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.parametrize("name", ["dplr", "diag"])
def test_second_derivatives(name: str, mode: str) -> None:
    layer = S4Layer(2, 4, dtype=torch.float64, mode=mode, **LAYERS[name])
    names, numbers, f = of_parameters(layer)
    u, count = torch.randn(B, 9, 2, dtype=torch.float64), range(len(numbers))

    def loss(*values: Tensor) -> Tensor:
        return f(*values, u).square().mean()

    def truth(*values: Tensor) -> Tensor:
        system = oracle.discrete(dict(zip(names, values, strict=True)), layer.discretization)
        return oracle.forward(system, u)[0].square().mean()

    want = torch.autograd.functional.hessian(truth, numbers)
    got = hessian(loss, argnums=tuple(count))(*numbers)
    for i in count:
        for j in count:
            oracle.close(got[i][j], want[i][j], 1e-7, f"{names[i]}, {names[j]}")
    vector = along(numbers)
    wanted = [sum((want[i][j].flatten(numbers[i].dim()) @ vector[j].flatten()) for j in count) for i in count]
    gradient = grad(loss, argnums=tuple(count))
    leaves = [p.clone().requires_grad_() for p in numbers]
    plain = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    with forward_ad.dual_level():
        both = [forward_ad.make_dual(p, v) for p, v in zip(leaves, vector, strict=True)]
        outer = torch.autograd.grad(forward_ad.unpack_dual(loss(*both)).tangent, leaves)
        inner = [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(loss(*both), both)]
    found = {
        "forward over reverse": jvp(gradient, numbers, vector)[1],
        "forward over reverse, by dual numbers": inner,
        "reverse over forward": outer,
        "reverse over reverse": torch.autograd.grad(plain, leaves, vector),
    }
    for what, products in found.items():
        for got_i, want_i in zip(products, wanted, strict=True):
            oracle.close(got_i, want_i, 1e-7, what)


@pytest.mark.promise(
    "torch.func and forward mode", "jacfwd, jacrev and vectorised Jacobians agree; linearize"
)
@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.parametrize("name", ["dplr", "diag, both ways"])
def test_jacobians(name: str, mode: str) -> None:
    layer = build(name, mode=mode)
    u, v = torch.randn(2, B, 7, H, dtype=torch.float64)
    want = torch.autograd.functional.jacobian(layer, u)
    oracle.close(want.flatten(3) @ v.flatten(), layer(v), 1e-10)
    oracle.close(jacfwd(layer)(u), want, 1e-10)
    oracle.close(jacrev(layer)(u), want, 1e-10)
    for strategy in ("forward-mode", "reverse-mode"):
        got = torch.autograd.functional.jacobian(layer, u, vectorize=True, strategy=strategy)
        oracle.close(got, want, 1e-10, strategy)
    y, linear = linearize(layer, u)
    oracle.close(y, layer(u), 1e-12)
    oracle.close(linear(v), layer(v), 1e-10)


@pytest.mark.promise(
    "torch.func and forward mode", "gradients in a batch, torch.autograd.grad(is_grads_batched=True)"
)
@pytest.mark.promise(
    "torch.func and forward mode", "a gradient through an earlier graph keeps the tangent of what comes in"
)
@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_was_recorded_before(name: str, mode: str) -> None:
    layer = build(name, mode=mode)
    u = torch.randn(B, L, H, dtype=torch.float64, requires_grad=True)
    y, leaves = layer(u), [u, *layer.parameters()]
    back = torch.randn(2, *y.shape, dtype=torch.float64)
    want = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in back]
    batch = torch.autograd.grad(y, leaves, back, retain_graph=True, is_grads_batched=True)
    for i in range(2):
        for got, wanted in zip(batch, want[i], strict=True):
            oracle.close(got[i], wanted, 1e-10)
    ahead = duals(lambda g: torch.autograd.grad(y, leaves, g), (back[0],), (back[1],))
    for got, wanted in zip(ahead, want[1], strict=True):
        oracle.close(got, wanted, 1e-10)


@pytest.mark.promise(
    "torch.func and forward mode", "vmap over inputs, lengths, states and ensembles, also of jvp"
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dplr", "diag"])
def test_vmap(name: str, mode: str) -> None:
    layer = build(name, mode=mode)
    u, v = torch.randn(2, B, L, H, dtype=torch.float64)
    x = torch.randn(B, H, N, dtype=torch.float64)

    def one(u: Tensor, n: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y, last = layer(u[None], x[None], lengths=n[None], return_state=True)
        return y[0], last[0]

    for got, want in zip(
        vmap(one)(u, LENGTHS, x), layer(u, x, lengths=LENGTHS, return_state=True), strict=True
    ):
        oracle.close(got, want, 1e-10)
    got = vmap(lambda u, n, v: jvp(lambda u: layer(u[None], lengths=n[None])[0], (u,), (v,))[1])(
        u, LENGTHS, v
    )
    oracle.close(got, layer(v, lengths=LENGTHS), 1e-10)
    _, numbers, f = of_parameters(layer)
    ensemble = tuple(torch.stack([p, 1.1 * p]) for p in numbers)
    ahead = along(ensemble)
    got = tangents(lambda *p: vmap(lambda *q: f(*q, u))(*p), ensemble, ahead)[0]
    for i in range(2):
        _, want = jvp(lambda *q: f(*q, u), tuple(p[i] for p in ensemble), tuple(p[i] for p in ahead))
        oracle.close(got[i], want, 1e-10)


def check_transposed(f: Callable[..., Any], at: tuple[Tensor, ...]) -> None:
    """The inner product of w and J v is that of J^T w, by the ordinary backward pass, and v."""
    ahead = along(at)
    leaves = [t.clone().requires_grad_() for t in at]
    y = f(*leaves)
    back = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, back, allow_unused=True, materialize_grads=True)
    terms = [g * v for g, v in zip(found, ahead, strict=True)]
    size = sum(t.abs().sum() for t in terms)
    (got,) = tangents(f, at, ahead)
    assert abs((back * got).sum() - sum(t.sum() for t in terms)) < 1e-10 * size


@pytest.mark.promise("torch.func and forward mode", "jvp and dual numbers through a block, with every norm")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["layer", "batch", "rms"])
def test_block(norm: str, training: bool) -> None:
    for prenorm in (True, False):
        block = S4Block(build("dplr"), norm=norm, prenorm=prenorm, d_ff=4).train(training)
        for lengths in (None, LENGTHS):

            def run(*values: Tensor, block: S4Block = block, lengths: Tensor | None = lengths) -> Tensor:
                # A copy, as batch norm counts.
                return of_parameters(copy.deepcopy(block))[2](*values, lengths=lengths)

            numbers = tuple(p.detach() for p in block.parameters())
            check_transposed(run, (*numbers, torch.randn(B, L, H, dtype=torch.float64)))


@pytest.mark.promise(
    "torch.func and forward mode", "jvp, dual numbers and hessian through a model and its step"
)
@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_model(pooling: str) -> None:
    blocks = [S4Block(build(name)) for name in ("dplr", "diag")]
    ends = nn.Linear(2, H).double(), nn.Linear(H, 2).double()
    model = S4Model(ends[0], blocks, ends[1], norm=nn.LayerNorm(H).double(), pooling=pooling).eval()
    u = torch.randn(B, L, 2, dtype=torch.float64)
    _, numbers, f = of_parameters(model)
    for lengths in (None, LENGTHS):
        check_transposed(lambda *values, n=lengths: f(*values, lengths=n), (*numbers, u))
    loss = lambda u: model(u).square().sum()  # noqa: E731
    oracle.close(hessian(loss)(u[:, :5]), torch.autograd.functional.hessian(loss, u[:, :5]), 1e-8)
    start = model.initial_state(B)
    states = along(start.layers)
    step = lambda u, *x: model.step(u, State(x, start.total, start.length))[0]  # noqa: E731
    check_transposed(step, (u[:, 0], *states))


@pytest.mark.promise("torch.func and forward mode", "jvp and dual numbers through the sums of s4.kernel")
@pytest.mark.parametrize(
    "backend", [name for name, state in s4.kernel.backends().items() if not isinstance(state, str)]
)
def test_sums(backend: str) -> None:
    v, w = torch.randn(2, 3, 5, dtype=torch.complex128)
    z = 4 + torch.randn(3, 7, dtype=torch.complex128).abs() + 0j
    x = torch.complex(-w.real.abs(), w.imag)
    cases = {
        "cauchy": (lambda *t: s4.kernel.cauchy(*t, backend), (v, z, w), 7),
        "vandermonde": (lambda v, x: s4.kernel.vandermonde(v, x, 9), (v, x), 9),
    }
    for name, (f, at, nodes) in cases.items():
        ahead = along(at)
        (got,) = tangents(f, at, ahead)
        weights = torch.randn(3, nodes, dtype=got.dtype)
        gradients = getattr(oracle, f"{name}_gradients")
        found = gradients(weights[:, None].numpy(), at[0][:, None].numpy(), *(t.numpy() for t in at[1:]))
        found[0] = found[0][:, 0]
        want = sum((g.conj() * d.numpy()).sum().real for g, d in zip(found, ahead, strict=True))
        np.testing.assert_allclose((weights.conj() * got).sum().real.item(), want, rtol=1e-9)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.promise(
    "torch.func and forward mode",
    "forward mode through a program that holds our operators, exported or compiled before it",
    supported=False,
)
@pytest.mark.parametrize("mode", ["fft", "scan"])
def test_a_program_with_operators_raises(mode: str) -> None:
    """Instead of losing the tangent, as torch does with every operator that has none."""
    layer = build("diag", mode=mode)
    u = torch.randn(B, L, H, dtype=torch.float64)
    with torch.no_grad():
        program = torch.export.export(layer, (u,)).module()
        for run in (jvp, duals):
            with pytest.raises(RuntimeError, match="forward-mode derivatives do not pass"):
                run(program, (u,), (u,))
        oracle.close(program(u), layer(u), 1e-12)
