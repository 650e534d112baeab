"""layer.states: the states after chosen inputs, against dense loops and against `forward` of the prefixes."""

from typing import Any

import oracle
import pytest
import torch
from oracle import close
from processes import printed, process
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from s4 import S4Layer
from s4.ops import chunks

H, N, B = 3, 6, 2
CASES: dict[str, dict[str, Any]] = {
    "dplr": {"init": "legt", "n_ssm": 3},
    "diag": {"variant": "diag"},
    "diagonal bilinear": {"variant": "diag", "discretization": "bilinear"},
}
RATES = ["number", "rows", "steps"]
BACKENDS = ["auto", "torch"]


def build(case: str, dtype: torch.dtype = torch.float64, **options: Any) -> S4Layer:
    return S4Layer(H, N, dtype=dtype, dt_min=0.01, dt_max=0.5, **CASES[case], **options)


def rate_of(kind: str, L: int) -> float | Tensor:
    if kind == "number":
        return 0.7
    return 0.2 + torch.rand(*((B,) if kind == "rows" else (B, L)), dtype=torch.float64)


def positions_of(L: int) -> Tensor:
    """In no order, some of them twice, before the first and the last among them."""
    return torch.cat([torch.randint(-1, L, (B, 9)), torch.tensor([[-1, L - 1, L - 1]] * B)], 1)


def truth(
    leaves: dict[str, Tensor], method: str, positions: Tensor, resets: Tensor | None, rate: float | Tensor
) -> Tensor:
    """Of the oracle's loop over each input."""
    u = leaves["u"]
    each = torch.as_tensor(leaves.get("rate", rate), dtype=torch.float64)
    each = (each if each.dim() == 2 else each.view(-1, 1)).expand(u.shape[:2])
    every = oracle.varying(oracle.continuous(leaves), method, u, each, leaves.get("state"), resets)[1]
    return every.gather(1, (positions + 1)[..., None, None].expand(*positions.shape, H, N))


def check(
    case: str,
    L: int,
    rate: str,
    reset: float | None,
    given: bool,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> None:
    """In training with the gradient of everything, and in evaluation."""
    layer = build(case, dtype, **options)
    resets = None if reset is None else torch.rand(B, L) < reset
    positions, time = positions_of(L), rate_of(rate, L)
    leaves = dict(layer.named_parameters()) | {"u": torch.randn(B, L, H, dtype=dtype).requires_grad_()}
    if given:
        leaves["state"] = torch.randn(B, H, N, dtype=dtype).requires_grad_()
    if isinstance(time, Tensor):
        leaves["rate"] = time = time.to(dtype).requires_grad_()
    want = truth(leaves, layer.discretization, positions, resets, time)
    got = layer.states(leaves["u"], positions, leaves.get("state"), resets=resets, rate=time)
    value, gradient = (1e-9, 1e-8) if dtype == torch.float64 else (1e-5, 1e-4)
    assert got.dtype == dtype
    close(got, want, value)
    layer.eval()
    with torch.no_grad():
        again = layer.states(leaves["u"], positions, leaves.get("state"), resets=resets, rate=time)
    close(again, want, value)
    g = torch.randn_like(want)
    wanted = [t for t in leaves.values() if t is not layer.C and t is not layer.D]  # which outputs alone use
    options = {"allow_unused": True, "materialize_grads": True}
    pairs = zip(
        torch.autograd.grad(got, wanted, g.to(dtype), **options),
        torch.autograd.grad(want, wanted, g, **options),
        strict=True,
    )
    for a, b in pairs:
        assert float((a - b).abs().max() if b.numel() else 0) <= gradient * max(
            1e-2, float(b.abs().max() if b.numel() else 0)
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("case", CASES)
def test_states_are_those_of_a_loop(case: str, rate: str, backend: str) -> None:
    """Across chunks, with resets or without, with a state or without; none of one input, or of none."""
    check(case, 43, rate, 0.2, True, backend=backend)
    check(case, 36, rate, None, True, backend=backend)
    check(case, 0, rate, 0.5, True, backend=backend)
    check(case, 1, rate, 0.5, False, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_resets_everywhere_and_float32(case: str, backend: str) -> None:
    check(case, 20, "number", 1.0, True, backend=backend)
    check(case, 67, "number", 0.1, True, torch.float32, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_over_many_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a loop goes over, so that they are merged two by two."""
    monkeypatch.setattr(chunks, "chunk_length", lambda *_: 2)
    for L in (75, 134):
        for reset in (None, 0.03, 0.5):
            check("dplr", L, "number", reset, True, backend=backend)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("case", ["dplr", "diag"])
def test_each_is_the_state_of_a_prefix(case: str, rate: str) -> None:
    """As `forward` returns it of the inputs up to there, and as steps lead to it."""
    layer, L = build(case), 12
    u, x = torch.randn(B, L, H).double(), torch.randn(B, H, N).double()
    resets, time = torch.rand(B, L) < 0.2, rate_of(rate, L)
    got = layer.states(u, torch.arange(-1, L).expand(B, L + 1), x, resets=resets, rate=time)
    state = x
    for t in range(L + 1):
        part = time[:, :t] if rate == "steps" else time
        prefix = layer(u[:, :t], x, resets=resets[:, :t], rate=part, return_state=True)[1]
        close(got[:, t], prefix.detach(), 1e-10)
        close(got[:, t], state.detach(), 1e-10)
        if t < L:
            state = torch.where(resets[:, t, None, None], 0, state)
            _, state = layer.step(u[:, t], state, rate=time[:, t] if rate == "steps" else time)


@pytest.mark.parametrize("rate", RATES)
def test_of_no_positions_and_no_batch(rate: str) -> None:
    layer, u = build("dplr"), torch.randn(B, 9, H).double()
    time = rate_of(rate, 9)
    nothing = layer.states(u, torch.zeros(B, 0, dtype=torch.long), rate=time)
    assert nothing.shape == (B, 0, H, N)
    empty = time[:0] if isinstance(time, Tensor) else time
    for resets in (None, torch.zeros(0, 9, dtype=torch.bool)):
        at = torch.zeros(0, 4, dtype=torch.int32)
        assert layer.states(u[:0], at, resets=resets, rate=empty).shape == (0, 4, H, N)


@pytest.mark.parametrize("rate", RATES)
def test_nothing_passes_a_reset(rate: str) -> None:
    """Neither a nan, also in a state, nor a gradient; nor does what comes after a position reach it."""
    layer, L = build("dplr"), 40
    u, x, time = torch.randn(B, L, H).double(), torch.full((B, H, N), torch.nan).double(), rate_of(rate, L)
    u[:, :17] = u[:, 31:] = torch.nan
    u.requires_grad_(), x.requires_grad_()
    resets = torch.zeros(B, L, dtype=torch.bool)
    resets[:, 17] = True
    positions = torch.tensor([[17, 30, 20]] * B)
    got = layer.states(u, positions, x, resets=resets, rate=time)
    part = time[:, 17:31] if rate == "steps" else time
    close(got, layer.states(u[:, 17:31].detach(), positions - 17, rate=part).detach(), 1e-12)
    of_u, of_x = torch.autograd.grad(got.sum(), [u, x])
    assert of_u.isfinite().all()
    assert not of_u[:, :17].any()
    assert not of_x.any()


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("reset", [0.0, 0.1, 1.0])
def test_no_tensor_holds_a_state_for_each_input(reset: float, evaluated: bool) -> None:
    """However many resets there are: a few times the inputs, in the gradient, too, not N times."""
    layer, L = S4Layer(2, 64, variant="diag", backend="torch"), 8192
    u, resets = torch.randn(1, L, 2), torch.rand(1, L) < reset
    if evaluated:  # what a scan has kept of chunks that suit its resets
        layer.eval().mode = "scan"
        with torch.no_grad():
            layer(u[:, :200], resets=resets[:, :200])
            layer.states(u, torch.tensor([[9, L - 1]]), resets=resets)
    with Largest() as largest:
        _, back = torch.func.vjp(lambda u: layer.states(u, torch.tensor([[9, L - 1]]), resets=resets), u)
        back(torch.ones(1, 2, 2, 64))
    assert largest.numel <= 4 * u.numel()


COMPILED = """
import torch
from torch._dynamo.utils import counters
from s4 import S4Layer
torch.manual_seed(0)
for variant, lengths in (("dplr", (40, 77)), ("diag", (40,))):
    layer = S4Layer(3, 8, variant=variant)
    compiled = torch.compile(layer.states, fullgraph=True, backend="aot_eager")
    counters.clear()
    for L in lengths:
        u, x = torch.randn(2, L, 3, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
        positions, resets = torch.randint(-1, L, (2, L // 9)), torch.rand(2, L) < 0.1
        rate = 0.7 if variant == "dplr" else torch.rand(2, L) + 0.5
        found = []
        for states in (layer.states, compiled):
            y = states(u, positions, x, resets=resets, rate=rate)
            found.append([y, *torch.autograd.grad(y.square().sum(), [u, x, layer.B, layer.log_dt])])
        for got, want in zip(found[1], found[0]):
            assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert counters["stats"]["unique_graphs"] <= 2, counters
"""


@pytest.mark.promise(
    "torch.compile",
    "`layer.states` with `fullgraph=True`, with state, `resets` and `rate`: 2 graphs for all lengths",
)
def test_it_compiles() -> None:
    assert printed(process(COMPILED)) == ""
