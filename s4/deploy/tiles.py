"""A sequence in tiles of T steps by products of matrices alone: `s4.ops.scan`, its maps made beforehand."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from s4.ops.maps import maps
from s4.powers import Propagator
from s4.precision import without_denormals
from s4.system import Recurrence


class Tiles(nn.Module):
    """Outputs of sequences of up to so many steps, in one graph for all lengths: no loop, no FFT.

    With U (H, B, c, T) the inputs in c tiles and X (H, B, c, N) the states before them (`s4.ops.maps`):

        Y = U Toep(K) + X [C A, ..., C A^T],  S = U [A^{T-1} B, ..., B],  X_{i+1} = X_i A^T + S_i

    The states are running sums: level j adds to each what came 2^j tiles earlier, times A^(T 2^j), so that
    log2(c) products of all tiles at once take the place of a loop. The numbers are kept as `within`, (H, T,
    T + d N), what the inputs of a tile give for its outputs and its states, in d directions; `across` (d, H,
    N, T), what a state gives for outputs; `onward`, the powers of A, real matrices (H, N, N) or of diagonal
    systems (H, 2, N), factors of the state and of its halves exchanged.

    Args:
        recurrence: in float64.
        D: (H,), what an input adds to its own output.
        T: steps of a tile.
        longest: steps of the longest sequence; where stateful of every one.
        dtype: of the numbers kept.
        stateful: whether sequences go on from a state and leave one.
    """

    within: Tensor
    across: Tensor
    limit: Tensor
    rest_onward: Tensor

    def __init__(
        self, recurrence: Recurrence, D: Tensor, T: int, longest: int, dtype: torch.dtype, *, stateful: bool
    ) -> None:
        super().__init__()
        self.T, self.rest, self.N = T, (longest - 1) % T + 1, recurrence.B.shape[-1]
        self.diagonal = len(recurrence.F) == 0
        directions = [each for each in maps(recurrence, D, T, dtype) if each is not None]
        steps = torch.arange(T, device=D.device)
        taps = torch.stack([each.taps for each in directions]).sum(0)[:, T - 1 + steps - steps[:, None]]
        within = torch.cat([taps, *(each.inward for each in directions)], -1)
        across = [without_denormals(each.outward).mT for each in directions]
        self.register_buffer("within", without_denormals(within).contiguous())
        self.register_buffer("across", torch.stack(across).contiguous())
        propagator, self.levels = Propagator(recurrence), (-(-longest // T) - 1).bit_length()
        for j in range(self.levels):
            self.register_buffer(f"onward_{j}", self._power(propagator, T << j, dtype))
        if stateful:
            self.register_buffer("rest_onward", self._power(propagator, self.rest, dtype))
        else:  # an index past its end, where a longer sequence would lose its beginning without a word
            self.register_buffer("limit", D.new_zeros(longest, dtype=dtype))

    def _power(self, propagator: Propagator, steps: int, dtype: torch.dtype) -> Tensor:
        """A^steps, as it multiplies rows; what has decayed to nothing is 0, not a denormal number."""
        A = propagator.power(steps)
        if self.diagonal:
            n = self.N // 2
            re, im = A[:, :n, :n].diagonal(0, 1, 2), A[:, n:, :n].diagonal(0, 1, 2)
            A = torch.stack([torch.cat([re, re], -1), torch.cat([-im, im], -1)], 2)
        return torch.where(A.abs() < 1e-30, 0, A).mT.to(dtype).contiguous()

    def forward(self, u: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, L, H) of inputs (B, L, H), and of `longest` inputs from a state (B, H, N) the next."""
        B, L, H = u.shape
        T, N = self.T, self.N
        U = self._cut(u, x is not None)
        c = U.shape[2]
        made = U.reshape(H, B * c, T) @ self.within
        y = made[..., :T]
        last = None
        for d, outward in enumerate(self.across):
            S = made[..., T + d * N : T + (d + 1) * N].view(H, B, c, N)
            S = S.flip(2) if d else S
            first = self.limit[L - 1].expand(B, H, N) if x is None else x
            X = self._before(first.transpose(0, 1)[:, :, None], S)
            if x is not None:
                driven = U[:, :, -1, : self.rest] @ self.within[:, T - self.rest :, T:]
                last = self._moved(X[:, :, -1], self.rest_onward) + driven
            X = X.flip(2) if d else X
            y = y + X.reshape(H, B * c, N) @ outward
        if last is not None:
            y = y.view(H, B, c * T)[..., :L].permute(1, 2, 0)
            return y.contiguous(), last.transpose(0, 1).contiguous()
        t = torch.arange(L, device=u.device)
        return y.view(H, B, c, T).permute(1, 2, 3, 0)[:, t // T, t % T].contiguous(), None

    def _cut(self, u: Tensor, stateful: bool) -> Tensor:
        """Inputs in tiles (H, B, c, T), zeros at the end.

        Where a sequence may have any length two tiles at least, by index: an export then sees no special case
        of a length that it would have to keep to, or to check.
        """
        B, L, H = u.shape
        T = self.T
        if stateful:
            c = -(-L // T)
            return pad(u, (0, 0, 0, c * T - L)).permute(2, 0, 1).reshape(H, B, c, T)
        c = (L + T - 1) // T + 1
        times = T * torch.arange(c, device=u.device)[:, None] + torch.arange(T, device=u.device)
        return pad(u, (0, 0, 0, 2 * T))[:, times].permute(3, 0, 1, 2)

    def _before(self, first: Tensor, S: Tensor) -> Tensor:
        """The states before all tiles, (H, B, c, N), from the first and from what the tiles add."""
        H, B, c, N = S.shape
        X = torch.cat([first, S], 2).narrow(2, 0, c)
        for j in range(self.levels):
            moved = self._moved(X.reshape(H, B * c, N), getattr(self, f"onward_{j}")).view(H, B, c, N)
            X = X + pad(moved, (0, 0, 1 << j, 0)).narrow(2, 0, c)
        return X

    def _moved(self, x: Tensor, A: Tensor) -> Tensor:
        """States (H, b, N) times a power of A."""
        if not self.diagonal:
            return x @ A
        return x * A[:, :1] + torch.cat(x.chunk(2, -1)[::-1], -1) * A[:, 1:]


def tile(N: int, longest: int) -> int:
    """T for sequences of up to so many steps: measured in onnxruntime, at N = 64, on one core."""
    T = max(N, 64)
    T = 2 * T if longest > 64 * T else T
    return math.ceil(longest / math.ceil(longest / T))
