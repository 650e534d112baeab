"""Every backend of the Cauchy sums, on every device here, by one table of cases.

Truth is the direct sum in extended precision; the bound of each number is what rounding may do to its terms.
"""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import s4
from s4 import hippo
from s4.backends import BACKENDS, cpu
from s4.kernel import backends, cauchy
from s4.ops import cauchy as _ops

DTYPES = (torch.complex64, torch.complex128)
DEVICES = (pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu))
# A backend and a device that it can run on. Each is a fixture, so that a test takes the two as arguments.
RUNS = [
    pytest.param((name, *device.values), id=f"{name}-{device.id}", marks=device.marks)
    for name, module in BACKENDS.items()
    for device in DEVICES
    if name != "naive" and module.status(torch.device(device.id)) is True
]
HERE = [run for run in RUNS if not run.marks]


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def backend(run: tuple[str, str]) -> str:
    return run[0]


@pytest.fixture
def device(run: tuple[str, str]) -> str:
    return run[1]


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory comes filled with NaN, so that what a backend leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, dtype: torch.dtype = torch.complex128, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, dtype=torch.complex128).to(device, dtype)


class Case(NamedTuple):
    """G groups of q right-hand sides over n poles; L nodes or steps."""

    G: int
    q: int
    n: int
    L: int
    poles: str = "random"  # or those of an initialisation, times dt
    own: bool = False  # each group has its own nodes


TABLE = [
    Case(1, 1, 1, 1),
    Case(1, 4, 3, 2, own=True),
    Case(3, 2, 32, 17),
    Case(3, 1, 257, 513),
    Case(32, 4, 32, 513, "legs"),
    Case(32, 1, 1, 2, "lin"),
    Case(64, 1, 64, 17, own=True),
    Case(64, 1, 32, 1047),
    Case(257, 1, 3, 17, "lin"),
    Case(257, 3, 1, 1),
    Case(1, 6, 257, 513, "legs"),
    Case(3, 5, 64, 1047, "lin", own=True),
    Case(1, 9, 32, 1, "legs"),
    Case(3, 4, 32, 4097, "legs"),
    Case(1, 1, 257, 1047, "lin"),
    Case(1, 2, 32, 16385),
    Case(1, 1, 3, 16385, "legs", own=True),
]


def poles(case: Case) -> Tensor:
    """(G, n), in the left half plane."""
    if case.poles == "random":
        w = draw(case.G, case.n)
        return torch.complex(-w.real.abs() / 50 - 1e-3, w.imag)
    Lambda = hippo.dplr("legs", 2 * case.n)[0] if case.poles == "legs" else hippo.diag("lin", 2 * case.n)[0]
    return Lambda * torch.logspace(-3, -1, case.G, dtype=torch.float64)[:, None]


def close_nodes(w: Tensor, case: Case) -> Tensor:
    """(1 or G, L), each at 1e-4 to 1 times its own modulus from a pole."""
    w = w if case.own else w[:1]
    near = w[:, torch.randint(case.n, (case.L,))]
    angle = 2 * torch.pi * torch.rand(near.shape, dtype=torch.float64)
    return near + torch.polar(near.abs() * 10 ** (-4 * torch.rand(near.shape, dtype=torch.float64)), angle)


class Problem(NamedTuple):
    """Arguments, the gradient that comes back, the true output and gradients, and a bound for each number."""

    arguments: tuple[Tensor, ...]
    gradient: Tensor
    truth: list[Tensor]
    bounds: list[Tensor]


# Relative errors of u = eps / 2 that a term of a sum may have met. A Cauchy term meets up to 45 in its
# differences, squared moduli, reciprocal, square and products.
_ROUNDINGS = 56


def additions(count: int) -> float:
    """How many u times the sum of all |terms| it may cost to add up so many terms, in any order.

    Each addition errs by at most u times a partial sum, no two by the same: the standard deviation of all is
    less than sqrt(count / 3). Three square roots are more than five of them, and `count` is the worst.
    """
    return min(count, 3 * count**0.5)


def differentiated(function: Callable[..., Tensor], arguments: tuple[Tensor, ...], g: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in arguments]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def problem(
    function: Callable[..., Tensor],
    arguments: tuple[Tensor, ...],
    g: Tensor,
    truth: list[np.ndarray],
    bounds: list[np.ndarray],
) -> Problem:
    """As tensors of the shapes that autograd has, of numbers that naive finds within their bounds."""
    naive = differentiated(partial(function, backend="naive"), arguments, g)
    true, near = (
        [torch.from_numpy(t).view(got.shape) for t, got in zip(arrays, naive, strict=True)]
        for arrays in (truth, bounds)
    )
    for got, want, bound in zip(naive, true, near, strict=True):
        assert bool(((got - want).abs() <= bound).all())
    return Problem(arguments, g, true, near)


@functools.cache
def cauchy_problem(case: Case, dtype: torch.dtype) -> Problem:
    w = poles(case)
    z, w = close_nodes(w, case).to(dtype), w.to(dtype)
    v, g = draw(case.G, case.q, case.n, dtype=dtype), draw(case.G, case.q, case.L, dtype=dtype)
    truth = oracle.cauchy(v.numpy(), z[:, None].numpy(), w[:, None].numpy())
    gradients = oracle.cauchy_gradients(g.numpy(), v.numpy(), z.numpy(), w.numpy())
    sizes = oracle.cauchy_sizes(g.numpy(), v.numpy(), z.numpy(), w.numpy())
    # A pair of conjugate terms is four products of real numbers.
    pairs = case.n, case.L, case.q * case.n * (1 if case.own else case.G), case.q * case.L
    u = torch.finfo(dtype).eps / 2
    bounds = [
        u * (_ROUNDINGS + additions(4 * count)) * size for count, size in zip(pairs, sizes, strict=True)
    ]
    return problem(cauchy, (v, z[:, None], w[:, None]), g, [truth, *gradients], bounds)


def check(function: Callable[..., Tensor], problem: Problem, device: str) -> None:
    arguments = tuple(t.to(device) for t in problem.arguments)
    found = differentiated(function, arguments, problem.gradient.to(device))
    for what, got, want, bound in zip("0123", found, problem.truth, problem.bounds, strict=False):
        assert got.device.type == device
        error = (got.cpu() - want).abs()
        worst = f"{(error / bound).max():.3g} of the bound"
        assert bool((error <= bound).all()), f"{f'gradient {what}' if int(what) else 'output'}: {worst}"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_cauchy(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    check(partial(cauchy, backend=backend), cauchy_problem(case, dtype), device)


# Leading dimensions that broadcast: v (..., n), z (..., l) and w (..., n).
SHAPES = {
    "plain": ((3,), (5,), (3,)),
    "one mode, one node": ((1,), (1,), (1,)),
    "channels": ((3, 2), (3, 5), (3, 2)),
    "shared nodes": ((3, 2), (5,), (3, 2)),
    "shared poles": ((2, 3, 2), (1, 1, 4), (3, 2)),
    "shared weights": ((2,), (4,), (3, 2)),
    "right-hand sides": ((2, 5, 2), (2, 1, 4), (2, 1, 2)),
    "right-hand sides, shared nodes": ((2, 3, 2), (4,), (1, 2)),
    "poles outrank": ((2,), (4,), (3, 1, 2)),
    "nodes have the channels": ((2,), (3, 4), (2,)),
    "poles of all": ((3, 2), (2, 1, 4), (2,)),
}
EMPTY = {
    "no node": ((4, 8), (4, 0), (4, 8)),
    "no channel": ((0, 8), (5,), (0, 8)),
    "no pole": ((4, 0), (5,), (4, 0)),
    "no right-hand side": ((2, 0, 3), (5,), (2, 1, 3)),
}


def numbers(
    v: tuple[int, ...], z: tuple[int, ...], w: tuple[int, ...], device: str, dtype: torch.dtype = DTYPES[1]
) -> tuple[Tensor, Tensor, Tensor]:
    """v, nodes in the right half plane, poles in the left."""
    values = draw(*v), draw(*z), draw(*w)
    nodes = torch.complex(values[1].real.abs() + 0.1, values[1].imag)
    stable = torch.complex(-values[2].real.abs() - 0.1, values[2].imag)
    v, z, w = (t.to(device, dtype).requires_grad_() for t in (values[0], nodes, stable))
    return v, z, w


def same(got: Tensor, want: np.ndarray, tolerance: float = 1e-12) -> None:
    oracle.close(got.cpu(), torch.from_numpy(want), tolerance)


def array(t: Tensor) -> np.ndarray:
    return t.detach().cpu().resolve_conj().numpy()


def test_naive_and_torch_are_there() -> None:
    available = backends()
    assert available["naive"]["cauchy"] is True
    assert all(state is True for state in available["torch"].values())
    for found in available.values():
        states = [found] if isinstance(found, str) else [s for s in found.values() if s is not True]
        assert all(isinstance(state, str) and state for state in states)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", ["naive", "auto", *dict.fromkeys(run.values[0][0] for run in HERE)])
def test_leading_dimensions_broadcast(backend: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    v, z, w = numbers(*shapes, "cpu")
    same(cauchy(v, z, w, backend), oracle.cauchy(array(v), array(z), array(w)))
    assert torch.autograd.gradcheck(partial(cauchy, backend=backend), (v, z, w), fast_mode=True)
    assert torch.autograd.gradcheck(lambda v, w: cauchy(v, z.detach(), w, backend), (v, w), fast_mode=True)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", EMPTY.values(), ids=EMPTY)
def test_empty_sums_are_zero(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, backend: str, device: str
) -> None:
    v, z, w = numbers(*shapes, device, dtype)
    out = cauchy(v, z, w, backend=backend)
    assert out.shape == (*v.shape[:-1], z.shape[-1])
    assert out.dtype == dtype
    assert not out.any()
    for gradient in torch.autograd.grad(out, (v, z, w), torch.ones_like(out)):
        assert not gradient.any()


def test_strides_and_lazy_views_are_read_as_the_numbers_they_stand_for(backend: str, device: str) -> None:
    """Conjugation and negation are bits on a tensor, which raw pointers do not see."""
    v, z, w = (t.detach() for t in numbers((8, 6), (20, 4), (1, 3), device))
    v, z, w = v[::2, 1::2], z.t()[:, ::3], w.expand(4, 3)
    negative = torch.complex(w.imag, w.real.abs()).conj()  # with an imaginary part that is lazily negated
    assert v.conj().is_conj()
    assert negative.imag.is_neg()
    for a in (v, v.conj(), v.mT.contiguous().mT):
        for b in (w, w.conj()):
            c = z.conj() if b.is_conj() else z
            same(cauchy(a, c, b, backend), oracle.cauchy(array(a), array(c), array(b)))
    v = v[:, None].transpose(0, 2)[:, 0].mT[:, None]
    grad = negative[:, None]
    plain = _ops.cauchy_backward(
        grad.resolve_conj().contiguous(), v.contiguous(), z[:, :3].contiguous(), w.contiguous(), True, backend
    )
    for got, want in zip(_ops.cauchy_backward(grad, v, z[:, :3], w, True, backend), plain, strict=True):
        same(got, array(want))


def test_cauchy_close_to_a_pole_keeps_its_digits(backend: str, device: str) -> None:
    """(z-w)(z-conj w) keeps what z^2 - 2 z Re w + |w|^2 loses."""
    w = torch.tensor([-1e-4 + 100j], dtype=torch.complex64, device=device)
    z = torch.tensor([0.01 + 100j, 100.02j, 1 + 99j], dtype=torch.complex64, device=device)
    v = torch.tensor([1 + 0.5j], dtype=torch.complex64, device=device)
    want = oracle.cauchy(array(v), array(z), array(w))
    np.testing.assert_allclose(array(cauchy(v, z, w, backend)), want, rtol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_the_numbers_given_is_read(dtype: torch.dtype, backend: str, device: str) -> None:
    """Vectors are padded inside: no pole may meet the padding."""
    v = draw(1, 1, 1, dtype=dtype, device=device).requires_grad_()
    z = torch.tensor([[2j, 3j, 1 + 2j]], dtype=dtype, device=device)
    for pole in (1, 1 + 1e-20j, 0):
        w = torch.full((1, 1), pole, dtype=dtype, device=device, requires_grad=True)
        got = torch.autograd.grad(_ops.cauchy(v, z, w, backend).abs().sum(), (v, w))
        want = torch.autograd.grad(cauchy(v, z, w[:, None], backend="naive").abs().sum(), (v, w))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("common", [True, False], ids=["common nodes", "own nodes"])
def test_operators_keep_what_they_promise(common: bool, backend: str, device: str) -> None:
    """opcheck: the schema, autograd and the fake, which promises contiguous outputs for all strides."""
    v, z, w = numbers((2, 3, 4), (1 if common else 2, 5), (2, 4), device)
    torch.library.opcheck(_ops.cauchy, (v, z, w, backend))
    grad = draw(2, 3, 5, device=device)
    for a in (v.detach(), v.detach().mT.contiguous().mT):
        for need_z in (True, False):
            inputs = (grad, a, z.detach(), w.detach(), need_z, backend)
            torch.library.opcheck(_ops.cauchy_backward, inputs)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_operators_refuse_what_they_cannot_take(backend: str, device: str) -> None:
    v, z, w = (t.detach() for t in numbers((2, 3, 4), (1, 5), (2, 4), device))
    single = w.to(torch.complex64)
    for bad in (
        lambda: _ops.cauchy(v, z, w[:, :3], backend),
        lambda: _ops.cauchy(v, z, single, backend),
        lambda: _ops.cauchy_backward(v, v, z[0], w, True, backend),
    ):
        with pytest.raises(ValueError, match="need v"):
            bad()
    for bad in (
        lambda: _ops.cauchy_backward(v, v, z, w, True, backend),
        lambda: _ops.cauchy_backward(z.expand(2, 3, 5).real, v, z, w, True, backend),
    ):
        with pytest.raises(ValueError, match="need grad"):
            bad()
    for odd in (torch.complex32, torch.float32):
        with pytest.raises(TypeError, match="must be complex64 or complex128"):
            cauchy(v.real.to(odd), z, w, backend)
    with pytest.raises(ValueError, match="must share one device"):
        cauchy(v, z[0], w.to("meta")[:, None], backend)
    elsewhere = torch.zeros(2, 3, dtype=torch.complex64, device="meta")
    if isinstance(reason := BACKENDS[backend].status(elsewhere.device), str):
        assert "meta" in reason


def test_autocast_leaves_the_sums_alone(backend: str, device: str) -> None:
    v, z, w = numbers((2, 3, 4), (5,), (2, 1, 4), device, torch.complex64)

    def outcome(reduced: bool) -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=reduced):
            sums = cauchy(v, z, w, backend)
            return [sums, *torch.autograd.grad(sums.abs().square().sum(), (v, w))]

    for got, want in zip(outcome(True), outcome(False), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_transforms_see_the_definition(backend: str, device: str) -> None:
    """Of a custom operator, torch takes every derivative in forward mode to be zero."""
    v, z, w = (t.detach() for t in numbers((2, 4), (5,), (2, 4), device))
    out, tangent = torch.func.jvp(lambda v: cauchy(v, z, w, backend), (v,), (v,))
    torch.testing.assert_close(tangent, out)  # as sums are linear in v


def test_sums_compile_once_for_all_sizes(backend: str, device: str, unchecked: None) -> None:
    compiles = CompileCounterWithBackend("aot_eager")

    def function(v: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return cauchy(v, z, w, backend).abs().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiles, dynamic=True)
    for H, q, n, L in ((3, 2, 4, 5), (4, 5, 7, 19), (6, 3, 9, 33)):
        v, z, w = numbers((H, q, n), (L,), (H, 1, n), device)
        got, want = (torch.autograd.grad(f(v, z, w), (v, z, w)) for f in (compiled, function))
        torch.testing.assert_close(got, want)
    assert compiles.frame_count == 1


def test_gradients_have_gradients(backend: str, device: str) -> None:
    v, z, w = numbers((2, 2, 3), (4,), (2, 1, 3), device)
    assert torch.autograd.gradgradcheck(lambda *t: cauchy(*t, backend=backend), (v, z, w))


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension there is no "cpu", and "auto" does without it."""
    monkeypatch.setattr(cpu, "_library", lambda: "not built: reinstall with a compiler")
    v, z, w = numbers((3,), (4,), (3,), "cpu")
    assert "not built" in str(backends()["cpu"])
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: not built"):
        cauchy(v, z, w, backend="cpu")
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: not built"):
        s4.S4Layer(4, 8, backend="cpu")
    torch.testing.assert_close(cauchy(v, z, w), cauchy(v, z, w, backend="naive"))


def test_a_clone_that_hides_an_installed_extension_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After `pip install .` Python takes s4 from the clone that it is started in, which has no extension."""
    monkeypatch.setattr(cpu, "_file", lambda level: None)
    monkeypatch.setattr(cpu.sys, "path", [str(tmp_path)])
    assert "with a C++ compiler" in str(cpu._load.__wrapped__("base"))
    library = tmp_path / "s4" / "backends" / "cpu" / "_native_base.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert f"hides the one in {tmp_path}: leave this folder" in str(cpu._load.__wrapped__("base"))
