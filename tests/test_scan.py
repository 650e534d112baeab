"""mode="scan": the same system as the oracle's loops, in value and gradient, whatever the chunks."""

import copy
from pathlib import Path
from typing import NamedTuple

import oracle
import pytest
import torch
from test_process import run
from torch import Tensor

import s4.sequence
from s4 import S4Layer, kernel
from s4.backends import cpu
from s4.ops import chunks, scan

H = 4


class Case(NamedTuple):
    variant: str
    init: str
    discretization: str | None = None
    d_state: int = 16
    n_ssm: int = 2
    bidirectional: bool = False
    rate: float = 1.0

    @property
    def method(self) -> str:
        return self.discretization or ("zoh" if self.variant == "diag" else "bilinear")


CASES = [
    Case("dplr", "legs"),
    Case("dplr", "legs", d_state=64, rate=0.5),
    Case("dplr", "legt", d_state=6, n_ssm=1),
    Case("dplr", "fout", rate=30.0),
    Case("dplr", "legs", bidirectional=True),
    Case("diag", "legs", rate=2.0),
    Case("diag", "lin", "bilinear", n_ssm=4),
    Case("diag", "inv", bidirectional=True),
]
CAUSAL = [case for case in CASES if not case.bidirectional]
PAIR = [CASES[0], CASES[5]]
T = 32  # chunk_length of all cases but that of 64 states
LENGTHS = [1, 2, T - 1, T, T + 1, 1047]


def ids(case: Case) -> str:
    direction = "both" if case.bidirectional else "causal"
    return f"{case.variant}-{case.init}-{case.method}-N{case.d_state}-{direction}-x{case.rate:g}"


@pytest.fixture(params=["whole", "blocks"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All channels at once, and one at a time, as on a CPU when there are many."""
    if request.param == "blocks":
        monkeypatch.setattr(scan, "_BLOCK", 1)


def build(case: Case, dtype: torch.dtype = torch.float64) -> S4Layer:
    layer = S4Layer(
        H,
        case.d_state,
        variant=case.variant,
        init=case.init,
        discretization=case.discretization,
        n_ssm=case.n_ssm,
        bidirectional=case.bidirectional,
        mode="scan",
        dtype=dtype,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return layer


def parameters(layer: S4Layer) -> dict[str, Tensor]:
    return {
        name: value.detach().double().clone().requires_grad_() for name, value in layer.named_parameters()
    }


def inputs(case: Case, L: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """u (B, L, H) and an incoming state (B, H, N)."""
    return torch.randn(batch, L, H).to(dtype), torch.randn(batch, H, case.d_state).to(dtype)


def truth(layer: S4Layer, case: Case, u: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return oracle.forward(oracle.discrete(parameters(layer), case.method, case.rate), u, x)


def test_the_cases_meet_their_chunks() -> None:
    """What the lengths below are chosen for: less than a chunk, one, more than the loop goes over."""
    assert chunks.chunk_length(2, 1047, 16) == T
    assert 1047 // T >= scan._SERIAL
    assert 1047 % T


@pytest.mark.parametrize("L", LENGTHS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_scan_is_the_recurrence(case: Case, L: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        layer = build(case, dtype)
        u, x = inputs(case, L, dtype=dtype)
        want, _ = truth(layer, case, u, None)
        y = layer(u, rate=case.rate)
        assert y.dtype == dtype
        oracle.close(y, want, tolerance)
        if not case.bidirectional:
            want, state = truth(layer, case, u, x)
            y, last = layer(u, x, rate=case.rate, return_state=True)
            assert last.dtype == dtype
            oracle.close(y, want, tolerance)
            oracle.close(last, state, tolerance)


@pytest.mark.parametrize("L", [1, T, 2 * T + 3])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_gradients_are_those_of_the_recurrence(case: Case, L: int) -> None:
    """Of every parameter, the input and the state, through outputs and last state at once."""
    layer = build(case)
    u, x = inputs(case, L)
    weight, weight_state = torch.randn_like(u), torch.randn_like(x)
    ours = dict(layer.named_parameters())
    theirs = parameters(layer)
    grads = []
    for leaves in (ours, theirs):
        leaves |= {"u": u.clone().requires_grad_(), "state": x.clone().requires_grad_()}
        state = None if case.bidirectional else leaves["state"]
        if leaves is theirs:
            y, last = oracle.forward(oracle.discrete(theirs, case.method, case.rate), leaves["u"], state)
        elif case.bidirectional:
            y = layer(leaves["u"], rate=case.rate)
        else:
            y, last = layer(leaves["u"], state, rate=case.rate, return_state=True)
        loss = (y * weight).sum() + (0 if case.bidirectional else (last * weight_state).sum())
        grads.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=case.bidirectional))
    for name, got, want in zip(ours, *grads, strict=True):
        if want is not None:
            oracle.close(got, want, 1e-8, name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("c", [1, 2, 3, 6, 13])
def test_merging_chunks_is_going_over_them(c: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    S, x, P = torch.randn(3, 2, c, 5), torch.randn(3, 2, 5), torch.randn(3, 5, 5) / 3
    want = scan.recur(S.double(), x.double(), P.double(), None, reverse)
    assert torch.equal(want[0][:, :, -1 if reverse else 0], x.double())
    for serial in (1, 2):
        monkeypatch.setattr(scan, "_SERIAL", serial)
        for got, truth in zip(
            scan.recur(S.double(), x.double(), P.double(), None, reverse), want, strict=True
        ):
            oracle.close(got, truth, 1e-12)


@pytest.mark.parametrize("blocks", ["whole"], indirect=True)
def test_the_operator_is_sound() -> None:
    H, B, L, T, N = 3, 2, 40, 8, 4
    shapes = ((B, L, H), (H, B, N), (H, 2 * T - 1), (H, T, N), (H, T, N), (H, N, N))
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    for reverse in (False, True):
        torch.library.opcheck(scan.operator, (*tensors, reverse, torch.float32, "torch"))


def test_a_row_of_zeros_learns() -> None:
    """Dropping numbers that are too small drops no gradient."""
    layer = build(CASES[0])
    torch.nn.init.zeros_(layer.C)
    layer(torch.randn(1, 3 * T, H).double()).sum().backward()
    assert (layer.C.grad != 0).all()


TINY = [
    Case("dplr", "legs", d_state=4),
    Case("diag", "lin", d_state=4),
    Case("dplr", "legt", d_state=4, bidirectional=True),
]


@pytest.mark.parametrize("case", TINY, ids=ids)
def test_gradcheck(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over three chunks, the last of them ragged; of the first and of the second derivative."""
    monkeypatch.setattr(chunks, "chunk_length", lambda *_: 2)
    layer = build(case)
    u, x = (t.requires_grad_() for t in inputs(case, 5, batch=1))
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(u: Tensor, x: Tensor, *values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        keywords = {} if case.bidirectional else {"state": x, "return_state": True}
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (u,), keywords)

    assert torch.autograd.gradcheck(run, (u, x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (u, x, *values), fast_mode=True)


@pytest.fixture(scope="module")
def long() -> Tensor:
    """One long input for all who need it."""
    return torch.randn(1, 65536, H, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("case", "L"),
    [
        (Case("dplr", "legs", d_state=64), 65536),
        (Case("diag", "lin", d_state=64), 65536),
        (Case("dplr", "fout", d_state=32, bidirectional=True), 16384),
    ],
    ids=str,
)
def test_scan_and_convolution_agree_at_length(case: Case, L: int, long: Tensor) -> None:
    """Values and gradients; in float32 against the convolution in float64."""
    single = build(case, torch.float32)
    weight = torch.randn(1, L, H)
    results = []
    for mode, dtype in (("fft", torch.float64), ("scan", torch.float64), ("scan", torch.float32)):
        layer = copy.deepcopy(single).to(dtype)
        layer.mode = mode
        u = long[:, :L].to(dtype).requires_grad_()
        y = layer(u)
        grads = torch.autograd.grad((y * weight).sum(), [u, *layer.parameters()])
        results.append((y, *grads))
    names = ["y", "u", *dict(single.named_parameters())]
    for name, want, exact, rounded in zip(names, *results, strict=True):
        oracle.close(exact, want, 1e-9, name)
        oracle.close(rounded, want, 1e-4, name)


@pytest.mark.parametrize("case", PAIR, ids=ids)
@pytest.mark.usefixtures("unchecked")  # a thousand steps
def test_scan_and_step_agree(case: Case) -> None:
    layer = build(case, torch.float32)
    u, x = inputs(case, 1047, dtype=torch.float32)
    with torch.no_grad():
        y, last = layer(u, x, return_state=True)
        outputs = []
        for t in range(u.shape[1]):
            y_t, x = layer.step(u[:, t], x)
            outputs.append(y_t)
    oracle.close(torch.stack(outputs, 1), y, 1e-4)
    oracle.close(x, last, 1e-4)


@pytest.mark.parametrize("case", CAUSAL, ids=ids)
def test_pieces_are_the_whole(case: Case) -> None:
    """In value and gradient, for pieces of every kind."""
    layer = build(case)
    sizes = [1, 0, 7, T, 2 * T, T + 1, 40]
    u, x = (t.requires_grad_() for t in inputs(case, sum(sizes)))
    weight = torch.randn_like(u)
    leaves = [u, x, *layer.parameters()]
    y, last = layer(u, x, return_state=True)
    want = torch.autograd.grad((y * weight).sum() + last.square().sum(), leaves)
    state, pieces = x, []
    for piece in u.split(sizes, 1):
        out, state = layer(piece, state, return_state=True)
        pieces.append(out)
    got_y = torch.cat(pieces, 1)
    oracle.close(got_y, y, 1e-9)
    oracle.close(state, last, 1e-9)
    got = torch.autograd.grad((got_y * weight).sum() + state.square().sum(), leaves)
    for g, w in zip(got, want, strict=True):
        oracle.close(g, w, 1e-8)


@pytest.mark.parametrize("case", [*PAIR, CASES[4]], ids=ids)
def test_padded_is_unpadded(case: Case) -> None:
    """Each sequence alone, from its own state to its own end; what lies past an end is not looked at."""
    layer = build(case)
    L = 3 * T + 5
    sizes = [L, 1, 0, T, 2 * T + 1]
    u, x = inputs(case, L, batch=len(sizes))
    for b, size in enumerate(sizes):
        u[b, size:] = torch.nan
    lengths = torch.tensor(sizes)
    if case.bidirectional:
        y, last = layer(u, lengths=lengths, rate=case.rate), None
    else:
        y, last = layer(u, x, lengths=lengths, rate=case.rate, return_state=True)
    for b, size in enumerate(sizes):
        want, state = truth(layer, case, u[b : b + 1, :size], None if case.bidirectional else x[b : b + 1])
        oracle.close(y[b : b + 1, :size], want, 1e-9)
        assert (y[b, size:] == 0).all()
        if last is not None:
            oracle.close(last[b : b + 1], state, 1e-9)


@pytest.mark.parametrize("case", [*PAIR, CASES[4]], ids=ids)
def test_empty_sequences_and_batches(case: Case) -> None:
    layer = build(case)
    _, x = inputs(case, 1)
    for batch, L in ((2, 0), (0, 7), (0, 3 * T + 1), (0, 0)):
        u = torch.randn(batch, L, H).double().requires_grad_()
        y = layer(u)
        assert y.shape == (batch, L, H)
        y.sum().backward()
        assert all((p.grad == 0).all() for p in layer.parameters())
        if not case.bidirectional:
            assert torch.equal(layer(u, x[:batch], return_state=True)[1], x[:batch])
            assert torch.equal(layer(u, return_state=True)[1], layer.initial_state(batch))


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=ids)
def test_hostile_strides(case: Case) -> None:
    layer = build(case)
    base = torch.randn(80, 2 * H, 6).double()
    variants = {
        "transposed": base[:, :H].permute(2, 0, 1),
        "contiguous in time": base[:H].permute(2, 1, 0),
        "sliced": base.permute(2, 0, 1)[:, 1::2, ::2],
        "expanded batch": base[:1, :, :1].permute(2, 1, 0).expand(3, 2 * H, H),
        "expanded time": base[:3, :1, :1].expand(3, 70, H),
        "flipped": base[:, :H].permute(2, 0, 1).flip(1),
    }
    for name, u in variants.items():
        weight = torch.randn_like(u.contiguous())
        results = []
        for v in (u, u.contiguous()):
            v = v.detach().requires_grad_()
            y = layer(v)
            results.append((y, torch.autograd.grad(y, v, weight.mT.contiguous().mT)[0]))
        for got, want in zip(*results, strict=True):
            oracle.close(got, want, 1e-12, name)


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float64], ids=str)
def test_output_has_the_dtype_of_the_input(input_dtype: torch.dtype) -> None:
    """The arithmetic is float32 throughout: only the output is rounded."""
    layer = build(CASES[0], torch.float32)
    u, x = inputs(CASES[0], 100)
    u = u.to(input_dtype)
    y, state = layer(u, x.float(), return_state=True)
    want, last = layer(u.float(), x.float(), return_state=True)
    assert y.dtype == input_dtype
    assert state.dtype == torch.float32
    assert torch.equal(y, want.to(input_dtype))
    assert torch.equal(state, last)


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [Case("dplr", "legs", d_state=64), *CASES[4:6]], ids=ids)
def test_autocast_to_bfloat16_is_within_its_bound(case: Case, input_dtype: torch.dtype) -> None:
    """15 roundings, 3% of the largest value: of both factors in six products, there and back; not exact."""
    layer = build(case, torch.float32)
    u = torch.randn(2, 1047, H, dtype=input_dtype).float()
    weight = torch.randn_like(u)
    results = []
    for autocast in (False, True):
        v = u.to(input_dtype if autocast else torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if case.bidirectional:
                y, state = layer(v), torch.zeros(0)
            else:
                y, state = layer(v, return_state=True)
                assert state.dtype == torch.float32
        assert y.dtype == v.dtype
        grads = torch.autograd.grad((y * weight).sum(), [v, *layer.parameters()])
        results.append((y, state, *grads))
    for want, got in zip(*results, strict=True):
        oracle.close(got, want, 15 * 2**-9)
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_other_autocast_changes_anything(dtype: torch.dtype) -> None:
    """float16 has not the range for states, and float64 parameters ask for float64."""
    case = CASES[0]
    layer = build(case, torch.float32 if dtype == torch.float16 else torch.float64)
    u, x = inputs(case, 100, dtype=layer.D.dtype)
    want = layer(u, x, return_state=True)
    with torch.autocast("cpu", dtype):
        got = layer(u, x, return_state=True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("case", [*PAIR, CASES[4]], ids=ids)
def test_gradients_of_each_sequence_alone(case: Case) -> None:
    """torch.func's vmap of grad, and vmap over layers."""
    layer = build(case)
    u, _ = inputs(case, T + 3, batch=3)
    values = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(values: dict[str, Tensor], u: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (u[None],)).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, u)
    for b in range(3):
        want = torch.autograd.grad(layer(u[b : b + 1]).square().sum(), list(layer.parameters()))
        for name, grad in zip(values, want, strict=True):
            oracle.close(got[name][b], grad, 1e-9, name)

    other = build(case)
    stacked = {name: torch.stack([p.detach(), values[name]]) for name, p in other.named_parameters()}
    both = torch.func.vmap(lambda v: torch.func.functional_call(layer, v, (u,)))(stacked)
    oracle.close(both[0], other(u), 1e-12)
    oracle.close(both[1], layer(u), 1e-12)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=ids)
def test_meta_device_gives_shapes(case: Case) -> None:
    layer = build(case, torch.float32).to("meta")
    u, x = (t.to("meta") for t in inputs(case, 70, dtype=torch.float32))
    assert layer(u).shape == u.shape
    if not case.bidirectional:
        y, state = layer(u, x, return_state=True)
        assert y.is_meta
        assert (y.shape, state.shape) == (u.shape, x.shape)


MEMORY = """
import torch
from s4 import S4Layer
torch.manual_seed(0)

def used(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what)) / 1024

layer = S4Layer(32, 64, mode="scan")
optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
for L in (1000, 1_000_000):
    u = torch.randn(1, L, 32, requires_grad=True)
    layer(u).square().mean().backward()
    optimizer.step()
    print(used('VmHWM'))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the resident set from /proc")
@pytest.mark.parametrize("blocks", ["whole"], indirect=True)
def test_a_million_steps_in_two_gigabytes() -> None:
    """A training step of 32 channels; inputs, outputs and their gradients are 128 MB each."""
    before, after = map(float, run(MEMORY).split())
    assert after < 2000
    assert after - before < 1200


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("variant", ["dplr", "diag"])
def test_auto_takes_the_way_of_its_table(variant: str, built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences of small states go by the scan, others by FFT, all to the same numbers."""
    taken: list[str] = []
    whole = chunks.scan

    def spy(*arguments: object, **options: object) -> object:
        taken.append("scan")
        return whole(*arguments, **options)

    monkeypatch.setattr(s4.sequence, "scan", spy)
    if not built:
        monkeypatch.setattr(cpu, "_library", lambda: "not built")
    fused = not isinstance(kernel.backends()["cpu"], str)
    low_rank = variant == "dplr"
    cases = [  # B, L, N, whether there is a state, whether it scans with the fused code, and without
        (1, 256, 32, False, low_rank, False),
        (1, 100, 32, False, False, False),
        (1, 100, 32, True, True, True),
        (1, 3, 32, True, True, True),
        (1, 2, 32, True, False, False),
        (8, 256, 32, False, True, False),
        (1, 2048, 32, False, True, low_rank),
        (1, 1024, 64, False, low_rank, False),
        (1, 4096, 64, False, True, low_rank),
        (1, 20000, 130, False, False, False),
    ]
    for B, L, N, stateful, with_fused, without in cases:
        layer = S4Layer(1, N, variant=variant)
        u = torch.randn(B, L, 1, generator=torch.Generator().manual_seed(0))
        taken.clear()
        y = layer(u, return_state=True)[0] if stateful else layer(u)
        assert bool(taken) == (with_fused if fused else without), (B, L, N, stateful)
        layer.mode = "fft"
        oracle.close(y, layer(u), 1e-4)
    layer = S4Layer(1, 8, variant=variant, backend="torch")
    taken.clear()
    layer(torch.randn(1, 4096, 1))
    assert not taken, "a backend that was named computes a kernel"
