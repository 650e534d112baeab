"""The examples: recipes, data, loader, resume, and what is said when something is wrong."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

import images
import runs
import train
from images import DataError, SequentialImages, TensorLoader, hold_out
from storage import CheckpointError, atomic_save, load_checkpoint

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:(?s).*(in v4|only one Jsonarg):DeprecationWarning"
    ),  # Lightning's jsonargparse
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # here on purpose
]
EXAMPLES = Path(train.__file__).parent
RECIPES = sorted(path.stem for path in train.RECIPES.glob("*.yaml"))
TINY = [
    *("--model.d_model", "8", "--model.n_layers", "1", "--model.d_state", "4"),
    *("--data.batch_size", "128", "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
]


def write_parquet(folder: Path, source: images.Source, per_class: int = 4) -> Path:
    """Random images, encoded as PNG, with the columns of the hub's data set."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = []
        for _ in range(10 * per_class):
            shape = (source.height, source.width, source.channels)
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(pixels.squeeze()).save(encoded, "PNG")
            rows.append({"bytes": encoded.getvalue(), "path": None})
        labels = [index % 10 for index in range(len(rows))]
        pyarrow.parquet.write_table(
            pyarrow.table({source.column: rows, "label": labels}), folder / f"{split}.parquet"
        )
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of parquet files for each data set that is not embedded."""
    root = tmp_path_factory.mktemp("data")
    return {name: write_parquet(root / name, images.SOURCES[name]) for name in ("mnist", "cifar10")}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and caches stay within the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "_default_cache", lambda: tmp_path / "cache")


def step_losses(folder: Path) -> dict[int, str]:
    """Training loss by step, as the text in metrics.csv: compared bit for bit."""
    with (folder / "metrics.csv").open(newline="") as rows:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(rows) if row["train/loss"]}


Capture = pytest.CaptureFixture[str]


def fails(capsys: Capture, code: int, arguments: list[str], *words: str) -> None:
    """A command line that must end with `code` and one message with these words, without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.run(arguments)
    message = capsys.readouterr().err
    assert ended.value.code == code
    assert "Traceback" not in message
    assert [word for word in words if word not in message] == [], message


# Recipes and the command line


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_two_steps(recipe: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["cifar10" if "cifar" in recipe else "mnist"]
    data = [] if recipe == "digits" else ["--data.path", str(folder)]
    cli = train.run([recipe, *TINY, *data, "--data.batch_size", "8", "--trainer.max_steps", "2"])
    assert cli.results["steps"] == 2
    folder = tmp_path / "runs" / recipe
    assert len(step_losses(folder)) == 2
    kept = {path.name for path in folder.iterdir()}
    assert {"last.ckpt", "config.yaml", "metrics.csv", "results.json", "learning_curve.png"} <= kept
    assert all(torch.isfinite(parameter).all() for parameter in cli.model.parameters())


def test_recipes_have_the_values_of_the_paper() -> None:
    import yaml

    recipe = yaml.safe_load((train.RECIPES / "scifar.yaml").read_text())
    model = recipe["model"]
    assert (model["n_layers"], model["d_model"], model["d_state"], model["dropout"]) == (6, 512, 64, 0.1)
    assert (model["lr"], model["ssm_lr"], model["weight_decay"]) == (0.01, 0.001, 0.05)
    assert (model["warmup_steps"], recipe["data"]["batch_size"]) == (900, 50)
    assert recipe["trainer"]["max_epochs"] == 200


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
    assert len(predictions) == len(cli.datamodule.test["labels"])
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
        assert all(recipe in capsys.readouterr().out for recipe in RECIPES[-1:])


def test_print_config(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        train.run(["scifar", "--model.lr", "0.004", "--print_config"])
    assert ended.value.code == 0
    assert "lr: 0.004" in capsys.readouterr().out


def test_schedule() -> None:
    model = train.SequenceClassifier(d_model=4, n_layers=1, d_state=2, warmup_steps=10)
    model.trainer = type("Trainer", (), {"estimated_stepping_batches": 110})()
    factors = [model.lr_factor(step) for step in range(111)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0)
    assert np.all(np.diff(factors[:11]) > 0)
    assert np.all(np.diff(factors[10:]) < 0)


# Resume


def test_killed_run_resumes_at_the_same_losses(tmp_path: Path) -> None:
    options = ["digits", *TINY, "--data.batch_size", "64", "--model.dropout", "0.1"]
    options += ["--trainer.max_steps", "60", "--save_every", "7"]
    train.run([*options, "--run_dir", "whole"])
    whole = step_losses(tmp_path / "whole")
    assert len(whole) == 60

    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), *sys.path]),
    }
    command = [sys.executable, str(EXAMPLES / "train.py"), *options, "--run_dir", "killed"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
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

    def keep_each(self: runs.LastCheckpoint, trainer: train.Trainer) -> None:
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


def test_resume_needs_the_same_data(tmp_path: Path, capsys: Capture) -> None:
    train.run(["digits", *TINY, "--trainer.max_steps", "2"])
    options = ["digits", *TINY, "--trainer.max_steps", "4"]
    fails(capsys, 1, [*options, "--data.batch_size", "8", "--ckpt_path", "last"], "'batch_size': 8")


def test_failed_write_keeps_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    atomic_save({"state_dict": {}}, file)
    with pytest.raises(Exception, match="pickle"):
        atomic_save({"state_dict": {}, "bad": lambda: None}, file)
    assert load_checkpoint(file) == {"state_dict": {}}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


# Errors


def test_unknown_recipe(capsys: Capture) -> None:
    fails(capsys, 2, ["speech"], "unknown recipe 'speech'", *RECIPES)


@pytest.mark.parametrize(
    ("code", "option", "value", "named"),
    [
        (2, "--model.d_model", "many", "d_model"),
        (2, "--model.norm", "group", "norm"),
        (2, "--model.variant", "dense", "variant"),
        (2, "--model.nothing", "1", "nothing"),
        (2, "--trainer.max_epochs", "soon", "max_epochs"),
        (2, "--data.dataset", "imagenet", "dataset"),
        (2, "--save_every", "0", "save_every"),
        (1, "--model.init", "lin", "init"),
        (1, "--model.d_state", "3", "d_state"),
        (1, "--model.n_layers", "0", "n_layers"),
        (1, "--model.dropout", "1.5", "dropout"),
        (1, "--data.batch_size", "0", "batch_size"),
        (1, "--data.batch_size", "4000", "batch_size"),
        (1, "--data.validation", "0", "validation"),
        (1, "--trainer.accelerator", "abacus", "accelerator"),
        (1, "--trainer.max_epochs", "-1", "max_steps"),
    ],
)
def test_wrong_value(code: int, option: str, value: str, named: str, capsys: Capture) -> None:
    fails(capsys, code, ["digits", option, value], named)


def test_wrong_folder(folders: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    def said(folder: Path, *words: str) -> None:
        fails(capsys, 1, ["smnist", *TINY, "--data.path", str(folder)], str(folder), *words)

    said(tmp_path / "nowhere", "train.parquet", "'image'", "'label'")
    (tmp_path / "empty").mkdir()
    said(tmp_path / "empty", "train.parquet", "'image'", "'label'")
    said(folders["cifar10"], "train.parquet", "no column ['image']", "'img'")
    said(write_parquet(tmp_path / "wide", images.Source(28, 32, 1, column="image"), 1), "28x28")
    broken = write_parquet(tmp_path / "broken", images.SOURCES["mnist"], 1)
    (broken / "train.parquet").write_bytes((broken / "train.parquet").read_bytes()[:-100])
    said(broken, "train.parquet", "cannot read")


def test_damaged_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    train.run(["digits", *TINY, "--trainer.max_epochs", "1"])
    folder = tmp_path / "runs" / "digits"
    last, best = folder / "last.ckpt", (folder / "best.ckpt").read_bytes()
    for damaged in (b"", b"nothing of the kind", last.read_bytes()[: last.stat().st_size // 2]):
        last.write_bytes(damaged)
        fails(capsys, 1, ["digits", *TINY, "--ckpt_path", "last"], "last.ckpt", "damaged")
        assert last.read_bytes() == damaged
        assert (folder / "best.ckpt").read_bytes() == best
    fails(capsys, 1, ["digits", "--ckpt_path", "none.ckpt"], "no checkpoint at none.ckpt")
    fails(capsys, 1, ["test", "smnist"], "train first")


def test_no_pickled_code_in_checkpoints(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "code": Path}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match=r"code\.ckpt"):
        load_checkpoint(tmp_path / "code.ckpt")


# Data


def loader(rank: int = 0, world_size: int = 1, shuffle: bool = True, drop_last: bool = False) -> TensorLoader:
    numbers = torch.arange(103)
    rows = np.arange(3, 103)
    return TensorLoader(
        *(numbers.view(-1, 1, 1), numbers, rows, 8),
        shuffle=shuffle,
        drop_last=drop_last,
        seed=5,
        rank=rank,
        world_size=world_size,
    )


def labels_of(batches: TensorLoader) -> list[int]:
    return [int(label) for _, labels in batches for label in labels]


def test_loader_order_depends_on_seed_and_epoch_only() -> None:
    first, again = loader(), loader()
    order = labels_of(first)
    assert sorted(order) == list(range(3, 103))
    assert order != sorted(order)
    assert order == labels_of(again) == labels_of(again)
    again.set_epoch(1)
    assert order != labels_of(again)
    again.set_epoch(0)
    assert order == labels_of(again)
    assert labels_of(loader(shuffle=False)) == list(range(3, 103))


@pytest.mark.parametrize("drop_last", [True, False])
def test_loader_ranks_are_disjoint(drop_last: bool) -> None:
    parts = [loader(rank, 3, drop_last=drop_last) for rank in range(3)]
    orders = [labels_of(part) for part in parts]
    together = sorted(label for order in orders for label in order)
    assert len(together) == len(set(together))
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
    if drop_last:
        assert [len(order) for order in orders] == [32, 32, 32]
    else:
        assert together == list(range(3, 103))


@pytest.mark.parametrize("taken", [0, 1, 5, 13])
def test_loader_state_round_trip(taken: int) -> None:
    whole, stopped, resumed = loader(), loader(), loader()
    for batches in (whole, stopped):
        batches.set_epoch(4)
    iterator = iter(stopped)
    seen = [label for _ in range(taken) for label in next(iterator)[1].tolist()]
    resumed.load_state_dict(stopped.state_dict())
    resumed.set_epoch(4)
    assert seen + labels_of(resumed) == labels_of(whole)
    # The next pass is a whole one again, also after a pass that was broken off.
    next(iter(resumed))
    assert labels_of(resumed) == labels_of(whole)


def test_loader_state_of_other_data() -> None:
    state = loader().state_dict()
    with pytest.raises(DataError, match="devices"):
        loader(0, 2).load_state_dict(state)


def test_hold_out_is_stratified_and_fixed() -> None:
    labels = np.random.default_rng(1).integers(0, 10, 2000)
    kept, held = hold_out(labels, 0.1)
    assert sorted([*kept, *held]) == list(range(2000))
    share = np.bincount(labels[held]) - np.bincount(labels) / 10
    assert np.abs(share).max() < 1
    assert all(np.array_equal(a, b) for a, b in zip(hold_out(labels, 0.1), (kept, held), strict=True))


def test_digits_splits() -> None:
    data = SequentialImages("digits", batch_size=32)
    data.setup("fit")
    assert data.train["images"].shape == (1437, 64, 1)
    assert data.train["images"].dtype == torch.uint8
    assert len(data.test["labels"]) == 360
    batch, labels = next(iter(data.train_dataloader()))
    assert data.normalize(batch).shape == (32, 64, 1)
    assert labels.dtype == torch.int64
    pixels = data.normalize(data.train["images"])
    assert abs(pixels.mean()) < 1e-4
    assert abs(pixels.std() - 1) < 1e-3


def test_images_are_decoded_exactly_and_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = SequentialImages("cifar10", path=folders["cifar10"], batch_size=4)
    data.setup("fit")
    expected = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8).reshape(-1, 3)
    assert np.array_equal(data.train["images"][0].numpy(), expected)
    assert data.train["labels"].tolist() == [index % 10 for index in range(40)]

    def decode(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(images, "decode", decode)
    SequentialImages("cifar10", path=folders["cifar10"], batch_size=4).setup("fit")


def test_cache_is_rebuilt(tmp_path: Path) -> None:
    folder = write_parquet(tmp_path / "mnist", images.SOURCES["mnist"], 1)
    data = SequentialImages("mnist", path=folder, batch_size=4, cache_dir=tmp_path / "decoded")
    data.setup("fit")
    whole = data.train["images"].clone()
    for file in (tmp_path / "decoded").iterdir():  # half-written
        file.write_bytes(file.read_bytes()[:1000])
    data.setup("fit")
    assert torch.equal(data.train["images"], whole)
    os.utime(folder / "train.parquet", (1, 1))  # another file
    data.setup("fit")
    assert len(list((tmp_path / "decoded").iterdir())) == 3


def test_pixel_order_of_permuted_mnist(folders: dict[str, Path]) -> None:
    plain, permuted, again = (
        SequentialImages("mnist", path=folders["mnist"], permute=permute, seed=seed, batch_size=4)
        for permute, seed in ((False, 0), (True, 0), (True, 7))
    )
    assert plain.pixels.tolist() == list(range(784))
    assert sorted(permuted.pixels) == list(range(784))
    assert permuted.pixels[:5].tolist() == [350, 776, 554, 700, 688]
    assert np.array_equal(permuted.pixels, again.pixels)
    for data in (plain, permuted):
        data.setup("fit")
    batch = plain.train["images"][:3]
    assert torch.equal(permuted.normalize(batch), plain.normalize(batch)[:, permuted.pixels])
