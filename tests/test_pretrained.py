"""Configs of layers, blocks and models, and their folders: what is written is read, or it says why not."""

import collections
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import build, inputs
from torch import nn

from s4 import S4Block, S4Layer, S4Model, hippo
from s4.pretrained import Pretrained


def half(layer: S4Layer) -> S4Layer:
    """In bfloat16 but for what keeps time, as docs/accuracy.md advises."""
    exact = layer.log_dt.detach().clone(), layer.A_imag.detach().clone()
    layer.bfloat16()
    layer.log_dt.data, layer.A_imag.data = exact
    return layer


def tied() -> S4Model:
    encoder, decoder = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 11, bias=False)
    decoder.weight = encoder.weight
    return S4Model(encoder, [S4Block(S4Layer(6, 8))], decoder, norm=nn.RMSNorm(6, eps=1e-3))


def batch_normed() -> S4Model:
    """With running statistics away from where they begin."""
    plain = build("mixed", "batch", "mean")
    model = S4Model(plain.encoder, plain.blocks, plain.decoder, norm=nn.BatchNorm1d(6).double())
    model.train()(inputs(4))
    return model


def twice() -> S4Model:
    """With modules in two places, which share their numbers."""
    relu, block = nn.ReLU(), S4Block(S4Layer(6, 8), norm="batch")
    block.train()(torch.randn(3, 9, 6))
    encoder = nn.Sequential(nn.Linear(3, 6), relu, nn.Linear(6, 6), relu)
    return S4Model(encoder, [block, block], nn.Linear(6, 2))


LAYERS: dict[str, Callable[[], Pretrained]] = {
    "dplr": lambda: S4Layer(6, 8),
    "rank 2, systems": lambda: S4Layer(6, 8, init="legt", n_ssm=3, dt_min=0.01, mode="scan"),
    "diag, both": lambda: S4Layer(6, 8, variant="diag", init="inv", bidirectional=True, dtype="float64"),
    "bilinear": lambda: S4Layer(6, 8, variant="diag", discretization="bilinear", backend="torch"),
    "own": lambda: S4Layer(6, 8, init=hippo.dplr("legt", 8)),
    "mixed dtypes": lambda: half(S4Layer(6, 8)),
}
BLOCKS: dict[str, Callable[[], Pretrained]] = {
    "block": lambda: S4Block(S4Layer(6, 8)),
    "other block": lambda: S4Block(
        S4Layer(6, 8, variant="diag"),
        norm="batch",
        prenorm=False,
        activation="silu",
        dropout=0.1,
        residual_dropout=0.2,
        tie_dropout=True,
        mixer="linear",
        d_ff=5,
    ),
    "bare block": lambda: S4Block(S4Layer(6, 8), norm="none", activation="none"),
}
MODELS: dict[str, Callable[[], Pretrained]] = {
    "stack": lambda: build("mixed", "final norm", "mean"),
    "batch norm": batch_normed,
    "tied": tied,
    "twice": twice,
}
EVERY = {**LAYERS, **BLOCKS, **MODELS}


def input_of(module: Pretrained) -> torch.Tensor:
    encoder = getattr(module, "encoder", None)
    if isinstance(encoder, nn.Embedding):
        return torch.randint(11, (2, 9))
    p = next(module.parameters())
    return torch.randn(2, 9, 3 if encoder is not None else 6).to(p.dtype)


def equal(a: Pretrained, b: Pretrained) -> None:
    """Same kinds, parameters of one name, dtype and value, and outputs."""
    assert str(a.eval()) == str(b.eval())
    assert list(a.state_dict()) == list(b.state_dict())
    for name, value in a.state_dict().items():
        other = b.state_dict()[name]
        assert value.dtype == other.dtype, name
        assert torch.equal(value, other), name
    assert [n for n, _ in a.named_parameters()] == [n for n, _ in b.named_parameters()]
    u = input_of(a)
    assert torch.equal(a(u), b(u))


@pytest.mark.promise(
    "other libraries", "`save_pretrained` and `from_pretrained` of layers, blocks and models, as safetensors"
)
@pytest.mark.parametrize("kind", EVERY)
def test_a_folder_holds_the_module(kind: str, tmp_path: Path) -> None:
    module = EVERY[kind]()
    for p in module.parameters():
        p.data += 0.01 * torch.randn_like(p)
    module.save_pretrained(tmp_path / "new" / "folder")
    before = torch.get_rng_state()
    again = type(module).from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(before, torch.get_rng_state()), "reading draws no numbers"
    assert not again.training
    equal(module, again)
    assert all(p.requires_grad for p in again.parameters())
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", EVERY)
def test_a_config_makes_a_module_of_the_same_kind(kind: str) -> None:
    module = EVERY[kind]()
    config = json.loads(json.dumps(module.config()))
    again = type(module).from_config(config)
    assert json.loads(json.dumps(again.config())) == config
    assert {n: p.shape for n, p in again.state_dict().items()} == {
        n: p.shape for n, p in module.state_dict().items()
    }
    assert all(bool(torch.isfinite(p).all()) for p in again.parameters()), "it begins as a new one does"


def test_a_synchronised_norm_is_a_batch_norm() -> None:
    assert nn.SyncBatchNorm.convert_sync_batchnorm(batch_normed()).config() == batch_normed().config()


def test_tied_parameters_are_written_once_and_tied_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tied().save_pretrained(tmp_path)
    assert "decoder.weight" not in load_file(tmp_path / "model.safetensors")
    again = S4Model.from_pretrained(tmp_path)
    assert again.decoder.weight is again.encoder.weight
    assert isinstance(again.norm, nn.RMSNorm)
    assert (again.norm.eps, again.encoder.padding_idx) == (1e-3, 0)


def test_the_file_is_one_of_safetensors_with_plain_names(tmp_path: Path) -> None:
    from safetensors import safe_open

    (layer := S4Layer(6, 8)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(layer.state_dict())
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "whoever may read other new files may read these"
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["config"] == layer.config()
    assert (content["format"], content["type"]) == (1, "S4Layer")


class Own(nn.Module):
    """An encoder that no config describes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 6)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """(B, L, 3) to (B, L, 6)."""
        return self.inner(u).tanh()


def test_modules_of_ones_own_are_given(tmp_path: Path) -> None:
    model = S4Model(Own(), [S4Block(S4Layer(6, 8))], nn.Sequential(nn.Linear(6, 6), nn.Softmax(-1)))
    model.save_pretrained(tmp_path)
    given = {"encoder": Own(), "decoder.1": nn.Softmax(-1)}
    again = S4Model.from_pretrained(tmp_path, modules=given)
    equal(model, again)
    with pytest.raises(ValueError, match=r"encoder is .*test_pretrained\.Own.*modules=\{'encoder': "):
        S4Model.from_pretrained(tmp_path, modules={"decoder.1": nn.Softmax(-1)})
    with pytest.raises(ValueError, match=r"decoder\.1 is .*Softmax.*modules=\{'decoder\.1': "):
        S4Model.from_pretrained(tmp_path, modules={"encoder": Own()})
    with pytest.raises(ValueError, match=r"modules of S4Model.*encoder, norm, decoder.*'head'"):
        S4Model.from_pretrained(tmp_path, modules={**given, "head": Own()})
    with pytest.raises(
        ValueError, match=r"encoder, norm, decoder, and what is in a Sequential.*'decoder\.2'"
    ):
        S4Model.from_pretrained(tmp_path, modules={**given, "decoder.2": Own()})


def test_a_module_that_was_changed_is_no_longer_described() -> None:
    model = build()
    model.encoder.forward = model.encoder.forward
    assert model.config()["encoder"] == {"type": "torch.nn.modules.linear.Linear"}
    with pytest.raises(ValueError, match=r"encoder is torch\.nn\.modules\.linear\.Linear, which no config"):
        S4Model.from_config(model.config())


def test_a_sequential_with_names_is_given() -> None:
    encoder = nn.Sequential(collections.OrderedDict(up=nn.Linear(3, 6), curve=nn.ReLU()))
    config = S4Model(encoder, [S4Block(S4Layer(6, 8))], nn.Linear(6, 2)).config()
    with pytest.raises(ValueError, match=r"encoder is torch\..*Sequential.*modules=\{'encoder': "):
        S4Model.from_config(config)
    assert S4Model.from_config(config, {"encoder": encoder}).encoder is encoder


def test_arguments_that_no_config_has() -> None:
    """A module made with one is named alone: what is read would be another."""
    model = build()
    model.encoder = nn.Embedding(7, 6, scale_grad_by_freq=True)
    assert model.config()["encoder"] == {"type": "torch.nn.modules.sparse.Embedding"}
    model.encoder = nn.Embedding(7, 6)
    assert model.config()["encoder"]["type"] == "Embedding"


class Mine(S4Layer):
    """A subclass is of the same kind, and one of its own."""


def test_subclasses(tmp_path: Path) -> None:
    Mine(6, 8).save_pretrained(tmp_path / "mine")
    S4Layer(6, 8).save_pretrained(tmp_path / "plain")
    assert type(Mine.from_pretrained(tmp_path / "mine")) is Mine
    assert type(Mine.from_pretrained(tmp_path / "plain")) is Mine
    with pytest.raises(ValueError, match="is of class Mine"):
        S4Layer.from_pretrained(tmp_path / "mine")


def test_to_a_device(tmp_path: Path) -> None:
    S4Layer(6, 8).save_pretrained(tmp_path)
    moved: list[torch.device] = []

    class Moved(Own):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            moved.append(fn(torch.zeros(1)).device)
            return super()._apply(fn, recurse)

    S4Model(Own(), [S4Block(S4Layer(6, 8))], nn.Linear(6, 2)).save_pretrained(tmp_path / "model")
    S4Model.from_pretrained(tmp_path / "model", modules={"encoder": Moved()}, device="cpu")
    assert moved == [torch.device("cpu")], "what is in no file moves, too"
    with pytest.raises(ValueError, match="modules of S4Layer may be given for none, got 'encoder'"):
        S4Layer.from_pretrained(tmp_path, modules={"encoder": nn.Identity()})
