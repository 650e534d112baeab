"""Layers whose sequences fill chunks of the scan, or do not, for its tests."""

from typing import NamedTuple

import oracle
import torch
from layer_cases import parameters
from torch import Tensor

from s4 import S4Layer

H = 4


class Case(NamedTuple):
    variant: str
    init: str
    discretization: str | None = None
    d_state: int = 16
    n_ssm: int = 2
    bidirectional: bool = False
    rate: float = 1.0

    @property
    def method(self) -> str:
        return self.discretization or ("zoh" if self.variant == "diag" else "bilinear")


CASES = [
    Case("dplr", "legs"),
    Case("dplr", "legs", d_state=64, rate=0.5),
    Case("dplr", "legt", d_state=6, n_ssm=1),
    Case("dplr", "fout", rate=30.0),
    Case("dplr", "legs", bidirectional=True),
    Case("diag", "legs", rate=2.0),
    Case("diag", "lin", "bilinear", n_ssm=4),
    Case("diag", "inv", bidirectional=True),
]
CAUSAL = [case for case in CASES if not case.bidirectional]
PAIR = [CASES[0], CASES[5]]
T = 32  # chunk_length of all cases but that of 64 states
LENGTHS = [1, 2, T - 1, T, T + 1, 1047]


def ids(case: Case) -> str:
    direction = "both" if case.bidirectional else "causal"
    return f"{case.variant}-{case.init}-{case.method}-N{case.d_state}-{direction}-x{case.rate:g}"


def build(case: Case, dtype: torch.dtype = torch.float64) -> S4Layer:
    layer = S4Layer(
        H,
        case.d_state,
        variant=case.variant,
        init=case.init,
        discretization=case.discretization,
        n_ssm=case.n_ssm,
        bidirectional=case.bidirectional,
        mode="scan",
        dtype=dtype,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return layer


def inputs(case: Case, L: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """u (B, L, H) and an incoming state (B, H, N)."""
    return torch.randn(batch, L, H).to(dtype), torch.randn(batch, H, case.d_state).to(dtype)


def truth(layer: S4Layer, case: Case, u: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return oracle.forward(oracle.discrete(parameters(layer), case.method, case.rate), u, x)
