"""Resets of packed and of left-padded rows, and sequences packed and taken apart, against plain loops."""

from collections.abc import Callable
from itertools import groupby

import pytest
import torch
from refusals import refuses
from torch import Tensor

from s4 import S4Layer, padding
from s4.padding import (
    Packed,
    left_padding,
    pack,
    resets_from_cu_seqlens,
    resets_from_seq_idx,
    unpack,
)

INTEGERS = [torch.int32, torch.int64]
# cu_seqlens, the length of the row, where a segment begins
ROWS = {
    "one": ([0, 5], 5, [0]),
    "several": ([0, 2, 3, 7], 7, [0, 2, 3]),
    "padding behind": ([0, 2, 3], 6, [0, 2, 3]),
    "empty sequences": ([0, 0, 2, 2, 2, 5, 5], 5, [0, 2]),
    "empty ones before padding": ([0, 2, 2, 2], 4, [0, 2]),
    "all empty": ([0, 0, 0], 3, [0]),
    "no sequences": ([0], 2, [0]),
    "no inputs": ([0, 0], 0, []),
}
MIXED = [3, 0, 1, 0, 0, 4, 0]


def at(resets: Tensor) -> list[list[int]]:
    """Where each row has a reset."""
    assert resets.dtype == torch.bool
    return [row.nonzero().flatten().tolist() for row in resets]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(("cu", "L", "want"), ROWS.values(), ids=ROWS)
def test_resets_from_cu_seqlens(cu: list[int], L: int, want: list[int], dtype: torch.dtype) -> None:
    resets = resets_from_cu_seqlens(torch.tensor(cu, dtype=dtype), L)
    assert resets.shape == (1, L)
    assert at(resets) == [want]


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.uint8])
def test_resets_from_seq_idx(dtype: torch.dtype) -> None:
    """A segment begins behind each run of one number; the first goes on from what was before the row."""
    rows = [[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3], [7, 0, 7, 0, 0, 7]]
    want = [[sum(len(list(run)) for run in runs) for runs in prefixes(row)] for row in rows]
    assert want == [[2, 5], [], [1, 2, 3, 5]]
    index = torch.tensor(rows, dtype=dtype)
    assert at(resets_from_seq_idx(index)) == want
    before = torch.tensor([0, 2, 7], dtype=dtype)
    assert at(resets_from_seq_idx(index, before)) == [[2, 5], [0], [1, 2, 3, 5]]


def prefixes(row: list[int]) -> list[list[list[int]]]:
    """The runs before each run but the first."""
    runs = [list(run) for _, run in groupby(row)]
    return [runs[:i] for i in range(1, len(runs))]


def test_padding_of_seq_idx_is_one_segment() -> None:
    index = torch.tensor([[-1, -2, 0, 0, -1, -5], [4, -1, -1, 4, 4, 4]])
    assert at(resets_from_seq_idx(index)) == [[2, 4], [1, 3]]
    assert at(resets_from_seq_idx(index, torch.tensor([-3, -1]))) == [[2, 4], [0, 1, 3]]


def test_pieces_of_a_row_of_seq_idx_have_the_resets_of_the_whole() -> None:
    index = torch.randint(0, 2, (4, 12))
    whole = resets_from_seq_idx(index)
    pieces, before = [], None
    for piece in index.split([1, 5, 0, 6], dim=1):
        pieces.append(resets_from_seq_idx(piece, before))
        before = piece[:, -1] if piece.shape[1] else before
    assert torch.equal(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.uint8])
def test_left_padding(dtype: torch.dtype) -> None:
    resets = left_padding(torch.tensor([5, 1, 0, 3], dtype=dtype), 5)
    assert at(resets) == [[0], [4], [], [2]]
    assert left_padding(torch.zeros(2, dtype=dtype), 0).shape == (2, 0)
    assert left_padding(torch.zeros(0, dtype=dtype), 3).shape == (0, 3)


@pytest.mark.parametrize("lengths", [[4], [0], [2, 3], MIXED, [0, 0]], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_unpack_takes_apart_what_pack_put_together(lengths: list[int], shape: tuple[int, ...]) -> None:
    sequences = [torch.randn(length, *shape).requires_grad_() for length in lengths]
    packed = pack(sequences)
    assert isinstance(packed, Packed)
    u, resets, told = packed
    assert told == tuple(lengths)
    assert u.shape == (1, sum(lengths), *shape)
    assert at(resets) == [[sum(lengths[:i]) for i, length in enumerate(lengths) if length]]
    assert packed.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packed.cu_seqlens.dtype == torch.int32
    assert torch.equal(resets, resets_from_cu_seqlens(packed.cu_seqlens, sum(lengths)))
    back = [unpack(u, of) for of in (told, list(told), torch.tensor(told), packed.cu_seqlens.diff())]
    for each in back:
        assert all(torch.equal(x, s) for x, s in zip(each, sequences, strict=True))
    # A view, and differentiable: the gradient of each is its own.
    sum((i + 1) * each.sum() for i, each in enumerate(back[0])).backward()
    for i, each in enumerate(sequences):
        assert torch.equal(each.grad, torch.full_like(each, i + 1))


def test_tokens_are_packed_as_they_are_and_padding_is_left_out() -> None:
    u, _, lengths = pack([torch.tensor([5, 6]), torch.tensor([7])])
    assert (u.dtype, u.tolist()) == (torch.int64, [[5, 6, 7]])
    padded = torch.cat([u, u], 1)
    assert [each.tolist() for each in unpack(padded, lengths)] == [[5, 6], [7]]


@pytest.mark.parametrize("mode", ["scan", "fft"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_each_sequence_of_a_row_is_as_if_alone(mode: str, bidirectional: bool) -> None:
    """Packed, with padding behind; then left-padded, with a nan before each: no number reaches another.

    In float64, to rounding; a convolution has that of the whole row, and nothing before a nan.
    """
    layer = S4Layer(3, 4, mode=mode, bidirectional=bidirectional, dtype=torch.float64)
    sequences = [torch.randn(length, 3, dtype=torch.float64) for length in (5, 0, 1, 70, 12)]
    alone = [layer(each[None])[0] for each in sequences]
    packed = pack(sequences)
    u = torch.nn.functional.pad(packed.u, (0, 0, 0, 4), value=9.0)
    resets = resets_from_cu_seqlens(packed.cu_seqlens, u.shape[1])
    index = torch.tensor([i for i, length in enumerate(packed.lengths) for _ in range(length)] + [-1] * 4)
    assert torch.equal(resets[:, 1:], resets_from_seq_idx(index[None])[:, 1:])
    for got, want in zip(unpack(layer(u, resets=resets), packed.lengths), alone, strict=True):
        assert torch.allclose(got, want, rtol=0, atol=1e-9)
    before = torch.nan if mode == "scan" else 7.0
    pads = [torch.nn.functional.pad(each, (0, 0, 70 - len(each), 0), value=before) for each in sequences]
    resets = left_padding(torch.tensor(packed.lengths), 70)
    for got, want in zip(layer(torch.stack(pads), resets=resets), alone, strict=True):
        assert torch.allclose(got[70 - len(want) :], want, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("unchecked")
def test_one_graph_for_all_numbers_and_lengths() -> None:
    """Compiled, numbers are not looked at, and no length is a constant."""

    def of(cu: Tensor, index: Tensor, before: Tensor, lengths: Tensor, u: Tensor, v: Tensor) -> list[Tensor]:
        L = index.shape[1]
        row, resets, told = pack([u, v])
        parts = unpack(2 * row, told)
        found = [resets_from_cu_seqlens(cu, L), left_padding(lengths, L), resets, *parts]
        return [*found, resets_from_seq_idx(index), resets_from_seq_idx(index, before)]

    compiled = torch.compile(of, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        # All unequal: torch takes equal ones for one.
        for batch, L, m, n in ((2, 6, 7, 8), (3, 9, 20, 2), (12, 13, 2, 30)):
            cu, lengths = torch.tensor([0, 1, 1, L - batch, L]), torch.arange(batch)
            index, before = torch.randint(-1, 2, (batch, L)), torch.randint(-1, 2, (batch,))
            inputs = cu, index, before, lengths, torch.randn(m, 4), torch.randn(n, 4)
            for got, want in zip(compiled(*inputs), of(*inputs), strict=True):
                assert torch.equal(got, want)


def test_devices_without_numbers() -> None:
    """Shapes are told of tensors that have no numbers to look at."""
    with torch.device("meta"):
        index, cu = torch.zeros(3, 7, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        sequences = [torch.zeros(2, 3), torch.zeros(5, 3)]
    found = [resets_from_cu_seqlens(cu, 7), resets_from_seq_idx(index), left_padding(index[:, 0], 7)]
    u, resets, lengths = pack(sequences)
    assert [tuple(x.shape) for x in (*found, u, resets)] == [(1, 7), (3, 7), (3, 7), (1, 7, 3), (1, 7)]
    assert all(x.is_meta for x in (*found, u, resets))
    assert [tuple(x.shape) for x in unpack(u, lengths)] == [(2, 3), (5, 3)]


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


CU, IDX, LEFT = resets_from_cu_seqlens, resets_from_seq_idx, left_padding
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "cu a list": (lambda: CU([0, 2], 2), TypeError, "cu_seqlens.*integers.*list"),
    "cu floats": (lambda: CU(torch.zeros(2), 2), TypeError, "cu_seqlens.*float32"),
    "cu a matrix": (lambda: CU(ints(0, 2)[None], 2), ValueError, r"cu_seqlens.*sequences \+ 1.*\(1, 2\)"),
    "cu of nothing": (lambda: CU(ints(), 2), ValueError, "cu_seqlens.*begin with 0"),
    "cu from 1": (lambda: CU(ints(1, 2), 2), ValueError, r"cu_seqlens.*0 to at most L=2.*\[1, 2\]"),
    "cu that falls": (lambda: CU(ints(0, 3, 2), 4), ValueError, r"cu_seqlens.*\[0, 3, 2\]"),
    "cu past L": (lambda: CU(ints(0, 3), 2), ValueError, r"cu_seqlens.*L=2.*\[0, 3\]"),
    "cu that comes back": (lambda: CU(ints(0, 9, 2), 4), ValueError, r"\[0, 9, 2\]"),
    "L below 0": (lambda: CU(ints(0), -1), ValueError, "L must be at least 0"),
    "L a float": (lambda: CU(ints(0), 2.0), TypeError, r"L must be an integer, got 2\.0"),
    "idx a row": (lambda: IDX(ints(0, 1)), ValueError, r"seq_idx.*\(batch, length\).*\(2,\)"),
    "idx booleans": (lambda: IDX(torch.ones(1, 2, dtype=torch.bool)), TypeError, "seq_idx.*bool"),
    "before of one row": (lambda: IDX(ints(0, 1)[:, None], ints(0)), ValueError, r"before.*\(2,\).*\(1,\)"),
    "before a number": (lambda: IDX(ints(0)[None], 0), TypeError, "before.*int"),
    "left a list": (lambda: LEFT([2], 3), TypeError, "lengths.*list"),
    "left a matrix": (lambda: LEFT(ints(2)[None], 3), ValueError, r"lengths.*\(1, 1\)"),
    "left too long": (lambda: LEFT(ints(2, 4), 3), ValueError, r"lengths.*0\.\.3.*\[2, 4\]"),
    "left below 0": (lambda: LEFT(ints(-1), 3), ValueError, r"lengths.*\[-1\]"),
    "pack nothing": (lambda: pack([]), ValueError, "sequences.*at least one"),
    "pack a tensor": (lambda: pack(torch.zeros(2, 3)), TypeError, "sequences.*list.*Tensor"),
    "pack numbers": (lambda: pack([ints(1), 2]), TypeError, r"sequences\[1\].*int"),
    "pack scalars": (lambda: pack([torch.tensor(1)]), ValueError, r"sequences\[0\].*\(length, \.\.\.\)"),
    "pack widths": (
        lambda: pack([torch.zeros(2, 3), torch.zeros(2, 4)]),
        ValueError,
        r"sequences\[1\].*\(length, 3\).*\(length, 4\)",
    ),
    "pack dtypes": (lambda: pack([ints(1), ints(1).int()]), ValueError, r"sequences\[1\].*int64.*int32"),
    "pack devices": (lambda: pack([ints(1), ints(1).to("meta")]), ValueError, r"sequences\[1\].*cpu.*meta"),
    "unpack two rows": (lambda: unpack(torch.zeros(2, 3), [3]), ValueError, r"y.*\(1, total, \.\.\.\)"),
    "unpack a list": (lambda: unpack([1, 2], [2]), TypeError, "y.*list"),
    "unpack too many": (lambda: unpack(torch.zeros(1, 3), [2, 2]), ValueError, "lengths.*at most 3.*4"),
    "unpack below 0": (lambda: unpack(torch.zeros(1, 3), [3, -1]), ValueError, r"lengths\[1\].*-1"),
    "unpack a number": (lambda: unpack(torch.zeros(1, 3), 3), TypeError, "lengths.*int"),
    "unpack floats": (lambda: unpack(torch.zeros(1, 3), torch.ones(2)), TypeError, "lengths.*float32"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "kind", "match"), WRONG.values(), ids=WRONG)
def test_what_is_refused(call: Callable[[], object], kind: type[Exception], match: str) -> None:
    refuses(kind, match, call)


def test_names_are_public() -> None:
    import s4

    assert s4.padding is padding
