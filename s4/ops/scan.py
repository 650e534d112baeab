"""The chunked scan: matrix products over chunks of T steps, a recurrence from chunk to chunk.

Exact, linear in the length, no FFT: the maps of a chunk (`s4.ops.maps`) applied to all chunks at once. Only
states pass between them. The gradient is a scan of the transposed maps, from the last chunk to the first.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from s4.ops import dispatch
from s4.ops.advance import advance
from s4.ops.convolve import transpose
from s4.ops.maps import Maps, maps, power
from s4.padding import last_steps, right_aligned
from s4.powers import Propagator
from s4.precision import add_product, product, without_denormals
from s4.system import Recurrence

_BLOCK = 1 << 19  # inputs in flight on a CPU: what a core's cache holds, with the products made of them
_MANY = 1 << 16  # inputs a channel, for which longer chunks repay their larger maps, where those are kept
_SERIAL = 32  # chunks that a loop goes over: more of them are first merged two by two


def chunk_length(B: int, L: int, N: int, price: int = 0) -> int:
    """T, a power of two: the products cost 2T + 4N + 4N^2/T flop an input, the maps some T N^2 a channel.

    `price` is that of making maps for these inputs alone, 1 for diagonal systems, 2 for others: of B L inputs
    they then are to take no more than the products do. It is 0 where the maps serve later calls, too.
    """
    most = max(N if B * L < _MANY else 2 * N, 32)
    T = 1
    while min(L, most) > T and (T < 8 or price * 4 * T * T < B * L):
        T *= 2
    return T


def scan(
    u: Float[Tensor, "B L H"],
    recurrence: Recurrence,
    D: Float[Tensor, "H"],
    x: Float[Tensor, "B H N"] | None = None,
    products: torch.dtype | None = None,
    backend: str = "auto",
    *,
    return_state: bool = True,
    kept: dict[Any, Any] | None = None,
) -> tuple[Float[Tensor, "B L H"], Float[Tensor, "B H N"] | None]:
    """Outputs, and the state after the last input if asked for, from the state x or zero.

    Args:
        u: inputs.
        recurrence: the systems; with two rows C, the second runs backward in time, from zero.
        D: what an input adds to its own output.
        x: the state before the first input.
        products: the dtype of the large products' factors, if not that of u. The recurrence keeps that of u.
        backend: who computes, "auto" or one of `s4.kernel.backends()`.
        return_state: None stands for the state otherwise.
        kept: where maps of this recurrence are kept for later calls.
    """
    B, L, H = u.shape
    N = recurrence.B.shape[-1]
    one_graph = dispatch.opaque()  # for all lengths: with one length of chunks, whatever is left of them
    apart = recurrence.a.device != u.device  # which has no float64: `kept` then is for this call
    if one_graph:
        T = chunk_length(1, _MANY - 1, N // 2)
    else:
        T = chunk_length(B, L, N, dispatch.price_of_maps(recurrence, backend) if kept is None or apart else 0)
    made = {} if kept is None else kept
    length, both = made.get("maps", (0, None))
    if both is None or length != T:
        both = maps(recurrence, D, T, u.dtype, backend)
        made["maps"] = T, both
    ahead: Maps = both[0]
    behind: Maps | None = both[1]
    before = u.new_zeros(H, B, N) if x is None else x.transpose(0, 1)
    options = products or u.dtype, backend
    run = plain if dispatch.transformed() else operator
    y, last = run(u, before, *ahead, False, *options)
    if behind is not None:
        later, _ = run(u, torch.zeros_like(before), *behind, True, *options)
        y = y + later
    if not return_state:
        return y, None
    rest = L % T
    if not one_graph and rest == 0:
        return y, last.transpose(0, 1)
    # From the state before the ragged chunk to that after its inputs.
    if one_graph:
        driven = product(last_steps(u, rest, T).permute(2, 0, 1), ahead.inward)
    else:
        driven = product(u[:, L - rest :].permute(2, 0, 1), ahead.inward[:, T - rest :])
    if not (one_graph or apart or dispatch.fused("maps", backend, u.device.type)):
        steps = torch.full((B,), rest, device=u.device)
        return y, Propagator(recurrence).advance(last.transpose(0, 1), steps, T - 1) + driven.transpose(0, 1)
    length, onward = made.get("rest", (None, None))
    if length is None or length != rest:  # None apart, as a graph would ask whether one is the other
        if apart and not one_graph:
            onward = Propagator(recurrence).power(rest).mT.to(u.dtype)
        else:
            onward = power(*recurrence, recurrence.a.new_zeros(len(recurrence.a)), rest, u.dtype, backend)
        onward = onward.to(u.device)
        made["rest"] = rest, onward
    return y, add_product(driven, last, onward).transpose(0, 1)


def last_state(
    u: Float[Tensor, "B L H"],
    recurrence: Recurrence,
    D: Float[Tensor, "H"],
    x: Float[Tensor, "B H N"] | None,
    lengths: Int[Tensor, "B"] | None,
    backend: str,
    kept: dict[Any, Any] | None,
) -> Float[Tensor, "B H N"]:
    """The state after the last input, of padded sequences their own last one, from the state x or zero."""
    inputs, first = (u, x) if lengths is None else (right_aligned(u, lengths), None)
    _, last = scan(inputs, recurrence, D, first, None, backend, kept=kept)
    assert last is not None
    if lengths is None or x is None:
        return last
    where = recurrence.a.device
    return last + advance(recurrence, x.to(where), lengths.to(where), u.shape[1]).to(last.device)


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
) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, H) of inputs (B, L, H) and of the state x (H, B, N) before them, and the state after.

    With U (H, B, c, T) the inputs in chunks and X (H, B, c, N) the states before them: Y = U Toep(taps) +
    X outward^T. The state is that after the last whole chunk; in reverse from the last chunk to the first,
    and that after all.
    """
    rows = transpose(u, False).transpose(0, 1)
    y, last = _forward(rows, x, taps, inward, outward, onward, reverse, products)
    return transpose(y.transpose(0, 1), True), last


def plain_backward(
    grads: Sequence[Tensor], inputs: Sequence[Tensor], reverse: bool, products: torch.dtype
) -> tuple[Tensor, ...]:
    """Gradients of the six inputs of `plain`."""
    u, *others = inputs
    rows = [transpose(t, False).transpose(0, 1) for t in (u, grads[0])]
    grad_u, *found = _blockwise(_backward, (rows[0], *others, rows[1], grads[1]), reverse, products)
    return transpose(grad_u.transpose(0, 1), True), *found


def _blockwise(
    run: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...], reverse: bool, products: torch.dtype
) -> tuple[Tensor, ...]:
    """`run`, on a CPU over a few channels at a time: products of one stay in cache for the next."""
    u = tensors[0]
    H = u.shape[0]
    h = max(1, _BLOCK // max(1, u.shape[1:].numel()))
    if u.device.type != "cpu":
        return run(*tensors, reverse, products)
    blocks = []
    for start in range(0, max(H, 1), h):
        u, x, taps, inward, outward, *rest = (t[start : start + h] for t in tensors)
        taps, inward, outward = map(without_denormals, (taps, inward, outward))
        blocks.append(run(u, x, taps, inward, outward, *rest, reverse, products))
    return blocks[0] if len(blocks) == 1 else tuple(map(torch.cat, zip(*blocks, strict=True)))


def _forward(
    u: Tensor,
    x: Tensor,
    taps: Tensor,
    inward: Tensor,
    outward: Tensor,
    onward: Tensor,
    reverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`plain` on (H, B, L)."""
    U = _chunked(u, inward.shape[1]).to(products)
    X, last = _states(U, x, inward, onward, reverse)
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
    reverse: bool,
    products: torch.dtype,
) -> tuple[Tensor, ...]:
    """Gradients of the first six: the inputs' and the state's are a scan of the transposed map, reversed.

    No states were kept, which would be N / T of the inputs: they are made again, half of the forward pass.
    """
    U, G = (_chunked(t, inward.shape[1]).to(products) for t in (u, grad_y))
    X, _ = _states(U, x, inward, onward, reverse)
    extra = None
    if U.shape[2] * U.shape[3] > u.shape[2] and not reverse:  # none came out after the last chunk
        grad_last, extra = torch.zeros_like(grad_last), grad_last
    Z, grad_x = _states(G, grad_last, outward, onward.mT, not reverse, extra)
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


def _chunked(u: Tensor, T: int) -> Tensor:
    """(h, B, L) to (h, B, c, T), the last chunk filled up with zeros; at least one chunk."""
    h, B, L = u.shape
    c = _count(L, T)
    return (pad(u, (0, c * T - L)) if c * T > L else u).reshape(h, B, c, T)


def _joined(Y: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_chunked`, from (h, B c, T), in shape and dtype of its argument."""
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


def _states(
    U: Tensor, x: Tensor, inward: Tensor, onward: Tensor, reverse: bool, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """States before each chunk (h, B, c, N), and the one after all; `extra` is what the last chunk adds."""
    S = product(U.flatten(1, 2), inward.to(U.dtype)).to(x.dtype).view(*U.shape[:3], x.shape[2])
    if extra is not None:
        S = S + pad(extra[:, :, None], (0, 0, S.shape[2] - 1, 0))
    return _recur(S, x, onward.contiguous(), reverse)


def _recur(S: Tensor, x: Tensor, P: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """All but the last of x_{i+1} = x_i P + S_i, (h, B, c, N), and the last; reversed, x_{i-1} = x_i P + S_i.

    Many chunks are merged into half as many, x_{i+2} = x_i P^2 + (S_i P + S_{i+1}), whose states are every
    other state; x_{i+1} then follows from x_i. In reverse the later chunk of a pair is its first, and an odd
    one out, the last to be passed, lies at the beginning instead of at the end.
    """
    h, B, c, N = S.shape
    order = -1 if reverse else 1
    if c <= _SERIAL:
        X = []
        for S_i in S.unbind(2)[::order]:
            X.append(x)
            x = add_product(S_i, x, P)
        return torch.stack(X[::order], 2), x
    odd = c % 2
    pairs = S[:, :, odd if reverse else 0 :].narrow(2, 0, c - odd).unflatten(2, (-1, 2))
    first, second = (pairs[:, :, :, i].flatten(1, 2) for i in (0, 1)[::order])
    merged = add_product(second, first, P).view(h, B, c // 2, N)
    before, x = _recur(merged, x, product(P, P), reverse)
    between = add_product(first, before.flatten(1, 2), P).view_as(before)
    states = torch.stack((before, between)[::order], 3).flatten(2, 3)
    if odd:
        states = torch.cat((states, x[:, :, None])[::order], 2)
        x = add_product(S[:, :, 0 if reverse else -1], x, P)
    return states, x


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
) -> tuple[Tensor, Tensor]:
    operands, _ = _checked((u, x, taps, inward, outward, onward))
    module = dispatch.implementation("scan", backend, u.device)
    if module is not None and products == u.dtype:
        y, last = module.scan(*operands, reverse)
        return y, last
    in_rows = transpose(u, False).transpose(0, 1), *operands[1:]
    y, last = _blockwise(_forward, in_rows, reverse, products)
    return transpose(y.transpose(0, 1), True), last.contiguous()


@torch.library.custom_op("s4::scan_backward", mutates_args=())
def operator_backward(
    grads: Sequence[Tensor], inputs: Sequence[Tensor], reverse: bool, products: torch.dtype, backend: str
) -> list[Tensor]:
    inputs, grads = _checked(inputs, *grads)
    u = inputs[0]
    module = dispatch.implementation("scan", backend, u.device)
    if products == u.dtype and (backward := getattr(module, "scan_backward", None)):
        return list(backward(grads, inputs, reverse))
    with dispatch.full_precision(u.device):  # which a backward pass inside autocast has not left
        return [t.contiguous() for t in plain_backward(grads, inputs, reverse, products)]


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
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), x.new_empty(x.shape)


@operator_backward.register_fake
def _(
    grads: Sequence[Tensor], inputs: Sequence[Tensor], reverse: bool, products: torch.dtype, backend: str
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in inputs]


def _save(ctx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.reverse, ctx.products, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    options = ctx.reverse, ctx.products
    if dispatch.recorded(*grads):
        run = partial(plain, reverse=ctx.reverse, products=ctx.products)
        found = dispatch.through(run, ctx.saved_tensors, grads)
        return *found, None, None, None
    return *operator_backward(list(grads), list(ctx.saved_tensors), *options, ctx.backend), None, None, None


operator.register_autograd(_gradients, setup_context=_save)
