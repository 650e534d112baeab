"""Spoken words with samples missing: what is left and what is told of the gaps; runs of the recipe."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

import train
from data import audio
from data.base import Spec
from data.batches import Batch, padded
from example_files import OF_LIGHTNING, TINY, fails, step_losses
from recordings import digits_in, opened
from trainer.task import SequenceTask

pytestmark = [
    pytest.mark.usefixtures("own_folder", "brief_runs"),
    OF_LIGHTNING,
]


@pytest.mark.parametrize("padded_row", [True, False])
def test_dropped_samples(padded_row: bool) -> None:
    """Against loops: what is left in order, the steps since the sample before, zeros behind the end."""
    inputs, kept = torch.randn(3, 9, 2), torch.rand(3, 9) < 0.5
    kept[0], kept[1] = False, True
    lengths = [9, 4, 6] if padded_row else [9, 9, 9]
    batch = audio.drop(
        Batch(inputs, torch.zeros(3), torch.tensor(lengths) if padded_row else None, rate=0.5), kept
    )
    assert batch.lengths is not None
    assert isinstance(batch.rate, torch.Tensor)
    assert batch.inputs.shape[1] == batch.rate.shape[1] == batch.lengths.max()
    for row, length in enumerate(lengths):
        places = [step for step in range(length) if kept[row, step] or step == 0]
        number = len(places)
        assert batch.lengths[row] == number
        assert torch.equal(batch.inputs[row, :number], inputs[row, places])
        assert batch.rate[row, :number].tolist() == [
            0.5 * (place - before) for place, before in zip(places, [-1, *places], strict=False)
        ]
        assert not batch.inputs[row, number:].any()
        assert (batch.rate[row, number:] > 0).all()


def test_half_of_the_samples(tmp_path: Path) -> None:
    """The same in each evaluation, told the gaps or their mean; others in training."""
    path, _ = digits_in(tmp_path)
    told, untold = (opened("fsdd", path, keep=0.5, tell_gaps=tell) for tell in (True, False))
    whole = opened("fsdd", path)
    raw = whole.fetch("train", torch.arange(60))
    heard = whole.transform(raw, training=False)
    known, again = told.transform(raw, training=False), told.transform(raw, training=False)
    mean, other = untold.transform(raw, training=False), told.transform(raw, training=True)
    assert isinstance(known.rate, torch.Tensor)
    assert isinstance(again.rate, torch.Tensor)
    assert torch.equal(known.inputs, mean.inputs)
    assert torch.equal(known.inputs, again.inputs)
    assert torch.equal(known.rate, again.rate)
    assert known.inputs.shape != other.inputs.shape or not torch.equal(known.inputs, other.inputs)
    assert mean.rate == 2
    assert untold.transform(audio.subsample(raw, 2), training=False).rate == 4
    assert known.lengths is not None
    assert raw.lengths is not None
    for row in range(60):
        places = known.rate[row, : known.lengths[row]].cumsum(0).long() - 1
        assert torch.equal(known.inputs[row, : len(places)], heard.inputs[row, places])
    share = known.lengths.sum() / raw.lengths.sum()
    assert abs(share - 0.5) < 0.04  # of 10,000 draws: eight standard deviations
    assert told.options() != untold.options()
    assert set(whole.options()) == {"validation", "augment"}  # as in the checkpoints of before
    ragged = padded(known, tokens=False)
    assert isinstance(ragged.rate, torch.Tensor)
    assert ragged.rate.shape == ragged.inputs.shape[:2]
    assert torch.equal(ragged.rate[:, : known.rate.shape[1]], known.rate)
    assert (ragged.rate[:, known.rate.shape[1] :] == 1).all()


def test_gaps_reach_the_model() -> None:
    """With zero-order hold an input after a gap of g steps is one that was held for g steps."""
    options = {"variant": "diag", "pooling": "last", "dt_min": 0.1, "dt_max": 1.0}
    task = SequenceTask(Spec("label", 1, 5), d_model=4, n_layers=1, d_state=4, **options).double()
    whole = Batch(torch.randn(3, 40, 1).double(), torch.zeros(3), torch.tensor([40, 7, 33]))
    batch = padded(audio.drop(whole, torch.rand(3, 40) < 0.5), tokens=False)
    assert isinstance(batch.rate, torch.Tensor)
    assert batch.lengths is not None
    got = task(batch)
    for row, number in enumerate(batch.lengths.tolist()):
        gaps = batch.rate[row, :number].long()
        assert gaps.max() > 1
        held = batch.inputs[row, :number].repeat_interleave(gaps, 0)
        assert (got[row] - task.model(held[None])[0]).abs().max() < 1e-9
    assert (got - task(batch._replace(rate=2.0))).abs().max() > 1e-2


def test_recipe_runs_told_and_untold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = digits_in(tmp_path)
    options = ["irregular", *TINY, "--data.path", str(path), "--data.batch_size", "4"]
    options += ["--trainer.max_steps", "2"]
    train.run([*options, "--run_dir", "told"])
    train.run([*options, "--run_dir", "untold", "--data.tell_gaps", "false"])
    told, untold = (step_losses(tmp_path / name) for name in ("told", "untold"))
    assert len(told) == len(untold) == 2
    assert told[0] != untold[0]  # of the same samples by the same weights
    results = json.loads((tmp_path / "told" / "results.json").read_text())
    assert {"test accuracy", "test_half_rate accuracy"} <= set(results)
    again = ["test", *options[:-2], "--data.tell_gaps", "false", "--ckpt_path", "told/last.ckpt"]
    fails(capsys, 1, again, "'tell_gaps': True", "'tell_gaps': False")
