"""Every public method on a device that refuses float64, against the oracle: see no_float64.py.

Nobody has run this on an MPS of Apple's. What is proven: the library asks such a device for nothing that it
refuses, for no operation that this torch has not written for it, and for few copies.
"""

from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from no_float64 import MPS, Device, OnDevice, device_without_float64
from torch import Tensor, nn

import s4.kernel
from s4 import (
    S4Block,
    S4Layer,
    S4Model,
    State,
    categorical,
    checks,
    generation,
    hippo,
    model,
    param_groups,
)
from s4.ops import dispatch

H, N, B, L = 4, 8, 2, 41
LAYERS: dict[str, dict[str, Any]] = {
    "dplr": {},
    "rank two, both ways": {"init": "legt", "bidirectional": True},
    "diag": {"variant": "diag"},
    "diag, both ways": {"variant": "diag", "bidirectional": True},
}
CAUSAL = ["dplr", "diag"]
VALUE, GRADIENT = 1e-4, 1e-3  # of float32, as in test_devices.py


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """The device, whose numbers are looked at as those of any other."""
    for module in (checks, generation, model):
        unread = module.unread
        monkeypatch.setattr(module, "unread", lambda t, f=unread: not isinstance(t, OnDevice) and f(t))
    with device_without_float64(monkeypatch) as found:
        yield found


def build(name: str, **options: Any) -> S4Layer:
    layer = S4Layer(H, N, **LAYERS[name], **options).to("mps")
    assert all(p.device == MPS for p in layer.parameters())
    return layer


def sent(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape).to("mps").requires_grad_(**options)


def back(t: Tensor) -> Tensor:
    """A result's numbers, which have to be on the device."""
    assert isinstance(t, OnDevice), "not on the device"
    return t.numbers


def double(t: Tensor) -> Tensor:
    return back(t.detach()).double()


def truth(
    layer: S4Layer, u: Tensor, state: Tensor | None = None, rate: float = 1.0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The oracle's outputs and last state, and what to differentiate by: parameters, u, state."""
    found = {name: double(p).requires_grad_() for name, p in layer.named_parameters()}
    inputs = [double(t).requires_grad_() for t in (u, state) if t is not None]
    y, last = oracle.forward(oracle.discrete(found, layer.discretization, rate), *inputs)
    return y, last, [*found.values(), *inputs]


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
def test_forward(name: str, mode: str, device: Device) -> None:
    layer = build(name, mode=mode)
    u = sent(B, L, H, requires_grad=True)
    leaves = [*layer.parameters(), u]
    for training in (True, False):
        layer.train(training)
        device.forget()
        y = layer(u, rate=0.7)
        # A scan has D among its maps.
        assert (device.fetched, device.sent) == (1 + (mode == "scan"), 1)
        want, _, true = truth(layer, u, rate=0.7)
        check((y,), (want,), leaves, true)
        with torch.no_grad():
            oracle.close(back(layer(u, rate=0.7)), want, VALUE)


@pytest.mark.promise("devices without float64", "states in and out, and lengths, in every mode")
@pytest.mark.parametrize("mode", ["fft", "scan", "auto"])
@pytest.mark.parametrize("name", CAUSAL)
def test_states_and_lengths(name: str, mode: str, device: Device) -> None:
    layer = build(name, mode=mode)
    u, x = sent(B, L, H, requires_grad=True), sent(B, H, N, requires_grad=True)
    leaves = [*layer.parameters(), u, x]
    want, last, true = truth(layer, u, x)
    device.forget()
    y, middle = layer(u[:, :17], x, return_state=True)
    assert (device.fetched, device.sent) == (2, 2)  # maps, and the power for the rest of the last chunk
    z, end = layer(u[:, 17:], middle, return_state=True)
    check((torch.cat([y, z], 1), end), (want, last), leaves, true)
    want, _, true = truth(layer, u, x)
    check((layer(u, x),), (want,), leaves, true)
    lengths = torch.tensor([13, L])
    on = lengths.to("mps")
    for state in (None, x):
        y, end = layer(u, state, lengths=on, return_state=True)
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
def test_what_crosses(name: str, device: Device) -> None:
    """Parameters one way and maps of 32 steps the other, then their gradients back."""
    layer, sizes = build(name, mode="scan"), set()
    c, T = 1 + layer.bidirectional, 32
    maps = H * (c * (2 * T - 1) + (1 + c) * T * N + N * N)
    want = 4 * maps + sum(p.nbytes for p in layer.parameters())
    for batch, length in ((1, 2048), (3, 4096)):
        device.forget()
        u = torch.randn(batch, length, H).to("mps")
        before = device.bytes_sent
        layer(u).sum().backward()
        sizes.add((device.bytes_sent - before, device.bytes_fetched))
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
def test_step(name: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(name)
    u, x = sent(B, 5, H, requires_grad=True), sent(B, H, N, requires_grad=True)
    want, last, true = truth(layer, u, x)

    def run() -> tuple[Tensor, Tensor]:
        outputs, state = [], x
        for t in range(u.shape[1]):
            y, state = layer.step(u[:, t], state)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    device.forget()
    got = run()
    assert (device.fetched, device.sent) == (5, 5)
    check(got, (want, last), [*layer.parameters(), u, x], true)
    # As a real device has them: plain tensors and parameters, and no mode of torch.
    core = Plain(torch._C, _len_torch_dispatch_stack=lambda: 0)
    plain = Plain(torch, _C=core, nn=Plain(torch.nn, Parameter=OnDevice))
    monkeypatch.setattr(dispatch, "torch", plain)
    monkeypatch.setattr(dispatch, "Tensor", OnDevice)
    layer.eval()
    with torch.no_grad():
        for _ in range(2):
            device.forget()
            for g, w in zip(run(), (want, last), strict=True):
                oracle.close(back(g), w, VALUE)
            assert (device.fetched, device.sent) == (1, 1) if _ == 0 else (0, 0)
        layer.C.mul_(2)
        oracle.close(back(run()[0]), truth(layer, u, x)[0], VALUE)


@pytest.mark.promise("devices without float64", "kernel by every method, as exact as on the CPU")
@pytest.mark.parametrize("name", LAYERS)
def test_kernel(name: str, device: Device) -> None:
    layer = build(name)
    found = {n: double(p) for n, p in layer.named_parameters()}
    for length in (1, 700):
        want = oracle.kernel(oracle.discrete(found, layer.discretization), length)
        for method in s4.kernel.METHODS:
            device.forget()
            k = layer.kernel(length, method=method)
            assert (device.fetched, device.sent) == (1, 1)
            assert device.bytes_sent == k.nbytes
            oracle.close(back(k) if layer.bidirectional else back(k)[None], want, 1e-6, method)


@pytest.mark.promise("devices without float64", "dense, whose float64 matrices are on the CPU")
@pytest.mark.parametrize("name", LAYERS)
def test_dense(name: str, device: Device) -> None:
    layer = build(name)
    found = {n: double(p) for n, p in layer.named_parameters()}
    want = oracle.discrete(found, layer.discretization)
    for got, wanted in zip(layer.dense(), want, strict=True):
        assert (type(got), got.dtype, got.device.type) == (Tensor, torch.float64, "cpu")
        oracle.close(got if layer.bidirectional or got.dim() == wanted.dim() else got[None], wanted, 1e-11)
    (gradient,) = torch.autograd.grad(layer.dense()[0].sum(), layer.log_dt)
    assert back(gradient).abs().min() > 0


@pytest.mark.promise("devices without float64", "made on the device, by device= or as the default one")
@pytest.mark.parametrize("name", LAYERS)
def test_made_there(name: str, device: Device) -> None:
    own = hippo.diag("lin", N) if "diag" in name else hippo.dplr("fout", N)
    on_it = tuple(t.to(torch.complex64).to("mps") for t in own)
    with torch.device("mps"):
        layers = [
            S4Layer(H, N, **LAYERS[name]),
            S4Layer(H, N, variant=LAYERS[name].get("variant", "dplr"), init=on_it),
        ]
        block = S4Block(S4Layer(H, N, **LAYERS[name]))
        y = block(torch.randn(B, L, H))
        layers[0].kernel(9)
    layers += [S4Layer(H, N, **LAYERS[name], device="mps"), block.layer]
    cpu = S4Layer(H, N, **LAYERS[name])
    assert back(y).isfinite().all()
    for layer in layers:
        layer.reset_parameters()
        assert all(p.device == MPS for p in layer.parameters())
        assert layer.dt.device == layer.Lambda.device == layer.D.device
    for layer in (layers[0], layers[2]):
        oracle.close(back(layer.Lambda), cpu.Lambda, 1e-6)
        layer.load_state_dict(cpu.state_dict())
        oracle.close(back(layer.C.detach()), cpu.C, 0)


def stack(pooling: str = "none") -> S4Model:
    blocks = [
        S4Block(S4Layer(8, N, **LAYERS[name]), norm=norm)
        for name, norm in (("dplr", "batch"), ("diag", "rms"))
    ]
    return S4Model(nn.Embedding(7, 8), blocks, nn.Linear(8, 7), norm=nn.LayerNorm(8), pooling=pooling)


@pytest.mark.promise(
    "devices without float64", "blocks and models: pooling, lengths, states, training with AdamW"
)
@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_model_trains(pooling: str, device: Device) -> None:
    """As on the CPU, from the same parameters."""
    cpu = stack(pooling)
    there = stack(pooling)
    there.load_state_dict(cpu.state_dict())
    there.to("mps")
    tokens, lengths = torch.randint(7, (3, 20)), torch.tensor([20, 5, 11])
    losses = []
    for it, u, n in ((cpu, tokens, lengths), (there, tokens.to("mps"), lengths.to("mps"))):
        optimizer = torch.optim.AdamW(param_groups(it, lr=1e-2))
        losses.append([])
        for _ in range(4):
            loss = it(u, lengths=n).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        it.eval()
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    with torch.no_grad():
        y, state = there(tokens.to("mps"), lengths=lengths.to("mps"), return_state=True)
        z, after = there.step(tokens[:, 0].to("mps"), state)
        wanted, before = cpu(tokens, lengths=lengths, return_state=True)
        want, _ = cpu.step(tokens[:, 0], before)
    oracle.close(
        back(y), wanted, 1e-2
    )  # Adam's first steps have the size of the rate, whatever the gradient's
    oracle.close(back(z), want, 1e-2)
    both = State.cat([after.select([0, 2]), after.reset([1]).detach()])
    assert {t.device for t in (*both.layers, both.total, both.length)} == {MPS}
    assert back(both.length).tolist() == [21, 12, 21, 0, 12]
    assert after.to("cpu").total.device.type == "cpu"


@pytest.mark.promise("devices without float64", "generate, greedy and drawn")
def test_generation(device: Device) -> None:
    cpu, tokens = stack().eval(), torch.randint(7, (3, 12))
    want = cpu.generate(tokens, 6)
    there = cpu.to("mps")
    given = tokens.to("mps")
    assert torch.equal(back(there.generate(given, 6)), want)
    lengths = torch.tensor([12, 3, 7]).to("mps")
    for sample in (categorical(), categorical(0.5, top_k=3, top_p=0.9), categorical(1e-300)):
        drawn = back(there.generate(given, 6, sample, lengths=lengths, stop=3))
        assert set(drawn.flatten().tolist()) <= set(range(7))
    assert torch.equal(back(there.generate(given, 6, categorical(1e-300))), want)
    logits = torch.tensor([[0.0, 1.0, -torch.inf]]).log_softmax(-1).expand(20000, 3)
    share = back(categorical()(logits.to("mps"))).float().mean()
    assert abs(share - 0.7311) < 0.02  # six deviations


@pytest.mark.promise("devices without float64", "the sums of s4.kernel and the functions of s4.hippo")
def test_functions(device: Device) -> None:
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


@pytest.mark.promise("devices without float64", "products that torch was told to reduce stay in float32")
@pytest.mark.parametrize("mode", ["fft", "scan"])
def test_reduced_precision(mode: str, device: Device) -> None:
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
def test_what_is_refused(device: Device) -> None:
    with pytest.raises(TypeError, match="float64"):
        S4Layer(H, N, dtype=torch.float64, device="mps")
    with pytest.raises(ValueError, match="backend 'cpu' cannot run"):
        build("dplr", backend="cpu")(sent(B, L, H))
    for backend in ("torch", "naive"):
        layer, u = build("dplr", backend=backend), sent(B, L, H)
        oracle.close(back(layer(u)), truth(layer, u)[0], VALUE)
