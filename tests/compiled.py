"""What torch.compile makes of a layer, counted: `python tests/compiled.py fft` prints a line for each case.

`python tests/compiled.py fft whole` tries every combination. In a process of its own, without the shape
checks that pytest installs, which a compiler would have to trace.
"""

import itertools
import json
import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from s4 import S4Layer

LENGTHS, BATCHES = (2, 31, 65, 257), (2, 5)
ALL_LENGTHS, ALL_BATCHES = (2, 3, 5, 8, 13, 31, 64, 65, 100, 128, 200, 257), (2, 3, 5)
# Lengths and batches that torch has graphs of their own for.
ALL_SMALL = ((70, 1), (1, 2), (1, 1), (0, 3), (7, 0))
SMALL = {"fft": ((70, 1), (1, 2), (0, 3), (7, 0)), "scan": ((1, 1), (0, 3), (7, 0)), "auto": ()}
D_MODEL, D_STATE = 3, 8


class Case(NamedTuple):
    """A layer, and how it is called; `backend` is the library's, "torch" where no code is fused."""

    mode: str
    variant: str
    bidirectional: bool
    how: str  # "training", "eval", "eval without gradients"
    what: str  # of "state", "lengths", "resets" and "rate", those that are in it
    backend: str
    dynamic: str  # "", "dynamic=True", "mark_dynamic"


def cases(mode: str, whole: bool) -> list[Case]:
    """Some combinations of variant, direction and call, which are enough; or, if `whole`, all of them."""
    calls = [
        (False, what) for what in ("", "state", "lengths", "state and lengths", "state, lengths, resets")
    ]
    calls += [(True, what) for what in ("", "lengths", "resets", "resets, rate")]
    calls += [(False, "state, lengths, resets, rate")] if mode == "auto" else []
    found = []
    if whole:
        for variant, (both, what) in itertools.product(("dplr", "diag"), calls):
            for how, backend in (("eval without gradients", "auto"), ("training", "auto"), ("eval", "torch")):
                found.append(Case(mode, variant, both, how, what, backend, ""))
    for variant, what in (("dplr", "state, lengths, resets"), ("diag", "lengths")):
        found.append(Case(mode, variant, variant == "diag", "eval without gradients", what, "auto", ""))
    dplr, diag = ("", "state") if mode == "auto" else ("state", "state and lengths")
    found.append(Case(mode, "dplr", False, "training", dplr, "auto", ""))
    found.append(Case(mode, "diag", False, "training", diag, "auto", ""))
    found.append(Case(mode, "dplr", True, "training", "lengths, resets", "auto", ""))
    found.append(Case(mode, "diag", False, "eval", "state and lengths", "torch", "mark_dynamic"))
    rate = ", rate" if mode == "auto" else ""
    found.append(Case(mode, "diag", True, "training", f"resets{rate}", "torch", "dynamic=True"))
    return found


def arguments(case: Case, B: int, L: int) -> tuple[Tensor, dict[str, Any]]:
    u = torch.randn(B, L, D_MODEL)
    options: dict[str, Any] = {}
    if "state" in case.what:
        options = {"state": torch.randn(B, D_MODEL, D_STATE), "return_state": True}
    if "lengths" in case.what:
        options["lengths"] = torch.randint(min(1, L), L + 1, (B,))
    if "resets" in case.what:
        options["resets"] = torch.rand(B, L) < 0.1
    if "rate" in case.what:
        options["rate"] = torch.rand(B, L) + 0.5
    if case.dynamic == "mark_dynamic":
        torch._dynamo.mark_dynamic(u, 1)
        for t in (u, *(t for t in options.values() if isinstance(t, Tensor))):
            torch._dynamo.mark_dynamic(t, 0)
    return u, options


def count(case: Case, whole: bool) -> tuple[int, float, float]:
    """Graphs for all lengths and batches; the largest error of a value, and of a gradient."""
    torch._dynamo.reset()
    counters.clear()
    layer = S4Layer(
        D_MODEL,
        D_STATE,
        variant=case.variant,
        mode=case.mode,
        bidirectional=case.bidirectional,
        backend=case.backend,
    ).train(case.how == "training")
    dynamic = True if case.dynamic == "dynamic=True" else None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    differentiated = case.how != "eval without gradients"
    value = gradient = 0.0
    graphs = 0
    few = SMALL[case.mode] if (case.variant, case.bidirectional) == ("diag", False) else ()
    small = (ALL_SMALL if whole else few) if case.how == "training" and not case.dynamic else ()
    shapes = [*itertools.product(*((ALL_LENGTHS, ALL_BATCHES) if whole else (LENGTHS, BATCHES)))]
    for i, (L, B) in enumerate((*shapes, *small)):
        if i == len(shapes):
            graphs = counters["stats"]["unique_graphs"]
        u, options = arguments(case, B, L)
        with torch.set_grad_enabled(differentiated):
            both = [f(u, **options) for f in (compiled, layer)]
            got, want = [y if isinstance(y, tuple) else (y,) for y in both]
        value = max(value, *map(error, got, want))
        if differentiated:
            losses = [sum(y.square().sum() for y in found) for found in (got, want)]
            grads = [
                torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True, materialize_grads=True)
                for loss in losses
            ]
            gradient = max(gradient, *map(error, *grads))
    return graphs or counters["stats"]["unique_graphs"], value, gradient


def error(got: Tensor, want: Tensor) -> float:
    if want.numel() == 0:
        return 0.0 if got.shape == want.shape else math.inf
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


if __name__ == "__main__":
    torch.manual_seed(0)
    whole = sys.argv[2:] == ["whole"]
    for case in cases(sys.argv[1], whole):
        print(json.dumps([*case, *count(case, whole)]), flush=True)
