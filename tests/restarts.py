"""Runs of the examples on several processes that end and go on with fewer: `python restarts.py FOLDER`.

Processes have the environment that torchrun gives its own. They are forked from this one, which has imported
what each of them would take seconds to import. What they wrote is for test_distributed_training.py to read.
"""

import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
os.environ.setdefault("MPLBACKEND", "agg")

import lightning.fabric.utilities.rank_zero as fabric_ranks
import lightning.pytorch as pl
import lightning.pytorch.utilities.rank_zero as lightning_ranks
import matplotlib.pyplot  # noqa: F401
import ranks
import sklearn.datasets  # noqa: F401
import torch
import train
import trainer.cli  # noqa: F401 - what train imports when it is run
from data import base
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, TensorDataset

from s4 import param_groups

OPTIONS = [
    *("digits", "--model.d_model", "8", "--model.n_layers", "1", "--model.d_state", "4"),
    *("--model.dropout", "0", "--trainer.precision", "64-true", "--trainer.max_steps", "22"),
    *("--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1", "--save_every", "5"),
    *("--trainer.enable_progress_bar", "false"),
]
Ends = tuple[int, int, signal.Signals]  # the rank and the step at which it gets a signal


def run(folder: Path, arguments: list[str], world: int = 1, ends: Ends | None = None) -> list[int]:
    """A command line; exit codes of the ranks, or minus the signal that ended each."""

    def one(rank: int) -> None:
        if ends and ends[0] == rank:
            end_at(*ends[1:])
        strategy = ["--trainer.strategy", "ddp"] if world > 1 else []
        try:
            train.run([*OPTIONS, "--trainer.devices", str(world), *strategy, *arguments])
        finally:  # a group of gloo's that is left may abort the process at its end
            assert not torch.distributed.is_initialized()

    return forked(folder, world, one)


def forked(folder: Path, world: int, one: Callable[[int], None], said: str = "said") -> list[int]:
    """What each rank does in a process of its own, and says in files of this name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        if (process := os.fork()) == 0:
            play(folder / f"{said}.{rank}", world, rank, port, one)
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def play(said: Path, world: int, rank: int, port: int, one: Callable[[int], None]) -> None:
    """What one rank does, with what it says in a file; it never returns."""
    code = 0
    try:
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        signal.alarm(120)  # where a rank waits for another for ever
        base.default_cache = lambda: said.parent / "cache"
        number = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        where = {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        told = {"TORCHELASTIC_RUN_ID": "none", **number, **where}
        os.environ.update({name: str(value) for name, value in told.items()})
        fabric_ranks.rank_zero_only.rank = lightning_ranks.rank_zero_only.rank = rank
        one(rank)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 3
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def end_at(step: int, number: signal.Signals) -> None:
    """Get a signal at the end of this step."""
    ended = Timer.on_train_batch_end

    def on_train_batch_end(self: Timer, trainer: Trainer, *arguments: object) -> None:
        ended(self, trainer, *arguments)
        if trainer.global_step == step:
            os.kill(os.getpid(), number)

    Timer.on_train_batch_end = on_train_batch_end


class Sharded(pl.LightningModule):
    """A model of one's own under FSDP2; for each step another sequence of each rank."""

    def __init__(self, losses: Path) -> None:
        super().__init__()
        self.losses, self.model = losses, ranks.made()

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            for block in self.model.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = self.model(batch[0]).square().mean()
        mean = self.all_gather(loss.detach()).mean().item()
        if self.trainer.is_global_zero:
            with self.losses.open("a") as file:
                file.write(f"{mean!r}\n")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(param_groups(self, lr=0.01))


def model_parallel(folder: Path, world: int, epochs: int, resume: bool) -> list[int]:
    """Lightning's strategy for FSDP2, two steps an epoch; a checkpoint at the end."""

    def one(rank: int) -> None:
        torch.manual_seed(1)
        data = DataLoader(TensorDataset(ranks.inputs(8)[rank::world]), batch_size=4 // world)
        trainer = Trainer(
            accelerator="cpu",
            devices=world,
            strategy=ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
            max_epochs=epochs,
            use_distributed_sampler=False,  # which shuffles
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = Sharded(folder / f"losses of {world}")
        trainer.fit(model, data, ckpt_path=folder / "sharded.ckpt" if resume else None)
        trainer.save_checkpoint(folder / "sharded.ckpt")

    return forked(folder, world, one)


def documented(folder: Path, world: int) -> list[int]:
    """The loop of docs/distributed.md, as it stands there."""
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    loop = next(part for part in page.split("```python\n") if "destroy_process_group" in part).split("```")[0]

    def one(rank: int) -> None:
        exec(compile(loop, "docs/distributed.md", "exec"), {"__name__": "__main__"})

    return forked(folder, world, one, f"documented.{world}")


def main(folder: Path) -> None:
    """One process, undisturbed. Then four, until one gets SIGTERM; two, until one is killed; and one."""
    os.chdir(folder)
    codes = {"whole": run(folder, ["--data.batch_size", "128", "--run_dir", "whole"])}
    often = ["--run_dir", "often"]
    on = [*often, "--ckpt_path", "last"]
    ended, killed = (1, 7, signal.SIGTERM), (1, 18, signal.SIGKILL)
    codes["four"] = run(folder, ["--data.batch_size", "32", *often], 4, ended)
    halves = ["--data.batch_size", "32", "--trainer.accumulate_grad_batches", "2"]
    codes["two"] = run(folder, [*halves, *on], 2, killed)
    codes["one"] = run(folder, ["--data.batch_size", "128", *on])
    codes["sharded"] = model_parallel(folder, 2, 1, False)
    codes["sharded, gone on in one"] = model_parallel(folder, 1, 2, True)
    (folder / "loop").mkdir()
    os.chdir(folder / "loop")
    codes["documented, 2"] = documented(folder, 2)
    for late in ("00000015", "00000020"):
        shutil.rmtree(folder / "loop" / "checkpoints" / late)
    codes["documented, 1"] = documented(folder, 1)
    (folder / "codes").write_text(repr(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
