"""The examples: what is said when something is wrong."""

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

import train
from data import images, storage
from example_files import OF_LIGHTNING, TINY, fails, write_parquet
from trainer.checkpoints import CONTENT, CheckpointError, load_checkpoint

pytestmark = [
    pytest.mark.usefixtures("own_folder"),
    OF_LIGHTNING,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # here on purpose
]
RECIPES = sorted(path.stem for path in train.RECIPES.glob("*.yaml"))
Capture = pytest.CaptureFixture[str]


def test_unknown_recipe(capsys: Capture) -> None:
    fails(capsys, 2, ["unheard"], "recipe 'unheard'", *RECIPES)


@pytest.mark.parametrize(
    ("code", "option", "value", "named"),
    [
        (2, "--model.d_model", "many", "d_model"),
        (2, "--model.norm", "group", "norm"),
        (2, "--model.variant", "dense", "variant"),
        (2, "--model.mode", "slow", "mode"),
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
        (1, "--data.validation", "0.001", "validation"),
        (1, "--run_dir", "/dev/null/run", "/dev/null"),
        (1, "--trainer.accelerator", "abacus", "accelerator"),
        (1, "--trainer.max_epochs", "-1", "max_steps"),
        (1, "--trainer.precision", "16-true", "16-mixed"),
        (1, "--trainer.accumulate_grad_batches", "0", "accumulate_grad_batches"),
        (1, "--seed_everything", "-1", "seed_everything"),
    ],
)
def test_wrong_value(code: int, option: str, value: str, named: str, capsys: Capture) -> None:
    fails(capsys, code, ["digits", option, value], named)


@pytest.mark.usefixtures("brief_runs")
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
    twice = write_parquet(tmp_path / "twice", images.SOURCES["mnist"], 1)
    shutil.copy(twice / "train.parquet", twice / "train-00000-of-00001.parquet")
    said(twice, "just once", "train.parquet", "train-00000-of-00001.parquet")
    (twice / "train.parquet").unlink()
    (twice / "train-00000-of-00001.parquet").rename(twice / "train-00000-of-00002.parquet")
    said(twice, "every part", "train-00000-of-00002.parquet")


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [("image", None, "row 3 has no image"), ("label", 0.7, "'label' is float64")],
)
def test_wrong_cell(column: str, value: object, named: str, tmp_path: Path, capsys: Capture) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = write_parquet(tmp_path / "mnist", images.SOURCES["mnist"], 1)
    table = pyarrow.parquet.read_table(folder / "train.parquet").to_pydict()
    table[column] = [*table[column][:3], value, *table[column][4:]]
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "train.parquet")
    fails(capsys, 1, ["smnist", *TINY, "--data.path", str(folder)], str(folder), named)


def test_cache_that_cannot_be_written(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    file = tmp_path / "file"
    file.touch()
    options = ["smnist", *TINY, "--data.path", str(folders["mnist"]), "--data.cache_dir"]
    fails(capsys, 1, [*options, str(file)], "data.cache_dir", str(file))
    fails(capsys, 1, [*options, str(file / "below")], "data.cache_dir", str(file))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "atomic_save", full)
    fails(capsys, 1, [*options, str(tmp_path / "new")], "data.cache_dir", "No space left")


@pytest.mark.usefixtures("brief_runs")
def test_damaged_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    train.run(["digits", *TINY, "--trainer.max_epochs", "1"])
    folder = tmp_path / "runs" / "digits"
    last, best = folder / "last.ckpt", (folder / "best.ckpt").read_bytes()
    for damaged in (b"", b"nothing of the kind", last.read_bytes()[: last.stat().st_size // 2]):
        last.write_bytes(damaged)
        fails(capsys, 1, ["digits", *TINY, "--ckpt_path", "last"], "last.ckpt", "damaged")
        assert last.read_bytes() == damaged
        assert (folder / "best.ckpt").read_bytes() == best
    whole = torch.load(folder / "best.ckpt", weights_only=True)
    for name in CONTENT:
        torch.save({key: value for key, value in whole.items() if key != name}, last)
        fails(capsys, 1, ["digits", *TINY, "--ckpt_path", "last"], "last.ckpt", f"no {name};")
    whole["state_dict"]["model.decoder.bias"] = torch.zeros(3)
    torch.save(whole, last)
    fails(capsys, 1, ["digits", *TINY, "--ckpt_path", "last"], "another model", "decoder.bias", "(3,)")
    fails(capsys, 1, ["digits", "--ckpt_path", "none.ckpt"], "no checkpoint at none.ckpt")
    fails(capsys, 1, ["test", "smnist"], "train first")


def test_no_pickled_code_in_checkpoints(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "code": Path}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointError, match=r"code\.ckpt"):
        load_checkpoint(tmp_path / "code.ckpt")
