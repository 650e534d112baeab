"""The original's models as S4Model."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from s4.block import S4Block
from s4.checks import check_option
from s4.convert.blocks import Style, check_one_way, norm_of, place, read_block
from s4.convert.entries import Entries, some, undisturbed
from s4.convert.kinds import Options, Site, sites
from s4.model import S4Model

_FORMS = (
    "s4.convert.model knows those of example.py (encoder, s4_layers, norms, decoder) and train.py "
    "(encoder.0, model.layers, model.norm, decoder.0); of others, s4.convert.block and s4.convert.layer "
    "convert parts"
)


def model(
    state_dict: Mapping[str, Any],
    *,
    prenorm: bool | None = None,
    pooling: str | None = None,
    activation: str = "gelu",
    dropout: float = 0.0,
    tie_dropout: bool | None = None,
    discretization: str | None = None,
    dt_transform: str | None = None,
    real_transform: str = "exp",
    imag_transform: str = "none",
) -> S4Model:
    """The model of a state dict of the original repository, github.com/state-spaces/s4.

    Of its example.py, with either of its layers, or of its train.py: the `SequenceModel` of S4 blocks, each
    with or without an FFN after it, between a linear or embedding encoder and a linear decoder. What its
    weights do not tell and no argument says gives other outputs without an error: see `s4.convert.block`.

    Args:
        state_dict: tensors by name; a checkpoint's "state_dict" or "model" is found.
        prenorm: None is False, the default, in example.py; a `SequenceModel` tells by its last norm.
        pooling: as in `s4.S4Model`; None is "mean" in example.py. A `SequenceModel` needs it: its decoder's
            mode, "last", or "mean" for "pool", where it gives one output for a sequence, else "none"; its
            modes "first", "sum" and "ragged" have no counterpart.
        activation, dropout: as in `s4.convert.block`; those of an FFN are the same.
        tie_dropout: as there; None is True in example.py, else False.
        discretization, real_transform, imag_transform: as in `s4.convert.layer`.
        dt_transform: as there; None is "exp". A `SequenceModel` of version 4 needs it: "softplus", unless its
            configuration had another.

    Returns:
        the model, in training mode, with parameters of the dict's dtype on its device.

    Raises:
        ValueError, TypeError: a model of another form, or with no counterpart; keys that are missing or
            unknown; the message says which and what to do.

    Examples:
        >>> original = {f"s4_layers.0.{name}": value for name, value in {
        ...     "D": torch.ones(4),
        ...     "kernel.log_dt": torch.full((4,), -5.0),
        ...     "kernel.C": torch.randn(4, 32, 2),
        ...     "kernel.log_A_real": torch.zeros(4, 32),
        ...     "kernel.A_imag": torch.arange(32.0).repeat(4, 1),
        ...     "output_linear.0.weight": torch.randn(8, 4, 1),
        ...     "output_linear.0.bias": torch.zeros(8),
        ... }.items()}
        >>> original |= {f"encoder.{n}": p for n, p in nn.Linear(3, 4).state_dict().items()}
        >>> original |= {f"norms.0.{n}": p for n, p in nn.LayerNorm(4).state_dict().items()}
        >>> original |= {f"decoder.{n}": p for n, p in nn.Linear(4, 10).state_dict().items()}
        >>> model(original)(torch.randn(2, 100, 3)).shape  # of example.py
        torch.Size([2, 10])
    """
    options = Options(discretization, dt_transform, real_transform, imag_transform)
    options.check()
    if pooling is not None:
        check_option("pooling", pooling, ("none", "mean", "last"))
    entries = Entries.of(state_dict)
    check_one_way(entries)
    found = {site: place(entries, site).inner for site in sites(entries)}
    example = _numbered(found, "s4_layers", "")
    tie = bool(example) if tie_dropout is None else tie_dropout
    style = Style(prenorm, activation, dropout, tie)
    with undisturbed():
        if example:
            made = _example(entries, *example, style, options, "mean" if pooling is None else pooling)
        elif backbone := _numbered(found, "layers", "layer."):
            made = _backbone(entries, *backbone, style, options, pooling)
        else:
            places = some(at or "the top" for at in found.values())
            raise ValueError(f"no model found around the S4 layers at {places}. {_FORMS}")
    entries.check_known()
    return made


def form(entries: Entries) -> str:
    """Whether a state dict is of a "model", a "block" or a "layer", by what is around its S4 layers."""
    found = sites(entries)
    if len(found) > 1 or any(name.startswith(("encoder.", "decoder.")) for name in entries):
        return "model"
    try:
        place(entries, found[0])
    except ValueError:
        return "layer"
    return "block"


def _numbered(found: Mapping[Site, str], name: str, inner: str) -> tuple[str, dict[int, Site]] | None:
    """What is before `name` in all places root + name.number.inner, and the layers by number."""
    places = {site: re.fullmatch(rf"(|.*\.){name}\.(\d+)\.{inner}", at) for site, at in found.items()}
    roots = {at and at[1] for at in places.values()}
    if len(roots) != 1 or None in roots:
        return None
    return roots.pop() or "", {int(at[2]): site for site, at in places.items() if at}


def _example(
    entries: Entries, root: str, layers: dict[int, Site], style: Style, options: Options, pooling: str
) -> S4Model:
    """A model of the original's example.py."""
    _check_numbers(layers, f"{root}s4_layers")
    blocks = []
    for i, site in sorted(layers.items()):
        at = place(entries, site)._replace(norm=f"{root}norms.{i}.", around="example")
        blocks.append(read_block(entries, site, at, style, options))
    encoder = _linear(entries, f"{root}encoder.", "encoder")
    return S4Model(encoder, blocks, _linear(entries, f"{root}decoder.", "decoder"), pooling=pooling)


def _backbone(
    entries: Entries, root: str, layers: dict[int, Site], style: Style, options: Options, pooling: str | None
) -> S4Model:
    """A model of the original's train.py, by the prefix of its SequenceModel."""
    if pooling is None:
        raise ValueError(
            "pooling must be given, as the decoder of a SequenceModel has no parameter that tells its mode: "
            "'last', or 'mean' for its mode 'pool', if it has one output for a sequence, else 'none'"
        )
    last = f"{root}norm.norm."
    prenorm = bool(entries.under(last))
    blocks = _blocks(entries, root, layers, style._replace(prenorm=prenorm), options)
    normed = not isinstance(blocks[0].norm, nn.Identity)
    if normed and style.prenorm not in (None, prenorm):
        there = "is" if prenorm else "is no"
        raise ValueError(
            f"prenorm must be None or {prenorm}, as there {there} {last[:-1]}, got {style.prenorm}"
        )
    kind, values = norm_of(entries, last if prenorm else None, blocks[0].layer.d_model)
    made = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}[kind] if prenorm else None
    norm = None if made is None else _loaded(made(blocks[0].layer.d_model), values)
    outer = root.removesuffix("model.")
    encoder, decoder = _ends(entries, f"{outer}encoder.", f"{outer}decoder.")
    return S4Model(encoder, blocks, decoder, norm=norm, pooling=pooling)


def _blocks(
    entries: Entries, root: str, layers: dict[int, Site], style: Style, options: Options
) -> list[S4Block]:
    """The blocks of a SequenceModel, each with the FFN after it."""
    numbers = {int(name.split(".")[0]) for name in entries.under(f"{root}layers.")}
    ffs = {i for i in numbers if entries.under(f"{root}layers.{i}.layer.ff.")}
    if others := numbers - ffs - layers.keys():
        names = entries.under(f"{root}layers.{min(others)}.")
        raise ValueError(
            f"{root}layers.{min(others)} is neither of S4 nor an FFN: it has {some(names)}. {_FORMS}"
        )
    _check_numbers(numbers, f"{root}layers")
    if alone := [i for i in ffs if i - 1 not in layers]:
        raise ValueError(f"{root}layers.{min(alone)} is an FFN with no S4 block right before it. {_FORMS}")
    return [
        read_block(entries, site, place(entries, site), style, options,
                   f"{root}layers.{i + 1}." if i + 1 in ffs else "")
        for i, site in sorted(layers.items())
    ]  # fmt: skip


def _ends(entries: Entries, encoder: str, decoder: str) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of the original's train.py."""
    names, last = set(entries.under(encoder)), set(entries.under(decoder))
    if last == {"0.output_transform.weight", "0.output_transform.bias"}:
        out = f"{decoder}0.output_transform."
    elif last == {"0.weight", "0.bias"}:
        out = f"{decoder}0."
    else:
        raise ValueError(
            f"{decoder[:-1]} must be a linear map of each position, but has {some(last)}. {_FORMS}"
        )
    if names == {"0.weight", "0.bias"}:
        return _linear(entries, f"{encoder}0.", "encoder"), _linear(entries, out, "decoder")
    if names != {"0.weight"}:
        raise ValueError(
            f"{encoder[:-1]} must be one linear map or embedding, but has {some(names)}. {_FORMS}"
        )
    if out == f"{decoder}0.":
        raise ValueError(
            f"{encoder}0.weight is an embedding which the original's language models multiply by "
            "sqrt(d_model) unless rescale=False: the dict does not tell. Multiply it, or not, and rename "
            f"{decoder}0.weight and bias to {decoder}0.output_transform.weight and bias"
        )
    weight = entries.take(f"{encoder}0.weight", "encoder", (-1, -1))
    return _loaded(nn.Embedding(*weight.shape), {"weight": weight}), _linear(entries, out, "decoder")


def _linear(entries: Entries, prefix: str, became: str) -> nn.Module:
    weight = entries.take(f"{prefix}weight", became, (-1, -1))
    bias = entries.take(f"{prefix}bias", became, (len(weight),))
    return _loaded(nn.Linear(weight.shape[1], weight.shape[0]), {"weight": weight, "bias": bias})


def _loaded(module: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    module.to(values["weight"]).load_state_dict(values)
    return module


def _check_numbers(numbers: Collection[int], name: str) -> None:
    if sorted(numbers) != list(range(len(numbers))):
        raise ValueError(f"{name} must be numbered from 0 with none left out, got {sorted(numbers)}")
