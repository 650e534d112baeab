"""HiPPO state matrices and the normal, conjugate-symmetric forms that initialise S4 and S4D.

Every function is pure, works in float64 on the CPU and is deterministic across LAPACK builds.

References:
    HiPPO: Gu, Dao, Ermon, Rudra, Ré, arXiv 2008.07669.
    S4: Gu, Goel, Ré, arXiv 2111.00396.
    S4D: Gu, Gupta, Goel, Ré, arXiv 2206.11893.
    HTTYH: Gu, Johnson, Timalsina, Rudra, Ré, "How to Train Your HiPPO", arXiv 2206.12037.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Complex128, Float64
from torch import Tensor

from s4._checks import check_integer, check_option

T = TypeVar("T")


def transition(measure: str, N: int) -> tuple[Float64[Tensor, "N N"], Float64[Tensor, "N"]]:
    """Dense HiPPO pair (A, B) of x' = A x + B u, whose state holds the coefficients of u's history.

    Args:
        measure: "legs", all of the past under an exponential measure, scaled Legendre polynomials (HiPPO
            theorem 2 as S4 uses it, S4 equation 2); "legt", a window of length 1, Legendre polynomials
            (HiPPO theorem 1 in the orthonormal basis, HTTYH equation 6); "fout", a window of length 1,
            truncated Fourier series (HTTYH theorem 7, in the order constant, 0, cos 1, sin 1, cos 2, ...).
        N: state size, even, at least 2.

    Returns:
        A (N, N) and B (N,), float64.

    Raises:
        ValueError: unknown measure, or N odd or below 2.
    """
    with torch.device("cpu"):  # whatever the default device is
        return _choose("measure", measure, _TRANSITIONS)(_even(N))


def dplr(
    measure: str, N: int
) -> tuple[Complex128[Tensor, "n"], Complex128[Tensor, "r n"], Complex128[Tensor, "n"]]:
    """Diagonal plus low-rank form of a HiPPO pair, one of each conjugate pair (S4 theorem 1).

    With V unitary and all modes written out, V* A V = diag(Lambda) - sum over r of P_r P_r* and V* B = B.
    Each eigenvector's phase is chosen to make its entry of B real and non-negative.

    Args:
        measure: "legs" (rank 1), "legt" (rank 2) or "fout" (rank 1).
        N: state size, even, at least 2.

    Returns:
        Lambda (N/2,), P (r, N/2) and B (N/2,), complex128, ordered by frequency. Im Lambda >= 0; Re Lambda
        is -1/2 for "legs" and 0 for "legt" and "fout", whose damping is all in P.

    Raises:
        ValueError: unknown measure, or N odd or below 2.
    """
    with torch.device("cpu"):
        return _dplr(measure, N)


def diag(init: str, N: int) -> tuple[Complex128[Tensor, "n"], Complex128[Tensor, "n"]]:
    """Diagonal initialisations of S4D, one of each conjugate pair.

    Args:
        init: "legs", the diagonal of the LegS DPLR form with half its B, which tends to LegS itself as N
            grows (S4D theorem 3); "lin", -1/2 + i pi n; "inv", -1/2 + i N/pi (N/(2n+1) - 1) (S4D
            equations 9 and 8), both with B = 1.
        N: state size, even, at least 2.

    Returns:
        Lambda (N/2,) and B (N/2,), complex128.

    Raises:
        ValueError: unknown init, or N odd or below 2.
    """
    with torch.device("cpu"):
        return _choose("init", init, _DIAGONALS)(_even(N))


def _dplr(measure: str, N: int) -> tuple[Tensor, Tensor, Tensor]:
    A, B = transition(measure, N)
    P = _LOW_RANK[measure](N)
    if measure == "fout":
        # A + P P^T is already made of 2x2 rotations, the first of them zero: no eigensolver could pair
        # its two null vectors.
        frequency = 2 * math.pi * torch.arange(N // 2, dtype=torch.float64)
        cosines = torch.stack([P[0], B])[:, 0::2].to(torch.complex128) / math.sqrt(2)
        return 1j * frequency, cosines[:1], cosines[1]
    shift = -0.5 if measure == "legs" else 0.0
    skew = A + P.T @ P - shift * torch.eye(N, dtype=torch.float64)
    frequency, V = torch.linalg.eigh(-1j * skew)  # ascending, symmetric about 0
    frequency, V = frequency[N // 2 :], V[:, N // 2 :]
    phase = V.mH @ B.to(V.dtype)
    V = V * (phase / phase.abs())
    Lambda = torch.complex(torch.full_like(frequency, shift), frequency)
    return Lambda, torch.einsum("jn,rj->rn", V.conj(), P.to(V.dtype)), (V.mH @ B.to(V.dtype)).real + 0j


def _legs(N: int) -> tuple[Tensor, Tensor]:
    B = torch.sqrt(2 * torch.arange(N, dtype=torch.float64) + 1)
    A = -torch.tril(torch.outer(B, B), -1) - torch.diag(torch.arange(1.0, N + 1, dtype=torch.float64))
    return A, B


def _legt(N: int) -> tuple[Tensor, Tensor]:
    n = torch.arange(N)
    B = torch.sqrt(2 * n.to(torch.float64) + 1)
    sign = 1 - 2 * ((n[:, None] - n) % 2)  # (-1)^(n-k)
    return -torch.outer(B, B) * torch.where(n[:, None] >= n, 1, sign), B


def _fout(N: int) -> tuple[Tensor, Tensor]:
    B = _endpoint(N) * 2
    cosine = torch.arange(0, N, 2)
    frequency = 2 * math.pi * torch.arange(N // 2, dtype=torch.float64)
    A = -torch.outer(B, B) / 2
    A[cosine, cosine + 1] = -frequency
    A[cosine + 1, cosine] = frequency
    return A, B


def _endpoint(N: int) -> Tensor:
    """Values at either end of the window of the Fourier basis 1, 0, sqrt2 cos, sqrt2 sin, ..."""
    b = torch.zeros(N, dtype=torch.float64)
    b[0::2] = math.sqrt(2)
    b[0] = 1
    return b


def _legt_low_rank(N: int) -> Tensor:
    P = torch.sqrt(2 * torch.arange(N, dtype=torch.float64) + 1)
    parity = torch.arange(N) % 2
    return torch.stack([P * (parity == 0), P * (parity == 1)])


def _diag_legs(N: int) -> tuple[Tensor, Tensor]:
    Lambda, _, B = dplr("legs", N)
    return Lambda, B / 2


def _diag_lin(N: int) -> tuple[Tensor, Tensor]:
    n = torch.arange(N // 2, dtype=torch.float64)
    Lambda = torch.complex(torch.full_like(n, -0.5), math.pi * n)
    return Lambda, torch.ones_like(Lambda)


def _diag_inv(N: int) -> tuple[Tensor, Tensor]:
    n = torch.arange(N // 2, dtype=torch.float64)
    Lambda = torch.complex(torch.full_like(n, -0.5), N / math.pi * (N / (2 * n + 1) - 1))
    return Lambda, torch.ones_like(Lambda)


_TRANSITIONS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "legs": _legs,
    "legt": _legt,
    "fout": _fout,
}
_LOW_RANK: dict[str, Callable[[int], Tensor]] = {
    "legs": lambda N: torch.sqrt(torch.arange(N, dtype=torch.float64) + 0.5)[None],
    "legt": _legt_low_rank,
    "fout": lambda N: math.sqrt(2) * _endpoint(N)[None],
}
_DIAGONALS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "legs": _diag_legs,
    "lin": _diag_lin,
    "inv": _diag_inv,
}


def _choose(name: str, value: str, table: dict[str, T]) -> T:
    check_option(name, value, table)
    return table[value]


def _even(N: int) -> int:
    check_integer("N", N, 2)
    if N % 2:
        raise ValueError(f"N must be even, got {N}")
    return N
