"""Parameters that are sharded over processes, or away until they are needed."""

from typing import Any

import torch
from torch import Tensor, nn


def hooked(module: nn.Module) -> bool:
    """Whether something runs before the `forward` of a module, or in its place, and may bring its parameters.

    As where they are sharded (FSDP2), offloaded (accelerate), pruned or normalised: then every way through
    the module has to pass there.
    """
    return bool(module._forward_pre_hooks) or "forward" in module.__dict__


def first_state(module: nn.Module, parameter: Tensor, batch_size: int) -> Tensor | None:
    """The state after no inputs of a layer or block whose parameters are away, such as this one (d_model,).

    Where its `forward` has them, which alone knows. None if it does not bring them, or they are here.
    """
    if not (parameter.is_meta and hooked(module)):
        return None
    nothing = torch.empty(batch_size, 0, *parameter.shape, dtype=parameter.dtype, device="cpu")
    state: Tensor = module(nothing, return_state=True)[1]
    return state.detach()


def fill(p: Any, value: Tensor) -> None:
    """Set p to `value`, expanded. A sharded one (DTensor) takes its part, with no word to other processes."""
    if hasattr(p, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        whole = value.to(p.device, p.dtype).expand(p.shape)
        value = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(value)
