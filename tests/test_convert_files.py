"""Checkpoints as files, and `python -m s4.convert`: nothing of a file is run, nothing is lost or replaced."""

import argparse
import collections
import functools
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_convert import FILES, apart, output, stored
from torch import nn

import s4.convert
from s4 import S4Block, S4Layer, S4Model
from s4.convert.__main__ import main

Capture = pytest.CaptureFixture[str]


class Strange:
    """Of no library that one who reads the file has."""

    def __init__(self) -> None:
        self.content = {"lr": 0.1}


class Box(dict[str, Any]):
    """A dict with attributes, as configurations of several libraries are."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.name = "a box"


class Trap:
    """Runs a function when it is unpickled."""

    def __init__(self, path: Path, function: Any = open) -> None:
        self.function, self.path = function, path

    def __reduce__(self) -> Any:
        return self.function, (str(self.path), "w") if self.function is open else (f"touch {self.path}",)


def lightning(**more: Any) -> dict[str, Any]:
    """As the original's train.py saves: weights beside objects of libraries."""
    weights = {f"model.{key}": value for key, value in stored("block").parameters.items()}
    return {
        "state_dict": collections.OrderedDict(weights),
        "hyper_parameters": {"config": argparse.Namespace(lr=0.1), "strange": Strange(), "path": Path("a")},
        "hparams_type": Strange,
        "boxes": [Box(), Box(lr=0.1), Box(lr=0.1, inner=Box(a=1, b=2))],
        "loops": {
            "counts": collections.defaultdict(dict, {"a": {"b": 1}}),
            "partial": functools.partial(max),
        },
        **more,
    }


@pytest.mark.promise("other libraries", "Lightning checkpoints of the original, read with none of their code")
def test_a_checkpoint_with_objects_of_libraries_is_read(tmp_path: Path) -> None:
    torch.save(lightning(), tmp_path / "last.ckpt")
    it = stored("block")
    made = s4.convert.block(s4.convert.load(tmp_path / "last.ckpt"))
    assert apart(output(made.eval(), it), it.truth["y"]) < 1e-10


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    torch.save(lightning(trap=Trap(tmp_path / "opened")), tmp_path / "trap.ckpt")
    loaded = s4.convert.load(tmp_path / "trap.ckpt")
    assert isinstance(s4.convert.block(loaded), S4Block)
    assert not (tmp_path / "opened").exists()
    import os

    torch.save(lightning(trap=Trap(tmp_path / "touched", os.system)), tmp_path / "shell.ckpt")
    with pytest.raises(
        ValueError, match=r"shell.ckpt cannot be read with weights_only=True: .*(posix|nt).*trust"
    ):
        s4.convert.load(tmp_path / "shell.ckpt")
    assert not (tmp_path / "touched").exists()
    # What was let through is not left behind.
    with pytest.raises(Exception, match="weights_only"):
        torch.load(tmp_path / "trap.ckpt", weights_only=True)


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_state_dicts_of_both_formats_and_safetensors(zipped: bool, tmp_path: Path) -> None:
    parameters = stored("dplr").parameters
    torch.save(parameters, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    save_file(parameters, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        loaded = s4.convert.load(str(tmp_path / name))
        assert all(torch.equal(value, loaded[key]) for key, value in parameters.items())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("whole.pt", nn.GELU(), "whole.pt holds a pickled module.*state_dict.* alone"),
        ("tensor.pt", torch.zeros(3), r"tensor.pt holds Tensor, no dict"),
        ("text.pt", None, r"text.pt cannot be read with weights_only=True: [^.]*operand"),
        ("text.safetensors", None, "text.safetensors cannot be read as safetensors"),
    ],
)
def test_files_that_hold_no_dict(name: str, content: Any, message: str, tmp_path: Path) -> None:
    if content is None:
        (tmp_path / name).write_text("no checkpoint at all")
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=message):
        s4.convert.load(tmp_path / name)


def test_no_file_and_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing.pt"):
        s4.convert.load(tmp_path / "nothing.pt")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"dplr.safetensors needs the package safetensors"):
        s4.convert.load(FILES / "dplr.safetensors")


# The command line


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float64) -> str:
    torch.save(stored(name, dtype).parameters, folder / f"{name}.pt")
    return str(folder / f"{name}.pt")


@pytest.mark.parametrize(
    ("name", "kind", "options", "taken"),
    [
        (
            "dplr-transforms",
            S4Layer,
            "--dt-transform softplus --real-transform relu --imag-transform exp",
            "dt_transform=softplus",
        ),
        ("diag-bilinear", S4Layer, "--discretization bilinear", "discretization=bilinear, dt_transform=exp"),
        (
            "residual-block-batch-postnorm",
            S4Block,
            "--no-prenorm --dt-transform exp",
            "prenorm=False, activation=gelu, dt_transform=exp",
        ),
        (
            "example-minimal",
            S4Model,
            "",
            "prenorm=False, activation=gelu, pooling=mean, discretization=zoh",
        ),
        (
            "example-dplr-prenorm",
            S4Model,
            "--prenorm",
            "prenorm=True, activation=gelu, pooling=mean, dt_transform=exp",
        ),
        (
            "train-prenorm",
            S4Model,
            "--pooling last --dt-transform exp",
            "prenorm=True, activation=gelu, pooling=last, dt_transform=exp",
        ),
    ],
)
def test_a_file_becomes_a_folder(
    name: str, kind: Any, options: str, taken: str, tmp_path: Path, capsys: Capture
) -> None:
    it, out = stored(name), tmp_path / "out"
    main([saved(name, tmp_path), str(out), *options.split()])
    report = capsys.readouterr().out
    assert apart(output(kind.from_pretrained(out), it), it.truth["y"]) < 1e-10
    n = len(it.parameters)
    assert f"{name}.pt: {n} tensors, of them {n} read" in report
    assert all(f"  {key} -> " in report for key in it.parameters)
    assert "left out: nothing" in report
    assert f"what weights do not tell, as given or by default: {taken}\n" in report
    assert f"{out}: config.json and model.safetensors of {kind.__name__}" in report


def test_options_of_training_and_a_part_of_a_model(tmp_path: Path, capsys: Capture) -> None:
    source, out = saved("train-prenorm", tmp_path), str(tmp_path / "out")
    prefix = ["--prefix", "model.layers.2.", "--dt-transform", "exp"]
    main([source, out, *prefix, "--dropout", "0.2", "--tie-dropout", "--activation", "relu"])
    config = S4Block.from_pretrained(out).config()
    assert [config[key] for key in ("dropout", "residual_dropout", "tie_dropout", "activation")] == [
        0.2, 0.2, True, "relu",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert "not of model.layers.2.: " in said
    assert "encoder.0.weight" in said
    main([source, out, *prefix, "--part", "layer", "--overwrite"])
    left = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: "))
    assert "model.layers.2.layer.output_linear.0.weight" in left
    assert "kernel" not in left
    assert S4Layer.from_pretrained(out).d_model == 4


@pytest.mark.parametrize("prefix", ["_orig_mod.layer.", "layer."])
def test_a_prefix_as_the_file_has_it(prefix: str, tmp_path: Path, capsys: Capture) -> None:
    """`block.safetensors` is of a model that was compiled."""
    main([saved("block", tmp_path), str(tmp_path / "out"), "--prefix", prefix, "--part", "layer"])
    assert "left out: nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dplr", ["--prenorm"], r"--prenorm is an option of a block or model; .*dplr.pt is of a layer"),
        ("block", ["--pooling", "mean"], r"--pooling is an option of a model; .*block.pt is of a block"),
        ("train-prenorm", [], "pooling must be given"),
        ("train-prenorm", ["--pooling", "last"], "dt_transform must be given.*softplus"),
        (
            "train-prenorm",
            ["--part", "layer", "--prefix", "model.layers.0."],
            "dt_transform must be given.*softplus",
        ),
        ("train-prenorm", ["--part", "layer"], "2 S4 layers, at model.layers.0"),
        ("dplr", ["--official", "nowhere"], "no models/s4/s4.py in nowhere: give a checkout"),
        ("dplr", ["--prefix", "encoder."], "no S4 layer"),
    ],
)
def test_what_is_wrong_is_a_line_of_text(
    name: str, options: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=rf"^s4.convert: .*{message}"):
        main([saved(name, tmp_path), str(out), *options])
    assert not out.exists()
    assert capsys.readouterr().out == ""


def test_a_layer_is_no_model() -> None:
    parameters = {key.removeprefix("_orig_mod."): value for key, value in stored("block").parameters.items()}
    with pytest.raises(ValueError, match=r"no model found around the S4 layers at the top\. "):
        s4.convert.model(parameters)


def test_a_folder_is_replaced_only_if_told(tmp_path: Path) -> None:
    source, out = saved("dplr", tmp_path), tmp_path / "out"
    main([source, str(out)])
    before = (out / "model.safetensors").read_bytes()
    other = saved("dplr-rank2-shared", tmp_path)
    with pytest.raises(SystemExit, match=r"out already has config.json, model.safetensors.*--overwrite"):
        main([other, str(out)])
    assert (out / "model.safetensors").read_bytes() == before
    main([other, str(out), "--overwrite"])
    assert S4Layer.from_pretrained(out).n_ssm == 1
    with pytest.raises(SystemExit, match="is a file: OUT is the folder"):
        main([source, other])


def test_help_and_the_module(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "argv", ["s4.convert", "--help"])
    monkeypatch.delitem(sys.modules, "s4.convert.__main__")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("s4.convert", run_name="__main__")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "python -m s4.convert last.ckpt lra --pooling mean --dt-transform softplus" in text


# A stand-in for a checkout: its classes, computed by the dense truth.
OFFICIAL = """
import sys
import numpy as np, torch
from torch import nn
import official_dense as dense


class FFTConv(nn.Module):
    def __init__(self, d_model, bidirectional, activation, transposed, mode, d_state, n_ssm, init, rank,
                 dt_tie, dt_transform, real_transform, imag_transform, backend, verbose, disc="bilinear",
                 is_real=False):
        super().__init__()
        assert activation is None and not transposed and backend == "naive" and mode in ("dplr", "diag")
        self.kind = disc, dict(dt=dt_transform, real=real_transform, imag=imag_transform)
        n = d_state if is_real else d_state // 2
        pair = () if is_real else (2,)
        self.D = nn.Parameter(torch.zeros(1, d_model))
        self.kernel = nn.Module()
        shapes = dict(inv_dt=(d_model, 1 if dt_tie else n), A_real=(n_ssm, n), B=(1, n_ssm, n, *pair),
                      C=(1 + bidirectional, d_model, n, *pair))
        if not is_real:
            shapes["A_imag"] = (n_ssm, n)
        if mode == "dplr":
            shapes["P"] = (rank, n_ssm, n, 2)
            self.kernel.register_buffer("l_kernel", torch.tensor(0))
        for name, shape in shapes.items():
            self.kernel.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, u):
        p = {name: value.numpy() for name, value in self.state_dict().items()}
        y = dense.run(dense.systems(p, self.kind[0], **self.kind[1]), u.double().numpy())[0]
        return torch.from_numpy(y).to(u.dtype) * SCALE, None
"""
MINIMAL = """
from torch import nn
class S4D(nn.Module):
    pass
"""


@pytest.mark.parametrize("scale", [1.0, 1.001])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dplr", ""),
        ("dplr-rank3-both-ways", ""),
        ("dplr-dt-per-mode", ""),
        ("diag-bilinear", "--discretization bilinear"),
        ("diag-real", ""),
        ("dplr-transforms", "--dt-transform softplus --real-transform relu --imag-transform exp"),
    ],
)
def test_the_report_has_the_difference_from_a_checkout(
    name: str, options: str, scale: float, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout that is off by a thousandth is reported so."""
    for module in ("models", "models.s4", "models.s4.s4", "models.s4.s4d"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    folder = tmp_path / "checkout" / "models" / "s4"
    folder.mkdir(parents=True)
    (folder / "s4.py").write_text(OFFICIAL.replace("SCALE", str(scale)))
    (folder / "s4d.py").write_text(MINIMAL)
    checkout = str(tmp_path / "checkout")
    main([saved(name, tmp_path), str(tmp_path / "out"), "--official", checkout, *options.split()])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  the layer: "))
    in_float64 = float(line.split()[2])
    assert in_float64 < 1e-10 if scale == 1.0 else 0.0009 < in_float64 < 0.0011
    for module in ("models", "models.s4", "models.s4.s4", "models.s4.s4d"):
        monkeypatch.delitem(sys.modules, module, raising=False)
