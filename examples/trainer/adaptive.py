"""Embedding and softmax of a large vocabulary, where rare tokens get fewer numbers."""

import math

import torch
from torch import Tensor, nn


class AdaptiveEmbedding(nn.Module):
    """Tokens in order of frequency, embedded in ever fewer numbers the rarer they are (arXiv 1809.10853).

    Tokens below cutoffs[0] have d_model numbers, those from cutoffs[i] on d_model / 4^(i + 1), which a linear
    map takes to d_model. The same numbers are the weights of `softmax`, the adaptive softmax of
    arXiv 1609.04309.

    Args:
        vocabulary: number of tokens.
        d_model: channels, at least 4^len(cutoffs).
        cutoffs: increasing, above 0 and below `vocabulary`.
        dropout: probability, of embeddings and of the features that tokens are predicted from.

    Raises:
        ValueError: for another d_model or other cutoffs.
    """

    def __init__(self, vocabulary: int, d_model: int, cutoffs: list[int], dropout: float = 0.0) -> None:
        super().__init__()
        if d_model < 4 ** len(cutoffs):
            raise ValueError(
                f"model.cutoffs {cutoffs} need model.d_model of at least {4 ** len(cutoffs)}, got {d_model}"
            )
        if cutoffs != sorted(set(cutoffs)) or not 0 < cutoffs[0] <= cutoffs[-1] < vocabulary:
            raise ValueError(f"model.cutoffs must increase between 0 and {vocabulary}, got {cutoffs}")
        self.dropout = nn.Dropout(dropout)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(d_model, vocabulary, cutoffs, div_value=4.0)
        self.up = nn.ModuleList(
            nn.Linear(rare[1].in_features, d_model, bias=False) for rare in self.softmax.tail
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) tokens to (..., d_model)."""
        ends = self.softmax.cutoffs
        frequent = self.softmax.head.weight[: ends[0]]
        x = nn.functional.embedding(tokens.clamp(max=ends[0] - 1), frequent)
        for start, end, rare, up in zip(ends, ends[1:], self.softmax.tail, self.up, strict=False):
            here = (tokens >= start) & (tokens < end)
            embedded = up(nn.functional.embedding(tokens[here] - start, rare[1].weight))
            x = x.masked_scatter(here[..., None], embedded.to(x.dtype))
        # The weights of a softmax are small: 1 / sqrt(d_model) or so.
        return self.dropout(x * math.sqrt(x.shape[-1]))

    def loss(self, y: Tensor, targets: Tensor) -> Tensor:
        """Mean of -log p of targets (n,), from features (n, d_model), in the weights' dtype."""
        with torch.autocast(y.device.type, enabled=False):
            out: Tensor = self.softmax(self.dropout(y.to(self.softmax.head.weight.dtype)), targets).loss
        # Weights of tokens that are not there have a gradient too: DistributedDataParallel waits for it.
        return out + 0 * sum(weight.sum() for weight in self.softmax.parameters())

    def log_prob(self, y: Tensor) -> Tensor:
        """log p of all tokens (n, vocabulary), from features (n, d_model)."""
        return self.softmax.log_prob(y)
