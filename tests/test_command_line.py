"""The command line of the examples: folders of runs, damaged files, what is said of wrong words, values."""

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

import demo
import train
from data import storage
from data.storage import atomic_save, cached
from example_files import OF_LIGHTNING, TINY, fails, write_shakespeare
from golden.make import HERE
from trainer import runs
from trainer.checkpoints import CheckpointError, ConfigError, load_checkpoint

pytestmark = [
    pytest.mark.usefixtures("own_folder"),
    OF_LIGHTNING,
]
Capture = pytest.CaptureFixture[str]
DIGITS = ["digits", *TINY, "--trainer.max_steps", "2"]


# The folder of a run


def test_of_two_runs_that_see_a_free_folder_one_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sees what the other has made, until it makes the same."""

    def nothing(*_: object) -> Iterator[Path]:
        return iter(())

    Path("there").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(runs, "runs_of", lambda run_dir: {})
        patched.setattr(Path, "iterdir", nothing)
        taken = [runs.new_run(Path(name)) for name in ("new", "new", "there", "there")]
    assert taken == [Path("new"), Path("new-2"), Path("there"), Path("there-2")]
    assert runs.new_run(Path("new")) == Path("new-3")


def test_folder_of_a_run_that_is_training_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list[Path] = []
    start = runs.LastCheckpoint.on_train_start

    def another(self: runs.LastCheckpoint, *arguments: object) -> None:
        beside.append(runs.new_run(Path("runs/digits")))
        start(self, *arguments)

    monkeypatch.setattr(runs.LastCheckpoint, "on_train_start", another)
    assert train.run(DIGITS).results["files"] == "runs/digits"
    assert beside == [Path("runs/digits-2")]


def test_run_that_does_not_begin_leaves_no_folder(capsys: Capture) -> None:
    fails(capsys, 1, [*DIGITS, "--model.d_state", "3"], "d_state")
    fails(capsys, 1, ["smnist", *TINY, "--data.path", "nowhere"], "nowhere")
    train.run([*DIGITS, "--trainer.fast_dev_run", "true"])  # which writes nothing
    assert not any(Path("runs").glob("*"))


@pytest.mark.parametrize("run_dir", [".", "", "..", "/", "runs/.."])
def test_run_in_a_folder_without_a_name(run_dir: str, capsys: Capture) -> None:
    """It would be among the files of something else."""
    Path("best.ckpt").write_text("of an earlier run")
    fails(capsys, 1, [*DIGITS, "--run_dir", run_dir], "run_dir must name a folder")
    assert [path.name for path in Path().iterdir() if path.name != "cache"] == ["best.ckpt"]


def test_resuming_a_run_that_is_at_its_end(capsys: Capture) -> None:
    train.run(DIGITS)
    again = [*DIGITS, "--ckpt_path", "last"]
    fails(capsys, 1, again, "last.ckpt", "step 2", "nothing was trained", "trainer.max_steps")
    # One that was killed while it was tested has its results to come.
    Path("runs/digits/results.json").unlink()
    assert train.run(again).results["steps"] == 2


# Damaged files


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    whole = (HERE / "run" / "last.ckpt").read_bytes()
    content, file, noticed = load_checkpoint(HERE / "run" / "last.ckpt"), tmp_path / "flipped.ckpt", 0
    places = [*range(0, 8 * len(whole), 8 * len(whole) // 300 + 1)]
    # And where no checksum looks, the attributes of a part: here that it is a folder, which torch leaves out.
    with zipfile.ZipFile(HERE / "run" / "last.ckpt") as parts:
        number = next(name for name in parts.namelist() if "/data/" in name).encode()
        places.append(8 * (whole.index(number, parts.start_dir) - 8) + 4)
    for place in places:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            assert same(load_checkpoint(file), content), f"bit {place}"
        except CheckpointError as error:
            assert "flipped.ckpt is damaged" in str(error)  # noqa: PT017
            noticed += 1
    assert noticed > 0.8 * len(places)


def same(a: object, b: object) -> bool:
    """Of one kind and, bit for bit, of one value."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return [*a] == [*b] and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def flip(file: Path) -> None:
    """A bit of a number."""
    with zipfile.ZipFile(file) as parts:
        number = parts.read(next(part for part in parts.infolist() if "/data/" in part.filename))
    content = bytearray(file.read_bytes())
    content[content.index(number)] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_in_every_place_that_reads_a_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    options = [*TINY, "--trainer.max_epochs", "1", "--data.batch_size", "8"]
    text = ["shakespeare_small", *options, *write_shakespeare(tmp_path / "data", {})]
    train.run([*text, "--trainer.max_steps", "2", "--trainer.val_check_interval", "1"])
    folder = Path("runs/shakespeare_small")
    for file in ("best.ckpt", "last.ckpt"):
        flip(folder / file)
    said = ("is damaged", "checksum", "ckpt_path")
    for command in ("validate", "test", "generate"):
        fails(capsys, 1, [command, *text], "best.ckpt", *said)
        fails(capsys, 1, [command, *text, "--ckpt_path", str(folder / "last.ckpt")], "last.ckpt", *said)
    fails(capsys, 1, [*text, "--ckpt_path", "last"], "last.ckpt", *said)


def test_a_flipped_bit_in_the_cache_is_built_anew(tmp_path: Path) -> None:
    file, tensors = tmp_path / "x.pt", {"x": torch.arange(10_000)}
    cached(file, lambda: tensors)
    flip(file)
    found = cached(file, lambda: tensors)
    assert torch.equal(found["x"], tensors["x"])
    assert torch.equal(storage.load_whole(file)["x"], tensors["x"])


def test_checkpoints_that_someone_made(tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(HERE / "run", "runs/digits")
    file = Path("runs/digits/last.ckpt")
    whole = load_checkpoint(file)
    values: dict[str, tuple[object, str]] = {
        "state_dict": (3, "state_dict is no dict"),
        "global_step": ("x", "global_step is no int"),
        "hyper_parameters": ({"d_model": "x"}, "d_model"),
        "optimizer_states": ([3], "does not fit"),
        "loops": ({}, "does not fit"),
    }
    options = ["digits", *TINY, "--model.d_model", "4", "--trainer.max_steps", "24", "--ckpt_path", "last"]
    for name, (value, said) in values.items():
        atomic_save({**whole, name: value}, file)
        fails(capsys, 1, options, "checkpoint" if said == "does not fit" else "last.ckpt", said)
    atomic_save([1], file)
    fails(capsys, 1, options, "last.ckpt", "not a checkpoint")
    atomic_save({**whole, "state_dict": dict.fromkeys(whole["state_dict"], 3)}, file)
    fails(capsys, 1, options, "another model")
    fails(capsys, 1, [*options[:-1], ""], "ckpt_path must be")


def test_damaged_metrics(capsys: Capture) -> None:
    train.run(DIGITS)
    file = Path("runs/digits/metrics.csv")
    rows = file.read_text()
    on = ["digits", *TINY, "--trainer.max_steps", "3", "--ckpt_path", "last"]
    for damaged in (b"a,b\n1,2\n", b"step,train/loss\nx,1\n", b"step\n\xff\n", b"step,train/loss\n1,y\n"):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"metrics\.csv is damaged"):
            runs.read_metrics(file)
    fails(capsys, 1, on, "metrics.csv is damaged")
    file.write_text(rows + rows.splitlines()[-1][:2])  # as of a run that was killed while it wrote
    train.run(on)
    assert file.read_text().startswith(rows.splitlines()[0])


def test_empty_text(capsys: Capture) -> None:
    Path("empty.txt").touch()
    fails(capsys, 1, ["shakespeare_small", *TINY, "--data.path", "empty.txt"], "empty.txt is an empty text")


# Words and values


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--model.d_model", "-5", "model.d_model must be at least 1, got -5"),
        ("--model.lr", "-1", "model.lr must be at least 0, got -1"),
        ("--model.ssm_lr", "-1", "model.ssm_lr"),
        ("--model.weight_decay", "-1", "model.weight_decay"),
        ("--trainer.val_check_interval", "100000", "val_check_interval"),
        ("--trainer.val_check_interval", "0", "trainer.val_check_interval must be above 0, got 0"),
        ("--trainer.check_val_every_n_epoch", "0", "trainer.check_val_every_n_epoch must be above 0"),
    ],
)
def test_wrong_value(option: str, value: str, named: str, capsys: Capture) -> None:
    fails(capsys, 1, [*DIGITS, option, value], named)
    assert len(capsys.readouterr().err.splitlines()) <= 1


def test_wrong_words(capsys: Capture) -> None:
    fails(capsys, 2, ["fitt", "digits"], "did you mean fit?")
    fails(capsys, 2, ["test", "digit"], "did you mean digits?")
    help = "run: train.py fit digits --help\n"
    fails(capsys, 2, ["digits", "--model.nothing", "1"], help)
    fails(capsys, 2, ["digits", "--trainer.max_epoch", "1"], help, "did you mean --trainer.max_epochs?")
    fails(capsys, 2, ["digits", "--task", "audio"], help, "--task", "choose from", "images")
    with pytest.raises(SystemExit):
        train.run(["test", "digits", "--trainer.devices", "x", "y"])
    assert "run: train.py test digits --help\n" in capsys.readouterr().err


def test_help_names_what_was_called(capsys: Capture) -> None:
    for call, name in ((demo.main, "demo.py"), (train.run, "train.py fit digits")):
        with pytest.raises(SystemExit) as ended:
            call(["--help"] if call is demo.main else ["digits", "--help"])
        assert ended.value.code == 0
        assert f"usage: {name} [--options]\n" in capsys.readouterr().out


def test_whole_numbers_are_batches_and_fractions_are_parts() -> None:
    options = ["digits", *TINY, "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "1"]
    assert train.run([*options, "--trainer.limit_train_batches", "1"]).results["steps"] == 1
    cli = train.run([*options, "--trainer.limit_train_batches", "0.2"])
    assert (cli.results["steps"], cli.trainer.num_val_batches) == (2, [1])


def test_recipes_are_listed_at_once_and_below_each_other() -> None:
    """Lightning and torch take seconds to load."""
    program = (
        "import sys, train; print(train.usage()); sys.exit(bool({'torch', 'lightning'} & {*sys.modules}))"
    )
    folder = Path(train.__file__).parent
    shown = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    lines = [line for line in shown.stdout.splitlines() if re.match(r"  \w+  +\S", line)]
    assert [line.split()[0] for line in lines] == train.names()
    assert len({re.match(r"  \w+ +", line).end() for line in lines}) == 1  # type: ignore[union-attr]


def test_recipes_and_readme_agree_what_they_are_for() -> None:
    readme = (Path(train.__file__).parent / "README.md").read_text()
    table = dict(re.findall(r"(?m)^\| `(\w+)` \|.*\| ([^|]+) \|$", readme.partition("## What the state")[0]))
    first = {name: (train.RECIPES / f"{name}.yaml").open().readline().strip() for name in train.names()}
    assert {name: line.rpartition("; for ")[2] for name, line in first.items()} == table
