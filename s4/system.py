"""From a layer's parameters to discrete recurrences; a discretisation is a function and a line of a table.

A state is N reals: the real, then the imaginary parts of n = N/2 modes, each of which stands for a conjugate
pair. A `System` is continuous in time, a `Recurrence` discrete; both keep O(N) numbers a channel.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from s4.precision import WITHOUT_FLOAT64, moved


class System(NamedTuple):
    """Continuous systems, one a channel: x' = (diag(Lambda) - sum over r of P_r P_r*) x + B u, y = 2 Re(C x).

    Shapes: Lambda and B (H, n), P (r, H, n), C (c, H, n), all complex; dt (H,), real. Diagonal if r = 0;
    c = 2 sets of output rows where a layer runs both ways. `discretization` is a name of `DISCRETIZATIONS`.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    discretization: str


def system(
    log_dt: Float[Tensor, "H"],
    log_A_real: Float[Tensor, "S n"],
    A_imag: Float[Tensor, "S n"],
    B: Float[Tensor, "S n 2"],
    C: Float[Tensor, "c H n 2"],
    P: Float[Tensor, "r S n 2"] | None,
    rate: float,
    discretization: str,
) -> System:
    """The parameters of a layer in double precision; each of S systems serves H / S neighbouring channels.

    On their device, or on the CPU if that has no float64.
    """
    if log_dt.device.type in WITHOUT_FLOAT64:
        given = [p for p in (log_dt, log_A_real, A_imag, B, C, P) if p is not None]
        log_dt, log_A_real, A_imag, B, C, *rest = moved(given, "cpu")
        P = rest[0] if rest else None
    repeats = log_dt.shape[0] // log_A_real.shape[0]
    Lambda = torch.complex(-torch.exp(log_A_real.double()), A_imag.double())
    inputs = _in_pairs(B)
    low_rank = inputs.new_zeros(0, *inputs.shape) if P is None else _in_pairs(P)
    Lambda, low_rank, inputs = (p.repeat_interleave(repeats, dim=-2) for p in (Lambda, low_rank, inputs))
    dt = rate * torch.exp(log_dt.double())
    return System(Lambda, low_rank, inputs, _in_pairs(C), dt, discretization)


def _in_pairs(p: Tensor) -> Tensor:
    """(..., 2) to complex (...): view_as_complex refuses strides and offsets of flat parameters."""
    return torch.complex(*p.double().unbind(-1))


class Recurrence(NamedTuple):
    """Discrete systems, one a channel: x = A x' + B u, y = C x, with x' the state before. All real.

    A x = a * x + sum over r of F_r (G_r . x), where * multiplies complex modes. Shapes: a (H, N), the real,
    then the imaginary parts of a complex diagonal; F and G (r, H, N); B (H, N); C (c, H, N).
    """

    a: Tensor
    F: Tensor
    G: Tensor
    B: Tensor
    C: Tensor

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Recurrence":
        """The same systems with all numbers rounded to dtype, contiguous, also on another device."""
        parts = [part.to(dtype).contiguous() for part in self]
        return Recurrence(*(parts if device in (None, self.a.device) else moved(parts, device)))


def discretize(system: System) -> Recurrence:
    """The recurrence of a system, by its own discretisation."""
    return DISCRETIZATIONS[system.discretization].recurrence(system)


def bilinear(system: System) -> Recurrence:
    """Tustin's rule, Abar = (I - dt/2 A)^-1 (I + dt/2 A) and Bbar = (I - dt/2 A)^-1 dt B, in O(N r).

    By Woodbury's identity (S4 appendix C.2), with D the inverse of the diagonal part, Q = sqrt(dt/2) P and
    Q* the conjugate transpose of all modes, those stored and their conjugates:

        (I - dt/2 A)^-1 = (D^-1 + Q Q*)^-1 = D - D Q S^-1 Q* D,   S = I + Q* D Q
        Abar = 2 (I - dt/2 A)^-1 - I = (2 D - I) - 2 D Q S^-1 Q* D = a + F G,   Bbar = D dt B + F G dt B / 2
    """
    Lambda, P, B, C, dt, _ = system
    D = 1 / (1 - Lambda * dt[:, None] / 2)
    Q = P * torch.sqrt(dt / 2)[:, None]
    # A lazy conjugate is lost where a compiled graph calls an operator that comes here.
    Q_conj = torch.complex(Q.real, -Q.imag)
    G, DQ, dtB = Q_conj * D, Q * D, B * dt[:, None]
    # S, r by r, sums over conjugate pairs: a number and its conjugate add up to twice the real part.
    eye = torch.eye(P.shape[0], dtype=dt.dtype, device=dt.device)
    S = eye + 2 * torch.einsum("rhn,shn->hrs", Q_conj, DQ).real
    F = -2 * torch.einsum("rhn,hrs->shn", DQ, torch.linalg.inv_ex(S).inverse.to(DQ.dtype))
    # G dt B / 2 over all modes is the real part of the sum over the stored ones.
    coupling = torch.einsum("rhn,hn->rh", G, dtB).real.to(F.dtype)
    Bbar = D * dtB + torch.einsum("rhn,rh->hn", F, coupling)
    return Recurrence(stack(2 * D - 1), stack(F), readout(G), stack(Bbar), readout(C))


def zoh(system: System) -> Recurrence:
    """Zero-order hold of diagonal systems, Abar = e^(dt A), Bbar = A^-1 (Abar - I) B (S4D section 3.1)."""
    Lambda, _, B, C, dt, _ = system
    z = Lambda * dt[:, None]
    mean = _phi(z)
    none = dt.new_zeros(0, *B.shape[:-1], 2 * B.shape[-1])
    return Recurrence(stack(1 + z * mean), none, none, stack(mean * dt[:, None] * B), readout(C))


def _phi(z: Tensor) -> Tensor:
    """(e^z - 1) / z; next to 0, where the derivatives of the quotient have no digits left, by its series."""
    near = z.abs() < 1e-4
    w, away = torch.where(near, z, 0), z + near
    series = 1 + w * (1 / 2 + w * (1 / 6 + w / 24))
    return torch.where(near, series, torch.expm1(away) / away)


def _bilinear_resolvent(z: Tensor) -> tuple[Tensor, Tensor]:
    return 2 * (1 - z) / (1 + z), 2 / (1 + z)


class Discretization(NamedTuple):
    """How continuous systems become discrete ones: a line of `DISCRETIZATIONS`.

    recurrence: from systems to recurrences.
    low_rank: whether it serves systems with a low-rank part, those of variant="dplr".
    resolvent: what makes the kernel a Cauchy sum, z -> (g, s) with sum over l of z^l C Abar^l Bbar
        = s C (g - dt A)^-1 dt B; None where there is none, and the kernel comes by powers alone.
    """

    recurrence: Callable[[System], Recurrence]
    low_rank: bool = False
    resolvent: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


DISCRETIZATIONS = {
    "zoh": Discretization(zoh),
    "bilinear": Discretization(bilinear, low_rank=True, resolvent=_bilinear_resolvent),
}


def stack(z: Complex[Tensor, "*batch n"]) -> Float[Tensor, "*batch N"]:
    """Real, then imaginary parts along the last dimension: the layout of the state."""
    return torch.cat([z.real, z.imag], -1)


def modes(x: Float[Tensor, "*batch N"]) -> Complex[Tensor, "*batch n"]:
    """The inverse of `stack`."""
    return torch.complex(*x.chunk(2, -1))


def readout(C: Complex[Tensor, "*batch n"]) -> Float[Tensor, "*batch N"]:
    """The real row that maps a stacked state x to 2 Re(C x)."""
    return 2 * torch.cat([C.real, -C.imag], -1)


def row_modes(C: Float[Tensor, "*batch N"]) -> Complex[Tensor, "*batch n"]:
    """The inverse of `readout`."""
    re, im = C.chunk(2, -1)
    return torch.complex(re, -im) / 2


def dense(recurrence: Recurrence) -> Float[Tensor, "H N N"]:
    """A written out as real matrices."""
    a, F, G, _, _ = recurrence
    return block_diagonal(a) + torch.einsum("rhi,rhj->hij", F, G)


def block_diagonal(a: Float[Tensor, "H N"]) -> Float[Tensor, "H N N"]:
    """The real matrices that multiply stacked states by complex diagonals."""
    re, im = map(torch.diag_embed, a.chunk(2, -1))
    return torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
