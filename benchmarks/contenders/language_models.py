"""Three language models of one width, depth and parameter count, that differ in what carries the past."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from contenders.layers import Attention
from s4 import S4Block, S4Layer, S4Model

TOLERANCE = 0.05  # of the parameter counts


@dataclass(frozen=True)
class Sizes:
    """Of all three models; `expand` is the hidden width of the Transformer's perceptrons over its width."""

    d_model: int
    n_layers: int
    d_state: int
    variant: str
    vocabulary: int
    expand: int
    longest: int


def perceptron(d_model: int, hidden: int) -> nn.Module:
    """Two layers, position by position."""
    return nn.Sequential(nn.Linear(d_model, hidden), nn.GELU(), nn.Linear(hidden, d_model))


class Stack(nn.Module):
    """Embedding, pre-norm residual blocks of a mixer over time and a perceptron, norm, linear decoder."""

    def __init__(self, sizes: Sizes, hidden: int, mixer: Callable[[], nn.Module]) -> None:
        super().__init__()
        width, depth = sizes.d_model, sizes.n_layers
        self.encoder = nn.Embedding(sizes.vocabulary, width)
        self.mixers = nn.ModuleList(mixer() for _ in range(depth))
        self.perceptrons = nn.ModuleList(perceptron(width, hidden) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.decoder = nn.Linear(width, sizes.vocabulary)

    def run(self, x: Tensor, mix: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Logits from embedded tokens x (B, d_model); mix is given the number of the block and its input."""
        for i, mlp in enumerate(self.perceptrons):
            x = x + mix(i, self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.decoder(self.norms[-1](x))


class Transformer(Stack):
    """Attention in every block; the position is added to the embedding."""

    def __init__(self, sizes: Sizes, hidden: int) -> None:
        super().__init__(sizes, hidden, lambda: Attention(sizes.d_model))
        angle = torch.arange(sizes.longest)[:, None] / 1e4 ** torch.linspace(0, 1, sizes.d_model // 2)
        self.register_buffer("position", torch.cat([angle.sin(), angle.cos()], 1), persistent=False)

    def step(self, token: Tensor, cache: Tensor, t: int) -> Tensor:
        """Logits for tokens (B,) at position t; cache (layers, 2, B, heads, max_len, head_dim)."""
        x = self.encoder(token) + self.position[t]
        return self.run(x, lambda i, z: self.mixers[i].step(z, cache[i], t))


class LSTM(Stack):
    """An LSTM cell in every block."""

    def __init__(self, sizes: Sizes, hidden: int) -> None:
        super().__init__(sizes, hidden, lambda: nn.LSTMCell(sizes.d_model, sizes.d_model))

    def step(self, token: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits for tokens (B,) and the next state: h and c of each block, (B, d_model)."""
        after: list[Tensor] = []

        def mix(i: int, z: Tensor) -> Tensor:
            after.extend(self.mixers[i](z, (state[2 * i], state[2 * i + 1])))
            return after[-2]

        return self.run(self.encoder(token), mix), after


def s4_model(sizes: Sizes, hidden: int) -> S4Model:
    """Pre-norm blocks whose channels a perceptron mixes."""
    blocks = []
    for _ in range(sizes.n_layers):
        block = S4Block(S4Layer(sizes.d_model, sizes.d_state, variant=sizes.variant), mixer="linear")
        block.mixer = perceptron(sizes.d_model, hidden)
        blocks.append(block)
    width, vocabulary = sizes.d_model, sizes.vocabulary
    encoder, decoder = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
    return S4Model(encoder, blocks, decoder, norm=nn.LayerNorm(width))


def n_parameters(model: nn.Module) -> int:
    """How many numbers it learns."""
    return sum(p.numel() for p in model.parameters())


def matched(build: Callable[[Sizes, int], nn.Module], sizes: Sizes, target: int) -> nn.Module:
    """The model whose perceptrons bring it closest to a number of parameters."""
    one, two = (n_parameters(build(sizes, hidden)) for hidden in (1, 2))
    model = build(sizes, max(1, 1 + round((target - one) / (two - one))))
    if abs(n_parameters(model) - target) > TOLERANCE * target:
        raise SystemExit(
            f"{type(model).__name__} has {n_parameters(model):,} parameters with the narrowest perceptrons, "
            f"the Transformer {target:,}: raise --expand"
        )
    return model
