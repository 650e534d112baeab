"""The original's models as S4Model."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from s4.block import S4Block
from s4.checks import check_option
from s4.convert.blocks import Style, norm_of, place, read_block
from s4.convert.entries import Entries, some
from s4.convert.kinds import Options, Site, sites
from s4.model import S4Model

_NORMS = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


def model(
    state_dict: Mapping[str, Any],
    *,
    prenorm: bool | None = None,
    pooling: str | None = None,
    activation: str = "gelu",
    dropout: float = 0.0,
    tie_dropout: bool | None = None,
    discretization: str | None = None,
    dt_transform: str = "exp",
    real_transform: str = "exp",
    imag_transform: str = "none",
) -> S4Model:
    """The model of a state dict of the original repository, github.com/state-spaces/s4.

    Of its example.py, with either of its layers, or of its train.py: the `SequenceModel` of S4 layers, each
    with or without an FFN after it, between a linear or embedding encoder and a linear decoder.

    Args:
        state_dict: tensors by name; a checkpoint's "state_dict" or "model" is found.
        prenorm: None is the original's default: False in example.py; a `SequenceModel` tells by its last norm.
        pooling: as in `S4Model`; None is "mean" in example.py. A `SequenceModel` needs it: its decoder's mode
            "last" or "pool" ("mean") where it gives one output for a sequence, else "none".
        activation, dropout: as in `s4.convert.block`.
        tie_dropout: as there; None is True in example.py, else False.
        discretization, dt_transform, real_transform, imag_transform: as in `s4.convert.layer`; train.py has
            dt_transform="softplus", by its configurations.

    Returns:
        the model, with parameters of the dict's dtype on its device.

    Raises:
        ValueError, TypeError: a model of another form, or with no counterpart; keys that are missing or
            unknown; the message says which and what to do.
    """
    options = Options(discretization, dt_transform, real_transform, imag_transform)
    options.check()
    entries = Entries(state_dict)
    found = sites(entries)
    if pooling is not None:
        check_option("pooling", pooling, ("none", "mean", "last"))
    read = _example if re.search(r"(^|\.)s4_layers\.\d+\.$", _inner(found[0])) else _backbone
    style = Style(prenorm, activation, dropout, (read is _example) if tie_dropout is None else tie_dropout)
    made = read(entries, found, style, options, pooling)
    entries.check_known()
    return made
