"""Train on handwritten digits, then read them pixel by pixel: python examples/demo.py [--options]."""

import os

# Before torch is loaded: its threads sleep while they wait, instead of taking turns on a core that is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from train import run
from trainer.report import print_results

from s4 import S4Model

MIN_ACCURACY = 0.97
MAX_DIFFERENCE = 1e-3


def step_through(model: S4Model, inputs: Tensor) -> Tensor:
    """Logits (B, L, classes) after each of the steps of `inputs` (B, L, d_input), by the recurrence alone."""
    state, outputs = model.initial_state(len(inputs)), []
    steps = range(inputs.shape[1])
    for step in track(steps, "reading pixel by pixel", transient=True, disable=not sys.stdout.isatty()):
        logits, state = model.step(inputs[:, step], state)
        outputs.append(logits)
    return torch.stack(outputs, 1)


def plot(images: Tensor, labels: Tensor, predicted: Tensor, file: Path) -> None:
    """Accuracy against pixels seen, and what the model thinks of a few digits on the way.

    images: (B, 64) grey values; labels: (B,); predicted: (B, 64) classes after each pixel.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    stages, shown = (16, 28, 40, 52, 64), [int((labels == digit).nonzero()[0]) for digit in (0, 3, 4, 6, 8)]
    figure = plt.figure(figsize=(11, 5), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(1.1, 1))
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axis = left.subplots()
    accuracy = (predicted == labels[:, None]).float().mean(0)
    axis.plot(range(1, 65), accuracy, color="tab:blue", linewidth=2)
    axis.axhline(0.1, color="grey", linestyle=":", label="chance")
    axis.set(xlabel="pixels seen", ylabel="test accuracy", ylim=(0, 1.02), xlim=(1, 64))
    axis.set_title(f"one pixel at a time: {accuracy[-1]:.1%} after all 64")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    cells = right.subplots(len(shown), len(stages), squeeze=False)
    for row, image in zip(cells, shown, strict=True):
        for cell, seen in zip(row, stages, strict=True):
            visible = np.where(np.arange(64) < seen, images[image].numpy(), np.nan).reshape(8, 8)
            cell.imshow(visible, cmap="gray_r", vmin=0, vmax=16)
            cell.set(xticks=[], yticks=[], facecolor="lavender")
            guess = int(predicted[image, seen - 1])
            right_guess = guess == int(labels[image])
            cell.set_title(str(guess), color="tab:green" if right_guess else "tab:red", fontsize=11, pad=3)
    right.suptitle("the guess after 16, 28, 40, 52 and 64 pixels")
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Train, step, compare, plot; 1 if the accuracy or the agreement is not what it should be."""
    cli = run(["fit", "digits", "--run_dir", "runs/demo", *arguments], "demo.py")
    model, data = cli.model.model.cpu().eval(), cli.datamodule
    images, labels = (data.tensors["test"][name] for name in ("images", "labels"))
    inputs = data.normalize(images)
    with torch.inference_mode():
        convolved = model(inputs)
        stepped = step_through(model, inputs)
    difference = (convolved - stepped[:, -1]).abs().max().item()
    predicted = stepped.argmax(-1)
    accuracy = (convolved.argmax(-1) == labels).float().mean().item()
    same = int((convolved.argmax(-1) == predicted[:, -1]).sum())
    file = Path(cli.results["files"]) / "pixel_by_pixel.png"
    plot(images[:, :, 0], labels, predicted, file)
    print_results(
        "Convolution and recurrence",
        {
            "test accuracy": f"{accuracy:.2%}",
            "largest difference of the logits": f"{difference:.1e}",
            "same predicted class": f"{same} of {len(labels)}",
            "plot": file,
        },
    )
    return 0 if accuracy >= MIN_ACCURACY and difference <= MAX_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
