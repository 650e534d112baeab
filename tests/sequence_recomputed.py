"""Scenes of sequence_ranks.py with activation checkpointing, which runs a block again in backward."""

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import oracle
import torch.distributed as dist
from pieces import compare, cut, world
from refusals import refuses
from sequence_scenes import CUTS, inputs, layer, scene
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s4 import S4Block
from s4.distributed import sequence_parallel


def checkpointed(blocks: Sequence[nn.Module], reentrant: bool, **options: Any) -> Callable[..., Tensor]:
    def run(x: Tensor, state: None) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=reentrant, **options)
        return x

    return run


@scene(True, False)
@scene(False, False)
@scene(True, True)
@scene(False, True)
def recomputed(reentrant: bool, inside: bool) -> None:
    """By activation checkpointing, in a backward pass outside the `with` or inside."""
    blocks = nn.Sequential(
        S4Block(layer(), norm="batch", dropout=0.5, tie_dropout=True), S4Block(layer("diag", both=True))
    ).double()

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor, state: None) -> Tensor:
            return self.blocks(x)

    stack = Stack()
    blocks[0].norm.momentum = 0.0  # which a second pass would move again, as without pieces
    compare(stack, inputs(6, CUTS[0]), CUTS[0], run=checkpointed(stack.blocks, reentrant), inside=inside)


@scene()
def recomputed_here_or_there() -> None:
    """One graph holds a block that ran inside and outside: refused, unless told."""
    block, u = S4Block(layer()).double(), inputs(2, CUTS[0]).requires_grad_()
    own, alone = cut(u, CUTS[0]), dist.new_subgroups(1)[0]

    def loss(inside: dict[str, Any], outside: dict[str, Any]) -> Tensor:
        with sequence_parallel(world()):
            y = checkpoint(block, own, use_reentrant=False, **inside)
        return y.sum() + checkpoint(block, u, use_reentrant=False, **outside).square().sum()

    def told(group: dist.ProcessGroup) -> dict[str, Any]:
        return {"context_fn": lambda: (nullcontext(), sequence_parallel(group))}

    refuses(ValueError, "cannot tell", loss({}, {}).backward)
    gc.collect()  # with what was recorded
    own.grad = u.grad = None
    loss(told(world()), told(alone)).backward()
    x = u.detach().clone().requires_grad_()
    block(x).sum().backward()
    oracle.close(own.grad, cut(x.grad, CUTS[0]), 1e-9)
    x.grad = None
    block(x).square().sum().backward()
    oracle.close(u.grad, x.grad, 1e-9)


@scene()
def recomputed_in_evaluation() -> None:
    """A reentrant checkpoint looks there as a prediction does: refused, where the group is not there."""
    block, own = S4Block(layer()).double().eval(), cut(inputs(2, CUTS[0]), CUTS[0]).requires_grad_()
    with sequence_parallel(world()):
        y = checkpoint(block, own, use_reentrant=True)
    refuses(ValueError, "cannot tell", y.sum().backward)
