"""Optimizer groups that train the SSM parameters as the S4 papers do."""

import math
from typing import Any

from torch import Tensor, nn

from s4.checks import check_module, check_number
from s4.layer import S4Layer

# Their parameters, by their kind, do not decay.
_UNDECAYED_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def param_groups(
    model: nn.Module, lr: float | Tensor, weight_decay: float = 0.05, ssm_lr: float = 1e-3
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, such as AdamW (S4 appendix D.2).

    dt, A and B of every `S4Layer` train at min(ssm_lr, lr) without weight decay; D, biases and the parameters
    of norms at lr without weight decay; all others at lr with it.

    Args:
        model: any module, with S4 layers anywhere in it.
        lr: learning rate; of a tensor with one number each group gets a copy.
        weight_decay: of what decays; the papers' 0.05.
        ssm_lr: largest learning rate of dt, A and B; the papers' 0.001.

    Returns:
        up to three groups, named "ssm", "no_decay" and "decay", with every parameter in exactly one.

    Raises:
        ValueError: a rate below 0, or an S4 layer whose SSM parameters are not parameters of the model: after
            a parametrization (make the groups before it), or in FSDP1 without `use_orig_params=True`.
    """
    check_module("model", model)
    check_number("lr", lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr, 0)
    check_number("weight_decay", weight_decay, 0)
    check_number("ssm_lr", ssm_lr, 0)
    own = {id(p) for p in model.parameters()}
    ssm, plain = set(), set()
    for path, module in model.named_modules():
        plain |= {id(p) for name, p in module.named_parameters(recurse=False) if "bias" in name}
        if isinstance(module, _UNDECAYED_MODULES):
            plain |= {id(p) for p in module.parameters(recurse=False)}
        elif isinstance(module, S4Layer):
            ssm |= {id(p) for p in module.ssm_parameters()}
            plain.add(id(module.D))
            if not ssm <= own:
                raise ValueError(
                    f"the SSM parameters of {path or 'the model'} are not parameters of the model: "
                    "call param_groups before parametrizing it; FSDP1 needs use_orig_params=True"
                )
    members: dict[str, list[nn.Parameter]] = {"ssm": [], "no_decay": [], "decay": []}
    for p in model.parameters():
        members["ssm" if id(p) in ssm else "no_decay" if id(p) in plain else "decay"].append(p)
    rates = {"ssm": (ssm_lr, 0.0), "no_decay": (math.inf, 0.0), "decay": (math.inf, weight_decay)}
    return [
        {"params": params, "lr": _at_most(lr, rates[name][0]), "weight_decay": rates[name][1], "name": name}
        for name, params in members.items()
        if params
    ]


def _at_most(lr: float | Tensor, most: float) -> float | Tensor:
    # A copy for each group, as schedulers change it in place.
    return lr.detach().clamp(max=most) if isinstance(lr, Tensor) else min(most, lr)
