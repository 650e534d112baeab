"""mode="scan": the same system as the oracle's loops, in value and gradient, whatever the chunks."""

import copy
from pathlib import Path

import oracle
import pytest
import torch
from scan_cases import CASES, CAUSAL, LENGTHS, PAIR, Case, H, T, build, ids, inputs, parameters, truth
from test_process import run
from torch import Tensor

import s4.sequence
from s4 import S4Layer, kernel
from s4.backends import cpu
from s4.ops import chunks, scan

pytestmark = pytest.mark.usefixtures("blocks")


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
        merged = scan.recur(S.double(), x.double(), P.double(), None, reverse)
        for got, gone_over in zip(merged, want, strict=True):
            oracle.close(got, gone_over, 1e-12)


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
