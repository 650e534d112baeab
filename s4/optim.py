"""Optimizer groups that train the SSM parameters as the S4 papers do."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from s4.checks import check_module, check_number
from s4.layer import S4Layer

# Modules whose parameters do not decay.
_UNDECAYED_MODULES = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def param_groups(
    model: nn.Module,
    lr: float | Tensor,
    weight_decay: float = 0.05,
    ssm_lr: float | Mapping[str, float | int | None] = 1e-3,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, such as AdamW (S4 appendix D.2).

    dt, A and B of every `S4Layer` train at min(ssm_lr, lr) without weight decay; D, biases and the parameters
    of norms at lr without weight decay; all others at lr with it.

    Args:
        model: any module, with S4 layers anywhere in it.
        lr: learning rate; of a tensor with one number each group gets a copy.
        weight_decay: of what decays; the papers' 0.05.
        ssm_lr: largest learning rate of dt, A and B; the papers' 0.001. Or one for each, as
            `{"dt": None, "A": 1e-3, "B": 0}`: None is lr, and 0 leaves the parameter as it is. "C", which
            decays as others do, may have one, too.

    Returns:
        up to three groups, named "ssm", "no_decay" and "decay", with every parameter in exactly one; with
        rates for each, "ssm dt", "ssm A", "ssm B" and, if told, "ssm C" in place of "ssm".

    Raises:
        ValueError: a rate below 0, of another parameter, or left out; or an S4 layer whose SSM parameters are
            not parameters of the model: after a parametrization (make the groups before it), or in FSDP1
            without `use_orig_params=True`.

    Examples:
        >>> model = nn.Sequential(S4Layer(16), nn.Linear(16, 10))
        >>> optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
        >>> [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [('ssm', 0.001, 0.0), ('no_decay', 0.01, 0.0), ('decay', 0.01, 0.05)]
    """
    check_module("model", model)
    check_number("lr", lr.item() if isinstance(lr, Tensor) and lr.numel() == 1 else lr, 0)
    check_number("weight_decay", weight_decay, 0)
    most = _most(ssm_lr)
    own = {id(p) for p in model.parameters()}
    ssm: dict[int, str] = {}
    plain = set()
    for path, module in model.named_modules():
        plain |= {id(p) for name, p in module.named_parameters(recurse=False) if "bias" in name}
        if isinstance(module, _UNDECAYED_MODULES):
            plain |= {id(p) for p in module.parameters(recurse=False)}
        elif isinstance(module, S4Layer):
            dt, *A, B = module.ssm_parameters()
            for part, parameters in (("ssm dt", [dt]), ("ssm A", A), ("ssm B", [B])):
                ssm |= {id(p): part if part in most else "ssm" for p in parameters}
            if "ssm C" in most:
                ssm[id(module.C)] = "ssm C"
            plain.add(id(module.D))
            if not ssm.keys() <= own:
                raise ValueError(
                    f"the SSM parameters of {path or 'the model'} are not parameters of the model: "
                    "call param_groups before parametrizing it; FSDP1 needs use_orig_params=True"
                )
    rates = {name: (rate, weight_decay if name == "ssm C" else 0.0) for name, rate in most.items()}
    rates |= {"no_decay": (math.inf, 0.0), "decay": (math.inf, weight_decay)}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for p in model.parameters():
        members[ssm.get(id(p)) or ("no_decay" if id(p) in plain else "decay")].append(p)
    return [
        {"params": params, "lr": _at_most(lr, rates[name][0]), "weight_decay": rates[name][1], "name": name}
        for name, params in members.items()
        if params
    ]


def _most(ssm_lr: Any) -> dict[str, float]:
    """The largest rate of each group of SSM parameters."""
    if not isinstance(ssm_lr, Mapping):
        check_number("ssm_lr", ssm_lr, 0)
        return {"ssm": ssm_lr}
    if set(ssm_lr) - {"C"} != {"dt", "A", "B"}:
        raise ValueError(
            f"ssm_lr must be a number, or have 'dt', 'A', 'B' and if need be 'C', got {list(ssm_lr)}"
        )
    for name, rate in ssm_lr.items():
        if rate is not None:
            check_number(f"ssm_lr[{name!r}]", rate, 0)
    names = [name for name in ("dt", "A", "B", "C") if name in ssm_lr]
    return {f"ssm {name}": math.inf if ssm_lr[name] is None else float(ssm_lr[name]) for name in names}


def _at_most(lr: float | Tensor, most: float) -> float | Tensor:
    # A copy for each group, as schedulers change it in place.
    return lr.detach().clamp(max=most) if isinstance(lr, Tensor) else min(most, lr)
