"""What four processes do with pieces of a sequence: `python tests/sequence_ranks.py FOLDER` plays each scene.

A scene has a process group of its own, and its name and rank a file in the folder: empty, or a traceback.
The scenes of activation checkpointing are in sequence_recomputed.py.
"""

import copy
import io
import os
import re
import sys
import traceback
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import oracle
import sequence_recomputed  # noqa: F401 - which adds its scenes
import torch
import torch._dynamo  # which the first gradient of an operator imports, here once for all ranks
import torch.distributed as dist
from pieces import WORLD, compare, cut, world
from refusals import refuses
from sequence_scenes import CUTS, SCENES, ends, inputs, layer, scene
from stacks import D_IN, D_OUT, VOCABULARY, build, incoming, small
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_sequence

from s4 import S4Block, S4Layer
from s4.distributed import sequence_parallel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "long"))


@scene("dplr", "fft")
@scene("dplr", "scan")
@scene("diag", "auto")
def causal(variant: str, mode: str) -> None:
    module = layer(variant, mode)
    state = torch.randn(6, 3, 6, dtype=torch.float64)
    for pieces in CUTS[:2]:
        u = inputs(6, pieces)
        compare(module, u, pieces, state, lengths=ends(pieces), return_state=True, rate=0.7)
    compare(module, u, pieces, state)
    compare(module, inputs(2, CUTS[2]), CUTS[2], return_state=True)


@scene("dplr", "scan")
@scene("diag", "auto")
@scene("diag", "fft")
def both(variant: str, mode: str) -> None:
    module = layer(variant, mode, True)
    for pieces in CUTS[:2]:
        u = inputs(6, pieces)
        compare(module, u, pieces, lengths=ends(pieces), rate=2.0)
    compare(module, u, pieces)


@scene("dplr", "fft", False)
@scene("dplr", "scan", True)
@scene("diag", "auto", False)
def reset(variant: str, mode: str, both: bool) -> None:
    """At a piece's edges, several in a piece, none in a row or in a piece, and behind an end."""
    module, state = layer(variant, mode, both), torch.randn(6, 3, 6, dtype=torch.float64)
    for pieces in CUTS[:2]:
        L = sum(pieces)
        u, resets = inputs(6, pieces), torch.rand(6, L) < 0.15
        resets[0], resets[1], resets[2] = False, torch.arange(L) == pieces[0], torch.arange(L) == L - 2
        options = {} if both else {"state": state, "return_state": True}
        compare(module, u, pieces, resets=resets, **options)
        compare(module, u, pieces, resets=resets, lengths=ends(pieces), **options)


@scene("dplr", False)
@scene("diag", True)
def poison(variant: str, both: bool) -> None:
    """What is no number reaches nothing behind a reset and, backwards, nothing before it, on any rank."""
    module, pieces = layer(variant, "scan", both), CUTS[0]
    u, L = inputs(2, pieces), sum(pieces)
    resets = torch.zeros(2, L, dtype=torch.bool)
    resets[0, 9], resets[1, 22] = True, True
    with torch.no_grad():
        clean = module(u, resets=resets)
        u[0, 3] = u[1, 23] = torch.nan
        with sequence_parallel(world()):
            y = module(cut(u, pieces), resets=cut(resets, pieces))
    mask = torch.zeros(2, L, dtype=torch.bool)
    mask[0, 9:], mask[1, :22] = True, True
    kept = cut(mask, pieces)
    oracle.close(y[kept], cut(clean, pieces)[kept], 1e-9)


@scene("none", False)
@scene("mean", False)
@scene("last", False)
@scene("none", True)
def models(pooling: str, both: bool) -> None:
    """Of numbers and of tokens; the state of the stack, and its length, are the whole's."""
    pooled = pooling != "none"
    for block, pieces in (("prenorm", CUTS[0]), ("postnorm", CUTS[1])):
        model, u = build("mixed", block, pooling, both=both), inputs(6, pieces, D_IN)
        options = {"lengths": ends(pieces), "resets": torch.rand(6, sum(pieces)) < 0.05, "pooled": pooled}
        if both:
            compare(model, u, pieces, **options)
        else:
            compare(model, u, pieces, incoming(model, 6), return_state=True, **options)
    tokens = torch.randint(VOCABULARY, (2, sum(CUTS[0])))
    compare(build("dplr", "final norm", pooling, tokens=True, both=both), tokens, CUTS[0], pooled=pooled)


@scene()
def batch_norm() -> None:
    """Of all ranks' inputs, padding left out: values, gradients, and the running statistics."""
    for momentum, prenorm in ((0.1, True), (None, False)):
        block = S4Block(layer(), norm="batch", prenorm=prenorm, d_ff=4 * prenorm).double()
        for part in block.modules():
            if isinstance(part, nn.BatchNorm1d):
                part.momentum = momentum
                nn.init.normal_(part.weight), nn.init.normal_(part.bias)
        u = inputs(6, CUTS[1]) + 3
        compare(block, u, CUTS[1])
        u, pieces = inputs(6, CUTS[0]) + 3, CUTS[0]
        compare(block, u, pieces, lengths=ends(pieces), until=ends(pieces))
        compare(block.eval(), u, pieces)
    block.norm.running_mean = block.norm.running_var = None
    compare(block, u, pieces)


@scene()
def tied_dropout() -> None:
    """Ranks are seeded differently: the mask is that of the first."""
    block = S4Block(layer(), dropout=0.5, tie_dropout=True, d_ff=4).double()
    for pieces in CUTS[:2]:
        compare(block, inputs(6, pieces), pieces, seed=3)


@scene()
def loose_dropout() -> None:
    """Every rank draws its own: what is the same before differs then."""
    block = S4Block(layer(), dropout=0.5).double()
    nn.init.zeros_(block.layer.C)
    u = inputs(1, (8,))
    torch.manual_seed(dist.get_rank())
    with sequence_parallel(world()), torch.no_grad():
        y = block(u)
    found = [torch.empty_like(y) for _ in range(WORLD)]
    dist.all_gather(found, y)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[dist.get_rank()], y)


@scene()
def twice() -> None:
    """One layer, one after the other and on other lengths, in one graph."""
    module = layer()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, x: Tensor, state: None) -> Tensor:
            y = self.layer(self.layer(x))
            return y + self.layer(torch.cat([y[:, :0], x.tanh()], 1))

    compare(Both(), inputs(6, CUTS[0]), CUTS[0])


@scene()
def half() -> None:
    """float32, bfloat16 parameters, and autocast, whose products a chunk rounds."""
    u = inputs(6, CUTS[0])
    compare(layer().float(), u.float(), CUTS[0], tolerance=1e-4)
    compare(layer().bfloat16(), u.bfloat16(), CUTS[0], tolerance=2e-2)
    module = layer(mode="scan").float()
    with torch.autocast("cpu", torch.bfloat16):
        compare(module, u.float(), CUTS[0], tolerance=4e-2)


@scene()
def in_a_mesh() -> None:
    """Two by two, under DistributedDataParallel over all ranks, or over one dimension and a sum by hand."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    row, column = mesh.get_coordinate()
    u = inputs(4, (6, 6), D_IN)
    whole = build()
    whole(u).square().mean().backward()
    mine = u[2 * row : 2 * row + 2, 6 * column : 6 * column + 6]
    model = DistributedDataParallel(copy.deepcopy(whole))
    model.zero_grad()
    with sequence_parallel(mesh["sequence"]):
        loss = model(mine).square().mean()
    loss.backward()
    for (name, p), w in zip(model.named_parameters(), whole.parameters(), strict=True):
        oracle.close(p.grad, w.grad, 1e-9, name)
    group = mesh["sequence"].get_group()
    model = DistributedDataParallel(copy.deepcopy(whole), process_group=mesh["data"].get_group())
    model.zero_grad()
    with sequence_parallel(group):
        (model(mine).square().sum() / (2 * 12 * D_OUT)).backward()
    for (name, p), w in zip(model.named_parameters(), whole.parameters(), strict=True):
        dist.all_reduce(p.grad, group=group)
        oracle.close(p.grad, w.grad, 1e-9, name)


@scene()
def example() -> None:
    """What examples/long/echo.py says of a step of all and of one."""
    import echo

    rank, length = dist.get_rank(), 1003
    model, said = echo.made(4, 8, 1, length), io.StringIO()
    with redirect_stdout(said):
        echo.compare(model, length, rank * length // WORLD, (rank + 1) * length // WORLD, 0.0)
    if rank == 0:
        first, second, last = said.getvalue().splitlines()
        assert "step of 4 processes" in first
        assert "step of one process" in second
        assert max(map(float, re.findall(r"\d\.\de[-+]\d+", last))) < 1e-9


@scene()
def alone() -> None:
    """A group of one rank is none: the same numbers; nor is anything left of it, once it is behind."""
    model, u = build().eval(), inputs(2, (dist.get_rank() + 5,), D_IN)
    with sequence_parallel(dist.new_subgroups(1)[0]):
        assert torch.equal(model(u), model(u))
        inside = model(u)
    assert torch.equal(inside, model(u))
    with torch.no_grad():
        model.train()(u)  # as the forward pass of a reentrant checkpoint looks, but outside
    torch.compile(model.eval(), backend="eager", fullgraph=True)(u)


@scene()
def refused() -> None:
    rank, module, model = dist.get_rank(), layer(), small()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))

    def enter(group: Any) -> None:
        with sequence_parallel(group):
            pass

    refuses(ValueError, "one dimension.*mesh", lambda: enter(mesh))
    for wrong in (None, "world", 4):
        refuses(TypeError, "process group", lambda wrong=wrong: enter(wrong))
    pair = dist.new_group([0, 1])
    if rank > 1:
        refuses(TypeError, "process group that this process belongs to", lambda: enter(pair))
    u, tokens = inputs(2, (3,)), torch.zeros(2, 3, dtype=torch.long)
    with sequence_parallel(world()):
        refuses(ValueError, "step.*sequence_parallel", lambda: module.step(u[:, 0], module.initial_state(2)))
        refuses(
            ValueError, "step.*sequence_parallel", lambda: model.step(tokens[:, 0], model.initial_state(2))
        )
        block = model.blocks[0]
        refuses(
            ValueError, "step.*sequence_parallel",
            lambda: block.step(torch.zeros(2, 4), block.initial_state(2)),
        )  # fmt: skip
        refuses(ValueError, "generation.*sequence_parallel", lambda: model.generate(tokens, 2))
        refuses(
            ValueError, "rank 3: S4Layer.*batch size 3", lambda: module(inputs(1 + (rank == 3) * 2, (4,)))
        )
        state = module.initial_state(2) if rank == 1 else None
        refuses(ValueError, "rank 1: S4Layer.*state", lambda: module(u, state))
        own = torch.tensor([3, 3 + (rank == 2)])
        refuses(ValueError, r"rank 2: S4Layer.*of \[3, 4\]", lambda: module(u, lengths=own))
        refuses(ValueError, "rank 3: S4Layer.*rate 2.0", lambda: module(u, rate=1.0 + (rank == 3)))
        half = u.bfloat16() if rank == 1 else u
        refuses(ValueError, "rank 1: S4Layer.*bfloat16", lambda: module(half))
        other = S4Layer(5, 6).double() if rank == 2 else module
        refuses(ValueError, r"rank 2: S4Layer.*width \(5,\)", lambda: other(inputs(2, (3,), other.d_model)))
        refuses(ValueError, "lengths.*0..12", lambda: module(u, lengths=torch.tensor([13, 1])))
        refuses(ValueError, "rate.*number", lambda: module(u, rate=torch.ones(2)))
        refuses(ValueError, "states.*sequence_parallel", lambda: module.states(u, torch.zeros(2, 1).long()))
        for each, x in ((module, u), (block, torch.zeros(2, 3, 4)), (model, tokens)):
            packed = pack_sequence(list(x))
            refuses(ValueError, "PackedSequence.*sequence_parallel", lambda f=each, x=packed: f(x))
        refuses(ValueError, "torch.func", lambda: torch.func.vmap(module)(u[None]))
        x = u.clone().requires_grad_()
        grad = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)[0]
        refuses(RuntimeError, "once_differentiable", lambda: grad.sum().backward())


def main(folder: Path, *only: str) -> None:
    """Forks a process for each rank, which spares them imports and what a first call loads."""
    with torch.no_grad():
        layer("diag")(inputs(1, (9,)))
    children = []
    for rank in range(WORLD):
        if (pid := os.fork()) == 0:
            try:
                played(rank, folder, only)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def played(rank: int, folder: Path, only: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=20)
    for name, play in SCENES.items():
        if only and not any(name.startswith(each) for each in only):
            continue
        outcome = ""
        torch.manual_seed(0)
        store = dist.FileStore(str(folder / f"{name}.store"), WORLD)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=limit)
        try:
            play()
        except BaseException:
            outcome = traceback.format_exc()
        dist.destroy_process_group()  # which ends what the others wait for, where this one failed
        (folder / f"{name}.{rank}").write_text(outcome)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
