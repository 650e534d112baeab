"""torch.compile: how many graphs, what they compute, and that they follow the parameters."""

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from processes import lines, printed, process
from torch import Tensor
from torch.autograd import forward_ad

import s4.system
from s4 import S4Layer
from s4.ops import chunks, convolve, maps, response
from s4.sequence import operator as sequence_kept
from s4.system import Recurrence, discretize, system

GRAPHS = 3  # the first, static one; one for another length or batch; one for both, where they change apart


@pytest.mark.promise(
    "torch.compile",
    "`fullgraph=True`: at most 3 graphs, the first static one included, for all lengths and batches from 2 "
    "up; every mode, variant and direction, with state and `lengths`, in training and evaluation",
)
@pytest.mark.promise("torch.compile", "`dynamic=True`, and `mark_dynamic` of all tensors: 2 graphs at most")
@pytest.mark.parametrize("mode", ["fft", "scan", "auto"])
def test_a_few_graphs_serve_every_shape(mode: str) -> None:
    """With the numbers of eager mode: both round the same float64 systems to float32, in two orders of sums.

    Sums of 257 products, of at most 64 in a chunk, lose some 1e-6 of the largest number; a gradient by a
    parameter adds up those of every position.
    """
    found = lines("compiled.py", mode)
    assert len(found) == 7
    for *case, dynamic, graphs, value, gradient in found:
        assert graphs <= (2 if dynamic else GRAPHS), case
        assert value < 2e-5, case
        assert gradient < 2e-4, case


CHANGED = """
import gc, torch
from torch._dynamo.utils import counters
from s4 import S4Layer
from s4.ops import kept
torch.manual_seed(0)
for mode, variant in (("fft", "dplr"), ("scan", "diag"), ("auto", "dplr")):
    layer = S4Layer(4, 8, mode=mode, variant=variant).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    u, x = torch.randn(2, 300, 4), torch.randn(2, 4, 8)
    with torch.no_grad():
        for change in (
            lambda: None,
            lambda: layer.C.mul_(2),
            lambda: layer.log_dt.data.add_(0.1),
            lambda: setattr(layer, "B", torch.nn.Parameter(layer.B * 3)),
            lambda: layer.load_state_dict({n: p + 0.01 for n, p in layer.state_dict().items()}),
            lambda: layer.double(),
        ):
            change()
            given = u.to(layer.D.dtype), x.to(layer.D.dtype)
            want = layer.train()(*given, return_state=True)
            layer.eval()
            for _ in range(2):
                torch.testing.assert_close(compiled(*given, return_state=True), want, rtol=1e-4, atol=1e-4)
        # A rate is no constant of the graph.
        counters.clear()
        for rate in (0.5, 0.6, 0.7, 0.8, 0.9):
            got, want = compiled(*given, rate=rate), layer(*given, rate=rate)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert counters["stats"]["unique_graphs"] <= 2, counters
        # A transform inside the graph sees no operator.
        tangent = torch.compile(lambda u, v: torch.func.jvp(layer, (u,), (v,)), backend="aot_eager")
        torch.testing.assert_close(tangent(given[0], given[0])[1], layer(given[0]), rtol=1e-9, atol=1e-9)
    del layer, compiled, tangent
    torch._dynamo.reset()
    gc.collect()
    assert len(kept._kept) == 0
"""


@pytest.mark.promise(
    "torch.compile",
    "a compiled layer in evaluation follows every change of its parameters, has one graph for all rates, "
    "and leaves nothing behind",
)
def test_what_is_kept_follows_the_parameters() -> None:
    printed(process(CHANGED))


@pytest.mark.promise(
    "torch.compile", "a gradient penalty through a compiled layer: torch raises", supported=False
)
@pytest.mark.parametrize("mode", ["fft", "scan"])
def test_a_gradient_penalty_raises(mode: str, unchecked: None) -> None:
    """Never a wrong number; compile what computes the penalty instead, or leave the layer eager."""
    layer, u = S4Layer(4, 8, mode=mode), torch.randn(2, 9, 4, requires_grad=True)
    y = torch.compile(layer, backend="aot_eager")(u)
    (g,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.square().sum().backward()


def recurrence(variant: str) -> Recurrence:
    layer = S4Layer(3, 8, variant=variant, dtype=torch.float64)
    return Recurrence(*(part.detach().requires_grad_() for part in discretize(system(*layer._systems(1.0)))))


def operators(variant: str) -> dict[str, tuple[Callable[..., Any], list[Tensor], Callable[..., Any]]]:
    """Each operator that only graphs hold, what it is differentiated by, and the same by dense matrices."""
    a, F, G, B, C = system_ = list(recurrence(variant))
    D = torch.randn(3, dtype=torch.float64, requires_grad=True)
    u, k, back = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 10), (3, 10), (3, 10))
    )
    f64 = torch.float64
    positions = torch.tensor([[0, 9, -1, 4], [3, 3, 8, 2]])
    resets = torch.zeros(2, 10, dtype=torch.bool)
    resets[0, [3, 8]] = resets[1, [0, 2]] = True
    u_, x_, inward, onward = (
        torch.randn(shape, dtype=f64, requires_grad=True)
        for shape in ((2, 10, 3), (3, 2, 8), (3, 2, 8), (3, 8, 8))
    )

    def power(T: int) -> Callable[..., Tensor]:
        return lambda *p: maps.power(*p, T, f64, "torch")

    def powered(T: int) -> Callable[..., Tensor]:
        def run(*p: Tensor) -> Tensor:
            dense = s4.system.dense(Recurrence(*p[:5]))
            return torch.linalg.matrix_power(dense, T).mT + 0 * sum(t.sum() for t in p)

        return run

    def kernel(*p: Tensor) -> Tensor:
        dense, rows = s4.system.dense(Recurrence(*p[:3], B, p[4])), []
        column = p[3]
        for _ in range(7):
            rows.append(torch.einsum("chn,hqn->cqh", p[4], column))
            column = torch.einsum("hij,hqj->hqi", dense, column)
        return torch.stack(rows, -1)

    def moved(u: Tensor, x: Tensor, inward: Tensor, onward: Tensor) -> Tensor:
        """Row by row, chunk by chunk of two steps, from one reset to the next."""
        found = []
        for b, positions_b in enumerate(positions.tolist()):
            at = {-1: (x[:, b], torch.zeros_like(x[:, b]))}
            before = x[:, b]
            for t in range(10):
                start = max(s for s in range(t + 1) if s == 0 or resets[b, s])
                if resets[b, t]:
                    before = torch.zeros_like(before)
                odd = (t - start) % 2
                rows = [u[b, t - odd + i, :, None] * inward[:, 1 - odd + i] for i in range(1 + odd)]
                at[t] = before, sum(rows[1:], rows[0])
                if odd:
                    before = torch.einsum("hn,hnm->hm", before, onward) + at[t][1]
            found.append([torch.stack(part, 1) for part in zip(*(at[p] for p in positions_b), strict=True)])
        return torch.stack([torch.stack(part, 1) for part in zip(*found, strict=True)])

    def segments(u: Tensor, ahead: Tensor, behind: Tensor) -> Tensor:
        number, rows = resets.cumsum(1), []
        for t in range(10):
            terms = []
            for j in range(10):
                tap = ahead[:, t - j] if j <= t else behind[:, j - t - 1]
                terms.append(torch.where((number[:, j] == number[:, t])[:, None], tap * u[:, j], 0))
            rows.append(sum(terms[1:], terms[0]))
        return torch.stack(rows, 1)

    def toeplitz(u: Tensor, ahead: Tensor, behind: Tensor | None = None) -> Tensor:
        y = []
        for t in range(u.shape[-1]):
            terms = [ahead[:, t - j] * u[..., j] for j in range(t + 1)]
            terms += [] if behind is None else [behind[:, j - t - 1] * u[..., j] for j in range(t + 1, 10)]
            y.append(sum(terms[1:], terms[0]))
        return torch.stack(y, -1)

    inputs = [*system_, D]
    return {
        "power of none": (power(0), inputs, powered(0)),
        "power": (power(5), inputs, powered(5)),
        "response": (
            lambda *p: response.operator(*p, 7, f64, "torch"),
            [a, F, G, B[:, None].detach().requires_grad_(), C],
            kernel,
        ),
        "states": (lambda *p: chunks.operator(*p, positions, resets)[:2], [u_, x_, inward, onward], moved),
        "segments": (lambda *p: convolve.segments(*p, resets), [u_, k, back], segments),
        "causal": (lambda *p: convolve.operator(*p, None), [u, k], toeplitz),
        "two-sided": (convolve.operator, [u, k, back], toeplitz),
    }


@pytest.mark.parametrize("variant", ["dplr", "diag"])
@pytest.mark.parametrize(
    "name", ["power of none", "power", "response", "states", "segments", "causal", "two-sided"]
)
def test_operators_of_graphs_are_what_they_say(name: str, variant: str) -> None:
    """In value, in every gradient, and in the gradients' own gradients, with no fused code."""
    made, inputs, truth = operators(variant)[name]

    def run(*p: Tensor) -> Tensor:
        found = made(*p)
        return found if isinstance(found, Tensor) else torch.stack(found)

    oracle.close(run(*inputs), truth(*inputs).detach(), 1e-12)
    back = torch.randn_like(run(*inputs))
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(run(*inputs), inputs, back, **options)
    recorded = torch.autograd.grad(run(*inputs), inputs, back, create_graph=True, **options)
    want = torch.autograd.grad(truth(*inputs), inputs, back, create_graph=True, **options)
    for got, again, true in zip(first, recorded, want, strict=True):
        oracle.close(got, true.detach(), 1e-11)
        oracle.close(again, true.detach(), 1e-11)
    if name == "power of none":  # whose gradients are constants
        return
    twice = [sum(g.square().sum() for g in grads if g.requires_grad) for grads in (recorded, want)]
    seconds = [torch.autograd.grad(t, inputs, **options) for t in twice if isinstance(t, Tensor)]
    assert len(seconds) == 2
    for got, true in zip(*seconds, strict=True):
        oracle.close(got, true, 1e-10)


@pytest.mark.parametrize("name", ["power", "response", "states", "segments", "causal", "two-sided"])
def test_operators_of_graphs_lose_no_tangent(name: str) -> None:
    """They raise, as torch would drop it without a word."""
    run, inputs, _ = operators("dplr")[name]
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(RuntimeError, match="forward-mode"):
        run(*[forward_ad.make_dual(t.detach(), torch.ones_like(t)) for t in inputs])


def test_the_operator_of_evaluation_loses_no_tangent() -> None:
    layer = S4Layer(3, 8)
    *given, rate, discretization = layer._systems(1.0)
    u = torch.randn(2, 9, 3)
    options = torch.tensor(rate).double(), discretization, "fft", torch.float32, "auto", False
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(u, u)
        with pytest.raises(RuntimeError, match="forward-mode"):
            sequence_kept(given, layer.D, dual, None, None, None, *options)


@pytest.mark.parametrize("variant", ["dplr", "diag"])
def test_operators_of_graphs_are_sound(variant: str, unchecked: None) -> None:
    """What torch.library checks: shapes of fakes, no input changed or returned, gradients that trace."""
    a, F, G, B, C = recurrence(variant)
    D = torch.randn(3, dtype=torch.float64)
    u, k = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 10), (3, 10)))
    check, f64 = torch.library.opcheck, torch.float64
    for T in (0, 3):
        check(maps.power, (a, F, G, B, C, D, T, f64, "auto"))
    resets = torch.rand(2, 10) < 0.3
    rows, state = u.detach().mT.contiguous().requires_grad_(), torch.randn(3, 2, 8, requires_grad=True)
    inward, onward = (torch.randn(shape, requires_grad=True) for shape in ((3, 4, 8), (3, 8, 8)))
    for some in (None, resets):
        check(chunks.operator, (rows, state, inward, onward, torch.tensor([[9, -1], [3, 3]]), some))
    check(convolve.segments, (rows, k, None, resets))
    check(convolve.segments, (rows, k, k.detach().clone().requires_grad_(), resets))
    check(convolve.operator, (u, k, None))
    check(convolve.operator, (u, k, k.detach().clone().requires_grad_()))
    check(response.operator, (a, F, G, B[:, None], C, 7, f64, "torch"))
    layer = S4Layer(3, 8, variant=variant)
    *given, rate, discretization = layer._systems(1.0)
    values = [None if p is None else p.detach() for p in given], layer.D.detach(), torch.randn(2, 70, 3)
    state, lengths = torch.randn(2, 3, 8), torch.tensor([70, 3])
    for mode in ("fft", "scan", "auto"):
        for x_, rows, cut, returns in (
            (None, None, None, False),
            (state, lengths, torch.rand(2, 70) < 0.1, True),
        ):
            options = torch.tensor(rate).double(), discretization, mode, torch.float32, "auto", returns
            check(sequence_kept, (*values, x_, rows, cut, *options))
