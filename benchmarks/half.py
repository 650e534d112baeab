"""Parameters in bfloat16 and float16: how exact is the mathematics, and what does rounding them cost?

    pip install -e ".[test]"
    python benchmarks/half.py [--out FILE.json] \
        [--runs '{copying: runs/copying/best.ckpt}' --paths '{smnist_small: DIR}']

Of fresh layers, beside dense float64 truth: errors of kernel, outputs and gradients given the rounded
parameters, and what rounding moves of the kernel, by parameter. Of trained models: what it moves of the
outputs. Prints tables and writes JSON.
"""

import copy
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import ROOT, folder, provenance, result_file, run, show
from torch import Tensor

from s4 import S4Layer

# What is trained, and the truth, are folders beside this one and no packages: hence imports further down.
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

import oracle  # noqa: E402  # the float64 truth of the test suite, which shares no code with s4
from data.batches import Batch, padded  # noqa: E402
from data.tasks import TASKS  # noqa: E402
from train import RECIPES  # noqa: E402
from trainer.checkpoints import load_checkpoint  # noqa: E402
from trainer.task import SequenceTask  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = [
    ("dplr", "legs"),
    ("dplr", "legt"),
    ("dplr", "fout"),
    ("diag", "legs"),
    ("diag", "lin"),
    ("diag", "inv"),
]
DT_RANGE = (1e-3, 1e-1)
# What is rounded alone; what follows is several.
GROUPS: dict[str, tuple[str, ...]] = {
    name: (name,) for name in ("log_dt", "log_A_real", "A_imag", "P", "B", "C", "D")
}
GROUPS["all"] = tuple(GROUPS)
GROUPS["all but log_dt, A_imag"] = ("log_A_real", "P", "B", "C", "D")


def made(variant: str, init: str, N: int, channels: int) -> S4Layer:
    """A float32 layer whose channels cover the whole range of dt."""
    layer = S4Layer(channels, N, variant=variant, init=init)
    with torch.no_grad():
        first, last = torch.tensor(DT_RANGE).log().tolist()
        layer.log_dt.copy_(torch.linspace(first, last, channels))
    return layer


def rounded(module: torch.nn.Module, names: Iterable[str], dtype: torch.dtype) -> torch.nn.Module:
    """A copy whose S4 layers have these parameters rounded, still in float32."""
    found, names = copy.deepcopy(module), tuple(names)
    for layer in found.modules():
        for name, p in layer.named_parameters(recurse=False) if isinstance(layer, S4Layer) else ():
            if name in names:
                p.data = p.data.to(dtype).to(p.dtype)
    return found


def worst(got: Tensor, want: Tensor) -> float:
    """Largest error over the largest number."""
    return float((got.double() - want).abs().max() / want.abs().max())


def mathematics(layer: S4Layer, dtype: torch.dtype, L: int) -> dict[str, Any]:
    """Errors of the layer in half precision, beside the recurrence in float64 of its rounded parameters."""
    layer = copy.deepcopy(layer).to(dtype)
    H = layer.d_model
    u, grad = (torch.randn(2, L, H).to(dtype) for _ in range(2))
    numbers = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    system = oracle.discrete(numbers, layer.discretization)
    want, _ = oracle.forward(system, u)
    want.backward(grad.double())
    y = layer(u)
    y.backward(grad)
    exact = copy.deepcopy(layer).float()
    exact_y = exact(u.float())
    exact_y.backward(grad.float())
    grads = [worst(p.grad, numbers[name].grad) for name, p in layer.named_parameters()]  # type: ignore[arg-type]
    unrounded = [worst(p.grad, numbers[name].grad) for name, p in exact.named_parameters()]  # type: ignore[arg-type]
    with torch.no_grad():
        kernel = worst(layer.kernel(L), oracle.kernel(system, L)[0])
        outputs = {"output": worst(y, want), "output in float32": worst(exact_y, want)}
    return {"kernel": kernel, **outputs, "gradient": max(grads), "gradient in float32": max(unrounded)}


def moved(layer: S4Layer, dtype: torch.dtype, L: int) -> dict[str, list[float]]:
    """By what is rounded, the change of the kernel, D at its lag 0, over its norm: median and worst channel.

    That is the root mean square of the change of outputs, for white noise.
    """
    with torch.no_grad():

        def response(of: S4Layer) -> Tensor:
            k = of.kernel(L).double()
            k[:, 0] += of.D.double()
            return k

        layer = copy.deepcopy(layer).double()
        K, found = response(layer), {}
        for name, names in GROUPS.items():
            if {*names} & {n for n, _ in layer.named_parameters()}:
                change = (response(rounded(layer, names, dtype)) - K).norm(dim=-1) / K.norm(dim=-1)
                found[name] = [float(change.median()), float(change.max())]
    return found


def fresh(N: int, L: int, channels: int) -> list[dict[str, Any]]:
    """Rows of both tables of new layers."""
    rows = []
    for dtype_name, dtype in DTYPES.items():
        for variant, init in CASES:
            layer = made(variant, init, N, channels)
            row = {"dtype": dtype_name, "variant": variant, "init": init, "N": N, "L": L}
            rows.append(row | {"error": mathematics(layer, dtype, L), "rounding": moved(layer, dtype, L)})
    return rows


def held(recipe: str, path: Path | None, options: dict[str, Any], samples: int) -> tuple[Any, list[Batch]]:
    """The test data of a recipe: what it is, and as many samples as asked for."""
    content = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    data = TASKS[content["task"]](**{**content["data"], **options, **({"path": path} if path else {})})
    data.prepare_data()
    data.setup("test")
    loader, batches = data.test_dataloader(), []
    for batch in loader[0] if isinstance(loader, list) else loader:
        batches.append(padded(data.transform(batch, False), data.spec.tokens))
        if sum(len(b.targets) for b in batches) >= samples:
            break
    return data.spec, batches


def outputs(task: SequenceTask, batches: Sequence[Batch]) -> Tensor:
    """Of all samples, in double precision."""
    with torch.no_grad():
        return torch.cat([task(batch).double().flatten(0, -2) for batch in batches])


def trained(recipe: str, checkpoint: Path, path: Path | None, samples: int) -> list[dict[str, Any]]:
    """Rows of a model: accuracy, how many choices stay, change of the outputs over their deviation."""
    content = load_checkpoint(checkpoint)
    spec, batches = held(recipe, path, {}, samples)
    options = {k: v for k, v in content["hyper_parameters"].items() if k != "_instantiator"}  # Lightning's
    task = SequenceTask(spec, **options).eval()
    task.load_state_dict(content["state_dict"])
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    want = outputs(task, batches)
    scale = (want - want.mean(0)).square().mean().sqrt()
    rows = [{"recipe": recipe, "dtype": "float32", "rounded": "nothing", "moved": 0.0, "same": 1.0,
             "accuracy": float((want.argmax(-1) == targets).double().mean())}]  # fmt: skip
    for dtype_name, dtype in DTYPES.items():
        kinds = {name: rounded(task, names, dtype) for name, names in GROUPS.items() if name != "all"}
        kinds["S4 layers"] = rounded(task, GROUPS["all"], dtype)
        kinds["the model, computed so"] = copy.deepcopy(task).to(dtype)
        kinds["the model but S4 layers"] = fine = copy.deepcopy(task).to(dtype)
        for own, exact in zip(fine.modules(), task.modules(), strict=True):
            if isinstance(own, S4Layer):
                own.float().load_state_dict(exact.state_dict())
        for name, model in kinds.items():
            got = outputs(model, batches)
            rows.append({
                "recipe": recipe, "dtype": dtype_name, "rounded": name,
                "moved": float((got - want).square().mean().sqrt() / scale),
                "same": float((got.argmax(-1) == want.argmax(-1)).double().mean()),
                "accuracy": float((got.argmax(-1) == targets).double().mean()),
            })  # fmt: skip
    return rows


def main(
    runs: dict[str, Path] = {},  # noqa: B006  # read only
    paths: dict[str, Path] = {},  # noqa: B006  # read only
    samples: int = 400,
    d_state: int = 64,
    length: int = 1024,
    channels: int = 8,
    out: Path | None = None,
    replace: bool = False,
) -> None:
    """Measure what parameters in half precision cost.

    Args:
        runs: checkpoints by the recipe that they were trained with.
        paths: folders of the data of recipes.
        samples: of the test set of a recipe, at least.
        d_state: of new layers.
        length: of kernels and sequences of new layers.
        channels: of new layers, with dt from 1e-3 to 1e-1.
        out: file of results; without it ~/.cache/s4/benchmarks/half-cpu.json.
        replace: write over a committed result.
    """
    file = result_file("half", "cpu", out, replace)
    for recipe, checkpoint in runs.items():
        if not (RECIPES / f"{recipe}.yaml").is_file() or not checkpoint.is_file():
            raise SystemExit(f"--runs: there is no recipe {recipe} or no file {checkpoint}")
    for recipe, path in paths.items():
        folder(f"--paths: {recipe}", path)
    torch.manual_seed(0)
    layers = fresh(d_state, length, channels)
    errors = list(layers[0]["error"])
    show(
        ("dtype", "variant", "init", *errors),
        ((r["dtype"], r["variant"], r["init"], *(f"{r['error'][e]:.1e}" for e in errors)) for r in layers),
    )
    show(
        ("dtype", "variant", "init", *GROUPS),
        (
            (
                r["dtype"],
                r["variant"],
                r["init"],
                *("{:.1e} {:.1e}".format(*r["rounding"].get(g, (0, 0))) for g in GROUPS),
            )
            for r in layers
        ),
    )
    models = [
        row for recipe, path in runs.items() for row in trained(recipe, path, paths.get(recipe), samples)
    ]
    show(
        ("recipe", "dtype", "rounded", "outputs moved", "same choice", "accuracy"),
        (
            (
                r["recipe"],
                r["dtype"],
                r["rounded"],
                f"{r['moved']:.1e}",
                f"{r['same']:.2%}",
                f"{r['accuracy']:.2%}",
            )
            for r in models
        ),
    )
    result = {**provenance(torch.device("cpu")), "dt": DT_RANGE, "layers": layers, "models": models}
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
