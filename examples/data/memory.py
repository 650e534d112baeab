"""Exact tests of long memory, made from random numbers: a delayed signal, and copied symbols."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.base import SequenceData, Spec
from data.batches import Batch

_SEEDS = {"train": 0, "val": 1, "test": 2}  # of the data, which the seed of a run does not change


class Delay(SequenceData):
    """Say what the input was `lag` steps ago; the input is white noise up to a highest frequency.

    The task of section 4.3 of arXiv 2206.12037. Sequences are Gaussian with variance 1.

    Args:
        lag: steps between an input and the output that repeats it.
        length: of a sequence.
        bandwidth: highest frequency of the input in cycles a step, at most 0.5.
        train_size: sequences to train with; a tenth of it are for validation and as many for the test.
        batch_size: training sequences a step, on each device.
        eval_batch_size: sequences a step in validation and test.
        cache_dir: where the sequences are kept; without it ~/.cache/s4-examples.
        seed: order of the training sequences.
    """

    def __init__(
        self,
        lag: int = 1000,
        length: int = 4000,
        bandwidth: float = 0.05,
        train_size: int = 1000,
        batch_size: int = 16,
        eval_batch_size: int = 50,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= lag < length:
            raise ValueError(f"data.lag must be from 0 and below data.length={length}, got {lag}")
        if not 1 / length <= bandwidth <= 0.5:
            raise ValueError(f"data.bandwidth must be from 1 / data.length to 0.5, got {bandwidth}")
        if train_size < 10:
            raise ValueError(f"data.train_size must be at least 10, got {train_size}")
        self.lag, self.length, self.bandwidth, self.train_size = lag, length, bandwidth, train_size
        super().__init__(Spec("value", 1, 1), None, batch_size, eval_batch_size, cache_dir, seed)

    def content(self) -> dict[str, Any]:
        """What the signals are drawn from."""
        sizes = {"length": self.length, "bandwidth": self.bandwidth, "train_size": self.train_size}
        return {"dataset": "delay", **sizes}

    def options(self) -> dict[str, Any]:
        """The lag."""
        return {"lag": self.lag}

    def build(self, split: str) -> dict[str, Tensor]:
        """signals float32 (n, length)."""
        number = self.train_size if split == "train" else self.train_size // 10
        generator = np.random.default_rng([_SEEDS[split], self.length])
        spectrum = np.fft.rfft(generator.standard_normal((number, self.length)))
        spectrum[:, np.fft.rfftfreq(self.length) > self.bandwidth] = 0
        signals = np.fft.irfft(spectrum, self.length)
        return {"signals": torch.from_numpy(signals / signals.std()).float()}

    def number(self, split: str) -> int:
        """Signals of a split."""
        return len(self.tensors[split]["signals"])

    def fetch(self, split: str, rows: Tensor) -> Batch:
        """Signals (B, length, 1), and as targets all of them but the last `lag` steps."""
        signals = self.tensors[split]["signals"][rows][..., None]
        return Batch(signals, signals[:, : self.length - self.lag])


class Copying(SequenceData):
    """Read `symbols` random symbols, wait for `lag` blanks, and say them again in order.

    The task of Hochreiter and Schmidhuber 1997 in the form of arXiv 1511.06464: tokens 1 to 8 are symbols, 0
    is the blank, and 9, one for each symbol asked for, the call to repeat them.

    Args:
        lag: blanks between the symbols and the call.
        symbols: how many to remember.
        train_size: sequences to train with; a tenth of it are for validation and as many for the test.
        batch_size: training sequences a step, on each device.
        eval_batch_size: sequences a step in validation and test.
        cache_dir: where the symbols are kept; without it ~/.cache/s4-examples.
        seed: order of the training sequences.
    """

    def __init__(
        self,
        lag: int = 1000,
        symbols: int = 10,
        train_size: int = 10_000,
        batch_size: int = 32,
        eval_batch_size: int = 100,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        if lag < 0 or symbols < 1 or train_size < 10:
            raise ValueError(
                "need data.lag from 0, data.symbols from 1 and data.train_size from 10, "
                f"got {lag}, {symbols} and {train_size}"
            )
        self.lag, self.symbols, self.train_size = lag, symbols, train_size
        spec = Spec("token", 10, 10, tokens=True)
        super().__init__(spec, None, batch_size, eval_batch_size, cache_dir, seed)

    def content(self) -> dict[str, Any]:
        """What the symbols are drawn from."""
        return {"dataset": "copying", "symbols": self.symbols, "train_size": self.train_size}

    def options(self) -> dict[str, Any]:
        """The number of blanks."""
        return {"lag": self.lag}

    def build(self, split: str) -> dict[str, Tensor]:
        """symbols int64 (n, symbols) from 1 to 8."""
        number = self.train_size if split == "train" else self.train_size // 10
        generator = np.random.default_rng([_SEEDS[split], self.symbols])
        return {"symbols": torch.from_numpy(generator.integers(1, 9, (number, self.symbols)))}

    def number(self, split: str) -> int:
        """Sequences of a split."""
        return len(self.tensors[split]["symbols"])

    def fetch(self, split: str, rows: Tensor) -> Batch:
        """Symbols, blanks and calls (B, lag + 2 symbols), and the symbols (B, symbols) to say."""
        symbols = self.tensors[split]["symbols"][rows]
        blanks = symbols.new_zeros(len(rows), self.lag)
        return Batch(torch.cat([symbols, blanks, torch.full_like(symbols, 9)], 1), symbols)
