"""Spoken words: decoding, ragged batches, half rate, normalisation, augmentation, and runs of the recipes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

import train
from data import audio
from data.audio import SpokenWords
from data.batches import Batch
from data.storage import DataError
from example_files import OF_LIGHTNING, TINY, fails, step_losses
from recordings import commands_in, digits_in, noise, opened, wav, write

pytestmark = [
    pytest.mark.usefixtures("own_folder", "brief_runs"),
    OF_LIGHTNING,
]
# The folders of version 0.02.
WORDS = """backward bed bird cat dog down eight five follow forward four go happy house learn left marvin nine
no off on one right seven sheila six stop three tree two up visual wow yes zero"""


@pytest.fixture
def digits(tmp_path: Path) -> tuple[Path, dict[str, list[np.ndarray]]]:
    return digits_in(tmp_path)


@pytest.fixture
def commands(tmp_path: Path) -> tuple[Path, dict[str, list[np.ndarray]]]:
    return commands_in(tmp_path)


def test_decode() -> None:
    samples = np.array([0, 1, -1, 2**15 - 1, -(2**15), 258], np.int16)
    decoded = audio.decode(wav(samples, 8000), 8000)
    assert decoded.dtype == np.int16
    np.testing.assert_array_equal(decoded, samples)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (wav(np.zeros(8), 16000), "16000 Hz"),
        (wav(np.zeros(8), 8000, channels=2), "2 channels"),
        (wav(np.zeros(8), 8000, bits=8), "8 bits"),
        (wav(np.zeros(0), 8000), "no samples"),
        (b"fLaC" + bytes(40), "RIFF"),
        (b"", "row 1"),
    ],
    ids=["rate", "channels", "bits", "empty", "flac", "nothing"],
)
def test_other_files_are_refused_by_row(file: bytes, words: str, tmp_path: Path) -> None:
    good = wav(np.ones(8), 8000)
    write(tmp_path / "bad", "train", [good, file, good], [0, 1, 2])
    with pytest.raises(DataError, match="16 bits, 8000 Hz, one channel") as caught:
        SpokenWords("fsdd", tmp_path / "bad").build("train")
    assert "row 1" in str(caught.value)
    assert words in str(caught.value)


def test_labels_that_are_no_word_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "bad", "train", [wav(np.ones(8), 8000)] * 2, [3, 10])
    with pytest.raises(DataError, match=r"labels 0 to 9, got \[3, 10\]"):
        SpokenWords("fsdd", tmp_path / "bad").build("train")


def test_words() -> None:
    assert sorted(audio.COMMANDS) == sorted(WORDS.split())
    assert len(audio.COMMANDS) == 35
    # Some labels, as the hub's card of google/speech_commands has them.
    card = {0: "yes", 9: "go", 10: "zero", 19: "nine", 20: "bed", 29: "wow", 30: "backward", 34: "visual"}
    assert {label: audio.COMMANDS[label] for label in card} == card
    assert [audio.DIGITS.index(word) for word in ("zero", "four", "nine")] == [0, 4, 9]


def test_batches_are_the_recordings(digits: tuple[Path, dict[str, list[np.ndarray]]]) -> None:
    path, known = digits
    module = opened("fsdd", path)
    rows = torch.tensor([5, 0, 59, 5])
    batch = module.fetch("train", rows)
    assert batch.lengths is not None
    assert batch.inputs.dtype == torch.int16
    assert batch.inputs.shape == (4, max(len(known["train"][row]) for row in rows))
    for row, samples, length, label in zip(rows, batch.inputs, batch.lengths, batch.targets, strict=True):
        recording = known["train"][row]
        assert length == len(recording)
        np.testing.assert_array_equal(samples[:length], recording)
        assert not samples[length:].any()
        assert label == row % 10


def test_held_out_recordings_are_not_trained_on(digits: tuple[Path, dict[str, list[np.ndarray]]]) -> None:
    module = opened("fsdd", digits[0], validation=0.3)
    train_rows, val_rows = (module.parts[part][1] for part in ("train", "val"))
    assert sorted([*train_rows, *val_rows]) == list(range(60))
    assert sorted(val_rows % 10) == sorted([*range(10), *range(10)])


def test_half_rate_is_every_second_sample(digits: tuple[Path, dict[str, list[np.ndarray]]]) -> None:
    path, known = digits
    full, half = opened("fsdd", path).test_dataloader()
    assert len(full) == len(half) == 3
    by_length = sorted(range(11), key=lambda row: len(known["test"][row]))
    seen = 0
    for whole, part in zip(full, half, strict=True):
        assert (whole.rate, part.rate) == (1, 2)
        assert torch.equal(whole.targets, part.targets)
        assert whole.lengths is not None
        assert part.lengths is not None
        for place in range(len(part.targets)):
            recording = known["test"][by_length[seen]]
            np.testing.assert_array_equal(whole.inputs[place, : whole.lengths[place]], recording)
            kept = [recording[step] for step in range(0, len(recording), 2)]
            assert part.lengths[place] == len(kept)
            np.testing.assert_array_equal(part.inputs[place, : len(kept)], kept)
            assert not part.inputs[place, len(kept) :].any()
            seen += 1
    assert seen == 11


def test_commands_are_seconds_without_silence(commands: tuple[Path, dict[str, list[np.ndarray]]]) -> None:
    path, known = commands
    module = opened("speech_commands", path)
    assert module.tensors["train"]["labels"].tolist() == [0, 34, 10, 5, 9]
    assert module.parts["val"][0] == "validation"
    batch = next(iter(module.val_dataloader()))
    assert batch.targets.tolist() == [7, 30]
    assert batch.lengths is None
    assert batch.inputs.shape == (2, 16000)
    np.testing.assert_array_equal(batch.inputs[1, :12001], known["validation"][2])
    assert not batch.inputs[1, 12001:].any()
    half = next(iter(module.test_dataloader()[1]))
    assert (half.inputs.shape, half.rate, half.lengths) == ((2, 8000), 2, None)
    np.testing.assert_array_equal(half.inputs[0], known["test"][1][::2])


def test_waveforms_are_standardised_within_their_length() -> None:
    recordings = [3.0 * row + 2 for row in noise([100, 64, 1], 5)]
    padded = np.full((3, 100), 777.0)
    for place, recording in enumerate(recordings):
        padded[place, : len(recording)] = recording
    result = audio.standardize(torch.from_numpy(padded), torch.tensor([100, 64, 1])).numpy()
    for place, recording in enumerate(recordings[:2]):
        expected = (recording - np.mean(recording)) / np.std(recording)
        np.testing.assert_allclose(result[place, : len(recording)], expected, atol=1e-12)
        assert not result[place, len(recording) :].any()
    assert not result[2].any()  # a constant
    whole = audio.standardize(torch.from_numpy(recordings[0])[None], None)
    np.testing.assert_allclose(whole[0], result[0], atol=1e-12)


def test_augmentation(digits: tuple[Path, dict[str, list[np.ndarray]]]) -> None:
    module = opened("fsdd", digits[0], augment=True)
    raw = module.fetch("train", torch.tensor([1, 1, 2]))
    plain = module.transform(raw, training=False).inputs
    torch.manual_seed(3)
    first = module.transform(raw, training=True)
    torch.manual_seed(3)
    again = module.transform(raw, training=True)
    assert plain.shape == (*raw.inputs.shape, 1)
    assert torch.equal(first.inputs, again.inputs)
    others = [module.transform(raw, training=True) for _ in range(50)]
    assert not torch.equal(first.inputs[0], first.inputs[1])
    assert raw.lengths is not None
    for heard in (first, *others):
        assert heard.lengths is not None
        for row, length in zip(heard.inputs[..., 0], heard.lengths, strict=True):
            assert not row[length:].any()
            assert row[:length].all()
    speeds = [raw.inputs.shape[1] / heard.inputs.shape[1] for heard in others]
    assert 0.86 < min(speeds) < 0.91
    assert 1.1 < max(speeds) < 1.16
    assert torch.equal(plain, SpokenWords("fsdd", digits[0]).transform(raw, training=True).inputs)


def tone(frequency: float) -> torch.Tensor:
    """400 rows of 4,000 steps with variance 1."""
    return (2**0.5 * torch.sin(2 * torch.pi * frequency * torch.arange(4000))).expand(400, -1)


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.25])
def test_resampling(speed: float) -> None:
    """A tone sounds as it would have been sampled; lengths keep every sample, the longest all of the row."""
    period = 2 * torch.pi * 0.05
    heard, lengths = audio.resample(tone(0.05)[:2], torch.tensor([4000, 401]), speed)
    assert heard.shape == (2, 4000 / speed)
    expected = 2**0.5 * torch.sin(period * speed * torch.arange(heard.shape[1]))
    torch.testing.assert_close(heard[0], expected, atol=1e-3, rtol=0)
    assert lengths is not None
    assert lengths.tolist() == [4000 / speed, -(-401 // speed)]
    assert audio.resample(torch.ones(1, 1), None, 1.15)[0].tolist() == [[1.0]]


def test_augmented_noise_and_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tone does not hold is noise."""
    monkeypatch.setattr(audio, "modulate", lambda waveforms: waveforms)
    monkeypatch.setattr(audio, "mask", lambda waveforms, lengths: waveforms)
    low = tone(0.05)
    heard = audio.augment(low, None)
    level = heard @ low[0] / 4000
    below = -10 * torch.log10((heard - level[:, None] * low).square().mean(1) / level.square())
    assert 14 < below.min() < 17
    assert 38 < below.max() < 41
    assert 0.15 < level.log().std() < 0.25


def test_augmentation_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all is masked, noise is left."""
    monkeypatch.setattr(audio, "mask", lambda waveforms, lengths: 0 * waveforms)
    low = tone(0.05)
    assert ((audio.augment(low, None) @ low[0]).abs() / 4000 < 0.05).all()


def test_equalizer_lowers_high_frequencies() -> None:
    low, high = tone(0.05), tone(0.45)
    heard = audio.equalize(low + high)
    decibels = 20 * torch.log10((heard @ low[0]).abs() / (heard @ high[0]).abs())
    assert abs(decibels.mean() - 0.8 * 9) < 1  # half of 18 dB, of which 0.8 lies between the tones


def test_modulator_mirrors_and_shifts() -> None:
    """Of a tone at f by one at g: both side tones g - f and g + f, half as strong as the modulator says."""
    low = tone(0.05)
    rest = audio.modulate(low) - low
    spectrum = torch.fft.rfft(rest).abs()
    peaks = spectrum.argmax(1) / 4000
    assert ((peaks > 0.249) & (peaks <= 0.5)).all()
    assert (spectrum[:, :900].square().sum(1) < 0.05 * spectrum.square().sum(1)).all()
    strength = (2 * rest.square().mean(1)).sqrt()
    assert 0.7 < strength.max() < 0.85
    assert strength.min() < 0.1


@pytest.mark.parametrize("lengths", [None, torch.tensor([4000, 1000] * 200)])
def test_masks_a_stretch_of_time(lengths: torch.Tensor | None) -> None:
    """One silent stretch a row, inside its length, up to an eighth of it; no band takes all of a click."""
    clicks = torch.zeros(400, 4000)
    clicks[:, ::20] = 1
    lost = (audio.mask(clicks, lengths)[:, ::20] == 0).float()
    starts_and_ends = torch.nn.functional.pad(lost, (1, 1)).diff(dim=1).abs().sum(1)
    assert starts_and_ends.max() == 2
    for row in range(2):
        number = 50 if lengths is not None and row == 1 else 200
        share = lost[row::2, :number].mean(1)
        assert 0.115 < share.max() <= 1 / 8 + 1 / number
        assert share.min() <= 0.02
        assert abs(share.mean() - 1 / 16) < 0.01
        assert not lost[row::2, number:].any()


def test_masks_a_band() -> None:
    """Of tones over all frequencies one group of neighbours is lost, up to a fifth of them."""
    spectrum = torch.zeros(400, 2001, dtype=torch.complex64)
    spectrum[:, 10:2000:20] = torch.exp(2j * torch.pi * torch.rand(100))
    heard = torch.fft.rfft(audio.mask(torch.fft.irfft(spectrum), None)).abs()[:, 10:2000:20]
    lost = (heard < 0.5).float()
    assert (torch.nn.functional.pad(lost, (1, 1)).diff(dim=1).abs().sum(1) <= 2).all()
    assert 0.17 < lost.mean(1).max() <= 0.21
    assert abs(lost.mean() - 0.1) < 0.02


def test_subsampling_other_batches() -> None:
    inputs = torch.arange(20.0).view(1, 10, 2)
    batch = audio.subsample(Batch(inputs, torch.zeros(1), torch.tensor([7]), rate=0.5), 3)
    assert batch.inputs[0, :, 0].tolist() == [0, 6, 12, 18]
    assert batch.lengths is not None
    assert (batch.lengths.tolist(), batch.rate) == ([3], 1.5)


def test_options_are_checked(digits: tuple[Path, dict[str, list[np.ndarray]]]) -> None:
    with pytest.raises(ValueError, match=r"data\.validation must be in \(0, 0.5\], got 0"):
        SpokenWords("fsdd", digits[0], validation=0)
    with pytest.raises(ValueError, match=r"data\.keep must be in \(0, 1\], got 0"):
        SpokenWords("fsdd", digits[0], keep=0)
    with pytest.raises(DataError, match=r"no validation\.parquet"):
        SpokenWords("speech_commands", digits[0]).files("validation")


@pytest.mark.parametrize("recipe", ["fsdd", "speech"])
def test_recipes_run_and_resume(
    recipe: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, _ = request.getfixturevalue({"fsdd": "digits", "speech": "commands"}[recipe])
    options = [recipe, *TINY, "--data.path", str(path), "--data.batch_size", "2"]
    options += ["--data.augment", "true", "--trainer.max_steps", "3", "--save_every", "1"]
    train.run([*options, "--run_dir", "whole"])
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert {"test accuracy", "test_half_rate accuracy"} <= set(results)
    losses = step_losses(tmp_path / "whole")
    assert len(losses) == 3

    transform, seen = SpokenWords.transform, []

    def cut(self: SpokenWords, batch: Batch, training: bool) -> Batch:
        seen.extend([1] * training)
        if len(seen) == 3:
            raise RuntimeError("cut")
        return transform(self, batch, training)

    monkeypatch.setattr(SpokenWords, "transform", cut)
    with pytest.raises(RuntimeError, match="cut"):
        train.run([*options, "--run_dir", "cut"])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert train.run([*options, "--run_dir", "cut", "--ckpt_path", "last"]).resume_step in (1, 2)
    assert step_losses(tmp_path / "cut") == losses
    train.run(["predict", *options[:-4], "--run_dir", "whole", "--ckpt_path", "last"])
    assert (tmp_path / "whole" / "predictions.csv").is_file()
    fails(capsys, 1, [recipe, "--data.path", str(tmp_path / "none")], "none", "not a folder")
