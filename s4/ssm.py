"""The recurrent view: discretisation, one step, and many steps at once through powers of the state matrix.

A state is N reals: the real, then the imaginary parts of n = N/2 modes, each of which stands for a conjugate
pair. A `System` is continuous in time, a `Recurrence` discrete; both keep O(N) numbers a channel.
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn.functional import hardshrink, pad

_LOG2_CHUNK = 6  # of the inputs that `Propagator.drive` turns into one state by a product


def bilinear(
    A: Float[Tensor, "*batch N N"], B: Float[Tensor, "*batch N"], dt: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch N N"], Float[Tensor, "*batch N"]]:
    """Bilinear (Tustin) discretisation of x' = A x + B u by the step dt (S4 equation 3).

    Returns:
        (I - dt/2 A)^-1 (I + dt/2 A) and (I - dt/2 A)^-1 dt B.
    """
    half = A * (dt / 2)[..., None, None]
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    right = torch.cat([eye + half, (B * dt[..., None])[..., None]], -1)
    solved = torch.linalg.solve(eye - half, right)
    return solved[..., :-1], solved[..., -1]


def zoh(
    A: Float[Tensor, "*batch N N"], B: Float[Tensor, "*batch N"], dt: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch N N"], Float[Tensor, "*batch N"]]:
    """Zero-order-hold discretisation of x' = A x + B u: the exact solution for u constant over a step dt.

    Returns:
        exp(dt A) and the integral of exp(s A) B over s in [0, dt], from one exponential of [[A, B], [0, 0]].
    """
    top = torch.cat([A, B[..., None]], -1) * dt[..., None, None]
    block = torch.cat([top, torch.zeros_like(top[..., :1, :])], -2)
    solved = torch.linalg.matrix_exp(block)
    return solved[..., :-1, :-1], solved[..., :-1, -1]


class System(NamedTuple):
    """Continuous systems, one a channel: x' = (diag(Lambda) - sum over r of P_r P_r*) x + B u, y = 2 Re(C x).

    Shapes: Lambda and B (H, n), P (r, H, n), C (c, H, n), all complex; dt (H,), real. Diagonal if r = 0;
    c = 2 sets of output rows where a layer runs both ways.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor


def system(
    log_dt: Float[Tensor, "H"],
    log_A_real: Float[Tensor, "S n"],
    A_imag: Float[Tensor, "S n"],
    B: Float[Tensor, "S n 2"],
    C: Float[Tensor, "c H n 2"],
    P: Float[Tensor, "r S n 2"] | None,
    rate: float,
) -> System:
    """The parameters of a layer in double precision; each of S systems serves H / S neighbouring channels."""
    repeats = log_dt.shape[0] // log_A_real.shape[0]
    Lambda = torch.complex(-torch.exp(log_A_real.double()), A_imag.double())
    inputs = _in_pairs(B)
    low_rank = inputs.new_zeros(0, *inputs.shape) if P is None else _in_pairs(P)
    Lambda, low_rank, inputs = (p.repeat_interleave(repeats, dim=-2) for p in (Lambda, low_rank, inputs))
    return System(Lambda, low_rank, inputs, _in_pairs(C), rate * torch.exp(log_dt.double()))


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

    def to(self, dtype: torch.dtype) -> "Recurrence":
        """The same systems with all numbers rounded to dtype, contiguous."""
        return Recurrence(*(part.to(dtype).contiguous() for part in self))


def discretize(system: System, method: str) -> Recurrence:
    """The recurrence of a system by "bilinear" (any rank) or "zoh" (diagonal only, no Lambda of 0)."""
    return bilinear_dplr(system) if method == "bilinear" else zoh_diag(system)


def bilinear_dplr(system: System) -> Recurrence:
    """Bilinear discretisation in O(N r) by Woodbury's identity (S4 appendix C.2)."""
    Lambda, P, B, C, dt = system
    D = 1 / (1 - Lambda * dt[:, None] / 2)  # the diagonal of (I - dt/2 diag(Lambda))^-1
    Q = P * torch.sqrt(dt / 2)[:, None]
    # A lazy conjugate is lost where a compiled graph calls an operator that comes here.
    Q_conj = torch.complex(Q.real, -Q.imag)
    G, DQ, dtB = Q_conj * D, Q * D, B * dt[:, None]
    # (I - dt/2 A)^-1 = D - D Q S^-1 Q* D, with S real: a sum over conjugate pairs is twice a real part.
    eye = torch.eye(P.shape[0], dtype=dt.dtype, device=dt.device)
    S = eye + 2 * torch.einsum("rhn,shn->hrs", Q_conj, DQ).real
    F = -2 * torch.einsum("rhn,hrs->shn", DQ, torch.linalg.inv_ex(S).inverse.to(DQ.dtype))
    coupling = torch.einsum("rhn,hn->rh", G, dtB).real.to(F.dtype)
    Bbar = D * dtB + torch.einsum("rhn,rh->hn", F, coupling)
    return Recurrence(stack(2 * D - 1), stack(F), readout(G), stack(Bbar), readout(C))


def zoh_diag(system: System) -> Recurrence:
    """Zero-order-hold discretisation of diagonal systems (S4D section 3.1)."""
    Lambda, _, B, C, dt = system
    change = torch.expm1(Lambda * dt[:, None])
    none = dt.new_zeros(0, *B.shape[:-1], 2 * B.shape[-1])
    return Recurrence(stack(1 + change), none, none, stack(change / Lambda * B), readout(C))


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


def step(
    recurrence: Recurrence, x: Float[Tensor, "B H N"], u: Float[Tensor, "B H"]
) -> tuple[Float[Tensor, "B H"], Float[Tensor, "B H N"]]:
    """One step in O(N r) a channel, in real arithmetic: (y, x) with x = A x + B u and y = C x."""
    a, F, G, B, C = recurrence
    re, im = x.chunk(2, -1)
    a_re, a_im = a.chunk(2, -1)
    moved = torch.cat([a_re * re - a_im * im, a_re * im + a_im * re], -1) + B * u[..., None]
    for r in range(F.shape[0]):
        moved = moved + F[r] * (G[r] * x).sum(-1, keepdim=True)
    return (C[0] * moved).sum(-1), moved


def dense(recurrence: Recurrence) -> Float[Tensor, "H N N"]:
    """A written out as real matrices."""
    a, F, G, _, _ = recurrence
    return block_diagonal(a) + torch.einsum("rhi,rhj->hij", F, G)


def block_diagonal(a: Float[Tensor, "H N"]) -> Float[Tensor, "H N N"]:
    """The real matrices that multiply stacked states by complex diagonals."""
    re, im = map(torch.diag_embed, a.chunk(2, -1))
    return torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)


class Propagator:
    """Many steps at once of a recurrence, through A^(2^j), each squared from the last when first needed.

    Costs O(log L) squarings, dense unless the systems are diagonal, and never a loop over time. Rows, columns
    and powers keep the precision of the recurrence; only the large products run in the dtype asked for.

    Args:
        recurrence: the systems, in float64 for full accuracy.
    """

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence
        self._diagonal = recurrence.F.shape[0] == 0
        self._squares: list[Tensor] = []

    def response(self, X: Float[Tensor, "H N q"], L: int, dtype: torch.dtype) -> Float[Tensor, "c q H L"]:
        """C A^l X for l = 0, ..., L-1: one product of rows C A^(a T) and columns A^b X, with l = a T + b.

        The convolution kernel for X = B (a Krylov product). 2 L N flop a channel, beside O(sqrt(L)) rows and
        columns; no H N L numbers are held.
        """
        C = self.recurrence.C
        c, q = C.shape[0], X.shape[-1]
        j = round(math.log2(max(1, L * c / max(q, 1))) / 2)
        T = 2**j
        a = max(1, -(-L // T))
        R = self._rows(C.transpose(0, 1), a, j)
        V = self._leave(self._columns(self._enter(X), T))
        # A decayed system would fill the product with denormal numbers, of some 100 cycles on a CPU. They
        # become zeros, but the gradient stays: a row of zeros is there to be learned.
        R = R.to(dtype)
        R = R - (R - hardshrink(R, 1e8 * torch.finfo(dtype).tiny)).nan_to_num(0.0).detach()
        return rearrange(R @ V.to(dtype), "h (a c) (b q) -> c q h (a b)", a=a, b=T, c=c, q=q)[..., :L]

    def continuation(self, x: Float[Tensor, "B H N"], L: int) -> Float[Tensor, "B H {L}"]:
        """C A^(l+1) x for l = 0, ..., L-1, in the dtype of x: what a state adds to the next L outputs."""
        X = rearrange(x.to(self.recurrence.a.dtype), "b h n -> h n b")
        moved = self._leave(self._left(0, self._enter(X)))
        return rearrange(self.response(moved, L, x.dtype), "1 b h l -> b h l")

    def drive(self, u: Float[Tensor, "B H L"]) -> Float[Tensor, "B H N"]:
        """Sum over l of A^(L-1-l) B u_l, in the dtype of u: the state that inputs leave behind, from zero.

        Chunks of inputs become states by one product, then neighbours merge, in log2 of their number rounds.
        """
        batch, _, L = u.shape
        j = min(_LOG2_CHUNK, max(L - 1, 0).bit_length())
        T = 2**j
        c = max(1, -(-L // T))
        chunks = rearrange(pad(u, (c * T - L, 0)), "b h (c t) -> h t (b c)", t=T, c=c)
        V = self._leave(self._columns(self._enter(self.recurrence.B[..., None]), T)).flip(-1)
        S = self._enter(V.to(u.dtype) @ chunks).unflatten(-1, (batch, c))
        while S.shape[-1] > 1:
            S = pad(S, (S.shape[-1] % 2, 0))
            early, late = S[..., 0::2], S[..., 1::2]
            S = self._left(j, early.flatten(-2)).view_as(early) + late
            j += 1
        return rearrange(self._leave(S[..., 0]), "h n b -> b h n")

    def advance(
        self, x: Float[Tensor, "B H N"], steps: Int[Tensor, "B"], longest: int
    ) -> Float[Tensor, "B H N"]:
        """A^steps x, with a number of steps, at most `longest`, for each sequence of the batch."""
        X = self._enter(rearrange(x, "b h n -> h n b"))
        for j in range(longest.bit_length()):
            X = torch.where((steps >> j) % 2 == 1, self._left(j, X), X)
        return rearrange(self._leave(X), "h n b -> b h n")

    def columns(self, T: int) -> Float[Tensor, "H N {T}"]:
        """A^b B for b < T, a power of two."""
        return self._leave(self._columns(self._enter(self.recurrence.B[..., None]), T))

    def rows(self, T: int) -> Float[Tensor, "c H {T} N"]:
        """C A^(b+1) for b < T, a power of two."""
        C = self.recurrence.C.transpose(0, 1)
        first = readout(row_modes(C) * self._power(0)[:, None]) if self._diagonal else C @ self._power(0)
        return rearrange(self._rows(first, T, 0), "h (t c) n -> c h t n", t=T)

    def power(self, t: int) -> Float[Tensor, "H N N"]:
        """A^t, t >= 1."""
        factors = [self._power(j) for j in range(t.bit_length()) if t >> j & 1]
        A = reduce(torch.mul if self._diagonal else torch.matmul, factors)
        return block_diagonal(stack(A)) if self._diagonal else A

    def _enter(self, X: Tensor) -> Tensor:
        return torch.complex(*X.chunk(2, -2)) if self._diagonal else X

    def _leave(self, X: Tensor) -> Tensor:
        return torch.cat([X.real, X.imag], -2) if self._diagonal else X

    def _power(self, j: int) -> Tensor:
        """A^(2^j): complex diagonals (H, n) on modes, or real matrices (H, N, N)."""
        if not self._squares:
            self._squares.append(modes(self.recurrence.a) if self._diagonal else dense(self.recurrence))
        while len(self._squares) <= j:
            last = self._squares[-1]
            self._squares.append(last * last if self._diagonal else last @ last)
        return self._squares[j]

    def _left(self, j: int, X: Tensor) -> Tensor:
        """A^(2^j) X."""
        A = self._power(j).to(X.dtype)
        return A[..., None] * X if self._diagonal else A @ X

    def _columns(self, X: Tensor, count: int) -> Tensor:
        """[X, A X, ..., A^(count-1) X] side by side, (H, N, count q), by doubling."""
        count, j = count * X.shape[-1], 0
        while X.shape[-1] < count:
            X = torch.cat([X, self._left(j, X[..., : count - X.shape[-1]])], -1)
            j += 1
        return X

    def _rows(self, C: Tensor, count: int, j: int) -> Tensor:
        """[C, C A^m, ..., C A^(m (count-1))] below each other, m = 2^j: (H, count c, N), by doubling."""
        if self._diagonal:
            return readout(self._doubled(row_modes(C), count, j))
        return self._doubled(C, count, j)

    def _doubled(self, C: Tensor, count: int, j: int) -> Tensor:
        count *= C.shape[1]
        while C.shape[1] < count:
            more = C[:, : count - C.shape[1]]
            C = torch.cat([C, more * self._power(j)[:, None] if self._diagonal else more @ self._power(j)], 1)
            j += 1
        return C
