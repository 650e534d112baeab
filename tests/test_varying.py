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
    positions = torch.randint(-1, L, (batch, 5)) if one_way else None
    return Inputs(u, rate.to(dtype), x, torch.rand(batch, L) < 0.1, positions)


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


def check(case: str, L: int, backend: str, tolerance: float, dtype: torch.dtype = torch.float64, batch: int = B) -> None:
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
        assert float((found[name] - wanted[name]).abs().max() if leaf.numel() else 0) <= tolerance * scale, name


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


@pytest.mark.parametrize("case", CASES)
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


def segments(resets: Tensor) -> list[tuple[int, int]]:
    """Where the segments of one sequence start and stop."""
    L = len(resets)
    starts = sorted({0, *resets.nonzero()[:, 0].tolist()})
    return list(zip(starts, [*starts[1:], L], strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("where", ["none", "first", "all", "some"])
def test_a_reset_begins_a_sequence(case: str, where: str) -> None:
    """As calls for each segment, the first from the state, unless there is a reset at its start."""
    layer, L = layer_of(case), 40
    given = inputs(case, L, batch=1)
    resets = torch.zeros(1, L, dtype=torch.bool)
    resets[0, {"none": [], "first": [0], "all": [*range(L)], "some": [3, 4, 16, 31, 39]}[where]] = True
    for backend in ("torch", "auto"):
        y, states = run(layer, given._replace(resets=resets), backend)
        for start, stop in segments(resets[0]):
            fresh = start > 0 or bool(resets[0, 0])
            part = Inputs(given.u[:, start:stop], given.rate[:, start:stop], None if fresh else given.x, None, None)
            if states is not None:
                part = part._replace(positions=torch.arange(stop - start)[None])
            alone, after = run(layer, part, backend)
            close(y[:, start:stop], alone, 1e-13)
            for p, state in zip(given.positions[0].tolist(), states[0], strict=True) if states is not None else ():
                if start <= p < stop:
                    close(state, after[0, p - start], 1e-13)
                if p == -1:
                    assert torch.equal(state, given.x[0])


@pytest.mark.parametrize("bad", [1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("case", CASES)
def test_nothing_passes_a_reset(case: str, bad: float) -> None:
    """No digit is lost to an earlier or a later segment, and no gradient: bit by bit."""
    layer, L, cut = layer_of(case), 24, 9
    given = inputs(case, L)._replace(positions=None)
    resets = torch.zeros(B, L, dtype=torch.bool)
    resets[:, cut] = True
    found: list[list[Tensor]] = []
    for which in ("", "u", "g", "x"):
        for backend in ("torch", "auto"):
            for side in (slice(0, cut), slice(cut, L)):
                values = [t.detach().clone() for t in (given.u, given.rate, given.u)]
                u, rate, g = values
                x = given.x if given.x is None else given.x.clone()
                if which == "x" and x is not None:
                    x[:] = bad
                elif which:
                    dict(u=u, g=g, x=u)[which][:, side] = bad
                leaves = [u.requires_grad_(), rate.requires_grad_(), *([] if x is None else [x.requires_grad_()])]
                y, _ = run(layer, Inputs(u, rate, x, resets, None), backend)
                back = torch.autograd.grad(y, leaves, g)
                other = slice(cut, L) if side.start == 0 else slice(0, cut)
                kept = [t[:, other] for t in (y, *back[:2])]
                if other.start == 0 and x is not None and which != "x":
                    kept.append(back[2])
                if which == "x" and x is not None and side.start > 0:
                    continue
                found.append(kept)
                if which:
                    at = {("torch", 0): 0, ("torch", cut): 1, ("auto", 0): 2, ("auto", cut): 3}
                    want = found[at[backend, side.start]]
                    for a, b in zip(kept, want, strict=True):
                        assert bool(a.isfinite().all())
                        assert torch.equal(a, b), (which, backend)
