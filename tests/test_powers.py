"""Structured discretisation, steps, powers and states against the dense loops of the oracle."""

from functools import partial

import oracle
import pytest
import torch

from s4 import system
from s4.ops.response import continuation
from s4.ops.step import plain
from s4.powers import Propagator


def structured(variant: str, directions: int = 1) -> tuple[system.Recurrence, oracle.Discrete]:
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
    systems = system.System(Lambda, P, B, C, parameters["log_dt"].exp(), method)
    return system.discretize(systems), oracle.discrete(parameters, method)


VARIANTS = ["rank 0", "rank 1", "rank 2", "zoh"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_structured_discretisation_is_the_dense_one(variant: str) -> None:
    got, want = structured(variant, directions=2)
    oracle.close(system.dense(got), want.A, 1e-13)
    oracle.close(got.B, want.B, 1e-13)
    oracle.close(got.C, want.C, 1e-15)


@pytest.mark.parametrize("variant", VARIANTS)
def test_structured_step_is_the_dense_one(variant: str) -> None:
    recurrence, (A, B, C, D) = structured(variant)
    x, u = torch.randn(2, 3, 8).double(), torch.randn(2, 3).double()
    y, after = plain(recurrence, D, x, u)
    want = torch.einsum("hnm,bhm->bhn", A, x) + B * u[..., None]
    oracle.close(after, want, 1e-13)
    oracle.close(y, (C[0] * want).sum(-1) + D * u, 1e-13)


@pytest.mark.parametrize("L", [0, 1, 2, 3, 7, 16, 61])
@pytest.mark.parametrize("variant", VARIANTS)
def test_response_is_the_powers_one_by_one(variant: str, L: int) -> None:
    """For one and two output rows, one and five columns, and none."""
    for directions, columns in ((1, 1), (2, 1), (2, 5), (1, 5), (1, 0)):
        recurrence, want = structured(variant, directions)
        X = torch.randn(3, 8, columns).double()
        got = Propagator(recurrence).response(X, L, torch.float64)
        assert got.shape == (directions, columns, 3, L)
        for step in range(L):
            oracle.close(got[..., step], torch.einsum("chn,hnq->cqh", want.C, X), 1e-11)
            X = want.A @ X


@pytest.mark.parametrize("L", [0, 1, 2, 3, 64, 65, 129, 300])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_state_adds_is_the_loop(variant: str, L: int) -> None:
    recurrence, want = structured(variant)
    for batch in (2, 0):
        u, x = torch.zeros(batch, L, 3).double(), torch.randn(batch, 3, 8).double()
        free, _ = oracle.recurrence(want.A, want.B, want.C[0], want.D, u, x)
        for backend in ("auto", "torch"):
            got = continuation(recurrence, x, L, backend)
            assert got.shape == (batch, 3, L)
            oracle.close(got, free.mT, 1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_advance_counts_for_each_sequence(variant: str) -> None:
    recurrence, want = structured(variant)
    x = torch.randn(6, 3, 8).double()
    steps = torch.tensor([0, 1, 2, 5, 8, 13])
    got = Propagator(recurrence).advance(x, steps, 13)
    for b, count in enumerate(steps):
        power = torch.linalg.matrix_power(want.A, int(count))
        oracle.close(got[b], torch.einsum("hnm,hm->hn", power, x[b]), 1e-12)
