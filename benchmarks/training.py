"""Is it the data or the model that training waits for? Sequences a second of each alone, for recipes.

    pip install -e ".[examples]"
    python benchmarks/training.py --recipes '[scifar, text]' --paths '{scifar: DIR, text: DIR}'

The loader: batches fetched, moved and transformed. The model: forward, backward and optimizer step on a few
batches that are there already. Prints a table with the quartiles, and writes it with machine, versions and
commit to benchmarks/results/NAME-DEVICE.json.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, cycle, repeat
from pathlib import Path

import torch
import yaml
from jsonargparse import auto_cli
from kernels import provenance
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from s4 import param_groups

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "examples"))

from data import Batch, SequenceData, padded  # noqa: E402
from task import SequenceTask  # noqa: E402
from train import RECIPES, TASKS  # noqa: E402

MIN_ROUNDS = 3
HELD = 8  # batches that the model gets in turn


@dataclass(frozen=True)
class Cell:
    """Sequences a second of the loader or the model of a recipe: median and quartiles."""

    recipe: str
    what: str
    batch: int
    length: int
    per_second: float
    low: float
    high: float


def moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device."""
    on_device = (x.to(device) if isinstance(x, torch.Tensor) else x for x in batch)
    return Batch(*on_device)


def batches(data: SequenceData, device: torch.device) -> Iterator[Batch]:
    """Training batches as the model gets them, without end."""
    for batch in chain.from_iterable(repeat(data.train_dataloader())):
        yield padded(data.transform(moved(batch, device), True), data.spec.tokens)


def step(task: SequenceTask, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One step of training."""
    loss = task._loss(task(batch), batch.targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def measure(run: Callable[[], object], seconds: float, device: torch.device) -> list[float]:
    """Times of single runs for about `seconds`, after one that is not counted."""
    times: list[float] = []
    run()
    while len(times) < MIN_ROUNDS or sum(times) < seconds:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times


def cell(recipe: str, what: str, batch: Batch, times: list[float]) -> Cell:
    """A row of the table."""
    number, length = len(batch.targets), batch.inputs.shape[1]
    low, median, high = (number / time for time in reversed(statistics.quantiles(times, n=4)))
    return Cell(recipe, what, number, length, median, low, high)


def main(
    recipes: list[str] = ["digits"],  # noqa: B006  # read only; a tuple has no command-line form
    paths: dict[str, Path] = {},  # noqa: B006
    seconds: float = 20.0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    name: str = "training",
) -> None:
    """Time loader and model of some recipes, each alone.

    Args:
        recipes: of examples/recipes.
        paths: folders of the data of recipes; the others are downloaded or made.
        seconds: for each measurement.
        device: cpu or cuda.
        name: of the file written.
    """
    where = torch.device(device)
    cells: list[Cell] = []
    with Progress(console=Console(stderr=True)) as progress:
        line = progress.add_task("", total=2 * len(recipes))
        for recipe in recipes:
            content = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
            path = {"path": paths[recipe]} if recipe in paths else {}
            data = TASKS[content["task"]](**{**content["data"], **path})
            data.prepare_data()
            data.setup("fit")
            source = batches(data, where)
            held = cycle([next(source) for _ in range(HELD)])
            batch = next(held)
            progress.update(line, description=f"{recipe}: loader")
            cells.append(cell(recipe, "loader", batch, measure(lambda s=source: next(s), seconds, where)))
            progress.update(line, advance=1, description=f"{recipe}: model")
            task = SequenceTask(data.spec, **content["model"]).to(where)
            groups = param_groups(task, task.lr, task.weight_decay, task.ssm_lr)
            optimizer = torch.optim.AdamW(groups)
            times = measure(lambda t=task, o=optimizer, h=held: step(t, o, next(h)), seconds, where)
            cells.append(cell(recipe, "model", batch, times))
            progress.advance(line)
    table = Table(title="Sequences a second")
    for column in ("recipe", "alone", "batch", "length", "median", "quartiles"):
        table.add_column(column, justify="left" if column in ("recipe", "alone") else "right")
    for c in cells:
        quartiles = f"{c.low:,.1f} to {c.high:,.1f}"
        table.add_row(c.recipe, c.what, str(c.batch), str(c.length), f"{c.per_second:,.1f}", quartiles)
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    result = provenance(device) | {"cells": [asdict(c) for c in cells]}
    (RESULTS / f"{name}-{device}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    auto_cli(main)
