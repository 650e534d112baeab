"""Writes what this library computed at one commit, which `tests/test_golden.py` holds later ones to.

    PYTHONPATH=.:examples python tests/golden/make.py [layers | models | run]

The files in this folder were written at 7004623. They stand for the checkpoints, seeds and results that users
have: write one anew only if these are meant to change, and say so in the changelog. What is measured is
below, in public names alone, so that it can be measured again however the library is built inside.
"""

import copy
import csv
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model

HERE = Path(__file__).parent

# Several chunks of the scan, the last one ragged.
BATCH, LENGTH, STEPS = 2, 101, 20
LENGTHS = torch.tensor([LENGTH, 37])
SEED = 0

_DPLR = [{"variant": "dplr", "init": init} for init in ("legs", "legt", "fout")]
_DIAG = [{"variant": "diag", "init": init} for init in ("legs", "lin", "inv")]
_SYSTEMS = [*_DPLR, *_DIAG, *({**system, "discretization": "bilinear"} for system in _DIAG)]
LAYERS: dict[str, dict[str, Any]] = {
    "-".join(map(str, system.values())) + suffix: {"d_model": 4, "d_state": 8, **system, **more}
    for systems, suffix, more in (
        (_SYSTEMS, "", {}),
        (_SYSTEMS, "-bidirectional", {"bidirectional": True}),
        ((_DPLR[0], _DIAG[0]), "-n_ssm-2", {"n_ssm": 2}),
        ((_DPLR[1], _DIAG[1]), "-n_ssm-4-bidirectional", {"n_ssm": 4, "bidirectional": True}),
        # Which hold what float32 is too coarse for: 1e-12.
        ((_DPLR[0], _DPLR[1], _DIAG[1]), "-float64", {"dtype": "float64"}),
        ((_DPLR[0], _DIAG[2]), "-d_state-32", {"d_state": 32, "dt_min": 1e-4, "dt_max": 1e-2}),
    )
    for system in systems
}


def layer(arguments: dict[str, Any], **options: Any) -> S4Layer:
    """A layer by the arguments in `LAYERS`, which are such as JSON has them."""
    dtype = getattr(torch, arguments.get("dtype", "float32"))
    return S4Layer(**{**arguments, "dtype": dtype}, **options)


def _block(variant: str = "dplr", **options: Any) -> S4Block:
    return S4Block(S4Layer(4, 8, variant=variant), **options)


def _model(pooling: str) -> S4Model:
    blocks = [_block(), _block("diag", norm="rms", d_ff=6)]
    return S4Model(nn.Embedding(7, 4), blocks, nn.Linear(4, 7), norm=nn.LayerNorm(4), pooling=pooling)


MODELS: dict[str, Callable[[], S4Block | S4Model]] = {
    "block": _block,
    "block-batch": lambda: _block("diag", norm="batch", prenorm=False, activation="relu", mixer="linear"),
    "block-feed-forward": lambda: _block(norm="rms", activation="silu", d_ff=6),
    "model": lambda: _model("none"),
    "model-mean": lambda: _model("mean"),
    "model-last": lambda: _model("last"),
}


@torch.no_grad()
def of_layer(one: S4Layer, u: Tensor) -> dict[str, Tensor]:
    """What a layer computes from u (B, L, H), by name."""
    one.eval()
    u = u.to(one.D.dtype)
    found = {"forward": one(u), "kernel": one.kernel(LENGTH)}
    if one.bidirectional:
        found["padded"] = one(u, lengths=LENGTHS, rate=0.5)
    else:
        found["step"], found["step state"] = stepped(one, u)
        _, state = found["forward"], found["state"] = one(u, return_state=True)
        padded = one(u, state, lengths=LENGTHS, rate=0.5, return_state=True)
        found["padded"], found["padded state"] = padded
    return found | dict(zip(("A", "B", "C", "D"), (x.detach() for x in one.dense()), strict=True))


@torch.no_grad()
def of_model(model: S4Block | S4Model, u: Tensor) -> dict[str, Tensor]:
    """What a block computes from u (B, L, H), or a model from tokens (B, L), by name."""
    if u.is_floating_point():
        u = u.to(next(model.parameters()).dtype)
    found = {"trained": model.train()(u)}  # batch norm takes its statistics from this
    model.eval()
    found |= {
        "forward": model(u),
        "padded": model(u, lengths=LENGTHS, rate=0.5),
        "step": stepped(model, u)[0],
    }
    if isinstance(model, S4Model) and model.pooling == "none":
        found["generated"] = model.generate(u, STEPS)
    return found


def stepped(model: Any, u: Tensor) -> tuple[Tensor, Any]:
    """The outputs (B, STEPS, ...) of the first steps, and the state after them."""
    state, outputs = model.initial_state(len(u)), []
    for t in range(STEPS):
        y, state = model.step(u[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


class Golden:
    """One of the files.

    Its metadata has for each case the arguments it was made with and the names of its parameters in their
    order, which the tensors of the format do not keep.
    """

    def __init__(self, name: str) -> None:
        self.file = safe_open(HERE / f"{name}.safetensors", "pt")
        self.cases: dict[str, dict[str, Any]] = json.loads(self.file.metadata()["cases"])

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def parameters(self, case: str) -> dict[str, Tensor]:
        """The state_dict of a case, in its order."""
        return {name: self[f"{case}/parameters/{name}"] for name in self.cases[case]["parameters"]}

    def outputs(self, case: str) -> dict[str, Tensor]:
        """What was computed with them."""
        return {name: self[f"{case}/{name}"] for name in self.cases[case]["outputs"]}


def _write(name: str, inputs: dict[str, Tensor], cases: dict[str, tuple[Any, ...]]) -> None:
    tensors, metadata = dict(inputs), {}
    for case, (arguments, parameters, outputs) in cases.items():
        metadata[case] = {"arguments": arguments, "parameters": [*parameters], "outputs": [*outputs]}
        tensors |= {f"{case}/parameters/{key}": value for key, value in parameters.items()}
        tensors |= {f"{case}/{key}": value for key, value in outputs.items()}
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(tensors, HERE / f"{name}.safetensors", {"cases": json.dumps(metadata)})


def _exact(now: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in float64, rounded: of two results in float32 neither could be held to the other's errors."""
    return {name: exact[name].to(x.dtype) for name, x in now.items()}


def write_layers() -> None:
    """layers.safetensors."""
    torch.manual_seed(1)
    u = torch.randn(BATCH, LENGTH, 4)
    cases = {}
    for case, arguments in LAYERS.items():
        torch.manual_seed(SEED)
        one, exact = layer(arguments), layer({**arguments, "dtype": "float64"}, mode="fft")
        exact.load_state_dict(one.state_dict())
        cases[case] = arguments, one.state_dict(), _exact(of_layer(one, u), of_layer(exact, u))
    _write("layers", {"u": u}, cases)


def write_models() -> None:
    """models.safetensors."""
    torch.manual_seed(1)
    u, tokens = torch.randn(BATCH, LENGTH, 4), torch.randint(7, (BATCH, LENGTH))
    cases = {}
    for case, make in MODELS.items():
        torch.manual_seed(SEED)
        model = make()
        exact, inputs = copy.deepcopy(model).double(), tokens if isinstance(model, S4Model) else u
        parameters = {name: value.clone() for name, value in model.state_dict().items()}
        cases[case] = {}, parameters, _exact(of_model(model, inputs), of_model(exact, inputs))
    _write("models", {"u": u, "tokens": tokens}, cases)


# No dropout: its masks differ between processors. In the middle of an epoch of 10 steps.
RUN = [
    *("digits", "--model.d_model", "4", "--model.n_layers", "1", "--model.d_state", "4"),
    *("--model.dropout", "0", "--model.warmup_steps", "2", "--data.batch_size", "128"),
    *("--trainer.max_steps", "24", "--save_every", "7"),
    *("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.log_every_n_steps", "1"),
    *("--trainer.enable_progress_bar", "false"),
]
STOPPED = 14


def losses(folder: Path) -> dict[str, float]:
    """The training loss that a run logged, by step."""
    with (folder / "metrics.csv").open(newline="") as rows:
        return {row["step"]: float(row["train/loss"]) for row in csv.DictReader(rows) if row["train/loss"]}


def write_run() -> None:
    """run/last.ckpt, of a run in its middle, and run/losses.json, what the run logged from there on."""
    import train
    from trainer import cli
    from trainer.checkpoints import AtomicCheckpointIO

    with tempfile.TemporaryDirectory() as folder:

        class Keep(AtomicCheckpointIO):
            def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, **options: Any) -> None:
                super().save_checkpoint(checkpoint, path, **options)
                if checkpoint["global_step"] == STOPPED:
                    (HERE / "run").mkdir(exist_ok=True)
                    shutil.copy(path, HERE / "run" / "last.ckpt")

        cli.AtomicCheckpointIO = Keep
        train.run([*RUN, "--run_dir", folder])
        later = {step: loss for step, loss in losses(Path(folder)).items() if int(step) >= STOPPED}
    (HERE / "run" / "losses.json").write_text(json.dumps(later, indent=2) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or ("layers", "models", "run"):
        {"layers": write_layers, "models": write_models, "run": write_run}[name]()
