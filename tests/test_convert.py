"""Weights of the original repository, against what a dense float64 script of our own computes of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from official_parameters import Case, cases
from safetensors import safe_open
from torch import Tensor, nn

import s4.convert
from s4 import S4Block, S4Layer, S4Model, hippo

FILES = Path(__file__).parent / "golden" / "official"
CASES = sorted(path.stem for path in FILES.glob("*.safetensors"))
LAYERS = [name for name in CASES if name.startswith(("dplr", "diag", "version3", "minimal"))]


class Stored(NamedTuple):
    """A file: what is converted, how, and what it has to compute."""

    function: str
    arguments: dict[str, Any]
    parameters: dict[str, Tensor]
    truth: dict[str, Tensor]


def stored(name: str, dtype: torch.dtype = torch.float64) -> Stored:
    """Read anew, with parameters in a dtype."""
    with safe_open(FILES / f"{name}.safetensors", "pt") as file:
        told = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    parameters = {k.removeprefix("parameters/"): in_dtype(v, dtype) for k, v in tensors.items() if "/" in k}
    truth = {k: v for k, v in tensors.items() if "/" not in k}
    return Stored(told["function"], json.loads(told["arguments"]), parameters, truth)


def in_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def converted(it: Stored, parameters: Mapping[str, Any] | None = None) -> Any:
    """In evaluation mode."""
    made = getattr(s4.convert, it.function)(
        it.parameters if parameters is None else parameters, **it.arguments
    )
    return made.eval()


def output(made: Any, it: Stored) -> Tensor:
    with torch.no_grad():
        return made(it.truth["u"])


def apart(value: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    assert value.shape == truth.shape
    return float((value.double() - truth.double()).abs().max() / truth.abs().max())


# The numbers


@pytest.mark.parametrize("name", CASES)
def test_files_hold_what_the_script_computes(name: str) -> None:
    """Dense systems of 8 states and 20 steps: a thousand roundings at most."""
    case: Case = cases()[name]
    it = stored(name, torch.float32)
    assert case.parameters.keys() == it.parameters.keys()
    assert (case.function, case.arguments) == (it.function, it.arguments)
    assert case.outputs.keys() == it.truth.keys() - {"u"}
    for key, value in case.outputs.items():
        assert np.abs(value - it.truth[key].numpy()).max() < 1e-12 * np.abs(value).max()


# float64: thousands of roundings of 1e-16, and systems of a condition below 1e3. float32: the parameters and
# C, rounded once, and a kernel to 1e-5 as S4Layer promises it.
@pytest.mark.promise("other libraries", "weights of the original repository, exactly: `s4.convert`")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", CASES)
def test_outputs_of_the_original(name: str, dtype: torch.dtype, bound: float) -> None:
    it = stored(name, dtype)
    made = converted(it)
    assert isinstance(made, {"layer": S4Layer, "block": S4Block, "model": S4Model}[it.function])
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert all(p.requires_grad for p in made.parameters())
    u = in_dtype(it.truth["u"], dtype)
    with torch.no_grad():
        assert apart(made(u), it.truth["y"]) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_and_states_of_the_original(name: str, dtype: torch.dtype, bound: float) -> None:
    it = stored(name, dtype)
    made, u = converted(it), in_dtype(it.truth["u"], dtype)
    k = made.kernel(u.shape[1])
    assert apart((k if made.bidirectional else k[None]).detach(), it.truth["kernel"]) < bound
    if "state" not in it.truth:
        return
    with torch.no_grad():
        assert apart(made(u, return_state=True)[1], it.truth["state"]) < bound
        state, ys = made.initial_state(len(u)), []
        for t in range(u.shape[1]):
            y, state = made.step(u[:, t], state)
            ys.append(y)
    assert apart(state, it.truth["state"]) < bound
    assert apart(torch.stack(ys, 1), it.truth["y"]) < bound


@pytest.mark.parametrize("name", ["dplr", "diag-zoh", "version3-diag", "minimal"])
def test_parameters_that_need_no_arithmetic_pass_bit_for_bit(name: str) -> None:
    it = stored(name, torch.float32)
    made = converted(it)
    theirs = {key.rpartition(".")[2]: value for key, value in it.parameters.items()}
    log_dt = theirs.get("inv_dt", theirs.get("log_dt"))
    real = next(theirs[n] for n in ("A_real", "inv_A_real", "log_A_real") if n in theirs)
    assert torch.equal(made.log_dt, log_dt.flatten())
    assert torch.equal(made.log_A_real, real)
    assert torch.equal(made.A_imag, -theirs["A_imag"] if "inv_dt" in theirs else theirs["A_imag"])
    assert torch.equal(made.D, theirs["D"].flatten())
    if "P" in theirs:
        assert torch.equal(made.P, theirs["P"])
    elif "inv_A_real" not in theirs:
        assert torch.equal(made.C, theirs["C"].reshape(made.C.shape))


@pytest.mark.parametrize(("name", "n_ssm"), [("dplr", 4), ("dplr-rank2-shared", 1), ("diag-bilinear", 4)])
def test_systems_stay_shared_where_channels_share_them_so(name: str, n_ssm: int) -> None:
    assert converted(stored(name)).n_ssm == n_ssm


def test_a_length_of_one_and_a_C_of_that_length_undo_each_other() -> None:
    """C~ = C (I - Abar^L) goes to 0 with L dt |A|: then C is a small difference, and float64 still has it."""
    it = stored("dplr")
    plain = converted(it, it.parameters | {"kernel.l_kernel": torch.tensor(0)})
    A = plain.dense()[0]
    C = plain.dense()[2]
    for length in (1, 3, 2**14):
        short = torch.linalg.matrix_power(A, length)
        row = C - torch.einsum("hn,hnm->hm", C, short)
        re, im = row.chunk(2, -1)
        there = {"kernel.C": torch.stack([re, -im], -1)[None] / 2, "kernel.l_kernel": torch.tensor(length)}
        again = converted(it, it.parameters | there)
        assert apart(again.C.detach(), plain.C.detach()) < 1e-9


# Other names of the same


def test_version_3_without_a_parameter_that_it_never_used() -> None:
    it = stored("version3-diag")
    later = {key: value for key, value in it.parameters.items() if not key.endswith(".A")}
    assert len(later) == len(it.parameters) - 1
    assert apart(output(converted(it, later), it), it.truth["y"]) < 1e-10


def test_real_parts_of_version_3() -> None:
    """Its relu adds nothing, that of version 4 adds 1e-4; before it had the option, all were exponentials."""
    it, key = stored("version3-dplr"), "kernel.kernel.inv_w_real"
    plain = converted(
        it._replace(arguments={"real_transform": "relu"}), it.parameters | {key: it.parameters[key].exp()}
    )
    assert apart(output(plain, it), it.truth["y"]) < 1e-10
    older = {k.replace("inv_w_real", "log_w_real"): value for k, value in it.parameters.items()}
    assert apart(output(converted(it, older), it), it.truth["y"]) < 1e-10


def test_steps_by_mode_lose_nothing_but_a_rounding_of_A() -> None:
    """dt A of each mode, of which dt alone would be off by more."""
    it = stored("diag-dt-per-mode", torch.float32)
    made = converted(it)
    theirs = {key.rpartition(".")[2]: value.double() for key, value in it.parameters.items()}
    want = -theirs["inv_dt"] * theirs["A_imag"][torch.arange(4) % 2]
    got = (made.log_dt.double().exp()[:, None] * made.A_imag.double()).detach()
    assert float(((got - want) / want).abs().max()) < 1.01 * 2**-24


def test_batch_norms_of_a_SequenceModel() -> None:
    it = stored("train-prenorm", torch.float32)
    more = dict(it.parameters)
    for key in it.parameters:
        if key.endswith("norm.norm.weight"):
            at = key.removesuffix("weight")
            more |= {f"{at}running_mean": torch.randn(4), f"{at}running_var": torch.rand(4) + 1}
            more[f"{at}num_batches_tracked"] = torch.tensor(7)
    made = converted(it, more)
    assert isinstance(made.norm, nn.BatchNorm1d)
    assert torch.equal(made.norm.running_var, more["model.norm.norm.running_var"])
    assert {block.config()["norm"] for block in made.blocks} == {"batch"}
    mean = made.blocks[0].feed_forward["norm"].running_mean
    assert torch.equal(mean, more["model.layers.1.norm.norm.running_mean"])


# What surrounds them


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "net.encoder.s4.", "a.kernel.b."])
@pytest.mark.parametrize("name", ["dplr", "version3-dplr", "minimal"])
def test_a_layer_is_found_under_any_prefix(name: str, prefix: str) -> None:
    it = stored(name)
    more = {f"{prefix}{key}": value for key, value in it.parameters.items()} | {"head.weight": torch.ones(2)}
    assert apart(output(converted(it, more), it), it.truth["y"]) < 1e-10


@pytest.mark.parametrize("name", ["block", "residual-block", "example-minimal", "train-prenorm"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.net."])
def test_blocks_and_models_are_found_under_any_prefix(name: str, prefix: str) -> None:
    it = stored(name)
    more = {f"{prefix}{key}": value for key, value in it.parameters.items()}
    assert apart(output(converted(it, more), it), it.truth["y"]) < 1e-10


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize(
    ("name", "module"), [("example-dplr-prenorm", "s4_layers.1."), ("train-prenorm", "layers.2.")]
)
def test_modules_that_were_wrapped_one_by_one(name: str, module: str, wrapper: str) -> None:
    it = stored(name)
    more = {key.replace(module, f"{module}{wrapper}."): value for key, value in it.parameters.items()}
    assert more.keys() != it.parameters.keys()
    assert apart(output(converted(it, more), it), it.truth["y"]) < 1e-10


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_a_state_dict_is_found_in_a_checkpoint(wrapper: str) -> None:
    it = stored("example-minimal")
    made = converted(it, {wrapper: it.parameters, "epoch": 3, "acc": 0.5})
    assert apart(output(made, it), it.truth["y"]) < 1e-10


def test_a_kernel_alone_has_no_D() -> None:
    it = stored("dplr")
    alone = {k.removeprefix("kernel."): v for k, v in it.parameters.items() if k != "D"}
    for prefix in ("", "ssm."):
        made = converted(it, {prefix + name: value for name, value in alone.items()})
        assert not made.D.any()
        assert apart(made.kernel(20)[None].detach(), it.truth["kernel"]) < 1e-10


@pytest.mark.parametrize("name", ["block", "residual-block"])
def test_the_layer_of_a_block_is_converted_alone(name: str) -> None:
    it = stored(name)
    layer, block = s4.convert.layer(it.parameters, dt_transform="exp"), converted(it)
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in block.layer.state_dict().items())


def test_a_layer_and_its_norm_of_a_model_are_a_block() -> None:
    it = stored("example-dplr-prenorm")
    model = converted(it)
    for i in range(2):
        part = {k: v for k, v in it.parameters.items() if k.startswith((f"s4_layers.{i}.", f"norms.{i}."))}
        block = s4.convert.block(part, prenorm=True)
        assert all(torch.equal(v, block.state_dict()[k]) for k, v in model.blocks[i].state_dict().items())
        bare = {k: v for k, v in part.items() if "norms" not in k}
        assert s4.convert.block(bare).config()["norm"] == "none"


def test_only_a_residual_block_of_version_4_has_to_be_told_how_steps_are_stored() -> None:
    """Its train.py has another default than its classes."""
    it = stored("example-minimal")
    at = "s4_layers.0."
    part = {k.replace(at, "layer."): v for k, v in it.parameters.items() if k.startswith(at)}
    block = s4.convert.block(part)
    assert torch.equal(block.layer.log_dt, it.parameters[f"{at}kernel.log_dt"])
    assert block.prenorm
    told = stored("residual-block").parameters
    dt = s4.convert.block(told, dt_transform="softplus").layer.dt
    torch.testing.assert_close(dt, nn.functional.softplus(told["layer.layer.kernel.inv_dt"])[:, 0])


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("block", {}, {"norm": "none", "mixer": "glu", "residual_dropout": 0.0, "d_ff": 0}),
        ("block", {"dropout": 0.1}, {"dropout": 0.1, "residual_dropout": 0.0}),
        ("block", {"activation": "none"}, {"activation": "none"}),
        ("residual-block", {}, {"norm": "layer", "prenorm": True, "mixer": "linear"}),
        ("residual-block", {"dropout": 0.1}, {"residual_dropout": 0.1, "tie_dropout": False}),
        ("residual-block-batch-postnorm", {}, {"norm": "batch", "prenorm": False}),
    ],
)
def test_options_of_blocks(name: str, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    it = stored(name)
    found = s4.convert.block(it.parameters, **it.arguments | given).config()
    assert {key: found[key] for key in wanted} == wanted


def test_options_of_models() -> None:
    example = s4.convert.model(stored("example-minimal").parameters, dropout=0.1).blocks[0].config()
    assert [example[key] for key in ("prenorm", "tie_dropout", "dropout", "residual_dropout")] == [
        False, True, 0.1, 0.1,
    ]  # fmt: skip
    for name, prenorm in (("train-prenorm", True), ("train-postnorm", False)):
        it = stored(name)
        model = converted(it)
        configs = [block.config() for block in model.blocks]
        assert [config["d_ff"] for config in configs] == [6, 0]
        assert {config["prenorm"] for config in configs} == {prenorm}
        assert (model.norm is not None) is prenorm
        assert not configs[0]["tie_dropout"]
        assert model.pooling == it.arguments["pooling"]


# What is left as it was


def test_conversion_draws_no_random_number_and_changes_nothing_that_was_given() -> None:
    for name in ("dplr", "example-dplr-prenorm", "train-postnorm"):
        it = stored(name)
        before = {key: value.clone() for key, value in it.parameters.items()}
        state = torch.get_rng_state()
        made = converted(it)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.no_grad():
            for p in made.parameters():
                p.add_(1)
        assert all(torch.equal(value, it.parameters[key]) for key, value in before.items())


def test_the_default_device_does_not_matter() -> None:
    for name in (
        "dplr-rank3-both-ways",
        "dplr-dt-per-mode",
        "diag-real",
        "example-minimal",
        "train-postnorm",
    ):
        it = stored(name)
        with torch.device("meta"):
            made = converted(it)
        assert apart(output(made, it), it.truth["y"]) < 1e-10


def test_half_precision_and_mixed_dtypes() -> None:
    it = stored("diag-zoh", torch.bfloat16)
    assert {p.dtype for p in converted(it).parameters()} == {torch.bfloat16}
    for key in ("kernel.inv_dt", "D"):
        mixed = it.parameters | {key: it.parameters[key].float()}
        assert {p.dtype for p in converted(it, mixed).parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["dplr-rank3-both-ways", "residual-block", "example-minimal"])
def test_what_was_converted_is_saved_and_read(name: str, tmp_path: Path) -> None:
    it = stored(name)
    made = converted(it)
    made.save_pretrained(tmp_path)
    again = type(made).from_pretrained(tmp_path)
    assert torch.equal(again(it.truth["u"]), made(it.truth["u"]))


@pytest.mark.parametrize("threads", [1, 2])
def test_many_states_on_several_threads(threads: int) -> None:
    """C (I - A^L) is the C that was stored; MKL has solved no batch of such matrices on two threads."""
    torch.set_num_threads(threads)
    Lambda, P, B = hippo.dplr("legs", 256)
    C = torch.randn(1, 2, 128, 2, dtype=torch.float64)
    stored = {
        "inv_dt": torch.tensor([[-6.0], [-3.0]], dtype=torch.float64),
        "A_real": torch.log(-Lambda.real)[None],
        "A_imag": Lambda.imag[None],
        "B": torch.view_as_real(B.conj().resolve_conj())[None, None],
        "P": torch.view_as_real(P.conj().resolve_conj())[:, None],
        "C": C,
        "l_kernel": torch.tensor(100),
    }
    A, _, row, _ = s4.convert.layer(stored).dense()
    found = row - (row[:, None] @ torch.linalg.matrix_power(A, 100))[:, 0]
    want = 2 * torch.cat([C[0, ..., 0], -C[0, ..., 1]], -1)
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-8 * float(want.abs().max()))
