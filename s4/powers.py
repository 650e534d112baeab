"""Many steps at once of a recurrence, through powers of its state matrix: dense, or diagonal."""

import math
from functools import reduce

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from s4.precision import product, without_denormals
from s4.system import Recurrence, block_diagonal, dense, modes, readout, row_modes, stack


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
        K = product(without_denormals(R.to(dtype)), V.to(dtype))
        return rearrange(K, "h (a c) (b q) -> c q h (a b)", a=a, b=T, c=c, q=q)[..., :L]

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
        return A[..., None] * X if self._diagonal else product(A, X)

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
