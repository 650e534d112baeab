"""The model of the examples: adaptive embedding and softmax, feed-forward networks, perplexity."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the examples need the extra 'examples'")

from data.base import Spec
from data.batches import Batch
from trainer.adaptive import AdaptiveEmbedding
from trainer.task import SequenceTask


def test_adaptive_softmax_is_a_distribution_of_tied_weights() -> None:
    """Against loops over tokens, with the weights of the shortlist and the clusters read off the module."""
    model = AdaptiveEmbedding(20, 16, [5, 11]).double()
    # The shortlist with two clusters; their projections and words; the maps of their words to 16 channels.
    sizes = 16 * 7 + (16 * 4 + 4 * 6) + (16 * 1 + 1 * 9) + 16 * (4 + 1)
    assert sum(weight.numel() for weight in model.parameters()) == sizes
    tokens = torch.arange(20)
    embedded, y = model(tokens.view(4, 5)).view(20, 16), torch.randn(3, 16, dtype=torch.float64)
    logp = torch.zeros(3, 20, dtype=torch.float64)
    head = (y @ model.softmax.head.weight.T).log_softmax(-1)
    for token in range(20):
        if token < 5:
            weight = model.softmax.head.weight[token]
            logp[:, token] = head[:, token]
        else:
            cluster, start = (0, 5) if token < 11 else (1, 11)
            down, out = model.softmax.tail[cluster][0].weight, model.softmax.tail[cluster][1].weight
            weight = model.up[cluster].weight @ out[token - start]
            logp[:, token] = head[:, 5 + cluster] + (y @ down.T @ out.T).log_softmax(-1)[:, token - start]
        torch.testing.assert_close(embedded[token], 4 * weight)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    targets = torch.tensor([3, 7, 19])
    torch.testing.assert_close(model.loss(y, targets), -logp[torch.arange(3), targets].mean())
    torch.testing.assert_close(model.log_prob(y), logp)


def test_wrong_cutoffs() -> None:
    for cutoffs, d_model, said in (
        ([5, 11], 15, "d_model of at least 16, got 15"),
        ([11, 5], 16, r"got \[11, 5\]"),
        ([5, 20], 16, r"between 0 and 20, got \[5, 20\]"),
        ([0, 5], 16, r"got \[0, 5\]"),
    ):
        with pytest.raises(ValueError, match=said):
            AdaptiveEmbedding(20, d_model, cutoffs)
    with pytest.raises(ValueError, match="tokens, not a label"):
        SequenceTask(Spec("label", 20, 20, tokens=True), d_model=16, cutoffs=[5])


def test_adaptive_embedding_drops_in_training() -> None:
    """Embeddings, and the features that predict; neither in evaluation."""
    model, whole = (AdaptiveEmbedding(20, 16, [5, 11], dropout) for dropout in (0.5, 0.0))
    whole.load_state_dict(model.state_dict())
    tokens, y, targets = torch.arange(20), torch.randn(500, 16), torch.randint(0, 20, (500,))
    dropped = model(tokens) == 0
    assert 0.3 < dropped.float().mean() < 0.7
    kept = model(tokens)
    torch.testing.assert_close(kept[kept != 0], 2 * whole(tokens)[kept != 0])
    assert model.loss(y, targets) != model.loss(y, targets)
    model.eval()
    torch.testing.assert_close(model(tokens), whole(tokens))
    torch.testing.assert_close(model.loss(y, targets), whole.loss(y, targets))
    with pytest.raises(ValueError, match=r"embedding_dropout must be .* got 1\.5"):
        SequenceTask(Spec("token", 20, 20, tokens=True), d_model=16, cutoffs=[5], embedding_dropout=1.5)
    with pytest.raises(ValueError, match=r"embedding_dropout needs model\.cutoffs"):
        SequenceTask(Spec("token", 20, 20, tokens=True), d_model=16, embedding_dropout=0.1)


def test_feed_forward_networks_are_where_they_should() -> None:
    spec = Spec("token", 20, 20, tokens=True)
    model = SequenceTask(spec, d_model=16, n_layers=5, d_state=2, d_ff=24, ff_every=2)
    widths = [block.feed_forward and block.feed_forward["up"].out_features for block in model.model.blocks]
    assert widths == [None, 24, None, 24, None]
    with pytest.raises(ValueError, match=r"model\.ff_every must be at least 1, got 0"):
        SequenceTask(spec, d_model=16, d_ff=24, ff_every=0)
    for wrong in ({"d_ff": -1}, {"d_ff": 24, "ff_every": 5}, {"d_ff": 24, "cell": "lstm"}):
        with pytest.raises(ValueError, match=r"model\.d_ff must be"):
            SequenceTask(spec, d_model=16, n_layers=4, **wrong)


def test_perplexity_is_e_to_the_mean_loss() -> None:
    spec = Spec("token", 20, 20, tokens=True)
    model = SequenceTask(spec, d_model=16, n_layers=1, d_state=2, cutoffs=[5, 11])
    losses = []
    for rows in (3, 1):
        tokens = torch.randint(0, 20, (rows, 9))
        loss = model._loss(model(Batch(tokens[:, :-1], tokens[:, -4:])), tokens[:, -4:]).detach()
        model.scores["val"]["perplexity"].update(loss, rows)
        losses += [float(loss)] * rows
    assert float(model.scores["val"]["perplexity"].compute()) == pytest.approx(math.exp(np.mean(losses)))
    assert set(model.scores["val"]) == {"loss", "bits", "perplexity"}


@pytest.mark.parametrize("cell", ["s4", "lstm"])
def test_adaptive_softmax_in_bfloat16(cell: str) -> None:
    spec = Spec("token", 20, 20, tokens=True)
    model = SequenceTask(spec, cell=cell, d_model=16, n_layers=1, d_state=2, cutoffs=[5, 11])
    tokens = torch.arange(20).view(1, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model._loss(model(Batch(tokens, tokens)), tokens)
    loss.backward()
    exact = model._loss(model(Batch(tokens, tokens)), tokens)
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
