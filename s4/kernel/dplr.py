"""The DPLR convolution kernel K_l = C Abar^l Bbar, in two ways, both from the true C at any length.

`cauchy_kernel` samples the generating function on a circle, through Cauchy sums, and inverts by one FFT;
`krylov_kernel` multiplies rows C Abar^(a T) by columns Abar^b Bbar. `kernel` chooses.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from s4.conv import fft_size
from s4.kernel import _ops
from s4.kernel._choice import has_fused_powers, has_fused_sums
from s4.kernel.cauchy import cauchy
from s4.ssm import Propagator, System

_NODES = {torch.float32: (1, 1e-7), torch.float64: (4, 1e-12)}  # M / L and delta of `cauchy_kernel`


def kernel(
    system: System, propagator: Propagator, L: int, dtype: torch.dtype, backend: str = "auto"
) -> Float[Tensor, "c H {L}"]:
    """The kernel the way that is fastest here ("auto"), or by Cauchy sums of a named backend.

    Args:
        system: in double precision for full accuracy.
        propagator: of the bilinear discretisation of `system`.
        L: length.
        dtype: of the result, float32 or float64.
        backend: "auto", or one of `s4.kernel.backends()`.
    """
    d_state, device = 2 * system.Lambda.shape[-1], system.dt.device.type
    if backend == "auto" and not sums_pay(d_state, L, dtype, device):
        return krylov_kernel(propagator, L, dtype)
    return cauchy_kernel(system, L, dtype, backend)


def sums_pay(d_state: int, L: int, dtype: torch.dtype, device_type: str) -> bool:
    """Whether "auto" takes Cauchy sums, and not powers.

    Powers take O(N^2 sqrt(L) + N L) flops a channel where fused (on the CPU), O(N^3 log L + N L) where not,
    sums O(N L) at a higher price. Measured on two cores (benchmarks/kernels.py), fused sums and fused powers
    break even near L = N^2 / 8, and fused sums and matrix products near L = N^2.
    """
    nodes = _NODES[dtype][0] * L
    return nodes * (8 if has_fused_powers(device_type) else 1) <= d_state**2 and has_fused_sums(device_type)


def krylov_kernel(propagator: Propagator, L: int, dtype: torch.dtype) -> Float[Tensor, "c H {L}"]:
    """K by powers of the state matrix: fused on the CPU, or by matrix products (`Propagator.response`)."""
    a, F, G, B, C = propagator.recurrence
    if has_fused_powers(a.device.type):
        return _ops.krylov(a, F, G, B[:, None], C, L, dtype)[:, 0]
    return propagator.response(propagator.recurrence.B[..., None], L, dtype)[:, 0]


def cauchy_kernel(
    system: System, L: int, dtype: torch.dtype, backend: str = "auto"
) -> Float[Tensor, "c H {L}"]:
    """K from its generating function, sum over l of K_l z^l (S4 algorithm 1, with no truncation of C).

    On M >= L nodes of a circle of radius rho < 1, an inverse FFT gives rho^l (K_l + rho^M K_(l+M) + ...): the
    radius weighs this alias, delta = rho^M, against rounding, which rho^-l amplifies. With
    g = 2 (1-z) / (1+z), all terms of the resolvent are Cauchy sums at g over the poles dt Lambda.

    The sums run in double precision. Then M = L nodes and delta = 1e-7 leave less than 3e-7 of max |K|, and
    M = 4 L with 1e-12 less than 1e-10; in single precision M = 4 L left 2e-5, for twice the time.

    Args:
        system: in double precision.
        L: length.
        dtype: of the result, float32 or float64.
        backend: of the Cauchy sums.
    """
    Lambda, P, B, C, dt = system
    c, H, _ = C.shape
    if L == 0 or H == 0:
        return dt.new_zeros(c, H, L, dtype=dtype)
    oversampling, delta = _NODES[dtype]
    M = fft_size(max(oversampling * L, 16))
    angle = torch.arange(M // 2 + 1, dtype=torch.float64, device=dt.device) * (-2 * math.pi / M)
    z = torch.polar(torch.full_like(angle, delta ** (1 / M)), angle)

    # All pairs of a row (of C or P*) and a column (of B or P): c + r by 1 + r sums over the same poles.
    rows, columns = torch.cat([C, P.conj()]), torch.cat([B[None], P])
    v = torch.einsum("ihn,jhn,h->hijn", rows, columns, dt.to(rows.dtype))
    w = (Lambda * dt[:, None])[:, None]
    sums = cauchy(v.flatten(1, 2), 2 * (1 - z) / (1 + z), w, backend).unflatten(1, v.shape[1:3])
    for s in range(P.shape[0], 0, -1):  # Woodbury's r x r solve: one Schur complement a rank
        i = c + s - 1
        ratio = sums[:, i : i + 1, :s] / (1 + sums[:, i : i + 1, s : s + 1])
        sums = sums[:, :i, :s] - sums[:, :i, s : s + 1] * ratio
    spectrum = sums[:, :, 0] * (2 / (1 + z))
    amplify = delta ** (-torch.arange(L, dtype=torch.float64, device=dt.device) / M)
    return (torch.fft.irfft(spectrum, M)[..., :L] * amplify).transpose(0, 1).to(dtype)
