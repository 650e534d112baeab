"""Cauchy and Vandermonde sums: every backend against the direct sum, by one table."""

from functools import partial

import numpy as np
import oracle
import pytest
import torch

import s4.kernel
from s4.kernel import _choice

BACKENDS = [name for name, it in _choice.BACKENDS.items() if it.status(torch.device("cpu")) is True]
TOLERANCE = {torch.complex64: 2e-6, torch.complex128: 1e-12}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.complex128) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )


def problem(
    v: tuple[int, ...], z: tuple[int, ...], w: tuple[int, ...], dtype: torch.dtype = torch.complex128
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """v, nodes on a circle outside the poles, and stable poles."""
    poles = draw(*w, seed=2)
    poles = torch.complex(-poles.real.abs() - 0.1, 5 * poles.imag)
    nodes = draw(*z, seed=1)
    nodes = torch.complex(nodes.real.abs() + 0.05, 5 * nodes.imag)
    return draw(*v, seed=0, dtype=dtype), nodes.to(dtype), poles.to(dtype)


# v (..., n), z (..., l), w (..., n) with leading dimensions that broadcast
SHAPES = {
    "plain": ((3,), (5,), (3,)),
    "one mode, one node": ((1,), (1,), (1,)),
    "channels": ((4, 32), (4, 17), (4, 32)),
    "shared nodes": ((4, 8), (17,), (4, 8)),
    "shared poles": ((2, 4, 8), (1, 1, 9), (4, 8)),
    "shared weights": ((8,), (9,), (3, 8)),
    "rows over one set of poles": ((2, 4, 8), (2, 1, 9), (2, 1, 8)),
    "rows over one set, shared nodes": ((2, 4, 8), (9,), (1, 8)),
    "poles outrank": ((8,), (9,), (3, 1, 8)),
    "nodes have the channels": ((8,), (3, 9), (8,)),
    "no node": ((4, 8), (4, 0), (4, 8)),
    "no channel": ((0, 8), (5,), (0, 8)),
    "long": ((64, 32), (1, 3001), (64, 32)),
}


def test_naive_and_torch_are_there() -> None:
    available = s4.kernel.backends()
    assert available["naive"] is True
    assert available["torch"] is True
    assert all(usable is True or (isinstance(usable, str) and usable) for usable in available.values())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_cauchy(backend: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> None:
    v, z, w = problem(*shapes, dtype=dtype)
    got = s4.kernel.cauchy(v, z, w, backend=backend)
    assert got.dtype == dtype
    oracle.close(got, torch.from_numpy(oracle.cauchy(v.numpy(), z.numpy(), w.numpy())), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("L", [0, 1, 2, 13, 1024])
@pytest.mark.parametrize(
    ("v_shape", "x_shape"),
    [((3,), (3,)), ((2, 4, 16), (4, 16)), ((16,), (3, 16)), ((3, 1), (3, 1)), ((0, 2), (0, 2))],
)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_vandermonde(
    backend: str, v_shape: tuple[int, ...], x_shape: tuple[int, ...], L: int, dtype: torch.dtype
) -> None:
    v, _, x = problem(v_shape, (1,), x_shape)
    v, x = v.to(dtype), (x / 50).to(dtype)
    got = s4.kernel.vandermonde(v, x, L, backend=backend)
    assert got.dtype == (torch.float32 if dtype == torch.complex64 else torch.float64)
    oracle.close(got, torch.from_numpy(oracle.vandermonde(v.numpy(), x.numpy(), L)), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_vandermonde_of_a_slow_fast_mode_stays_accurate(backend: str) -> None:
    """A float32 product x l has no digits left at a phase of 1e5 radians: it is formed in float64."""
    L = 65536
    x = torch.tensor([[-1e-4 + 1.7j, -3e-5 + 0.4j]], dtype=torch.complex64)
    v = draw(1, 2, seed=0, dtype=torch.complex64)
    want = torch.from_numpy(oracle.vandermonde(v.numpy(), x.numpy(), L))
    oracle.close(s4.kernel.vandermonde(v, x, L, backend=backend), want, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cauchy_close_to_a_pole_keeps_its_digits(backend: str) -> None:
    """(z-w)(z-conj w) keeps what z^2 - 2 z Re w + |w|^2 loses."""
    w = torch.tensor([-1e-4 + 100j], dtype=torch.complex64)
    z = torch.tensor([0.01 + 100j, 100.02j, 1 + 99j], dtype=torch.complex64)
    v = torch.tensor([1 + 0.5j], dtype=torch.complex64)
    got = s4.kernel.cauchy(v, z, w, backend=backend).numpy()
    np.testing.assert_allclose(got, oracle.cauchy(v.numpy(), z.numpy(), w.numpy()), rtol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_strides(backend: str) -> None:
    v, z, w = problem((8, 6), (20, 4), (1, 3))
    v, z, w = v[::2, 1::2], z.t()[:, ::3], w.expand(4, 3)
    want = oracle.cauchy(v.numpy(), z.numpy(), w.numpy())
    oracle.close(s4.kernel.cauchy(v, z, w, backend=backend), torch.from_numpy(want), 1e-12)
    want = oracle.vandermonde(v.numpy(), w.numpy(), 9)
    oracle.close(s4.kernel.vandermonde(v, w, 9, backend=backend), torch.from_numpy(want), 1e-12)
    # conj() is a lazy view in torch: a kernel that reads memory would see the unconjugated numbers
    want = oracle.cauchy(v.numpy().conj(), z.numpy(), w.numpy())
    oracle.close(s4.kernel.cauchy(v.conj(), z, w, backend=backend), torch.from_numpy(want), 1e-12)
    want = oracle.vandermonde(v.numpy().conj(), w.numpy(), 9)
    oracle.close(s4.kernel.vandermonde(v.conj(), w, 9, backend=backend), torch.from_numpy(want), 1e-12)


GRADIENT_SHAPES = [
    ((3, 2), (3, 5), (3, 2)),
    ((2, 3, 2), (5,), (1, 2)),
    ((2,), (4,), (3, 2)),
    ((3, 2), (2, 1, 4), (2,)),
]


@pytest.mark.parametrize("shapes", GRADIENT_SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cauchy_gradients(backend: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    v, z, w = problem(*shapes)
    for x in (v, z, w):
        x.requires_grad_()
    assert torch.autograd.gradcheck(partial(s4.kernel.cauchy, backend=backend), (v, z, w))


@pytest.mark.parametrize("L", [1, 6])
@pytest.mark.parametrize("shapes", [((3, 2), (3, 2)), ((2, 3, 2), (3, 2)), ((2,), (3, 2))], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vandermonde_gradients(backend: str, shapes: tuple[tuple[int, ...], ...], L: int) -> None:
    v, _, x = problem(shapes[0], (1,), shapes[1])
    assert torch.autograd.gradcheck(
        lambda v, x: s4.kernel.vandermonde(v, x, L, backend=backend), (v.requires_grad_(), x.requires_grad_())
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_long_sums_agree_with_the_direct_sum(backend: str) -> None:
    """Long enough that a memory-bounded backend works in several blocks."""
    L = 2011
    v, z, w = problem((64, 16), (L,), (64, 16))
    weight = draw(64, L, seed=5)
    for name in ("cauchy", "vandermonde"):
        grads = []
        for way in (backend, "direct"):
            a, b = v.clone().requires_grad_(), (w / 100).clone().requires_grad_()
            if name == "cauchy":
                if way == "direct":
                    terms = a[:, None] / (z[:, None] - b[:, None]) + a[:, None].conj() / (
                        z[:, None] - b[:, None].conj()
                    )
                    out = terms.sum(-1)
                else:
                    out = s4.kernel.cauchy(a, z, b, backend=way)
                (out * weight).real.sum().backward()
            else:
                if way == "direct":
                    out = 2 * (a[:, None] * torch.exp(b[:, None] * torch.arange(L)[:, None])).real.sum(-1)
                else:
                    out = s4.kernel.vandermonde(a, b, L, backend=way)
                (out * weight.real).sum().backward()
            grads.append((a.grad, b.grad))
        for got, want in zip(*grads, strict=True):
            oracle.close(got, want, 1e-10, name)
