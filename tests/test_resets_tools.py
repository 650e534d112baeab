"""Resets in a block and a model, under derivatives of derivatives, forward mode, vmap and autocast."""

from itertools import pairwise
from typing import Any

import oracle
import pytest
import torch
from oracle import close
from test_resets import CASES, LINEAR, H, at, build, by_segments, ways
from test_resets import Given as Inputs
from torch import Tensor, nn
from torch.func import jvp, vmap

from s4 import S4Block, S4Model, State


def stack(pooling: str, **options: Any) -> S4Model:
    blocks = [S4Block(build("dplr"), **options), S4Block(build("diag"), **options)]
    return S4Model(
        nn.Linear(2, H).double(),
        blocks,
        nn.Linear(H, 4).double(),
        norm=nn.LayerNorm(H).double(),
        pooling=pooling,
    )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("pooling", ["none", "mean", "last"])
def test_a_model_is_its_steps_with_states_reset(pooling: str, given: bool) -> None:
    """Outputs, the whole state and gradients of parameters; rows of several lengths and segments."""
    L, lengths = 11, torch.tensor([11, 6, 0, 11])
    model, u = stack(pooling), torch.randn(4, L, 2).double()
    resets = at(L, [[0, 4], [2, 5, 6, 9], [0, 3], []])
    start = model.initial_state(4)
    if given:
        start = model(torch.randn(4, 5, 2).double(), return_state=True)[1].detach()
    state, outputs = start, torch.zeros(4, L, 4).double()
    pooled = torch.zeros(4, 4).double()
    for t in range(L):
        y, after = model.step(u[:, t], state.reset(resets[:, t]))
        here = t < lengths
        outputs[:, t] = torch.where(here[:, None], y, 0)
        pooled = torch.where(here[:, None], y, pooled)
        rows = [(a, b) for a, b in zip(flat(after), flat(state), strict=True)]
        x = [torch.where(here.view(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in rows]
        state = State(tuple(x[:-2]), x[-2], x[-1])
    got, last = model(u, start if given else None, lengths=lengths, resets=resets, return_state=True)
    want = outputs if pooling == "none" else pooled
    full = lengths > 0  # there is nothing to pool in an empty sequence
    rows = slice(None) if pooling == "none" else full
    close(got[rows], want[rows].detach(), 1e-9)
    assert torch.equal(last.length, state.length)
    for a, b in zip(flat(last), flat(state), strict=True):
        close(a, b.detach(), 1e-9)
    g = torch.randn_like(want[rows])
    parameters = list(model.parameters())
    found = [torch.autograd.grad(y[rows], parameters, g, allow_unused=True) for y in (got, want)]
    for a, b in zip(*found, strict=True):
        close(a, b, 1e-8)


def flat(state: State) -> list[Tensor]:
    return [*state.layers, state.total, state.length]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_batch_norm_leaves_padding_out(prenorm: bool, both: bool) -> None:
    """In training, a padded batch with resets is one row of the same segments: outputs and statistics."""
    lengths, L = [12, 5, 1], 12
    layer = build("dplr, both ways" if both else "dplr")
    block, again = (S4Block(layer, norm="batch", prenorm=prenorm).train() for _ in range(2))
    again.load_state_dict(block.state_dict())
    u, resets = torch.randn(3, L, H).double(), at(L, [[3, 4], [0, 2, 7], [5]])
    for row, length in zip(u, lengths, strict=True):
        row[length:] = torch.nan
    packed = torch.cat([row[:length] for row, length in zip(u, lengths, strict=True)])[None]
    row = torch.cat([(torch.arange(n) == 0) | r[:n] for r, n in zip(resets, lengths, strict=True)])[None]
    got = block(u, lengths=torch.tensor(lengths), resets=resets)
    want = again(packed, resets=row)
    close(torch.cat([y[:n] for y, n in zip(got, lengths, strict=True)]), want[0].detach(), 1e-9)
    close(block.norm.running_var, again.norm.running_var, 1e-9)
    close(block.norm.running_mean, again.norm.running_mean, 1e-9)


@ways
@pytest.mark.parametrize("case", LINEAR)
def test_gradients_of_gradients(case: str, mode: str, backend: str) -> None:
    """Of a loss that is no quadratic, by inputs and parameters, against the oracle's."""
    L, layer = 23, build(case, mode=mode, backend=backend)
    leaves = dict(layer.named_parameters()) | {"u": torch.randn(1, L, H).double().requires_grad_()}
    given = Inputs(leaves["u"], None, torch.tensor([L]), at(L, [[0, 5, 6, 17]]))
    found = []
    for y in (
        layer(leaves["u"], resets=given.resets),
        by_segments(leaves, layer.discretization, given, 1.0)[0],
    ):
        grads = torch.autograd.grad(y.pow(3).sum(), list(leaves.values()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values())))
    for name, got, want in zip(leaves, *found, strict=True):
        close(got, want, 1e-8, name)


@pytest.mark.promise(
    "torch.func and forward mode", "`resets`: `jvp` and `vmap` over inputs, in every mode and both directions"
)
@ways
@pytest.mark.parametrize("case", LINEAR)
def test_forward_mode_and_vmap(case: str, mode: str, backend: str) -> None:
    """A layer with resets is linear in its inputs; where they are is the same for all of a vmap."""
    L, layer = 41, build(case, mode=mode, backend=backend)
    u, v = torch.randn(2, 2, L, H).double()
    resets = at(L, [[0, 5, 6], [17]])
    want = layer(v, resets=resets).detach()
    close(jvp(lambda u: layer(u, resets=resets), (u,), (v,))[1], want, 1e-10)
    both = vmap(lambda u: layer(u, resets=resets))(torch.stack([u, v]))
    close(both[1], want, 1e-10)
    if not layer.bidirectional:
        at_ = torch.tensor([[3, 5, -1], [16, 17, 40]])
        found = jvp(lambda u: layer.states(u, at_, resets=resets), (u,), (v,))[1]
        close(found, layer.states(v, at_, resets=resets).detach(), 1e-10)


@pytest.mark.promise(
    "half precision", "a scan with `resets` under autocast to bfloat16, within 2% of the largest output"
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_autocast(case: str, backend: str) -> None:
    """Of each segment's own largest output, as no segment meets another."""
    L, cuts = 130, [0, 40, 97, 130]
    layer = build(case, torch.float32, mode="scan", backend=backend)
    scale = torch.tensor([1e4, 1.0, 1e-3]).repeat_interleave(torch.tensor(cuts).diff())[:, None]
    u = (torch.randn(2, L, H) * scale).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(u, resets=at(L, [cuts[1:3]] * 2))
    assert torch.autograd.grad(y.sum(), [u])[0].isfinite().all()
    for start, stop in pairwise(cuts):
        want = oracle.forward(
            oracle.discrete(dict(layer.named_parameters()), layer.discretization), u[:, start:stop]
        )
        close(y[:, start:stop], want[0], 0.02)
