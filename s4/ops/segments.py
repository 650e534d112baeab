"""Sequences with resets, laid out so that what works on whole sequences never carries across one.

A segment goes from one reset to the next. A scan gives each segment chunks of its own, a convolution a row of
its own; what a segment does not fill holds zeros. Nothing is subtracted, so no digit is lost to another
segment, and no nan leaves its own.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_SINGLE = 4  # what a flop of a product with few rows costs, in flops of one with many


class Chunks(NamedTuple):
    """Sequences (B, L, ...) in chunks of T slots, c for each, none with inputs of two segments.

    Shapes: table (3, B, c), of each chunk its first input, how many it holds, and whether it is fresh: no
    state passes from the chunk before, as it starts with a reset or holds nothing; place (B, L), the slot of
    each input.
    """

    table: Tensor
    place: Tensor

    @property
    def fresh(self) -> Tensor:
        """Booleans (B, c)."""
        return self.table[2] > 0

    def source(self, T: int) -> Tensor:
        """(B, c T): which input each slot holds, -1 for none."""
        start, filled, _ = self.table
        slot = torch.arange(T, device=start.device)
        return torch.where(slot < filled[..., None], start[..., None] + slot, -1).flatten(1)


def offsets(resets: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """How many inputs of its own segment stand before each input."""
    t = torch.arange(resets.shape[1], device=resets.device).expand(resets.shape)
    return t - torch.where(resets, t, 0).cummax(1).values


def in_chunks(resets: Bool[Tensor, "B L"], T: int) -> Chunks:
    """The chunks of T slots that sequences with these resets fill, L at least 1. Waits for a GPU once."""
    B, offset = len(resets), offsets(resets)
    begins = offset % T == 0
    chunk = begins.cumsum(1) - 1
    c = int(chunk[:, -1].max()) + 1 if B else 1
    row, start = begins.nonzero().unbind(1)
    number = chunk[row, start]
    table = start.new_zeros(3, B, c)
    table[2] = 1
    table[0, row, number], table[2, row, number] = start, resets[row, start].long()
    table[1].scatter_add_(1, chunk, torch.ones_like(chunk))
    return Chunks(table, chunk * T + offset % T)


def fitting(resets: Bool[Tensor, "B L"], most: int, N: int) -> int:
    """T, a power of two up to `most`, for which chunks that share no segment take the least time.

    Of B L inputs, products with the maps of a chunk, and N x N for each state that goes on to another chunk.
    Waits for a GPU once.
    """
    offset, lengths = offsets(resets), [1 << j for j in range(most.bit_length())]
    chunks = [(offset % T == 0).sum(1).amax() for T in lengths]
    going = [((offset % T == 0) & (offset > 0)).sum() for T in lengths]
    counted = _read(torch.stack(chunks + going))
    prices = [
        c * len(resets) * (T + N) * (T + 3 * N) + on * _SINGLE * N * N
        for T, c, on in zip(lengths, counted, counted[len(lengths) :], strict=False)
    ]
    return lengths[prices.index(min(prices))]


def _read(numbers: Tensor) -> list[int]:
    """As `tolist`, which torch 2.9 does not know inside its transforms."""
    return [int(n) for n in numbers.cpu().unbind()]


def take(x: Float[Tensor, "B M H"], index: Int[Tensor, "B K"]) -> Float[Tensor, "B K H"]:
    """x at these places of its own row, 0 at -1."""
    B, M, H = x.shape
    if M == 0:
        return x.new_zeros(B, index.shape[1], H)
    rows = index.clamp(min=0) + M * torch.arange(B, device=x.device)[:, None]
    found = x.reshape(B * M, H).index_select(0, rows.flatten()).view(*index.shape, H)
    return torch.where((index >= 0)[:, :, None], found, 0)


class Rows(NamedTuple):
    """The inputs of (B, L), one row a segment, rows of one length beside each other in a block.

    Shapes: source (slots,), which of the B L inputs each slot holds, -1 for none, block after block; place
    (B L,), the slot of each input; sizes, the rows and the slots of a row of each block.
    """

    source: Tensor
    place: Tensor
    sizes: list[tuple[int, int]]


def in_rows(resets: Bool[Tensor, "B L"]) -> Rows:
    """Each segment in the shortest row that holds it, of 2^j or 3 2^j slots. Waits for a GPU."""
    B, L = resets.shape
    first = resets.clone()
    first[:, :1] = True
    start = first.flatten().nonzero()[:, 0]
    length = torch.diff(start, append=start.new_full((1,), B * L))
    lengths = sorted({min(s, L) for j in range(L.bit_length() + 1) for s in (2**j, 3 << j)} | {L})
    kind = torch.stack([length > slots for slots in lengths]).sum(0)
    counts = _read((kind[:, None] == torch.arange(len(lengths), device=resets.device)).sum(0))
    source, sizes = [], []
    for which, (slots, rows) in enumerate(zip(lengths, counts, strict=True)):
        if rows:
            mine, step = kind == which, torch.arange(slots, device=resets.device)
            source.append(torch.where(step < length[mine, None], start[mine, None] + step, -1).flatten())
            sizes.append((rows, slots))
    found = torch.cat(source)
    slot = torch.arange(len(found), device=resets.device)
    place = torch.empty(B * L + 1, dtype=torch.long, device=resets.device).scatter(
        0, found % (B * L + 1), slot
    )
    return Rows(found, place[: B * L], sizes)
