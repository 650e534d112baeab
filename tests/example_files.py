"""Tiny runs of the examples, and files in the form of the hub's data sets."""

import csv
import io
from pathlib import Path

import images
import numpy as np
import pytest
import train

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
