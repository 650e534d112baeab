"""Spoken words as raw waveforms, also at half the rate of training, or with samples missing."""

import io
import sys
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from data.base import SequenceData, Spec
from data.batches import Batch, Ragged
from data.loader import Loader
from data.parquet import check_integers, parquet_files, rows
from data.storage import DataError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMANDS = (
    *("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"),
    *DIGITS,
    *("bed", "bird", "cat", "dog", "happy", "house", "marvin", "sheila", "tree", "wow"),
    *("backward", "forward", "follow", "learn", "visual"),
)
COLUMNS = ("audio", "label")
_DROPS = 8000  # seed of the samples that validation and test leave out


@dataclass(frozen=True)
class Source:
    """A set of spoken words.

    Args:
        rate: samples a second.
        words: the classes, in the order of their labels.
        hub: the data set on the hub.
        silence: the label of recordings that are no word, which are left out.
        length: of all recordings, cut or padded with zeros; None leaves them as they are.
        validation: the name of its own validation split, if it has one.
        folder: of the parquet files on the hub.
        revision: that has them.
    """

    rate: int
    words: tuple[str, ...]
    hub: str
    silence: int | None = None
    length: int | None = None
    validation: str | None = None
    folder: str | None = None
    revision: str | None = None


SOURCES = {
    "fsdd": Source(8000, DIGITS, "mteb/free-spoken-digit-dataset"),
    # The hub's main branch holds a script, which `datasets` runs no more.
    "speech_commands": Source(
        16000,
        COMMANDS,
        "google/speech_commands",
        silence=35,
        length=16000,
        validation="validation",
        folder="v0.02",
        revision="refs/convert/parquet",
    ),
}


class SpokenWords(SequenceData):
    """Which word a recording says, from its samples; tested at the full and at half the sampling rate.

    The half-rate test takes every second sample, without a filter before, and doubles the model's step: no
    training happens at that rate (arXiv 2111.00396). Every recording is shifted and scaled to mean 0 and
    variance 1.

    Args:
        dataset: fsdd (Free Spoken Digit Dataset, 8 kHz, recordings of different lengths) or speech_commands
            (version 0.02, 35 words, 16 kHz, 1 second).
        path: a folder with train.parquet, test.parquet and, for speech_commands, validation.parquet in the
            hub's schema; without it the hub is asked.
        augment: train at a random speed from 0.87 to 1.15, with random modulation, equalisation, masks,
            noise and gain, see `resample` and `augment`.
        keep: fraction of the samples that are kept, in order; the others are dropped at random, from each
            recording others, in training anew each time, in validation and test always the same
            with one `eval_batch_size`.
        tell_gaps: the model is told the time before each sample that was kept; else only the mean, 1 / keep.
        batch_size: training recordings a step, on each device.
        eval_batch_size: recordings a step in validation and test.
        validation: fraction of the training recordings of each word held out for validation; speech_commands
            has recordings of its own for that.
        cache_dir: where the samples are kept; without it ~/.cache/s4-examples.
        seed: order of the training recordings.
    """

    def __init__(
        self,
        dataset: Literal["fsdd", "speech_commands"] = "fsdd",
        path: Path | None = None,
        augment: bool = False,
        keep: float = 1.0,
        tell_gaps: bool = True,
        batch_size: int = 16,
        eval_batch_size: int = 50,
        validation: float = 0.1,
        cache_dir: Path | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < validation <= 0.5:
            raise ValueError(f"data.validation must be in (0, 0.5], got {validation}")
        if not 0 < keep <= 1:
            raise ValueError(f"data.keep must be in (0, 1], got {keep}")
        self.dataset, self.source = dataset, SOURCES[dataset]
        self.augment, self.validation = augment, validation
        self.keep, self.tell_gaps = keep, tell_gaps
        self.splits = tuple(split for split in ("train", self.source.validation, "test") if split)
        spec = Spec("label", 1, len(self.source.words), tests=("test", "test_half_rate"))
        super().__init__(spec, path, batch_size, eval_batch_size, cache_dir, seed)

    def content(self) -> dict[str, Any]:
        """The data set."""
        return {"dataset": self.dataset}

    def options(self) -> dict[str, Any]:
        """The part held out, and what changes the draws of random numbers."""
        gaps = {"keep": self.keep, "tell_gaps": self.tell_gaps} if self.keep < 1 else {}
        return {"validation": self.validation, "augment": self.augment, **gaps}

    def files(self, split: str) -> list[Path]:
        """Checked parquet files."""
        return parquet_files(self.path, split, COLUMNS) if self.path else []

    def build(self, split: str) -> dict[str, Tensor]:
        """samples int16 (total,) of all recordings, offsets int64 (n + 1,) into them, labels int64 (n,)."""
        source, where = self.source, f"{self.path or self.source.hub} {split}"
        recordings, labels = self._recordings(split, where)
        if not labels or min(labels) < 0 or max(labels) >= len(source.words):
            found = sorted(set(labels))[:5]
            raise DataError(f"{where}: expected labels 0 to {len(source.words) - 1}, got {found}")
        lengths = torch.tensor([len(recording) for recording in recordings])
        return {
            "samples": torch.from_numpy(np.concatenate(recordings)),
            "offsets": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            "labels": torch.tensor(labels),
        }

    def setup(self, stage: str) -> None:
        """Open the cached splits and divide the rows."""
        super().setup(stage)
        self.ragged = {name: Ragged(part["samples"], part["offsets"]) for name, part in self.tensors.items()}

    def partition(self) -> dict[str, tuple[str, np.ndarray]]:
        """The data set's own validation recordings, or some of those for training of each word."""
        if own := self.source.validation:
            splits = {"train": "train", "val": own, "test": "test"}
            return {part: (split, np.arange(self.number(split))) for part, split in splits.items()}
        return self.held_out(self.validation)

    def lengths(self, split: str) -> np.ndarray | None:
        """Samples of each recording, None if they are made equal."""
        return None if self.source.length else self.tensors[split]["offsets"].diff().numpy()

    def fetch(self, split: str, rows: Tensor) -> Batch:
        """int16 samples (B, L)."""
        samples, lengths = self.ragged[split].gather(rows, self.source.length)
        labels = self.tensors[split]["labels"].index_select(0, rows)
        if self.source.length is None:
            return Batch(samples, labels, lengths)
        missing = self.source.length - samples.shape[1]
        return Batch(torch.nn.functional.pad(samples, (0, missing)), labels)

    def transform(self, batch: Batch, training: bool) -> Batch:
        """float32 (B, L, 1), normalised, in training augmented; with gaps where not all samples are kept."""
        waveforms, lengths = standardize(batch.inputs.float(), batch.lengths), batch.lengths
        if training and self.augment:
            # One speed a batch, drawn on the CPU, as it decides about shapes.
            waveforms, lengths = resample(waveforms, lengths, 2 ** (0.4 * torch.rand(()).item() - 0.2))
            waveforms = augment(waveforms, lengths)
        batch = batch._replace(inputs=waveforms[..., None], lengths=lengths)
        if self.keep == 1:
            return batch
        # On the CPU, so that validation and test are the same on every device.
        chances = torch.rand(
            waveforms.shape, generator=None if training else torch.Generator().manual_seed(_DROPS)
        )
        told = drop(batch, (chances < self.keep).to(waveforms.device))
        return told if self.tell_gaps else told._replace(rate=batch.rate / self.keep)

    def test_dataloader(self) -> list[Loader]:
        """The test recordings as they are, and every second sample of them."""
        full, half = self._loader("test"), self._loader("test")
        half.fetch = lambda rows: subsample(full.fetch(rows), 2)
        return [full, half]

    def _recordings(self, split: str, where: str) -> tuple[list[np.ndarray], list[int]]:
        import datasets  # only here: it takes a while to import

        source, recordings, labels = self.source, [], []
        expected = (
            f"WAV files of 16 bits, {source.rate} Hz, one channel in column 'audio', integers in 'label'"
        )
        with rows(
            source.hub, self.path, split, COLUMNS, expected, folder=source.folder, revision=source.revision
        ) as table:
            check_integers(table, "label")
            table = table.cast_column("audio", datasets.Audio(decode=False))
            batches = track(
                table.iter(512),
                f"decoding {where}",
                total=-(-len(table) // 512),
                transient=True,
                disable=not sys.stdout.isatty(),
            )
            number = 0
            for batch in batches:
                for audio, label in zip(batch["audio"], batch["label"], strict=True):
                    if label != source.silence:
                        try:
                            recordings.append(decode(audio["bytes"], source.rate)[: source.length])
                        except (ValueError, TypeError, EOFError, wave.Error) as error:
                            raise ValueError(f"row {number} is no such file: {error}") from error
                        labels.append(label)
                    number += 1
        return recordings, labels


def decode(file: bytes, rate: int) -> np.ndarray:
    """Samples int16 (L,) of a WAV file.

    Raises:
        ValueError, EOFError, wave.Error: unless it has one channel of 16 bits at `rate` Hz, and samples.
    """
    with wave.open(io.BytesIO(file)) as audio:
        found = (audio.getnchannels(), 8 * audio.getsampwidth(), audio.getframerate())
        if found != (1, 16, rate):
            raise ValueError("{} channels, {} bits, {} Hz".format(*found))
        samples = np.frombuffer(audio.readframes(audio.getnframes()), "<i2")
    if not len(samples):
        raise ValueError("no samples")
    return samples


def subsample(batch: Batch, step: int) -> Batch:
    """Every `step`-th input (B, L, ...) of a batch, and the rate that goes with it."""
    lengths = None if batch.lengths is None else -(-batch.lengths // step)
    return batch._replace(inputs=batch.inputs[:, ::step], lengths=lengths, rate=step * batch.rate)


def drop(batch: Batch, kept: Tensor) -> Batch:
    """Of the inputs (B, L, ...) those where `kept` (B, L) is True, in order, and the first of each row.

    The rate is the time before each, in steps of the original times their rate.
    """
    L = batch.inputs.shape[1]
    steps = torch.arange(L, device=kept.device)
    lengths = kept.new_full((len(kept),), L, dtype=torch.long) if batch.lengths is None else batch.lengths
    kept = (kept | (steps == 0)) & (steps < lengths[:, None])
    lengths = kept.sum(1)
    places = steps.expand(kept.shape).masked_fill(~kept, L).sort(1).values[:, : int(lengths.max())]
    behind = places == L
    gaps = places.diff(dim=1, prepend=places.new_full((len(places), 1), -1)).float()
    at = places.masked_fill(behind, 0).view(*places.shape, *[1] * (batch.inputs.dim() - 2))
    inputs = batch.inputs.take_along_dim(at, 1) * ~behind.view(at.shape)
    return batch._replace(inputs=inputs, lengths=lengths, rate=batch.rate * gaps.masked_fill(behind, 1))


def standardize(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    """Each of (B, L) with mean 0 and variance 1 within its length, zeros behind; silence stays zero."""
    if lengths is None:
        centred = waveforms - waveforms.mean(1, keepdim=True)
        variance = centred.square().mean(1, keepdim=True)
    else:
        inside, number = _inside(waveforms, lengths), lengths[:, None]
        centred = (waveforms - (waveforms * inside).sum(1, keepdim=True) / number) * inside
        variance = centred.square().sum(1, keepdim=True) / number
    return centred / variance.sqrt().clamp_min(1e-8)


def resample(waveforms: Tensor, lengths: Tensor | None, speed: float) -> tuple[Tensor, Tensor | None]:
    """Waveforms (B, L) played `speed` times as fast, and as high: (B, about L / speed), and their lengths.

    Limited to the band that both have, by Fourier transforms of the row, as if it began again at its end.
    """
    before = waveforms.shape[1]
    after = max(1, round(before / speed))
    heard = torch.fft.irfft(torch.fft.rfft(waveforms), after) * (after / before)
    # Every sample of the old row inside: the longest of the lengths stays that of the row.
    return heard, None if lengths is None else (lengths * after + before - 1) // before


def augment(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    """Standardised waveforms (B, L) as other microphones might have heard them; random by torch's generator.

    Each is modulated, equalised and masked, see there, and standardised again; gets white noise 15 to 40 dB
    below it, and a gain that is log-normal with a standard deviation of 0.2.
    """
    inside = torch.ones_like(waveforms) if lengths is None else _inside(waveforms, lengths)
    heard = standardize(mask(equalize(modulate(waveforms)) * inside, lengths), lengths)
    noise = 10 ** (-(15 + 25 * _uniform(heard)) / 20)
    gain = torch.exp(0.2 * torch.randn(len(heard), 1, device=heard.device))
    return gain * (heard + noise * torch.randn_like(heard)) * inside


def modulate(waveforms: Tensor) -> Tensor:
    """Waveforms (B, L) with a copy of each, up to 0.8 times as strong, multiplied by a high tone.

    The copy is shifted and mirrored in frequency by 0.3 to 0.5 cycles a sample. A model trained
    with it is disturbed less by the aliasing of the half-rate test: high frequencies come out as low ones.
    """
    steps = torch.arange(waveforms.shape[1], device=waveforms.device)
    cycles = (0.3 + 0.2 * _uniform(waveforms)) * steps + _uniform(waveforms)
    return waveforms * (1 + 0.8 * _uniform(waveforms) * torch.cos(2 * torch.pi * cycles))


def equalize(waveforms: Tensor) -> Tensor:
    """Waveforms (B, L), each through a random filter.

    Its gain is normal at nine equally spaced frequencies, with a standard deviation of 3 dB, and linear
    between them; less a slope of up to 18 dB from the lowest to the highest frequency.
    """
    spectrum = torch.fft.rfft(waveforms)
    knots = 3 * torch.randn(len(waveforms), 1, 9, device=waveforms.device)
    gain = torch.nn.functional.interpolate(knots, spectrum.shape[1], mode="linear", align_corners=True)[:, 0]
    slope = torch.linspace(0, 18, spectrum.shape[1], device=waveforms.device)
    return torch.fft.irfft(spectrum * 10 ** ((gain - _uniform(waveforms) * slope) / 20), waveforms.shape[1])


def mask(waveforms: Tensor, lengths: Tensor | None) -> Tensor:
    """Waveforms (B, L), each without a random band and stretch of time, as in SpecAugment (arXiv 1904.08779).

    The band is up to a fifth of all frequencies wide, the stretch up to an eighth of the length.
    """
    spectrum = torch.fft.rfft(waveforms)
    end = waveforms.shape[1] if lengths is None else lengths[:, None]
    bands = torch.linspace(0, 1, spectrum.shape[1], device=waveforms.device)
    times = torch.arange(waveforms.shape[1], device=waveforms.device) / end
    heard = torch.fft.irfft(spectrum * _but_a_stretch(bands, waveforms, 1 / 5), waveforms.shape[1])
    return heard * _but_a_stretch(times, waveforms, 1 / 8)


def _but_a_stretch(places: Tensor, waveforms: Tensor, widest: float) -> Tensor:
    """(B, L), False where the places (L,) or (B, L) lie in a random part of 0 to 1, up to `widest` wide."""
    width = widest * _uniform(waveforms)
    start = (1 - width) * _uniform(waveforms)
    return (places < start) | (places >= start + width)


def _uniform(waveforms: Tensor) -> Tensor:
    """(B, 1) from 0 to 1."""
    return torch.rand(len(waveforms), 1, device=waveforms.device)


def _inside(waveforms: Tensor, lengths: Tensor) -> Tensor:
    """(B, L), True before the end of each."""
    return torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
