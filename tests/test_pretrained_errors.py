"""Folders of layers, blocks and models that do not fit, and modules that cannot be written: what is said."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import build
from torch import nn
from torch.nn.utils import parametrizations

from s4 import S4Block, S4Layer, S4Model
from s4.pretrained import Pretrained


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


# What is done to the folder of a model, the error, and what it says.
DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        FileNotFoundError,
        "no config.json.*save_pretrained",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "no model.safetensors"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json is no JSON"),
    "of others": (
        lambda f: (f / "config.json").write_text('{"model_type": "s4"}'),
        ValueError,
        r"not written by save_pretrained of s4.*'format' and 'config'\. It is of s4\.transformers",
    ),
    "newer": (lambda f: edited(f, lambda c: c.update(format=2, s4="9.0")), ValueError, "format 2, of s4 9.0"),
    "another class": (
        lambda f: edited(f, lambda c: c.update(type="S4Layer")),
        ValueError,
        "is of class S4Layer: load it with S4Layer.from_pretrained",
    ),
    "an option that is not": (
        lambda f: edited(f, lambda c: c["config"]["blocks"][0].update(colour="red")),
        ValueError,
        "config of S4Block has no 'colour'; it has layer, norm",
    ),
    "an option of the layer that is not": (
        lambda f: edited(f, lambda c: c["config"]["blocks"][0]["layer"].update(l_max=9)),
        ValueError,
        "config of S4Layer has no 'l_max'",
    ),
    "an argument that is not": (
        lambda f: edited(f, lambda c: c["config"]["encoder"].update(size=9)),
        ValueError,
        "config of Linear of encoder has no 'size'",
    ),
    "a value that is not": (
        lambda f: edited(f, lambda c: c["config"]["blocks"][1]["layer"].update(mode="fast")),
        ValueError,
        "mode must be one of.*'fast'",
    ),
    "an encoder that is none": (
        lambda f: edited(f, lambda c: c["config"].update(encoder="Linear")),
        TypeError,
        "config of encoder must be a dict or None, got str",
    ),
    "no layer": (
        lambda f: edited(f, lambda c: c["config"]["blocks"][0].pop("layer")),
        ValueError,
        "needs 'layer'",
    ),
    "other sizes": (
        lambda f: edited(f, lambda c: c["config"]["blocks"][1]["layer"].update(d_state=10)),
        ValueError,
        r"does not fit config.json: blocks.1.layer.log_A_real has shape \(1, 4\) instead of \(1, 5\)",
    ),
    "missing": (
        lambda f: weights(f, lambda w: w.pop("blocks.0.layer.C")),
        ValueError,
        "blocks.0.layer.C is missing",
    ),
    "too many": (
        lambda f: weights(f, lambda w: w.update(extra=torch.ones(2))),
        ValueError,
        "extra is in no such",
    ),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        ValueError,
        "model.safetensors cannot be read",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_named(kind: str, tmp_path: Path) -> None:
    damage, error, message = DAMAGE[kind]
    build().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        S4Model.from_pretrained(tmp_path)


def replaced(**parts: nn.Module) -> S4Block:
    block = S4Block(S4Layer(6, 8), d_ff=4)
    for name, part in parts.items():
        setattr(block, name, part)
    return block


def quantised() -> S4Model:
    quantization = pytest.importorskip("torchao.quantization")
    model = build().float()
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), lambda module, name: name == "blocks.0.mixer.0"
    )
    return model


# No S4Layer and no S4Block, though they have their parameters.
Other = type("Other", (S4Layer,), {"forward": lambda self, u: 2 * u})
OtherBlock = type("OtherBlock", (S4Block,), {"forward": lambda self, u: 2 * u})
FF = {"up": nn.Linear(6, 4), "down": nn.Linear(4, 6)}


def stack(block: S4Block, encoder: nn.Module | None = None) -> S4Model:
    return S4Model(encoder or nn.Linear(3, 6), [S4Block(S4Layer(6, 8)), block], nn.Linear(6, 2))


REFUSED: dict[str, tuple[Callable[[], Pretrained], str]] = {
    "a replaced part": (lambda: replaced(mixer=nn.Identity()), "mixer was replaced by Identity"),
    "another eps": (lambda: replaced(norm=nn.LayerNorm(6, eps=0.1)), "norm was replaced by .*eps=0.1"),
    "another gelu": (lambda: replaced(activation=nn.GELU("tanh")), "activation was replaced by .*tanh"),
    "no norm": (
        lambda: replaced(feed_forward=nn.ModuleDict({**FF, "norm": nn.Identity()})),
        "feed_forward was",
    ),
    "another layer": (lambda: S4Block(Other(6, 8)), "layer is Other, with a forward of its own"),
    "another block": (lambda: stack(OtherBlock(S4Layer(6, 8))), "blocks.1 is OtherBlock, with a forward"),
    "parametrized": (
        lambda: stack(S4Block(S4Layer(6, 8)), parametrizations.weight_norm(nn.Linear(3, 6))),
        "encoder is parametrized",
    ),
    "quantised": (quantised, r"blocks\.0\.mixer\.0\.weight must be a plain tensor.*Int8Tensor"),
    "on meta": (lambda: S4Layer(6, 8, device="meta"), "log_dt must be a plain tensor in memory.*on meta"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_written_says_so_and_writes_nothing(kind: str, tmp_path: Path) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        make().save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    S4Layer(6, 8).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(self: Path, text: str) -> int:
        self.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        S4Layer(6, 8).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before, "no new weights beside the old config"


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """Whoever reads the old one meanwhile goes on reading that."""
    S4Layer(6, 8).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with (tmp_path / "model.safetensors").open("rb") as file:
        S4Layer(6, 8).save_pretrained(tmp_path)
        assert file.read() == before != (tmp_path / "model.safetensors").read_bytes()
