"""Pairs of papers, related by citation or not: the Retrieval task of the Long Range Arena."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.base import SequenceData, Spec
from data.batches import Batch, Ragged
from data.storage import DataError, first_line
from data.text import check_labels, documents

FILES = {
    split: f"new_aan_pairs.{name}.tsv"
    for split, name in (("train", "train"), ("val", "eval"), ("test", "test"))
}
COLUMNS = ("label", "id1", "id2", "text1", "text2")
RELEASE = "https://github.com/google-research/long-range-arena"


class PaperPairs(SequenceData):
    """The ACL Anthology Network as in the Long Range Arena: two papers as bytes, related or not.

    Args:
        path: a folder that holds new_aan_pairs.train.tsv, .eval.tsv and .test.tsv, at any depth.
        length: bytes of a paper that are read, from its beginning.
        batch_size: training pairs a step, on each device.
        eval_batch_size: pairs a step in validation and test.
        cache_dir: where bytes are kept; without it ~/.cache/s4-examples.
        seed: order of the training pairs.
    """

    def __init__(
        self,
        path: Path | None = None,
        length: int = 4000,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        if length < 1:
            raise ValueError(f"data.length must be at least 1, got {length}")
        self.length = length
        spec = Spec("label", 256, 2, tokens=True, pairs=True)
        super().__init__(spec, path, batch_size, eval_batch_size, cache_dir, seed)

    def content(self) -> dict[str, Any]:
        """The papers, whole."""
        return {"dataset": "aan"}

    def options(self) -> dict[str, Any]:
        """Where they are cut."""
        return {"length": self.length}

    def files(self, split: str) -> list[Path]:
        """The one file of a split."""
        name = FILES[split]
        if self.path is None:
            raise DataError(
                "retrieval has no download of its own: get the Long Range Arena's archive lra_release.gz "
                f"as {RELEASE} says, unpack it and give the folder with {name} by data.path"
            )
        found = sorted(self.path.rglob(name))
        if len(found) != 1:
            raise DataError(f"expected data.path {self.path} to hold {name} once, got {len(found)} of it")
        return found

    def build(self, split: str) -> dict[str, Tensor]:
        """bytes uint8 (total,), offsets int64 (2 n + 1,): papers 2 i and 2 i + 1 are pair i; labels (n,)."""
        import pyarrow
        import pyarrow.compute
        import pyarrow.csv

        file = self.files(split)[0]
        types = {"label": pyarrow.float64()} | dict.fromkeys(COLUMNS[1:], pyarrow.large_string())
        try:
            table = pyarrow.csv.read_csv(
                file,
                # A block must hold the longest row.
                pyarrow.csv.ReadOptions(column_names=COLUMNS, block_size=1 << 26),
                pyarrow.csv.ParseOptions(delimiter="\t", newlines_in_values=True),
                pyarrow.csv.ConvertOptions(column_types=types, include_columns=["label", "text1", "text2"]),
            )
            related = table["label"].to_numpy()
            order = np.arange(2 * len(table)).reshape(2, -1).T.ravel()  # both columns, row by row
            both = pyarrow.chunked_array([*table["text1"].chunks, *table["text2"].chunks])
            papers = documents(both.take(pyarrow.array(order)), "pairs of papers")
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise DataError(
                f"cannot read {file}: {first_line(error)}; expected {', '.join(COLUMNS)} between tabs"
            ) from error
        labels = torch.from_numpy(np.where(np.isin(related, (0, 1)), related, -1).astype(np.int64))
        return {**papers, "labels": check_labels(labels, str(file))}

    def lengths(self, split: str) -> np.ndarray:
        """Bytes of the longer paper of each pair that are read."""
        both = self._ragged(split).lengths.clamp(max=self.length).view(-1, 2)
        return both.amax(1).numpy()

    def fetch(self, split: str, rows: Tensor) -> Batch:
        """uint8 bytes (B, 2, L), L that of the longest paper, and lengths (B, 2)."""
        papers = (2 * rows[:, None] + torch.arange(2)).flatten()
        values, lengths = self._ragged(split).gather(papers, self.length)
        return Batch(values.unflatten(0, (-1, 2)), self.tensors[split]["labels"][rows], lengths.view(-1, 2))

    def transform(self, batch: Batch, training: bool) -> Batch:
        """Tokens as embeddings take them."""
        return batch._replace(inputs=batch.inputs.long())

    def _ragged(self, split: str) -> Ragged:
        return Ragged(self.tensors[split]["bytes"], self.tensors[split]["offsets"])
