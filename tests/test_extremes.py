"""Numbers at the ends of their range: modes next to zero or long decayed, signals of any scale."""

import math

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

import s4.kernel
from s4 import S4Layer
from s4.kernel import diag
from s4.precision import without_denormals
from s4.system import Recurrence

BACKENDS = [name for name, it in s4.kernel.backends().items() if isinstance(it, dict)]


def phi(z: Tensor) -> Tensor:
    """(e^z - 1) / z as the integral of e^(z s) over s from 0 to 1, by Gauss's rule."""
    nodes, weights = (torch.from_numpy(t) / 2 for t in np.polynomial.legendre.leggauss(40))
    return (torch.exp(z[..., None] * (nodes + 0.5)) * weights).sum(-1)


def by_integral(layer: S4Layer, values: list[Tensor], L: int) -> Tensor:
    """The kernel of a "diag" layer under zero-order hold, from its parameters."""
    log_dt, log_A_real, A_imag, B, C = values
    dt, Lambda = log_dt.exp()[:, None], torch.complex(-log_A_real.exp(), A_imag)
    z = Lambda * dt
    weights = torch.view_as_complex(C)[0] * torch.view_as_complex(B) * dt * phi(z)
    return 2 * (weights[..., None] * torch.exp(z[..., None] * torch.arange(L))).sum(1).real


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rate", [-800.0, -60.0, -30.0, -20.0, -12.0, -9.0, -7.0, -3.0, 1.0])
def test_gradients_of_a_mode_next_to_zero(rate: float) -> None:
    """A mode of Lambda = -exp(rate), and one of that imaginary part; first and second derivatives."""
    layer = S4Layer(2, 4, variant="diag", dtype=torch.float64)
    with torch.no_grad():
        layer.log_A_real.copy_(torch.tensor([rate, rate - 5]))
        layer.A_imag.copy_(torch.tensor([0.0, math.exp(rate)]))
    leaves = [layer.log_dt, layer.log_A_real, layer.A_imag, layer.B, layer.C]
    found = []
    for K in (layer.kernel(20), by_integral(layer, leaves, 20)):
        grads = torch.autograd.grad(K.sin().sum(), leaves, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        found.append((K, *grads, *again))
    for i, (got, want) in enumerate(zip(*found, strict=True)):
        assert got.isfinite().all()
        oracle.close(got, want, 1e-9 if i < 6 else 1e-6)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("decay", [700.0, 720.0, 744.0, 800.0, 1e5])
def test_gradients_of_a_mode_that_is_gone_in_a_step(decay: float, backend: str) -> None:
    """e^-decay is a denormal number between 708 and 745."""
    layer = S4Layer(2, 4, variant="diag", backend=backend)
    with torch.no_grad():
        layer.log_dt.zero_()
        layer.log_A_real.fill_(math.log(decay))
    y, last = layer(torch.randn(1, 40, 2), torch.randn(1, 2, 4), return_state=True)
    (y.sum() + last.sum()).backward()
    for method in ("sums", "powers"):
        layer.kernel(50, method=method).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("a", [0.0, 1e-323, 1e-310, 1e-295])
def test_sums_over_a_mode_next_to_nothing(a: float) -> None:
    """Of which the logarithm has a derivative beyond the range."""
    parts = [torch.full((1, 2), value, dtype=torch.float64, requires_grad=True) for value in (a, 1.0, 1.0)]
    none = torch.zeros(0, 1, 2, dtype=torch.float64)
    recurrence = Recurrence(parts[0], none, none, parts[1], parts[2][None])
    K = diag.kernel(recurrence, 5, torch.float64)
    assert (K[..., 1:].abs() < 1e-290).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(K.sum(), parts))


@pytest.mark.parametrize("scale", [1e-20, 1e-26, 1e-30, 1e30])
@pytest.mark.parametrize("mode", ["scan", "fft", "auto"])
@pytest.mark.parametrize("variant", ["dplr", "diag"])
def test_a_signal_of_any_scale_keeps_its_digits(variant: str, mode: str, scale: float) -> None:
    """Outputs, states and gradients in float32, next to float64.

    Beside rounding, numbers below the range of float32, 1e-38, are lost: next to 1e-30 that is 1e-8, and
    outputs are sums of some hundred.
    """
    layer = S4Layer(4, 64, variant=variant, mode=mode)
    exact = S4Layer(4, 64, variant=variant, mode="scan", dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    for L in (3, 500):
        u, weight, x = torch.randn(2, L, 4), torch.randn(2, L, 4), torch.randn(2, 4, 64)
        found = []
        for model in (layer, exact):
            inputs = [(t.to(model.D.dtype) * scale).requires_grad_() for t in (u, x)]
            y, last = model(*inputs, return_state=True)
            grads = torch.autograd.grad([y, last], inputs, [weight.to(y) * scale, inputs[1].detach()])
            found.append((y, last, *grads))
        for got, want in zip(*found, strict=True):
            oracle.close(got.double() / scale, want / scale, 1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_layer_of_any_scale_keeps_its_digits(backend: str) -> None:
    """Rows C and inputs B are scaled, not the signal: the maps of a chunk are tiny as a whole."""
    for name in ("B", "C"):
        layer = S4Layer(3, 16, mode="scan", backend=backend)
        exact = S4Layer(3, 16, mode="fft", dtype=torch.float64)
        exact.load_state_dict(layer.state_dict())
        with torch.no_grad():
            layer.D.zero_()
            exact.D.zero_()
            getattr(layer, name).mul_(1e-31)
        u = torch.randn(2, 200, 3)
        oracle.close(layer(u).double() * 1e31, exact(u.double()), 1e-4)


def test_only_what_is_small_next_to_its_channel_is_dropped() -> None:
    tiny = torch.finfo(torch.float32).tiny
    t = torch.tensor(
        [
            [1.0, 1e7 * tiny, 1e9 * tiny],
            [1e-30, 1e7 * tiny, tiny],
            [0.0, math.nan, 1.0],
            [math.inf, 1e-31, -1e-40],
        ]
    )
    t.requires_grad_()
    kept = without_denormals(t)
    want = torch.tensor(
        [[1.0, 0.0, 1e9 * tiny], [1e-30, 1e7 * tiny, tiny], [0.0, math.nan, 1.0], [math.inf, 0.0, 0.0]]
    )
    torch.testing.assert_close(kept, want, rtol=0, atol=0, equal_nan=True)
    kept.sum().backward()
    assert (t.grad == 1).all()
