"""HiPPO matrices against their published formulas and their meaning; DPLR forms against the dense pair."""

from collections.abc import Callable
from math import pi, sqrt

import numpy as np
import pytest
import torch
from numpy.polynomial import Legendre, Polynomial

from s4 import hippo

MEASURES = ["legs", "legt", "fout"]
RANK = {"legs": 1, "legt": 2, "fout": 1}


def published(measure: str, N: int) -> tuple[np.ndarray, np.ndarray]:
    A, B = np.zeros((N, N)), np.zeros(N)
    if measure == "legs":
        for n in range(N):
            B[n] = sqrt(2 * n + 1)
            A[n, n] = -(n + 1)
            for k in range(n):
                A[n, k] = -sqrt((2 * n + 1) * (2 * k + 1))
    elif measure == "legt":
        for n in range(N):
            B[n] = sqrt(2 * n + 1)
            for k in range(N):
                A[n, k] = -sqrt((2 * n + 1) * (2 * k + 1)) * (1 if n >= k else (-1) ** (n - k))
    else:  # constant, nothing, cos 1, sin 1, cos 2, sin 2, ...
        b = np.array([1.0, 0.0] + [sqrt(2), 0.0] * (N // 2 - 1))
        A, B = -2 * np.outer(b, b), 2 * b
        for k in range(1, N // 2):
            A[2 * k, 2 * k + 1] -= 2 * pi * k
            A[2 * k + 1, 2 * k] += 2 * pi * k
    return A, B


@pytest.mark.parametrize("N", [2, 4, 16, 34])
@pytest.mark.parametrize("measure", MEASURES)
def test_transition_is_the_published_formula(measure: str, N: int) -> None:
    A, B = hippo.transition(measure, N)
    assert A.dtype == B.dtype == torch.float64
    want_A, want_B = published(measure, N)
    np.testing.assert_allclose(A, want_A, rtol=1e-14, atol=0)
    np.testing.assert_allclose(B, want_B, rtol=1e-14, atol=0)


def integral(f: Callable[[np.ndarray], np.ndarray]) -> float:
    """Over [0, 1], exact for polynomials up to degree 79."""
    x, w = np.polynomial.legendre.leggauss(40)
    return float((w * f((x + 1) / 2)).sum() / 2)


def scaled_legendre(n: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda s: sqrt(2 * n + 1) * Legendre.basis(n)(2 * s - 1)


@pytest.mark.parametrize("N", [2, 6, 12])
def test_legs_state_is_the_projection_of_the_whole_past(N: int) -> None:
    """With c_n(t) = int_0^1 u(t s) p_n(s) ds, HiPPO says t c' = A c + B u for any u; here t = 1."""
    u = Polynomial(np.random.default_rng(0).standard_normal(N + 4))
    A, B = (x.numpy() for x in hippo.transition("legs", N))
    p = [scaled_legendre(n) for n in range(N)]
    c = np.array([integral(lambda s, n=n: u(s) * p[n](s)) for n in range(N)])
    slope = np.array([integral(lambda s, n=n: s * u.deriv()(s) * p[n](s)) for n in range(N)])
    np.testing.assert_allclose(slope, A @ c + B * u(1.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("N", [2, 6, 12])
def test_legt_state_is_the_projection_of_a_window(N: int) -> None:
    """c_n(t) = int_0^1 u(t - 1 + s) p_n(s) ds obeys c' = A c + B u when N polynomials hold u exactly."""
    u = Polynomial(np.random.default_rng(0).standard_normal(N))
    A, B = (x.numpy() for x in hippo.transition("legt", N))
    p = [scaled_legendre(n) for n in range(N)]
    c = np.array([integral(lambda s, n=n: u(s) * p[n](s)) for n in range(N)])
    slope = np.array([integral(lambda s, n=n: u.deriv()(s) * p[n](s)) for n in range(N)])
    np.testing.assert_allclose(slope, A @ c + B * u(1.0), rtol=1e-9, atol=1e-9)


def test_fout_state_is_the_spectrum_of_a_window() -> None:
    """int_0^1 u(t-s) (1, sqrt2 cos 2 pi k s, sqrt2 sin 2 pi k s) ds rotates for a u of period 1."""
    N, t = 8, 0.3
    A, B = (x.numpy() for x in hippo.transition("fout", N))
    a, b = np.random.default_rng(0).standard_normal((2, N // 2))
    wave = 2 * pi * np.arange(N // 2)
    u = (a * np.cos(wave * t) + b * np.sin(wave * t)).sum()

    def spectrum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        # cos w(t-s) = cos wt cos ws + sin wt sin ws, and so for the sine
        cosine = (a * np.cos(wave * t) + b * np.sin(wave * t)) / sqrt(2)
        sine = (a * np.sin(wave * t) - b * np.cos(wave * t)) / sqrt(2)
        cosine[0] *= sqrt(2)
        return np.stack([cosine, sine * (wave > 0)], -1).ravel()

    np.testing.assert_allclose(spectrum(b * wave, -a * wave), A @ spectrum(a, b) + B * u, atol=1e-12)


@pytest.mark.parametrize(
    ("measure", "N"), [(m, N) for m in MEASURES for N in (2, 4, 8, 64, 256)] + [("legs", 1024)]
)
def test_dplr_has_the_transfer_functions_of_the_dense_pair(measure: str, N: int) -> None:
    """With the resolvent R = (s-A)^-1, B* R B, tr P* R P, B* R P P* R B, |R B| and |P* R B| know no basis.

    The norms tell A from its transpose, which the others do not.
    """
    A, B = (x.numpy() for x in hippo.transition(measure, N))
    Lambda, P, B_half = (x.numpy() for x in hippo.dplr(measure, N))
    assert Lambda.shape == B_half.shape == (N // 2,)
    assert P.shape == (RANK[measure], N // 2)
    assert Lambda.dtype == P.dtype == B_half.dtype == np.complex128
    D = np.concatenate([Lambda, Lambda.conj()])
    Q = np.concatenate([P, P.conj()], -1)
    b = np.concatenate([B_half, B_half.conj()])
    # The symmetric part of the dense A is Re Lambda - P P^T.
    low_rank = -(A + A.T) / 2 + (-0.5 if measure == "legs" else 0.0) * np.eye(N)
    for s in (2 + 5j, 1j * N, 0.3, 0.1 - 40j, 100.0)[: 2 if N > 256 else 5]:
        dense = np.linalg.solve(s * np.eye(N) - A, np.concatenate([B[:, None], low_rank], 1))
        want = [B @ dense[:, 0], np.trace(dense[:, 1:]), B @ dense[:, 1:] @ dense[:, 0]]
        RB = dense[:, 0]
        want += [np.linalg.norm(RB), np.sqrt(RB.conj() @ low_rank @ RB)]
        full = np.diag(D) - Q.T @ Q.conj()
        x = np.linalg.solve(s * np.eye(N) - full, np.concatenate([b[:, None], Q.T], 1))
        got = [
            b.conj() @ x[:, 0],
            np.trace(Q.conj() @ x[:, 1:]),
            (b.conj() @ x[:, 1:]) @ (Q.conj() @ x[:, 0]),
            np.linalg.norm(x[:, 0]),
            np.linalg.norm(Q.conj() @ x[:, 0]),
        ]
        np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("N", [2, 4, 8])
@pytest.mark.parametrize("measure", MEASURES)
def test_dplr_has_the_eigenvalues_of_the_dense_matrix(measure: str, N: int) -> None:
    A, _ = hippo.transition(measure, N)
    Lambda, P, _ = hippo.dplr(measure, N)
    Q = torch.cat([P, P.conj()], -1)
    full = torch.diag(torch.cat([Lambda, Lambda.conj()])) - Q.T @ Q.conj()
    got, want = (np.sort_complex(np.round(torch.linalg.eigvals(M).numpy(), 6)) for M in (full, A))
    np.testing.assert_allclose(got, want, atol=1e-5)
    if measure == "legs":  # lower triangular: its diagonal
        np.testing.assert_allclose(want, -np.arange(N, 0, -1.0), atol=1e-5)


@pytest.mark.parametrize("N", [2, 16, 1024])
@pytest.mark.parametrize("measure", MEASURES)
def test_lambda_keeps_one_of_each_conjugate_pair(measure: str, N: int) -> None:
    Lambda, P, B = hippo.dplr(measure, N)
    assert all(torch.isfinite(torch.view_as_real(x)).all() for x in (Lambda, P, B))
    np.testing.assert_allclose(Lambda.real, -0.5 if measure == "legs" else 0.0, atol=1e-13)
    frequency = Lambda.imag.sort().values
    assert frequency[0] >= 0
    assert (frequency.diff() > 1e-3).all()
    A, dense_B = hippo.transition(measure, N)
    # Traces are basis-free: |B|^2, tr A, and tr A^2 for the frequencies.
    assert 2 * (B.abs() ** 2).sum() == pytest.approx((dense_B**2).sum().item(), rel=1e-10)
    assert 2 * (Lambda.real.sum() - (P.abs() ** 2).sum()) == pytest.approx(A.trace().item(), rel=1e-10)


@pytest.mark.parametrize("N", [2, 64, 1024])
def test_diag_inits_are_their_formulas(N: int) -> None:
    n = np.arange(N // 2)
    for init, frequency in (("lin", pi * n), ("inv", N / pi * (N / (2 * n + 1) - 1))):
        Lambda, B = hippo.diag(init, N)
        assert Lambda.dtype == B.dtype == torch.complex128
        np.testing.assert_allclose(Lambda, -0.5 + 1j * frequency, rtol=1e-14)
        np.testing.assert_array_equal(B, np.ones(N // 2))
    Lambda, B = hippo.diag("legs", N)
    want, _, want_B = hippo.dplr("legs", N)
    np.testing.assert_array_equal(Lambda, want)
    np.testing.assert_array_equal(B, want_B / 2)


@pytest.mark.parametrize("N", [2, 8])
def test_default_device_does_not_matter(N: int) -> None:
    calls = [(hippo.transition, name) for name in MEASURES] + [(hippo.dplr, name) for name in MEASURES]
    calls += [(hippo.diag, name) for name in ("legs", "lin", "inv")]
    for function, name in calls:
        want = function(name, N)
        with torch.device("meta"):
            got = function(name, N)
        for g, w in zip(got, want, strict=True):
            assert g.device.type == "cpu"
            assert g.dtype == (torch.float64 if function is hippo.transition else torch.complex128)
            assert torch.equal(g, w)
