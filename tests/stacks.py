"""Small models, trained a little, and the ways through them: what tests of model, state, generation share."""

import copy
from functools import partial

import oracle
import torch
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model, State, param_groups

D_IN, D_MODEL, D_STATE, D_OUT, VOCABULARY, L = 3, 6, 8, 5, 11, 29

STACKS = {
    "dplr": [{"variant": "dplr"}, {"variant": "dplr", "init": "legt", "n_ssm": 2}],
    "diag": [{"variant": "diag"}, {"variant": "diag", "init": "lin", "discretization": "bilinear"}],
    "mixed": [{"variant": "dplr", "init": "fout"}, {"variant": "diag", "init": "inv"}],
}
BLOCKS = {
    "prenorm": {},
    "postnorm": {"prenorm": False, "mixer": "linear"},
    "batch": {"norm": "batch"},
    "rms": {"norm": "rms", "dropout": 0.3, "tie_dropout": True},
    "final norm": {},  # after the last block, before the pooling
}
TABLE = [
    ("dplr", "prenorm", "none"),
    ("dplr", "batch", "mean"),
    ("diag", "postnorm", "last"),
    ("diag", "rms", "none"),
]
TABLE += [("mixed", "prenorm", "mean"), ("mixed", "postnorm", "none")]
TABLE += [("mixed", "final norm", pooling) for pooling in ("none", "mean", "last")]


def build(
    stack: str = "mixed",
    block: str = "prenorm",
    pooling: str = "none",
    *,
    tokens: bool = False,
    both: bool = False,
) -> S4Model:
    """Two layers, float64; the decoder is not linear, so that pooling must come before it."""
    encoder = nn.Embedding(VOCABULARY, D_MODEL) if tokens else nn.Linear(D_IN, D_MODEL)
    layers = [
        S4Layer(D_MODEL, D_STATE, bidirectional=both, dt_min=0.01, **options) for options in STACKS[stack]
    ]
    blocks = [S4Block(layer, **BLOCKS[block]) for layer in layers]
    decoder = nn.Sequential(nn.Linear(D_MODEL, VOCABULARY if tokens else D_OUT), nn.Tanh())
    norm = nn.LayerNorm(D_MODEL) if block == "final norm" else None
    return S4Model(encoder, blocks, decoder, pooling=pooling, norm=norm).double()


def trained(*arguments: str, **keywords: bool) -> S4Model:
    """After six steps of AdamW on noise: a model away from its initialisation, in eval mode."""
    model = build(*arguments, **keywords)
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.02, weight_decay=0.01, ssm_lr=0.02))
    first = copy.deepcopy(model.state_dict())
    for _ in range(6):
        u = inputs(4, keywords.get("tokens", False))
        model(u).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(first[name], p) for name, p in model.named_parameters())
    return model.eval()


def inputs(batch: int = 3, tokens: bool = False, length: int = L) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length)) if tokens else torch.randn(batch, length, D_IN).double()


def tensors(state: State) -> list[Tensor]:
    return [*state.layers, state.total, state.length]


def same(got: State, want: State, tolerance: float = 1e-9) -> None:
    for g, w in zip(tensors(got), tensors(want), strict=True):
        oracle.close(g, w, tolerance)


def incoming(model: S4Model, batch: int = 3) -> State:
    """The state some inputs leave, a leaf of its own."""
    _, state = model(inputs(batch, isinstance(model.encoder, nn.Embedding), 7), return_state=True)
    layers = tuple(x.detach().requires_grad_() for x in state.layers)
    return State(layers, state.total.detach().requires_grad_(), state.length)


def in_steps(model: S4Model, u: Tensor, state: State, rate: float = 1.0) -> tuple[Tensor, State]:
    outputs = []
    for t in range(u.shape[1]):
        y, state = model.step(u[:, t], state, rate=rate)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def in_chunks(model: S4Model, u: Tensor, state: State, rate: float = 1.0) -> tuple[list[Tensor], State]:
    outputs = []
    for chunk in u.split([1, 11, u.shape[1] - 13, 1], 1):
        y, state = model(chunk, state, rate=rate, return_state=True)
        outputs.append(y)
    return outputs, state


def small(pooling: str = "none", both: bool = False) -> S4Model:
    """Of two blocks, for tokens below seven."""
    blocks = [S4Block(S4Layer(4, 8, bidirectional=both)) for _ in range(2)]
    return S4Model(nn.Embedding(7, 4), blocks, nn.Linear(4, 7), pooling=pooling)


def one_block_state() -> State:
    return S4Model(nn.Embedding(7, 4), [S4Block(S4Layer(4, 8))], nn.Linear(4, 7)).initial_state(2)


def offloaded(module: nn.Module) -> nn.Module:
    """A copy with its parameters on meta, as accelerate offloads: a module's are there in its `forward`."""
    copied = copy.deepcopy(module)
    for part in copied.modules():
        own = dict(part.named_parameters(recurse=False))
        away = {name: nn.Parameter(p.detach().to("meta")) for name, p in own.items()}

        def place(part: nn.Module, *_: object, found: dict[str, nn.Parameter]) -> None:
            for name, p in found.items():
                setattr(part, name, p)

        if own:
            place(part, found=away)
            part.register_forward_pre_hook(partial(place, found=own))
            part.register_forward_hook(partial(place, found=away), always_call=True)
    return copied
