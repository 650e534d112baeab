"""What four processes do with pieces of a sequence: `python tests/sequence_ranks.py FOLDER` plays each scene.

Each scene writes a file for each rank into the folder, its name and rank: empty, or a traceback. The truth is
the same module called by one process on whole sequences.
"""

import copy
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import oracle
import torch
import torch.distributed as dist
from torch import Tensor, nn

from s4 import S4Layer, State
from s4.distributed import sequence_parallel

WORLD = 4
CUTS = [(5, 0, 17, 3), (0, 9, 1, 6), (8, 8, 8, 8)]
SCENES: dict[str, Callable[[], None]] = {}


def scene(*arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Under its name and these arguments, which it is called with."""

    def enter(play: Callable[..., None]) -> Callable[..., None]:
        SCENES[" ".join([play.__name__, *map(str, arguments)])] = partial(play, *arguments)
        return play

    return enter


def group() -> dist.ProcessGroup:
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


def summed(t: Tensor | None, like: Tensor) -> Tensor:
    t = torch.zeros_like(like) if t is None else t.clone()
    dist.all_reduce(t)
    return t


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
    pooled: bool = False,
    tolerance: float = 1e-9,
    run: Callable[..., Any] | None = None,
    inside: bool = False,
    **options: Any,
) -> None:
    """Outputs, states and every gradient of this rank's piece, against those of the whole."""
    whole = copy.deepcopy(module)
    x = u.detach().clone().requires_grad_(u.is_floating_point())
    first = leaf(state)
    found = whole(x, first, **options)
    want, after = found if options.get("return_state") else (found, None)
    each = weights(want)
    loss = (want * (sum(each) if pooled else each[0])).sum()
    for i, t in enumerate(flat(after)):
        loss = loss + (i + 1) * (t * sum(weights(t))).sum()
    loss.backward()

    own, mine = cut(x, pieces), leaf(state)
    with sequence_parallel(group()):
        found = (run or module)(own, mine, **options)
        got, last = found if options.get("return_state") else (found, None)
        weight = each[dist.get_rank()] if pooled else cut(each[0], pieces)
        loss = (got * weight).sum()
        for i, t in enumerate(flat(last)):
            loss = loss + (i + 1) * (t * weights(t)[dist.get_rank()]).sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    oracle.close(got, want if pooled else cut(want, pieces), tolerance, "outputs")
    for g, w in zip(flat(last), flat(after), strict=True):
        oracle.close(g, w, tolerance, "state")
    if isinstance(last, State):
        assert torch.equal(last.length, after.length)
    if x.grad is not None:
        scale = x.grad.abs().max() / max(cut(x.grad, pieces).abs().max().item() if own.numel() else 1, 1e-30)
        oracle.close(own.grad, cut(x.grad, pieces), tolerance * float(scale), "gradient of the inputs")
    for (name, p), w in zip(module.named_parameters(), whole.parameters(), strict=True):
        if w.grad is not None:
            oracle.close(summed(p.grad, p), w.grad, tolerance, f"gradient of {name}")
        p.grad = None
    for g, w in zip(flat(mine), flat(first), strict=True):
        oracle.close(summed(g.grad, g), w.grad, tolerance, "gradient of the state")
    for (name, b), w in zip(module.named_buffers(), whole.buffers(), strict=True):
        oracle.close(b, w, tolerance, name)


def layer(variant: str = "dplr", mode: str = "auto", both: bool = False, **options: Any) -> S4Layer:
    return S4Layer(3, 6, variant=variant, mode=mode, bidirectional=both, **options).double()


def inputs(batch: int, pieces: Sequence[int], width: int = 3) -> Tensor:
    return torch.randn(batch, sum(pieces), width, dtype=torch.float64)


def ends(pieces: Sequence[int]) -> Tensor:
    """Of six sequences: in every piece, at its edges, nothing at all."""
    L = sum(pieces)
    return torch.tensor([L, pieces[0], L - 1, 0, 1, L // 2 + 1])


@scene("dplr", "fft")
@scene("dplr", "scan")
@scene("dplr", "auto")
@scene("diag", "fft")
@scene("diag", "scan")
@scene("diag", "auto")
def causal(variant: str, mode: str) -> None:
    module = layer(variant, mode)
    state = torch.randn(6, 3, 6, dtype=torch.float64)
    for pieces in CUTS:
        u = inputs(6, pieces)
        compare(module, u, pieces)
        compare(module, u, pieces, state, return_state=True, rate=0.7)
        compare(module, u, pieces, state, lengths=ends(pieces), return_state=True)


@scene("dplr", "fft")
@scene("dplr", "scan")
@scene("dplr", "auto")
@scene("diag", "fft")
@scene("diag", "scan")
@scene("diag", "auto")
def both(variant: str, mode: str) -> None:
    module = layer(variant, mode, True)
    for pieces in CUTS:
        u = inputs(6, pieces)
        compare(module, u, pieces)
        compare(module, u, pieces, lengths=ends(pieces), rate=2.0)


def main(folder: Path) -> None:
    """Forks a process for each rank, which spares their imports."""
    if children := [pid for rank in range(WORLD) if (pid := os.fork()) or played(rank, folder)]:
        for pid in children:
            os.waitpid(pid, 0)


def played(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
    only = sys.argv[2:]
    for name, play in SCENES.items():
        if only and not any(name.startswith(each) for each in only):
            continue
        outcome = ""
        torch.manual_seed(0)
        try:
            play()
        except BaseException:
            outcome = traceback.format_exc()
        (folder / f"{name}.{rank}").write_text(outcome)
        if outcome and only:
            print(name, rank, outcome[-700:], flush=True)
        dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
