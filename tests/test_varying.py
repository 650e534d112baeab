"""The recurrence with a step of time for each input: against dense loops, in values and every gradient."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from oracle import close
from torch import Tensor

import s4.kernel
from s4 import S4Layer
from s4.backends import cpu
from s4.ops import varying as ops
from s4.ops.varying import varying
from s4.system import system

FUSED = not isinstance(s4.kernel.backends()["cpu"], str)
fused = pytest.mark.skipif(not FUSED, reason="the C++ extension is not built")
OWN = (
    [[-0.5, 1.0], [-0.3, 4.0], [-1.0, 9.0]],
    [[[0.5, 0.1 * i], [0.2 * i, 0.4], [0.1, -0.3]] for i in range(3)],
    [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]],
)
CASES: dict[str, dict[str, Any]] = {
    "rank 1": {"variant": "dplr", "n_ssm": 5},
    "rank 1, both ways": {"variant": "dplr", "bidirectional": True},
    "rank 2": {"variant": "dplr", "init": "legt"},
    "rank 2, both ways": {"variant": "dplr", "init": "legt", "bidirectional": True},
    "rank 3": {"variant": "dplr", "init": OWN},
    "zoh": {"variant": "diag", "n_ssm": 2},
    "zoh, both ways": {"variant": "diag", "bidirectional": True},
    "diagonal bilinear": {"variant": "diag", "discretization": "bilinear"},
}
FUSED_CASES = [case for case in CASES if case != "rank 3"]
B, H, N = 2, 10, 6  # H is a vector and a part of one


@pytest.fixture(params=["torch", "base", "v3", "v4"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The plain definition, and the fused code at each instruction set there is."""
    if request.param == "torch":
        return "torch"
    if not FUSED or request.param not in cpu.levels() or request.param > cpu.level():
        pytest.skip(f"no {request.param} here")
    library = cpu._load(request.param)
    monkeypatch.setattr(cpu, "_library", lambda: library)
    return "cpu"


class Inputs(NamedTuple):
    u: Tensor
    rate: Tensor
    x: Tensor | None
    resets: Tensor | None
    positions: Tensor | None


def layer_of(case: str, dtype: torch.dtype = torch.float64, d_model: int = H) -> S4Layer:
    return S4Layer(d_model, N, dtype=dtype, dt_min=0.01, dt_max=0.5, **CASES[case])


def inputs(case: str, L: int, dtype: torch.dtype = torch.float64, batch: int = B) -> Inputs:
    """Rates over two decades, a state, a few resets, positions in no order and some of them twice."""
    one_way = not CASES[case].get("bidirectional")
    u = torch.randn(batch, L, H, dtype=dtype)
    rate = (3 * torch.randn(batch, L, dtype=torch.float64)).sigmoid() * 5 + 0.05
    x = torch.randn(batch, H, N, dtype=dtype) if one_way else None
    positions = torch.randint(-1, L, (batch, 5))
    positions[:, 1:4] = torch.tensor([L - 1, -1, L - 1])
    return Inputs(u, rate.to(dtype), x, torch.rand(batch, L) < 0.1, positions if one_way else None)


def run(layer: S4Layer, given: Inputs, backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    return varying(system(*layer._systems(1.0)), layer.D, *given, backend)


def dense(layer: S4Layer, given: Inputs) -> tuple[Tensor, Tensor | None]:
    u, rate, x, resets, positions = given
    continuous = oracle.continuous(dict(layer.named_parameters()))
    y, states = oracle.varying(continuous, layer.discretization, u, rate, x, resets)
    if positions is None:
        return y, None
    return y, states.gather(1, (positions + 1)[..., None, None].expand(*positions.shape, *states.shape[2:]))


def leaves(layer: S4Layer, given: Inputs) -> dict[str, Tensor]:
    """What there are gradients of."""
    found = {name: t for name, t in given._asdict().items() if t is not None and t.is_floating_point()}
    return found | dict(layer.named_parameters())


def gradients(
    layer: S4Layer, given: Inputs, outputs: Sequence[Tensor | None], sent: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    both = [(y, g.to(y.dtype)) for y, g in zip(outputs, sent, strict=True) if y is not None and g is not None]
    wanted = leaves(layer, given)
    pairs = [y for y, _ in both], list(wanted.values()), [g for _, g in both]
    found = torch.autograd.grad(*pairs, allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


class Truth(NamedTuple):
    layer: S4Layer
    given: Inputs
    values: tuple[Tensor, Tensor | None]
    sent: list[Tensor | None]
    gradients: dict[str, Tensor]


@functools.cache
def truth(case: str, L: int, dtype: torch.dtype, batch: int = B) -> Truth:
    """Of the oracle, made once for all who compute."""
    torch.manual_seed(1)
    layer, given = layer_of(case, dtype), inputs(case, L, dtype, batch)
    for t in given:
        if t is not None and t.is_floating_point():
            t.requires_grad_()
    values = dense(layer, given)
    sent = [None if w is None else torch.randn(w.shape, dtype=torch.float64) for w in values]
    return Truth(layer, given, values, sent, gradients(layer, given, values, sent))


def check(
    case: str, L: int, backend: str, tolerance: float, dtype: torch.dtype = torch.float64, batch: int = B
) -> None:
    """Values and every gradient: errors of the largest number, or of the largest term of its sum."""
    layer, given, values, sent, wanted = truth(case, L, dtype, batch)
    got = run(layer, given, backend)
    found = gradients(layer, given, got, sent)
    assert (got[1] is None) == (values[1] is None)
    for name, g, w in zip(("y", "states"), got, values, strict=True):
        if g is not None and w is not None:
            assert g.dtype == dtype
            close(g, w, tolerance, name)
    for name, leaf in leaves(layer, given).items():
        assert found[name].dtype == leaf.dtype
        # A sum of few terms may cancel: errors then are of those.
        scale = max(1e-3, float(wanted[name].abs().max())) if leaf.numel() else 1
        error = float((found[name] - wanted[name]).abs().max()) if leaf.numel() else 0
        assert error <= tolerance * scale, name


@pytest.mark.parametrize("case", FUSED_CASES)
def test_it_is_the_dense_recurrence(case: str, backend: str) -> None:
    """Across borders of chunks, with a state before and states after, and resets."""
    check(case, 37, backend, 1e-10)


@pytest.mark.parametrize("case", ["rank 1", "zoh, both ways"])
def test_float32(case: str, backend: str) -> None:
    """Rounded at the end alone: 2^-24 of an output, for gradients of the rounded inputs and parameters."""
    check(case, 37, backend, 3e-7, torch.float32)


def test_what_no_backend_is_written_for_is_plain() -> None:
    """A rank of three, whoever is asked."""
    check("rank 3", 37, "auto", 1e-10)
    check("rank 3", 37, "torch", 1e-10)


@pytest.mark.parametrize("case", ["rank 2, both ways", "zoh", "zoh, both ways"])
def test_any_length(case: str) -> None:
    for L in (0, 1, 2, 3, 16, 17):
        check(case, L, "auto", 1e-10)
    for backend in ("auto", "torch"):
        check(case, 3, backend, 1e-10, batch=0)
        check(case, 0, backend, 1e-10)
        check(case, 1, backend, 1e-10)


@pytest.mark.parametrize("case", FUSED_CASES)
def test_one_rate_is_that_of_a_layer(case: str) -> None:
    """Over chunks of chunks, against the layer's scan and kernel."""
    layer = layer_of(case)
    u = torch.randn(1, 1100, H, dtype=torch.float64, requires_grad=True)
    rate = torch.full(u.shape[:2], 0.7, dtype=torch.float64)
    g = torch.randn(u.shape, dtype=torch.float64)
    wanted = [u, *layer.parameters()]
    y = varying(system(*layer._systems(1.0)), layer.D, u, rate)[0]
    want = layer(u, rate=0.7)
    close(y, want, 1e-11)
    for a, b in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(want, wanted, g), strict=True):
        close(a, b, 1e-10)


@pytest.mark.parametrize("case", ["rank 1, both ways", "rank 2", "zoh", "zoh, both ways"])
@pytest.mark.parametrize("where", [(), (0,), (3, 4, 16, 19), range(20)], ids=["none", "first", "some", "all"])
def test_a_reset_begins_a_sequence(case: str, where: Sequence[int]) -> None:
    """As a call for each segment, the first of which begins with the state, unless it begins with a reset."""
    L = 20
    layer, given = layer_of(case), inputs(case, L, batch=1)
    resets = torch.zeros(1, L, dtype=torch.bool)
    resets[0, list(where)] = True
    starts = sorted({0, *where})
    for backend in ("torch", "auto"):
        y, states = run(layer, given._replace(resets=resets), backend)
        parts, after = [], [] if given.x is None else [given.x]
        for start, stop in zip(starts, [*starts[1:], L], strict=True):
            x = None if resets[0, start] else given.x
            every = None if states is None else torch.arange(stop - start)[None]
            part = Inputs(given.u[:, start:stop], given.rate[:, start:stop], x, None, every)
            alone, reached = run(layer, part, backend)
            parts.append(alone)
            after += [] if reached is None else reached[0].split(1)
        close(y, torch.cat(parts, 1), 1e-13)
        if states is not None and given.positions is not None:
            close(states[0], torch.cat(after)[given.positions[0] + 1], 1e-13)


@pytest.mark.parametrize("bad", [1e30, torch.nan])
@pytest.mark.parametrize("case", ["rank 1, both ways", "rank 2", "zoh", "zoh, both ways"])
def test_nothing_passes_a_reset(case: str, bad: float) -> None:
    """No number, also none of a gradient, forward or backward in time: bit by bit, in batches of one cut."""
    L, cut = 20, 9
    layer, given = layer_of(case), inputs(case, L)
    resets = torch.zeros(B, L, dtype=torch.bool)
    resets[:, cut] = True
    g = torch.randn(B, L, H, dtype=torch.float64)

    def outcome(spoilt: slice, backend: str) -> list[Tensor]:
        """y and the gradients of u, rate and, if it is not spoilt itself, x."""
        u, rate, sent = given.u.clone(), given.rate.clone().requires_grad_(), g.clone()
        u[:, spoilt] = sent[:, spoilt] = bad
        x = None if given.x is None else given.x.clone()
        if x is not None and spoilt.start == 0:
            x[:] = bad
        leaves = [u.requires_grad_(), rate, *([] if x is None else [x.requires_grad_()])]
        y, _ = run(layer, Inputs(u, rate, x, resets, None), backend)
        return [y, *torch.autograd.grad(y, leaves, sent)]

    for backend in ("torch", "auto"):
        want = outcome(slice(L, L), backend)
        for spoilt, whole in ((slice(0, cut), slice(cut, L)), (slice(cut, L), slice(0, cut))):
            got = outcome(spoilt, backend)
            for a, b in zip(got[:3], want[:3], strict=True):
                assert torch.equal(a[:, whole], b[:, whole])
            assert not torch.equal(got[0][:, spoilt], want[0][:, spoilt])
            if whole.start == 0:
                assert all(map(torch.equal, got[3:], want[3:]))


@pytest.mark.parametrize("case", ["rank 1", "zoh", "diagonal bilinear"])
def test_steps_may_be_of_any_size(case: str) -> None:
    """Of 1e-8 to 1e3 units of time, next to each other: far inside and far past what the modes resolve."""
    layer = layer_of(case)
    with torch.no_grad():
        layer.log_dt.zero_()
    given = inputs(case, 24)
    rate = 10 ** torch.linspace(-8, 3, 24, dtype=torch.float64)[torch.randperm(24)].expand(B, 24)
    given = given._replace(rate=rate.contiguous().requires_grad_())
    want, g = dense(layer, given), torch.randn(B, 24, H, dtype=torch.float64)
    wanted = torch.autograd.grad(want[0], [given.rate, layer.A_imag, layer.B], g)
    for backend in ("torch", "auto"):
        got = run(layer, given, backend)
        close(got[0], want[0], 1e-9)
        close(got[1], want[1], 1e-9)
        for a, b in zip(
            torch.autograd.grad(got[0], [given.rate, layer.A_imag, layer.B], g), wanted, strict=True
        ):
            close(a, b, 1e-8)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_inputs_may_lie_in_any_way(backend: str) -> None:
    """Strides, one number for all, lazy conjugates and negations."""
    layer, given = layer_of("rank 2"), inputs("rank 2", 19)
    systems = system(*layer._systems(1.0))
    want = varying(systems, layer.D, *given, backend)
    strided = [None if t is None else t.mT.contiguous().mT for t in given]
    lazy = systems._replace(Lambda=systems.Lambda.conj().resolve_conj().conj(), P=torch._neg_view(-systems.P))
    for t in (strided, [torch._neg_view(-given.u), *strided[1:]]):
        got = varying(lazy, layer.D, *t, backend)
        assert all(map(torch.equal, got, want))
    one = varying(
        systems,
        layer.D,
        given.u[:1, :, :1].expand(B, 19, H),
        given.rate[:1, :1].expand(B, 19),
        backend=backend,
    )
    same = given.u[:1, :, :1].repeat(B, 1, H), given.rate[:1, :1].repeat(B, 19)
    assert torch.equal(one[0], varying(systems, layer.D, *same, backend=backend)[0])


@pytest.mark.parametrize("case", ["rank 2, both ways", "zoh"])
def test_the_plain_definition_in_blocks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few channels at a time, here of three and what is left: memory stays in bounds."""
    monkeypatch.setitem(ops._STATES, "cpu", 3 * B * 16 * N + 1)
    check(case, 37, "torch", 1e-10)


@fused
def test_threads_do_not_change_a_bit() -> None:
    layer, given = layer_of("rank 1"), inputs("rank 1", 33, batch=11)
    given.rate.requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y, states = run(layer, given, "cpu")
            assert states is not None
            wanted = [given.rate, *layer.parameters()]
            found.append([y, states, *torch.autograd.grad(y.sum() + states.square().sum(), wanted)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
