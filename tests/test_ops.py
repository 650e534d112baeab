"""The operators behind the sums: what torch.library promises of them, for every backend that runs here."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import s4.kernel
from s4.kernel import _cpu, _ops, dplr
from s4.kernel._choice import BACKENDS

CPU = torch.device("cpu")
FUSED = [name for name, it in BACKENDS.items() if name != "naive" and it.status(CPU) is True]


def numbers(*shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("common", [True, False], ids=["common nodes", "own nodes"])
def test_cauchy_is_a_sound_operator(backend: str, common: bool) -> None:
    v, w = numbers(2, 3, 4), numbers(2, 4)
    z = numbers(1 if common else 2, 5)
    torch.library.opcheck(_ops.cauchy, (v, z, w, backend))
    inputs = (numbers(2, 3, 5).detach(), v.detach(), z.detach(), w.detach(), True, backend)
    torch.library.opcheck(_ops.cauchy_backward, inputs)


@pytest.mark.parametrize("backend", FUSED)
def test_vandermonde_is_a_sound_operator(backend: str) -> None:
    v, x = numbers(2, 3, 4), numbers(2, 4)
    torch.library.opcheck(_ops.vandermonde, (v, x, 7, backend))
    grad = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.library.opcheck(_ops.vandermonde_backward, (grad, v.detach(), x.detach(), backend))


@pytest.mark.parametrize("backend", FUSED)
def test_lazy_views_are_read_as_the_numbers_they_stand_for(backend: str) -> None:
    """Conjugation and negation are bits on a tensor, which raw pointers do not see."""
    v, z, w = numbers(2, 3, 4).detach(), numbers(1, 5).detach(), numbers(2, 4).detach()
    want = _ops.cauchy(v.conj().resolve_conj(), z, w.conj().resolve_conj(), backend)
    torch.testing.assert_close(_ops.cauchy(v.conj(), z, w.conj(), backend), want)
    negated = (
        torch.complex(torch.zeros(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7).double()).conj().imag
    )
    assert negated.is_neg()
    plain = _ops.vandermonde_backward(negated.resolve_neg(), v, w, backend)
    for got, want in zip(_ops.vandermonde_backward(negated, v, w, backend), plain, strict=True):
        torch.testing.assert_close(got, want)


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension there is no "cpu", and "auto" does without it."""
    monkeypatch.setattr(_cpu, "_library", lambda: "not built: reinstall with a compiler")
    v, z, w = numbers(3), numbers(4), numbers(3)
    assert "not built" in str(s4.kernel.backends()["cpu"])
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: not built"):
        s4.kernel.cauchy(v, z, w, backend="cpu")
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: not built"):
        s4.S4Layer(4, 8, backend="cpu")
    want = s4.kernel.cauchy(v, z, w, backend="naive")
    torch.testing.assert_close(s4.kernel.cauchy(v, z, w), want)


@pytest.mark.skipif("cpu" not in FUSED, reason="the C++ extension is not built")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_work_whatever_its_shape(threads: int) -> None:
    """More threads than groups split the poles in the backward; every output is written, once."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for G, q, n, nodes in ((1, 3, 7, 1047), (1, 1, 1, 1), (3, 6, 33, 513), (5, 2, 64, 17)):
            v, z, w = numbers(G, q, n), numbers(1, nodes), numbers(G, n)
            grad = numbers(G, q, nodes).detach()
            got = torch.autograd.grad(_ops.cauchy(v, z, w, "cpu"), (v, z, w), grad)
            want = torch.autograd.grad(_ops.cauchy(v, z, w, "torch"), (v, z, w), grad)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", FUSED)
def test_permuted_inputs_keep_what_the_graph_was_told(backend: str) -> None:
    """Gradients are contiguous whatever the strides of the inputs, in the fake and in fact."""
    v, z, w = numbers(2, 5, 3).detach().mT, numbers(1, 7).detach(), numbers(2, 5).detach()
    inputs = (numbers(2, 3, 7).detach(), v, z, w, True, backend)
    torch.library.opcheck(_ops.cauchy_backward, inputs, test_utils="test_faketensor")
    grad = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.library.opcheck(_ops.vandermonde_backward, (grad, v, w, backend), test_utils="test_faketensor")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_nothing_but_the_numbers_given_is_read(backend: str, dtype: torch.dtype) -> None:
    """Vectors are padded inside: no pole, no growing mode and no empty length may meet the padding."""
    v, z = numbers(1, 1, 1, dtype=dtype), torch.tensor([[2j, 3j, 1 + 2j]], dtype=dtype)
    for pole in (1, 1 + 1e-20j, 0):
        w = torch.full((1, 1), pole, dtype=dtype, requires_grad=True)
        got = torch.autograd.grad(_ops.cauchy(v, z, w, backend).abs().sum(), (v, w))
        want = torch.autograd.grad(s4.kernel.cauchy(v, z, w[:, None], backend="naive").abs().sum(), (v, w))
        torch.testing.assert_close(got, want)
    for L, growth in ((5, 20.0 if dtype == torch.complex64 else 120.0), (0, 1.0)):
        x = torch.full((1, 1), growth, dtype=dtype, requires_grad=True)
        got = torch.autograd.grad(_ops.vandermonde(v, x, L, backend).sum(), (v, x))
        want = torch.autograd.grad(s4.kernel.vandermonde(v, x[:, None], L, backend="naive").sum(), (v, x))
        torch.testing.assert_close(got, want, rtol=1e-4 if dtype == torch.complex64 else 1e-9, atol=0)


@pytest.mark.parametrize("backend", FUSED)
def test_operators_refuse_other_shapes(backend: str) -> None:
    v, z, w = numbers(2, 3, 4), numbers(1, 5), numbers(2, 4)
    with pytest.raises(ValueError, match="need v"):
        _ops.cauchy(v, z, w[:, :3], backend)
    with pytest.raises(ValueError, match="need v"):
        _ops.vandermonde(v, w.to(torch.complex64), 3, backend)


@pytest.mark.skipif("cpu" not in FUSED, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("dtype", "longest"), [(torch.float32, 64), (torch.float64, 16)], ids=["float32", "float64"]
)
def test_auto_takes_sums_for_short_kernels_and_powers_for_long(
    dtype: torch.dtype, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At N = 8 sums serve up to N^2 nodes: L, or 4 L in float64. Without the extension powers serve all."""
    taken: list[str] = []
    for name in ("cauchy_kernel", "krylov_kernel"):
        way = getattr(dplr, name)

        def spy(*arguments: object, way: Callable[..., Tensor] = way, name: str = name) -> Tensor:
            taken.append(name)
            return way(*arguments)

        monkeypatch.setattr(dplr, name, spy)
    layer = s4.S4Layer(2, 8, dtype=dtype)
    layer.kernel(longest)
    layer.kernel(longest + 1)
    assert taken == ["cauchy_kernel", "krylov_kernel"]
    monkeypatch.setattr(_cpu, "_library", lambda: "not built")
    layer.kernel(longest)
    assert taken[2:] == ["krylov_kernel"]
