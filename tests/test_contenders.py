"""What the benchmarks compare S4 with is what it is called."""

import pytest
import torch

pytest.importorskip("lightning", reason="the benchmarks need the extra 'examples'")
from contenders import language_models, layers


def test_the_bare_convolution_and_the_attention_are_causal() -> None:
    torch.manual_seed(0)
    u, k = torch.randn(2, 3, 9).double(), torch.randn(3, 9).double()
    want = torch.zeros_like(u)
    for t in range(9):
        for j in range(t + 1):
            want[..., t] += k[:, t - j] * u[..., j]
    assert torch.allclose(layers.fft_convolution(u, k), want, atol=1e-12)
    attention, x = layers.Attention(64), torch.randn(1, 9, 64)
    assert torch.allclose(attention(x)[:, :5], attention(x[:, :5]), atol=1e-5)
    assert not torch.allclose(attention(x)[:, 5:], attention(x[:, 5:]), atol=1e-3)


def test_the_transformer_with_a_cache_is_a_transformer() -> None:
    """Token by token into an empty cache it gives what attention under a triangular mask gives at once."""
    torch.manual_seed(0)
    B, L, heads, width, depth = 3, 7, 2, 128, 2
    sizes = language_models.Sizes(width, depth, 4, "dplr", 11, 2, L)
    model = language_models.Transformer(sizes, 2 * width).double()
    tokens = torch.randint(11, (B, L))
    x = model.encoder(tokens) + model.position
    for i, mixer in enumerate(model.mixers):
        q, k, v = mixer.qkv(model.norms[2 * i](x)).view(B, L, 3, heads, width // heads).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / (width // heads) ** 0.5
        weight = torch.softmax(scores.masked_fill(torch.ones(L, L).triu(1).bool(), -torch.inf), -1)
        x = x + mixer.out(torch.einsum("bhij,bjhd->bihd", weight, v).flatten(2))
        x = x + model.perceptrons[i](model.norms[2 * i + 1](x))
    want = model.decoder(model.norms[-1](x))
    with torch.no_grad():
        cache = torch.full((depth, 2, B, heads, L, width // heads), torch.nan).double()
        got = torch.stack([model.step(tokens[:, t], cache, t) for t in range(L)], 1)
    assert torch.allclose(got, want, atol=1e-12)
    assert (want[:, 1:] - want[:, :1]).abs().max() > 0.1
