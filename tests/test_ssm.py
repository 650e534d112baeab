"""Discretisation against scipy; structured recurrences, powers and states against dense loops."""

from functools import partial

import numpy as np
import oracle
import pytest
import scipy.signal
import torch

from s4 import ssm

METHODS = {"bilinear": ssm.bilinear, "zoh": ssm.zoh}


def systems(*batch: int, N: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(N)
    A = torch.randn(*batch, N, N, dtype=dtype, generator=g) - N**0.5 * torch.eye(N, dtype=dtype)
    B = torch.randn(*batch, N, dtype=dtype, generator=g)
    return A, B, torch.rand(batch, dtype=dtype, generator=g) + 0.01


@pytest.mark.parametrize("N", [1, 2, 7, 32])
@pytest.mark.parametrize("method", METHODS)
def test_discretisation_is_scipy(method: str, N: int) -> None:
    A, B, dt = systems(2, 3, N=N)
    Abar, Bbar = METHODS[method](A, B, dt)
    assert Abar.shape == A.shape
    assert Bbar.shape == B.shape
    for i in np.ndindex(2, 3):
        system = (A[i].numpy(), B[i].numpy()[:, None], np.zeros((1, N)), np.zeros((1, 1)))
        want = scipy.signal.cont2discrete(system, dt[i].item(), method)
        np.testing.assert_allclose(Abar[i], want[0], rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(Bbar[i], want[1][:, 0], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_one_system_without_batch_dimensions(method: str) -> None:
    A, B, dt = systems(N=4)
    Abar, Bbar = METHODS[method](A, B, dt)
    batched = METHODS[method](A[None], B[None], dt[None])
    oracle.close(Abar, batched[0][0], 1e-13)  # a batch may be solved by other code
    oracle.close(Bbar, batched[1][0], 1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_an_integrator_has_no_inverse_and_needs_none(method: str) -> None:
    """A = [[0, 1], [0, 0]]: exp is I + dt A, and the input is integrated over the step."""
    A = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    Abar, Bbar = METHODS[method](A, torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor(0.5).double())
    np.testing.assert_allclose(Abar, [[1, 0.5], [0, 1]], atol=1e-15)
    np.testing.assert_allclose(Bbar, [0.125, 0.5], atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_small_steps_tend_to_euler(method: str) -> None:
    A, B, _ = systems(N=6)
    dt = torch.tensor(1e-8).double()
    Abar, Bbar = METHODS[method](A, B, dt)
    np.testing.assert_allclose((Abar - torch.eye(6)) / dt, A, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(Bbar / dt, B, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_float32_stays_float32(method: str) -> None:
    Abar, Bbar = METHODS[method](*systems(3, N=8, dtype=torch.float32))
    want = METHODS[method](*(x.double() for x in systems(3, N=8, dtype=torch.float32)))
    assert Abar.dtype == Bbar.dtype == torch.float32
    np.testing.assert_allclose(Abar, want[0], atol=1e-5)
    np.testing.assert_allclose(Bbar, want[1], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method: str) -> None:
    arguments = [x.requires_grad_() for x in systems(2, N=3)]
    assert torch.autograd.gradcheck(METHODS[method], arguments)


def structured(variant: str, directions: int = 1) -> tuple[ssm.Recurrence, oracle.Discrete]:
    """Random stable systems of rank 0, 1 or 2, as the library discretises them and as the oracle does."""
    H, n, rank = 3, 4, {"rank 1": 1, "rank 2": 2}.get(variant, 0)
    draw = partial(torch.randn, dtype=torch.float64)
    parameters = {
        "log_dt": draw(H) / 2 - 2,
        "log_A_real": draw(H, n) / 2,
        "A_imag": 3 * draw(H, n),
        "D": draw(H),
    }
    parameters |= {"P": draw(rank, H, n, 2), "B": draw(H, n, 2), "C": draw(directions, H, n, 2)}
    Lambda = torch.complex(-parameters["log_A_real"].exp(), parameters["A_imag"])
    P, B, C = (torch.view_as_complex(parameters[name]) for name in "PBC")
    method = "zoh" if variant == "zoh" else "bilinear"
    system = ssm.System(Lambda, P, B, C, parameters["log_dt"].exp())
    return ssm.discretize(system, method), oracle.discrete(parameters, method)


VARIANTS = ["rank 0", "rank 1", "rank 2", "zoh"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_structured_discretisation_is_the_dense_one(variant: str) -> None:
    got, want = structured(variant, directions=2)
    oracle.close(ssm.dense(got), want.A, 1e-13)
    oracle.close(got.B, want.B, 1e-13)
    oracle.close(got.C, want.C, 1e-15)


@pytest.mark.parametrize("variant", VARIANTS)
def test_structured_step_is_the_dense_one(variant: str) -> None:
    recurrence, (A, B, C, _) = structured(variant)
    x, u = torch.randn(2, 3, 8).double(), torch.randn(2, 3).double()
    y, after = ssm.step(recurrence, x, u)
    want = torch.einsum("hnm,bhm->bhn", A, x) + B * u[..., None]
    oracle.close(after, want, 1e-13)
    oracle.close(y, (C[0] * want).sum(-1), 1e-13)


@pytest.mark.parametrize("L", [0, 1, 2, 3, 7, 16, 61])
@pytest.mark.parametrize("variant", VARIANTS)
def test_response_is_the_powers_one_by_one(variant: str, L: int) -> None:
    """For one and two output rows, one and five columns, and none."""
    for directions, columns in ((1, 1), (2, 1), (2, 5), (1, 5), (1, 0)):
        recurrence, want = structured(variant, directions)
        X = torch.randn(3, 8, columns).double()
        got = ssm.Propagator(recurrence).response(X, L, torch.float64)
        assert got.shape == (directions, columns, 3, L)
        for step in range(L):
            oracle.close(got[..., step], torch.einsum("chn,hnq->cqh", want.C, X), 1e-11)
            X = want.A @ X


@pytest.mark.parametrize("L", [0, 1, 2, 3, 64, 65, 129, 300])
@pytest.mark.parametrize("variant", VARIANTS)
def test_drive_and_continuation_are_the_loop(variant: str, L: int) -> None:
    recurrence, want = structured(variant)
    propagator = ssm.Propagator(recurrence)
    u, x = torch.randn(2, 3, L).double(), torch.randn(2, 3, 8).double()
    _, driven = oracle.recurrence(want.A, want.B, want.C[0], want.D, u.mT)
    oracle.close(propagator.drive(u), driven, 1e-11)
    free, _ = oracle.recurrence(want.A, want.B, want.C[0], want.D, torch.zeros_like(u.mT), x)
    oracle.close(propagator.continuation(x, L), free.mT, 1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_advance_counts_for_each_sequence(variant: str) -> None:
    recurrence, want = structured(variant)
    x = torch.randn(6, 3, 8).double()
    steps = torch.tensor([0, 1, 2, 5, 8, 13])
    got = ssm.Propagator(recurrence).advance(x, steps, 13)
    for b, count in enumerate(steps):
        power = torch.linalg.matrix_power(want.A, int(count))
        oracle.close(got[b], torch.einsum("hnm,hm->hn", power, x[b]), 1e-12)
