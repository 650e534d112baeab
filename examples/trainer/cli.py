"""The command line on LightningCLI: options, the folder and checkpoint of a run, the report at its end."""

import contextlib
import difflib
import io
import json
import logging
import re
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from data.base import SequenceData
from data.storage import DataError, first_line
from data.tasks import TASKS, task_of
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    Timer,
)
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.markup import escape

from trainer.checkpoints import AtomicCheckpointIO, CheckpointError, ConfigError, load_checkpoint
from trainer.progress import BarProgress, LineProgress
from trainer.report import learning_curve, print_results, write_labels, write_values
from trainer.runs import (
    CONFIG,
    BestCheckpoint,
    LastCheckpoint,
    MovingAverage,
    ResumableCSVLogger,
    find_checkpoint,
    git_commit,
    leave_run,
    new_run,
)
from trainer.task import SequenceTask
from trainer.trainer import ExampleTrainer

# Functions of Lightning that put the content of a checkpoint where it belongs.
RESTORING = ("_restore_modules_and_callbacks", "restore_datamodule", "restore_training_state")


class Parser(LightningArgumentParser):
    """Lightning's, with a guess at what was meant."""

    near: tuple[str, ...] = ()  # the options of the command

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Names the nearest option, as abbreviations are none."""
        if match := re.match(r"unrecognized arguments: (--[\w.]+)", message):
            near = difflib.get_close_matches(match[1], self.near, 1)
            message += "".join(f"; did you mean {name}?" for name in near)
        super().error(message, ex)


class SaveConfig(SaveConfigCallback):
    """config.yaml in the folder of the run, with versions and commit in its header."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Only training writes it."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """The resolved configuration: itself a recipe that repeats the run."""
        config = self.config.clone()
        config.ckpt_path = None  # of a resumed run, which is not to be gone on with
        self.parser.save(config, Path(self.config.run_dir) / CONFIG, overwrite=True)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """The folder is free again where training did not begin."""
        if trainer.is_global_zero:
            leave_run(Path(self.config.run_dir))


class ExampleCLI(LightningCLI):
    """LightningCLI with a folder for each run, checkpoints to resume from, and a report at the end."""

    recipe, task, program = "", "", ""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and `generate`."""
        return {**LightningCLI.subcommands(), "generate": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of a run, and what the model takes over from the data."""
        parser.add_argument("--task", choices=[self.task], help="the kind of data; fixed by the recipe")
        parser.add_argument(
            "--run_dir", type=Path, default=Path("runs/run"), help="folder of the run; numbered if taken"
        )
        parser.add_argument(
            "--save_every", type=PositiveInt, default=100, help="steps between two writes of last.ckpt"
        )
        parser.add_argument(
            "--patience",
            type=NonNegativeInt,
            default=0,
            help="stop after so many validations without a better score; 0: never",
        )
        parser.add_argument(
            "--ema",
            type=ClosedUnitInterval,
            default=0.0,
            help="validate, test and keep a moving average of the weights with this decay; 0: none",
        )
        parser.link_arguments("data.spec", "model.spec", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed", int)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then find the folder of the run and its checkpoint."""
        if not isinstance(args, list):
            raise TypeError(f"args must be a list of strings, got {type(args).__name__}")
        command = self._parser(args[0])
        command.prog, command.usage, command.allow_abbrev = self.program, f"{self.program} [--options]", False
        Parser.near = tuple(command._option_string_actions)
        self.config = parser.parse_args(args)
        self.given = {match[1] for arg in args if (match := re.match(r"--model\.(\w+)", arg))}
        config = self.config[self.config.subcommand]
        fitting = self.config.subcommand == "fit"
        path = config.ckpt_path
        if path == "":  # as of a variable that is not set
            raise ConfigError("ckpt_path must be last, best or a file, got nothing")
        if path in ("last", "best"):
            path = find_checkpoint(config.run_dir, (f"{path}.ckpt",))
        elif path is None and not fitting:
            path = find_checkpoint(config.run_dir, ("best.ckpt", "last.ckpt"))
        self.resume_step = load_checkpoint(Path(path))["global_step"] if path else 0
        config.ckpt_path = str(path) if path else None
        if path:
            config.run_dir = Path(path).parent

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigError(f"seed_everything: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """The model's options are those of the checkpoint, but how to compute is this run's choice."""
        config = self.config[self.config.subcommand]
        own, said = config.model.clone(), io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                super()._parse_ckpt_path()
        except (SystemExit, AttributeError) as error:
            raise CheckpointError(
                f"{config.ckpt_path} has other options than a model of this program: "
                f"{' '.join(said.getvalue().partition('error: ')[2].splitlines()[:-1])}"
            ) from error
        model = self.config[self.config.subcommand].model
        for name in ("mode", "backend", "compile"):
            model[name] = own[name]
        if differing := sorted(name for name in self.given if model[name] != own[name]):
            name = differing[0]
            raise ConfigError(
                f"model.{name} is {model[name]} in the checkpoint, got {own[name]}: "
                "weights go with the options they were trained with"
            )

    def instantiate_classes(self) -> None:
        """Build everything; a value that a class refuses is the user's to mend, not a crash."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            raise ConfigError(first_line(error)) from error

    def instantiate_trainer(self) -> Trainer:  # type: ignore[override]  # no option of ours comes this way
        """The Trainer with this run's loggers, checkpoints and progress display."""
        config = self._get(self.config_init, "trainer")
        if str(config["precision"]) == "16-true":
            raise ConfigError(
                "trainer.precision 16-true: AdamW squares gradients, which float16 has no such small numbers "
                "for; use 16-mixed or bf16-true"
            )
        if (strategy := _strategy(config["strategy"])).startswith(("fsdp", "modelparallel", "deepspeed")):
            raise ConfigError(
                f"trainer.strategy {strategy}: the examples keep weights and optimizers whole, and train "
                "with auto or ddp; docs/distributed.md tells how a model of one's own is sharded"
            )
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
            if (value := config[name]) is not None and not isinstance(value, str) and value <= 0:
                raise ConfigError(f"trainer.{name} must be above 0, got {value}")
        folder = self._folder()
        self.timer = Timer(config["max_time"])
        callbacks: list[Callback] = [self.timer]
        if self.subcommand == "fit":
            callbacks += self._fit_callbacks(folder)
        if self.subcommand == "fit" and config["logger"] is None:
            config["logger"] = [
                ResumableCSVLogger(folder, self.resume_step),
                # Absolute, as its thread may write while jsonargparse has gone to another folder.
                TensorBoardLogger(
                    folder.absolute(), name="", version="tensorboard", purge_step=self.resume_step or None
                ),
            ]
        elif self.subcommand != "fit":
            config["logger"] = False
        if config["enable_progress_bar"] is not False:
            theme = RichProgressBarTheme(metrics_format=".4g")
            callbacks.append(BarProgress(theme=theme) if sys.stdout.isatty() else LineProgress())
        config["callbacks"] = [*_listed(config["callbacks"]), *callbacks]
        config["plugins"] = [*_listed(config["plugins"]), AtomicCheckpointIO()]
        config["default_root_dir"] = folder
        trainer = super().instantiate_trainer()
        # Else Lightning takes a finished epoch for one to go on with, where the run is limited by steps, and
        # leaves out the next.
        trainer.fit_loop._iteration_based_training = lambda: False
        return trainer

    def _folder(self) -> Path:
        """The folder of this run; a new one is taken now that the values are known to be right."""
        config = self.config[self.config.subcommand]
        # Other ranks write nothing, and are told of it at the end.
        if self.subcommand == "fit" and not config.ckpt_path and rank_zero_only.rank == 0:
            config.run_dir = new_run(config.run_dir)
        folder: Path = config.run_dir
        return folder

    def _fit_callbacks(self, folder: Path) -> list[Callback]:
        monitor, mode = self.model.monitor
        best = BestCheckpoint(folder, "best", monitor=monitor, mode=mode, enable_version_counter=False)
        callbacks: list[Callback] = [best, LastCheckpoint(folder, self._get(self.config_init, "save_every"))]
        # Plain numbers, as checkpoints hold nothing else.
        if patience := self._get(self.config_init, "patience"):
            # Not strict: a run may end before its first validation.
            callbacks.append(EarlyStopping(monitor, mode=mode, patience=int(patience), strict=False))
        if decay := self._get(self.config_init, "ema"):
            callbacks.append(MovingAverage(decay=float(decay)))
        return callbacks

    def after_fit(self) -> None:
        """Test the best weights, plot the curves, and say what was reached and where it is."""
        if getattr(self.trainer, "fast_dev_run", False):
            leave_run(self._get(self.config, "run_dir"))
            return
        steps, epochs = self.trainer.global_step, self.trainer.current_epoch
        seconds = self.timer.time_elapsed("train")
        folder: Path = self.trainer.strategy.broadcast(self._get(self.config, "run_dir"))
        if steps == self.resume_step and (folder / "results.json").is_file():
            raise ConfigError(
                f"{self._get(self.config, 'ckpt_path')} is at the end of its run, step {steps}: nothing was "
                "trained; give a later end by trainer.max_epochs, trainer.max_steps or trainer.max_time"
            )
        kept = next((folder / name for name in ("best.ckpt", "last.ckpt") if (folder / name).is_file()), None)
        scores: dict[str, float] = {}
        for of_one in self.trainer.test(self.model, self.datamodule, ckpt_path=kept, verbose=False):
            scores |= of_one
        if not self.trainer.is_global_zero:
            return
        best = kept is not None and kept.name == "best.ckpt"
        self.model.save_pretrained(folder)
        self.results = {
            "recipe": self.recipe,
            **{name.replace("/", " "): value for name, value in scores.items()},
            "weights": "best.ckpt" if best else "last.ckpt, as the run ended before its first validation",
            "epochs": epochs,
            "steps": steps,
            "wall time (s)": round(seconds, 1),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "seed": self._get(self.config, "seed_everything"),
            "commit": git_commit(),
            "device": str(self.trainer.strategy.root_device),
            "torch": str(torch.__version__),
            "files": str(folder),
        }
        (folder / "results.json").write_text(json.dumps(self.results, indent=2) + "\n")
        shown = {name: _shown(name, value) for name, value in self.results.items()}
        if (folder / "metrics.csv").is_file() and (plot := learning_curve(folder)):
            shown["learning curve"] = plot
        print_results("Results", shown)

    def predict(
        self,
        model: SequenceTask,
        datamodule: SequenceData,
        ckpt_path: str | None = None,
        return_predictions: bool | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write predictions for the test sequences: probabilities of labels, or values with a plot."""
        if model.spec.kind == "token":
            raise ConfigError("predict is for labels and values; generate samples from a model of tokens")
        batches = self.trainer.predict(model, datamodule, ckpt_path=ckpt_path) or []
        if not self.trainer.is_global_zero:  # every process has predicted all
            return
        targets, predicted = (torch.cat(part) for part in zip(*batches, strict=True))
        folder = self._get(self.config, "run_dir")
        shown: dict[str, Any] = {"sequences": len(targets)}
        if model.spec.kind == "label":
            shown["file"] = folder / "predictions.csv"
            write_labels(shown["file"], targets, predicted)
        else:
            shown["file"] = folder / "predictions.npz"
            shown["plot"] = write_values(shown["file"], targets, predicted)
        print_results("Predictions", shown)


def run_recipe(command: str, recipe: Path, options: list[str], program: str) -> ExampleCLI:
    """Do `command` with a recipe and return the finished LightningCLI; `program` is what messages name.

    Raises:
        SystemExit: code 1 or 2 for anything the user can mend.
    """
    _quiet()
    # The configuration of a run is in a folder that has the name of its recipe, unless it was given another.
    ExampleCLI.recipe = recipe.parent.name if recipe.stem == "config" else recipe.stem
    ExampleCLI.program = program
    try:
        ExampleCLI.task = task_of(recipe)
        return ExampleCLI(
            SequenceTask,
            TASKS[ExampleCLI.task],
            trainer_class=ExampleTrainer,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={
                "enable_model_summary": False,
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
            },
            seed_everything_default=0,
            parser_kwargs={
                command: {
                    "dump_header": [recipe.stem, f"commit {git_commit()}", f"torch {torch.__version__}"]
                }
            },
            args=[command, "--run_dir", f"runs/{recipe.stem}", "--config", str(recipe), *options],
            auto_configure_optimizers=False,
        )
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    # OSError: a full disk, or a folder of the run that cannot be written.
    except (CheckpointError, ConfigError, DataError, MisconfigurationException, OSError) as error:
        message = str(error)
    except Exception as error:
        if not (message := _said_by_lightning(error)):
            raise
    finally:
        if torch.distributed.is_initialized():  # gloo's, which Lightning leaves, may abort at the exit
            torch.distributed.destroy_process_group()
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}")
    raise SystemExit(1)


def _said_by_lightning(error: Exception) -> str:
    """What it says of a value that it refuses or a checkpoint that it cannot restore; else nothing."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(frame.f_code.co_name in RESTORING for frame in frames):
        return f"the checkpoint does not fit this program: {type(error).__name__}, {first_line(error)}"
    refused = isinstance(error, ValueError) and frames[-1].f_globals["__name__"].startswith("lightning.")
    return first_line(error).strip() if refused else ""


def _strategy(value: Any) -> str:
    """The name of a strategy, or that of its class."""
    name = value if isinstance(value, str) else getattr(value, "class_path", type(value).__name__)
    return str(name).rpartition(".")[2].lower()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _shown(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return (
        f"{value:.2%}" if name.endswith("accuracy") else f"{value:.1f}" if "(s)" in name else f"{value:.4f}"
    )


def _quiet() -> None:
    """Silence what Lightning says about choices that are made here on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Checkpoint directory .* exists and is not empty",
        "Experiment logs directory .* exists and is not empty",
        "`?ModelCheckpoint.*could not find the monitored key",
        "The number of training batches .* is smaller than the logging interval",
        "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)
