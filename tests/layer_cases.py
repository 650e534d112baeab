"""Layers of every variant, init and discretisation, for the tests of S4Layer."""

from typing import NamedTuple

import oracle
import torch
from torch import Tensor

from s4 import S4Layer

H = 4


class Case(NamedTuple):
    variant: str
    init: str
    discretization: str | None
    d_state: int
    n_ssm: int
    bidirectional: bool
    L: int
    rate: float

    @property
    def method(self) -> str:
        return self.discretization or ("zoh" if self.variant == "diag" else "bilinear")


CASES = [
    Case("dplr", "legs", None, 2, 1, False, 1, 1.0),
    Case("dplr", "legs", None, 64, 2, False, 97, 1.0),
    Case("dplr", "legs", "bilinear", 256, 1, False, 31, 0.5),
    Case("dplr", "legs", None, 16, 4, True, 64, 1.0),
    Case("dplr", "legs", None, 6, 1, True, 1, 2.0),
    Case("dplr", "legs", None, 10, 2, False, 41, 30.0),
    Case("dplr", "legt", None, 2, 4, False, 30, 1.0),
    Case("dplr", "legt", None, 32, 2, True, 53, 0.5),
    Case("dplr", "legt", None, 256, 1, False, 16, 1.0),
    Case("dplr", "fout", None, 4, 2, False, 2, 1.0),
    Case("dplr", "fout", "bilinear", 64, 1, False, 128, 2.0),
    Case("dplr", "fout", None, 16, 1, True, 33, 1.0),
    Case("diag", "legs", "zoh", 2, 1, False, 1, 1.0),
    Case("diag", "legs", None, 64, 2, False, 97, 1.0),
    Case("diag", "legs", "bilinear", 16, 4, True, 64, 1.0),
    Case("diag", "legs", "zoh", 256, 1, False, 31, 0.5),
    Case("diag", "lin", "zoh", 32, 1, True, 53, 1.0),
    Case("diag", "lin", "bilinear", 64, 2, False, 30, 2.0),
    Case("diag", "inv", "zoh", 16, 1, False, 128, 1.0),
    Case("diag", "inv", "bilinear", 6, 4, True, 33, 1.0),
    Case("diag", "inv", "bilinear", 10, 2, False, 41, 30.0),
]
CAUSAL = [case for case in CASES if not case.bidirectional]
SMALL = [case for case in CASES if case.d_state <= 64 and case.L <= 64]


def ids(case: Case) -> str:
    direction = "both" if case.bidirectional else "causal"
    system = f"{case.variant}-{case.init}-{case.method}-N{case.d_state}-{case.n_ssm}ssm"
    return f"{system}-{direction}-L{case.L}-x{case.rate:g}"


def build(case: Case, dtype: torch.dtype = torch.float64) -> S4Layer:
    """A layer whose SSMs differ from each other and from their initialisation."""
    variant, init, discretization, d_state, n_ssm, bidirectional, _, _ = case
    layer = S4Layer(
        H,
        d_state,
        variant=variant,
        init=init,
        discretization=discretization,
        n_ssm=n_ssm,
        bidirectional=bidirectional,
        dtype=dtype,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return layer


def parameters(layer: S4Layer) -> dict[str, Tensor]:
    return {
        name: value.detach().double().clone().requires_grad_() for name, value in layer.named_parameters()
    }


def system(layer: S4Layer, case: Case) -> oracle.Discrete:
    """The oracle's view of a layer, out of autograd's reach."""
    with torch.no_grad():
        return oracle.discrete(parameters(layer), case.method, case.rate)


def inputs(case: Case, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """u (B, L, H) and an incoming state (B, H, N)."""
    return torch.randn(batch, case.L, H).to(dtype), torch.randn(batch, H, case.d_state).to(dtype)


PAIR = [CASES[1], CASES[13]]  # one case a variant where the axis in question matters, the variant less
