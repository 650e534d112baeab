"""What does a frozen model cost in onnxruntime and AOTInductor, and how far is it from the model?

    pip install -e ".[test]"
    OMP_NUM_THREADS=1 python benchmarks/deploy.py [--budget SECONDS] [--out FILE.json]

Milliseconds at batch 1, on one thread, of a chunk of 64 steps from a state to the next, and of whole
sequences, for a layer and for a model of four blocks. Contenders take turns, so that constants come from
memory, not from a cache:

- model: the original, in evaluation.
- frozen: what `s4.deploy.freeze` makes of it, by FFT and as a scan, in PyTorch.
- onnxruntime, AOTInductor: its `.onnx`, and a package compiled from its `.pt2`, which needs a C++ compiler.

The error is the largest difference from the model in float64, as a fraction of the largest output. Prints a
table and writes JSON.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from harness import Budget, Contender, Measured, Report, measure, result_file, run, show
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model
from s4.deploy import export, freeze

CHUNK = 64


@dataclass
class Cell(Measured):
    """One measurement; error as a fraction of the largest output."""

    who: str
    what: str
    part: str
    L: int
    error: float


def models(d_model: int) -> dict[str, nn.Module]:
    """What is deployed: fresh, with a fixed seed."""
    torch.manual_seed(0)
    blocks = [S4Block(S4Layer(d_model)) for _ in range(4)]
    return {
        "S4 layer": S4Layer(d_model),
        "S4D layer": S4Layer(d_model, variant="diag"),
        "model of 4": S4Model(nn.Linear(d_model, d_model), blocks, nn.Linear(d_model, d_model)),
    }


def compiled(file: Path) -> Callable[..., Any]:
    """A package of AOTInductor made from a .pt2."""
    package = torch._inductor.aoti_compile_and_package(
        torch.export.load(file), package_path=str(file.with_suffix(".package.pt2"))
    )
    return torch._inductor.aoti_load_package(package)


def in_onnxruntime(file: Path) -> Callable[..., Tensor]:
    """A session on one thread: tensors to the first output."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options)
    names = [given.name for given in session.get_inputs()]

    def call(u: Tensor, state: dict[str, Tensor] | None = None) -> Tensor:
        tensors = [u, *(state or {}).values()]
        given = {name: t.numpy() for name, t in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, given)[0])

    return call


def first(call: Callable[..., Any], *arguments: Any) -> Tensor:
    """The output, without the state that may come with it."""
    found = call(*arguments)
    return found if isinstance(found, Tensor) else found[0]


def contenders(model: nn.Module, part: str, u: Tensor, folder: Path) -> list[Contender]:
    """All who compute this part of this model of these inputs."""
    L = u.shape[1]
    length = {"max_length": L} if part == "forward" else {"chunk": L}
    files = [export(model, folder / f"model{suffix}", part, **length) for suffix in (".onnx", ".pt2")]
    runtimes = {"onnxruntime": in_onnxruntime(files[0]), "AOTInductor": compiled(files[1])}
    if part == "chunk":
        frozen, state = freeze(model, chunk=L), model.initial_state(1)
        named = frozen.part("chunk").initial_state(1)
        calls = {
            "model": partial(first, partial(model, return_state=True), u, state),
            "frozen": partial(first, frozen.chunk, u, state),
            **{who: partial(first, call, u, named) for who, call in runtimes.items()},
        }
    else:
        calls = {
            "model": partial(model, u),
            **{f"frozen, {mode}": partial(freeze(model, L, mode=mode), u) for mode in ("fft", "scan")},
            **{who: partial(first, call, u) for who, call in runtimes.items()},
        }
    return [Contender(who, call, [u]) for who, call in calls.items()]


def main(
    budget: PositiveFloat = 600.0,
    seconds: NonNegativeFloat = 1.0,
    d_model: PositiveInt = 128,
    lengths: list[PositiveInt] = [256, 1024, 4096],  # noqa: B006  # read only
    out: Path | None = None,
    replace: bool = False,
) -> None:
    """Time frozen models in several runtimes.

    Args:
        budget: seconds after which no further measurement starts; exports and compilers are not counted.
        seconds: spent on one contender of one cell, between 3 and 50 runs.
        d_model: width.
        lengths: of whole sequences.
        out: file of results; without it ~/.cache/s4/benchmarks/deploy-cpu.json.
        replace: write over a committed result.
    """
    device, file = torch.device("cpu"), result_file("deploy", "cpu", out, replace)
    torch.set_num_threads(1)
    found, clock = models(d_model), Budget(budget)
    parts = [("chunk", CHUNK), *(("forward", L) for L in lengths)]
    total, runtime = len(found) * len(parts), onnxruntime.__version__
    with Report(file, device, clock, total=total, onnxruntime=runtime, d_model=d_model) as report:
        for what, part, L in ((what, part, L) for what in found for part, L in parts):
            if not report.begin(f"{what}, {part} of {L}"):
                break
            model, u = found[what].eval().requires_grad_(False), torch.randn(1, L, d_model)
            with tempfile.TemporaryDirectory() as folder:
                here = contenders(model, part, u, Path(folder))
                measured, failed = measure(here, False, seconds, clock)
                want = model.double()(u.double())
                errors = {c.who: float((c.run() - want).abs().max() / want.abs().max()) for c in here[1:]}
                model.float()
            report.add(
                (
                    Cell(**asdict(m), who=who, what=what, part=part, L=L, error=errors.get(who, 0.0))
                    for who, m in measured.items()
                ),
                {f"{who}: {what}, {part} of {L}": message for who, message in failed.items()},
                len(here),
            )
        show(
            ("what", "part", "L", "who", "ms", "quartiles", "error"),
            (
                (
                    c.what,
                    c.part,
                    c.L,
                    c.who,
                    f"{c.ms:.3f}",
                    f"{c.ms_low:.3f} - {c.ms_high:.3f}",
                    f"{c.error:.1e}",
                )
                for c in report.cells
            ),
        )
    report.finish()


if __name__ == "__main__":
    run(main)
