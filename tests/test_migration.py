"""docs/migration.md: its recipes do what they say, no option of the original is left out.

That its shapes and links are right, `docs/checks` tests.
"""

import re
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from s4 import S4Block, S4Layer, param_groups

PAGE = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()

# Arguments of the original, but for those that hand a part its configuration (as layer, kernel_args).
ORIGINAL = {
    "FFTConv": """d_model l_max channels swap_channels bidirectional activation transposed dropout tie_dropout
        drop_kernel mode kernel""",
    "its kernels": """d_model channels l_max lr wd verbose d_state deterministic dt_min dt_max dt_tie
        dt_transform rank n_ssm measure init init_args disc dt_fast real_transform imag_transform bandlimit
        backend is_real""",
    "S4Block": """d_model bottleneck gate mult_act final_act postact initializer weight_norm dropout
        tie_dropout transposed""",
    "SequenceModel and its blocks": """d_model n_layers transposed dropout tie_dropout prenorm bidirectional
        n_repeat residual norm pool track_norms dropinp drop_path""",
    "calls": "rate state lengths setup_step default_state step",
    "optimizers": "_optim lr",
}


def blocks() -> list[str]:
    """The Python of the page, in its order."""
    return re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page defines."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for text in blocks():
        exec(compile(text, "migration.md", "exec"), names)
    return names


@pytest.mark.promise(
    "other libraries",
    "the recipes of docs/migration.md, for what the original repository, nn.GRU and others have",
)
def test_the_code_of_the_page_runs_and_shapes_are_as_it_says(page: dict[str, Any]) -> None:
    assert isinstance(page["packed"], nn.utils.rnn.PackedSequence)
    assert page["packed"].data.shape == (16, 64)
    assert [block.residual_dropout.p for block in page["example"](3, 10).blocks] == [0.1] * 4


@pytest.mark.parametrize("part", ORIGINAL)
def test_every_option_of_the_original_has_a_line(part: str) -> None:
    tables = [line for line in PAGE.splitlines() if line.startswith("|")]
    told = {name for line in tables for name in re.findall(r"[A-Za-z_]\w*", line.split("|")[1])}
    assert not set(ORIGINAL[part].split()) - told


def test_a_mixture_has_the_kernels_of_its_parts(page: dict[str, Any]) -> None:
    """Each channel that of the dense system of its own initialisation, with its own dt and C."""
    kinds = [("dplr", "legs"), ("diag", "inv"), ("dplr", "fout"), ("diag", "lin")]
    layer = page["mixture"](8, 16, kinds, dtype=torch.float64)
    got = layer.kernel(50).detach()
    for i, (variant, init) in enumerate(kinds):
        rows = slice(2 * i, 2 * i + 2)
        part = dict(S4Layer(2, 16, variant=variant, init=init, dtype=torch.float64).named_parameters())
        part |= {"log_dt": layer.log_dt[rows], "C": layer.C[:, rows], "D": layer.D[rows]}
        with torch.no_grad():
            want = oracle.long_kernel(oracle.discrete(part, "bilinear"), 50)[0]
        torch.testing.assert_close(got[rows], want, rtol=0, atol=1e-9 * float(want.abs().max()))
    y = layer(torch.randn(2, 30, 8, dtype=torch.float64))
    y.square().sum().backward()
    assert layer.P.grad[:, [1, 3]].abs().max() == 0  # diagonal parts stay so
    assert layer.P.grad[:, [0, 2]].abs().min() > 0


def test_a_mixture_with_legt_has_its_rank(page: dict[str, Any]) -> None:
    layer = page["mixture"](4, 8, [("dplr", "legt"), ("dplr", "legs")], init="legt")
    assert torch.equal(layer.P[:, 0], S4Layer(1, 8, init="legt").P[:, 0])
    assert torch.equal(layer.P[0, 1], S4Layer(1, 8).P[0, 0])
    assert layer.P[1, 1].abs().max() == 0
    with pytest.raises(RuntimeError):
        page["mixture"](4, 8, [("dplr", "legt"), ("dplr", "legs")])


def softplus_layer(page: dict[str, Any], **options: Any) -> tuple[S4Layer, nn.Parameter]:
    layer = S4Layer(4, 8, dtype=torch.float64, dt_max=2.0, **options)
    log_dt = layer.log_dt
    parametrize.register_parametrization(layer, "log_dt", page["LogSoftplus"]())
    return layer, log_dt


@pytest.mark.parametrize("variant", ["dplr", "diag"])
def test_dt_by_a_softplus_trains_as_one(page: dict[str, Any], variant: str) -> None:
    """The value is kept, the gradient is that of softplus, and the optimizer's parameter is still the one."""
    torch.manual_seed(0)
    layer = S4Layer(4, 8, variant=variant, dtype=torch.float64, dt_max=2.0)
    u = torch.randn(2, 20, 4, dtype=torch.float64)
    before, log_dt, value = layer(u), layer.log_dt, layer.log_dt.detach().clone()
    (slope,) = torch.autograd.grad(before.square().sum(), log_dt)
    groups = param_groups(layer, lr=1e-3)
    parametrize.register_parametrization(layer, "log_dt", page["LogSoftplus"]())
    torch.testing.assert_close(layer.dt, value.exp(), rtol=1e-12, atol=0)
    torch.testing.assert_close(layer(u), before, rtol=1e-9, atol=1e-9)
    layer(u).square().sum().backward()
    p = layer.parametrizations.log_dt.original
    assert p is log_dt
    assert any(p is q for group in groups for q in group["params"] if group["name"] == "ssm")
    dt = value.exp()
    # d log softplus(p) / dp = sigmoid(p) / softplus(p), where sigmoid(p) = 1 - exp(-dt)
    torch.testing.assert_close(p.grad, slope * -torch.expm1(-dt) / dt, rtol=1e-8, atol=0)
    optimizer = torch.optim.SGD(groups, lr=1e-3)
    old = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(layer.dt, nn.functional.softplus(old - 1e-3 * p.grad), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="call param_groups before parametrizing it"):
        param_groups(layer, lr=1e-3)


def test_dt_by_a_softplus_steps_is_kept_and_saved(page: dict[str, Any]) -> None:
    layer, p = softplus_layer(page)
    layer.eval()
    u = torch.randn(2, 20, 4, dtype=torch.float64)

    def outputs(layer: S4Layer) -> Tensor:
        state, y = layer.initial_state(2), []
        for u_t in u.unbind(1):
            y_t, state = layer.step(u_t, state)
            y.append(y_t)
        torch.testing.assert_close(torch.stack(y, 1), layer(u), rtol=1e-8, atol=1e-8)
        return layer(u)

    with torch.no_grad():
        first = outputs(layer)
        p += 0.5  # what evaluation kept of it is not used again
        second = outputs(layer)
        assert (first - second).abs().max() > 1e-3
        other, _ = softplus_layer(page)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(outputs(other.eval()), second, rtol=1e-12, atol=1e-12)
        assert "parametrizations.log_dt.original" in layer.state_dict()
        parametrize.remove_parametrizations(layer, "log_dt")
        torch.testing.assert_close(outputs(layer), second, rtol=1e-9, atol=1e-9)
    plain = S4Layer(**layer.config())
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain.eval()(u), second, rtol=1e-9, atol=1e-9)


def test_smaller_recipes(page: dict[str, Any]) -> None:
    """A dropout more, a weight norm, a band limit, and a rate of C."""
    block = page["block"]
    drop, gelu = block.activation
    assert isinstance(drop, nn.Dropout)
    assert isinstance(gelu, nn.GELU)
    with pytest.raises(ValueError, match="activation"):
        block.config()
    weight = block.mixer[0].weight
    norms = block.mixer[0].parametrizations.weight.original0
    torch.testing.assert_close(weight.norm(dim=1, keepdim=True), norms)
    groups = {group["name"]: group for group in page["groups"]}
    assert [id(p) for p in groups["ssm C"]["params"]] == [id(block.layer.C)]
    found = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(found) == sorted(map(id, block.parameters()))
    limited = page["limited"]
    for dt, row in zip(limited.dt.tolist(), limited.C[0], strict=True):
        # S4D-Lin: mode k turns dt k / 2 times a step, of bandlimit 0.5 a quarter.
        for k, pair in enumerate(row):
            if abs(dt * k / 2 - 0.25) > 1e-5:
                assert bool((pair == 0).all()) == (dt * k / 2 > 0.25)
    assert 0 < int((limited.C == 0).sum()) < limited.C.numel()


def test_a_dropout_before_the_activation_draws_before_it() -> None:
    torch.manual_seed(0)
    block = S4Block(S4Layer(6, 4), norm="none")
    block.mixer = nn.Identity()
    block.activation = nn.Sequential(nn.Dropout(0.5), block.activation)
    x = torch.randn(4, 30, 6)
    y, z = block(x) - x, block.layer(x)
    kept = torch.isclose(y, nn.functional.gelu(2 * z), rtol=1e-3, atol=1e-4)
    assert 0.3 < kept.float().mean() < 0.7
    assert y[~kept].abs().max() < 1e-5
    torch.testing.assert_close(block.eval()(x), x + nn.functional.gelu(z))


def test_the_parts_of_a_block_can_be_what_no_option_makes() -> None:
    """None and others of the original's activations and output maps."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 6)
    block = S4Block(S4Layer(6, 4), norm="none", activation="none")
    block.mixer = nn.Identity()
    torch.testing.assert_close(block(x), x + block.layer(x))
    block.activation, block.mixer = nn.ELU(), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    torch.testing.assert_close(block(x), x + block.mixer(nn.functional.elu(block.layer(x))))
    layer, turned = S4Layer(6, 4), x.mT.contiguous()
    torch.testing.assert_close(layer(turned.mT).mT, layer(x).mT)


def test_a_wider_layer_has_the_outputs_of_channels() -> None:
    wide, u = S4Layer(2 * 3, 4), torch.randn(2, 9, 3)
    y = wide(u.repeat(1, 1, 2))
    k = wide.kernel(9)
    for c in range(2):
        for h in range(3):
            row = c * 3 + h
            full = torch.nn.functional.conv1d(
                torch.nn.functional.pad(u[:, None, :, h], (8, 0)), k[row].flip(0)[None, None]
            )[:, 0]
            want = full + wide.D[row] * u[:, :, h]
            torch.testing.assert_close(y[:, :, row], want, rtol=1e-4, atol=1e-4)
