"""State dicts that have no counterpart, or are none: each is refused, and the message says what and why."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_convert import converted, stored
from torch import Tensor, nn

import s4.convert
from s4 import S4Layer

Change = Callable[[dict[str, Tensor]], dict[str, Any]]


def without(*keys: str) -> Change:
    return lambda p: {key: value for key, value in p.items() if key not in keys}


def plus(**shapes: tuple[int, ...]) -> Change:
    return lambda p: p | {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}


def set_to(key: str, value: Callable[[Tensor], Tensor]) -> Change:
    return lambda p: p | {key: value(p[key])}


def renamed(old: str, new: str) -> Change:
    return lambda p: {key.replace(old, new): value for key, value in p.items()}


def with_nan(value: Tensor) -> Tensor:
    value = value.clone()
    value.view(-1)[-1] = float("nan")
    return value


# file, what is done to its parameters, what the message must say
DICTS: dict[str, tuple[str, Change, str]] = {
    "channels": ("dplr", set_to("D", lambda D: D.repeat(2, 1)), "D has 2 rows.*channels=2.*no counterpart"),
    "rows of C": ("dplr", set_to("kernel.C", lambda C: C.repeat(3, 1, 1, 1)), "kernel.C.*a row, or two"),
    "kernel of two rows": (
        "diag-bilinear",
        lambda p: {k.removeprefix("kernel."): v for k, v in p.items() if k != "D"},
        "C has 2 rows.*does not tell.*with its D",
    ),
    "gate": ("block", plus(_orig_mod__input_gate__0__weight=(8, 4)), "input_gate is of.*`gate`.*layer in it"),
    "bottleneck": ("block", plus(_orig_mod__input_linear__weight=(4, 4)), "input_linear is of.*`bottleneck`"),
    "no output map": (
        "block",
        without("_orig_mod.output_linear.0.weight", "_orig_mod.output_linear.0.bias"),
        "no output_linear.*s4.convert.layer.*final_act=None",
    ),
    "no output bias": ("block", without("_orig_mod.output_linear.0.bias"), "output_linear.0.bias is missing"),
    "output of another width": (
        "block", set_to("_orig_mod.output_linear.0.weight", lambda w: w[:6]),
        r"weight must have shape \(8, 4\)",
    ),
    "two layers side by side": (
        "residual-block", plus(reverse_layer__layer__D=(1, 4)),
        "reverse_layer.*bidirectional=True.*each of the two",
    ),
    "shifting norm": (
        "residual-block",
        lambda p: {k: v for k, v in p.items() if "norm." not in k}
        | {"norm.norm.m": torch.zeros(1), "norm.norm.s": torch.ones(1)},
        "norm.norm.m.*TransposedLN.*transposed=True",
    ),
    "norm without bias": ("residual-block", without("norm.norm.bias"), "norm.norm.bias is missing"),
    "unknown key of a kernel": ("dplr", plus(kernel__E=(4,)), "kernel.E: of these keys nothing is known"),
    "unknown key of a layer": ("dplr", plus(E=(4,)), "E: of these keys nothing"),
    "unknown key of a block": ("block", plus(head__weight=(4,)), "head.weight: of these keys nothing"),
    "unknown key of a model": (
        "example-minimal", plus(head__weight=(4,)),
        "head.weight: of these keys nothing",
    ),
    "residual with parameters": (
        "train-prenorm", plus(model__layers__0__residual__affine=(1,)),
        "residual.affine",
    ),
    "missing D": ("dplr", without("D"), "D is missing beside kernel.C.*without 'kernel.'"),
    "missing C": ("dplr", without("kernel.C"), "kernel.C is missing: the state dict has kernel"),
    "missing B": ("dplr", without("kernel.B"), "kernel.B is missing"),
    "missing A_imag": ("dplr", without("kernel.A_imag"), "kernel.A_imag is missing"),
    "missing A_real": ("dplr", without("kernel.A_real"), "no real parts of A"),
    "missing inv_dt": ("dplr", without("kernel.inv_dt"), "kernel.inv_dt is missing"),
    "missing P": ("dplr", without("kernel.P"), "kernel.P is missing"),
    "missing l_kernel": ("dplr", without("kernel.l_kernel"), "kernel.l_kernel is missing"),
    "missing norm": ("example-minimal", without("norms.0.bias"), "norms.0.bias is missing"),
    "missing decoder": ("example-minimal", without("decoder.weight"), "decoder.weight is missing"),
    "missing block": (
        "example-minimal",
        lambda p: {k: v for k, v in p.items() if ".0." not in k[:12]},
        r"s4_layers must be numbered from 0.*\[1\]",
    ),
    "shape of B": (
        "dplr", set_to("kernel.B", lambda B: B[:, :2]),
        r"kernel.B must have shape.*got \(1, 2, 4, 2\)",
    ),
    "shape of C": ("dplr", set_to("kernel.C", lambda C: C[..., 0]), "kernel.C must have shape"),
    "shape of P": ("dplr", set_to("kernel.P", lambda P: P[:, :1]), "kernel.P must have shape"),
    "shape of dt": (
        "dplr", set_to("kernel.inv_dt", lambda dt: dt[:3]),
        "kernel.A_real has 4 rows.*3 channels",
    ),
    "steps of another number of modes": (
        "dplr", set_to("kernel.inv_dt", lambda dt: dt.repeat(1, 3)),
        r"kernel.inv_dt must have 1 or 4 columns, got \(4, 3\)",
    ),
    "steps that are 0": (
        "dplr", set_to("kernel.inv_dt", lambda dt: dt - 800),
        "the kernel at 'kernel.', C would have inf or nan, with steps from 0 to 0: .*another dt_transform",
    ),
    "length below 0": (
        "dplr", set_to("kernel.l_kernel", lambda n: n - 99),
        "l_kernel must be an integer.*-83",
    ),
    "nan": ("dplr", set_to("kernel.C", with_nan), "kernel.C is not finite"),
    "complex numbers": (
        "residual-block", set_to("layer.output_linear.0.weight_v", lambda v: v.to(torch.complex128)),
        "weight_v must hold real numbers, got torch.complex128",
    ),
    "a mask": ("diag-zoh", set_to("kernel.B", lambda B: B > 0), "B must hold real numbers, got torch.bool"),
    "infinite": ("dplr", set_to("kernel.A_imag", lambda a: a / 0), "kernel.A_imag is not finite"),
    "version 2": ("version3-dplr", without("kernel.kernel.L"), "kernel.kernel.L is missing"),
    "version 2, log_w_real": (
        "version3-dplr",
        lambda p: renamed("inv_w_real", "log_w_real")(without("kernel.kernel.L")(p)),
        "version 2 or older.*does not tell the length",
    ),
    "version 2, Q": ("version3-dplr", plus(kernel__kernel__Q=(1, 4, 4, 2)), "version 2 or older"),
    "another kernel": ("dplr", renamed("A_real", "A_other"), "no real parts of A"),
    "one of ours": (
        "dplr", lambda _: dict(S4Layer(4, 8).state_dict()),
        "log_A_real, B and D.*this library.*load_state_dict",
    ),
    "no layer": ("dplr", lambda _: dict(nn.Linear(2, 2).state_dict()), "no S4 layer.*There are weight, bias"),
    "compiled and not": (
        "dplr", lambda p: p | {f"_orig_mod.{key}": value for key, value in p.items()},
        "the same twice, with _orig_mod.D, .* and without",
    ),
    "nothing": ("dplr", lambda _: {}, "no S4 layer.*no keys"),
    "a model of another form": (
        "example-minimal", renamed("s4_layers", "stack"),
        "no model found around.*stack.0",
    ),
    "another layer in a model": (
        "train-prenorm", plus(model__layers__3__layer__mha__weight=(4, 4)),
        r"layers.3 is neither of S4 nor an FFN",
    ),
    "an FFN with no S4 before it": (
        "train-prenorm",
        lambda p: {k.replace("layers.1.", "layers.9.").replace("layers.0.", "layers.1.").replace("9", "0"): v
                   for k, v in p.items()},
        "layers.0 is an FFN with no S4 block right before it",
    ),
    "an FFN with another norm": (
        "train-postnorm", without("model.layers.1.norm.norm.weight", "model.layers.1.norm.norm.bias"),
        "model.layers.1.norm is of kind 'none', but that of the S4 block before it 'layer'",
    ),
    "another encoder": (
        "train-prenorm", renamed("encoder.0.", "encoder.0.conv."),
        "encoder must be one linear",
    ),
    "another decoder": (
        "train-prenorm", renamed("output_transform", "retrieval"),
        "decoder must be a linear map",
    ),
    "a language model": (
        "train-postnorm", renamed("0.output_transform.", "0."), r"encoder.0.weight.*sqrt\(d_model\).*rescale",
    ),
}  # fmt: skip


@pytest.mark.promise(
    "other libraries",
    "of the original: `channels` above 1, gates, bottlenecks, `disc='dss'`, kernels of version 2",
    supported=False,
)
@pytest.mark.parametrize("name", DICTS)
def test_what_has_no_counterpart_is_refused(name: str) -> None:
    file, change, message = DICTS[name]
    it = stored(file)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        converted(it, change(dict(it.parameters)))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dplr", {"discretization": "dss"}, "dss.*no counterpart"),
        ("diag-zoh", {"discretization": "dss"}, "dss.*no counterpart"),
        ("diag-zoh", {"discretization": "euler"}, "discretization must be one of 'zoh', 'bilinear'.*euler"),
        ("dplr", {"discretization": "zoh"}, "None or 'bilinear'.*kernel.P.*DPLR.*'zoh'"),
        ("dplr", {"dt_transform": "sinh"}, "dt_transform must be one of 'none', 'exp'.*sinh"),
        ("dplr", {"real_transform": "square"}, "real_transform must be one of"),
        ("dplr", {"imag_transform": ""}, "imag_transform must be one of"),
        ("dplr", {"dt_transform": "none"}, "inv_dt comes to -.*'none'.*another transform"),
        ("diag-zoh", {"real_transform": "none"}, "A_real comes to -.*'none'"),
        ("version3-dplr", {"dt_transform": "softplus"}, "inv_w_real.*version 3.*no option dt_transform"),
        ("version3-diag", {"imag_transform": "exp"}, "inv_A_real.*version 3.*no option imag_transform"),
        ("minimal", {"real_transform": "relu"}, "log_A_real.*minimal S4D.*no option real_transform"),
        ("minimal", {"discretization": "bilinear"}, "minimal S4D.*no option discretization"),
        ("block", {"activation": "elu"}, "activation must be one of.*elu"),
        ("block", {"dropout": 1.0}, "dropout must be below 1"),
        ("train-prenorm", {"pooling": "sum"}, "pooling must be one of.*sum"),
        ("train-prenorm", {"pooling": None}, "pooling must be given.*mode"),
        ("train-prenorm", {"dt_transform": None}, "dt_transform must be given: .*inv_dt.*softplus.*exp"),
        ("residual-block", {"dt_transform": None}, "dt_transform must be given: .*inv_dt"),
        ("train-prenorm", {"prenorm": False}, "prenorm must be None or True.*there is model.norm.norm"),
        ("train-postnorm", {"prenorm": True}, "prenorm must be None or False.*there is no model.norm.norm"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    it = stored(name)
    with pytest.raises(ValueError, match=message):
        converted(it._replace(arguments=it.arguments | arguments))


def test_options_that_say_what_is_so_are_taken() -> None:
    for name, discretization in (("dplr", "bilinear"), ("minimal", "zoh"), ("version3-dplr", "bilinear")):
        it = stored(name)
        made = s4.convert.layer(it.parameters, discretization=discretization)
        assert made.discretization == discretization


def test_a_layer_of_a_residual_block_has_to_be_told_how_steps_are_stored() -> None:
    """As that block has: its train.py has another default than its classes, which a layer elsewhere has."""
    with pytest.raises(
        ValueError, match=r"dt_transform must be given: layer.layer.kernel.inv_dt.*'softplus'"
    ):
        s4.convert.layer(stored("residual-block").parameters)
    for name in ("block", "dplr"):
        parameters = stored(name).parameters
        untold, told = (s4.convert.layer(parameters, dt_transform=each) for each in (None, "exp"))
        assert torch.equal(untold.log_dt, told.log_dt)


@pytest.mark.parametrize("name", ["layer", "block"])
def test_several_layers_are_named(name: str) -> None:
    it = stored("train-prenorm")
    places = (
        "model.layers.0.layer.layer., model.layers.2"
        if name == "layer"
        else "model.layers.0., model.layers.2."
    )
    with pytest.raises(
        ValueError, match=f"2 S4 layers, at {re.escape(places)}.*s4.convert.model.*startswith"
    ) as e:
        getattr(s4.convert, name)(it.parameters)
    prefix = re.findall(r"startswith\('(.*)'\)", str(e.value))[0]
    part = {key: value for key, value in it.parameters.items() if key.startswith(prefix)}
    made = getattr(s4.convert, name)(part, dt_transform="exp")  # what the message says to do
    assert made.config()["d_model" if name == "layer" else "norm"] == (4 if name == "layer" else "layer")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nn.Linear(2, 2), r"give module.state_dict\(\)"),
        ([1, 2], "dict of tensors by name, got list"),
        ("model.ckpt", "got str: s4.convert.load reads one"),
        ({"D": 3.0}, "'D': float"),
        ({1: torch.zeros(2)}, "1: Tensor"),
        ({"state_dict": {"kernel.C": "x"}}, "'kernel.C': str"),
    ],
)
@pytest.mark.parametrize("name", ["layer", "block", "model"])
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_state_dict_is_refused(name: str, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        getattr(s4.convert, name)(given)
