"""S4Cache: a State where transformers keeps keys and values. Unmasked: sequences without their padding."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from s4.checks import check_tensor, unread
from s4.padding import zero_padding
from s4.state import State
from s4.transformers.installed import Cache


class S4Cache(Cache):
    """The state of a model of s4 as `generate` passes it on: of one size, whatever came before.

    A call of the model with it goes on from `state`, an `s4.State` or None before any input, and leaves
    there the state after its own inputs.

    Args:
        state: to go on from, as `S4Model.forward` and `step` return it too.
        seen: how many positions came before, with their padding; from the state if not given.

    Examples:
        >>> from s4.transformers import S4Config, S4ForCausalLM
        >>> model = S4ForCausalLM(S4Config(vocab_size=50, hidden_size=16, num_hidden_layers=1)).eval()
        >>> cache = S4Cache()
        >>> first = model(torch.randint(50, (2, 100)), past_key_values=cache)
        >>> cache.seen, cache.state.layers[0].shape
        (100, torch.Size([2, 16, 64]))
    """

    def __init__(self, state: State | None = None, seen: int | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        self.seen = seen if seen is not None else 0 if state is None else int(state.length.amax())

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"S4Cache(layers={len(self)}, seen={self.seen})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions came before.

        Args:
            layer_idx: not looked at: all layers have seen the same.

        Returns:
            the number, with padding.
        """
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The number of positions that the cache can hold.

        Args:
            layer_idx: not looked at.

        Returns:
            -1, as there is no limit.
        """
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether there is a state to go on from.

        Args:
            layer_idx, state_idx: not looked at.

        Returns:
            False before any input.
        """
        return self.state is not None

    @property
    def batch_size(self) -> int:
        """Of the state; -1 before any input."""
        return -1 if self.state is None else int(self.state.length.shape[0])

    @property
    def is_compileable(self) -> bool:
        """False: `generate` does not compile by itself."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether there is a state to go on from."""
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """False: a state cannot forget its last inputs."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """False: `generate` leaves out the tokens of a prompt that a state has seen."""
        return [False]

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a state cannot forget its last inputs.

        Args:
            tokens_to_remove: not looked at.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("S4Cache cannot be cropped: a state cannot forget its last inputs")

    def activate_past_recording(self) -> None:
        """Refused, as `crop` is.

        Raises:
            NotImplementedError: always.
        """
        self.crop(0)

    def reset(self) -> None:
        """To before any input."""
        self.state, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take some rows of the batch, each any number of times: the beams that go on.

        Args:
            beam_idx: (rows,) integers.
        """
        if self.state is not None:
            rows = [x.index_select(0, beam_idx.to(x.device)) for x in self.state.layers]
            total, length = (
                x.index_select(0, beam_idx.to(x.device)) for x in (self.state.total, self.state.length)
            )
            self.state = State(tuple(rows), total, length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take some rows of the batch, as `reorder_cache` does.

        Args:
            indices: (rows,) integers.
        """
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take each row of the batch so many times, one below the other.

        Args:
            repeats: how many times.
        """
        if self.state is not None:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))


def given_cache(cache: Any, past_key_values: Any) -> S4Cache | None:
    """The cache that a model was given, under one of its two names.

    Raises:
        ValueError: both. TypeError: one of another kind.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument, got both")
    found = past_key_values if cache is None else cache
    if isinstance(found, State):
        return S4Cache(found)
    if found is not None and not isinstance(found, S4Cache):
        raise TypeError(f"cache must be an S4Cache or an s4.State, got {type(found).__name__}")
    return found


class Unmasked(NamedTuple):
    """Where the sequences of a batch are: inputs that are masked are left out, wherever they stand.

    Shapes: mask (B, L); order (B, L), the positions of what is not masked, then the others; place (B, L), for
    each position its number in that order; lengths (B,).
    """

    mask: Tensor
    order: Tensor
    place: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, attention_mask: Any, batch: int, L: int, goes_on: bool) -> "Unmasked | None":
        """From a mask (B, L), or a longer one that ends there where a state goes on; None without padding.

        Raises:
            TypeError, ValueError: no tensor, or one of another shape.
        """
        if attention_mask is None:
            return None
        check_tensor("attention_mask", attention_mask)
        shape = tuple(attention_mask.shape)
        longer = goes_on and len(shape) == 2 and shape[0] == batch and shape[1] > L
        if shape != (batch, L) and not longer:
            raise ValueError(f"attention_mask must have shape ({batch}, {L}), got {shape}")
        mask = attention_mask[:, shape[1] - L :] != 0
        if not unread(mask) and bool(mask.all()):
            return None
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        place = torch.empty_like(order).scatter_(
            1, order, torch.arange(L, device=order.device).expand_as(order)
        )
        return cls(mask, order, place, mask.sum(1))


def together(u: Tensor, unmasked: Unmasked) -> Tensor:
    """Inputs (B, L, ...) with what is not masked in front, and zeros behind."""
    index = unmasked.order.view(*unmasked.order.shape, *(1,) * (u.dim() - 2)).expand_as(u)
    return zero_padding(u.gather(1, index), unmasked.lengths)


def apart(y: Tensor, unmasked: Unmasked) -> Tensor:
    """Outputs (B, L, H) at the positions of their inputs again, and zeros where those are masked."""
    place, mask = unmasked.place.to(y.device), unmasked.mask.to(y.device)
    return y.gather(1, place[..., None].expand_as(y)).masked_fill(~mask[..., None], 0)
