"""The kernel of DPLR systems (S4) by sums: its generating function on a circle, and one inverse FFT.

From the true C, at any length.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from s4.kernel.cauchy import cauchy
from s4.ops.convolve import fft_size
from s4.system import DISCRETIZATIONS, System

OVERSAMPLING = {torch.float32: 1, torch.float64: 4}  # nodes over L
_DELTA = {torch.float32: 1e-7, torch.float64: 1e-12}  # rho^M


def kernel(system: System, L: int, dtype: torch.dtype, backend: str = "auto") -> Float[Tensor, "c H {L}"]:
    """K from its generating function, sum over l of K_l z^l (S4 algorithm 1, with no truncation of C).

    On M >= L nodes of a circle of radius rho < 1, an inverse FFT gives rho^l (K_l + rho^M K_(l+M) + ...): the
    radius weighs this alias, delta = rho^M, against rounding, which rho^-l amplifies. By the discretisation's
    resolvent, such as g = 2 (1-z) / (1+z), all terms are Cauchy sums at g over the poles dt Lambda.

    The sums run in double precision. Then M = L nodes and delta = 1e-7 leave less than 3e-7 of max |K|, and
    M = 4 L with 1e-12 less than 1e-10; in single precision M = 4 L left 2e-5, for twice the time.

    Args:
        system: in double precision, of a discretisation with a resolvent.
        L: length.
        dtype: of the result, float32 or float64.
        backend: of the Cauchy sums.
    """
    Lambda, P, B, C, dt, discretization = system
    c, H, _ = C.shape
    if L == 0 or H == 0:
        return dt.new_zeros(c, H, L, dtype=dtype)
    delta, M = _DELTA[dtype], fft_size(max(OVERSAMPLING[dtype] * L, 16))
    angle = torch.arange(M // 2 + 1, dtype=torch.float64, device=dt.device) * (-2 * math.pi / M)
    z = torch.polar(torch.full_like(angle, delta ** (1 / M)), angle)

    # All pairs of a row (of C or P*) and a column (of B or P): c + r by 1 + r sums over the same poles.
    rows, columns = torch.cat([C, P.conj()]), torch.cat([B[None], P])
    v = torch.einsum("ihn,jhn,h->hijn", rows, columns, dt.to(rows.dtype))
    w = (Lambda * dt[:, None])[:, None]
    resolvent = DISCRETIZATIONS[discretization].resolvent
    assert resolvent is not None
    g, scale = resolvent(z)
    sums = cauchy(v.flatten(1, 2), g, w, backend).unflatten(1, v.shape[1:3])
    # With R = (g - dt diag(Lambda))^-1, sums are [C R B, C R P; P* R B, P* R P] (times dt), and by Woodbury
    # C (g - dt A)^-1 B = C R B - C R P (1 + P* R P)^-1 P* R B: the Schur complement of the lower right block
    # of [C R B, C R P; P* R B, 1 + P* R P]. One rank is eliminated after the other, the last first.
    for s in range(P.shape[0], 0, -1):
        i = c + s - 1
        ratio = sums[:, i : i + 1, :s] / (1 + sums[:, i : i + 1, s : s + 1])
        sums = sums[:, :i, :s] - sums[:, :i, s : s + 1] * ratio
    spectrum = sums[:, :, 0] * scale
    amplify = delta ** (-torch.arange(L, dtype=torch.float64, device=dt.device) / M)
    return (torch.fft.irfft(spectrum, M)[..., :L] * amplify).transpose(0, 1).to(dtype)
