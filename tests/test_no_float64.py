"""Every public method on a device that refuses float64, against the oracle: see no_float64.py.

Nobody has run this on an MPS of Apple's. What is proven: the library asks such a device for nothing that it
refuses, for no operation that this torch has not written for it, and for few copies.
"""

from itertools import pairwise
from typing import Any

import oracle
import pytest
import torch
from no_float64 import LAYERS, VALUE, B, Device, H, L, N, OnDevice, back, build, double, sent, truth
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import s4.kernel
from s4 import S4Layer, hippo
from s4.ops import dispatch

CAUSAL = ["dplr", "diag"]
GRADIENT = 1e-3  # of float32, as in test_devices.py


def check(
    got: tuple[Tensor, ...], want: tuple[Tensor, ...], leaves: list[Tensor], true: list[Tensor]
) -> None:
    """Values, and the gradients of parameters on the device by all leaves."""
    for g, w in zip(got, want, strict=True):
        oracle.close(back(g), w, VALUE)
    weights = [torch.randn(w.shape) for w in want]
    grads = torch.autograd.grad(got, leaves, [w.to("mps") for w in weights], allow_unused=True)
    wanted = torch.autograd.grad(want, true, [w.double() for w in weights], allow_unused=True)
    for g, w in zip(grads, wanted, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            oracle.close(back(g), w, GRADIENT)


@pytest.mark.promise("devices without float64", "forward in every mode, and its gradients")
@pytest.mark.promise(
    "devices without float64", "one copy of parameters to the CPU and one of kernel or maps back a forward"
)
@pytest.mark.parametrize("mode", ["fft", "scan", "auto"])
@pytest.mark.parametrize("name", LAYERS)
def test_forward(name: str, mode: str, mps: Device) -> None:
    layer = build(name, mode=mode)
    u = sent(B, L, H, requires_grad=True)
    leaves = [*layer.parameters(), u]
    for training in (True, False):
        layer.train(training)
        mps.forget()
        y = layer(u, rate=0.7)
        # A scan has D among its maps.
        assert (mps.fetched, mps.sent) == (1 + (mode == "scan"), 1)
        want, _, true = truth(layer, u, rate=0.7)
        check((y,), (want,), leaves, true)
        with torch.no_grad():
            oracle.close(back(layer(u, rate=0.7)), want, VALUE)


@pytest.mark.promise("devices without float64", "states in and out, and lengths, in every mode")
@pytest.mark.parametrize("mode", ["fft", "scan", "auto"])
@pytest.mark.parametrize("name", CAUSAL)
def test_states_and_lengths(name: str, mode: str, mps: Device) -> None:
    layer = build(name, mode=mode)
    u, x = sent(B, L, H, requires_grad=True), sent(B, H, N, requires_grad=True)
    leaves = [*layer.parameters(), u, x]
    want, last, true = truth(layer, u, x)
    mps.forget()
    y, middle = layer(u[:, :17], x, return_state=True)
    assert (mps.fetched, mps.sent) == (2, 2)  # maps, and the power for the rest of the last chunk
    z, end = layer(u[:, 17:], middle, return_state=True)
    check((torch.cat([y, z], 1), end), (want, last), leaves, true)
    want, _, true = truth(layer, u, x)
    check((layer(u, x),), (want,), leaves, true)
    lengths = torch.tensor([13, L])
    on = lengths.to("mps")
    for state in (None, x):
        mps.forget()
        y, end = layer(u, state, lengths=on, return_state=True)
        # One set of maps for outputs and states, and powers of A that move a state on.
        assert (mps.fetched, mps.sent) == (2, 2)
        for row, length in enumerate(lengths.tolist()):
            one = slice(row, row + 1)
            want, last, _ = truth(layer, u[one, :length], None if state is None else x[one])
            oracle.close(back(y)[one, :length], want, VALUE)
            oracle.close(back(end)[one], last, VALUE)
            assert not back(y)[row, length:].any()
    oracle.close(back(layer(u, lengths=on))[1:], truth(layer, u[1:])[0], VALUE)
    with pytest.raises(ValueError, match="lengths must lie in"):
        layer(u, lengths=on + 1)


@pytest.mark.promise("devices without float64", "nothing of the length of a sequence crosses in a scan")
@pytest.mark.parametrize("name", LAYERS)
def test_what_crosses(name: str, mps: Device) -> None:
    """Parameters one way and maps of 32 steps the other, then their gradients back."""
    layer, sizes = build(name, mode="scan"), set()
    c, T = 1 + layer.bidirectional, 32
    maps = H * (c * (2 * T - 1) + (1 + c) * T * N + N * N)
    want = 4 * maps + sum(p.nbytes for p in layer.parameters())
    for batch, length in ((1, 8192), (2, 9000)):
        mps.forget()
        u = torch.randn(batch, length, H).to("mps")
        before = mps.bytes_sent
        layer(u).sum().backward()
        sizes.add((mps.bytes_sent - before, mps.bytes_fetched))
    assert sizes == {(want, want)}


class Plain:
    """A module of torch with some names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@pytest.mark.promise(
    "devices without float64", "step, in training and in eval, where nothing crosses after the first"
)
@pytest.mark.parametrize("name", CAUSAL)
def test_step(name: str, mps: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(name)
    u, x = sent(B, 5, H, requires_grad=True), sent(B, H, N, requires_grad=True)
    want, last, true = truth(layer, u, x)

    def run() -> tuple[Tensor, Tensor]:
        outputs, state = [], x
        for t in range(u.shape[1]):
            y, state = layer.step(u[:, t], state)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    mps.forget()
    got = run()
    assert (mps.fetched, mps.sent) == (5, 5)
    check(got, (want, last), [*layer.parameters(), u, x], true)
    # As a real device has them: plain tensors and parameters, and no mode of torch.
    core = Plain(torch._C, _len_torch_dispatch_stack=lambda: 0)
    plain = Plain(torch, _C=core, nn=Plain(torch.nn, Parameter=OnDevice))
    monkeypatch.setattr(dispatch, "torch", plain)
    monkeypatch.setattr(dispatch, "Tensor", OnDevice)
    layer.eval()
    with torch.no_grad():
        for crossed in ((1, 1), (0, 0)):
            mps.forget()
            for g, w in zip(run(), (want, last), strict=True):
                oracle.close(back(g), w, VALUE)
            assert (mps.fetched, mps.sent) == crossed
        layer.C.mul_(2)
        oracle.close(back(run()[0]), truth(layer, u, x)[0], VALUE)


@pytest.mark.promise("devices without float64", "kernel by every method, as exact as on the CPU")
@pytest.mark.parametrize("name", LAYERS)
def test_kernel(name: str, mps: Device) -> None:
    layer = build(name)
    found = {n: double(p) for n, p in layer.named_parameters()}
    for length in (1, 700):
        want = oracle.kernel(oracle.discrete(found, layer.discretization), length)
        for method in s4.kernel.METHODS:
            mps.forget()
            k = layer.kernel(length, method=method)
            assert (mps.fetched, mps.sent) == (1, 1)
            assert mps.bytes_sent == k.nbytes
            oracle.close(back(k) if layer.bidirectional else back(k)[None], want, 1e-6, method)


@pytest.mark.promise("devices without float64", "dense, whose float64 matrices are on the CPU")
@pytest.mark.parametrize("name", LAYERS)
def test_dense(name: str, mps: Device) -> None:
    layer = build(name)
    found = {n: double(p) for n, p in layer.named_parameters()}
    want = oracle.discrete(found, layer.discretization)
    for got, wanted in zip(layer.dense(), want, strict=True):
        assert (type(got), got.dtype, got.device.type) == (Tensor, torch.float64, "cpu")
        oracle.close(got if layer.bidirectional or got.dim() == wanted.dim() else got[None], wanted, 1e-11)
    (gradient,) = torch.autograd.grad(layer.dense()[0].sum(), layer.log_dt)
    assert back(gradient).abs().min() > 0


@pytest.mark.promise("devices without float64", "the sums of s4.kernel and the functions of s4.hippo")
def test_functions(mps: Device) -> None:
    v, z, w = (torch.randn(3, n, dtype=torch.complex64) for n in (5, 7, 5))
    w = torch.complex(-w.real.abs(), w.imag)
    on = [t.to("mps").requires_grad_() for t in (v, z + 4, w)]
    for backend in ("auto", "torch", "naive"):
        found = s4.kernel.cauchy(*on, backend)
        oracle.close(back(found), torch.from_numpy(oracle.cauchy(v, z + 4, w)), 1e-5)
        torch.autograd.grad(found.abs().sum(), on)
    found = s4.kernel.vandermonde(on[0], on[2], 9)
    oracle.close(back(found), torch.from_numpy(oracle.vandermonde(v, w, 9)), 1e-6)
    torch.autograd.grad(found.sum(), [on[0], on[2]])
    state, lags = torch.randn(2, 3, N), torch.rand(3, 6)
    moved = state.to("mps"), lags.to("mps")
    oracle.close(hippo.basis("legt", N, moved[1]), hippo.basis("legt", N, lags.double()), 1e-5)
    oracle.close(back(hippo.reconstruct("legs", *moved)), hippo.reconstruct("legs", state, lags), 1e-5)
    oracle.close(back(hippo.from_modes("legs", moved[0])), hippo.from_modes("legs", state), 1e-5)


@pytest.mark.promise("devices without float64", "floating point operations are counted as on the CPU")
@pytest.mark.parametrize("mode", ["fft", "scan"])
def test_flops(mode: str, mps: Device) -> None:
    counts = []
    layer = S4Layer(H, N, mode=mode)
    for where in ("cpu", "mps"):
        layer.to(where)
        u = torch.randn(B, L, H).to(where)
        with FlopCounterMode(display=False) as counter:
            layer(u).sum().backward()
        counts.append(counter.get_flop_counts()["Global"])
    assert counts[0] == counts[1]


@pytest.mark.promise("devices without float64", "products that torch was told to reduce stay in float32")
@pytest.mark.parametrize("mode", ["fft", "scan"])
def test_reduced_precision(mode: str, mps: Device) -> None:
    layer, u, x = build("dplr", mode=mode), sent(B, L, H, requires_grad=True), sent(B, H, N)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        y, last = layer(u, x, return_state=True)
        y.sum().backward()
        s4.kernel.cauchy(*(torch.randn(3, 5, dtype=torch.complex64).to("mps") for _ in range(3)), "torch")
    finally:
        torch.set_float32_matmul_precision(before)
    want, end, _ = truth(layer, u, x)
    oracle.close(back(y), want, VALUE)
    oracle.close(back(last), end, VALUE)


@pytest.mark.promise(
    "devices without float64", "parameters in float64, and backends for another device", supported=False
)
def test_what_is_refused(mps: Device) -> None:
    with pytest.raises(TypeError, match="float64"):
        S4Layer(H, N, dtype=torch.float64, device="mps")
    with pytest.raises(ValueError, match="backend 'cpu' cannot run"):
        build("dplr", backend="cpu")(sent(B, L, H))
    for backend in ("torch", "naive"):
        layer, u = build("dplr", backend=backend), sent(B, L, H)
        oracle.close(back(layer(u)), truth(layer, u)[0], VALUE)


@pytest.mark.promise("devices without float64", "resets, `states` and irregular steps")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", ["fft", "scan"])
def test_resets_and_irregular_steps(name: str, mode: str, mps: Device) -> None:
    layer = build(name, mode=mode)
    u = sent(2, L, H, requires_grad=True)
    resets = torch.zeros(2, L, dtype=torch.bool)
    resets[0, [5, 17]] = resets[1, 0] = True
    got = layer(u, resets=resets.to("mps"))
    for row, starts in enumerate([(0, 5, 17, L), (0, L)]):
        parts = [truth(layer, u[row : row + 1, a:b])[0] for a, b in pairwise(starts)]
        oracle.close(back(got)[row : row + 1], torch.cat(parts, 1), VALUE)
    for rate in (torch.full((2,), 2.0), torch.full((2, L), 2.0)):
        oracle.close(back(layer(u, rate=rate.to("mps"))), back(layer(u, rate=2.0)), VALUE)
    for y in (got, layer(u, rate=rate.to("mps"))):
        assert all(back(g).isfinite().all() for g in torch.autograd.grad(y.sum(), [u, *layer.parameters()]))
    if not layer.bidirectional:
        found = layer.states(u, torch.tensor([[20, -1]] * 2).to("mps"))
        oracle.close(back(found)[:, 0], truth(layer, u[:, :21])[1], VALUE)
        assert not back(found)[:, 1].any()
