"""Matrix products in the full precision of their dtype, whatever less the user allows torch for others.

Also here: zeros for denormal numbers, and what to do on a device without float64, Apple's MPS. There, what
depends on parameters alone is computed on the CPU, rounded, and moved to the device.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
WITHOUT_FLOAT64 = {"mps"}  # types of device
_WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def constant(function: F) -> F:
    """Mark what torch.compile asks once and compiles the answer of.

    As torch.compiler.assume_constant_result does, without its import of torch._dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def _reduced() -> bool:
    """Whether torch may take fewer digits: a change of that makes torch.compile compile anew."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # a setting of torch's newer interface, torch.backends.*.fp32_precision
        return True


def _narrowed(A: Tensor) -> bool:
    return A.dtype in _WIDER and _reduced() and A.device.type not in WITHOUT_FLOAT64


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B with all digits of its dtype.

    TensorFloat-32 or bfloat16, which a user may have allowed for products of their own, halve them or worse:
    then in double precision.
    """
    if _narrowed(A):
        return (A.to(_WIDER[A.dtype]) @ B.to(_WIDER[A.dtype])).to(A.dtype)
    return A @ B


def add_product(C: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """C + A B of batches of matrices, with all digits."""
    if _narrowed(A):
        return C + product(A, B)
    return torch.baddbmm(C, A, B)


def double(t: Tensor) -> Tensor:
    """t in float64, on the CPU where its own device has none."""
    return (t.cpu() if t.device.type in WITHOUT_FLOAT64 else t).double()


def moved(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Tensors on another device, by one copy of all their numbers, as a GPU waits for each.

    Rounded before, not with it: the gradient would come back rounded up on the device.
    """
    numbers = torch.cat([t.reshape(-1) for t in tensors]).to(device)
    parts = numbers.split([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


def without_denormals(t: Tensor) -> Tensor:
    """t (H, ...) with zeros for what has decayed to denormal numbers or soon will, slow on a CPU.

    Next to the largest number of its channel, where that is below 1: a small channel loses nothing. The
    gradient is that of t: what is 0 may have one, and is there to be learned.
    """
    if t.numel() == 0:
        return t
    size = t.detach().abs()
    least = 1e8 * torch.finfo(t.dtype).tiny * size.amax(tuple(range(1, t.dim())), keepdim=True).clamp(max=1)
    return t - torch.where(size < least, t, 0).detach()
