"""param_groups: which rate and decay each parameter gets, and that none is missed or doubled."""

from typing import Any

import pytest
import torch
from refusals import EITHER, Kind, refuses
from torch import nn

from s4 import S4Block, S4Layer, S4Model, param_groups

LR, DECAY, SSM_LR = 0.01, 0.05, 0.001
SSM = ("log_dt", "log_A_real", "A_imag", "P", "B")


def build(**options: object) -> S4Model:
    layers = [S4Layer(4, 8), S4Layer(4, 8, variant="diag", bidirectional=True)]
    blocks = [S4Block(layer, **options) for layer in layers]
    return S4Model(nn.Embedding(7, 4), blocks, nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)))


def settings(model: nn.Module, lr: float = LR, ssm_lr: float = SSM_LR) -> dict[str, tuple[float, float]]:
    """Parameter name -> (lr, weight decay), as the optimizer sees it."""
    optimizer = torch.optim.AdamW(
        param_groups(model, lr=lr, weight_decay=DECAY, ssm_lr=ssm_lr), lr=123.0, weight_decay=9.0
    )
    of = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters())) == len(of)
    return {name: of[id(p)] for name, p in model.named_parameters()}


@pytest.mark.parametrize("norm", ["layer", "batch", "rms"])
@pytest.mark.parametrize("mixer", ["glu", "linear"])
def test_every_parameter_gets_what_its_kind_gets(norm: str, mixer: str) -> None:
    model = build(norm=norm, mixer=mixer)
    norms = [
        name for name, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm1d, nn.RMSNorm))
    ]
    got = settings(model)
    kinds = dict.fromkeys(("ssm", "plain", "decay"), 0)
    for name, pair in got.items():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith("layer") and leaf in SSM:
            kind, want = "ssm", (SSM_LR, 0.0)
        elif owner in norms or leaf in ("bias", "D"):
            kind, want = "plain", (LR, 0.0)
        else:
            kind, want = "decay", (LR, DECAY)
        assert pair == want, name
        kinds[kind] += 1
    # dplr has five SSM parameters, diag four; C of both, two mixers, encoder and decoder decay
    assert kinds["ssm"] == 9
    assert kinds["decay"] == 6


def test_defaults_are_those_of_the_papers() -> None:
    model = build()

    def set_to(*arguments: float, **keywords: float) -> list[tuple[str, float, float]]:
        return [(g["name"], g["lr"], g["weight_decay"]) for g in param_groups(model, *arguments, **keywords)]

    want = [("ssm", 0.001, 0.0), ("no_decay", 0.01, 0.0), ("decay", 0.01, 0.05)]
    assert set_to(0.01) == set_to(lr=0.01) == want
    # The order of the arguments is a promise.
    assert set_to(0.01, 0.3, 0.002) == set_to(lr=0.01, weight_decay=0.3, ssm_lr=0.002)
    assert set_to(0.01, 0.3, 0.002) == [("ssm", 0.002, 0.0), ("no_decay", 0.01, 0.0), ("decay", 0.01, 0.3)]


def test_the_ssm_rate_is_never_above_the_other() -> None:
    layer = S4Layer(4, 8)
    assert settings(layer, lr=1e-4, ssm_lr=1e-3)["log_dt"] == (1e-4, 0.0)
    assert settings(layer, lr=1e-2, ssm_lr=1e-3)["log_dt"] == (1e-3, 0.0)
    assert settings(layer)["C"] == (LR, DECAY)
    assert settings(layer)["D"] == (LR, 0.0)


def test_a_rate_for_each_of_dt_A_and_B() -> None:
    """As published recipes have it, with dt at the rate of all others; 0 leaves a parameter where it is."""
    model = build()
    groups = param_groups(model, lr=LR, weight_decay=DECAY, ssm_lr={"A": 1e-3, "B": 0, "dt": None})
    got = {id(p): (g["lr"], g["weight_decay"], g["name"]) for g in groups for p in g["params"]}
    assert len(got) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    want = {"log_dt": (LR, 0.0, "ssm dt"), "B": (0, 0.0, "ssm B")}
    want |= dict.fromkeys(("log_A_real", "A_imag", "P"), (1e-3, 0.0, "ssm A"))
    for name, p in model.named_parameters():
        if name.split(".")[-2] == "layer" and name.split(".")[-1] in SSM:
            assert got[id(p)] == want[name.split(".")[-1]], name
    optimizer = torch.optim.AdamW(groups)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randint(7, (2, 9))).square().sum().backward()
    optimizer.step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"blocks.0.layer.B", "blocks.1.layer.B"}
    with_c = param_groups(
        model, lr=LR, weight_decay=DECAY, ssm_lr={"dt": 1e-3, "A": 1e-3, "B": 1e-3, "C": 1e-3}
    )
    of = {id(p): (g["name"], g["lr"], g["weight_decay"]) for g in with_c for p in g["params"]}
    assert of[id(model.blocks[0].layer.C)] == of[id(model.blocks[1].layer.C)] == ("ssm C", 1e-3, DECAY)
    assert of[id(model.blocks[0].layer.D)] == ("no_decay", LR, 0.0)
    capped = param_groups(model, lr=1e-4, ssm_lr={"dt": 1e-3, "A": 1e-5, "B": 1e-3})
    assert [(g["name"], g["lr"]) for g in capped][:3] == [("ssm dt", 1e-4), ("ssm A", 1e-5), ("ssm B", 1e-4)]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        (
            {"A": 1e-3, "B": 1e-3, "C": 1e-3},
            "ssm_lr must be a number, or have 'dt', 'A', 'B' and if need be 'C'",
        ),
        ({"dt": 1e-3}, "ssm_lr must be a number, or have 'dt', 'A', 'B' and if need be 'C', got .'dt'"),
        ({"dt": 1e-3, "A": 1e-3, "B": 1e-3, "D": 1e-3}, "ssm_lr must be a number, or have"),
        ({"dt": 1e-3, "A": -1.0, "B": 1e-3}, "ssm_lr.'A'. must be finite and at least 0"),
        ({"dt": 1e-3, "A": "fast", "B": 1e-3}, "ssm_lr.'A'. must be a number"),
    ],
)
def test_rates_of_other_parameters_are_refused(rates: dict[str, Any], message: str) -> None:
    refuses(EITHER, message, lambda: param_groups(build(), lr=LR, ssm_lr=rates))


def test_a_norm_over_two_dimensions_does_not_decay() -> None:
    model = nn.Sequential(nn.LayerNorm((3, 4)), S4Layer(4, 8))
    assert settings(model)["0.weight"] == settings(model)["0.bias"] == (LR, 0.0)


def test_shared_parameters_are_in_one_group_once() -> None:
    model = build()
    model.blocks[1].layer.A_imag = model.blocks[0].layer.A_imag
    model.blocks[1].mixer = model.blocks[0].mixer
    settings(model)


def test_a_shared_layer_counts_once() -> None:
    layer = S4Layer(4, 8)
    model = nn.ModuleList([layer, nn.Sequential(layer), nn.Linear(4, 4)])
    assert settings(model)["0.log_dt"] == (SSM_LR, 0.0)


def test_without_any_s4_layer() -> None:
    assert settings(nn.Linear(3, 2)) == {"weight": (LR, DECAY), "bias": (LR, 0.0)}


def test_frozen_parameters_do_no_harm() -> None:
    model = build()
    model.blocks[0].layer.log_dt.requires_grad_(False)
    groups = param_groups(model, lr=LR, weight_decay=DECAY, ssm_lr=SSM_LR)
    seen = [id(p) for g in groups for p in g["params"]]
    assert len(seen) == len(set(seen))
    assert {id(p) for p in model.parameters() if p.requires_grad} <= set(seen)


def test_groups_do_not_rest_on_attributes_of_parameters() -> None:
    """Replaced and reloaded parameters, which lose any hidden mark, are found all the same."""
    model = build()
    layer = model.blocks[0].layer
    layer.log_dt = nn.Parameter(layer.log_dt.detach().clone())
    assert settings(model)["blocks.0.layer.log_dt"] == (SSM_LR, 0.0)
    assert not any(vars(p) for p in model.parameters())


def test_a_parameter_out_of_reach_raises() -> None:
    """A parametrized A_imag is no parameter any more: its original would be trained like any weight."""
    model = build()
    nn.utils.parametrize.register_parametrization(model.blocks[0].layer, "A_imag", nn.Softplus())
    with pytest.raises(ValueError, match=r"blocks\.0\.layer"):
        param_groups(model, lr=LR, weight_decay=DECAY, ssm_lr=SSM_LR)


def test_training_with_the_groups_moves_what_it_should() -> None:
    model = build()
    optimizer = torch.optim.SGD(param_groups(model, lr=LR, weight_decay=DECAY, ssm_lr=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randint(7, (2, 9))).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        frozen = owner.endswith("layer") and leaf in SSM
        assert torch.equal(before[name], p) == frozen, name


def test_a_rate_may_be_a_tensor() -> None:
    """As a captured optimizer needs it. A scheduler changes each group's in place, so none is shared."""
    lr = torch.tensor(0.1)
    groups = param_groups(build(), lr=lr, ssm_lr=0.01)
    assert {group["name"]: round(group["lr"].item(), 6) for group in groups} == {
        "ssm": 0.01,
        "no_decay": 0.1,
        "decay": 0.1,
    }
    optimizer = torch.optim.AdamW(groups, lr=lr, foreach=False)
    scheduler = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.5)
    optimizer.step(), scheduler.step()
    assert [round(group["lr"].item(), 6) for group in groups] == [0.005, 0.05, 0.05]
    assert lr.item() == torch.tensor(0.1).item()


BELOW_ZERO = {"lr": -1.0, "weight_decay": -0.1, "ssm_lr": -1e-3}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "value"), BELOW_ZERO.items(), ids=BELOW_ZERO)
@pytest.mark.parametrize("nan", [False, True])
def test_numbers_out_of_range(name: str, value: float, nan: bool) -> None:
    keywords = {"lr": 0.1, "weight_decay": 0.1, "ssm_lr": 0.1} | {name: float("nan") if nan else value}
    refuses(ValueError, f"{name}.*{'nan' if nan else value}", lambda: param_groups(S4Layer(4, 8), **keywords))


OTHER_KINDS = {
    "a list of modules": ({"model": [nn.Linear(2, 2)]}, TypeError, "model.*Linear"),
    "lr a word": ({"lr": "1"}, EITHER, "lr.*1"),
    "lr of two": ({"lr": torch.ones(2)}, TypeError, r"lr.*tensor\(\[1"),
    "lr a tensor below zero": ({"lr": torch.tensor(-1.0)}, ValueError, "lr.*-1"),
    "lr infinite": ({"lr": float("inf")}, ValueError, "lr.*inf"),
    "ssm_lr infinite": ({"ssm_lr": float("inf")}, ValueError, "ssm_lr.*inf"),
    "weight_decay none": ({"weight_decay": None}, EITHER, "weight_decay.*None"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("changed", "kind", "match"), OTHER_KINDS.values(), ids=OTHER_KINDS)
def test_arguments_of_another_kind(changed: dict[str, Any], kind: Kind, match: str) -> None:
    keywords = {"model": S4Layer(4, 8), "lr": 0.1, "weight_decay": 0.1, "ssm_lr": 0.1} | changed
    refuses(kind, match, lambda: param_groups(**keywords))
