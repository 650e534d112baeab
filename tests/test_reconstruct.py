"""What a HiPPO state remembers: bases against scipy, reconstructions against signals and known errors."""

from math import factorial, pi, sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from scipy.special import eval_legendre

from s4 import S4Layer, hippo

MEASURES = ["legs", "legt", "fout"]


def pair(measure: str, N: int) -> tuple[np.ndarray, np.ndarray]:
    A, B = hippo.transition(measure, N)
    return A.numpy(), B.numpy()


def published(measure: str, N: int, s: np.ndarray) -> np.ndarray:
    """The basis at the lags s: (len(s), N)."""
    if measure == "fout":
        waves = [f(2 * pi * k * s) * sqrt(2) for k in range(1, N // 2) for f in (np.cos, np.sin)]
        return np.stack([np.ones_like(s), np.zeros_like(s), *waves], -1)
    z = np.exp(-s) if measure == "legs" else 1 - s
    return np.stack([sqrt(2 * n + 1) * eval_legendre(n, 2 * z - 1) for n in range(N)], -1)


def gauss(end: float, panels: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of an integral over [0, end]."""
    x, w = np.polynomial.legendre.leggauss(20)
    width = end / panels
    middles = width * (np.arange(panels) + 0.5)
    return (middles[:, None] + x * width / 2).ravel(), np.tile(w * width / 2, panels)


def rms(measure: str, error: np.ndarray, s: np.ndarray, weights: np.ndarray) -> float:
    density = np.exp(-s) if measure == "legs" else 1.0
    return sqrt((np.abs(error) ** 2 * density * weights).sum())


def recall(measure: str, x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """`reconstruct` of a real or complex state at the lags s."""
    parts = hippo.reconstruct(measure, torch.tensor(np.stack([x.real, x.imag])), torch.tensor(s)).numpy()
    return parts[0] + 1j * parts[1]


@pytest.mark.parametrize("N", [2, 4, 16, 64])
@pytest.mark.parametrize("measure", MEASURES)
def test_basis_is_the_published_formula(measure: str, N: int) -> None:
    s = np.linspace(0, 1, 23) if measure != "legs" else np.append(np.linspace(0, 5, 23), np.inf)
    got = hippo.basis(measure, N, torch.tensor(s))
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, published(measure, N, s), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("N", [2, 8, 32])
def test_kernels_of_legs_are_its_basis_under_its_weight(N: int) -> None:
    A, B = pair("legs", N)
    s = np.linspace(0, 6, 13)
    want = np.stack([expm(A * lag) @ B for lag in s]) * np.exp(s)[:, None]
    np.testing.assert_allclose(hippo.basis("legs", N, torch.tensor(s)), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("measure", ["legt", "fout"])
def test_kernels_of_a_window_tend_to_its_basis(measure: str) -> None:
    """In mean square over the window and once more its length, where they tend to zero; as N^(-1/2)."""
    step = 1e-3
    s = (np.arange(2000) + 0.5) * step
    errors = []
    for N in (8, 32, 128):
        A, B = pair(measure, N)
        kernels, forward = [expm(A * s[0]) @ B], expm(A * step)
        for _ in s[1:]:
            kernels.append(forward @ kernels[-1])
        basis = np.zeros((len(s), N))
        basis[s < 1] = hippo.basis(measure, N, torch.tensor(s[s < 1]))
        errors.append(np.sqrt(step * ((np.stack(kernels) - basis)[:, :4] ** 2).sum()))
    assert errors[1] < 0.55 * errors[0]
    assert errors[2] < 0.55 * errors[1]


@pytest.mark.parametrize("frequency", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("N", [4, 16, 64])
@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_missed_of_a_wave_falls_with_N(measure: str, N: int, frequency: float) -> None:
    """x = (iw - A)^-1 B e^(iwt) is the state after an endless wave, here at t = 0.

    "legs": the coefficients of z^(iw) have |x_n|^2 = w^2 / (n^2 + w^2) - w^2 / ((n+1)^2 + w^2). Their
    sum telescopes; w^2 / (N^2 + w^2) is missed, exactly.
    "legt": the best polynomial misses 2 (w/4)^N / N! at most, as interpolation at Chebyshev nodes does.
    "fout": a jump J between the ends of the window leaves J^2 / (2 pi k)^2 to each frequency k. Those from
    N/2 on, J^2 / (pi^2 N) in sum, are missed. That the state holds the others is true for large N only.
    """
    A, B = pair(measure, N)
    x = np.linalg.solve(1j * frequency * np.eye(N) - A, B)
    s, weights = gauss(40.0, 400) if measure == "legs" else gauss(1.0, 50)
    missed = rms(measure, recall(measure, x, s) - np.exp(-1j * frequency * s), s, weights)
    if measure == "legs":
        assert missed == pytest.approx(frequency / sqrt(N**2 + frequency**2), rel=1e-3)
    elif measure == "legt":
        assert missed < 2 * (frequency / 4) ** N / factorial(N) + 1e-13
    elif 2 * frequency < N:
        jump = abs(1 - np.exp(-1j * frequency))
        assert missed == pytest.approx(jump / (pi * sqrt(N)), rel=frequency / N)


@pytest.mark.parametrize("measure", MEASURES)
def test_error_on_a_transient_falls_with_N(measure: str) -> None:
    """A signal that starts smoothly from zero, integrated to the middle of things."""
    bounds = {"legs": (0.3, 0.08, 4e-3), "legt": (1e-3, 2e-8, 1e-9), "fout": (0.12, 0.06, 0.04)}[measure]

    def signal(t: np.ndarray) -> np.ndarray:
        return (1 - np.exp(-(t**4))) * (np.sin(3 * t) + 0.5 * np.cos(7 * t))

    now = 3.0
    s, weights = gauss(now if measure == "legs" else 1.0, 20)  # before, signal and state are zero
    for N, bound in zip((8, 16, 32), bounds, strict=True):
        A, B = pair(measure, N)
        solution = solve_ivp(
            lambda t, x, A=A, B=B: A @ x + B * signal(t),
            *((0, now), np.zeros(N)),
            method="Radau",
            jac=A,
            rtol=1e-9,
            atol=1e-12,
        )
        x = solution.y[:, -1]
        assert rms(measure, recall(measure, x, s) - signal(now - s), s, weights) < bound


@pytest.mark.parametrize("N", [2, 6, 12])
def test_legt_recalls_polynomials_exactly(N: int) -> None:
    """Of degree N - 1: u = sum of a_k t^k has the state sum of x_k t^k with A x_k + B a_k = (k+1) x_(k+1)."""
    A, B = pair("legt", N)
    a = np.random.default_rng(0).standard_normal(N)
    powers: list[np.ndarray] = [np.zeros(N)]
    for k in reversed(range(N)):
        powers.insert(0, np.linalg.solve(A, (k + 1) * powers[0] - B * a[k]))
    t, s = 0.4, np.linspace(0, 1, 11)
    x = sum(p * t**k for k, p in enumerate(powers))
    np.testing.assert_allclose(
        recall("legt", x, s).real, np.polynomial.Polynomial(a)(t - s), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("N", [2, 6, 12])
def test_fout_recalls_whole_periods_exactly(N: int) -> None:
    A, B = pair("fout", N)
    s = np.linspace(0, 1, 11)
    for periods in range(1, N // 2):
        wave = 2j * pi * periods
        x = np.linalg.solve(wave * np.eye(N) - A, B) * np.exp(wave * 0.3)
        np.testing.assert_allclose(recall("fout", x, s), np.exp(wave * (0.3 - s)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("N", [2, 8, 32])
@pytest.mark.parametrize("measure", MEASURES)
def test_modes_are_those_of_the_dense_pair(measure: str, N: int) -> None:
    """Every real z gives A (2 Re V z) + B u = 2 Re V (Lambda z - P P* z + B u), as conjugate pairs come."""
    A, B = pair(measure, N)
    Lambda, P, B_modes = (p.numpy() for p in hippo.dplr(measure, N))
    rng = np.random.default_rng(0)
    z = rng.standard_normal(N // 2) + 1j * rng.standard_normal(N // 2)

    def dense(z: np.ndarray) -> np.ndarray:
        return hippo.from_modes(measure, torch.tensor(np.concatenate([z.real, z.imag]))).numpy()

    slope = Lambda * z - sum(p * 2 * (p.conj() @ z).real for p in P)
    np.testing.assert_allclose(dense(slope), A @ dense(z), rtol=0, atol=1e-11 * np.abs(A).max())
    np.testing.assert_allclose(dense(B_modes), B, rtol=0, atol=1e-11 * B.max())
    np.testing.assert_allclose(np.linalg.norm(dense(z)), sqrt(2) * np.linalg.norm(z), rtol=1e-12)


@pytest.mark.parametrize(
    ("variant", "measure", "tolerance"),
    [("dplr", "legs", 1e-3), ("dplr", "legt", 1e-3), ("dplr", "fout", 0.065), ("diag", "legs", 3e-3)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fresh_layer_recalls_its_input(
    variant: str, measure: str, tolerance: float, dtype: torch.dtype
) -> None:
    """Each channel with its own dt, and so with lags of its own, whatever dt is drawn.

    A Fourier series of n frequencies rings at both ends: a jump J, here of 2 at most, leaves J / (2 pi n
    sin(pi s)) at a distance s from it, 0.064 at the least one of 0.05. The others missed at most 7e-4 over
    twelve draws.
    """
    L, batch = 2000, 2
    layer = S4Layer(3, 64, variant=variant, init=measure, dt_min=1e-3, dt_max=2e-3, dtype=dtype)
    dt = layer.log_dt.detach().double().exp()
    t = (torch.arange(L) + 0.5)[:, None] * dt
    u = (1 - torch.exp(-(t**4))) * torch.sin(5 * t)
    u = torch.stack([u, -0.5 * u]).to(dtype)
    with torch.no_grad():
        _, state = layer(u, return_state=True)
    steps = torch.arange(50, 450)
    got = hippo.reconstruct(measure, hippo.from_modes(measure, state), (steps + 0.5) * dt[:, None])
    assert got.dtype == dtype
    assert got.shape == (batch, 3, len(steps))
    torch.testing.assert_close(got, u[:, L - 1 - steps].transpose(1, 2), rtol=0, atol=tolerance)


@pytest.mark.parametrize("measure", MEASURES)
def test_shapes_gradients_and_default_device(measure: str) -> None:
    state = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    lags = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    assert hippo.basis(measure, 4, lags[0, 0]).shape == (4,)
    assert hippo.reconstruct(measure, state, lags[0]).shape == (2, 1, 5)
    assert hippo.reconstruct(measure, state, lags[:, :0]).shape == (2, 3, 0)
    assert hippo.reconstruct(measure, state[:0], lags).shape == (0, 3, 5)
    assert torch.autograd.gradcheck(lambda x, s: hippo.reconstruct(measure, x, s), (state, lags))
    assert torch.autograd.gradcheck(lambda x: hippo.from_modes(measure, x), (state,))
    want = hippo.reconstruct(measure, hippo.from_modes(measure, state), lags)
    with torch.device("meta"):
        assert torch.equal(hippo.reconstruct(measure, hippo.from_modes(measure, state), lags), want)


def test_example_draws(tmp_path: Path) -> None:
    """Its figures; and what they show of a smooth signal under LegT is the signal."""
    for package in ("jsonargparse", "matplotlib", "rich", "PIL"):
        pytest.importorskip(package, reason="the examples need the extra 'examples'")
    import hippo as example

    example.main(tmp_path, [4, 8], duration=0.04, animate=tmp_path / "memory.gif")
    for file in ("memory.png", "kernels.png", "memory.gif"):
        assert (tmp_path / file).stat().st_size > 1000
    signal = example.smooth_noise(1500, 0)
    half, whole = example.recall("legt", 32, signal, [750, 1500])
    np.testing.assert_allclose(half, signal[:750].flip(0), atol=1e-3)
    np.testing.assert_allclose(whole, signal[500:].flip(0), atol=1e-3)
