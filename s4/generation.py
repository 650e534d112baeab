"""From outputs to the next inputs: samplers, and the loop that feeds them back."""

from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from s4.checks import check_integer, check_number, kind_of, unread
from s4.precision import WITHOUT_FLOAT64
from s4.state import State

Sampler = Callable[[Tensor], Tensor]
Stop = Callable[[Tensor], Tensor]


def greedy(logits: Tensor) -> Tensor:
    """The sampler that takes the most likely tokens.

    Args:
        logits: (B, ..., vocabulary).

    Returns:
        tokens (B, ...).

    Raises:
        ValueError: logits of another shape.

    Examples:
        >>> greedy(torch.tensor([[0.1, 2.0, 0.3], [1.0, 0.0, 0.0]]))
        tensor([1, 0])
    """
    _check_logits(logits)
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
        top_p: draw from the fewest tokens that hold this share of the probability, of what top_k leaves
            (nucleus sampling, arXiv 1904.09751).
        generator: source of randomness, for draws that can be repeated.

    Returns:
        a function from logits (B, ..., vocabulary) to tokens (B, ...). It raises ValueError for logits of
        another shape, or that are no distribution: with NaN or inf, or -inf alone.

    Raises:
        ValueError, TypeError: an argument of the wrong kind; the message names it.

    Examples:
        >>> sample = categorical(temperature=0.8, top_k=2, generator=torch.Generator().manual_seed(0))
        >>> tokens = sample(torch.tensor([[0.9, 1.0, 1.2, 0.8]] * 100))
        >>> set(tokens.tolist())  # of the two most likely
        {1, 2}
    """
    check_number("temperature", temperature, 0, above=True)
    if top_k is not None:
        check_integer("top_k", top_k, 1)
    if top_p is not None:
        check_number("top_p", top_p, 0, above=True)
        if top_p > 1:
            raise ValueError(f"top_p must be at most 1, got {top_p}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")

    def sample(logits: Tensor) -> Tensor:
        _check_logits(logits)
        rows = logits.flatten(0, -2)
        largest = rows.amax(-1, keepdim=True)
        if not unread(rows) and not bool((fit := torch.isfinite(largest[:, 0])).all()):
            # Before multinomial, whose own check would leave a GPU unusable.
            raise ValueError(
                f"logits must be a distribution, got NaN, inf or only -inf in {int((~fit).sum())} rows"
            )
        dtype = torch.float32 if rows.device.type in WITHOUT_FLOAT64 else torch.float64
        p = torch.softmax((rows - largest).to(dtype) / max(temperature, torch.finfo(dtype).tiny), -1)
        p, token = p.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            p[:, top_k:] = 0
        if top_p is not None:
            p[p.cumsum(-1) - p >= top_p * p.sum(-1, keepdim=True)] = 0
        return token.gather(-1, torch.multinomial(p, 1, generator=generator)).view(logits.shape[:-1])

    return sample


def _check_logits(logits: Any) -> None:
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.shape[-1]:
        raise ValueError(f"logits must be a tensor of shape (batch, ..., vocabulary), got {kind_of(logits)}")


def check_generation(prompt: Any, sample: Any, stop: Any, pad: Any) -> None:
    """The arguments of `S4Model.generate` that mean nothing to the model itself."""
    if not isinstance(prompt, Tensor) or prompt.dim() < 2 or prompt.shape[1] < 1:
        raise ValueError(
            f"prompt must be a tensor of shape (batch, length of at least 1, ...), got {kind_of(prompt)}"
        )
    if sample is not None and not callable(sample):
        raise TypeError(f"sample must be a function of the decoder's output, got {sample!r}")
    if sample is categorical:
        raise TypeError(
            "sample must be a function of the decoder's output, got categorical: call categorical()"
        )
    if prompt.is_floating_point() and sample in (None, greedy):
        raise ValueError(
            f"sample must be a function from the decoder's output to the next inputs, {prompt.dtype} here, "
            f"got {'None' if sample is None else 'greedy'}, which chooses tokens"
        )
    if stop is not None and not callable(stop):
        if prompt.dim() > 2 or not isinstance(stop, Integral) or isinstance(stop, bool):
            takes = "a function" if prompt.dim() > 2 else "a token, or a function"
            raise TypeError(
                f"stop must be {takes} from inputs (batch, ...) to booleans (batch,), got {stop!r}"
            )
        check_integer("stop", int(stop), 0)
    if not isinstance(pad, Real) or not (prompt.is_floating_point() or isinstance(pad, Integral)):
        raise TypeError(f"pad must be a number as {prompt.dtype} has them, got {pad!r}")


def feed_back(
    step: Callable[[Tensor, State], tuple[Tensor, State]],
    last: Tensor,
    y: Tensor,
    state: State,
    sample: Sampler,
    stop: int | Stop | None,
    pad: float | int,
) -> Iterator[Tensor]:
    """Each output's sample (B, ...), which is the next input, until all sequences have ended.

    Args:
        step: from an input and the state before it to an output and the state after it.
        last: the last inputs (B, ...), of the shape of the next ones.
        y: their output.
        state: the state that it left.
        sample, stop, pad: those of `S4Model.generate`.
    """
    ended = torch.zeros_like(state.length, dtype=torch.bool)
    while True:
        with torch.no_grad():  # never held across a yield: the caller's code keeps its own gradient mode
            new = sample(y)
            if not isinstance(new, Tensor) or new.shape != last.shape:
                raise ValueError(f"sample must return the next inputs {kind_of(last)}, got {kind_of(new)}")
            met = None if stop is None else _meets(stop, new)
        if met is None:
            yield new
        else:
            yield new.masked_fill(ended.view(-1, *(1,) * (new.dim() - 1)), pad)
            ended = ended | met
            if bool(ended.all()):
                return
        with torch.no_grad():
            y, state = step(new, state)


def _meets(stop: int | Stop, new: Tensor) -> Tensor:
    """(B,), True where an input ends its sequence."""
    met = stop(new) if callable(stop) else new == stop
    if not isinstance(met, Tensor) or met.shape != new.shape[:1] or met.dtype != torch.bool:
        got = f"{met.dtype} of shape {tuple(met.shape)}" if isinstance(met, Tensor) else type(met).__name__
        raise ValueError(f"stop must return booleans ({len(new)},), one for each sequence, got {got}")
    return met
