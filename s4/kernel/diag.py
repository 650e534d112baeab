"""The kernel of diagonal systems (S4D) by sums: K_l = 2 Re sum over n of C_n Bbar_n Abar_n^l."""

import torch
from jaxtyping import Float
from torch import Tensor

from s4.kernel.vandermonde import vandermonde
from s4.system import Recurrence, modes, row_modes


def kernel(recurrence: Recurrence, L: int, dtype: torch.dtype) -> Float[Tensor, "c H {L}"]:
    """A Vandermonde product in double precision, which the phases of fast modes with slow decay need.

    Args:
        recurrence: of diagonal systems, in float64.
        L: length.
        dtype: of the result, float32 or float64.
    """
    a = modes(recurrence.a)
    x = torch.log(torch.where(a.abs() < 1e-290, 1e-300, a))  # next to 0 its gradient would be infinite
    return vandermonde(row_modes(recurrence.C) * modes(recurrence.B), x, L).to(dtype)
