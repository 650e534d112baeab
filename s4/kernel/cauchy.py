"""Cauchy sums over conjugate pairs of poles: the contract, and the choice of who computes them."""

import math

import torch
from torch import Tensor

from s4.ops import dispatch
from s4.ops.cauchy import cauchy as operator
from s4.ops.cauchy import definition


def cauchy(v: Tensor, z: Tensor, w: Tensor, backend: str = "auto") -> Tensor:
    """Sum over n of v_n / (z_l - w_n) + conj(v_n) / (z_l - conj(w_n)), at nodes z (S4 section 3.3).

    Leading dimensions broadcast. Give several right-hand sides over the same poles as v (..., q, n) with
    w (..., 1, n): the denominators are then computed once.

    Args:
        v: residues, complex (..., n).
        z: nodes, complex (..., l).
        w: poles, complex (..., n), one of each conjugate pair.
        backend: "auto" or one of `s4.kernel.backends()`.

    Returns:
        complex (..., l), differentiable in v, z and w. Transforms of torch.func and forward-mode derivatives
        see the definition, which takes n l numbers in memory for each sum.

    Raises:
        TypeError: an argument is not complex, or dtypes differ.
        ValueError: the last dimensions of v and w differ, devices differ, or the backend cannot run.

    Examples:
        >>> v, w = torch.randn(2, 8, 32, dtype=torch.complex64)  # 8 sums over 32 pairs of poles
        >>> z = torch.randn(100, dtype=torch.complex64)
        >>> cauchy(v, z, w).shape
        torch.Size([8, 100])
    """
    check_sums({"v": v, "z": z, "w": w})
    if not isinstance(backend, str):
        dispatch.check_backend(backend)  # which refuses it; names are checked inside the operator
    if v.shape[-1] != w.shape[-1]:
        raise ValueError(
            f"v and w must have one length of the last dimension, got {v.shape[-1]} and {w.shape[-1]}"
        )
    if backend == "naive" or dispatch.transformed():
        return definition(v, z, w)
    batch = torch.broadcast_shapes(v.shape[:-1], z.shape[:-1], w.shape[:-1])
    # The last leading dimension, where it is of v alone, is that of right-hand sides over the same poles.
    shared = len(batch) > 0 and all(t.dim() < 2 or t.shape[-2] == 1 for t in (z, w))
    groups, q = (batch[:-1], batch[-1]) if shared else (batch, 1)
    if shared:
        z, w = (t.squeeze(-2) if t.dim() > 1 else t for t in (z, w))
    G, nodes = math.prod(groups), z.shape[-1]
    common = math.prod(z.shape[:-1]) == 1  # the same nodes for all groups
    sums = operator(
        v.expand(*batch, v.shape[-1]).reshape(G, q, v.shape[-1]),
        z.reshape(1, nodes) if common else z.expand(*groups, nodes).reshape(G, nodes),
        w.expand(*groups, w.shape[-1]).reshape(G, w.shape[-1]),
        backend,
    )
    return sums.view(*batch, nodes)


def check_sums(tensors: dict[str, Tensor]) -> None:
    """Raise unless all are complex, of one dtype and device, with leading dimensions that broadcast."""
    names, first = ", ".join(tensors), next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a complex tensor, got {type(tensor).__name__}")
        if tensor.dtype not in (torch.complex64, torch.complex128):
            raise TypeError(f"{name} must be complex64 or complex128, got {tensor.dtype}")
        if tensor.dim() < 1:
            raise ValueError(f"{name} must have at least one dimension, got a scalar")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{names} must share one dtype, got {first.dtype} and {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{names} must share one device, got {first.device} and {tensor.device}")
    try:
        torch.broadcast_shapes(*(t.shape[:-1] for t in tensors.values()))
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors.values())
        raise ValueError(f"the leading dimensions of {names} must broadcast, got {shapes}") from None
