"""Training of the examples: exact resume, averages, accumulation, early stop."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

import train
from data import images
from data.storage import atomic_save
from example_files import OF_LIGHTNING, TINY, fails, step_losses, write_parquet
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from safetensors.torch import load_file
from trainer import runs
from trainer.checkpoints import CONTENT, load_checkpoint
from trainer.task import SequenceTask

pytestmark = [
    pytest.mark.usefixtures("own_folder", "brief_runs"),
    OF_LIGHTNING,
]
EXAMPLES = Path(train.__file__).parent
Capture = pytest.CaptureFixture[str]


def in_a_process(arguments: list[str]) -> subprocess.Popen[bytes]:
    """A command line in a process of its own, with as many threads as this one."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path]),
    }
    command = [sys.executable, str(EXAMPLES / "train.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def test_killed_run_resumes_at_the_same_losses(tmp_path: Path) -> None:
    options = ["digits", *TINY, "--data.batch_size", "64", "--model.dropout", "0.1"]
    options += ["--trainer.max_steps", "60", "--save_every", "7"]
    train.run([*options, "--run_dir", "whole"])
    whole = step_losses(tmp_path / "whole")
    assert len(whole) == 60

    process = in_a_process([*options, "--run_dir", "killed"])
    metrics, deadline = tmp_path / "killed" / "metrics.csv", time.monotonic() + 60
    # Past the first epoch of 20 steps, so that a finished epoch and a part of one are behind it.
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_bytes().count(b"\n") > 27:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"

    cli = train.run([*options, "--run_dir", "killed", "--ckpt_path", "last"])
    assert cli.resume_step >= 21
    assert step_losses(tmp_path / "killed") == whole


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_resume_before_and_after_the_end_of_an_epoch(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["digits", *TINY, "--model.dropout", "0.1", "--save_every", "3"]
    options += [f"--trainer.{limit}", "2" if limit == "max_epochs" else "20"]
    save = runs.LastCheckpoint._save

    def keep_each(self: runs.LastCheckpoint, trainer: Trainer) -> None:
        save(self, trainer)
        folder = tmp_path / f"at-{trainer.global_step}"
        folder.mkdir()
        for file in (tmp_path / "whole").glob("*.c*"):  # last.ckpt and, once there is a row, metrics.csv
            shutil.copy(file, folder)

    with monkeypatch.context() as patched:
        patched.setattr(runs.LastCheckpoint, "_save", keep_each)
        train.run([*options, "--run_dir", "whole"])
    whole = step_losses(tmp_path / "whole")
    assert len(whole) == 20
    saved = sorted(int(path.name.removeprefix("at-")) for path in tmp_path.glob("at-*"))
    assert saved == [1, 3, 6, 9, 11, 12, 15, 18, 20]
    for step in (9, 11):
        folder = tmp_path / f"at-{step}"
        train.run([*options, "--ckpt_path", str(folder / "last.ckpt")])
        resumed = step_losses(folder)
        # The row of the very step of the checkpoint was not yet written when it was copied.
        assert resumed == {at: loss for at, loss in whole.items() if at != step - 1}


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_longer_run_after_one_that_ended(ema: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within an epoch of 10 steps or at its end: the losses of the longer run from the beginning."""
    monkeypatch.setattr(SequenceTask, "lr_factor", lambda self, step: 1.0)
    options = ["digits", *TINY, "--model.dropout", "0.1", "--ema", ema]
    train.run([*options, "--trainer.max_steps", "22", "--run_dir", "whole"])
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for first in (7, 10, 17):
        folder = f"ended-{first}"
        train.run([*options, "--trainer.max_steps", str(first), "--run_dir", folder])
        cli = train.run([*options, "--trainer.max_steps", "22", "--run_dir", folder, "--ckpt_path", "last"])
        assert cli.resume_step == first
        assert step_losses(tmp_path / folder) == step_losses(tmp_path / "whole")
        ended = load_file(tmp_path / folder / "model.safetensors")
        assert all(torch.equal(whole[name], ended[name]) for name in whole)


def test_run_that_was_told_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As trainer.max_time does it; and SIGTERM, after which the very step is kept."""
    options = ["digits", *TINY, "--model.dropout", "0.1", "--trainer.max_steps", "22"]
    train.run([*options, "--run_dir", "whole"])
    whole, ended = step_losses(tmp_path / "whole"), Timer.on_train_batch_end

    def stop(self: Timer, trainer: Trainer, *arguments: object) -> None:
        ended(self, trainer, *arguments)
        trainer.should_stop = trainer.should_stop or trainer.global_step == step

    def terminate(self: Timer, trainer: Trainer, *arguments: object) -> None:
        ended(self, trainer, *arguments)
        if trainer.global_step == 8:
            signal.raise_signal(signal.SIGTERM)

    for step in (7, 10):
        folder = f"stopped-{step}"
        with monkeypatch.context() as patched:
            patched.setattr(Timer, "on_train_batch_end", stop)
            assert train.run([*options, "--run_dir", folder]).results["steps"] == step
        assert train.run([*options, "--run_dir", folder, "--ckpt_path", "last"]).resume_step == step
        assert step_losses(tmp_path / folder) == whole
    with monkeypatch.context() as patched:
        patched.setattr(Timer, "on_train_batch_end", terminate)
        with pytest.raises(SystemExit) as exit:
            train.run([*options, "--run_dir", "terminated"])
        assert exit.value.code == 128 + signal.SIGTERM
    assert train.run([*options, "--run_dir", "terminated", "--ckpt_path", "last"]).resume_step == 8
    resumed = step_losses(tmp_path / "terminated")
    # The row of the step that was cut off was not yet written.
    assert resumed == {at: loss for at, loss in whole.items() if at != 7 or 7 in resumed}


def test_resume_around_validations_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved at a step with a validation is saved after it: none is left out, and no row."""
    options = ["digits", *TINY, "--trainer.max_epochs", "2", "--trainer.val_check_interval", "4"]
    options += ["--save_every", "2"]
    save = runs.LastCheckpoint._save

    def keep_each(self: runs.LastCheckpoint, trainer: Trainer) -> None:
        save(self, trainer)
        shutil.copytree("whole", f"at-{trainer.global_step}")

    with monkeypatch.context() as patched:
        patched.setattr(runs.LastCheckpoint, "_save", keep_each)
        train.run([*options, "--run_dir", "whole"])
    for step in (4, 6, 14, 18):
        train.run([*options, "--run_dir", f"at-{step}", "--ckpt_path", "last"])
        at = tmp_path / f"at-{step}"
        assert validations(at) == validations(tmp_path / "whole")
        whole, resumed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", at))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def validations(folder: Path) -> list[tuple[str, str]]:
    """Step and loss of each."""
    with (folder / "metrics.csv").open(newline="") as rows:
        return [(row["step"], row["val/loss"]) for row in csv.DictReader(rows) if row["val/loss"]]


def test_best_weights_of_a_moved_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are overwritten by better ones only. Here each epoch is worse than the one before."""
    monkeypatch.setattr(SequenceTask, "monitor", property(lambda self: ("worse", "max")))
    ended = SequenceTask.on_validation_epoch_end

    def worse(self: SequenceTask) -> None:
        self.log("worse", -float(self.trainer.global_step))
        ended(self)

    monkeypatch.setattr(SequenceTask, "on_validation_epoch_end", worse)
    options = ["digits", *TINY]
    train.run([*options, "--trainer.max_epochs", "1", "--run_dir", "old"])
    shutil.move("old", "new")
    train.run([*options, "--trainer.max_epochs", "2", "--run_dir", "new", "--ckpt_path", "new/last.ckpt"])
    assert load_checkpoint(tmp_path / "new" / "best.ckpt")["global_step"] == 10


def test_resume_between_the_batches_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is saved while a part of the gradients of a step is there."""
    options = ["digits", *TINY, "--save_every", "2", "--trainer.accumulate_grad_batches", "2"]
    options += ["--trainer.max_steps", "5"]
    save = runs.LastCheckpoint._save

    def keep_each(self: runs.LastCheckpoint, trainer: Trainer) -> None:
        save(self, trainer)
        shutil.copytree("whole", f"at-{trainer.global_step}")  # which raises for a second at the same step

    with monkeypatch.context() as patched:
        patched.setattr(runs.LastCheckpoint, "_save", keep_each)
        train.run([*options, "--run_dir", "whole"])
    train.run([*options, "--run_dir", "at-2", "--ckpt_path", "last"])
    whole, resumed = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "at-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_configuration_of_a_resumed_run_is_a_recipe(tmp_path: Path) -> None:
    options = ["digits", *TINY, "--trainer.max_steps", "2"]
    train.run(options)
    train.run([*options, "--trainer.max_steps", "3", "--ckpt_path", "last"])
    cli = train.run(["runs/digits/config.yaml"])
    assert cli.resume_step == 0
    assert cli.results["recipe"] == "digits"
    assert cli.results["files"] == "runs/digits-2"


def test_weights_are_tested_on_the_data_they_are_for(capsys: Capture) -> None:
    options = ["copying", *TINY, "--data.train_size", "40", "--data.batch_size", "8"]
    options += ["--trainer.max_steps", "1"]
    train.run([*options, "--data.lag", "20"])
    fails(capsys, 1, ["test", "copying", "--data.train_size", "40"], "'lag': 20", "'lag': 1000")


def test_resume_needs_the_same_data(tmp_path: Path, capsys: Capture) -> None:
    train.run(["digits", *TINY, "--trainer.max_steps", "2"])
    options = ["digits", *TINY, "--trainer.max_steps", "4"]
    for option, value, said in (
        ("--data.batch_size", "8", "'rows_a_step': 8"),
        ("--data.permute", "true", "'permute': True"),
        ("--data.validation", "0.2", "'validation': 0.2"),
    ):
        fails(capsys, 1, [*options, option, value, "--ckpt_path", "last"], said)


def test_resume_knows_a_moved_folder_from_other_images(tmp_path: Path, capsys: Capture) -> None:
    folder = write_parquet(tmp_path / "mnist", images.SOURCES["mnist"])
    moved = folder.rename(tmp_path / "moved")
    other = write_parquet(tmp_path / "other", images.SOURCES["mnist"], seed=1)
    options = ["smnist_small", *TINY, "--data.batch_size", "8"]
    train.run([*options, "--data.path", str(moved), "--trainer.max_steps", "1"])
    options += ["--trainer.max_steps", "2", "--ckpt_path", "last"]
    back = moved.rename(folder)
    os.utime(back / "train.parquet", (1, 1))
    fails(capsys, 1, [*options, "--data.path", str(other)], "'digest'")
    assert train.run([*options, "--data.path", str(back)]).resume_step == 1


def test_failed_write_keeps_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    content = {name: kind() for name, kind in CONTENT.items()}
    atomic_save(content, file)
    with pytest.raises(Exception, match="pickle"):
        atomic_save({"state_dict": {}, "bad": lambda: None}, file)
    assert load_checkpoint(file) == content
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_full_disk_is_an_os_error() -> None:
    program = """
import resource, signal, sys, torch
from pathlib import Path
from data.storage import atomic_save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    atomic_save(torch.zeros(10**6), Path("large.pt"))
except OSError:
    sys.exit(7 if not any(Path().iterdir()) else 1)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 7


@pytest.mark.promise("other libraries", "Lightning's accumulation of gradients")
def test_accumulated_batches_train_as_one(tmp_path: Path) -> None:
    options = ["digits", *TINY, "--trainer.max_steps", "3", "--model.dropout", "0"]
    train.run([*options, "--data.batch_size", "64", "--run_dir", "one"])
    parts = ["--data.batch_size", "32", "--trainer.accumulate_grad_batches", "2", "--run_dir", "parts"]
    train.run([*options, *parts])
    one, parts = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "parts"))
    for name, weight in one.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.promise("other libraries", "Lightning's `WeightAveraging`")
def test_moving_average_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    step = SequenceTask.on_train_batch_end

    def keep(self: SequenceTask, *arguments: object) -> None:
        weights.append({name: weight.detach().clone() for name, weight in self.named_parameters()})
        step(self, *arguments)

    monkeypatch.setattr(SequenceTask, "on_train_batch_end", keep)
    train.run(["digits", *TINY, "--ema", "0.5", "--trainer.max_steps", "6"])
    averaged = load_file(tmp_path / "runs" / "digits" / "model.safetensors")
    for name in weights[0]:
        average = weights[0][name]
        for later in weights[1:]:
            average = 0.5 * average + 0.5 * later[name]
        torch.testing.assert_close(averaged[name.removeprefix("model.")], average, rtol=1e-4, atol=1e-6)


def test_moving_average_is_what_is_tested(tmp_path: Path) -> None:
    cli = train.run(["digits", *TINY, "--ema", "0.9", "--trainer.max_epochs", "1"])
    folder = tmp_path / "runs" / "digits"
    average = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    tested = load_file(folder / "model.safetensors")
    assert all(torch.equal(tested[name.removeprefix("model.")], weight) for name, weight in average.items())
    again = train.run(["test", "digits", "--trainer.accelerator", "cpu"])
    assert float(again.trainer.callback_metrics["test/loss"]) == cli.results["test loss"]


def test_resume_with_a_moving_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["digits", *TINY, "--ema", "0.9", "--save_every", "2", "--trainer.max_steps", "5"]
    save = runs.LastCheckpoint._save

    def keep(self: runs.LastCheckpoint, trainer: Trainer) -> None:
        save(self, trainer)
        if trainer.global_step == 2:
            shutil.copytree("whole", "stopped")

    with monkeypatch.context() as patched:
        patched.setattr(runs.LastCheckpoint, "_save", keep)
        train.run([*options, "--run_dir", "whole"])
    train.run([*options, "--run_dir", "stopped", "--ckpt_path", "last"])
    whole, resumed = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_early_stop_before_the_first_validation() -> None:
    cli = train.run(["digits", *TINY, "--patience", "2", "--trainer.max_steps", "3"])
    assert cli.results["weights"].startswith("last.ckpt")


def test_early_stop() -> None:
    # Without learning nothing gets better after the first validation.
    cli = train.run(["digits", *TINY, "--model.lr", "0", "--patience", "2", "--trainer.max_epochs", "9"])
    assert cli.results["epochs"] == 3
