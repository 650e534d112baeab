"""Is it the data or the model that training waits for? Sequences a second of each alone, for recipes.

    pip install -e ".[test]"
    python benchmarks/training.py --recipes scifar,text --paths '{scifar: DIR, text: DIR}' [--out FILE.json]

The loader: batches fetched, moved and transformed. The model: forward, backward and optimizer step on a few
batches that are there already, in each precision. Prints a table with the quartiles; writes JSON.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from harness import ROOT, Budget, Report, first_line, folder, result_file, run, show, synchronize, usable
from jsonargparse.typing import NonNegativeFloat, PositiveFloat

from s4 import param_groups

sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

from data.base import SequenceData  # noqa: E402
from data.batches import Batch, padded  # noqa: E402
from data.images import SOURCES, SequentialImages  # noqa: E402
from data.storage import DataError  # noqa: E402
from data.tasks import TASKS  # noqa: E402
from example_files import write_parquet  # noqa: E402
from train import RECIPES  # noqa: E402
from trainer.task import SequenceTask  # noqa: E402

MIN_ROUNDS = 3
HELD = 8  # batches that the model gets in turn
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}  # as Lightning names them


@dataclass(frozen=True)
class Cell:
    """Sequences a second of the loader or the model of a recipe: median and quartiles."""

    recipe: str
    what: str
    precision: str
    sequences: int  # of an epoch
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


def step(
    task: SequenceTask, optimizer: torch.optim.Optimizer, batch: Batch, autocast: torch.dtype | None
) -> None:
    """One step of training."""
    with torch.autocast(batch.inputs.device.type, autocast) if autocast else nullcontext():
        loss = task._loss(task(batch), batch.targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def measure(once: Callable[[], object], seconds: float, device: torch.device) -> list[float]:
    """Times of single runs for about `seconds`, after one that is not counted."""
    times: list[float] = []
    once()
    synchronize(device)
    while len(times) < MIN_ROUNDS or sum(times) < seconds:
        began = time.perf_counter()
        once()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return times


def cell(recipe: str, what: str, precision: str, sequences: int, batch: Batch, times: list[float]) -> Cell:
    """A row of the table."""
    number, length = len(batch.targets), batch.inputs.shape[1]
    low, median, high = (number / time for time in reversed(statistics.quantiles(times, n=4)))
    return Cell(recipe, what, precision, sequences, number, length, median, low, high)


def data_of(recipe: dict[str, Any], path: Path | None, made: ExitStack | None) -> SequenceData:
    """The data of a recipe, from a folder, or of random images that are gone with the stack `made`."""
    options, kind = dict(recipe["data"]), TASKS[recipe["task"]]
    if made is not None and kind is SequentialImages:
        scratch = Path(made.enter_context(tempfile.TemporaryDirectory()))
        path, per_class = scratch / "data", 1 + options["batch_size"] * (HELD + 1) // 9
        write_parquet(path, SOURCES[options["dataset"]], per_class)
        options["cache_dir"] = scratch / "cache"
    data = kind(**options, **({"path": path} if path else {}))
    data.prepare_data()
    data.setup("fit")
    return data


def table(cells: list[Cell]) -> None:
    """One line a measurement."""
    show(
        ("recipe", "alone", "precision", "batch", "length", "sequences/s", "quartiles"),
        (
            (
                c.recipe, c.what, c.precision, c.batch, c.length, f"{c.per_second:,.1f}",
                f"{c.low:,.1f} to {c.high:,.1f}",
            )
            for c in cells
        ),
    )  # fmt: skip


def main(
    recipes: list[str] = ["digits"],  # noqa: B006  # read only; a tuple has no command-line form
    paths: dict[str, Path] = {},  # noqa: B006
    made: bool = False,
    precisions: list[Literal["32-true", "bf16-mixed"]] = ["32-true"],  # noqa: B006
    budget: PositiveFloat = 900.0,
    seconds: NonNegativeFloat = 20.0,
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu",
    out: Path | None = None,
    replace: bool = False,
) -> None:
    """Time loader and model of some recipes, each alone.

    Args:
        recipes: of examples/recipes.
        paths: folders of the data of recipes; the others are downloaded or made.
        made: random images in the place of data sets of images, for the models alone, whose time does not
            depend on them.
        precisions: of the model, as trainer.precision has them.
        budget: seconds after which no further measurement starts.
        seconds: for each measurement.
        device: cpu or cuda.
        out: file of results; without it ~/.cache/s4/benchmarks/training-DEVICE.json.
        replace: write over a committed result.
    """
    where, file = usable(device), result_file("training", device, out, replace)
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if unknown := sorted({*recipes, *paths}.difference(known)):
        raise SystemExit(f"--recipes: there is no recipe {unknown[0]}; there are {', '.join(known)}")
    for recipe, path in paths.items():
        folder(f"--paths: {recipe}", path)
    clock = Budget(budget)
    with Report(file, where, clock, len(recipes) * (1 + len(precisions))) as report, ExitStack() as scratch:
        for recipe in recipes:
            if not report.begin(f"{recipe}: loader"):
                break
            content = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
            try:
                data = data_of(content, paths.get(recipe), scratch if made else None)
            except DataError as error:
                raise SystemExit(f"--paths: {recipe}: {first_line(error)}") from None
            source, sequences = batches(data, where), len(data.train_dataloader().rows)
            held = [next(source) for _ in range(HELD)]
            if made:
                report.add([], {}, 0)  # of a few images it would be too fast
            else:
                times = measure(lambda s=source: next(s), seconds, where)
                report.add([cell(recipe, "loader", "", sequences, held[0], times)], {}, 1)
            for precision in precisions:
                if not report.begin(f"{recipe}: model, {precision}"):
                    break
                try:
                    torch.manual_seed(0)
                    task = SequenceTask(data.spec, **content["model"]).to(where)
                    optimizer = torch.optim.AdamW(param_groups(task, task.lr, task.weight_decay, task.ssm_lr))
                    turns, lower = cycle(held), PRECISIONS[precision]
                    times = measure(
                        lambda t=task, o=optimizer, h=turns, p=lower: step(t, o, next(h), p), seconds, where
                    )
                    report.add([cell(recipe, "model", precision, sequences, held[0], times)], {}, 1)
                except Exception as error:  # out of memory, or a kernel that fails
                    report.add([], {f"{recipe}: model, {precision}": first_line(error)}, 1)
                task = optimizer = None  # the next one needs its memory
        if report.cells:
            table(report.cells)
    report.finish()


if __name__ == "__main__":
    run(main)
