"""Training on several processes that ends and goes on: how many there are may change, what is learned not."""

import ast
import csv
import math
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from processes import once

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

from data.batches import Batch
from data.loader import Loader
from data.storage import DataError
from example_files import OF_LIGHTNING, fails
from lightning.pytorch import Trainer
from trainer import runs

from s4 import param_groups

pytestmark = OF_LIGHTNING
SCORES = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "test/loss", "test/accuracy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs of restarts.py wrote."""
    return once(tmp_path_factory, "restarts", play)


def play(folder: Path) -> None:
    script = Path(__file__).with_name("restarts.py")
    subprocess.run([sys.executable, str(script), str(folder)], timeout=300, check=True)


def scores(run: Path) -> dict[tuple[int, str], float]:
    """By step and name."""
    with (run / "metrics.csv").open(newline="") as rows:
        return {
            (int(row["step"]), name): float(row[name])
            for row in csv.DictReader(rows)
            for name in SCORES
            if row[name]
        }


def said(folder: Path) -> str:
    return "\n".join(file.read_text()[-2000:] for file in sorted(folder.glob("*.[0-9]")))


@pytest.mark.promise(
    "sharding and distributed training",
    "the examples with Lightning's `ddp`: SIGTERM to any process ends all after one step, with nothing lost",
)
def test_a_signal_to_one_process_ends_all_after_one_step(folder: Path) -> None:
    codes = ast.literal_eval((folder / "codes").read_text())
    assert codes["whole"] == [0], said(folder)
    assert codes["four"] == [128 + signal.SIGTERM] * 4, said(folder)
    # Gone on from step 7, whose row alone was not written any more.
    missing = scores(folder / "whole").keys() - scores(folder / "often").keys()
    assert missing <= {(6, "train/loss"), (6, "train/accuracy")}


@pytest.mark.promise(
    "other libraries", "Lightning with several processes and `strategy='ddp'`: as one with the whole batch"
)
@pytest.mark.promise(
    "sharding and distributed training",
    "a run of the examples on four processes goes on in two and in one, also where one was killed, at the "
    "same losses: what a step is made of stays the same",
)
def test_a_run_of_four_goes_on_in_two_and_in_one(folder: Path) -> None:
    """In float64: sums in another order differ by 1e-16, which gradients of S4 multiply by 1e5 at most.

    Weights rounded to float32 on their way through a checkpoint would show: 1e-9.
    """
    codes = ast.literal_eval((folder / "codes").read_text())
    assert codes["two"][1] == -signal.SIGKILL, said(folder)
    assert codes["two"][0] not in (0, 128 + signal.SIGTERM), said(folder)
    assert codes["one"] == [0], said(folder)
    whole, often = scores(folder / "whole"), scores(folder / "often")
    assert {step for step, name in whole if name == "train/loss"} == set(range(22))
    assert often.keys() <= whole.keys()
    for key, value in often.items():
        assert math.isclose(value, whole[key], rel_tol=1e-11), key


@pytest.mark.promise(
    "sharding and distributed training",
    "Lightning's `ModelParallelStrategy` with `fully_shard` and `param_groups`: as one process, and its "
    "checkpoint of two goes on in one",
)
def test_lightning_shards_a_model_of_ones_own(folder: Path) -> None:
    codes = ast.literal_eval((folder / "codes").read_text())
    assert codes["sharded"] == [0, 0], said(folder)
    assert codes["sharded, gone on in one"] == [0], said(folder)
    losses = [(folder / f"losses of {world}").read_text().split() for world in (2, 1)]
    assert list(map(len, losses)) == [2, 2]
    model = ranks.made()
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.01))
    torch.manual_seed(1)
    batches = ranks.inputs(8).split(4)
    for got, u in zip(chain(*losses), [*batches, *batches], strict=True):
        optimizer.zero_grad()
        loss = model(u).square().mean()
        assert math.isclose(float(got), loss.item(), rel_tol=1e-9)
        loss.backward()
        optimizer.step()


@pytest.mark.promise(
    "sharding and distributed training",
    "the loop of docs/distributed.md: FSDP2, accumulation, distributed checkpoints of two that go on in one",
)
def test_the_loop_of_the_documentation(folder: Path) -> None:
    """In float32: 20 steps enlarge a rounding of 1e-7 a hundred times at most; a step is 1% of a loss."""
    codes = ast.literal_eval((folder / "codes").read_text())
    assert codes["documented, 2"] == [0, 0], said(folder)
    assert codes["documented, 1"] == [0], said(folder)
    two, one = (dict(map(str.split, lines(folder / f"documented.{world}.0"))) for world in (2, 1))
    assert list(map(int, two)) == list(range(20))
    assert list(map(int, one)) == list(range(10, 20))
    for step, loss in one.items():
        assert math.isclose(float(loss), float(two[step]), rel_tol=1e-5), step
    assert float(two["19"]) < 0.8 * float(two["0"])


def lines(file: Path) -> list[str]:
    """Those of numbers: torch may warn between them."""
    return [line for line in file.read_text().splitlines() if line[:1].isdigit()]


@pytest.mark.promise(
    "sharding and distributed training",
    "Lightning's `fsdp` on a CPU: Lightning refuses it, where `ModelParallelStrategy` and `ddp` run",
    supported=False,
)
def test_lightning_has_fsdp_on_a_gpu_only() -> None:
    with pytest.raises(ValueError, match=r"fsdp.*GPU accelerator"):
        Trainer(accelerator="cpu", devices=2, strategy="fsdp")


@pytest.mark.promise(
    "sharding and distributed training",
    "Lightning's strategies that shard, for the recipes of the examples: refused; they train with `ddp`",
    supported=False,
)
@pytest.mark.parametrize(
    "strategy", ["fsdp", "deepspeed_stage_2", "lightning.pytorch.strategies.FSDPStrategy"]
)
@pytest.mark.usefixtures("own_folder")
def test_recipes_refuse_to_be_sharded(strategy: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = strategy.rpartition(".")[2].lower()
    fails(capsys, 1, ["digits", "--trainer.strategy", strategy], f"trainer.strategy {name}", "ddp")


def test_processes_draw_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a checkpoint is of another number of them: neither what others draw, nor the first again."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def drawn(world: int, rank: int, step: int, saved: int = 0) -> float:
        torch.manual_seed(0)
        last = runs.LastCheckpoint(Path(), 1)
        if saved:
            last.load_state_dict({"random": [runs._random_state()] * saved})
        trainer: Any = SimpleNamespace(world_size=world, global_rank=rank, global_step=step)
        last.on_train_start(trainer, trainer)
        return torch.rand(()).item()

    torch.manual_seed(0)
    first = torch.rand(()).item()
    assert drawn(1, 0, 0) == drawn(1, 0, 7, saved=1) == drawn(4, 2, 7, saved=4) == first
    others = [
        drawn(2, 0, 0),
        drawn(2, 1, 0),
        drawn(2, 0, 7, saved=4),
        drawn(2, 1, 7, saved=4),
        drawn(1, 0, 7, saved=4),
    ]
    assert len({first, *others[:-1]}) == 5
    assert others[-1] == others[2]
    assert drawn(2, 1, 7, saved=4) == others[3]


def loader(batch_size: int, world: int, parts: int, rank: int = 0, seed: int = 0, rows: int = 301) -> Loader:
    """Of rows that differ in length, where a batch holds rows of similar length."""
    lengths = np.random.default_rng(0).integers(1, 50, rows)
    return Loader(
        lambda chosen: Batch(chosen, chosen),
        np.arange(rows),
        batch_size,
        lengths=lengths,
        shuffle=True,
        drop_last=True,
        seed=seed,
        rank=rank,
        world_size=world,
        parts=parts,
    )


def steps(batch_size: int, world: int, parts: int) -> list[list[int]]:
    """The rows of each step of an epoch, of all ranks and parts."""
    ranks = [[batch.inputs for batch in loader(batch_size, world, parts, rank)] for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(loader(batch_size, world, parts))
    batches = [torch.cat(together).tolist() for together in zip(*ranks, strict=True)]
    return [sorted(chain(*batches[i : i + parts])) for i in range(0, len(batches), parts)]


@pytest.mark.parametrize(
    ("batch_size", "world", "parts"), [(4, 4, 1), (8, 2, 1), (4, 2, 2), (2, 4, 2), (1, 1, 16)]
)
def test_a_step_has_the_same_rows_however_it_is_divided(batch_size: int, world: int, parts: int) -> None:
    want = steps(16, 1, 1)
    assert len(want) == 301 // 16
    assert steps(batch_size, world, parts) == want


def test_the_place_in_the_data_is_that_of_the_step() -> None:
    batches = iter(saved := loader(4, 4, 1))
    first = [next(batches) for _ in range(6)]
    assert len(first) == 6
    other = loader(4, 2, 2)
    other.load_state_dict(saved.state_dict())
    assert other.position == 12
    rest = [batch.inputs.tolist() for batch in loader(4, 2, 2)][12:]
    assert [batch.inputs.tolist() for batch in other] == rest


def test_a_place_within_a_step_is_kept_by_a_run_of_the_same_parts() -> None:
    batches = iter(saved := loader(4, 2, 2))
    next(batches)
    same = loader(4, 2, 2)
    same.load_state_dict(saved.state_dict())
    assert same.position == 1
    with pytest.raises(DataError, match=r"1 of 2 batches into a step.*accumulate_grad_batches=2, got 1"):
        loader(4, 4, 1).load_state_dict(saved.state_dict())


@pytest.mark.promise(
    "sharding and distributed training",
    "a run of the examples that goes on with other numbers of sequences in a step: it is refused",
    supported=False,
)
def test_a_step_of_other_rows_is_refused() -> None:
    state = loader(4, 4, 1).state_dict()
    with pytest.raises(DataError, match=r"'rows_a_step': 16.*'rows_a_step': 8.*same product"):
        loader(4, 2, 1).load_state_dict(state)
    with pytest.raises(DataError, match=r"'seed': 0.*'seed': 1"):
        loader(4, 4, 1, seed=1).load_state_dict(state)


def test_a_place_that_was_kept_before_the_number_could_change() -> None:
    state = {"epoch": 3, "position": 5, "identity": {"rows": 301, "batch_size": 8, "seed": 0, "devices": 2}}
    two = loader(8, 2, 1)
    two.load_state_dict(state)
    assert (two.epoch, two.position) == (3, 5)
