"""The examples: recipes, resume, and what their command line does."""

import csv
import shutil
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

import train
from data.base import Spec
from data.batches import Batch
from example_files import OF_LIGHTNING, TINY, WRITERS, fails, step_losses
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from processes import printed, process
from trainer import cli as command_line
from trainer import runs
from trainer.progress import LineProgress
from trainer.report import learning_curve
from trainer.task import SequenceTask

from s4 import S4Model

pytestmark = [
    pytest.mark.usefixtures("own_folder"),
    OF_LIGHTNING,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # here on purpose
]
LABELS = Spec("label", 1, 10)
RECIPES = sorted(path.stem for path in train.RECIPES.glob("*.yaml"))
TASKS = {name: yaml.safe_load((train.RECIPES / f"{name}.yaml").read_text())["task"] for name in RECIPES}
PLOTTED = {task: name for name, task in reversed(TASKS.items())}  # a recipe of each task
Capture = pytest.CaptureFixture[str]


# Recipes and the command line


@pytest.mark.usefixtures("brief_runs")
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_resumes_and_tests(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = yaml.safe_load((train.RECIPES / f"{recipe}.yaml").read_text())
    options = [*TINY, "--data.batch_size", "8", *WRITERS[values["task"]](tmp_path / "data", values)]
    limits = ["--trainer.max_steps", "3", "--trainer.max_epochs", "-1", "--save_every", "1"]
    save = runs.LastCheckpoint._save

    def keep_the_first(self: runs.LastCheckpoint, trainer: Trainer) -> None:
        save(self, trainer)
        if trainer.global_step == 1:
            shutil.copytree(self.file.parent, "stopped")

    with monkeypatch.context() as patched:
        patched.setattr(runs.LastCheckpoint, "_save", keep_the_first)
        if recipe == PLOTTED[values["task"]]:  # what is plotted is of the task
            patched.setattr(command_line, "learning_curve", learning_curve)
        cli = train.run([recipe, *options, *limits])
    folder = tmp_path / "runs" / recipe
    losses = step_losses(folder)
    assert cli.results["steps"] == len(losses) == 3
    kept = {path.name for path in folder.iterdir()}
    assert {"last.ckpt", "config.yaml", "metrics.csv", "results.json", "model.safetensors"} <= kept
    assert all(torch.isfinite(parameter).all() for parameter in cli.model.parameters())

    if (folder / "config.json").is_file():
        adaptive = cli.model.adaptive
        model = S4Model.from_pretrained(folder, modules={"encoder": adaptive} if adaptive else None)
        assert all(
            torch.equal(p, cli.model.model.state_dict()[name]) for name, p in model.state_dict().items()
        )
    else:
        assert cli.model.compare is not None

    assert (folder / "learning_curve.png").is_file() == (recipe == PLOTTED[values["task"]])

    train.run([recipe, *options, *limits, "--ckpt_path", "stopped/last.ckpt"])
    assert {step: loss for step, loss in step_losses(tmp_path / "stopped").items() if step} == {
        step: loss for step, loss in losses.items() if step
    }
    train.run(["test", recipe, *options])


def test_a_run_is_a_model_without_the_examples(tmp_path: Path) -> None:
    """In a process that has no module of them, and as one of transformers: the logits of the trained one."""
    cli = train.run(["digits", *TINY, "--trainer.max_steps", "3"])
    u = torch.rand(5, 64, 1)
    torch.save(u, tmp_path / "u.pt")
    program = """
import sys, torch, s4
model = s4.S4Model.from_pretrained("runs/digits")
assert not {"trainer", "data", "lightning"} & set(sys.modules)
u = torch.load("u.pt")
from s4.transformers import S4ForSequenceClassification
theirs = S4ForSequenceClassification.from_s4(model)
torch.save([model(u).detach(), theirs(input_values=u).logits.detach()], "y.pt")
"""
    printed(process(program))
    model = cli.model.model.cpu().eval()
    for logits in torch.load(tmp_path / "y.pt"):
        torch.testing.assert_close(logits, model(u).detach(), rtol=1e-6, atol=1e-6)


def test_recipes_have_the_values_of_the_paper() -> None:
    recipe = yaml.safe_load((train.RECIPES / "scifar.yaml").read_text())
    model = recipe["model"]
    assert (model["n_layers"], model["d_model"], model["d_state"], model["dropout"]) == (6, 512, 64, 0.1)
    assert model["residual_dropout"] == 0.1
    assert (model["lr"], model["ssm_lr"], model["weight_decay"]) == (0.01, 0.001, 0.05)
    assert (model["bidirectional"], model["prenorm"], model["tie_dropout"]) == (True, False, True)
    assert (model["mixer"], model["norm"], model["n_ssm"]) == ("glu", "layer", 2)
    assert (model["warmup_steps"], recipe["data"]["batch_size"]) == (900, 50)
    assert recipe["trainer"]["max_epochs"] == 200
    for other in ("text", "retrieval", "listops"):
        recipe = yaml.safe_load((train.RECIPES / f"{other}.yaml").read_text())
        assert recipe["model"]["ssm_lr"] == {"dt": None, "A": 0.001, "B": 0.001}


def test_a_rate_for_each_by_the_command_line(capsys: Capture) -> None:
    rates = "{dt: null, A: 0.002, B: 0}"
    dropped = ["--model.residual_dropout", "0.3"]
    cli = train.run(["digits", *TINY, *dropped, "--trainer.max_steps", "2", "--model.ssm_lr", rates])
    assert [block.residual_dropout.p for block in cli.model.model.blocks] == [0.3]
    first = {g["name"]: g["initial_lr"] for g in cli.trainer.optimizers[0].param_groups}
    lr = cli.model.lr
    assert first == {"ssm dt": lr, "ssm A": 0.002, "ssm B": 0.0, "no_decay": lr, "decay": lr}
    train.run(["test", "digits", *TINY])
    fails(
        capsys, 1, ["digits", *TINY, "--model.ssm_lr", "{dt: null, A: 1}"], "must be a number, or have dt, A"
    )
    wrong = "{dt: null, A: -1, B: 1}"
    fails(capsys, 1, ["digits", *TINY, "--model.ssm_lr", wrong], "ssm_lr of A must be at least 0")


def test_fit_test_and_predict(tmp_path: Path) -> None:
    train.run(["digits", *TINY, "--trainer.max_epochs", "1"])
    folder = tmp_path / "runs" / "digits"
    assert (folder / "best.ckpt").is_file()
    before = (folder / "best.ckpt").read_bytes()
    # Without the options of the model: a checkpoint knows its own.
    cli = train.run(["test", "digits", "--trainer.accelerator", "cpu"])
    assert cli.config["test"]["ckpt_path"] == str(Path("runs/digits/best.ckpt"))
    train.run(["predict", "digits", *TINY, "--ckpt_path", "last"])
    with (folder / "predictions.csv").open(newline="") as rows:
        predictions = list(csv.DictReader(rows))
    assert len(predictions) == cli.datamodule.number("test")
    assert sum(float(predictions[0][str(digit)]) for digit in range(10)) == pytest.approx(1, abs=1e-4)
    assert (folder / "best.ckpt").read_bytes() == before
    # A second run does not touch the first; its configuration is itself a recipe.
    train.run(["fit", str(folder / "config.yaml"), "--trainer.max_epochs", "-1", "--trainer.max_steps", "1"])
    assert (tmp_path / "runs" / "digits-2" / "last.ckpt").is_file()
    assert (folder / "best.ckpt").read_bytes() == before
    assert runs.new_run(Path("runs/digits")) == Path("runs/digits-3")


def test_help_lists_recipes(capsys: Capture) -> None:
    for arguments in ([], ["--help"], ["fit", "-h"]):
        with pytest.raises(SystemExit) as ended:
            train.run(arguments)
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert [recipe for recipe in RECIPES if recipe not in shown] == []


def test_print_config(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        train.run(["scifar", "--model.lr", "0.004", "--print_config"])
    assert ended.value.code == 0
    assert "lr: 0.004" in capsys.readouterr().out


def test_every_choice_of_the_model_exists() -> None:
    choices = {
        name: get_args(hint)
        for name, hint in get_type_hints(SequenceTask.__init__).items()
        if get_origin(hint) is Literal
    }
    assert choices.keys() == {"cell", "variant", "init", "mode", "pooling", "norm", "mixer"}
    for name, values in choices.items():
        for value in values:
            variant = {"variant": "diag"} if value in ("lin", "inv") else {}
            SequenceTask(LABELS, d_model=4, n_layers=1, d_state=2, **{name: value, **variant})


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
def test_final_norm_of_pre_norm_stacks(norm: str) -> None:
    kinds = [
        type(SequenceTask(LABELS, d_model=4, n_layers=1, d_state=2, norm=norm, prenorm=prenorm).model.norm)
        for prenorm in (True, False)
    ]
    assert kinds == [torch.nn.RMSNorm if norm == "rms" else torch.nn.LayerNorm, type(None)]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_lstm_of_padded_sequences(pooling: str) -> None:
    """Each row of a batch gives what it gives alone."""
    task = SequenceTask(Spec("label", 3, 5), cell="lstm", d_model=6, n_layers=2, pooling=pooling)
    u, lengths = torch.randn(3, 9, 3), torch.tensor([9, 1, 4])
    together = task(Batch(u, torch.zeros(3), lengths))
    for row, length in enumerate(lengths.tolist()):
        alone = task(Batch(u[row : row + 1, :length], torch.zeros(1)))
        torch.testing.assert_close(together[row : row + 1], alone)


def test_lengths_and_rate_reach_the_model() -> None:
    """Each row of a padded batch gives what it gives alone, at the rate of the batch."""
    task = SequenceTask(Spec("label", 1, 5), d_model=4, n_layers=1, d_state=4, dt_min=0.1, dt_max=1.0)
    u, lengths = torch.randn(2, 9, 1), torch.tensor([9, 4])
    for rate in (1.0, 2.0):
        got = task(Batch(u, torch.zeros(2), lengths, rate))
        for row, length in enumerate(lengths.tolist()):
            alone = task.model(u[row : row + 1, :length], rate=rate)
            torch.testing.assert_close(got[row : row + 1], alone)
    once, twice = (task(Batch(u, torch.zeros(2), lengths, rate)) for rate in (1.0, 2.0))
    assert (once - twice).abs().max() > 1e-2


def test_options_of_a_checkpoint_and_of_a_command_line(capsys: Capture) -> None:
    """How to compute is free; what else is asked for must be what the weights were trained with."""
    options = ["digits", *TINY, "--trainer.max_steps", "2"]
    train.run([*options, "--model.mode", "fft", "--model.dropout", "0.1"])
    cli = train.run(["test", "digits", "--model.mode", "scan", "--trainer.accelerator", "cpu"])
    layer = cli.model.model.blocks[0].layer
    assert (layer.mode, layer.d_model) == ("scan", 8)
    # Nor need the data hold a batch of training where none is drawn.
    train.run(["validate", "digits", "--data.batch_size", "4000", "--trainer.accelerator", "cpu"])
    wrong = ["--model.dropout", "0.3", "--ckpt_path", "last"]
    fails(capsys, 1, [*options, *wrong], "model.dropout is 0.1 in the checkpoint, got 0.3")


@pytest.mark.usefixtures("brief_runs")
def test_precision_and_callbacks_of_lightning() -> None:
    options = ["digits", *TINY, "--trainer.max_steps", "2", "--trainer.callbacks", "LearningRateMonitor"]
    precisions = {"64-true": torch.float64, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}
    for precision, dtype in precisions.items():
        cli = train.run([*options, "--trainer.precision", precision])
        assert {parameter.dtype for parameter in cli.model.parameters()} == {dtype}
        fine = torch.promote_types(dtype, torch.float32)  # bfloat16 counts to 256
        assert {cli.model.scores[name]["loss"].mean_value.dtype for name in ("val", "test")} == {fine}
        assert any(isinstance(callback, LearningRateMonitor) for callback in cli.trainer.callbacks)
    few = ["--data.lag", "9", "--data.length", "50", "--data.train_size", "50", "--data.batch_size", "8"]
    train.run(["delay", *TINY, *few, *options[-4:], "--trainer.precision", "64-true"])


def test_generation_with_the_weights_of_something_else(tmp_path: Path, capsys: Capture) -> None:
    train.run(["digits", *TINY, "--trainer.max_steps", "1"])
    text = WRITERS["shakespeare"](tmp_path / "data", {})
    fails(
        capsys, 1, ["generate", "shakespeare_small", *text, "--ckpt_path", "runs/digits/last.ckpt"], "model."
    )


def test_lines_of_progress(capsys: Capture) -> None:
    line = LineProgress(seconds=0)
    place = {"global_step": 10, "estimated_stepping_batches": 40, "current_epoch": 1}
    trainer = type("Trainer", (), place)()
    line.get_metrics = lambda *_: {"train/loss": 0.5}
    line.on_train_start(trainer, None)
    trainer.global_step, line._began = 20, line._began - 60  # ten steps in a minute, twenty to go
    line.on_train_batch_end(trainer, None, None, None, 0)
    shown = capsys.readouterr().out
    assert "step 20 of 40  2.0 min left" in shown
    assert "train/loss 0.5" in shown


def test_lines_while_testing(capsys: Capture) -> None:
    line = LineProgress(seconds=0)
    trainer = type("Trainer", (), {"num_test_batches": [3]})()
    line.on_test_batch_end(trainer, None, None, None, 0)
    assert capsys.readouterr().out.split() == ["testing", "batch", "1", "of", "3"]
    line.seconds = 30
    line.on_test_batch_end(trainer, None, None, None, 1)
    assert capsys.readouterr().out == ""


def test_schedule() -> None:
    model = SequenceTask(LABELS, d_model=4, n_layers=1, d_state=2, warmup_steps=10)
    model.trainer = type("Trainer", (), {"estimated_stepping_batches": 110})()
    factors = [model.lr_factor(step) for step in range(111)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0)
    assert np.all(np.diff(factors[:11]) > 0)
    assert np.all(np.diff(factors[10:]) < 0)
