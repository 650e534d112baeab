"""A rank's piece of a sequence against the whole, run by the same module in one process."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import torch
import torch.distributed as dist
from torch import Tensor, nn

from s4 import State
from s4.distributed import sequence_parallel

WORLD = 4


def world() -> dist.ProcessGroup:
    return dist.group.WORLD


def cut(t: Tensor, pieces: Sequence[int]) -> Tensor:
    """This rank's piece of (B, L, ...), a leaf."""
    part = t.detach().split(list(pieces), 1)[dist.get_rank()].clone()
    return part.requires_grad_(t.requires_grad)


def weights(like: Tensor) -> list[Tensor]:
    """Numbers of no symmetry, another tensor for each rank, the same on all."""
    generator = torch.Generator().manual_seed(7)
    shape = (WORLD, *like.shape)
    return list(torch.randn(shape, generator=generator, dtype=torch.float64).to(like.dtype))


def summed(shares: list[tuple[Tensor | None, Tensor]]) -> list[Tensor]:
    """The sums over the ranks of gradients, or of zeros like the tensors beside them, by one message."""
    parts = [torch.zeros_like(like) if grad is None else grad for grad, like in shares]
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    found = flat.split([part.numel() for part in parts])
    return [f.view_as(part) for f, part in zip(found, parts, strict=True)]


def flat(state: Any) -> list[Tensor]:
    if isinstance(state, State):
        return [*state.layers, state.total]
    return [] if state is None else [state]


def leaf(state: Any) -> Any:
    """The same state of leaves."""
    if isinstance(state, State):
        layers = tuple(x.detach().clone().requires_grad_() for x in state.layers)
        return State(layers, state.total.detach().clone().requires_grad_(), state.length)
    return None if state is None else state.detach().clone().requires_grad_()


def compare(
    module: nn.Module,
    u: Tensor,
    pieces: Sequence[int],
    state: Any = None,
    *,
    run: Callable[..., Any] | None = None,
    pooled: bool = False,
    until: Tensor | None = None,
    seed: int = 0,
    inside: bool = False,
    tolerance: float = 1e-9,
    **options: Any,
) -> None:
    """Outputs, states and every gradient of this rank's piece, against those of the whole.

    `run` is called in the place of the module; outputs count up to the lengths `until`; the backward pass is
    outside the `with`, or inside.
    """
    whole, rank = copy.deepcopy(module), dist.get_rank()
    x = u.detach().clone().requires_grad_(u.is_floating_point())
    first = leaf(state)
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    found = whole(x, first, **options)
    want, after = found if options.get("return_state") else (found, None)
    each = weights(want)
    if until is not None:
        kept = (torch.arange(u.shape[1]) < until[:, None])[..., None]
        want, each = torch.where(kept, want, 0), [kept * t for t in each]
    total(want, sum(each) if pooled else each[0], after, [sum(weights(t)) for t in flat(after)]).backward()

    own, mine = cut(x, pieces), leaf(state)
    torch.manual_seed(seed + rank)
    if "resets" in options:
        options = options | {"resets": cut(options["resets"], pieces)}
    with sequence_parallel(world()):
        found = (run or module)(own, mine, **options)
        got, last = found if options.get("return_state") else (found, None)
        weight = each[rank] if pooled else cut(each[0], pieces)
        loss = total(got, weight, last, [weights(t)[rank] for t in flat(last)])
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    torch.set_rng_state(before)
    if until is not None:
        got = torch.where(cut(kept, pieces), got, 0)
    oracle.close(got, want if pooled else cut(want, pieces), tolerance * scale(want, got), "outputs")
    for g, w in zip(flat(last), flat(after), strict=True):
        oracle.close(g, w, tolerance, "state")
    if isinstance(last, State):
        assert torch.equal(last.length, after.length)
    if x.grad is not None:
        part = cut(x.grad, pieces)
        oracle.close(own.grad, part, tolerance * scale(x.grad, part), "gradient of the inputs")
    names, shares, wants = [], [], []
    for (name, p), w in zip(module.named_parameters(), whole.parameters(), strict=True):
        if w.grad is not None:
            names, shares, wants = [*names, name], [*shares, (p.grad, p)], [*wants, w.grad]
        p.grad = None
    for g, w in zip(flat(mine), flat(first), strict=True):
        names, shares, wants = [*names, "the state"], [*shares, (g.grad, g)], [*wants, w.grad]
    for name, g, w in zip(names, summed(shares), wants, strict=True):
        oracle.close(g, w, tolerance, f"gradient of {name}")
    for (name, b), w in zip(module.named_buffers(), whole.buffers(), strict=True):
        if run is None or b.is_floating_point():  # a batch that is run again counts twice
            oracle.close(b, w, tolerance, name)


def total(y: Tensor, weight: Tensor, state: Any, others: list[Tensor]) -> Tensor:
    return (y * weight).sum() + sum((t * w).sum() for t, w in zip(flat(state), others, strict=True))


def scale(whole: Tensor, part: Tensor) -> float:
    """How much larger numbers of the whole are: an error is relative to its largest."""
    largest = part.abs().max().item() if part.numel() else 0.0
    return whole.abs().max().item() / max(largest, 1e-30)
