"""The way that mode="auto" takes: all ways are the same map, and what is kept is never out of date."""

import contextlib
import copy

import oracle
import pytest
import torch
from torch import Tensor, nn

import s4.kernel
from s4 import S4Layer
from s4.ops import dispatch

FUSED = not isinstance(s4.kernel.backends()["cpu"], str)
VARIANTS = ["dplr", "diag"]
H, N = 3, 8


def build(variant: str, **options: object) -> S4Layer:
    return S4Layer(H, N, variant=variant, dtype=torch.float64, **options)  # type: ignore[arg-type]


def way(layer: S4Layer, batch: int, L: int, stateful: bool, kept: bool) -> str:
    with torch.no_grad():
        recurrence = s4.system.discretize(s4.system.system(*layer._systems(1.0)))
    return dispatch.way(layer.mode, layer.backend, recurrence, batch, L, stateful, kept, "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table(variant: str) -> None:
    layer = build(variant)
    assert [way(layer, 1, L, True, False) for L in (1, 2)] == ["steps"] * 2
    assert [way(layer, 1, L, True, False) for L in (0, 3, 4096)] == ["scan"] * 3
    assert [way(layer, 1, L, False, False) for L in (0, 1, 2)] == ["fft", "steps", "fft"]
    assert [way(layer, B, 1, False, False) for B in (32, 33)] == ["steps", "fft"]
    assert [way(layer, 1, L, True, True) for L in (8, 9)] == ["steps", "scan"]
    assert [way(layer, 1, L, False, True) for L in (4, 5, 512, 513)] == ["steps", "fft", "fft", "scan"]
    assert [way(layer, 64, L, False, True) for L in (32, 33)] == ["fft", "scan"]
    assert [way(layer, 640, L, False, False) for L in (31, 32)] == ["fft", "scan" if FUSED else "fft"]
    with torch.no_grad():
        assert [way(layer, 1, L, True, False) for L in (8, 9)] == ["steps", "scan"]
    both = build(variant, bidirectional=True)
    assert way(both, 1, 1, False, True) == "fft"
    named = build(variant, backend="torch")
    assert [way(named, 1, 2, s, False) for s in (True, False)] == ["scan", "fft"]


def truth(layer: S4Layer, u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    A, B, C, D = layer.dense()
    return oracle.recurrence(A, B, C, D, u, x)


LENGTHS = [0, 1, 2, 3, 4, 5, 8, 9, 31, 33, 64, 100]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["auto", "fft", "scan"])
def test_a_stream_of_chunks_is_the_whole(mode: str, variant: str) -> None:
    """In eval, where things are kept from chunk to chunk, and in training; also with gradients."""
    layer = build(variant, mode=mode)
    u, x = torch.randn(2, sum(LENGTHS), H).double(), torch.randn(2, H, N).double()
    want, last = truth(layer, u, x)
    for training, grad in ((False, False), (True, False), (False, True)):
        layer.train(training)
        with torch.set_grad_enabled(grad):
            state, y = x, []
            for piece in u.split(LENGTHS, 1):
                out, state = layer(piece, state, return_state=True)
                y.append(out)
        oracle.close(torch.cat(y, 1), want, 1e-9)
        oracle.close(state, last, 1e-9)


CHANGES = {
    "data": lambda layer: layer.C.data.mul_(2),
    "numpy": lambda layer: layer.D.detach().numpy().__imul__(3),
    "replaced": lambda layer: setattr(layer, "B", nn.Parameter(layer.B.detach() * 2)),
    "loaded": lambda layer: layer.load_state_dict({k: 0.9 * v for k, v in layer.state_dict().items()}),
    "option": lambda layer: setattr(layer, "discretization", "bilinear"),
    "backend": lambda layer: setattr(layer, "backend", "torch"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["auto", "fft", "scan"])
def test_what_is_kept_is_never_out_of_date(mode: str, change: str) -> None:
    layer = build("diag", mode=mode).eval()
    u, x = torch.randn(2, 40, H).double(), torch.randn(2, H, N).double()
    with torch.no_grad():
        for rate in (1.0, 0.5, 1.0):
            for _ in range(2):
                got, want = layer(u, x, rate=rate, return_state=True), copy.deepcopy(layer)
                want.mode = "scan"
                for a, b in zip(got, want.train()(u, x, rate=rate, return_state=True), strict=True):
                    oracle.close(a, b, 1e-10)
                layer.step(u[:, 0], x, rate=rate)
        CHANGES[change](layer)
        want_y, want_x = truth(layer, u, x)
        for _ in range(2):
            y, last = layer(u, x, return_state=True)
            oracle.close(y, want_y, 1e-9)
            oracle.close(last, want_x, 1e-9)
        oracle.close(layer(u), truth(layer, u, x * 0)[0], 1e-9)


@pytest.mark.skipif(not FUSED, reason="the C++ extension is not built")
def test_a_stream_makes_its_maps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for a constant length, too; nothing is made once more, kept in training or copied."""
    made: list[str] = []
    for name in ("maps", "response"):
        run = getattr(s4.backends.cpu, name)
        monkeypatch.setattr(
            s4.backends.cpu, name, lambda *a, run=run, name=name: made.append(name) or run(*a)
        )
    layer = build("dplr").eval()
    u, state = torch.randn(1, 32, H).double(), layer.initial_state(1)
    with torch.no_grad():
        for _ in range(3):
            _, state = layer(u, state, return_state=True)
            layer(u)
    assert made == ["maps"] or sorted(made) == ["maps", "response"]
    assert len(layer._kept.of(*s4.ops.step.identity(layer._systems(1.0), layer.D, "auto"))) > 0
    layer.train()
    assert layer._kept._entry is None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["auto", "fft", "scan"])
def test_padded_sequences_end_in_their_own_states(mode: str, variant: str) -> None:
    layer = build(variant, mode=mode)
    lengths = torch.tensor([0, 1, 70, 33, 2])
    u, x = torch.randn(5, 70, H).double(), torch.randn(5, H, N).double()
    leaves = [u.requires_grad_(), x.requires_grad_(), *layer.parameters()]
    for state in (x, None):
        y, last = layer(u, state, lengths=lengths, return_state=True)
        want = [
            truth(layer, u[b : b + 1, :n], 0 * x[b : b + 1] if state is None else x[b : b + 1])
            for b, n in enumerate(lengths)
        ]
        for b, (out, after) in enumerate(want):
            oracle.close(y[b : b + 1, : lengths[b]], out, 1e-9)
            oracle.close(last[b : b + 1], after, 1e-9)
        got = torch.autograd.grad(last.sin().sum(), leaves, allow_unused=True, materialize_grads=True)
        loss = sum(after.sin().sum() for _, after in want)
        theirs = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        for a, b in zip(got, theirs, strict=True):
            oracle.close(a, b, 1e-8)


@pytest.mark.skipif(not FUSED, reason="the C++ extension is not built")
def test_parameters_without_memory_are_not_compared() -> None:
    """A tensor subclass that holds others, and one on "meta", have no address for C++ to read."""
    from torch.testing._internal.two_tensor import TwoTensor

    u, x = torch.randn(1, 600, H).double(), torch.randn(1, H, N).double()
    layer = build("diag").eval()
    want = layer(u)
    with torch.no_grad():
        layer(u)
        layer.C = nn.Parameter(TwoTensor(layer.C.detach(), layer.C.detach()))
        for _ in range(2):
            oracle.close(layer(u), want, 1e-12)
        layer.C = nn.Parameter(layer.C.detach().a.to("meta"))
        for _ in range(2):
            for run in (lambda: layer(u), lambda: layer.step(u[:, 0], x)):
                with contextlib.suppress(RuntimeError, ValueError):  # but never the end of the process
                    run()


@pytest.mark.parametrize("mode", ["auto", "fft", "scan"])
def test_gradients_in_eval_are_those_of_training(mode: str) -> None:
    """Where they are recorded nothing is kept: each call has a graph of its own."""
    layer = build("dplr", mode=mode)
    u, x = torch.randn(2, 40, H).double(), torch.randn(2, H, N).double()
    found = []
    for training in (True, False, False):
        layer.train(training)
        with torch.no_grad():
            layer(u, x, return_state=True)
        y, last = layer(u, x, return_state=True)
        found.append(torch.autograd.grad(y.sin().sum() + last.sin().sum(), list(layer.parameters())))
    for others in found[1:]:
        for got, want in zip(others, found[0], strict=True):
            oracle.close(got, want, 1e-9)


def test_little_is_kept() -> None:
    """One set of maps, one for segments, one of what is left of a chunk, however many lengths there were."""
    layer = S4Layer(4, 128).eval()
    with torch.no_grad():
        for L in (9, 17, 33, 65, 129, 257, 600):
            u = torch.randn(1, L, 4)
            _, x = layer(u, return_state=True)
            layer(u, x, resets=torch.arange(L)[None] % 9 == 8, return_state=True)
        kept = layer._kept.of(*s4.ops.step.identity(layer._systems(1.0), layer.D, "auto"))
    maps = {"maps", "maps of segments", "powers", "rest", "kernel"}
    assert set(kept) <= {"system", "recurrence", "rounded"} | maps
    layer.double()
    assert layer._kept._entry is None
