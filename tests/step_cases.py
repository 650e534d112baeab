"""Small layers, their operands and their dense truth, for the tests of a step and of what is kept for it."""

import pytest
import torch
from oracle import close
from torch import Tensor

import s4.kernel
from s4 import S4Layer

FUSED = not isinstance(s4.kernel.backends()["cpu"], str)
fused = pytest.mark.skipif(not FUSED, reason="the C++ extension is not built")
SYSTEMS = [("dplr", "legs"), ("dplr", "legt"), ("diag", "lin")]
H, N = 3, 10  # five modes: not a whole number of vectors


def build(variant: str = "dplr", init: str = "legs", h: int = H, n: int = N, **options: object) -> S4Layer:
    layer = S4Layer(h, n, variant=variant, init=init, **{"dtype": torch.float64, **options})  # type: ignore[arg-type]
    return layer.eval()


def operands(layer: S4Layer, batch: int = 2) -> tuple[Tensor, Tensor]:
    u = torch.randn(batch, layer.d_model, dtype=layer.D.dtype)
    return u, torch.randn(batch, layer.d_model, layer.d_state, dtype=layer.D.dtype)


def truth(layer: S4Layer, u: Tensor, x: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
    """One step of the dense system, which nothing is kept of."""
    A, B, C, D = layer.dense(rate=rate)
    x = torch.einsum("hij,bhj->bhi", A, x.double()) + B * u.double()[..., None]
    return (C * x).sum(-1) + D * u.double(), x


def check(layer: S4Layer, u: Tensor, x: Tensor, rate: float = 1.0, tolerance: float = 1e-12) -> None:
    y, moved = layer.step(u, x, rate=rate)
    want, want_moved = truth(layer, u, x, rate)
    close(y, want, tolerance)
    close(moved, want_moved, tolerance)
