"""HiPPO state matrices, the normal forms that initialise S4 and S4D, and the past that a state remembers.

Every function is pure and computes in float64; matrices are made on the CPU, the same with every LAPACK.

The docstrings cite these papers:

- HiPPO: Gu, Dao, Ermon, Rudra, Ré, arXiv 2008.07669.
- S4: Gu, Goel, Ré, arXiv 2111.00396.
- S4D: Gu, Gupta, Goel, Ré, arXiv 2206.11893.
- HTTYH: Gu, Johnson, Timalsina, Rudra, Ré, "How to Train Your HiPPO", arXiv 2206.12037.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex128, Float, Float64
from torch import Tensor

from s4.checks import check_integer, check_option, unread
from s4.precision import double

__all__ = ["basis", "diag", "dplr", "from_modes", "names", "own", "reconstruct", "transition"]


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

    Examples:
        >>> A, B = transition("legs", 4)
        >>> A.diagonal()
        tensor([-1., -2., -3., -4.], dtype=torch.float64)
    """
    with torch.device("cpu"):  # whatever the default device is
        return _measure(measure).transition(_even(N))  # type: ignore[misc]


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

    Examples:
        >>> Lambda, P, B = dplr("legs", 64)
        >>> Lambda.shape, P.shape, B.shape
        (torch.Size([32]), torch.Size([1, 32]), torch.Size([32]))
    """
    with torch.device("cpu"):
        Lambda, V = _modes(measure, N)
        _, B = transition(measure, N)
        P = torch.einsum("jn,rj->rn", V.conj(), INITS[measure].low_rank(N).to(V.dtype))  # type: ignore[misc]
        return Lambda, P, (V.mH @ B.to(V.dtype)).real + 0j


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

    Examples:
        >>> Lambda, B = diag("lin", 4)
        >>> Lambda.imag / torch.pi
        tensor([0., 1.], dtype=torch.float64)
    """
    with torch.device("cpu"):
        check_option("init", init, names("diag"))
        return INITS[init].diagonal(_even(N))  # type: ignore[misc]


def basis(measure: str, N: int, lags: Float[Tensor, "*m"]) -> Float64[Tensor, "*m N"]:
    """Functions p_n in which a HiPPO state writes down the past: u(t - s) ~ sum over n of x_n(t) p_n(s).

    With L_n the Legendre polynomials of unit norm on [0, 1], L_n(z) = sqrt(2n+1) P_n(2z - 1):

    - "legs": L_n(e^-s), orthonormal under the weight e^-s over s >= 0 (HTTYH section 3);
    - "legt": L_n(1 - s), orthonormal on the window 0 <= s <= 1 (HiPPO theorem 1);
    - "fout": 1, 0, sqrt2 cos 2 pi s, sqrt2 sin 2 pi s, sqrt2 cos 4 pi s, ... on the same (HTTYH theorem 7).

    x_n is the input convolved with exp(s A) B, which is weight times p_n: exactly for "legs"; for the windows
    approximately, as their A has to guess from the state what leaves the window.

    Args:
        measure: as in `transition`.
        N: state size, even, at least 2.
        lags: s, how long ago, in the system's own time, which is steps times dt. Any shape.

    Returns:
        The values (..., N), float64 (on the CPU if the lags' device has none), differentiable in the lags.

    Raises:
        ValueError: unknown measure, N odd or below 2, or lags negative, NaN or beyond the window.
        TypeError: lags no floating-point tensor.

    Examples:
        >>> lags = torch.linspace(0, 1, 1001)
        >>> p = basis("legt", 8, lags)
        >>> gram = torch.trapezoid(p[:, :, None] * p[:, None], lags.double(), dim=0)  # orthonormal
        >>> torch.allclose(gram, torch.eye(8, dtype=torch.float64), atol=1e-3)
        True
    """
    _, _, _, function, window, *_ = _measure(measure)
    _even(N)
    _check_floating("lags", lags)
    if not lags.is_meta and not bool(((lags >= 0) & (lags <= window)).all()):
        reach = "be at least 0" if window == math.inf else f"lie in 0..{window:g}, the window of {measure!r}"
        raise ValueError(f"lags must {reach}, got values from {lags.min():g} to {lags.max():g}")
    return function(N, double(lags))  # type: ignore[misc]


def reconstruct(
    measure: str, state: Float[Tensor, "*batch N"], lags: Float[Tensor, "*lags m"]
) -> Float[Tensor, "*out m"]:
    """The past that a HiPPO state remembers: u(t - s) from x(t), at each lag s (HiPPO section 2).

    The state is that of the pair (A, B) of `transition`, started from zero, in continuous time or in steps
    dt. With steps, the input j steps before the last is at the lag (j + 1/2) dt, the middle of its step. The
    state of a freshly initialised `S4Layer` goes through `from_modes` first.

    How much is remembered depends on the measure:

    - "legs" gives the projection onto the N functions of `basis`, the best under the weight e^-s: sharp for
      the recent past, ever coarser before. Of a wave e^(iwt) it misses w / sqrt(N^2 + w^2), root mean square
      under that weight.
    - "legt" is exact for polynomials of degree below N, once what came before them has died out. Of a wave
      with w well below N it misses about 2 (w/4)^N / N!.
    - "fout" is exact for waves with up to N/2 - 1 whole periods in the window, once what came before them has
      died out. Of another wave it misses about |1 - e^(iw)| / (pi sqrt(N)), as a Fourier series rings where
      the ends of the window do not meet.

    All ring where the input jumps, also at its start.

    Args:
        measure: as in `transition`.
        state: x(t), (..., N), N even.
        lags: s, in steps times dt, (..., M), at least 0 and for windows at most 1. Leading dimensions
            broadcast against those of the state: channels with a dt of their own have lags of their own.

    Returns:
        u(t - s), (..., M), in the dtype of the state; differentiable in both.

    Raises:
        ValueError: unknown measure, state or lags of wrong shape, lags negative, NaN or beyond the window.
        TypeError: state or lags no floating-point tensor.

    Examples:
        >>> layer = S4Layer(d_model=1, d_state=64, dt_min=0.01, dt_max=0.01)
        >>> u = torch.sin(torch.arange(500) * 0.1)[None, :, None]  # (B, L, H)
        >>> _, state = layer(u, return_state=True)
        >>> lags = (torch.arange(100) + 0.5) * layer.dt[:, None]
        >>> past = reconstruct("legs", from_modes("legs", state), lags)  # (B, H, 100)
        >>> bool((past[0, 0] - u[0].flip(0)[:100, 0]).abs().max() < 0.1)
        True
    """
    _check_floating("state", state, even=True)
    _check_floating("lags", lags)
    if lags.dim() == 0:
        raise ValueError("lags must have shape (..., M), got a scalar")
    try:
        torch.broadcast_shapes(state.shape[:-1], lags.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"lags must have leading dimensions that broadcast with those of state {tuple(state.shape)}, "
            f"got {tuple(lags.shape)}"
        ) from None
    past = torch.einsum("...mn,...n->...m", basis(measure, state.shape[-1], lags), double(state))
    return past.to(state.dtype).to(state.device)


def from_modes(measure: str, state: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N"]:
    """State x of the pair of `transition` from the modes z of its form `dplr`: x = 2 Re(V z), V unitary.

    It makes the state of an `S4Layer(variant="dplr", init=measure)` one for `reconstruct`. Training changes A
    and B, and with them what the state means. For `variant="diag", init="legs"` it holds as N grows (S4D
    theorem 3).

    Args:
        measure: as in `transition`.
        state: the real, then the imaginary parts of the N/2 modes z, as `S4Layer` keeps it; (..., N).

    Returns:
        x (..., N) in the dtype of the state.

    Raises:
        ValueError: unknown measure, or state of odd or no size.
        TypeError: state no floating-point tensor.

    Examples:
        >>> from_modes("legs", torch.randn(2, 16, 64)).shape
        torch.Size([2, 16, 64])
    """
    _measure(measure)
    _check_floating("state", state, even=True)
    real, imag = double(state).chunk(2, -1)
    with torch.device("cpu"):
        V = _modes(measure, state.shape[-1])[1].to(real.device)
    return (2 * (real @ V.real.T - imag @ V.imag.T)).to(state.dtype).to(state.device)


def _modes(measure: str, N: int) -> tuple[Tensor, Tensor]:
    """Lambda (N/2,) and V (N, N/2), complex: the normal part of A as V diag(Lambda) V* and its conjugate.

    The phase of each eigenvector makes its entry of V* B real and positive.
    """
    A, B = transition(measure, N)
    it = INITS[measure]
    if it.modes is not None:
        return it.modes(N)
    P = it.low_rank(N)  # type: ignore[misc]
    skew = A + P.T @ P - it.shift * torch.eye(N, dtype=torch.float64)
    frequency, V = torch.linalg.eigh(-1j * skew)  # ascending, symmetric about 0
    frequency, V = frequency[N // 2 :], V[:, N // 2 :]
    phase = V.mH @ B.to(V.dtype)
    return torch.complex(torch.full_like(frequency, it.shift), frequency), V * (phase / phase.abs())


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
    cosine, frequency = torch.arange(0, N, 2), 2 * math.pi * _modes_of(N)
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


def _legendre(N: int, z: Tensor) -> Tensor:
    """L_n(z) for n < N, orthonormal on [0, 1], by Bonnet's recurrence; (..., N)."""
    x = 2 * z - 1
    P = [torch.ones_like(x), x]
    for n in range(2, N):
        P.append(((2 * n - 1) * x * P[-1] - (n - 1) * P[-2]) / n)
    return torch.stack(P, -1) * torch.sqrt(2 * torch.arange(N, dtype=z.dtype, device=z.device) + 1)


def _fourier(N: int, s: Tensor) -> Tensor:
    angle = 2 * math.pi * torch.arange(N // 2, dtype=s.dtype, device=s.device) * s[..., None]
    pairs = torch.stack([torch.cos(angle), torch.sin(angle)], -1) * math.sqrt(2)
    return torch.cat([torch.ones_like(pairs[..., 0, :1]), pairs.flatten(-2)[..., 1:]], -1)


def _legt_low_rank(N: int) -> Tensor:
    P = torch.sqrt(2 * torch.arange(N, dtype=torch.float64) + 1)
    parity = torch.arange(N) % 2
    return torch.stack([P * (parity == 0), P * (parity == 1)])


def _diag_legs(N: int) -> tuple[Tensor, Tensor]:
    Lambda, _, B = dplr("legs", N)
    return Lambda, B / 2


def _on_a_line(frequency: Tensor) -> tuple[Tensor, Tensor]:
    Lambda = torch.complex(torch.full_like(frequency, -0.5), frequency)
    return Lambda, torch.ones_like(Lambda)


def _modes_of(N: int) -> Tensor:
    return torch.arange(N // 2, dtype=torch.float64)


def _fourier_modes(N: int) -> tuple[Tensor, Tensor]:
    """A + P^T P is already made of 2x2 rotations, the first of them zero: no solver could pair its nulls."""
    frequency = 2 * math.pi * _modes_of(N)
    pair = torch.tensor([[1.0], [-1j]], dtype=torch.complex128) / math.sqrt(2)
    return 1j * frequency, torch.kron(torch.eye(N // 2, dtype=pair.dtype), pair)


class Init(NamedTuple):
    """An initialisation: a line of `INITS`. A measure has the first fields, a start of S4D the last.

    transition: N to the dense pair A (N, N) and B (N,).
    low_rank: N to P (r, N), real, for which A + P^T P - shift I is skew: what `dplr` diagonalises.
    basis: (N, lags) to the values of its functions (..., N), and `window`, how far back they reach.
    modes: N to Lambda (N/2,) and V (N, N/2) of A + P^T P, where no eigensolver can find them.
    diagonal: N to Lambda (N/2,) and B (N/2,), complex128.
    """

    transition: Callable[[int], tuple[Tensor, Tensor]] | None = None
    low_rank: Callable[[int], Tensor] | None = None
    shift: float = 0.0
    basis: Callable[[int, Tensor], Tensor] | None = None
    window: float = 1.0
    modes: Callable[[int], tuple[Tensor, Tensor]] | None = None
    diagonal: Callable[[int], tuple[Tensor, Tensor]] | None = None


INITS: dict[str, Init] = {
    "legs": Init(
        _legs,
        lambda N: torch.sqrt(torch.arange(N, dtype=torch.float64) + 0.5)[None],
        shift=-0.5,
        basis=lambda N, s: _legendre(N, torch.exp(-s)),
        window=math.inf,
        diagonal=_diag_legs,
    ),
    "legt": Init(_legt, _legt_low_rank, basis=lambda N, s: _legendre(N, 1 - s)),
    "fout": Init(_fout, lambda N: math.sqrt(2) * _endpoint(N)[None], basis=_fourier, modes=_fourier_modes),
    "lin": Init(diagonal=lambda N: _on_a_line(math.pi * _modes_of(N))),
    "inv": Init(diagonal=lambda N: _on_a_line(N / math.pi * (N / (2 * _modes_of(N) + 1) - 1))),
}


def names(variant: str) -> tuple[str, ...]:
    """The names that `S4Layer(init=...)` takes for a variant.

    Args:
        variant: "dplr", whose initialisations are the measures of `transition`, or "diag", those of `diag`.

    Returns:
        the names.

    Examples:
        >>> names("dplr"), names("diag")
        (('legs', 'legt', 'fout'), ('legs', 'lin', 'inv'))
    """
    return tuple(n for n, it in INITS.items() if (it.transition if variant == "dplr" else it.diagonal))


def start(init: str | Sequence[Any], variant: str, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer starts from: Lambda (N/2,), P (r, N/2), r = 0 for "diag", and B (N/2,), complex128.

    Args:
        init: a name of `names(variant)`, or tensors as `own` takes them.
        variant: "dplr" or "diag".
        N: state size.
    """
    if not isinstance(init, str):
        return own(init, variant, N)
    Lambda, *P, B = dplr(init, N) if variant == "dplr" else diag(init, N)
    return Lambda, P[0] if P else B.new_zeros(0, len(B)), B


def own(init: Any, variant: str, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """One's own initialisation, checked as `S4Layer(init=...)` does it.

    It is of the system x' = (diag(Lambda) - sum of P_r P_r*) x + B u, one of each conjugate pair. A layer
    keeps Re Lambda at -1e-4 or below.

    Args:
        init: (Lambda, P, B) for "dplr", (Lambda, B) for "diag": Lambda and B (N/2,), P (r, N/2) of any rank r
            from 1. Each is a complex tensor, or nested lists of [re, im] as a configuration file has them.
        variant: "dplr" or "diag".
        N: state size, even.

    Returns:
        copies of Lambda (N/2,), P (r, N/2), r = 0 for "diag", and B (N/2,), complex128.

    Raises:
        ValueError, TypeError: of another form, not finite, or unstable (Re Lambda > 0).

    Examples:
        >>> Lambda, P, B = own(([[-0.5, 0.0], [-0.5, 3.0]], [[1.0, 0.0], [1.0, 0.0]]), "diag", 4)
        >>> Lambda
        tensor([-0.5000+0.j, -0.5000+3.j], dtype=torch.complex128)
    """
    parts = ("Lambda", "P", "B") if variant == "dplr" else ("Lambda", "B")
    form = f"init must be a name, {', '.join(map(repr, names(variant)))}, or ({', '.join(parts)})"
    if not isinstance(init, (tuple, list)) or len(init) != len(parts):
        raise ValueError(f"{form} for variant={variant!r}, got {init!r}")
    found = []
    for name, value in zip(parts, init, strict=True):
        if hasattr(value, "__array__"):
            value = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
        else:
            try:
                value = torch.view_as_complex(torch.tensor(value, dtype=torch.float64, device="cpu"))
            except (ValueError, TypeError, RuntimeError) as error:
                raise TypeError(f"{name} of init must be complex, or lists of [re, im]: {error}") from None
        if not value.is_complex() or value.is_meta:
            raise TypeError(f"{name} of init must hold complex numbers, got {value.dtype} on {value.device}")
        shape, want = tuple(value.shape), "(r, d_state / 2)" if name == "P" else "(d_state / 2,)"
        if shape != ((N // 2,) if name != "P" else (*shape[:1], N // 2)) or 0 in shape:
            raise ValueError(f"{name} of init must have shape {want} with d_state={N}, got {shape}")
        found.append(value.detach().resolve_conj().cpu().to(torch.complex128, copy=True))
        if not (unread(found[-1]) or bool(torch.isfinite(torch.view_as_real(found[-1])).all())):
            raise ValueError(f"{name} of init must be finite, got {value}")
    if not unread(found[0]) and bool((found[0].real > 0).any()):
        raise ValueError(f"Lambda of init must have no positive real part, got up to {found[0].real.max():g}")
    Lambda, *P, B = found
    return Lambda, P[0] if P else B.new_zeros(0, len(B)), B


def rank(init: str | Sequence[Any], variant: str, N: int) -> int:
    """The rank of the low-rank part that a layer starts from; 0 for "diag"."""
    with torch.device("cpu"):
        return 0 if variant == "diag" else len(INITS[init].low_rank(N) if isinstance(init, str) else init[1])  # type: ignore[misc]


def _measure(name: str) -> Init:
    check_option("measure", name, names("dplr"))
    return INITS[name]


def _even(N: int) -> int:
    check_integer("N", N, 2)
    if N % 2:
        raise ValueError(f"N must be even, got {N}")
    return N


def _check_floating(name: str, value: Tensor, even: bool = False) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if even and (value.dim() == 0 or value.shape[-1] == 0 or value.shape[-1] % 2):
        raise ValueError(f"{name} must have shape (..., N) with N even, got {tuple(value.shape)}")
