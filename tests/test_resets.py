"""Resets through a layer, a block and a model: as if each segment were a sequence of its own.

The truth is the dense oracle, run over one segment after the other, or the library's own calls for each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from oracle import close
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from s4 import S4Block, S4Layer
from s4.ops import chunks

H, N, B, RATE = 3, 6, 3, 0.7
CASES: dict[str, dict[str, Any]] = {
    "dplr": {"n_ssm": 3},
    "dplr, both ways": {"init": "legt", "bidirectional": True},
    "diag": {"variant": "diag"},
    "diag, both ways": {"variant": "diag", "discretization": "bilinear", "bidirectional": True},
}
LINEAR = ["dplr", "diag, both ways"]
# Of a batch of three, for each row where it has resets; "much" is more than some rows have inputs.
PATTERNS: dict[str, Callable[[int], list[list[int]]]] = {
    "none": lambda L: [[], [], []],
    "ends": lambda L: [[0], [L - 1], [0, L - 1]],
    "some": lambda L: [[L // 3], [1, 2, L // 2, L - 2], []],
    "all": lambda L: [[*range(L)], [*range(0, L, 2)], [*range(L // 2, L)]],
}
WAYS = [(mode, backend) for mode in ("fft", "scan", "auto") for backend in ("auto", "torch")]
ways = pytest.mark.parametrize(("mode", "backend"), WAYS)
cases = pytest.mark.parametrize("case", CASES)


def build(case: str, dtype: torch.dtype = torch.float64, **options: Any) -> S4Layer:
    return S4Layer(H, N, dtype=dtype, dt_min=0.01, dt_max=0.5, **CASES[case], **options)


def at(L: int, where: Sequence[Sequence[int]]) -> Tensor:
    """Resets at these inputs; those that no sequence of this length has are left out."""
    resets = torch.zeros(len(where), L, dtype=torch.bool)
    for row, places in zip(resets, where, strict=True):
        row[[t for t in places if 0 <= t < L]] = True
    return resets


class Given(NamedTuple):
    u: Tensor
    state: Tensor | None
    lengths: Tensor
    resets: Tensor


def by_segments(leaves: dict[str, Tensor], method: str, given: Given, rate: float) -> tuple[Tensor, Tensor]:
    """Outputs, zero past the lengths, and the states at the ends, of the oracle's loops over each segment."""
    system = oracle.discrete(leaves, method, rate)
    state = torch.zeros(len(given.u), H, N) if given.state is None else given.state
    outputs, last = [], []
    for u, x, length, resets in zip(
        given.u, state.double(), given.lengths.tolist(), given.resets, strict=True
    ):
        starts = sorted({0, *resets[:length].nonzero().flatten().tolist()})
        parts = [u[:0].double()]
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            x = torch.zeros_like(x) if start < length and resets[start] else x
            y, after = oracle.forward(system, u[None, start:stop], x[None])
            parts.append(y[0])
            x = after[0]
        outputs.append(torch.cat([*parts, torch.zeros_like(u[length:]).double()]))
        last.append(x)
    return torch.stack(outputs), torch.stack(last)


class Truth(NamedTuple):
    layer: S4Layer
    given: Given
    leaves: dict[str, Tensor]
    sent: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


@functools.cache
def truth(case: str, L: int, pattern: str, dtype: torch.dtype) -> Truth:
    """Of the oracle, once for all ways. A causal layer has a state that goes in and one that comes out."""
    torch.manual_seed(L)
    layer = build(case, dtype)
    both = layer.bidirectional
    u = torch.randn(B, L, H, dtype=dtype, requires_grad=True)
    x = None if both else torch.randn(B, H, N, dtype=dtype, requires_grad=True)
    given = Given(u, x, torch.tensor([L, (L + 1) // 2, L - L // 4]), at(L, PATTERNS[pattern](L)))
    leaves = dict(layer.named_parameters()) | {"u": u} | ({} if x is None else {"state": x})
    values = by_segments(leaves, layer.discretization, given, RATE)[: 2 - both]
    sent = tuple(torch.randn_like(y) for y in values)
    found = torch.autograd.grad(values, list(leaves.values()), sent, materialize_grads=True)
    return Truth(layer, given, leaves, sent, values, found)


def check(case: str, L: int, pattern: str, dtype: torch.dtype, mode: str, backend: str) -> None:
    """Values in training and evaluation, and the gradients of everything."""
    layer, given, leaves, sent, values, gradients = truth(case, L, pattern, dtype)
    layer.mode, layer.backend = mode, backend
    # float32: kernel and maps within 1e-5 as promised, gradients 1e-4 as of two such.
    value, gradient = (1e-9, 1e-8) if dtype == torch.float64 else (1e-5, 1e-4)

    def run() -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"lengths": given.lengths, "resets": given.resets, "rate": RATE}
        if layer.bidirectional:
            return (layer(given.u, **options),)
        return tuple(layer(given.u, given.state, return_state=True, **options))

    layer.train()
    got = run()
    found = torch.autograd.grad(got, list(leaves.values()), [g.to(dtype) for g in sent])
    layer.eval()
    with torch.no_grad():
        others = [run(), run()]  # what is kept serves the second
    for outputs in (got, *others):
        for y, want in zip(outputs, values, strict=True):
            assert y.dtype == dtype
            close(y, want, value)
    for name, a, b in zip(leaves, found, gradients, strict=True):
        # A single step may have no gradient but what its rounding leaves.
        assert float((a - b).abs().max()) <= gradient * max(1e-2, float(b.abs().max())), name


@ways
@pytest.mark.parametrize("pattern", PATTERNS)
@cases
def test_each_segment_is_a_sequence(case: str, pattern: str, mode: str, backend: str) -> None:
    """In value and every gradient; with lengths, a rate, and of a causal layer states in and out."""
    for L in (1, 43):
        check(case, L, pattern, torch.float64, mode, backend)


@ways
@pytest.mark.parametrize("case", ["dplr", "diag"])
@pytest.mark.parametrize("padded", [True, False])
def test_the_state_after_the_last_segment(case: str, padded: bool, mode: str, backend: str) -> None:
    """That comes out where none went in: with its gradients, and whatever the segments before hold."""
    layer, given, *_ = truth(case, 43, "some", torch.float64)
    layer.mode, layer.backend = mode, backend
    leaves = dict(layer.named_parameters()) | {"u": given.u}
    lengths = given.lengths if padded else torch.full((B,), 43)
    whole = given._replace(state=None, lengths=lengths)
    want = by_segments(leaves, layer.discretization, whole, RATE)[1]
    sent = torch.randn_like(want)

    def run(u: Tensor) -> Tensor:
        options: dict[str, Any] = {"lengths": lengths if padded else None, "resets": given.resets}
        state: Tensor = layer(u, rate=RATE, return_state=True, **options)[1]
        return state

    got = run(given.u)
    close(got, want, 1e-9)
    found, true = (
        torch.autograd.grad(x, list(leaves.values()), sent, allow_unused=True, materialize_grads=True)
        for x in (got, want)
    )
    for name, a, b in zip(leaves, found, true, strict=True):
        assert float((a - b).abs().max()) <= 1e-8 * max(1e-2, float(b.abs().max())), name


@ways
@cases
def test_float32(case: str, mode: str, backend: str) -> None:
    check(case, 67, "some", torch.float32, mode, backend)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("pattern", ["some", "all"])
@cases
def test_over_many_chunks(case: str, pattern: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a loop goes over, so that they are merged two by two, of lengths odd and even."""
    monkeypatch.setattr(chunks, "chunk_length", lambda *_: 2)
    monkeypatch.setattr(chunks, "fitting", lambda *_: 2)
    for L in (75, 67):
        check(case, L, pattern, torch.float64, "scan", backend)


@ways
@cases
def test_nothing_to_compute(case: str, mode: str, backend: str) -> None:
    """No inputs, where a state stays, and an empty batch; the latter also has gradients."""
    layer = build(case, mode=mode, backend=backend)
    for batch, L in ((2, 0), (0, 9), (0, 0)):
        u = torch.randn(batch, L, H, dtype=torch.float64, requires_grad=True)
        resets = torch.ones(batch, L, dtype=torch.bool)
        if layer.bidirectional:
            y = layer(u, resets=resets)
        else:
            x = torch.randn(batch, H, N, dtype=torch.float64)
            y, last = layer(u, x, resets=resets, return_state=True)
            assert torch.equal(last, x)
        assert y.shape == u.shape
        assert not any(g.any() for g in torch.autograd.grad(y.sum(), [u, layer.D], materialize_grads=True))


@ways
@pytest.mark.parametrize("case", LINEAR)
def test_shapes_without_numbers(case: str, mode: str, backend: str) -> None:
    """On "meta", and as frameworks plan a model's memory."""
    for place in (torch.device("meta"), FakeTensorMode()):
        with place:
            layer = build(case, mode=mode, backend=backend)
            u = torch.randn(2, 40, H)
            for resets in (at(40, [[3], []]), at(40, [[3], []]).expand(2, 40)):
                assert layer(u, resets=resets.to(u.device)).shape == u.shape
            if not layer.bidirectional:
                positions = torch.zeros(2, 5, dtype=torch.long)
                assert layer.states(u, positions, resets=resets.to(u.device)).shape == (2, 5, H, N)


@ways
@cases
def test_resets_past_the_end_do_not_matter(case: str, mode: str, backend: str) -> None:
    """Nor what lies there, for outputs and the state; of an empty sequence the state stays, reset or not."""
    L, lengths = 20, torch.tensor([20, 9, 0])
    layer = build(case, mode=mode, backend=backend)
    u, past = torch.randn(B, L, H).double(), torch.arange(L) >= lengths[:, None]
    x = None if layer.bidirectional else torch.randn(B, H, N).double()
    resets = torch.rand(B, L) < 0.3
    found = []
    for here in (resets & ~past, resets | past):
        given = torch.where((past & here)[..., None], torch.nan, u)
        options = {"lengths": lengths, "resets": here}
        found.append(
            (layer(given, **options),) if x is None else layer(given, x, return_state=True, **options)
        )
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-13)
    if x is not None:
        assert torch.equal(found[0][1][2], x[2])


@ways
@cases
def test_a_louder_segment_costs_no_digits(case: str, mode: str, backend: str) -> None:
    """A million times louder, before and behind: float32 has 7 digits, so none would be left."""
    layer = build(case, torch.float32, mode=mode, backend=backend)
    L, quiet = 150, slice(41, 97)
    u = 1e6 * torch.randn(1, L, H)
    u[:, quiet] /= 1e6
    x = None if layer.bidirectional else 1e6 * torch.randn(1, H, N)
    resets = at(L, [[0, quiet.start, quiet.stop]])
    want, _ = oracle.forward(
        oracle.discrete(dict(layer.named_parameters()), layer.discretization), u[:, quiet]
    )
    for training in (True, False):
        with torch.set_grad_enabled(training):
            close(layer.train(training)(u, x, resets=resets)[:, quiet], want, 1e-5)
    if x is not None:
        whole = layer(u[:, : quiet.stop], x, resets=resets[:, : quiet.stop], return_state=True)[1]
        close(whole, layer(u[:, quiet], return_state=True)[1].detach(), 1e-5)


@ways
@cases
def test_a_nan_stays_in_its_segment(case: str, mode: str, backend: str) -> None:
    """In outputs, states and the gradients of inputs and the state, whose cotangents are nan, too."""
    layer = build(case, mode=mode, backend=backend)
    L, cuts = 60, [0, 7, 8, 45]
    u, g = torch.randn(2, B, L, H).double()
    x = None if layer.bidirectional else torch.randn(B, H, N).double()
    resets = at(L, [cuts[1:]] * B)
    found = []
    for spoilt in (slice(0), slice(0, 7), slice(7, 8), slice(8, 45), slice(45, L)):
        bad, sent = u.clone(), g.clone()
        bad[1, spoilt] = sent[1, spoilt] = torch.nan
        leaves = [bad.requires_grad_()]
        if x is None:
            y = layer(bad, resets=resets)
        else:
            before = x.clone()
            if spoilt.stop == 7:  # of the first segment
                before[1] = torch.nan
            leaves.append(before.requires_grad_())
            y, last = layer(bad, before, resets=resets, return_state=True)
            assert bool(last.isfinite().all()) == (spoilt.stop != L)
        found.append([y, *torch.autograd.grad(y, leaves, sent)])
        fine = torch.ones(B, L, dtype=torch.bool)
        fine[1, spoilt] = False
        for a, want in zip(found[-1][:2], found[0], strict=False):
            assert a[1, spoilt].isnan().any() or spoilt.stop == 0
            close(a[fine], want[fine], 1e-13)
        if x is not None and spoilt.stop != 7:
            close(found[-1][2], found[0][2], 1e-13)


@ways
def test_a_state_that_a_reset_drops_may_be_anything(mode: str, backend: str) -> None:
    """What it was does not reach the gradients of parameters either."""
    for case in ("dplr", "diag"):
        layer = build(case, mode=mode, backend=backend)
        x = torch.full((2, H, N), torch.nan, dtype=torch.float64, requires_grad=True)
        y, last = layer(torch.randn(2, 40, H).double(), x, resets=at(40, [[0], [0, 30]]), return_state=True)
        for grad in torch.autograd.grad(y.sum() + last.sum(), [x, *layer.parameters()]):
            assert grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_steps_of_time_past_the_end_may_be_anything(training: bool) -> None:
    """In a block, too, which spares the layer its lengths where it can: padding is often zeros."""
    block = S4Block(build("dplr")).train(training)
    u, lengths, rate = torch.randn(2, 8, H).double(), torch.tensor([8, 3]), torch.rand(2, 8).double() + 0.5
    want = block(u[1:, :3], rate=rate[1:, :3])
    rate[1, 3:] = torch.tensor([0.0, torch.nan, -1.0, torch.inf, 0.0])
    close(block(u, lengths=lengths, rate=rate)[1:, :3], want.detach(), 1e-12)
