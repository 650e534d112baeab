"""Tiny runs of the examples, and files in the form of the hub's data sets."""

import csv
import io
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train
from data import images

# What Lightning's jsonargparse warns of.
OF_LIGHTNING = pytest.mark.filterwarnings("ignore:(?s).*(in v4|only one Jsonarg):DeprecationWarning")
TINY = [
    *("--model.d_model", "8", "--model.n_layers", "1", "--model.d_state", "4"),
    *("--data.batch_size", "128", "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    *("--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"),
]


def step_losses(folder: Path) -> dict[int, str]:
    """Training loss by step, as the text in metrics.csv: compared bit for bit."""
    with (folder / "metrics.csv").open(newline="") as rows:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(rows) if row["train/loss"]}


def fails(capsys: pytest.CaptureFixture[str], code: int, arguments: list[str], *words: str) -> None:
    """A command line that must end with `code` and one message with these words, without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.run(arguments)
    message = capsys.readouterr().err
    assert ended.value.code == code
    assert "Traceback" not in message
    assert [word for word in words if word not in message] == [], message


def write_parquet(folder: Path, source: images.Source, per_class: int = 6, seed: int = 0) -> Path:
    """Random images, encoded as PNG, with the columns of the hub's data set."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
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


def _write_table(file: Path, columns: dict[str, list[object]]) -> None:
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def write_images(folder: Path, recipe: dict[str, Any]) -> list[str]:
    """The images of a recipe, or nothing for those that are embedded."""
    if (dataset := recipe["data"]["dataset"]) == "digits":
        return []
    return ["--data.path", str(write_parquet(folder, images.SOURCES[dataset]))]


def random_text(generator: np.random.Generator, letters: int) -> str:
    """Some letters, blanks and ends of lines, one of them not ASCII."""
    return "é" + "".join(generator.choice(list("abcdefgh \n"), letters))


def write_reviews(folder: Path, recipe: dict[str, Any]) -> list[str]:
    """Texts of many lengths with labels."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        texts = [random_text(generator, length) for length in generator.integers(1, 60, 40)]
        _write_table(folder / f"{split}.parquet", {"text": texts, "label": [0, 1] * 20})
    return ["--data.path", str(folder), "--data.length", "50"]


def write_pairs(folder: Path, recipe: dict[str, Any]) -> list[str]:
    """Papers in the form of the Long Range Arena."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval", "test"):
        with (folder / f"new_aan_pairs.{split}.tsv").open("w", newline="") as file:
            rows = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONNUMERIC)
            for row in range(20):
                first, second = (random_text(generator, length) for length in generator.integers(1, 60, 2))
                rows.writerow([float(row % 2), f"P{row}", f"Q{row}", first, second])
    return ["--data.path", str(folder), "--data.length", "50"]


def write_shakespeare(folder: Path, recipe: dict[str, Any]) -> list[str]:
    """One text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "input.txt").write_text(random_text(np.random.default_rng(0), 2000))
    return ["--data.path", str(folder / "input.txt"), "--data.length", "16"]


def write_lines(folder: Path, recipe: dict[str, Any]) -> list[str]:
    """Lines of words, some of them empty."""
    generator = np.random.default_rng(0)
    for split, lines in (("train", 60), ("validation", 20), ("test", 20)):
        words = [" ".join(random_text(generator, 40).split()) + " \n" for _ in range(lines)]
        _write_table(folder / f"{split}.parquet", {"text": ["", *words]})
    small = ["--data.vocabulary", "50", "--model.cutoffs", "[10, 20]", "--model.d_model", "16"]
    small += ["--model.n_ssm", "2", "--model.n_layers", "2"]
    return ["--data.path", str(folder), "--data.length", "16", *small]


def write_series(folder: Path, rows: int = 14_500, seed: int = 0) -> Path:
    """A random walk of seven hourly channels, the last of them OT."""
    values = np.random.default_rng(seed).normal(size=(rows, 7)).cumsum(0) + 20
    dates = np.datetime64("2016-07-01T00") + np.arange(rows)
    lines = ["date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT"]
    for date, row in zip(dates, values, strict=True):
        lines.append(f"{str(date).replace('T', ' ')}:00:00,{','.join(map(str, row))}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ETTh1.csv").write_text("\n".join(lines) + "\n")
    return folder


_FEW = ("--data.train_size", "16", "--data.val_size", "4", "--data.batch_size", "4")


def write_words(folder: Path, recipe: dict[str, Any]) -> list[str]:
    """Noise of up to 100 samples as WAV files, with the columns of the hub's data sets of speech."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    rate = {"fsdd": 8000, "speech_commands": 16000}[recipe["data"]["dataset"]]
    for split in ("train", "validation", "test"):
        rows = []
        for length in generator.integers(50, 100, 60):
            file = io.BytesIO()
            with wave.open(file, "wb") as audio:
                audio.setparams((1, 2, rate, 0, "NONE", ""))
                audio.writeframes(generator.bytes(2 * length))
            rows.append({"bytes": file.getvalue(), "path": None})
        table = pyarrow.table({"audio": rows, "label": [row % 10 for row in range(60)]})
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    return ["--data.path", str(folder)]


# For each task a function that writes a little of its data, and the options of the command line for them.
WRITERS: dict[str, Callable[[Path, dict[str, Any]], list[str]]] = {
    "audio": write_words,
    "copying": lambda folder, recipe: ["--data.lag", "20", "--data.train_size", "50"],
    "delay": lambda folder, recipe: ["--data.lag", "20", "--data.length", "50", "--data.train_size", "50"],
    "forecast": lambda folder, recipe: ["--data.path", str(write_series(folder))],
    "images": write_images,
    "listops": lambda folder, recipe: [*_FEW, "--model.n_ssm", "1"],
    "pathfinder": lambda folder, recipe: [*_FEW, "--model.n_ssm", "1"],
    "text": write_reviews,
    "retrieval": write_pairs,
    "shakespeare": write_shakespeare,
    "wikitext103": write_lines,
}
