"""The oracle itself, against scipy and closed forms."""

import numpy as np
import oracle
import pytest
import scipy.signal
import torch


def stable_system(H: int, N: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    A = torch.randn(H, N, N, dtype=torch.float64, generator=g) - 3 * N**0.5 * torch.eye(N)
    B, C = torch.randn(2, H, N, dtype=torch.float64, generator=g)
    return A, B, C, torch.tensor([0.3, 0.01, 0.1], dtype=torch.float64)[:H]


@pytest.mark.parametrize("method", ["bilinear", "zoh"])
def test_discretise_is_scipy(method: str) -> None:
    A, B, C, dt = stable_system(3, 6)
    Abar, Bbar = oracle.discretise(A, B, dt, method)
    for h in range(3):
        system = (A[h].numpy(), B[h].numpy()[:, None], C[h].numpy()[None], np.zeros((1, 1)))
        want = scipy.signal.cont2discrete(system, dt[h].item(), method)
        np.testing.assert_allclose(Abar[h], want[0], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(Bbar[h], want[1][:, 0], rtol=1e-12, atol=1e-14)


def test_recurrence_is_scipy_dlsim() -> None:
    A, B, C, dt = stable_system(2, 4)
    A, B = oracle.discretise(A, B, dt, "zoh")
    D = torch.tensor([0.5, -2.0], dtype=torch.float64)
    u = torch.randn(1, 20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, _ = oracle.recurrence(A, B, C, D, u)
    for h in range(2):
        # scipy's output is C x_{l-1} + D u_l with x_{l-1} before u_l: shift it into x_l = A x_{l-1} + B u_l.
        Ch, Bh = C[h].numpy()[None], B[h].numpy()[:, None]
        system = (A[h].numpy(), Bh, Ch @ A[h].numpy(), Ch @ Bh + D[h].item(), 1.0)
        np.testing.assert_allclose(
            y[0, :, h], scipy.signal.dlsim(system, u[0, :, h].numpy())[1][:, 0], rtol=1e-10
        )


def test_forward_is_convolution_with_the_kernel_both_ways() -> None:
    A, B, C, dt = stable_system(3, 4)
    A, B = oracle.discretise(A, B, dt, "bilinear")
    system = oracle.Discrete(A, B, torch.stack([C, C.flip(-1)]), torch.zeros(3, dtype=torch.float64))
    u = torch.randn(2, 13, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    K = oracle.kernel(system, 13).numpy()
    want = oracle.convolve(u.mT.numpy(), K[0], K[1])
    np.testing.assert_allclose(oracle.forward(system, u)[0].mT, want, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(oracle.long_kernel(system, 13), K, rtol=1e-11, atol=1e-14)


def test_scalar_decay_has_its_closed_form() -> None:
    """One pair Lambda = -a + i b held by zero-order hold: K_l = 2 Re C B (e^{dt L} - 1)/L e^{dt L l}."""
    a, b, dt = 0.7, 3.0, 0.1
    values = {"log_dt": [np.log(dt)], "log_A_real": [[np.log(a)]], "A_imag": [[b]], "D": [0.0]}
    values |= {"B": [[[0.4, -1.0]]], "C": [[[[2.0, 0.5]]]]}
    parameters = {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
    lam, B, C = -a + 1j * b, 0.4 - 1j, 2 + 0.5j
    want = 2 * (C * B * (np.exp(dt * lam) - 1) / lam * np.exp(dt * lam * np.arange(9))).real
    np.testing.assert_allclose(oracle.kernel(oracle.discrete(parameters, "zoh"), 9)[0, 0], want, rtol=1e-12)
