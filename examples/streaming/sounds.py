"""Sounds and WAV files with numpy and the standard library alone: what training and streaming share."""

import wave
from pathlib import Path

import numpy as np

RATE = 16_000  # samples a second of all sounds made here


def tones(seconds: float, seed: int) -> np.ndarray:
    """(samples,) notes of a quarter of a second, each of four fading harmonics, within (-0.53, 0.53)."""
    generator = np.random.default_rng(seed)
    length, note = round(seconds * RATE), RATE // 4
    t = np.arange(note) / RATE
    parts = []
    for _ in range(-(-length // note)):
        pitch = 220 * 2 ** (generator.integers(0, 24) / 12)
        waves = [np.sin(2 * np.pi * pitch * k * t + generator.uniform(0, 6)) / k for k in range(1, 5)]
        parts.append(np.sum(waves, 0) * np.exp(-6 * t) * np.minimum(t / 0.01, 1) / 4)
    return np.concatenate(parts)[:length].astype(np.float32)


def noisy(clean: np.ndarray, seed: int) -> np.ndarray:
    """The same with white noise of a tenth of full scale."""
    return (clean + 0.1 * np.random.default_rng(seed).standard_normal(clean.shape)).astype(np.float32)


def read(file: Path) -> tuple[np.ndarray, int]:
    """Samples (channels, length) in (-1, 1) of a WAV file of 16 bits, and their rate.

    Raises:
        ValueError: no such file, or of another kind.
    """
    try:
        with wave.open(str(file)) as audio:
            channels, width, rate = audio.getnchannels(), audio.getsampwidth(), audio.getframerate()
            frames = audio.readframes(audio.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise ValueError(f"cannot read {file}: {str(error) or 'it ends early'}") from None
    if width != 2:
        raise ValueError(f"{file} must have samples of 16 bits, got {8 * width}")
    return np.frombuffer(frames, "<i2").reshape(-1, channels).T / np.float32(32768), rate


def write(file: Path, samples: np.ndarray, rate: int) -> None:
    """Samples (channels, length) as a WAV file of 16 bits; what is louder than full scale is cut off."""
    whole = np.clip(np.round(samples.T * 32768), -32768, 32767).astype("<i2")
    with wave.open(str(file), "wb") as audio:
        audio.setparams((samples.shape[0], 2, rate, 0, "NONE", ""))
        audio.writeframes(whole.tobytes())
