"""Programs of torch.export, one for every batch and length: `python tests/exported.py fft` prints errors.

In a process of its own, without the shape checks that pytest installs, which torch.export would trace.
"""

import io
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from s4 import S4Block, S4Layer, S4Model

D_MODEL, D_STATE = 3, 8
LENGTHS = (1, 2, 33, 257)
BATCHES = (1, 5)


class Part(nn.Module):
    """A part of a module as a program: `call` is given the module and the program's inputs."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, u: Tensor, second: Any, third: Any = None) -> Any:
        """Named arguments: torch 2.9 loses sight of others in the conditions of a program."""
        return self.call(self.module, u, second, *([] if third is None else [third]))


def with_state(module: Any, u: Tensor, state: Any, lengths: Tensor) -> Any:
    return module(u, state, lengths=lengths, return_state=True)


def with_lengths(module: Any, u: Tensor, lengths: Tensor) -> Any:
    return module(u, lengths=lengths)


def stepping(module: Any, u: Tensor, state: Any) -> Any:
    return module.step(u[:, 0], state)


def saved(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def inputs(module: nn.Module, call: Callable[..., Any], B: int, L: int) -> tuple[Any, ...]:
    u = torch.randn(B, L, D_MODEL)
    lengths = torch.randint(1, L + 1, (B,))
    if call is with_lengths:
        return u, lengths
    state = module.initial_state(B)  # type: ignore[operator]
    state = pytree.tree_map(lambda x: x + torch.randn(x.shape).to(x.dtype).abs(), state)
    return (u, state, lengths) if call is with_state else (u, state)


def error(got: Any, want: Any) -> float:
    """The largest of all parts, each over the largest of its own."""
    pairs = zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True)
    return max(
        float((g - w).detach().abs().max() / w.detach().abs().max().clamp(min=1e-30)) for g, w in pairs
    )


def worst(module: nn.Module, call: Callable[..., Any], automatic: bool) -> tuple[float, str]:
    """The largest error of a program that was saved and loaded, over lengths and batches, and its ranges."""
    part, first = Part(module, call), inputs(module, call, 3, 70)
    b, length = (Dim.AUTO, Dim.AUTO) if automatic else (Dim("batch", min=1), Dim("length", min=1))
    sizes: list[Any] = pytree.tree_map(lambda t: {0: b}, list(first))
    sizes[0] = {0: b, 1: length}
    program = export(part, first, dynamic_shapes=tuple(sizes))
    ranges = sorted(str(r) for r in program.range_constraints.values())
    run = saved(program).module()
    found = 0.0
    for B, L in itertools.product(BATCHES, LENGTHS):
        given = inputs(module, call, B, L)
        found = max(found, error(run(*given), part(*given)))
    return found, ", ".join(ranges)


# Of each mode both variants, both directions, and dimensions by name and automatic (True); together, of each
# variant both directions.
LAYERS = {
    "fft": (("dplr", False, False), ("diag", True, True)),
    "scan": (("diag", False, True), ("dplr", True, False)),
    "auto": (("dplr", False, True), ("diag", True, False)),
}


def cases(mode: str) -> Iterator[tuple[str, nn.Module, Callable[..., Any], bool]]:
    for variant, both, automatic in LAYERS[mode]:
        layer = S4Layer(D_MODEL, D_STATE, variant=variant, mode=mode, bidirectional=both)
        name, call = ("both ways with", with_lengths) if both else ("with state and", with_state)
        yield f"{variant} layer {name} lengths", layer, call, automatic
    plain = S4Layer(D_MODEL, D_STATE, mode=mode, backend="torch")
    if mode != "auto":
        yield "layer of plain PyTorch", plain, with_state, False
        return
    blocks = [
        S4Block(S4Layer(D_MODEL, D_STATE, variant=variant), norm=norm, d_ff=4)
        for variant, norm in (("dplr", "layer"), ("diag", "batch"))
    ]
    yield "block", blocks[0], with_state, False
    for pooling, stack in (("none", blocks[1:]), ("mean", blocks[:1]), ("last", blocks)):
        model = S4Model(nn.Linear(D_MODEL, D_MODEL), stack, nn.Linear(D_MODEL, 2), pooling=pooling).eval()
        yield f"model with pooling {pooling}", model, with_state, False
    yield "step of a layer", plain, stepping, False
    yield "step of a model", model, stepping, False


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, *case in cases(sys.argv[1]):
        print(json.dumps([name, *worst(*case)]), flush=True)
