"""FFT convolution against the double sum."""

import numpy as np
import oracle
import pytest
import torch

from s4.ops import convolve as conv


def smooth_even(n: int) -> bool:
    even = n % 2 == 0
    for p in (2, 3, 5):
        while n % p == 0:
            n //= p
    return even and n == 1


def signals(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, dtype=dtype, generator=g) for shape in shapes]


@pytest.mark.parametrize("n", [*range(1, 140), 1023, 1025, 2047, 4001, 65537, 131071])
def test_fft_size_is_the_smallest_smooth_even_size(n: int) -> None:
    size = conv.fft_size(n)
    assert size >= n
    assert smooth_even(size)
    assert not any(smooth_even(m) for m in range(n, size))


LENGTHS = [
    (1, 1),
    (2, 1),
    (1, 5),
    (7, 7),
    (16, 16),
    (31, 5),
    (5, 31),
    (24, 25),
    (25, 24),
    (61, 61),
    (0, 3),
    (3, 0),
]


@pytest.mark.parametrize(("L", "K"), LENGTHS)
def test_causal_is_the_double_sum(L: int, K: int) -> None:
    u, k = signals((2, 3, L), (3, K))
    oracle.close(conv.causal(u, k), torch.from_numpy(oracle.convolve(u.numpy(), k.numpy())), 1e-12)


@pytest.mark.parametrize(
    ("L", "K", "K_back"), [(*pair, pair[1]) for pair in LENGTHS] + [(9, 9, 4), (9, 4, 9), (9, 30, 1)]
)
def test_two_sided_is_the_double_sum(L: int, K: int, K_back: int) -> None:
    u, k, back = signals((2, 3, L), (3, K), (3, K_back))
    want = oracle.convolve(u.numpy(), k.numpy(), back.numpy())
    oracle.close(conv.two_sided(u, k, back), torch.from_numpy(want), 1e-12)


@pytest.mark.parametrize("leading", [(), (1,), (2, 2)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    u, k, back = signals((*leading, 3, 10), (3, 10), (3, 10))
    oracle.close(conv.causal(u, k), torch.from_numpy(oracle.convolve(u.numpy(), k.numpy())), 1e-12)
    want = oracle.convolve(u.numpy(), k.numpy(), back.numpy())
    oracle.close(conv.two_sided(u, k, back), torch.from_numpy(want), 1e-12)


@pytest.mark.parametrize("L", [15, 16, 20])
def test_nothing_wraps_round(L: int) -> None:
    """Inputs of 1e12 at one end would show at the other through any circular term."""
    _, k, back = signals((1,), (1, L), (1, L))
    last = torch.zeros(1, L).double()
    last[0, -1] = 1e12
    assert conv.causal(last, k)[0, :-1].abs().max() < 1e-2
    first = last.flip(-1)
    oracle.close(conv.two_sided(first, k, back), 1e12 * k, 1e-12)
    want = 1e12 * torch.cat([back.flip(-1)[:, 1:], k[:, :1]], -1)
    oracle.close(conv.two_sided(last, k, back), want, 1e-12)


def test_float32_stays_float32_and_accurate() -> None:
    u, k, back = signals((2, 4, 1000), (4, 1000), (4, 1000), dtype=torch.float32)
    # Each of the 11 stages of three FFTs errs by at most eps / 2 of the norm of what it has, at random.
    rounding = torch.finfo(torch.float32).eps / 2 * (3 * 11) ** 0.5 * u.norm(dim=-1, keepdim=True)
    for got, want, size in (
        (conv.causal(u, k), conv.causal(u.double(), k.double()), k.norm(dim=-1)),
        (
            conv.two_sided(u, k, back),
            conv.two_sided(u.double(), k.double(), back.double()),
            torch.cat([k, back], -1).norm(dim=-1),
        ),
    ):
        assert got.dtype == torch.float32
        assert bool(((got - want).abs() <= rounding * size[:, None]).all())


def test_hostile_strides() -> None:
    u, k, back = signals((6, 20, 2), (10, 6), (6, 1))
    u, k, back = u[:, ::2].permute(2, 0, 1), k.t()[:, ::3], back.expand(6, 5)
    want = oracle.convolve(u.numpy(), k.numpy(), back.numpy())
    oracle.close(conv.two_sided(u, k, back), torch.from_numpy(want), 1e-12)
    want = oracle.convolve(u.numpy(), k.numpy())
    oracle.close(conv.causal(u, k), torch.from_numpy(want), 1e-12)


@pytest.mark.parametrize(("L", "K"), [(5, 5), (3, 6), (6, 3)])
def test_gradients(L: int, K: int) -> None:
    u, k, back = (x.requires_grad_() for x in signals((2, 2, L), (2, K), (2, K)))
    assert torch.autograd.gradcheck(conv.causal, (u, k))
    assert torch.autograd.gradcheck(conv.two_sided, (u, k, back))
    assert torch.autograd.gradgradcheck(conv.causal, (u, k))
    assert torch.autograd.gradgradcheck(conv.two_sided, (u, k, back))


@pytest.mark.parametrize(("L", "K"), [(5, 5), (12, 6), (6, 30)])
def test_functional_gradients(L: int, K: int) -> None:
    """torch.func.grad is autograd's, and under vmap it is that of each sample."""
    u, k, weight = signals((3, 2, L), (3, 2, K), (2, L))

    def loss(u: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (conv.causal(u, k).square() * weight).sum()

    grad = torch.func.grad(loss, argnums=(0, 1))

    def autograd(u: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        u, k = u.clone().requires_grad_(), k.clone().requires_grad_()
        return torch.autograd.grad(loss(u, k), (u, k))

    for got, want in zip(grad(u, k[0]), autograd(u, k[0]), strict=True):
        oracle.close(got, want, 1e-12)
    for dims in ((0, 0), (0, None), (None, 0)):
        each = [[x[0 if d is None else b] for x, d in zip((u, k), dims, strict=True)] for b in range(3)]
        together = [x[0] if d is None else x for x, d in zip((u, k), dims, strict=True)]
        got = torch.func.vmap(grad, in_dims=dims)(*together)
        for b in range(3):
            for g, w in zip(got, autograd(*each[b]), strict=True):
                oracle.close(g[b], w, 1e-12)


def test_numpy_convolve_agrees() -> None:
    u, k = signals((1, 1, 40), (1, 17))
    want = np.convolve(u[0, 0], k[0])[:40]
    np.testing.assert_allclose(conv.causal(u, k)[0, 0], want, atol=1e-12)
