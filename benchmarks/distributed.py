"""What do pieces of a sequence over several processes save and cost, and how exact are they?

    pip install -e ".[test]"
    python benchmarks/distributed.py [--ranks 1,2,4] [--out FILE.json]

One training step, forward and backward, of a stack on one long sequence, by one process and by several on
this machine (gloo), each with a piece. Measured are the most memory that a process took beside its start,
with an allocator that gives back what is freed (glibc's, by MALLOC_MMAP_THRESHOLD_), the seconds of a
further step, and the largest differences of outputs and gradients from one process, relative to the largest
number; of float32 also from float64. Prints a table and writes JSON.
"""

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing
from harness import Budget, Peak, Report, first_line, result_file, run, show
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model
from s4.distributed import sequence_parallel

BLOCK = 1000  # steps drawn at once: a process draws its own piece alone
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass
class Setting:
    """What is run."""

    length: int
    d_model: int
    d_state: int
    n_layers: int
    variant: str
    bidirectional: bool


@dataclass
class Cell:
    """One number of processes: MiB of the first and of the largest, seconds, and differences from one.

    Of float32 also the errors beside one process in float64.
    """

    ranks: int
    dtype: str
    variant: str
    bidirectional: bool
    mib: list[float]
    seconds: float
    outputs: float
    gradients: float
    outputs_error: float
    gradients_error: float


def made(setting: Setting, dtype: torch.dtype) -> S4Model:
    """The same numbers in every process, and in both dtypes: those of float32."""
    torch.manual_seed(0)
    options = {"variant": setting.variant, "bidirectional": setting.bidirectional}
    blocks = [
        S4Block(S4Layer(setting.d_model, setting.d_state, dt_min=1e-5, dt_max=1e-2, **options))  # type: ignore[arg-type]
        for _ in range(setting.n_layers)
    ]
    return S4Model(nn.Linear(1, setting.d_model), blocks, nn.Linear(setting.d_model, 1)).to(dtype)


def noise(start: int, stop: int) -> Tensor:
    """Steps of a sequence (1, steps, 1) of white noise."""
    blocks = range(start // BLOCK, -(-stop // BLOCK))
    parts = [torch.randn(BLOCK, generator=torch.Generator().manual_seed(i)) for i in blocks]
    return torch.cat(parts)[start - blocks.start * BLOCK :][: stop - start][None, :, None]


def step(model: S4Model, u: Tensor, length: int) -> Tensor:
    """Outputs; the gradients are those of this piece's share of the mean square."""
    model.zero_grad()
    with sequence_parallel(dist.group.WORLD):
        y = model(u)
    (y.square().sum() / length).backward()
    return y.detach()


def work(rank: int, ranks: int, folder: Path, setting: Setting, dtype: torch.dtype) -> None:
    """One process: a file with what it measured."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    model = made(setting, dtype)
    step(model, noise(0, 64).to(dtype), 64)  # what is loaded once
    length = setting.length
    u = noise(rank * length // ranks, (rank + 1) * length // ranks).to(dtype)
    dist.barrier()
    peak = Peak(torch.device("cpu"))
    y = step(model, u, length)
    mib = peak.above_start()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for g in gradients:
        dist.all_reduce(g)
    dist.barrier()
    begin = time.perf_counter()
    step(model, u, length)
    dist.barrier()
    seconds = time.perf_counter() - begin
    found = {"y": y, "mib": mib, "seconds": seconds, "gradients": gradients if rank == 0 else None}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def measured(setting: Setting, ranks: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of all processes: whole outputs, gradients, MiB of each and the longest time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.multiprocessing.spawn(work, (ranks, folder, setting, dtype), ranks)
        parts = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    return {
        "y": torch.cat([part["y"] for part in parts], 1),
        "gradients": parts[0]["gradients"],
        "mib": [part["mib"] for part in parts],
        "seconds": max(part["seconds"] for part in parts),
    }


def difference(got: Tensor, want: Tensor) -> float:
    """Relative to the largest number."""
    return float((got.double() - want.double()).abs().max() / want.abs().max())


def differences(got: dict[str, Any], want: dict[str, Any]) -> tuple[float, float]:
    """Of outputs, and the largest of the gradients, each parameter's by its own scale."""
    each = [difference(g, w) for g, w in zip(got["gradients"], want["gradients"], strict=True)]
    return difference(got["y"], want["y"]), max(each)


def table(cells: list[Cell], length: int) -> None:
    """One line a measurement."""
    rows = [
        (
            c.variant, "both" if c.bidirectional else "ahead", c.dtype, c.ranks,
            f"{max(c.mib):.0f}", f"{c.seconds:.1f}", f"{c.outputs:.1e}", f"{c.gradients:.1e}",
            f"{c.outputs_error:.1e}", f"{c.gradients_error:.1e}",
        )
        for c in cells
    ]  # fmt: skip
    columns = ["variant", "ways", "dtype", "ranks", "MiB a rank", "s"]
    columns += ["outputs", "gradients", "outputs from float64", "gradients from float64"]
    show(columns, rows, f"{length:,} steps")


def main(
    budget: PositiveFloat = 1800.0,
    length: PositiveInt = 1_000_000,
    ranks: list[PositiveInt] = [1, 2, 4],  # noqa: B006  # read only; a tuple has no command-line form
    d_model: PositiveInt = 16,
    d_state: PositiveInt = 64,
    n_layers: PositiveInt = 2,
    variants: list[Literal["dplr", "diag"]] = ["dplr", "diag"],  # noqa: B006
    both: bool = True,
    out: Path | None = None,
    replace: bool = False,
) -> None:
    """Take a training step on a long sequence by one process and by several.

    Args:
        budget: seconds after which no further measurement starts.
        length: steps of the sequence.
        ranks: numbers of processes; one is always measured, to compare with.
        d_model: channels.
        d_state: state size, even.
        n_layers: blocks.
        variants: of the layers.
        both: also bidirectional stacks.
        out: file of results; without it ~/.cache/s4/benchmarks/distributed-cpu.json.
        replace: write over a committed result.
    """
    file = result_file("distributed", "cpu", out, replace)
    if d_state % 2:
        raise SystemExit(f"--d_state: a state size must be even, got {d_state}")
    if length < max(ranks):
        raise SystemExit(f"--length must be at least the number of processes, {max(ranks)}, got {length}")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # of the processes that are started
    torch.set_num_threads(1)
    counts = sorted({1, *ranks})
    settings = [
        Setting(length, d_model, d_state, n_layers, variant, way)
        for variant in variants
        for way in ([False, True] if both else [False])
    ]
    total, cores = len(settings) * len(DTYPES) * len(counts), os.cpu_count()
    sizes = {"length": length, "d_model": d_model, "d_state": d_state, "n_layers": n_layers}
    with Report(file, torch.device("cpu"), Budget(budget), total, cores=cores, **sizes) as report:
        for setting in settings:
            exact: dict[str, Any] | None = None
            for name, dtype in DTYPES.items():
                alone: dict[str, Any] | None = None
                for count in counts:
                    if not report.begin(f"{setting.variant}, {name}, {count} processes"):
                        break
                    try:
                        found = measured(setting, count, dtype)
                    except Exception as error:  # out of memory, a process that was killed
                        report.add([], {f"{setting.variant}, {name}, {count}": first_line(error)}, 1)
                        break
                    alone = alone or found
                    exact = exact or found
                    beside = *differences(found, alone), *differences(found, exact)
                    way = setting.variant, setting.bidirectional
                    report.add([Cell(count, name, *way, found["mib"], found["seconds"], *beside)], {}, 1)
        if report.cells:
            table(report.cells, length)
            report.write([asdict(cell) for cell in report.cells])
    report.finish()


if __name__ == "__main__":
    run(main)
