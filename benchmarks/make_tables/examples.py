"""What was trained: beside the paper, forecasts, and every run of the examples."""

import csv
import re
from collections.abc import Iterable
from typing import Any

from make_tables.source import RUNS, Row, trained

# Published in arXiv 2111.00396, in percent of the test set unless it says so.
PAPER: dict[str, tuple[str, str, str]] = {
    # task: what the paper reports, the run of ours that comes nearest, and how that run is smaller
    "Sequential MNIST": ("99.63%", "smnist_small", "causal, 2 layers of 64"),
    "Permuted MNIST": ("98.70%", "pmnist_small", "causal, 2 layers of 64, 2 epochs"),
    "Sequential CIFAR-10": ("91.13%", "scifar_small", "300 steps, of a JPEG copy"),
    "LRA ListOps": ("59.60%", "listops_small", "1,500 steps"),
    "LRA Text": ("86.82%", "text_small", "2,048 bytes, 3 layers"),
    "LRA Retrieval, Image, Pathfinder, Path-X": ("90.90%, 88.65%, 94.20%, 96.35%", "", ""),
    "Speech Commands of ten words; WikiText-103": ("98.3%; perplexity 20.95", "", ""),
}


def paper() -> Iterable[Row]:
    """The paper's results, and the small runs of ours."""
    yield "task", "S4 paper", "here, so far", "that run"
    for task, (published, run, smaller) in PAPER.items():
        if run:
            r = trained(run)
            link = f"[{r['steps']:,} steps, {r['parameters']:,} parameters](examples/results/{run})"
            yield task, published, f"{100 * r['test accuracy']:.2f}%", f"{smaller}; {link}"
        else:
            yield task, published, "not run yet", ""


def forecast() -> Iterable[Row]:
    """Mean squared errors of one channel, by the steps ahead."""
    with (RUNS / "forecast" / "cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    ahead = list(dict.fromkeys(c["horizon"] for c in cells))
    yield "`forecast`, steps ahead", *ahead
    for data, name in (("etth1", "ETTh1"), ("etth2", "ETTh2")):
        for who, column in (("published", "published mse"), ("ours", "test mse")):
            mine = {c["horizon"]: float(c[column]) for c in cells if c["dataset"] == data}
            yield f"{name}, {who}", *(f"{mine[h]:.3f}" for h in ahead)


def runs(table: str) -> str:
    """The results of the examples: in rows that link to a run's folder, its numbers anew, words as they are.

    Columns: recipe, published, test result, steps, wall time, machine, seed, commit, log.
    """
    lines = []
    for line in table.splitlines():
        cells = line.strip("| ").split(" | ")
        if link := re.search(r"\]\(results/(\w+)\)", cells[-1]):
            r = trained(link[1])
            cells[2] = re.sub(r"^[^;]*", result(r), cells[2])
            cells[3] = re.sub(r"^[\d,]+", f"{r['steps']:,}", cells[3])
            cells[4] = re.sub(r"^[\d,]+", f"{r['wall time (s)']:,.0f}", cells[4])
            cells[6] = str(r["seed"])
            cells[7] = re.sub(r"^[\da-f]+", r["commit"][:7], cells[7])
            line = f"| {' | '.join(cells)} |"
        lines.append(line + "\n")
    return "".join(lines)


def result(run: dict[str, Any]) -> str:
    """What a run is judged by, as its task has it."""
    if "test r2" in run:
        return f"R2 {run['test r2']:.4f}"
    if run["recipe"].startswith("shakespeare"):
        return f"{run['test bits']:.3f} bits"
    half = run.get("test_half_rate accuracy")
    return f"{run['test accuracy']:.2%}" + (f", at half rate {half:.2%}" if half else "")
