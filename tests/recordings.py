"""Recordings of noise in the form of the hub's data sets of spoken words, for tests of the examples."""

import struct
from pathlib import Path

import numpy as np
from data.audio import SpokenWords


def wav(samples: np.ndarray, rate: int, channels: int = 1, bits: int = 16) -> bytes:
    """A RIFF file, by the bytes: header, format chunk, a chunk to skip, data chunk."""
    data = samples.astype({8: "u1", 16: "<i2"}[bits]).tobytes()
    frame = channels * bits // 8
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * frame, frame, bits)
    chunks = b"WAVE" + form + struct.pack("<4sI4s", b"LIST", 4, b"INFO")
    chunks += struct.pack("<4sI", b"data", len(data)) + data
    return struct.pack("<4sI", b"RIFF", len(chunks)) + chunks


def write(folder: Path, split: str, recordings: list[bytes], labels: list[int]) -> None:
    """A parquet file with the columns of the hub's data sets."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": recording, "path": f"{number}.wav"} for number, recording in enumerate(recordings)]
    table = pyarrow.table({"file": [row["path"] for row in rows], "audio": rows, "label": labels})
    pyarrow.parquet.write_table(table, folder / f"{split}.parquet")


def noise(lengths: list[int], seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(-(2**15), 2**15, length).astype(np.int16) for length in lengths]


def digits_in(folder: Path) -> tuple[Path, dict[str, list[np.ndarray]]]:
    """60 and 11 recordings of noise, of different lengths, in the form of the Free Spoken Digit Dataset."""
    known = {
        "train": noise([30 + 7 * (5 * row % 41) for row in range(60)], 0),
        "test": noise([41, 60, 53, 37, 80, 45, 47, 49, 51, 55, 90], 1),
    }
    for split, recordings in known.items():
        labels = [row % 10 for row in range(len(recordings))]
        write(folder / "fsdd", split, [wav(samples, 8000) for samples in recordings], labels)
    return folder / "fsdd", known


def commands_in(folder: Path) -> tuple[Path, dict[str, list[np.ndarray]]]:
    """Seconds of noise, some shorter, and longer ones that are no word, in the form of Speech Commands."""
    known = {
        "train": noise([16000, 15000, 16000, 40000, 16000, 9000], 2),
        "validation": noise([16000, 30000, 12001], 3),
        "test": noise([12345, 16000, 16000], 4),
    }
    labels = {"train": [0, 34, 10, 35, 5, 9], "validation": [7, 35, 30], "test": [35, 33, 2]}
    for split, recordings in known.items():
        files = [wav(samples, 16000) for samples in recordings]
        write(folder / "commands", split, files, labels[split])
    return folder / "commands", known


def opened(dataset: str, path: Path, **options: object) -> SpokenWords:
    module = SpokenWords(dataset, path, **{"batch_size": 4, "eval_batch_size": 4, **options})  # type: ignore[arg-type]
    module.prepare_data()
    module.setup("fit")
    return module
