"""The convolution kernel K_l = C Abar^l Bbar of a layer, and which way it comes."""

import torch
from jaxtyping import Float
from torch import Tensor

from s4.kernel import diag, dplr
from s4.ops import dispatch
from s4.ops.response import response
from s4.system import DISCRETIZATIONS, Recurrence, System

METHODS = ("auto", "sums", "powers")


def kernel(
    system: System, recurrence: Recurrence, L: int, dtype: torch.dtype, *, method: str, backend: str
) -> Float[Tensor, "c H {L}"]:
    """The kernel by sums over the modes, or by powers of the state matrix.

    Args:
        system: in double precision.
        recurrence: the system, discretised.
        L: length.
        dtype: of the result, float32 or float64.
        method: "sums", of Cauchy (DPLR) or, in plain PyTorch, Vandermonde (diagonal); "powers"; "auto": of
            DPLR the sums of a backend asked for by name, or else the faster way here; of diagonal, and in a
            graph that serves every length, powers.
        backend: "auto", or one of `s4.kernel.backends()`.

    Raises:
        ValueError: sums, of a DPLR system whose discretisation has none.
    """
    diagonal = len(recurrence.F) == 0
    if not diagonal and DISCRETIZATIONS[system.discretization].resolvent is None:
        if method == "sums":
            raise ValueError(f"method 'sums' is not known for discretization={system.discretization!r}")
        method = "powers"
    if method == "auto" and (diagonal or backend == "auto" or dispatch.opaque()):
        nodes = dplr.OVERSAMPLING[dtype] * L
        few = not diagonal and dispatch.takes_sums(recurrence.a.shape[1], nodes, recurrence.a.device.type)
        method = "sums" if few else "powers"
    if method == "powers":
        return response(recurrence, L, dtype, backend)[:, 0]
    return diag.kernel(recurrence, L, dtype) if diagonal else dplr.kernel(system, L, dtype, backend)
