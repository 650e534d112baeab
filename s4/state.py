"""State: what a stack of blocks carries from one input to the next."""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from s4.checks import unread


class State(NamedTuple):
    """The state of a whole stack after some inputs, as `S4Model.forward` and `step` return it.

    A named tuple, but with no arithmetic: `torch.save`, `torch.load`, pickles, copies, `torch.compile` and
    `torch.export` take it as it is. No method changes the state that it is called on.

    Attributes:
        layers: one tensor (B, H, N) a block, the state of its layer.
        total: (B, d_model), the sum of the last block's outputs so far, for mean pooling.
        length: (B,) integers, the number of inputs so far.

    Examples:
        >>> model = S4Model(nn.Linear(3, 16), [S4Block(S4Layer(16))], nn.Linear(16, 2), pooling="mean")
        >>> state = model.initial_state(batch_size=4)
        >>> y, state = model.step(torch.randn(4, 3), state)
        >>> state.layers[0].shape, state.length
        (torch.Size([4, 16, 64]), tensor([1, 1, 1, 1]))
        >>> state.select([0, 0, 2]).length.shape  # rows 0, again 0, and 2
        torch.Size([3])
    """

    layers: tuple[Tensor, ...]
    total: Tensor
    length: Tensor

    def select(self, rows: Tensor | Sequence[int] | slice) -> "State":
        """Some rows of the batch, in any order and any number of times: what goes on in a beam search.

        Args:
            rows: a slice, or a one-dimensional sequence or tensor of row numbers or of booleans.

        Returns:
            the state of these rows.

        Raises:
            ValueError: rows of another kind.
            IndexError: a row that does not exist. Numbers on a GPU are not looked at, as that would wait for
                it.

        Examples:
            >>> state = State((torch.zeros(3, 2, 4),), torch.zeros(3, 2), torch.tensor([5, 6, 7]))
            >>> state.select([2, 0]).length
            tensor([7, 5])
            >>> state.select(state.length > 5).length
            tensor([6, 7])
        """
        index = _index(rows, self.length)
        return State(tuple(x[index] for x in self.layers), self.total[index], self.length[index])

    def reset(self, rows: Tensor | Sequence[int] | slice) -> "State":
        """The same batch with some rows as before any input, whatever they held: new sequences start there.

        Args:
            rows: as those of `select`, with the same errors.

        Returns:
            the state of all rows, zero in these.

        Examples:
            >>> state = State((torch.ones(3, 2, 4),), torch.ones(3, 2), torch.tensor([5, 6, 7]))
            >>> done = torch.tensor([False, True, False])
            >>> state.reset(done).length
            tensor([5, 0, 7])
        """
        new = torch.zeros_like(self.length, dtype=torch.bool)
        new[_index(rows, self.length)] = True
        layers = tuple(torch.where(new[:, None, None], x.new_zeros(()), x) for x in self.layers)
        total = torch.where(new[:, None], self.total.new_zeros(()), self.total)
        return State(layers, total, self.length.masked_fill(new, 0))

    def detach(self) -> "State":
        """The same values without their history: where backpropagation through time ends.

        Returns:
            a state that shares memory with this one.

        Examples:
            >>> state = State((torch.zeros(3, 2, 4, requires_grad=True),), torch.zeros(3, 2), torch.zeros(3))
            >>> state.detach().layers[0].requires_grad
            False
        """
        return State(tuple(x.detach() for x in self.layers), self.total.detach(), self.length.detach())

    def clone(self) -> "State":
        """A copy in memory of its own, through which gradients flow as through `Tensor.clone`.

        Returns:
            the copy.

        Examples:
            >>> state = State((torch.zeros(1, 2, 4),), torch.zeros(1, 2), torch.tensor([5]))
            >>> copy = state.clone()
            >>> copy.length[0] = 0
            >>> state.length
            tensor([5])
        """
        return State(tuple(x.clone() for x in self.layers), self.total.clone(), self.length.clone())

    def to(
        self, device: torch.device | torch.dtype | str | int | None = None, dtype: torch.dtype | None = None
    ) -> "State":
        """On another device, in another floating-point dtype, or both; `length` stays an integer.

        Args:
            device: a device or its name; or a dtype, as `Tensor.to` takes one: `state.to(torch.float64)`.
            dtype: of `layers` and `total`.

        Returns:
            the state there.

        Raises:
            ValueError: no device.
            TypeError: a dtype that is not of floating-point numbers.

        Examples:
            >>> state = State((torch.zeros(1, 2, 4),), torch.zeros(1, 2), torch.tensor([5]))
            >>> state.to("cpu", torch.float64).total.dtype
            torch.float64
        """
        if isinstance(device, torch.dtype) and dtype is None:
            device, dtype = None, device
        try:
            device = None if device is None else torch.device(device)  # type: ignore[arg-type]
        except (TypeError, RuntimeError):
            raise ValueError(f"device must be a torch.device or the name of one, got {device!r}") from None
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
        layers = tuple(x.to(device=device, dtype=dtype) for x in self.layers)
        return State(layers, self.total.to(device=device, dtype=dtype), self.length.to(device=device))

    @staticmethod
    def cat(states: Sequence["State"]) -> "State":
        """One batch of several, one below the other: the inverse of `select`.

        Args:
            states: one or more, alike in all but their batch.

        Returns:
            the state of all their rows.

        Raises:
            TypeError: something other than states.
            ValueError: no states, or states that differ in more than their batch.

        Examples:
            >>> state = State((torch.zeros(3, 2, 4),), torch.zeros(3, 2), torch.tensor([5, 6, 7]))
            >>> State.cat([state.select([2]), state]).length
            tensor([7, 5, 6, 7])
        """
        if isinstance(states, State) or not isinstance(states, Sequence):
            raise TypeError(f"states must be a sequence of State, got {type(states).__name__}")
        if not all(isinstance(state, State) for state in states):
            raise TypeError(f"states must be a sequence of State, got {[type(s).__name__ for s in states]}")
        parts = [x for state in states for x in (*state.layers, state.total, state.length)]
        if odd := {type(x).__name__ for x in parts if not isinstance(x, Tensor)}:
            raise TypeError(f"states must hold tensors, got {', '.join(sorted(odd))}")
        kinds = [[(*x.shape[1:], x.dtype, x.device) for x in (*s.layers, s.total, s.length)] for s in states]
        if not kinds or any(kind != kinds[0] for kind in kinds):
            got = "; ".join(map(_described, states)) or "none"
            raise ValueError(f"states must be one or more, alike in all but their batch, got {got}")
        layers = tuple(torch.cat(parts) for parts in zip(*(s.layers for s in states), strict=True))
        return State(layers, torch.cat([s.total for s in states]), torch.cat([s.length for s in states]))


def _no_arithmetic(state: State, other: Any) -> NoReturn:
    raise TypeError(
        f"a State has no arithmetic, got {type(other).__name__}: State.cat puts batches together, and "
        "state._replace(layers=...) changes a part"
    )


for _name in ("__add__", "__radd__", "__mul__", "__rmul__"):  # which join and repeat the parts of a tuple
    setattr(State, _name, _no_arithmetic)
# What torch.load may make by its defaults; what a saved program of torch.export calls this kind of tree.
torch.serialization.add_safe_globals([State])
pytree._register_namedtuple(State, serialized_type_name="s4.State")


def _index(rows: Any, length: Tensor) -> Tensor | slice:
    """What indexes the batch of `length` (B,) by these rows."""
    if isinstance(rows, slice):
        parts = [part for part in (rows.start, rows.stop, rows.step) if part is not None]
        if all(hasattr(part, "__index__") for part in parts) and (rows.step is None or rows.step > 0):
            return rows
    try:
        index = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        index = torch.zeros(())
    if index.dim() != 1 or (len(index) and (index.is_floating_point() or index.is_complex())):
        raise ValueError(
            f"rows must be a slice forwards, or row numbers or booleans in one dimension, got {rows!r}"
        )
    batch = length.shape[0]
    if index.dtype == torch.bool:
        if index.shape[0] != batch:
            raise ValueError(f"rows must be {batch} booleans, one a row of the batch, got {index.shape[0]}")
        return index.to(length.device)
    index = index.long()
    if index.device.type == "cpu" and not unread(index):
        outside = index[(index < -batch) | (index >= batch)]
        if len(outside):
            raise IndexError(f"rows must lie in {-batch}..{batch - 1}, got {outside.tolist()}")
    return index.to(length.device)


def _described(state: State) -> str:
    shapes = [tuple(x.shape) for x in state.layers]
    total, length = state.total, state.length
    return f"{len(shapes)} layers {shapes} of {total.dtype} and length of {length.dtype} on {total.device}"
