"""The layer on every device here: each mode, step, state and gradient against the oracle's loops.

What only a GPU can show beyond these numbers, graphs, streams and the like, is in test_gpu.py.
"""

from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
OPTIONS: dict[str, dict[str, Any]] = {
    "dplr": {},
    "rank two, both ways": {"init": "legt", "bidirectional": True},
    "dplr, two systems": {"init": "fout", "n_ssm": 2},
    "diag": {"variant": "diag"},
    "diag, both ways": {
        "variant": "diag",
        "init": "lin",
        "discretization": "bilinear",
        "bidirectional": True,
    },
}
CAUSAL = {name: options for name, options in OPTIONS.items() if not options.get("bidirectional")}
# By the contract float64 is the dense recurrence to 1e-9, and float32 modes agree to 1e-4. Gradients are sums
# over all steps, and cancel.
VALUE = {torch.float64: 1e-9, torch.float32: 1e-4}
GRADIENT = {torch.float64: 1e-8, torch.float32: 1e-3}
B, H, N = 2, 4, 16


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=VALUE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def built(options: dict[str, Any], dtype: torch.dtype, device: str, **more: Any) -> S4Layer:
    """A layer that is not at its initialisation, with the same numbers on every device."""
    layer = S4Layer(H, N, dtype=dtype, **options, **more)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return layer.to(device)


def truth(
    layer: S4Layer, u: Tensor, state: Tensor | None = None, rate: float = 1.0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The oracle's outputs and last state, on the CPU, and what to differentiate by: parameters, u, state."""
    found = [p.detach().cpu().double().requires_grad_() for p in layer.parameters()]
    inputs = [t.detach().cpu().double().requires_grad_() for t in (u, state) if t is not None]
    names = dict(zip((name for name, _ in layer.named_parameters()), found, strict=True))
    system = oracle.discrete(names, layer.discretization, rate)
    y, last = oracle.forward(system, *inputs)
    return y, last, [*found, *inputs]


def compare(got: Tensor, want: Tensor, leaves: list[Tensor], true: list[Tensor], dtype: torch.dtype) -> None:
    """In value, and in the gradient by each leaf for one random gradient that comes back."""
    oracle.close(got.cpu(), want, VALUE[dtype], "value")
    back = torch.randn(want.shape, dtype=torch.float64)
    sent = back.to(got.dtype).to(got.device)
    grads = torch.autograd.grad(got, leaves, sent, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(want, true, back, allow_unused=True, materialize_grads=True)
    for i, (g, w) in enumerate(zip(grads, wanted, strict=True)):
        oracle.close(g.cpu(), w, GRADIENT[dtype], f"gradient {i}")


@pytest.mark.parametrize("mode", ["fft", "scan", "auto"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_mode_is_the_recurrence(name: str, mode: str, dtype: torch.dtype, device: str) -> None:
    layer = built(OPTIONS[name], dtype, device, mode=mode)
    u = torch.randn(B, 97, H).to(device, dtype).requires_grad_()
    want, _, true = truth(layer, u, rate=0.7)
    y = layer(u, rate=0.7)
    assert y.device.type == device
    compare(y, want, [*layer.parameters(), u], true, dtype)


@pytest.mark.parametrize("mode", ["fft", "scan"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_state_goes_in_and_comes_out(name: str, mode: str, dtype: torch.dtype, device: str) -> None:
    """Through two pieces of odd lengths, and the gradients with it."""
    layer = built(OPTIONS[name], dtype, device, mode=mode)
    u = torch.randn(B, 70, H).to(device, dtype).requires_grad_()
    state = torch.randn(B, H, N).to(device, dtype).requires_grad_()
    want, last, true = truth(layer, u, state)
    first, middle = layer(u[:, :33], state, return_state=True)
    second, end = layer(u[:, 33:], middle, return_state=True)
    got = torch.cat([torch.cat([first, second], 1).flatten(), end.flatten()])
    compare(got, torch.cat([want.flatten(), last.flatten()]), [*layer.parameters(), u, state], true, dtype)


@pytest.mark.parametrize("still", [True, False], ids=["in eval", "with gradients"])
@pytest.mark.parametrize("name", CAUSAL)
def test_step_is_the_recurrence(name: str, still: bool, dtype: torch.dtype, device: str) -> None:
    layer = built(OPTIONS[name], dtype, device).train(not still)
    u = torch.randn(B, 9, H).to(device, dtype).requires_grad_(not still)
    state = torch.randn(B, H, N).to(device, dtype).requires_grad_(not still)
    want, _, true = truth(layer, u, state)
    outputs, x = [], state
    with torch.set_grad_enabled(not still):
        for t in range(u.shape[1]):
            y, x = layer.step(u[:, t], x)
            outputs.append(y)
    got = torch.stack(outputs, 1)
    if still:
        oracle.close(got.cpu(), want, VALUE[dtype])
    else:
        compare(got, want, [*layer.parameters(), u, state], true, dtype)


@pytest.mark.parametrize("mode", ["fft", "scan"])
def test_padding_is_left_out(mode: str, device: str) -> None:
    """Of outputs, states and gradients, also where it holds nan."""
    layer = built({}, torch.float64, device, mode=mode)
    lengths = [1, 2, 40, 97]
    u = torch.randn(4, 97, H, dtype=torch.float64, device=device)
    for row, length in zip(u, lengths, strict=True):
        row[length:] = torch.nan
    u.requires_grad_()
    y, last = layer(u, lengths=torch.tensor(lengths, device=device), return_state=True)
    assert not y.isnan().any()
    (grad,) = torch.autograd.grad(y.sum() + last.sum(), u)
    for row, length in enumerate(lengths):
        want, state, true = truth(layer, u[row : row + 1, :length])
        oracle.close(y[row : row + 1, :length].cpu(), want, 1e-9)
        oracle.close(last[row : row + 1].cpu(), state, 1e-9)
        (wanted,) = torch.autograd.grad(want.sum() + state.sum(), true[-1:])
        oracle.close(grad[row : row + 1, :length].cpu(), wanted, 1e-8)
        assert not y[row, length:].any()
        assert not grad[row, length:].any()


@pytest.mark.parametrize("L", [1, 2, 511, 4096])
@pytest.mark.parametrize("name", OPTIONS)
def test_kernel_is_the_impulse_response(name: str, L: int, device: str) -> None:
    """Short and long: from sums and from powers."""
    layer = built(OPTIONS[name], torch.float32, device)
    with torch.no_grad():
        system = oracle.discrete({n: p.cpu() for n, p in layer.named_parameters()}, layer.discretization)
        want = oracle.long_kernel(system, L)
        got = layer.kernel(L).cpu()
    oracle.close(got if layer.bidirectional else got[None], want, 1e-5)


def test_reduced_precision_is_for_what_asked_for_it(device: str) -> None:
    """TensorFloat-32 allowed for the user's own products does not reach the layer's."""
    layer = built({}, torch.float32, device, mode="scan")
    u = torch.randn(B, 300, H, device=device)
    want, _, _ = truth(layer, u)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        y, state = layer(u, return_state=True)
        y_t, _ = layer.step(u[:, 0], state)
    finally:
        torch.set_float32_matmul_precision(before)
    oracle.close(y.cpu(), want, 1e-4)
    assert y_t.isfinite().all()


def test_a_model_trains_and_generates(device: str) -> None:
    """A few steps of Adam lower the loss; greedy tokens are those of the parallel pass."""
    blocks = [S4Block(S4Layer(16, 8), dropout=0.0) for _ in range(2)]
    model = S4Model(nn.Embedding(7, 16), blocks, nn.Linear(16, 7), norm=nn.LayerNorm(16)).to(device)
    tokens = torch.arange(64, device=device).remainder(7).expand(4, 64)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with torch.no_grad():
        made = model.generate(tokens[:2, :10], 6)
        whole = torch.cat([tokens[:2, :10], made], 1)
        assert torch.equal(model(whole)[:, 9:-1].argmax(-1), made)
