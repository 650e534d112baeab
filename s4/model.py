"""S4Model: a stack of blocks between an encoder and a decoder, and generation from it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s4._checks import check_integer, check_lengths, check_module, check_number, check_option, check_state
from s4.block import S4Block
from s4.layer import padding

Sampler = Callable[[Tensor], Tensor]


class ModelState(NamedTuple):
    """The state of a whole stack after some inputs.

    Shapes: layers, one (B, H, N) a block; total (B, d_model) and length (B,), the sum and the number of the
    outputs of the last block so far, from which mean pooling goes on.
    """

    layers: tuple[Tensor, ...]
    total: Tensor
    length: Tensor


class S4Model(nn.Module):
    """Encoder, S4 blocks, pooling over time, decoder.

    Args:
        encoder: maps inputs (B, L, ...) to (B, L, d_model) position by position: `nn.Linear`, `nn.Embedding`.
        blocks: the stack.
        norm: applied to the outputs of the last block, position by position, before pooling: what a stack of
            pre-norm blocks ends with. None for post-norm blocks.
        decoder: maps (..., d_model) to outputs position by position: `nn.Linear`, or a norm and a linear map.
        pooling: "none", an output for each position; "last", the output of the last; "mean", the output of
            the mean over all positions.

    Raises:
        ValueError, TypeError: an argument of the wrong kind; the message names it.
    """

    def __init__(
        self,
        encoder: nn.Module,
        blocks: Iterable[S4Block],
        decoder: nn.Module,
        *,
        norm: nn.Module | None = None,
        pooling: str = "none",
    ) -> None:
        super().__init__()
        check_module("encoder", encoder)
        check_module("decoder", decoder)
        if norm is not None:
            check_module("norm", norm)
        if not isinstance(blocks, Iterable):
            raise TypeError(f"blocks must be a sequence of S4Block, got {type(blocks).__name__}")
        stack = list(blocks)
        if not stack or not all(isinstance(block, S4Block) for block in stack):
            raise TypeError(f"blocks must be one or more S4Block, got {[type(b).__name__ for b in stack]}")
        if len({block.layer.d_model for block in stack}) > 1:
            raise ValueError(f"blocks must share one d_model, got {[b.layer.d_model for b in stack]}")
        check_option("pooling", pooling, ("none", "mean", "last"))
        self.encoder = encoder
        self.blocks: Sequence[S4Block] = nn.ModuleList(stack)  # type: ignore[assignment]
        self.norm = norm
        self.decoder = decoder
        self.pooling = pooling

    def forward(
        self,
        u: Tensor,
        state: ModelState | None = None,
        *,
        lengths: Tensor | None = None,
        rate: float = 1.0,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """Outputs for a batch of sequences.

        Args:
            u: inputs (B, L, ...) as the encoder takes them.
            state: to go on from, as `step` or an earlier `forward` returned it; None is the initial state.
            lengths: (B,) integers, the lengths of right-padded sequences; what lies past them is ignored and
                outputs there are zero.
            rate: multiplies dt in every layer.
            return_state: also return the state after the last input.

        Returns:
            outputs (B, L, ...) without pooling, else (B, ...); or (outputs, state).

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the argument.
        """
        if not isinstance(u, Tensor) or u.dim() < 2:
            raise ValueError(f"u must be a tensor of shape (batch, length, ...), got {_shape(u)}")
        if lengths is not None:
            lengths = check_lengths(lengths, u.shape[0], u.shape[1], self.blocks[0].layer.D)
        x, layers = self._run(u, state, lengths, rate, return_state)
        after = None
        if return_state or self.pooling == "mean":
            after = self._pool(x, layers, state, lengths)
        if after is not None and self.pooling == "mean":
            y = self.decoder(_mean(after))
        elif self.pooling == "last":
            y = self.decoder(_last(x, lengths))
        else:
            y = self.decoder(x)
            if lengths is not None:
                y = _zero_padding(y, lengths)
        return (y, after) if return_state and after is not None else y

    def step(self, u: Tensor, state: ModelState, *, rate: float = 1.0) -> tuple[Tensor, ModelState]:
        """One time step.

        Args:
            u: inputs (B, ...) of one position.
            state: from `initial_state`, `forward` or an earlier `step`.
            rate: multiplies dt in every layer.

        Returns:
            outputs (B, ...): what `forward` gives at this position or, pooled, for the sequence up to here;
            and the next state.
        """
        if not isinstance(u, Tensor) or u.dim() < 1:
            raise ValueError(f"u must be a tensor of shape (batch, ...), got {_shape(u)}")
        self._check_state(state, u.shape[0])
        x = self.encoder(u[:, None])[:, 0]
        layers = []
        for block, layer_state in zip(self.blocks, state.layers, strict=True):
            x, layer_state = block.step(x, layer_state, rate=rate)
            layers.append(layer_state)
        if self.norm is not None:
            x = self.norm(x[:, None])[:, 0]
        after = ModelState(tuple(layers), state.total + x, state.length + 1)
        return self.decoder(_mean(after) if self.pooling == "mean" else x), after

    def initial_state(self, batch_size: int) -> ModelState:
        """The state before any input."""
        layers = tuple(block.initial_state(batch_size) for block in self.blocks)
        total = layers[0].new_zeros(layers[0].shape[:2])
        return ModelState(layers, total, torch.zeros(batch_size, dtype=torch.long, device=total.device))

    def generate(
        self, prompt: Tensor, steps: int, sample: Sampler | None = None, *, rate: float = 1.0
    ) -> Tensor:
        """Go on from a prompt, feeding every output back as the next input. Call `eval` first.

        Args:
            prompt: (B, L, ...) inputs as the encoder takes them, L at least 1.
            steps: how many to generate, at least 1.
            sample: from the decoder's output (B, ...) to the next input (B, ...); None is `greedy`.
            rate: multiplies dt in every layer.

        Returns:
            the new inputs (B, steps, ...), prompt excluded.
        """
        check_integer("steps", steps, 1)
        return torch.stack(list(islice(self.stream(prompt, sample, rate=rate), steps)), 1)

    def stream(self, prompt: Tensor, sample: Sampler | None = None, *, rate: float = 1.0) -> Iterator[Tensor]:
        """`generate` without end, yielding (B, ...) as it goes; each step costs the same."""
        if self.pooling != "none":
            raise ValueError(f"generation needs a model with pooling='none', got {self.pooling!r}")
        if not isinstance(prompt, Tensor) or prompt.dim() < 2 or prompt.shape[1] < 1:
            raise ValueError(
                f"prompt must be a tensor of shape (batch, length of at least 1, ...), got {_shape(prompt)}"
            )
        sample = greedy if sample is None else sample
        if not callable(sample):
            raise TypeError(f"sample must be a function of the decoder's output, got {sample!r}")
        with torch.no_grad():  # never held across a yield: the caller's code keeps its own gradient mode
            x, layers = self._run(prompt, None, None, rate, True)
            state = self._pool(x, layers, None, None)
            y = self.decoder(x[:, -1])
        while True:
            with torch.no_grad():
                token = sample(y)
            yield token
            with torch.no_grad():
                y, state = self.step(token, state, rate=rate)

    def _run(
        self, u: Tensor, state: ModelState | None, lengths: Tensor | None, rate: float, return_state: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Outputs of the last block (B, L, d_model), zero past the lengths, and the layers' states."""
        if state is not None:
            self._check_state(state, u.shape[0])
        if lengths is not None:
            u = _zero_padding(u, lengths)
        x, layers = self.encoder(u), []
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.layers[i]
            x = block(x, before, lengths=lengths, rate=rate, return_state=return_state)
            if return_state:
                x, after = x
                layers.append(after)
        if self.norm is not None:
            x = self.norm(x)
        if lengths is not None:
            x = _zero_padding(x, lengths)
        return x, tuple(layers)

    def _pool(
        self, x: Tensor, layers: tuple[Tensor, ...], before: ModelState | None, lengths: Tensor | None
    ) -> ModelState:
        length = torch.full(x.shape[:1], x.shape[1], device=x.device) if lengths is None else lengths
        total = x.sum(1, dtype=self.blocks[0].layer.D.dtype)
        if before is not None:
            total, length = total + before.total, length + before.length
        return ModelState(layers, total, length)

    def _check_state(self, state: ModelState, batch: int) -> None:
        valid = isinstance(state, ModelState) and isinstance(state.layers, tuple)
        if not valid or len(state.layers) != len(self.blocks):
            raise ValueError(
                f"state must be a ModelState of {len(self.blocks)} layers, as initial_state, forward and "
                f"step return it, got {type(state).__name__}"
            )
        D = self.blocks[0].layer.D
        check_state("state.total", state.total, (batch, D.shape[0]), D)
        check_state("state.length", state.length, (batch,), D, torch.int64)
        for i, (layer_state, block) in enumerate(zip(state.layers, self.blocks, strict=True)):
            shape = (batch, block.layer.d_model, block.layer.d_state)
            check_state(f"state.layers[{i}]", layer_state, shape, block.layer.D)


def greedy(logits: Tensor) -> Tensor:
    """The most likely token: (B, vocabulary) to (B,)."""
    return logits.argmax(-1)


def categorical(
    temperature: float = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Sampler:
    """A sampler that draws tokens from softmax(logits / temperature).

    Args:
        temperature: above 0; below 1 sharpens, towards `greedy`.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the fewest tokens whose probabilities sum to top_p at least (nucleus sampling).
        generator: source of randomness, for draws that can be repeated.

    Returns:
        a function from logits (B, vocabulary) to tokens (B,).
    """
    check_number("temperature", temperature, 0, above=True)
    if top_k is not None:
        check_integer("top_k", top_k, 1)
    if top_p is not None:
        check_number("top_p", top_p, 0, above=True)
        if top_p > 1:
            raise ValueError(f"top_p must be at most 1, got {top_p}")

    def sample(logits: Tensor) -> Tensor:
        p, token = torch.softmax((logits - logits.amax(-1, keepdim=True)).double() / temperature, -1).sort(
            -1, descending=True
        )
        if top_k is not None:
            p[:, top_k:] = 0
        if top_p is not None:
            p[p.cumsum(-1) - p >= top_p] = 0
        return token.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]

    return sample


def _zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """x (B, L, ...) with zeros past the lengths, also where it holds NaN or tokens that do not exist."""
    return x.masked_fill(padding(lengths, x.shape[1]).view(*x.shape[:2], *(1,) * (x.dim() - 2)), 0)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _mean(state: ModelState) -> Tensor:
    return state.total / state.length.clamp(min=1)[:, None]


def _last(x: Tensor, lengths: Tensor | None) -> Tensor:
    if x.shape[1] == 0:
        raise ValueError("pooling='last' needs sequences of at least one position")
    if lengths is None:
        return x[:, -1]
    return x[torch.arange(x.shape[0], device=x.device), (lengths - 1).clamp(min=0)]
