"""Language models: a long text of tokens, cut into windows."""

import hashlib
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import Batch, DataError, SequenceData, Spec, first_line
from torch import Tensor

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Windows(SequenceData):
    """Windows of one text; the target of each position is the next token.

    The text is one tensor of tokens, made by `build`, with the parts for train, val and test one behind the
    other. The windows of a training epoch tile its part, from another offset in each epoch. In evaluation every
    token is predicted once, by a window that scores its last `stride` positions and has the rest as context;
    the tokens at the end of a part that fill no `stride` are left out.

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
