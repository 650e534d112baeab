"""Backend "cpu": responses and maps of chunks, against dense loops, at every instruction set."""

import ctypes
import os

import pytest
import torch
from oracle import close
from processes import printed, process
from torch import Tensor

import s4
from s4.backends import cpu
from s4.ops import cauchy, response, scan
from s4.ops import maps as maps_of_a_chunk

if isinstance(s4.kernel.backends()["cpu"], str):
    pytest.skip("the C++ extension is not built", allow_module_level=True)

# channels, modes, rank, columns of X, rows of C, steps
SIZES = {
    "one of each": (1, 1, 1, 1, 1, 1),
    "one step": (3, 5, 1, 1, 1, 1),
    "short of one vector": (2, 3, 1, 2, 1, 19),
    "one more than a vector": (2, 9, 2, 1, 2, 70),
    "diagonal": (3, 6, 0, 2, 1, 77),
    "diagonal, both ways": (2, 33, 0, 1, 2, 1047),
    "S4": (2, 32, 1, 1, 1, 513),
    "both ways": (2, 17, 1, 1, 2, 300),
    "rank three": (2, 4, 3, 3, 2, 65),
    "more columns than steps": (2, 4, 1, 40, 1, 5),
    "long": (1, 8, 1, 1, 1, 4097),
}


def operands(H: int, n: int, r: int, q: int, c: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A stable random system: contracting diagonal, a low rank of small norm."""
    generator = torch.Generator().manual_seed(H + 10 * n + 100 * r)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    angle = 3 * draw(H, n)
    radius = 1 - 0.2 * torch.rand(H, n, dtype=torch.float64, generator=generator)
    a = torch.cat([radius * angle.cos(), radius * angle.sin()], -1)
    small = 0.1 / max(1, n) ** 0.5
    parts = a, small * draw(r, H, 2 * n), small * draw(r, H, 2 * n), draw(H, q, 2 * n), draw(c, H, 2 * n)
    return tuple(part.requires_grad_() for part in parts)  # type: ignore[return-value]


def dense(a: Tensor, F: Tensor, G: Tensor) -> Tensor:
    """A as matrices (H, N, N), entry by entry of the definition."""
    n = a.shape[1] // 2
    re, im = torch.diag_embed(a[:, :n]), torch.diag_embed(a[:, n:])
    A = torch.cat([torch.cat([re, -im], 2), torch.cat([im, re], 2)], 1)
    for r in range(F.shape[0]):
        A = A + F[r][:, :, None] * G[r][:, None, :]
    return A


def powers(A: Tensor, X: Tensor, steps: int) -> Tensor:
    """A^t X by a loop: (H, q, T, N)."""
    states = []
    for _ in range(steps):
        states.append(X)
        X = (A[:, None] @ X[..., None])[..., 0]
    return torch.stack(states, 2) if states else X[:, :, None][:, :, :0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_krylov(size: tuple[int, ...], dtype: torch.dtype, level: str) -> None:
    *shape, L = size
    a, F, G, X, C = operands(*shape)
    want = torch.einsum("chn,hqtn->cqht", C, powers(dense(a, F, G), X, L))
    got = response.operator(a, F, G, X, C, L, dtype, "cpu")
    assert got.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    close(got.double(), want, tolerance)
    grad = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(want, (a, F, G, X, C), grad, materialize_grads=True, allow_unused=True)
    for name, g, w in zip(
        "aFGXC", torch.autograd.grad(got, (a, F, G, X, C), grad.to(dtype)), wanted, strict=True
    ):
        assert g.shape == w.shape
        close(g, w, 10 * tolerance, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_chunk(size: tuple[int, ...], dtype: torch.dtype, level: str) -> None:
    """A chunk of T steps by its maps is T steps of the recurrence, and so are its gradients."""
    H, n, r, _, c, T = (*size[:5], min(size[5], 130))
    a, F, G, X, C = operands(H, n, r, 1, min(c, 2))
    D = torch.linspace(-1, 1, H, dtype=torch.float64).requires_grad_()
    inputs = (a, F, G, X[:, 0].detach().requires_grad_(), C, D)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(H, T, dtype=torch.float64, generator=generator)
    x = torch.randn(H, 2 * n, dtype=torch.float64, generator=generator)

    taps, inward, outward, onward = maps_of_a_chunk.operator(*inputs, T, dtype, "cpu")
    assert taps.dtype == inward.dtype == outward.dtype == onward.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    got, want = [], []
    for i in range(C.shape[0]):
        within = taps[i].double().unfold(-1, T, 1).flip(-2)  # row i, column j: lag j - i
        into = inward.double() if i == 0 else inward.double().flip(1)
        got += [torch.einsum("ht,hts->hs", u, within) + torch.einsum("hsn,hn->hs", outward[i].double(), x)]
        got += [torch.einsum("ht,htn->hn", u, into) + torch.einsum("hn,hnm->hm", x, onward.double())]
        A, state, outputs = dense(a, F, G), x, []
        for t in range(T) if i == 0 else reversed(range(T)):
            if i == 1:  # strict: an output before its input
                outputs.insert(0, (C[1] * state).sum(-1))
            state = (A @ state[..., None])[..., 0] + inputs[3] * u[:, t, None]
            if i == 0:
                outputs.append((C[0] * state).sum(-1) + D * u[:, t])
        want += [torch.stack(outputs, 1), state]
    weights = [torch.randn(w.shape, dtype=torch.float64, generator=generator) for w in want]
    grads = []
    for found in (got, want):
        total = sum((f * w).sum() for f, w in zip(found, weights, strict=True))
        grads.append(torch.autograd.grad(total, inputs, materialize_grads=True, allow_unused=True))
    for g, w in zip(got, want, strict=True):
        close(g, w, tolerance)
    for name, g, w in zip("aFGBCD", *grads, strict=True):
        assert g.shape == w.shape
        close(g, w, 10 * tolerance, name)


def test_they_are_sound_operators() -> None:
    a, F, G, X, C = operands(2, 3, 1, 2, 2)
    torch.library.opcheck(response.operator, (a, F, G, X, C, 7, torch.float64, "cpu"))
    D = torch.ones(2, dtype=torch.float64, requires_grad=True)
    inputs = (a, F, G, X[:, 0].detach().requires_grad_(), C, D)
    torch.library.opcheck(maps_of_a_chunk.operator, (*inputs, 5, torch.float64, "cpu"))
    grad = torch.randn(2, 2, 2, 7, dtype=torch.float64)
    values = [t.detach() for t in (a, F, G, X, C)]
    torch.library.opcheck(response.operator_backward, (grad, *values, "cpu"))
    inputs = [*values[:3], values[3][:, 0].clone(), values[4], D.detach()]
    maps = maps_of_a_chunk.operator(*inputs, 5, torch.float64, "cpu")
    grads = [torch.randn_like(m) for m in maps]
    torch.library.opcheck(maps_of_a_chunk.operator_backward, (grads, inputs, "cpu"))
    u, state = torch.randn(3, 17, 2, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    operands_of_scan = (u, state, maps[0][0], maps[1], maps[2][0], maps[3])
    for reverse in (False, True):
        torch.library.opcheck(scan.operator, (*operands_of_scan, reverse, torch.float64, "cpu"))
        sent = [u + 1, state + 1], [*operands_of_scan]
        torch.library.opcheck(scan.operator_backward, (*sent, reverse, torch.float64, "cpu"))


def test_gradients_by_finite_differences() -> None:
    inputs = operands(2, 2, 1, 1, 1)
    assert torch.autograd.gradcheck(lambda *t: response.operator(*t, 40, torch.float64, "cpu"), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: response.operator(*t, 7, torch.float64, "cpu"), inputs)


def test_strides_and_lazy_bits_do_not_matter() -> None:
    a, F, G, X, C = (t.detach() for t in operands(4, 3, 2, 3, 2))
    want = response.operator(a, F, G, X, C, 50, torch.float64, "cpu")
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (a, F, G, X, C)]
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(response.operator(*strided, 50, torch.float64, "cpu"), want, rtol=0, atol=0)
    negated = torch.complex(torch.zeros_like(X), -X).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(
        response.operator(a, F, G, negated, C, 50, torch.float64, "cpu"), want, rtol=0, atol=0
    )


@pytest.mark.parametrize("empty", range(5))
def test_nothing_gives_nothing(empty: int) -> None:
    """No channel, no mode, no column, no row, no step."""
    sizes = [2, 3, 2, 2, 9]
    sizes[empty] = 0
    H, n, q, c, L = sizes
    inputs = operands(H, n, 1, q, c)
    got = response.operator(*inputs, L, torch.float32, "cpu")
    assert got.shape == (c, q, H, L)
    assert not got.any() or empty not in (1,)
    for g, t in zip(torch.autograd.grad(got.sum(), inputs), inputs, strict=True):
        assert g.shape == t.shape
        assert bool(g.isfinite().all())
        assert empty < 2 or not g.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_decayed_system_gives_zeros(dtype: torch.dtype) -> None:
    """Not a tail of denormal numbers, which cost a hundred cycles each."""
    a, F, G, X, C = (t.detach() for t in operands(2, 4, 1, 1, 1))
    K = response.operator(a / 4, F / 4, G / 4, X, C, 5000, dtype, "cpu")
    assert not K[..., 1000:].any()
    assert float(K[..., :10].abs().max()) > 0.1


@pytest.mark.parametrize("rank", [0, 1])
def test_what_has_overflowed_does_not_come_back_as_zero(rank: int, level: str) -> None:
    """x, 3 x, 9 x, ... is finite for 647 steps; then inf - inf makes nan, which is no small number."""
    a = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    F = torch.zeros(rank, 1, 2, dtype=torch.float64)
    one = torch.ones(1, 1, 2, dtype=torch.float64)
    K = response.operator(a, F, F, one, one, 3000, torch.float64, "cpu")[0, 0, 0]
    assert not K[650:].isfinite().any()
    assert bool(K[:640].isfinite().all())


@pytest.mark.parametrize("which", range(5))
def test_nan_stays_nan(which: int, level: str) -> None:
    """At every step that the number reaches, and in every gradient that it does."""
    inputs = [t.detach() for t in operands(1, 3, 1, 1, 1)]
    inputs[which].view(-1)[0] = torch.nan
    inputs = [t.requires_grad_() for t in inputs]
    K = response.operator(*inputs, 100, torch.float32, "cpu")
    assert bool(K[..., 1:].isnan().all())
    gradients = torch.autograd.grad(K[..., 50].sum(), inputs)
    assert all(bool(g.isnan().any()) for i, g in enumerate(gradients) if i < 3 or i != which)


@pytest.mark.parametrize("size", [SIZES["S4"], SIZES["diagonal"]], ids=["S4", "diagonal"])
def test_what_is_not_a_number_stays_visible(size: tuple[int, ...], level: str) -> None:
    *shape, L = size
    for bad in (torch.nan, torch.inf):
        for which in range(5):
            inputs = [t.detach().clone() for t in operands(*shape)]
            if inputs[which].numel() == 0:
                continue
            inputs[which].flatten()[0] = bad
            K = response.operator(*inputs, L, torch.float32, "cpu")
            assert not bool(K.isfinite().all()), "aFGXC"[which]


def test_wrong_operands_raise() -> None:
    a, F, G, X, C = (t.detach() for t in operands(2, 3, 1, 1, 1))
    grad = torch.ones(1, 1, 2, 5)
    for wrong in (grad[..., :1, :], grad.expand(2, 1, 2, 5), grad.half()):
        with pytest.raises(ValueError, match="need grad"):
            response.operator_backward(wrong, a, F, G, X, C, "cpu")
    inputs = [a, F, G, X[:, 0], C, torch.ones(2, dtype=torch.float64)]
    maps = list(maps_of_a_chunk.operator(*inputs, 5, torch.float32, "cpu"))
    with pytest.raises(ValueError, match="need grad"):
        maps_of_a_chunk.operator_backward([maps[0][..., :3], *maps[1:]], inputs, "cpu")
    with pytest.raises(ValueError, match="need a"):
        maps_of_a_chunk.operator_backward(maps, [a, F[..., :4], *inputs[2:]], "cpu")
    for wrong in (
        (a, F, G, X, C[:, :1]),
        (a, F[..., :4], G, X, C),
        (a[:, :4], F, G, X, C),
        (a, F, G, X.float(), C),
    ):
        with pytest.raises(ValueError, match="need a"):
            response.operator(*wrong, 5, torch.float32, "cpu")
    with pytest.raises(ValueError, match="need D"):
        maps_of_a_chunk.operator(a, F, G, X[:, 0], C, C[0, :, 0].float(), 5, torch.float32, "cpu")
    with pytest.raises(ValueError, match="need operands of shapes"):
        scan.operator(X.mT, X, X[:, 0], X, X, X, False, X.dtype, "cpu")


def test_every_number_is_written_and_nothing_else(level: str) -> None:
    """Guard zones around a poisoned output, through the C interface itself."""
    H, n, r, q, c, L = 2, 5, 1, 1, 2, 77
    a, F, G, X, C = (t.detach().contiguous() for t in operands(H, n, r, q, c))
    size, guard = c * q * H * L, 64
    buffer = torch.full((size + 2 * guard,), torch.nan)
    tensors = [t.data_ptr() for t in (a, F, G, X, C, buffer[guard:])]
    values = (ctypes.c_int64 * 12)(*tensors, H, n, r, q, c, L)
    assert cpu._load(level).s4_response_f32(values, len(tensors), 2) == 0
    inside = buffer[guard : guard + size]
    assert bool(inside.isfinite().all())
    assert bool(buffer[:guard].isnan().all())
    assert bool(buffer[guard + size :].isnan().all())


FORKED = """
import os, sys, torch

def forked(what):
    child = os.fork()
    if child == 0:
        os._exit(what())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def compute():
    from s4.kernel import cauchy
    torch.set_num_threads(3)
    numbers = torch.randn(3, 40, 64, dtype=torch.complex128)
    want = cauchy(*numbers, "cpu")  # on torch's threads, which a child does not have
    return forked(lambda: 0 if torch.equal(cauchy(*numbers, "cpu"), want) else 1)

for os.environ["S4_LEVEL"] in sys.argv[1:]:
    print(forked(compute))  # s4 reads its level when it is imported
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes_on_threads_of_its_own() -> None:
    levels = [name for name in cpu.levels() if name <= cpu.level()]
    assert printed(process(FORKED, *levels, OMP_NUM_THREADS="3")).split() == ["0"] * len(levels)


def test_a_level_that_was_not_built_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the compiler does not know it: the best that was built runs, more is refused."""
    file = cpu._file
    monkeypatch.setattr(cpu, "_file", lambda level: None if level == "v4" else file(level))
    assert "v4" not in cpu.levels()
    monkeypatch.setattr(cpu, "_file", lambda level: file(level) if level == "base" else None)
    monkeypatch.setattr(cpu, "_library", cpu._library.__wrapped__)
    monkeypatch.setattr(cpu, "_ASKED", "")
    assert cpu.level() == "base"
    monkeypatch.setattr(cpu, "_ASKED", "v3")
    assert "the best that this processor and this build have is 'base'" in str(s4.kernel.backends()["cpu"])


@pytest.mark.parametrize(
    ("asked", "best", "said"),
    [
        ("v5", "v4", "S4_LEVEL must be one of base, v3, v4, got 'v5'"),
        ("V3", "v4", "S4_LEVEL must be one of base, v3, v4, got 'V3'"),
        ("v4", "v3", "S4_LEVEL is 'v4', and the best that this processor and this build have is 'v3'"),
        ("v3", "base", "S4_LEVEL is 'v3', and the best that this processor and this build have is 'base'"),
        ("v3", "v4", ""),
        ("base", "v3", ""),
        ("", "base", ""),
    ],
)
def test_a_level_that_cannot_be_had_is_a_reason(
    asked: str, best: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_ASKED", asked)
    assert cpu._refusal(cpu._LEVELS[: cpu._LEVELS.index(best) + 1]) == said
    if asked not in ("", *cpu._LEVELS):
        monkeypatch.setattr(cpu, "_library", cpu._library.__wrapped__)
        assert s4.kernel.backends()["cpu"] == said
        with pytest.raises(ValueError, match=f"backend 'cpu' cannot run: {said}"):
            s4.S4Layer(4, 8, backend="cpu")


def test_the_level_asked_for_runs() -> None:
    """Here, where there is one, and in a process that asks for the lowest; each has its library."""
    library = cpu._library()
    assert not isinstance(library, str)
    assert cpu.level() == (os.environ.get("S4_LEVEL") or cpu.levels()[-1])
    assert f"_native_{cpu.level()}." in library._name
    report = printed(process("import s4.info; print(s4.info.report())", S4_LEVEL="base"))
    assert "cpu      available: cauchy, response, maps, scan, step, varying, instruction set base" in report


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_work_whatever_its_shape(threads: int) -> None:
    """More threads than groups split the poles in the backward; every output is written, once."""
    before = torch.get_num_threads()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.complex128)

    torch.set_num_threads(threads)
    try:
        for G, q, n, nodes in ((1, 3, 7, 1047), (1, 1, 1, 1), (3, 6, 33, 513), (5, 2, 64, 17)):
            v, z, w = (draw(*shape).requires_grad_() for shape in ((G, q, n), (1, nodes), (G, n)))
            grad = draw(G, q, nodes)
            got = torch.autograd.grad(cauchy.cauchy(v, z, w, "cpu"), (v, z, w), grad)
            want = torch.autograd.grad(cauchy.cauchy(v, z, w, "torch"), (v, z, w), grad)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))
    finally:
        torch.set_num_threads(before)
