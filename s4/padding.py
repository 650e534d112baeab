"""Batches of sequences of several lengths: packed into rows with resets, or padded."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from s4.checks import check_integer, check_integers, check_lengths, check_tensor, unread

__all__ = [
    "Packed",
    "left_padding",
    "pack",
    "resets_from_cu_seqlens",
    "resets_from_seq_idx",
    "unpack",
]

Sequences = Tensor | PackedSequence  # what layers, blocks and models take


class Packed(NamedTuple):
    """Sequences one behind the other in one row, as `pack` makes them.

    Attributes:
        u: inputs (1, total, ...).
        resets: (1, total) booleans, True at the first input of each sequence.
        lengths: a number for each sequence, by which `unpack` takes them apart again.

    Examples:
        >>> packed = pack([torch.randn(2, 16), torch.randn(3, 16)])
        >>> packed.u.shape, packed.lengths, packed.cu_seqlens
        (torch.Size([1, 5, 16]), (2, 3), tensor([0, 2, 5], dtype=torch.int32))
    """

    u: Tensor
    resets: Tensor
    lengths: tuple[int, ...]

    @property
    def cu_seqlens(self) -> Tensor:
        """(n + 1,) int32 on the device of u: where each sequence starts, and the total."""
        starts = accumulate(self.lengths, initial=0)
        return torch.tensor(list(starts), dtype=torch.int32, device=self.u.device)


def pack(sequences: Sequence[Tensor]) -> Packed:
    """One row of several sequences, for a causal or bidirectional layer, block or model that takes resets.

    `u, resets, lengths = pack(sequences)`, then `unpack(model(u, resets=resets), lengths)`: the outputs of
    each sequence as if it were alone. No input is wasted on padding. A model that pools has one output a
    row: with pooling="none" pool what `unpack` returns. A batch norm in training sees all of the row.

    Args:
        sequences: at least one, each (L_i, ...) with L_i from 0, of one dtype, device and shape behind L_i.

    Returns:
        u (1, total, ...), resets (1, total) of booleans, and the lengths L_i.

    Raises:
        TypeError, ValueError: no sequences, or some that do not go into one row.

    Examples:
        >>> documents = [torch.randn(n, 16) for n in (30, 7, 95)]
        >>> u, resets, lengths = pack(documents)
        >>> u.shape, lengths
        (torch.Size([1, 132, 16]), (30, 7, 95))
        >>> outputs = unpack(S4Layer(16)(u, resets=resets), lengths)
        >>> [y.shape for y in outputs]
        [torch.Size([30, 16]), torch.Size([7, 16]), torch.Size([95, 16])]
    """
    if not isinstance(sequences, Sequence) or isinstance(sequences, str):
        raise TypeError(f"sequences must be a list of tensors, got {type(sequences).__name__}")
    if not sequences:
        raise ValueError("sequences must hold at least one tensor, got none")
    for i, each in enumerate(sequences):
        check_tensor(f"sequences[{i}]", each)
        if not each.dim():
            raise ValueError(f"sequences[{i}] must have shape (length, ...), got ()")
        first = sequences[0]
        if (each.shape[1:], each.dtype, each.device) != (first.shape[1:], first.dtype, first.device):
            got, want = _kind(each), _kind(first)
            raise ValueError(f"sequences[{i}] must be {want}, as sequences[0] is, got {got}")
    starts = [torch.arange(len(each), device=each.device) == 0 for each in sequences]
    return Packed(torch.cat(list(sequences))[None], torch.cat(starts)[None], tuple(map(len, sequences)))


def _kind(x: Tensor) -> str:
    """What must be equal in one row, as a message says it."""
    shape = ", ".join(map(str, ("length", *x.shape[1:])))
    return f"({shape}) of {x.dtype} on {x.device}"


def unpack(y: Tensor, lengths: Sequence[int] | Tensor) -> list[Tensor]:
    """The sequences of a row, as views of it: what `pack` has put together.

    Args:
        y: (1, total, ...), such as the outputs of a model; what lies past the last sequence is left out.
        lengths: of the sequences, (n,) integers from 0; for `cu_seqlens` they are `cu_seqlens.diff()`. Those
            of a tensor on a GPU are waited for.

    Returns:
        n tensors (L_i, ...).

    Raises:
        TypeError, ValueError: a wrong shape or dtype, or lengths that the row does not have.

    Examples:
        >>> [y.flatten().tolist() for y in unpack(torch.arange(5)[None, :, None], [2, 3])]
        [[0, 1], [2, 3, 4]]
    """
    check_tensor("y", y)
    if y.dim() < 2 or y.shape[0] != 1:
        raise ValueError(f"y must have shape (1, total, ...), got {tuple(y.shape)}")
    if isinstance(lengths, Tensor):
        check_integers("lengths", lengths, "sequences")
        lengths = lengths.tolist()
    elif not isinstance(lengths, Sequence) or isinstance(lengths, str):
        raise TypeError(f"lengths must be integers or a tensor of them, got {type(lengths).__name__}")
    for i, length in enumerate(lengths):
        check_integer(f"lengths[{i}]", length, 0)
    if sum(lengths) > y.shape[1]:
        raise ValueError(
            f"lengths must add up to at most {y.shape[1]}, what y has, got {sum(lengths)}; of cu_seqlens "
            "they are cu_seqlens.diff(), and y is that of a model with pooling='none'"
        )
    return [y[0, start:end] for start, end in pairwise(accumulate(lengths, initial=0))]


def resets_from_cu_seqlens(cu_seqlens: Tensor, L: int) -> Tensor:
    """Resets of a packed row from where its sequences start, as FlashAttention and Mamba are told of them.

    `cu_seqlens` of `flash_attn_varlen_func` (github.com/Dao-AILab/flash-attention): 0, the lengths added up
    one by one, and so the total at the end.

    Args:
        cu_seqlens: (n + 1,) integers that begin with 0 and never fall. A sequence of no inputs has no reset.
        L: length of the row, at least the total. Inputs past the total are padding: a reset at the first
            of them keeps it apart, and its outputs mean nothing.

    Returns:
        (1, L) booleans, True at the first input of each sequence, also of the row's first one. So a state
        that is passed with these resets counts for nothing.

    Raises:
        TypeError, ValueError: another shape or dtype, or, where the numbers can be read, other numbers.

    Examples:
        >>> resets_from_cu_seqlens(torch.tensor([0, 2, 5]), 5).int()
        tensor([[1, 0, 1, 0, 0]], dtype=torch.int32)
    """
    check_integer("L", L, 0)
    check_integers("cu_seqlens", cu_seqlens, "sequences + 1")
    if not len(cu_seqlens):
        raise ValueError("cu_seqlens must begin with 0, got no numbers")
    starts = cu_seqlens.long()
    if not unread(starts):
        wrong = (starts[:1] != 0).any() | (starts.diff() < 0).any() | (starts[-1:] > L).any()
        if bool(wrong):
            raise ValueError(f"cu_seqlens must rise from 0 to at most L={L}, got {cu_seqlens.tolist()}")
    # Where the row has no more inputs a start is of none: the place behind the last takes it.
    row = torch.zeros(L + 1, dtype=torch.bool, device=starts.device)
    return row.index_fill(0, starts, True)[None, :L]


def resets_from_seq_idx(seq_idx: Tensor, before: Tensor | None = None) -> Tensor:
    """Resets of packed rows from the sequence that each input is of, as Mamba2 and causal-conv1d are told.

    `seq_idx` of github.com/state-spaces/mamba and github.com/Dao-AILab/causal-conv1d: inputs that stand
    side by side belong together where they have one number.

    Args:
        seq_idx: (B, L) integers. All below 0 are padding, which is a segment like any other: outputs there
            mean nothing, and a state after it is not that of a sequence.
        before: (B,) integers, the sequences that a state passed with these resets is of. Without it the first
            inputs of all rows go on from that state.

    Returns:
        (B, L) booleans, True where the number is another than that of the input before. At the first input
        that is where it is another than `before`; without it False, which is the same where no state is
        passed, and where one is the next piece of a row goes on.

    Raises:
        TypeError, ValueError: another shape or dtype.

    Examples:
        >>> resets_from_seq_idx(torch.tensor([[0, 0, 1, 1, 1]])).int()
        tensor([[0, 0, 1, 0, 0]], dtype=torch.int32)
        >>> resets_from_seq_idx(torch.tensor([[2, 2, 3]]), before=torch.tensor([1])).int()
        tensor([[1, 0, 1]], dtype=torch.int32)
    """
    check_integers("seq_idx", seq_idx, "batch", "length")
    index = seq_idx.long().clamp(min=-1)
    if before is None:
        first = index[:, :1]
    else:
        check_integers("before", before, "batch")
        if before.shape != seq_idx.shape[:1] or before.device != seq_idx.device:
            raise ValueError(
                f"before must have shape ({seq_idx.shape[0]},) on {seq_idx.device}, got "
                f"{tuple(before.shape)} on {before.device}"
            )
        first = before.long().clamp(min=-1)[:, None]
    return index != torch.cat([first, index], 1)[:, : index.shape[1]]


def left_padding(lengths: Tensor, L: int) -> Tensor:
    """Resets of left-padded sequences, which all end at the last input.

    Args:
        lengths: (B,) integers in 0..L, what each sequence has of the L inputs: `mask.sum(1)` of a mask.
        L: length of the batch.

    Returns:
        (B, L) booleans, True at the first input of each sequence, L - lengths; in the row of an empty one
        nowhere. What stands before, a state too, does not reach the sequence; a bidirectional layer cuts both
        ways. Outputs before it mean nothing, nor does the state of an empty one.

    Raises:
        TypeError, ValueError: another shape or dtype, or, where the numbers can be read, other numbers.

    Examples:
        >>> left_padding(torch.tensor([3, 2]), 4).int()
        tensor([[0, 1, 0, 0],
                [0, 0, 1, 0]], dtype=torch.int32)
    """
    check_integer("L", L, 0)
    check_integers("lengths", lengths, "batch")
    lengths = check_lengths(lengths, len(lengths), L, lengths)
    return torch.arange(L, device=lengths.device) == L - lengths[:, None]


def through_padded(
    forward: Callable[..., Any],
    module: nn.Module,
    packed: PackedSequence,
    state: Any,
    lengths: Tensor | None,
    resets: Tensor | None,
    rate: float | Tensor,
    return_state: bool,
) -> Any:
    """What a layer, block or model makes of a PackedSequence of torch.nn.utils.rnn: outputs packed alike.

    `forward` is that of its class: the module itself was called, and its hooks run once.
    Rows of the state, of resets and of rate are in the order that the sequences were packed from, as those of
    `h_0` of nn.GRU are. What a model pools is a plain tensor.
    """
    if lengths is not None:
        raise ValueError("lengths must be left out with a PackedSequence, which has its own")
    u, own = pad_packed_sequence(packed, batch_first=True)
    own = own.to(u.device)
    out = forward(module, u, state, lengths=own, resets=resets, rate=rate, return_state=return_state)
    y, *after = out if return_state else (out,)
    if getattr(module, "pooling", "none") == "none":
        order = packed.sorted_indices
        rows, own = (y, own) if order is None else (y[order], own[order])
        again = pack_padded_sequence(rows, own.cpu(), batch_first=True)
        y = PackedSequence(again.data, packed.batch_sizes, order, packed.unsorted_indices)
    return (y, *after) if after else y


def padding(lengths: Tensor, L: int) -> Tensor:
    """(B, L), True past the end of each right-padded sequence."""
    return torch.arange(L, device=lengths.device) >= lengths[:, None]


def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """x (B, L, ...) with zeros past the lengths, also where it holds NaN or tokens that do not exist."""
    past = padding(lengths, x.shape[1]).view(*x.shape[:2], *(1,) * (x.dim() - 2))
    return torch.where(past, x.new_zeros(()), x)  # half the traffic of masked_fill, which copies first


def last_start(resets: Tensor, lengths: Tensor | None) -> Tensor:
    """Where the last segment of each sequence starts, (B,), within its length."""
    t = torch.arange(resets.shape[1], device=resets.device)
    there = resets if lengths is None else resets & (t < lengths[:, None])
    return torch.where(there, t, 0).amax(1)


def right_aligned(x: Tensor, lengths: Tensor) -> Tensor:
    """Right-padded x (B, L, H), each sequence moved to the right, so that all end with their last input."""
    L = x.shape[1]
    source = torch.arange(L, device=x.device)[:, None] - (L - lengths[:, None, None])
    return x.gather(1, source.clamp(min=0).expand_as(x)).masked_fill(source < 0, 0)


def last_steps(x: Tensor, some: int, T: int) -> Tensor:
    """The last T steps of x (B, L, H), zero but for the last few: of one size, however many those are."""
    L = x.shape[1]
    at = torch.arange(L - T, L, device=x.device)
    source = x if L > 0 else x.new_zeros(x.shape[0], 1, x.shape[2])
    return torch.where((at >= L - some)[:, None], source.index_select(1, at.clamp(min=0)), 0)
