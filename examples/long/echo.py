"""Train on sequences of a million steps, of which each of several processes holds a piece.

    torchrun --nproc-per-node 4 examples/long/echo.py [--options]

A few slow waves come in, and their echo of a quarter of the sequence ago is to go out: with four processes,
what one has to say is what the one before it has heard. After training, the first process runs a whole
sequence alone: its memory, outputs and gradients stand beside those of all.
"""

import copy
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model, param_groups
from s4.distributed import sequence_parallel

WAVES = 8
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115  # of all processes but the first


def made(d_model: int, d_state: int, n_layers: int, length: int) -> S4Model:
    """A stack whose channels remember from an eighth to a half of a sequence."""
    blocks = [
        S4Block(S4Layer(d_model, d_state, dt_min=2 / length, dt_max=8 / length)) for _ in range(n_layers)
    ]
    return S4Model(nn.Linear(1, d_model), blocks, nn.Linear(d_model, 1))


def pair(length: int, start: int, stop: int, seed: int) -> tuple[Tensor, Tensor]:
    """Steps from start to stop of a sequence and of its echo, (1, steps, 1) each: no process makes it all."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 + 8 * torch.rand(WAVES, generator=generator, dtype=torch.float64)
    phases = 2 * math.pi * torch.rand(WAVES, generator=generator, dtype=torch.float64)
    time = torch.arange(start, stop, dtype=torch.float64)[None, :, None] / length

    def heard(at: Tensor) -> Tensor:
        waves = (torch.cos(2 * math.pi * f * at + p) for f, p in zip(frequencies, phases, strict=True))
        return (sum(waves, torch.zeros_like(at)) / math.sqrt(WAVES / 2)).float()

    return heard(time), torch.where(time < 0.25, 0, heard(time - 0.25))


def backward(model: S4Model, given: Tensor, wanted: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Outputs, and this piece's share of the loss, a mean over all steps; gradients are in the parameters."""
    y = model(given)
    loss = (y - wanted).square().sum() / length
    loss.backward()
    return y.detach(), loss.detach()


def sum_gradients(model: nn.Module) -> None:
    """A parameter's gradient is the sum over all pieces."""
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)


def megabytes() -> float:
    """The most memory that this process ever held."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """Rank and number of the processes that torchrun started, or of this one alone."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        store = dist.TCPStore("localhost", 0, 1, is_master=True)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def largest(got: Tensor, want: Tensor) -> float:
    """Difference, relative to the largest number."""
    return float((got - want).abs().max() / want.abs().max())


def step(model: S4Model, length: int, start: int, stop: int) -> tuple[float, Tensor]:
    """Seconds, and this piece's outputs; the gradients are those of the whole sequence."""
    model.zero_grad()
    given, wanted = (t.to(next(model.parameters()).dtype) for t in pair(length, start, stop, 0))
    dist.barrier()
    begin = time.perf_counter()
    with sequence_parallel(dist.group.WORLD):
        y, _ = backward(model, given, wanted, length)
    sum_gradients(model)
    return time.perf_counter() - begin, y


def step_alone(model: S4Model, length: int) -> tuple[float, Tensor]:
    """The same of the whole sequence, which one process makes and holds."""
    model.zero_grad()
    given, wanted = (t.to(next(model.parameters()).dtype) for t in pair(length, 0, length, 0))
    begin = time.perf_counter()
    y, _ = backward(model, given, wanted, length)
    return time.perf_counter() - begin, y


def differences(model: S4Model, length: int, start: int, stop: int) -> tuple[float, float] | None:
    """In float64, of outputs and of gradients, relative to the largest number: in the first process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    exact = copy.deepcopy(model).double()
    _, y = step(exact, length, start, stop)
    if rank:
        dist.send(y, 0)
        return None
    pieces = [y]
    for source in range(1, ranks):
        size = (source + 1) * length // ranks - source * length // ranks
        pieces.append(y.new_empty(1, size, 1))
        dist.recv(pieces[-1], source)
    found = [p.grad.clone() for p in exact.parameters() if p.grad is not None]
    _, whole = step_alone(exact, length)
    wanted = [p.grad for p in exact.parameters() if p.grad is not None]
    each = [largest(g, w) for g, w in zip(found, wanted, strict=True)]
    return largest(torch.cat(pieces, 1), whole), max(each)


def compare(model: S4Model, length: int, start: int, stop: int, base: float) -> None:
    """One step of all processes beside one of the first process alone."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    show = Console(soft_wrap=True).print
    seconds, _ = step(model, length, start, stop)
    memory = [torch.zeros(1) for _ in range(ranks)]
    dist.all_gather(memory, torch.tensor([megabytes() - base]))
    if rank == 0:
        each = ", ".join(f"{float(m):.0f}" for m in memory)
        show(f"a step of {ranks} processes: {seconds:.1f} s; the most each took: {each} MB")
        seconds, _ = step_alone(model, length)
        show(f"a step of one process: {seconds:.1f} s; the most it took: {megabytes() - base:.0f} MB")
    if found := differences(model, length, start, stop):
        show(f"in float64 outputs differ by {found[0]:.1e}, gradients by {found[1]:.1e} of the largest")
    dist.barrier()


def main(
    length: PositiveInt = 1_000_000,
    steps: PositiveInt = 60,
    d_model: PositiveInt = 8,
    d_state: PositiveInt = 32,
    n_layers: PositiveInt = 2,
    lr: PositiveFloat = 0.03,
    seed: int = 0,
) -> None:
    """Train a small stack to echo what it heard a quarter of a sequence ago.

    Args:
        length: steps of a sequence, a piece of which each process holds.
        steps: of the optimiser, one new sequence each.
        d_model: channels.
        d_state: state size of a channel, even.
        n_layers: blocks.
        lr: learning rate.
        seed: of weights and waves.
    """
    if d_state % 2:
        raise SystemExit(f"--d_state: a state size must be even, got {d_state}")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = made(d_model, d_state, n_layers, length)
    optimizer = torch.optim.AdamW(param_groups(model, lr=lr, ssm_lr=lr / 10))
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, max(steps, 2))
    with processes() as (rank, ranks):
        if ranks > length:
            raise SystemExit(f"--length must be at least the number of processes, {ranks}, got {length}")
        backward(model, *pair(100, 0, 100, 0), 100)  # what is loaded once is in no measurement
        base = megabytes()
        start, stop = rank * length // ranks, (rank + 1) * length // ranks
        losses = []
        shown = Console(stderr=True) if rank == 0 else QUIET
        for step in track(range(steps), "training", console=shown):
            optimizer.zero_grad()
            given, wanted = pair(length, start, stop, 1 + seed + step)
            with sequence_parallel(dist.group.WORLD):
                _, loss = backward(model, given, wanted, length)
            sum_gradients(model)
            optimizer.step()
            schedule.step()
            dist.all_reduce(loss)
            losses.append(float(loss))
        if rank == 0:
            means = [sum(part) / len(part) for part in (losses[:5], losses[-5:])]
            Console().print(
                f"mean squared error of five steps: {means[0]:.2f} at first, {means[1]:.2f} at last"
            )
        compare(model, length, start, stop, base)


if __name__ == "__main__":
    auto_cli(main)
