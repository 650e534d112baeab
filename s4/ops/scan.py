"""The chunked scan: matrix products over chunks of T steps, a recurrence from chunk to chunk.

Exact, linear in the length, no FFT: the maps of a chunk (`s4.ops.maps`) applied to all chunks at once. Only
states pass between them. The gradient is a scan of the transposed maps, from the last chunk to the first.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from s4.ops import dispatch
from s4.ops.convolve import transpose
from s4.ops.segments import Chunks, in_chunks, take
from s4.precision import add_product, product, without_denormals

_BLOCK = 1 << 19  # inputs in flight on a CPU: what a core's cache holds, with the products made of them
_SERIAL = 32  # chunks that a loop goes over: more of them are first merged two by two


def plain(
    u: Tensor,
    x: Tensor,
    taps: Tensor,
    inward: Tensor,
    outward: Tensor,
    onward: Tensor,
    reverse: bool,
    products: torch.dtype,
    backend: str = "torch",
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H) of inputs (B, L, H) and of the state x (H, B, N) before them, and the state after.

    With U (H, B, c, T) the inputs in chunks and X (H, B, c, N) the states before them: Y = U Toep(taps) +
    X outward^T. The state is that after the last whole chunk; in reverse from the last chunk to the first,
    and that after all. With resets (B, L), each segment has chunks of its own, filled up with zeros.
    """
    chunks = None if resets is None else in_chunks(resets, inward.shape[1])
    y, last = _forward(
        rows(u, chunks, inward.shape[1]), x, taps, inward, outward, onward, _fresh(chunks), reverse, products
    )
    return steps(y, chunks), last


def rows(u: Tensor, chunks: Chunks | None, T: int) -> Tensor:
    """Sequences (B, L, H) as rows (H, B, L), with resets in their chunks of T."""
    return transpose(u if chunks is None else take(u, chunks.source(T)), False).transpose(0, 1)


def steps(y: Tensor, chunks: Chunks | None) -> Tensor:
    """The inverse of `rows`."""
    found = transpose(y.transpose(0, 1), True)
    return found if chunks is None else take(found, chunks.place)


def _fresh(chunks: Chunks | None) -> Tensor | None:
    return None if chunks is None else chunks.fresh


def plain_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    reverse: bool,
    products: torch.dtype,
    chunks: Chunks | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of the six inputs of `plain`."""
    u, *others = inputs
    T = inputs[3].shape[1]
    tensors = rows(u, chunks, T), *others, rows(grads[0], chunks, T), grads[1]
    grad_u, *found = _blockwise(_backward, tensors, _fresh(chunks), reverse, products)
    return steps(grad_u, chunks), *found


def _blockwise(
    run: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...], fresh: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    """`run`, on a CPU over a few channels at a time: products of one stay in cache for the next.

    Also elsewhere, where resets make chunks so short that the states before them outnumber their inputs.
    """
    u, (T, N) = tensors[0], tensors[3].shape[1:]
    H = u.shape[0]
    h = max(1, _BLOCK // max(1, u.shape[1:].numel())) if u.device.type == "cpu" else max(1, H)
    if fresh is not None:
        h = min(h, max(1, 4 * H * T // N))
    if u.device.type != "cpu" and h >= H:
        return run(*tensors, fresh, *options)
    blocks = []
    for start in range(0, max(H, 1), h):
        u, x, taps, inward, outward, *rest = (t[start : start + h] for t in tensors)
        taps, inward, outward = map(without_denormals, (taps, inward, outward))
        blocks.append(run(u, x, taps, inward, outward, *rest, fresh, *options))
    return blocks[0] if len(blocks) == 1 else tuple(map(torch.cat, zip(*blocks, strict=True)))


def _forward(
    u: Tensor,
    x: Tensor,
    taps: Tensor,
    inward: Tensor,
    outward: Tensor,
    onward: Tensor,
    fresh: Tensor | None,
    reverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`plain` on (H, B, L)."""
    U = chunked(u, inward.shape[1]).to(products)
    X, last = states(U, x, inward, onward, fresh, reverse)
    if U.shape[2] * U.shape[3] > u.shape[2] and not reverse:  # the state before a ragged chunk
        last = X[:, :, -1]
    intra = product(U.flatten(1, 2), _toeplitz(taps).to(products))
    y = add_product(intra, X.to(products).flatten(1, 2), outward.to(products).mT)
    return _joined(y, u), last


def _backward(
    u: Tensor,
    x: Tensor,
    taps: Tensor,
    inward: Tensor,
    outward: Tensor,
    onward: Tensor,
    grad_y: Tensor,
    grad_last: Tensor,
    fresh: Tensor | None,
    reverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, ...]:
    """Gradients of the first six: the inputs' and the state's are a scan of the transposed map, reversed.

    No states were kept, which would be N / T of the inputs: they are made again, half of the forward pass.
    """
    U, G = (chunked(t, inward.shape[1]).to(products) for t in (u, grad_y))
    X, _ = states(U, x, inward, onward, fresh, reverse)
    extra = None
    if U.shape[2] * U.shape[3] > u.shape[2] and not reverse:  # none came out after the last chunk
        grad_last, extra = torch.zeros_like(grad_last), grad_last
    Z, grad_x = states(G, grad_last, outward, onward.mT, fresh, not reverse, extra)
    grad_onward = product(X.flatten(1, 2).mT, Z.flatten(1, 2))
    U, X, G, Z = (t.to(products).flatten(1, 2) for t in (U, X, G, Z))
    intra = product(G, _toeplitz(taps).mT.to(products))
    return (
        _joined(add_product(intra, Z, inward.mT.to(products)), u),
        grad_x,
        _diagonal_sums(product(U.mT, G).to(u.dtype)),
        product(U.mT, Z).to(u.dtype),
        product(G.mT, X).to(u.dtype),
        grad_onward,
    )


def _count(L: int, T: int) -> int:
    """Chunks of a sequence: one at least."""
    return max(1, -(-L // T))


def chunked(u: Tensor, T: int) -> Tensor:
    """(h, B, L) to (h, B, c, T), the last chunk filled up with zeros; at least one chunk."""
    h, B, L = u.shape
    c = _count(L, T)
    return (pad(u, (0, c * T - L)) if c * T > L else u).reshape(h, B, c, T)


def _joined(Y: Tensor, like: Tensor) -> Tensor:
    """The inverse of `chunked`, from (h, B c, T), in shape and dtype of its argument."""
    h, B, L = like.shape
    return Y.to(like.dtype).reshape(h, B, _count(L, Y.shape[-1]) * Y.shape[-1])[..., :L]


def _toeplitz(taps: Tensor) -> Tensor:
    """(h, 2T-1) to (h, T, T): row i, column j has the lag j - i."""
    T = taps.shape[-1] // 2 + 1
    step = torch.arange(T, device=taps.device)
    return taps[:, step - step[:, None] + T - 1]


def _diagonal_sums(M: Tensor) -> Tensor:
    """The adjoint of `_toeplitz`, (h, T, T) to (h, 2T-1): at the lag j - i the sum of that diagonal.

    The rows from the last to the first, each filled up to 2T and read as if 2T-1 long: each then starts one
    later than the one before, and what was a diagonal is a column.
    """
    T = M.shape[-1]
    skewed = pad(M.flip(-2), (0, T)).flatten(-2)[..., :-T]
    return skewed.unflatten(-1, (T, 2 * T - 1)).sum(-2)


def states(
    U: Tensor,
    x: Tensor,
    inward: Tensor,
    onward: Tensor,
    fresh: Tensor | None,
    reverse: bool = False,
    extra: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """States before each chunk (h, B, c, N), and the one after all; `extra` is what the last chunk adds.

    No state passes, in either direction, from before a fresh chunk (B, c) to it.
    """
    S = product(U.flatten(1, 2), inward.to(U.dtype)).to(x.dtype).view(*U.shape[:3], x.shape[2])
    if extra is not None:
        S = S + pad(extra[:, :, None], (0, 0, S.shape[2] - 1, 0))
    if fresh is None:
        return recur(S, x, onward.contiguous(), None, reverse)
    cut = pad(fresh[:, 1:], (0, 1)) if reverse else fresh
    X, last = recur(S, x, onward.contiguous(), cut, reverse)
    return _cut(X, cut), _cut(last, fresh[:, 0]) if reverse else last


def _cut(x: Tensor, cut: Tensor | None) -> Tensor:
    """States x (h, B, ..., N), 0 where they end, of shape (B, ...)."""
    return x if cut is None else torch.where(cut[..., None], 0, x)


def recur(S: Tensor, x: Tensor, P: Tensor, cut: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """All but the last of x_{i+1} = x_i P + S_i, (h, B, c, N), and the last; reversed, x_{i-1} = x_i P + S_i.

    Where `cut` (B, c) is True, 0 takes the place of x_i in these. Many chunks are merged into half as many,
    x_{i+2} = x_i P^2 + (S_i P + S_{i+1}), whose states are every other state; x_{i+1} then follows from x_i.
    In reverse the later chunk of a pair is its first, and an odd one out, the last to be passed, lies at the
    beginning instead of at the end.
    """
    h, B, c, N = S.shape
    order = -1 if reverse else 1
    if c <= _SERIAL:
        X = []
        ends = [None] * c if cut is None else cut.unbind(1)[::order]
        for S_i, end in zip(S.unbind(2)[::order], ends, strict=True):
            X.append(x)
            x = add_product(S_i, _cut(x, end), P)
        return torch.stack(X[::order], 2), x
    odd = c % 2
    first, second = _pairs(S, 2, odd, reverse)
    one, two = (None, None) if cut is None else _pairs(cut, 1, odd, reverse)
    through = _cut(first, two).flatten(1, 2)
    merged = add_product(second.flatten(1, 2), through, P).view(h, B, c // 2, N)
    either = None if one is None or two is None else one | two
    before, x = recur(merged, x, product(P, P), either, reverse)
    between = add_product(first.flatten(1, 2), _cut(before, one).flatten(1, 2), P).view_as(before)
    states = torch.stack((before, between)[::order], 3).flatten(2, 3)
    if odd:
        states = torch.cat((states, x[:, :, None])[::order], 2)
        at = 0 if reverse else -1
        x = add_product(S[:, :, at], x if cut is None else _cut(x, cut[:, at]), P)
    return states, x


def _pairs(x: Tensor, dim: int, odd: int, reverse: bool) -> tuple[Tensor, ...]:
    """The first and the second of each pair of chunks, in the order that they are passed."""
    pairs = x.narrow(dim, odd if reverse else 0, x.shape[dim] - odd).unflatten(dim, (-1, 2))
    return pairs.unbind(dim + 1)[:: -1 if reverse else 1]


def _checked(inputs: Sequence[Tensor], *grads: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As a backend reads them, sequences at any strides; raises unless all fits u (B, L, H)."""
    u, (T, N) = inputs[0], inputs[3].shape[1:]
    B, L, H = u.shape
    shapes = [(B, L, H), (H, B, N), (H, 2 * T - 1), (H, T, N), (H, T, N), (H, N, N), (B, L, H), (H, B, N)]
    tensors = (*inputs, *grads)
    if [t.shape for t in tensors] != shapes[: len(tensors)] or len(
        {(t.dtype, t.device) for t in tensors}
    ) > 1:
        given = [(tuple(t.shape), t.dtype, str(t.device)) for t in tensors]
        raise ValueError(f"need operands of shapes {shapes}, of one dtype and device, got {given}")
    u, *others = (t.resolve_neg() for t in tensors)  # the sequences, u and its gradient, at any strides
    read = [t if i == 5 else t.contiguous() for i, t in enumerate(others)]
    return (u, *read[:5]), tuple(read[5:])


@torch.library.custom_op("s4::scan", mutates_args=())
def operator(
    u: Tensor,
    x: Tensor,
    taps: Tensor,
    inward: Tensor,
    outward: Tensor,
    onward: Tensor,
    reverse: bool,
    products: torch.dtype,
    backend: str,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    operands, _ = _checked((u, x, taps, inward, outward, onward))
    if resets is not None and resets.shape != u.shape[:2]:
        raise ValueError(f"need resets {tuple(u.shape[:2])}, got {tuple(resets.shape)}")
    chunks = None if resets is None else in_chunks(resets, inward.shape[1])
    module = dispatch.implementation("scan", backend, u.device)
    if module is not None and products == u.dtype:
        y, last = module.scan(*operands, reverse, None if chunks is None else chunks.table)
        return y, last
    given = rows(u, chunks, inward.shape[1]), *operands[1:]
    y, last = _blockwise(_forward, given, _fresh(chunks), reverse, products)
    return steps(y, chunks), last.contiguous()


@torch.library.custom_op("s4::scan_backward", mutates_args=())
def operator_backward(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    reverse: bool,
    products: torch.dtype,
    backend: str,
    resets: Tensor | None = None,
) -> list[Tensor]:
    inputs, grads = _checked(inputs, *grads)
    u = inputs[0]
    chunks = None if resets is None else in_chunks(resets, inputs[3].shape[1])
    module = dispatch.implementation("scan", backend, u.device)
    if products == u.dtype and (backward := getattr(module, "scan_backward", None)):
        return list(backward(grads, inputs, reverse, None if chunks is None else chunks.table))
    with dispatch.full_precision(u.device):  # which a backward pass inside autocast has not left
        return [t.contiguous() for t in plain_backward(grads, inputs, reverse, products, chunks)]


@operator.register_fake
def _(
    u: Tensor,
    x: Tensor,
    taps: Tensor,
    inward: Tensor,
    outward: Tensor,
    onward: Tensor,
    reverse: bool,
    products: torch.dtype,
    backend: str,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), x.new_empty(x.shape)


@operator_backward.register_fake
def _(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    reverse: bool,
    products: torch.dtype,
    backend: str,
    resets: Tensor | None = None,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in inputs]


def _save(ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.reverse, ctx.products, ctx.backend, resets = inputs
    ctx.save_for_backward(*tensors, resets)


def _gradients(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    *tensors, resets = ctx.saved_tensors
    options = ctx.reverse, ctx.products
    if dispatch.recorded(*grads):
        run = partial(plain, reverse=ctx.reverse, products=ctx.products, resets=resets)
        return *dispatch.through(run, tensors, grads), None, None, None, None
    return *operator_backward(list(grads), tensors, *options, ctx.backend, resets), None, None, None, None


operator.register_autograd(_gradients, setup_context=_save)
