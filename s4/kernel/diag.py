"""The diagonal (S4D) convolution kernel K_l = 2 Re sum over n of C_n Bbar_n Abar_n^l."""

import torch
from jaxtyping import Float
from torch import Tensor

from s4.kernel.dplr import krylov_kernel
from s4.kernel.vandermonde import vandermonde
from s4.ssm import Propagator, modes, row_modes


def kernel(
    propagator: Propagator, L: int, dtype: torch.dtype, backend: str = "auto"
) -> Float[Tensor, "c H {L}"]:
    """The kernel the way that is fastest here ("auto": Krylov), or a named backend's Vandermonde product.

    Args:
        propagator: of a diagonal recurrence, in float64 for full accuracy.
        L: length.
        dtype: of the result, float32 or float64.
        backend: "auto", or one of `s4.kernel.backends()`.
    """
    if backend == "auto":
        return krylov_kernel(propagator, L, dtype)
    a, _, _, B, C = propagator.recurrence
    v = row_modes(C) * modes(B)
    a = modes(a)
    x = torch.log(torch.where(a == 0, 1e-300, a))
    # In double precision: the phases of fast, slowly decaying modes need it at large L.
    return vandermonde(v, x, L, backend).to(dtype)
