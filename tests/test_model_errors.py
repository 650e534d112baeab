"""What S4Model refuses, and what it says then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refusals import EITHER, Kind, refuses
from stacks import one_block_state, small
from torch import nn

from s4 import S4Block, S4Layer, S4Model, State


def bent(**parts: torch.Tensor) -> State:
    """The state of `small` for a batch of two with some of it replaced."""
    return small().initial_state(2)._replace(**parts)


def between(encoder: nn.Module, decoder: nn.Module | None = None, norm: nn.Module | None = None) -> S4Model:
    """One block of width four."""
    return S4Model(encoder, [S4Block(S4Layer(4, 8))], decoder or nn.Linear(4, 7), norm=norm)


T = torch.zeros(2, 5, dtype=torch.long)
U = torch.zeros(2, 5, 3)
X = torch.zeros(2, 4, 8)
ERRORS: dict[str, tuple[Callable[[], Any], Kind, str]] = {
    "unknown pooling": (lambda: small("max"), ValueError, "pooling.*mean.*max"),
    "no block": (lambda: S4Model(nn.Identity(), [], nn.Identity()), EITHER, "blocks"),
    "no S4Block": (
        lambda: S4Model(nn.Identity(), [S4Layer(4, 8)], nn.Identity()),
        TypeError,
        "blocks.*S4Layer",
    ),
    "widths": (
        lambda: S4Model(nn.Identity(), [S4Block(S4Layer(4, 8)), S4Block(S4Layer(6, 8))], nn.Identity()),
        ValueError,
        "blocks.*4.*6",
    ),
    "no encoder": (lambda: S4Model(5, [S4Block(S4Layer(4, 8))], nn.Identity()), TypeError, "encoder.*5"),
    "a function as encoder": (
        lambda: S4Model(lambda u: u, [S4Block(S4Layer(4, 8))], nn.Identity()),
        TypeError,
        "encoder.*function",
    ),
    "no decoder": (
        lambda: S4Model(nn.Identity(), [S4Block(S4Layer(4, 8))], None),
        TypeError,
        "decoder.*None",
    ),
    "a block as blocks": (
        lambda: S4Model(nn.Identity(), S4Block(S4Layer(4, 8)), nn.Identity()),
        TypeError,
        "blocks.*S4Block",
    ),
    "blocks none": (lambda: S4Model(nn.Identity(), None, nn.Identity()), TypeError, "blocks.*None"),
    "no norm": (
        lambda: S4Model(nn.Identity(), [S4Block(S4Layer(4, 8))], nn.Identity(), norm=5),
        TypeError,
        "norm.*5",
    ),
    "an encoder of another width": (
        lambda: between(nn.Embedding(7, 5)),
        ValueError,
        "encoder must.*d_model=4, got embedding_dim=5",
    ),
    "an encoder that ends in another width": (
        lambda: between(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.GELU(), nn.Linear(4, 6)))),
        ValueError,
        "encoder must.*d_model=4, got out_features=6",
    ),
    "an encoder that gives another width": (
        lambda: between(nn.Sequential(nn.Linear(3, 6), nn.GELU()))(U),
        ValueError,
        r"output of the encoder must have shape.*4.*\(2, 5, 6\)",
    ),
    "an encoder that gives another width to step": (
        lambda: between(nn.Sequential(nn.Linear(3, 6), nn.GELU())).step(U[:, 0], one_block_state()),
        ValueError,
        r"output of the encoder must have shape.*4.*\(2, 1, 6\)",
    ),
    "an encoder that gives tokens": (lambda: between(nn.Identity())(T), TypeError, "encoder.*int64"),
    "an encoder of another dtype": (
        lambda: between(nn.Linear(3, 4))(U.double()),
        TypeError,
        "u, the input of the encoder, must suit.*float32.*float64",
    ),
    "numbers without channels": (
        lambda: between(nn.Linear(1, 4))(U[..., 0]),
        ValueError,
        r"u, the input of the encoder, must have shape \(\.\.\., 1\), got \(2, 5\)",
    ),
    "channels in the second place": (
        lambda: between(nn.Sequential(nn.Linear(3, 4), nn.GELU()))(U.mT),
        ValueError,
        r"encoder, must have shape \(\.\.\., 3\), got \(2, 3, 5\)",
    ),
    "tokens to a linear encoder": (lambda: between(nn.Linear(3, 4))(T), TypeError, "encoder.*float32.*int64"),
    "a norm of another width": (
        lambda: between(nn.Linear(3, 4), norm=nn.RMSNorm(6)),
        ValueError,
        r"norm must.*d_model=4.*\(6,\)",
    ),
    "a decoder of another width": (
        lambda: between(nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2))),
        ValueError,
        r"decoder must.*d_model=4, got normalized_shape=\(6,\)",
    ),
    "a decoder of another dtype": (
        lambda: between(nn.Linear(3, 4), nn.Linear(4, 2).double())(U),
        TypeError,
        "input of the decoder must suit.*float64.*float32",
    ),
    "total of another dtype": (
        lambda: small("mean")(T, bent(total=torch.zeros(2, 4).double())),
        TypeError,
        r"state\.total.*float32.*float64",
    ),
    "length of another dtype": (
        lambda: small("mean")(T, bent(length=torch.zeros(2))),
        TypeError,
        r"state\.length.*int64.*float32",
    ),
    "layers of another dtype": (
        lambda: small("mean")(T, small().initial_state(2).to(torch.float64)),
        TypeError,
        "state.*float32.*float64",
    ),
    "total elsewhere": (
        lambda: small("mean").step(T[:, 0], bent(total=torch.zeros(2, 4, device="meta"))),
        ValueError,
        r"state\.total.*cpu.*meta",
    ),
    "state elsewhere": (
        lambda: small("mean").step(T[:, 0], small().initial_state(2).to("meta")),
        ValueError,
        "state.*cpu.*meta",
    ),
    "poolings": (lambda: small(["mean"]), EITHER, r"pooling.*\['mean'\]"),
    "u of rank 1": (lambda: small()(T[0]), ValueError, r"u .*\(5,\)"),
    "u a list": (lambda: small()([[1, 2]]), EITHER, "u .*list"),
    "lengths elsewhere": (
        lambda: small("mean")(T, lengths=torch.tensor([1, 2], device="meta")),
        ValueError,
        "lengths .*meta",
    ),
    "total of another width": (lambda: small("mean")(T, bent(total=torch.zeros(2, 3))), ValueError, "state"),
    "total of another width in step": (
        lambda: small("mean").step(T[:, 0], bent(total=torch.zeros(2, 3))),
        ValueError,
        "state",
    ),
    "length of another batch": (
        lambda: small("mean")(T, bent(length=torch.zeros(3, dtype=torch.long))),
        ValueError,
        "state",
    ),
    "lengths too long": (lambda: small("mean")(T, lengths=torch.tensor([2, 6])), ValueError, "lengths .*6"),
    "lengths of another batch": (
        lambda: small()(T, lengths=torch.tensor([2])),
        ValueError,
        r"lengths .*\(1,\)",
    ),
    "a layer's state": (lambda: small()(T, X), EITHER, "state"),
    "another stack's state": (
        lambda: small()(T, one_block_state()),
        ValueError,
        "state.*2 layers.*got one of 1",
    ),
    "another batch's state": (lambda: small()(T, small().initial_state(3)), ValueError, "state"),
    "another batch's state in step": (
        lambda: small().step(T[:, 0], small().initial_state(3)),
        ValueError,
        "state",
    ),
    "a layer's state in step": (lambda: small().step(T[:, 0], X), EITHER, "state"),
    "state both ways": (lambda: small(both=True)(T, return_state=True), ValueError, "bidirectional"),
    "no rate": (lambda: small()(T, rate=0.0), ValueError, "rate.*0"),
    "last of nothing": (lambda: small("last")(T[:, :0]), ValueError, "last"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "kind", "match"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], Any], kind: Kind, match: str) -> None:
    refuses(kind, match, call)
