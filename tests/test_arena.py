"""ListOps and Pathfinder as data of the examples: rows, splits, folders, recipes."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

import train
from data import listops, pathfinder
from data.arena import ListOps, Pathfinder
from data.storage import DataError
from data.tasks import TASKS
from example_files import OF_LIGHTNING
from PIL import Image

pytestmark = [
    pytest.mark.usefixtures("own_folder"),
    OF_LIGHTNING,
]


@pytest.mark.parametrize(
    ("recipe", "model", "lr", "dt_min", "prenorm", "batch_size", "epochs", "rows"),
    [
        ("listops", (6, 256, 4, 1), 0.01, 0.001, False, 32, 40, 96_000),
        ("pathfinder", (6, 256, 64, 256), 0.004, 0.001, True, 64, 200, 160_000),
        ("pathx", (6, 256, 64, 256), 0.002, 0.0001, True, 16, 50, 160_000),
    ],
)
def test_recipes_have_the_values_of_the_authors(
    recipe: str,
    model: tuple[int, ...],
    lr: float,
    dt_min: float,
    prenorm: bool,
    batch_size: int,
    epochs: int,
    rows: int,
) -> None:
    values = yaml.safe_load((train.RECIPES / f"{recipe}.yaml").read_text())
    found = values["model"]
    assert tuple(found.get(name, 1) for name in ("n_layers", "d_model", "d_state", "n_ssm")) == model
    assert (found["lr"], found["weight_decay"]) == (lr, 0.05)
    rest = {"dt": None} if recipe == "listops" else {"dt": 0.001, "C": 0.001}  # null is lr
    assert found["ssm_lr"] == {"A": 0.001, "B": 0.001, **rest}
    assert (found["dt_min"], found["dt_max"], found["dropout"]) == (dt_min, 0.1, 0.0)
    assert (found["prenorm"], found["norm"], found["bidirectional"]) == (prenorm, "batch", True)
    assert (values["data"]["batch_size"], values["trainer"]["max_epochs"]) == (batch_size, epochs)
    made = TASKS[values["task"]](**values["data"])
    assert made.train_size == rows
    # A tenth of the steps is warm-up.
    assert found["warmup_steps"] * 10 == rows // batch_size * epochs


def test_listops_batches() -> None:
    """Every expression comes once, in the split it is for, as its tokens, padded."""
    data = ListOps(train_size=30, val_size=10, batch_size=4, eval_batch_size=7)
    data.prepare_data()
    data.setup("fit")
    whole = listops.generate(0, 50, workers=1)
    ends, found = whole["offsets"].tolist(), []
    for loader, rows in ((data.val_dataloader(), range(30, 40)), (data.test_dataloader(), range(40, 50))):
        expected = {tuple(whole["tokens"][ends[row] : ends[row + 1]].tolist()): row for row in rows}
        for batch in loader:
            batch = data.transform(batch, training=False)
            assert batch.inputs.dtype == torch.int64
            assert batch.inputs.shape[1] == batch.lengths.max()
            for tokens, length, label in zip(batch.inputs, batch.lengths, batch.targets, strict=True):
                assert not tokens[length:].any()
                found.append(expected[tuple(tokens[:length].tolist())])
                assert label == whole["labels"][found[-1]]
    assert sorted(found) == list(range(30, 50))
    assert data.parts["train"][1].tolist() == list(range(30))


def write_listops(folder: Path, rows: int = 3) -> Path:
    folder.mkdir()
    lines = "".join(f"( ( ( [MAX {digit} ) 4 ) ] )\t{max(digit, 4)}\n" for digit in range(rows))
    for split in ("train", "val", "test"):
        (folder / f"basic_{split}.tsv").write_text("Source\tTarget\n" + lines)
    return folder


def test_published_listops(tmp_path: Path) -> None:
    folder = write_listops(tmp_path / "listops-1000", rows=9)
    data = ListOps(folder, batch_size=2)
    data.prepare_data()
    data.setup("fit")
    assert [data.number(split) for split in ("train", "val", "test")] == [9, 9, 9]
    assert next(iter(data.test_dataloader())).targets.tolist() == [max(digit, 4) for digit in range(9)]
    (folder / "basic_val.tsv").write_text("Source\tTarget\nx\n")
    with pytest.raises(DataError, match=r"cannot read val .*line 2: expected an expression"):
        data.prepare_data()
    (folder / "basic_val.tsv").unlink()
    with pytest.raises(DataError, match=r"has no basic_val.tsv; expected columns Source and Target"):
        data.prepare_data()


def test_pathfinder_batches() -> None:
    data = Pathfinder(32, train_size=12, val_size=4, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    batch = data.transform(next(iter(data.val_dataloader())), training=False)
    pictures = [pathfinder.draw(0, 32, row) for row in range(12, 16)]
    assert batch.targets.tolist() == [picture.label for picture in pictures]
    images = torch.from_numpy(np.stack([picture.image for picture in pictures])).view(4, -1, 1)
    torch.testing.assert_close(batch.inputs, images / 127.5 - 1)
    assert (batch.inputs.min(), batch.inputs.max()) == (-1, 1)


def test_published_pathfinder(tmp_path: Path) -> None:
    """A folder's images are divided 8 : 1 : 1, each image to one part."""
    folder = tmp_path / "pathfinder32" / pathfinder.FOLDER
    (folder / "metadata").mkdir(parents=True)
    (folder / "imgs/0").mkdir(parents=True)
    lines = []
    for row in range(20):
        Image.new("L", (32, 32), row).save(folder / f"imgs/0/sample_{row}.png")
        lines.append(f"imgs/0 sample_{row}.png {row} {row % 2} 1.0\n")
    (folder / "metadata/0.npy").write_text("".join(lines))
    data = Pathfinder(32, folder.parent, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    parts = [data.fetch(split, torch.from_numpy(rows)) for split, rows in data.parts.values()]
    values = [part.inputs[:, 0, 0].tolist() for part in parts]
    assert [len(part) for part in values] == [16, 2, 2]
    assert sorted(chain(*values)) == list(range(20))
    assert all(
        part.targets.tolist() == [value % 2 for value in row] for part, row in zip(parts, values, strict=True)
    )
    with pytest.raises(DataError, match="expected 64x64"):
        Pathfinder(64, folder.parent).prepare_data()
    with pytest.raises(DataError, match="has no curv_contour_length_14"):
        Pathfinder(32, tmp_path).prepare_data()


@pytest.mark.parametrize("kind", [ListOps, Pathfinder])
def test_sizes_are_checked(kind: type[ListOps | Pathfinder]) -> None:
    with pytest.raises(ValueError, match=r"data.val_size must be at least 1, got 0"):
        kind(val_size=0)
