"""Language models: a long text of tokens, cut into windows."""

import functools
import hashlib
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.base import SequenceData, Spec
from data.batches import Batch
from data.parquet import parquet_files, rows
from data.storage import DataError, first_line

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

WIKITEXT, CONFIGURATION = "Salesforce/wikitext", "wikitext-103-v1"
UNKNOWN, END = "<unk>", "<eos>"


class Windows(SequenceData):
    """Windows of one text; the target of each position is the next token.

    The text is one tensor of tokens, made by `build`, with the parts for train, val and test one behind the
    other. The windows of a training epoch tile its part, from another offset in each epoch. In evaluation
    every token is predicted once, by a window that scores its last `stride` positions and has the rest as
    context; the tokens at the end of a part that fill no `stride` are left out.

    Args:
        spec: of the tokens.
        path: where the text is.
        length: positions of a window.
        stride: positions of an evaluation window that are scored; half of `length` if None.
        batch_size: training windows a step, on each device.
        eval_batch_size: windows a step in validation and test.
        cache_dir: where tokens are kept; without it ~/.cache/s4-examples.
        seed: order of the training windows.
    """

    splits = ("text",)

    def __init__(
        self,
        spec: Spec,
        path: Path | None,
        length: int,
        stride: int | None,
        batch_size: int,
        eval_batch_size: int,
        cache_dir: Path | None,
        seed: int,
    ) -> None:
        stride = (length + 1) // 2 if stride is None else stride
        if not 1 <= stride <= length:
            raise ValueError(f"need data.length >= data.stride >= 1, got {length} and {stride}")
        super().__init__(spec, path, batch_size, eval_batch_size, cache_dir, seed)
        self.length, self.stride, self.shift = length, stride, length

    def options(self) -> dict[str, Any]:
        """The windows."""
        return {"length": self.length}

    def number(self, split: str) -> int:
        """Tokens."""
        return len(self.tensors[split]["tokens"])

    def partition(self) -> dict[str, tuple[str, np.ndarray]]:
        """Rows are positions where windows begin."""
        bounds = [0, *self.tensors["text"]["sizes"].cumsum(0).tolist()]
        # The last window still ends within the part when moved by `length` - 1.
        parts = {"train": ("text", np.arange(0, bounds[1] - 2 * self.length + 1, self.length))}
        for name, begin, end in (("val", *bounds[1:3]), ("test", *bounds[2:4])):
            first = max(begin, self.length - self.stride + 1)  # token scored first; it has a whole context
            scored = np.arange(first, end - self.stride + 1, self.stride)
            parts[name] = ("text", scored - 1 - (self.length - self.stride))
        return parts

    def fetch(self, split: str, rows: Tensor) -> Batch:
        """Tokens (B, length) and, for the same positions, those that follow."""
        windows = self.tensors[split]["tokens"][rows[:, None] + torch.arange(self.length + 1)].long()
        return Batch(windows[:, :-1], windows[:, 1:])

    def transform(self, batch: Batch, training: bool) -> Batch:
        """In evaluation only the last `stride` positions count."""
        return batch if training else batch._replace(targets=batch.targets[:, -self.stride :])


class Characters(Windows):
    """Tiny Shakespeare, or any other text, as bytes: 90% for training, then 5% each for validation and test.

    Args:
        path: a text file, or a folder with input.txt; without it karpathy's file is fetched.
        length: positions of a window.
        stride: positions of an evaluation window that are scored; half of `length` if not given.
        batch_size: training windows a step, on each device.
        eval_batch_size: windows a step in validation and test.
        cache_dir: where bytes are kept; without it ~/.cache/s4-examples.
        seed: order of the training windows.
    """

    def __init__(
        self,
        path: Path | None = None,
        length: int = 512,
        stride: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        spec = Spec("token", 256, 256, tokens=True)
        super().__init__(spec, path, length, stride, batch_size, eval_batch_size, cache_dir, seed)

    def content(self) -> dict[str, Any]:
        """The text."""
        return {"dataset": "shakespeare"}

    def files(self, split: str) -> list[Path]:
        """The text file."""
        if self.path is None:
            return []
        file = self.path / "input.txt" if self.path.is_dir() else self.path
        if not file.is_file():
            raise DataError(f"no file {file}; expected data.path to be a text or a folder with input.txt")
        return [file]

    def build(self, split: str) -> dict[str, Tensor]:
        """tokens uint8 (n,), the bytes; sizes int64 (3,) of the parts."""
        text = self.files(split)[0].read_bytes() if self.path else _shakespeare()
        if not text:
            raise DataError(f"data.path {self.path} is an empty text")
        # Those of the data set karpathy/tiny_shakespeare on the hub.
        train = int(0.9 * len(text))
        val = (len(text) - train) // 2
        sizes = torch.tensor([train, val, len(text) - train - val])
        return {"tokens": torch.frombuffer(bytearray(text), dtype=torch.uint8), "sizes": sizes}

    def encode(self, text: str) -> Tensor:
        """Its bytes in UTF-8."""
        return torch.tensor(list(text.encode()), dtype=torch.long)

    def decode(self, tokens: Tensor) -> str:
        """Text of bytes; a replacement character for what is not UTF-8."""
        return bytes(tokens.tolist()).decode(errors="replace")


class Words(Windows):
    """WikiText-103 word by word, every line ended by <eos>, as in Transformer-XL's code.

    Words are numbered from the most frequent one of the training text on, behind <unk>, which is 0 and stands
    for all that have no number.

    Args:
        path: a folder with train.parquet, validation.parquet and test.parquet in the hub's schema (a column
            `text` of lines); without it the hub is asked.
        vocabulary: words that have a number; 267,735 are all in WikiText-103.
        length: positions of a window.
        stride: positions of an evaluation window that are scored; half of `length` if not given.
        batch_size: training windows a step, on each device.
        eval_batch_size: windows a step in validation and test.
        cache_dir: where words are kept; without it ~/.cache/s4-examples.
        seed: order of the training windows.
    """

    def __init__(
        self,
        path: Path | None = None,
        vocabulary: int = 267_735,
        length: int = 8192,
        stride: int | None = None,
        batch_size: int = 1,
        eval_batch_size: int = 1,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        if vocabulary < 2:
            raise ValueError(f"data.vocabulary must be at least 2, got {vocabulary}")
        self.vocabulary = vocabulary
        spec = Spec("token", vocabulary, vocabulary, tokens=True)
        super().__init__(spec, path, length, stride, batch_size, eval_batch_size, cache_dir, seed)

    def content(self) -> dict[str, Any]:
        """The text and the size of its vocabulary."""
        return {"dataset": "wikitext103", "vocabulary": self.vocabulary}

    def files(self, split: str) -> list[Path]:
        """Checked parquet files of all parts."""
        parts = ("train", "validation", "test") if self.path else ()
        return [file for part in parts for file in parquet_files(self.path, part, ("text",))]

    def build(self, split: str) -> dict[str, Tensor]:
        """tokens int32 (n,); sizes int64 (3,) of the parts; words uint8, joined by line feeds."""
        numbers: defaultdict[str, int] = defaultdict()
        numbers.default_factory = numbers.__len__  # the next free one
        unknown = numbers[UNKNOWN]
        parts = []
        for part in ("train", "validation", "test"):
            with rows(
                WIKITEXT, self.path, part, ("text",), "strings in column 'text'", CONFIGURATION
            ) as table:
                # As strings all words at once would take gigabytes.
                encoded = [
                    np.fromiter((numbers[word] for word in split_words(batch["text"])), np.int32)
                    for batch in table.iter(10_000)
                ]
            parts.append(np.concatenate([*encoded, np.empty(0, np.int32)]))
        counts = np.bincount(parts[0], minlength=len(numbers))
        counts[unknown] = parts[0].size + 1
        order = np.argsort(-counts, kind="stable")[: min(self.vocabulary, np.count_nonzero(counts))]
        ranks = np.zeros(len(numbers), np.int32)
        ranks[order] = np.arange(len(order))
        words = np.array(list(numbers), object)[order]
        return {
            "tokens": torch.from_numpy(ranks[np.concatenate(parts)]),
            "sizes": torch.tensor([len(part) for part in parts]),
            "words": torch.frombuffer(bytearray("\n".join(words).encode()), dtype=torch.uint8),
        }

    @functools.cached_property
    def words(self) -> list[str]:
        """By number."""
        return self.tensors["text"]["words"].numpy().tobytes().decode().split("\n")

    def encode(self, text: str) -> Tensor:
        """Numbers of its words."""
        numbers = {word: number for number, word in enumerate(self.words)}
        found = [numbers.get(word, 0) for word in split_words(text.split("\n"))]
        # Only what a line feed follows is a whole line.
        return torch.tensor(found[:-1] if len(found) > 1 else found)

    def decode(self, tokens: Tensor) -> str:
        """Words with blanks between them, and the lines they were."""
        unused = [UNKNOWN] * (self.vocabulary - len(self.words))
        found = np.array(self.words + unused, object)[tokens.numpy()]
        return " ".join(found).replace(END, "\n")


def split_words(lines: list[str]) -> list[str]:
    """The words of lines, each with <eos> behind."""
    return "".join(f"{line} {END} " for line in lines).split()


def _shakespeare() -> bytes:
    try:
        with urllib.request.urlopen(SHAKESPEARE, timeout=60) as reply:
            text: bytes = reply.read()
    except OSError as error:
        raise DataError(
            f"cannot fetch {SHAKESPEARE}: {first_line(error)}; give the file by data.path"
        ) from error
    if (digest := hashlib.sha256(text).hexdigest()) != SHAKESPEARE_SHA256:
        raise DataError(f"{SHAKESPEARE} has sha256 {digest}, expected {SHAKESPEARE_SHA256}")
    return text
