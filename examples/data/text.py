"""Documents read byte by byte: the Text task of the Long Range Arena."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data.base import SequenceData, Spec
from data.batches import Batch, Ragged
from data.parquet import check_integers, parquet_files, rows
from data.storage import DataError

if TYPE_CHECKING:
    import pyarrow

HUB = "stanfordnlp/imdb"
COLUMNS = ("text", "label")


class Reviews(SequenceData):
    """IMDB reviews as bytes, to be told negative from positive.

    Args:
        path: a folder with train.parquet and test.parquet in the hub's schema; without it the hub is asked.
        length: bytes of a review that are read, from its beginning.
        batch_size: training reviews a step, on each device.
        eval_batch_size: reviews a step in validation and test.
        validation: fraction of the training reviews of each class held out for validation.
        cache_dir: where bytes are kept; without it ~/.cache/s4-examples.
        seed: order of the training reviews.
    """

    splits = ("train", "test")

    def __init__(
        self,
        path: Path | None = None,
        length: int = 4096,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        validation: float = 0.1,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < validation <= 0.5:
            raise ValueError(f"data.validation must be in (0, 0.5], got {validation}")
        if length < 1:
            raise ValueError(f"data.length must be at least 1, got {length}")
        self.length, self.validation = length, validation
        spec = Spec("label", 256, 2, tokens=True)
        super().__init__(spec, path, batch_size, eval_batch_size, cache_dir, seed)

    def content(self) -> dict[str, Any]:
        """The reviews, whole."""
        return {"dataset": "imdb"}

    def options(self) -> dict[str, Any]:
        """Where they are cut, and the part held out."""
        return {"length": self.length, "validation": self.validation}

    def files(self, split: str) -> list[Path]:
        """Checked parquet files."""
        return parquet_files(self.path, split, COLUMNS) if self.path else []

    def build(self, split: str) -> dict[str, Tensor]:
        """bytes uint8 (total,), offsets int64 (n + 1,), labels int64 (n,)."""
        expected = "strings in column 'text' and integers 0 or 1 in column 'label'"
        with rows(HUB, self.path, split, COLUMNS, expected) as table:
            check_integers(table, "label")
            columns = table.with_format("arrow")[:]
            document = documents(columns["text"], "text")
            check_filled(columns["label"], "label")
            labels = torch.from_numpy(columns["label"].to_numpy().astype(np.int64))
        return {**document, "labels": check_labels(labels, f"{self.path or HUB} {split}")}

    def partition(self) -> dict[str, tuple[str, np.ndarray]]:
        """Some of the training reviews of each class are for validation."""
        return self.held_out(self.validation)

    def lengths(self, split: str) -> np.ndarray:
        """Bytes of each review that are read."""
        return self._ragged(split).lengths.clamp(max=self.length).numpy()

    def fetch(self, split: str, rows: Tensor) -> Batch:
        """uint8 bytes (B, L), L that of the longest review, and lengths (B,)."""
        values, lengths = self._ragged(split).gather(rows, self.length)
        return Batch(values, self.tensors[split]["labels"][rows], lengths)

    def transform(self, batch: Batch, training: bool) -> Batch:
        """Tokens as embeddings take them."""
        return batch._replace(inputs=batch.inputs.long())

    def _ragged(self, split: str) -> Ragged:
        return Ragged(self.tensors[split]["bytes"], self.tensors[split]["offsets"])


def documents(column: "pyarrow.ChunkedArray", name: str) -> dict[str, Tensor]:
    """A column of strings as the bytes of all, uint8 (total,), and offsets int64 (n + 1,).

    Raises:
        ValueError: if a row is missing or empty.
        pyarrow.ArrowException: if they are no strings.
    """
    import pyarrow

    check_filled(column, name)
    # In arrow's memory the strings lie one behind the other already.
    strings = pyarrow.concat_arrays(column.cast(pyarrow.large_binary()).chunks or [column])
    _, ends, content = strings.buffers()
    offsets = np.frombuffer(ends, np.int64)[strings.offset : strings.offset + len(strings) + 1]
    values = np.frombuffer(content, np.uint8)[offsets[0] : offsets[-1]]
    if not (filled := np.diff(offsets) > 0).all():
        raise ValueError(f"row {int(np.argmin(filled))} of {name} is empty")
    return {"bytes": torch.from_numpy(values.copy()), "offsets": torch.from_numpy(offsets - offsets[0])}


def check_filled(column: "pyarrow.ChunkedArray", name: str) -> None:
    """Raise ValueError if a row has no value."""
    if column.null_count:
        raise ValueError(f"row {column.is_null().to_pylist().index(True)} has no {name}")


def check_labels(labels: Tensor, where: str) -> Tensor:
    """Labels that are 0 or 1.

    Raises:
        DataError: if there are others, or none.
    """
    if not len(labels) or not set(found := labels.unique().tolist()) <= {0, 1}:
        raise DataError(f"{where}: expected labels 0 and 1, got {found[:5] if len(labels) else 'no rows'}")
    return labels
