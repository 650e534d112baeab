"""What a run leaves behind: results, learning curve, predictions, samples."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainer.runs import read_metrics


def learning_curve(folder: Path) -> Path | None:
    """Plot what training and validation logged in metrics.csv; None if nothing was."""
    import matplotlib.pyplot as plt  # only here: training does without

    series: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in read_metrics(folder / "metrics.csv"):
        for name, value in row.items():
            if name.startswith(("train/", "val/")):
                series[name].append((int(row["step"]), float(value)))
    if not series:
        return None
    logged = {name.split("/")[1] for name in series}
    second = next((name for name in ("accuracy", "r2", "bits") if name in logged), "loss")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, quantity in zip(axes, ("loss", second), strict=True):
        for stage, style in (
            ("train", {"alpha": 0.35, "linewidth": 1.0}),
            ("val", {"marker": "o", "markersize": 3}),
        ):
            if points := series[f"{stage}/{quantity}"]:
                axis.plot(
                    *zip(*points, strict=True),
                    label={"train": "training", "val": "validation"}[stage],
                    **style,
                )
        axis.set(xlabel="step", ylabel={"r2": "$R^2$"}.get(quantity, quantity))
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(frameon=False)
    axes[0].set_yscale("log")
    file = folder / "learning_curve.png"
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file


def write_labels(file: Path, targets: Tensor, probabilities: Tensor) -> None:
    """Labels (n,) and probabilities (n, classes) as a table, a row for each sequence."""
    with file.open("w", newline="") as rows:
        writer = csv.writer(rows)
        writer.writerow(["row", "label", "predicted", *range(probabilities.shape[1])])
        for index, (label, row) in enumerate(zip(targets.tolist(), probabilities, strict=True)):
            writer.writerow([index, label, int(row.argmax()), *(f"{value:.6f}" for value in row)])


def write_values(file: Path, targets: Tensor, predicted: Tensor) -> Path:
    """Real targets and predictions (n, M, C) as arrays, and a plot of some of them beside it."""
    import matplotlib.pyplot as plt

    np.savez_compressed(file, targets=targets.numpy(), predicted=predicted.numpy())
    shown = torch.linspace(0, len(targets) - 1, min(6, len(targets))).long()
    figure, axes = plt.subplots(2, 3, figsize=(12, 5), layout="constrained", squeeze=False)
    for axis, row in zip(axes.flat, shown.tolist(), strict=False):
        axis.plot(targets[row, :, -1], color="black", linewidth=1, label="target")
        axis.plot(predicted[row, :, -1], color="tab:red", linewidth=1, label="predicted")
        axis.set_title(f"row {row}", fontsize=9)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(frameon=False)
    plot = file.with_suffix(".png")
    figure.savefig(plot, dpi=120)
    plt.close(figure)
    return plot


def print_results(title: str, results: dict[str, Any]) -> None:
    """A small table, one result a line."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in results.items():
        table.add_row(name, str(value), style="bold" if name.startswith("test") else "")
    Console(soft_wrap=True).print(table)
