"""What does torch.compile make of a layer and of a model: steps, whole sequences, training?

    OMP_NUM_THREADS=1 python benchmarks/compiled.py [--budget SECONDS] [--out FILE.json]

Milliseconds on one thread, eager and compiled by Inductor, which needs a C++ compiler, with one graph for all
lengths and batches (`dynamic=True`), both in turns:

- step: one time step at batch 1, in evaluation without gradients.
- forward: a whole sequence, in evaluation without gradients.
- training: a whole sequence, forward and backward.

Compilation is left out. Prints a table and writes JSON.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Budget, Contender, Measured, Report, measure, result_file, run, show
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model

PARTS = ("step", "forward", "training")


@dataclass
class Cell(Measured):
    """One measurement."""

    who: str
    what: str
    part: str
    B: int
    L: int


def models(d_model: int) -> dict[str, Any]:
    """Fresh, with a fixed seed."""
    torch.manual_seed(0)
    blocks = [S4Block(S4Layer(d_model)) for _ in range(4)]
    return {
        "S4 layer": S4Layer(d_model),
        "S4D layer": S4Layer(d_model, variant="diag"),
        "model of 4": S4Model(nn.Linear(d_model, d_model), blocks, nn.Linear(d_model, d_model)),
    }


def stepped(step: Callable[..., Any], u: Tensor, state: Any) -> Tensor:
    """The output of one step."""
    y: Tensor = step(u, state)[0]
    return y


def contenders(model: Any, part: str, u: Tensor) -> list[Contender]:
    """Eager and compiled."""
    model.train(part == "training")
    parameters = list(model.parameters())
    call = model.step if part == "step" else model
    both = {"eager": call, "compiled": torch.compile(call, fullgraph=True, dynamic=True)}
    if part == "step":
        state = model.initial_state(len(u))
        return [Contender(who, partial(stepped, f, u[:, 0], state), parameters) for who, f in both.items()]
    return [Contender(who, partial(f, u), parameters) for who, f in both.items()]


def main(
    budget: PositiveFloat = 600.0,
    seconds: NonNegativeFloat = 1.0,
    d_model: PositiveInt = 128,
    B: PositiveInt = 4,
    L: PositiveInt = 1024,
    out: Path | None = None,
    replace: bool = False,
) -> None:
    """Time compiled layers and models beside eager ones.

    Args:
        budget: seconds after which no further measurement starts; compilation is not counted.
        seconds: spent on one contender of one cell, between 3 and 50 runs.
        d_model: width.
        B: batch of whole sequences; a step has 1.
        L: length of whole sequences.
        out: file of results; without it ~/.cache/s4/benchmarks/compiled-cpu.json.
        replace: write over a committed result.
    """
    device, file = torch.device("cpu"), result_file("compiled", "cpu", out, replace)
    torch.set_num_threads(1)
    found, clock = models(d_model), Budget(budget)
    with Report(file, device, clock, total=len(found) * len(PARTS), d_model=d_model) as report:
        for what, part in ((what, part) for what in found for part in PARTS):
            if not report.begin(f"{what}, {part}"):
                break
            shape = (1, 1, d_model) if part == "step" else (B, L, d_model)
            here = contenders(found[what], part, torch.randn(shape))
            measured, failed = measure(here, part == "training", seconds, clock)
            report.add(
                (
                    Cell(**asdict(m), who=who, what=what, part=part, B=shape[0], L=shape[1])
                    for who, m in measured.items()
                ),
                {f"{who}: {what}, {part}": message for who, message in failed.items()},
                len(here),
            )
        show(
            ("what", "part", "B, L", "who", "ms", "quartiles"),
            (
                (c.what, c.part, f"{c.B}, {c.L}", c.who, f"{c.ms:.3f}", f"{c.ms_low:.3f} - {c.ms_high:.3f}")
                for c in report.cells
            ),
        )
    report.finish()


if __name__ == "__main__":
    run(main)
