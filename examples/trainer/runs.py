"""The folder of a run: where it is, and what is logged and kept in it."""

import contextlib
import csv
import glob
import itertools
import os
import random
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from data.storage import first_line
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import (
    Checkpoint,
    EMAWeightAveraging,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from trainer.checkpoints import CheckpointError, ConfigError, divide_steps

CONFIG = "config.yaml"


def runs_of(run_dir: Path) -> dict[int, Path]:
    """The folders RUN, RUN-2, RUN-3, ... that exist and are not empty, by number.

    Raises:
        ConfigError: if `run_dir` is no name of a folder beside which others can be, such as `.` or nothing.
    """
    if run_dir.name in ("", ".."):
        raise ConfigError(f"run_dir must name a folder of the run, such as runs/digits, got '{run_dir}'")
    numbered = {}
    for folder in run_dir.parent.glob(f"{glob.escape(run_dir.name)}*"):
        match = re.fullmatch(re.escape(run_dir.name) + r"(?:-(\d+))?", folder.name)
        if match and folder.is_dir() and any(folder.iterdir()):
            numbered[int(match[1] or 1)] = folder
    return dict(sorted(numbered.items()))


def new_run(run_dir: Path) -> Path:
    """Take RUN, or the first of RUN-2, RUN-3, ... behind those that are: a run never writes into another's.

    The folder is absent or empty, and taken by making its config.yaml: of two runs that start together only
    one can.
    """
    for number in itertools.count(max(runs_of(run_dir), default=0) + 1):
        folder = run_dir if number == 1 else run_dir.with_name(f"{run_dir.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            with contextlib.suppress(FileExistsError):
                (folder / CONFIG).touch(exist_ok=False)
                return folder
    raise AssertionError("there is always a next number")


def leave_run(folder: Path) -> None:
    """Give back a folder that `new_run` took, if nothing came of it."""
    with contextlib.suppress(OSError):
        if not (folder / CONFIG).stat().st_size:
            (folder / CONFIG).unlink()
            folder.rmdir()


def find_checkpoint(run_dir: Path, names: tuple[str, ...]) -> Path:
    """The first of `names` in the newest run that has one.

    Raises:
        CheckpointError: if no run has any.
    """
    for folder in reversed(runs_of(run_dir).values()):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise CheckpointError(f"no {' or '.join(names)} in {run_dir} or a numbered folder beside it: train first")


def git_commit() -> str:
    """The commit of this program, -dirty with uncommitted changes; without git $S4_COMMIT or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    unknown = os.environ.get("S4_COMMIT", "unknown")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or unknown
    except (OSError, subprocess.CalledProcessError):
        return unknown


class BestCheckpoint(ModelCheckpoint):
    """Lightning's, but a run whose folder was moved or copied still knows the best score so far."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on, with the files of the old folder in that of this run."""

        def here(path: str) -> str:
            return str(Path(str(self.dirpath)) / Path(path).name) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        super().load_state_dict(
            {
                **state_dict,
                **{name: here(state_dict[name]) for name in paths},
                "best_k_models": {here(path): score for path, score in state_dict["best_k_models"].items()},
                "dirpath": self.dirpath,
            }
        )


class MovingAverage(EMAWeightAveraging):
    """Lightning's, but a test after training reads the average of a checkpoint, not the weights beside it."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the weights as they were trained: the last checkpoint, from which one may go on, has both."""

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from both, when training resumes."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger, which deletes the file of an earlier session; this one goes on with it.

    Args:
        folder: of metrics.csv.
        resume_step: rows from this step on are dropped: the resumed run writes them again.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        super().__init__(folder.parent, name="", version=folder.name, flush_logs_every_n_steps=1)
        self.file, self.resume_step = folder / "metrics.csv", resume_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, holding the rows of the sessions before."""
        if self._experiment is not None:
            return self._experiment
        kept: list[dict[str, str]] = []
        if self.file.is_file():
            kept = [row for row in read_metrics(self.file) if int(row["step"]) < self.resume_step]
        writer = super().experiment
        writer.metrics[:] = kept
        writer.save()
        return writer


def read_metrics(file: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, each with the numbers that are there.

    Raises:
        ConfigError: if the file holds anything else.
    """
    try:
        text = file.read_text()
        # Without the row that a killed run was about to write.
        rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        found = [{name: value for name, value in row.items() if value} for row in rows]
        for row in found:
            int(row["step"])
            for value in row.values():
                float(value)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ConfigError(
            f"{file} is damaged ({first_line(error)}): mend it, or move it away to go on without it"
        ) from error
    return found


class LastCheckpoint(Checkpoint):
    """`last.ckpt` every `every_n_steps`, after the first step of each epoch, and when the run ends.

    It also carries the state of the random number generators, so that a resumed run of as many processes
    draws the same numbers. A signal to end that reaches one process ends all of them after the same step.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.file, self.every_n_steps = folder / "last.ckpt", every_n_steps
        self._random: list[dict[str, Any]] | None = None
        self._stepped = self._epoch_ended = self._after_validation = False
        self._saved = -1  # the step of the last save
        self._told_to_end = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the generators back to where the checkpoint found them."""
        if self._random is not None and len(self._random) == trainer.world_size:
            _set_random_state(self._random[trainer.global_rank])
        elif self._random is not None or trainer.world_size > 1:
            # Else all processes drop the same places, and one gone on with those it began with.
            own = [torch.initial_seed() % 2**32, trainer.global_step, trainer.global_rank]
            torch.manual_seed(int(np.random.SeedSequence(own).generate_state(1)[0]))
        if trainer.world_size > 1:
            # Lightning's handler broadcasts at once, in the middle of what the processes do together.
            signal.signal(signal.SIGTERM, self._tell)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save within the epoch, never at its very end: a place Lightning does not always resume from.

        Nor between the batches that make up one step, as their gradients are in no checkpoint; and where a
        validation follows, after it.
        """
        parts, step = trainer.accumulate_grad_batches, trainer.global_step
        self._epoch_ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._stepped = (batch_idx + 1) % parts == 0 and not self._epoch_ended
        terminated = self._stepped and self._terminated(trainer)
        ends = trainer.should_stop or terminated or step == trainer.max_steps
        if self._stepped and (ends or batch_idx + 1 == parts or step % self.every_n_steps == 0):
            self._after_validation = not ends and _validates(trainer, batch_idx)
            if not self._after_validation:
                self._save(trainer)
        if terminated:
            raise SIGTERMException  # at once; Lightning waits for the end of the epoch

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what was put off, or where a validation within the epoch ended the run."""
        if trainer.state.fn == TrainerFn.FITTING and self._stepped and self._saved != trainer.global_step:
            if self._after_validation or trainer.should_stop:
                self._save(trainer)
            self._after_validation = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what the run ended with, at the end of an epoch; within one that has been done."""
        if self._epoch_ended:
            self._save(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Say how to go on after Ctrl-C or a signal to end."""
        ended = isinstance(exception, (KeyboardInterrupt, SIGTERMException))
        if ended and trainer.is_global_zero and self.file.is_file():
            message = f"interrupted at step {trainer.global_step}; --ckpt_path last goes on from {self.file}"
            Console(stderr=True, highlight=False, soft_wrap=True).print(message)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the place of a run whose steps were made of more or fewer batches."""
        divide_steps(checkpoint, trainer.accumulate_grad_batches)

    def state_dict(self) -> dict[str, Any]:
        """The generators of every rank."""
        state = _random_state()
        if not torch.distributed.is_initialized():
            return {"random": [state]}
        states: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(states, state)
        return {"random": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts."""
        self._random = state_dict["random"]

    def _tell(self, number: int, frame: object) -> None:
        self._told_to_end = True

    def _terminated(self, trainer: pl.Trainer) -> bool:
        """Whether this process, or any other at this step, was told to end."""
        if trainer.world_size == 1:
            return trainer.received_sigterm
        told = torch.tensor(self._told_to_end, dtype=torch.int32, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return bool(told)

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved = trainer.global_step
        if not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(self.file)


def _validates(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this batch, which is not the last of its epoch."""
    interval, epochs = trainer.val_check_batch, trainer.check_val_every_n_epoch
    if interval is None or interval == float("inf") or not trainer.enable_validation:
        return False
    if epochs is None:
        batch_idx = trainer.fit_loop.epoch_loop.total_batch_idx
    return (batch_idx + 1) % interval == 0 and (epochs is None or (trainer.current_epoch + 1) % epochs == 0)


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  # other libraries may draw from it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        # As a tensor: an array would need pickle, which checkpoints are read without.
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
