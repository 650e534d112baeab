"""The third view: a chunked scan. Matrix products over chunks of T steps, a recurrence from chunk to chunk.

With rows u_c of T inputs, y_c of T outputs and x_c, the state before them, a chunk is one linear map:

    y_c = u_c Toep(K_0, ..., K_{T-1}) + x_c [C A, ..., C A^T]
    x_{c+1} = u_c [A^{T-1} B, ..., B] + x_c A^T

Exact, linear in the length, no FFT. The gradient is a scan of the transposed map, from the last chunk to the
first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.nn.functional import hardshrink, pad

from s4.conv import by_channel, by_time
from s4.kernel import _ops
from s4.kernel._choice import has_fused_powers
from s4.ssm import Propagator

_BLOCK = 1 << 19  # inputs in flight on a CPU: what a core's cache holds, with the products made of them
_MANY = 1 << 16  # inputs a channel, for which longer chunks repay their larger maps
_SERIAL = 32  # chunks that a loop goes over: more of them are first merged two by two


# max(B, 4) L from which `scan` takes less time than an FFT convolution, by variant and d_state, on a CPU
# with the fused code: measured (benchmarks/layer.py), forward and with backward.
_LEAST = {"dplr": {32: 2048, 64: 8192, 128: 16384}, "diag": {32: 2048, 64: 8192, 128: 65536}}


class Chunk(NamedTuple):
    """The maps of one chunk, one system a channel, applied to rows from the right.

    Shapes: taps (H, 2T-1), the kernel at lags 1-T, ..., T-1; inward (H, T, N), inputs to the next state;
    outward (H, T, N), state to outputs, transposed; onward (H, N, N), state to the next state.
    """

    taps: Tensor
    inward: Tensor
    outward: Tensor
    onward: Tensor


def chunk_length(B: int, L: int, N: int) -> int:
    """T, a power of two: the products cost 2T + 4N + 4N^2/T flop an input, the maps some T N a channel."""
    most = max(N if B * L < _MANY else 2 * N, 32)
    T = 1
    while min(L, most) > T:
        T *= 2
    return T


def pays(B: int, L: int, propagator: Propagator, stateful: bool) -> bool:
    """Whether `scan` is expected to be faster than an FFT convolution; known of the CPU only.

    Without the fused code the maps of a chunk take several times as long. A state that goes in or comes out
    is free here, and costs the convolution as much again.
    """
    recurrence = propagator.recurrence
    if recurrence.a.device.type != "cpu":
        return False
    least = _LEAST["dplr" if len(recurrence.F) else "diag"]
    sizes = [size for size in least if recurrence.a.shape[1] <= size]
    if not sizes:
        return False
    fused = has_fused_powers("cpu")
    return max(B, 4) * L * (4 if stateful else 1) >= least[sizes[0]] * (1 if fused else 4)


def chunks(
    propagator: Propagator, D: Float[Tensor, "H"], T: int, dtype: torch.dtype
) -> tuple[Chunk, Chunk | None]:
    """The maps forward in time, with D the tap at lag 0, and backward if there is a second row C.

    The second is strict: the kernel's lag 0 meets the input just after an output.
    """
    recurrence = propagator.recurrence
    fused = has_fused_powers(D.device.type)
    taps, inward, outward, onward = (_ops.chunk if fused else _ops.plain_chunk)(
        *recurrence, D.to(recurrence.a.dtype), T, dtype
    )
    ahead = Chunk(taps[0], inward, outward[0], onward)
    return ahead, Chunk(taps[1], inward.flip(1), outward[1], onward) if len(taps) == 2 else None


def scan(
    u: Float[Tensor, "B L H"],
    propagator: Propagator,
    D: Float[Tensor, "H"],
    x: Float[Tensor, "B H N"] | None = None,
    products: torch.dtype | None = None,
) -> tuple[Float[Tensor, "B L H"], Float[Tensor, "B H N"]]:
    """Outputs, and the state after the last input, from the state x or zero.

    Args:
        u: inputs.
        propagator: the systems; with two rows C, the second runs backward in time, from zero.
        D: what an input adds to its own output.
        x: the state before the first input.
        products: the dtype of the large products' factors, if not that of u. The recurrence keeps that of u.
    """
    B, L, H = u.shape
    N = propagator.recurrence.B.shape[-1]
    T = chunk_length(B, L, N)
    ahead, behind = chunks(propagator, D, T, u.dtype)
    x = u.new_zeros(H, B, N) if x is None else x.transpose(0, 1)
    products = products or u.dtype
    y, x = _Scan.apply(u, x, *ahead, products, False)
    if behind is not None:
        later, _ = _Scan.apply(u, torch.zeros_like(x), *behind, products, True)
        y = y + later
    whole = L // T * T
    if whole < L:
        tail = u[:, whole:].permute(2, 0, 1) @ ahead.inward[:, T - L + whole :]
        rest = torch.full((B,), L - whole, device=u.device)
        x = propagator.advance(x.transpose(0, 1), rest, T - 1).transpose(0, 1) + tail
    return y, x.transpose(0, 1)


class _Scan(torch.autograd.Function):
    """(B, L, H) inputs and (H, B, N) states to outputs, and the states after the last whole chunk.

    In reverse from the last chunk to the first; the last may be ragged. Keeps its inputs and no states, which
    would be N / T of the inputs to hold, and are made again from half of the forward pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        u: Tensor,
        x: Tensor,
        taps: Tensor,
        inward: Tensor,
        outward: Tensor,
        onward: Tensor,
        products: torch.dtype,
        reverse: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = (u, x, taps, inward, outward, onward)
        y, last = _run(_forward, _ops.scan, tensors, products, reverse)
        return y, last

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.products, ctx.reverse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        inputs = (*ctx.saved_tensors, grad_y, grad_x)
        return *_run(_backward, _fused_backward, inputs, ctx.products, ctx.reverse), None, None


def _fused_backward(*tensors: Any) -> tuple[Tensor, ...]:
    *inputs, grad_y, grad_x, reverse = tensors
    return tuple(_ops.scan_backward([grad_y, grad_x], inputs, reverse))


def _run(
    plain: Callable[..., tuple[Tensor, ...]],
    fused: Callable[..., tuple[Tensor, ...]],
    tensors: tuple[Tensor, ...],
    products: torch.dtype,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """By the fused code of the CPU where it serves: not in bfloat16, nor for a gradient of the gradient.

    Sequences, the first tensor and the gradient of the outputs, are (B, L, H) here, but (H, B, L) to `plain`.
    """
    u = tensors[0]
    once = torch.compiler.is_compiling() or not torch.is_grad_enabled()
    if once and products == u.dtype and has_fused_powers(u.device.type):
        return fused(*tensors, reverse)
    in_rows = tuple(by_channel(t).transpose(0, 1) if i in (0, 6) else t for i, t in enumerate(tensors))
    sequences, *others = _blockwise(plain, in_rows, products, reverse)
    return by_time(sequences.transpose(0, 1)), *others


def _blockwise(
    run: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...], products: torch.dtype, reverse: bool
) -> tuple[Tensor, ...]:
    """`run`, on a CPU over a few channels at a time: products of one stay in cache for the next.

    There, what decayed to denormal numbers or soon would counts as 0: each costs some 100 cycles. Not before,
    as a 0 may have a gradient.
    """
    u = tensors[0]
    if _traced() or u.device.type != "cpu":
        return run(*tensors, products, reverse)
    H = u.shape[0]
    h = max(1, _BLOCK // max(1, u.shape[1:].numel()))
    out: tuple[Tensor, ...] = ()
    for start in range(0, H, h):
        u, x, taps, *maps = (t[start : start + h] for t in tensors)
        maps[:3] = (hardshrink(t, 1e8 * torch.finfo(t.dtype).tiny) for t in maps[:3])
        block = run(u, x, taps, *maps, products, reverse)
        if h >= H:
            return block
        out = out or tuple(t.new_empty(H, *t.shape[1:]) for t in block)
        for whole, part in zip(out, block, strict=True):
            whole[start : start + h] = part
    return out


def _traced() -> bool:
    """Whether autograd, torch.func or torch.compile follow what is done: nothing is written in place then."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or maybe_current_level() is not None


def _forward(
    u: Tensor,
    x: Tensor,
    taps: Tensor,
    inward: Tensor,
    outward: Tensor,
    onward: Tensor,
    products: torch.dtype,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    U = _chunked(u, inward.shape[1]).to(products)
    X, last = _states(U, x, inward, onward, reverse)
    if U.shape[2] * U.shape[3] > u.shape[2] and not reverse:  # the state before a ragged chunk
        last = X[:, :, -1]
    toeplitz, outward = _toeplitz(taps).to(products), outward.to(products).mT
    y = _two_products(U.flatten(1, 2), toeplitz, X.to(products).flatten(1, 2), outward)
    return _joined(y, u), last


def _backward(
    u: Tensor,
    x: Tensor,
    taps: Tensor,
    inward: Tensor,
    outward: Tensor,
    onward: Tensor,
    grad_y: Tensor,
    grad_x: Tensor,
    products: torch.dtype,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the first six: the inputs' and the state's are a scan of the transposed map, reversed."""
    U, G = (_chunked(t, inward.shape[1]).to(products) for t in (u, grad_y))
    X, _ = _states(U, x, inward, onward, reverse)
    extra = None
    if U.shape[2] * U.shape[3] > u.shape[2] and not reverse:  # none came out after the last chunk
        grad_x, extra = torch.zeros_like(grad_x), grad_x
    Z, grad_x = _states(G, grad_x, outward, onward.mT, not reverse, extra)
    grad_onward = X.flatten(1, 2).mT @ Z.flatten(1, 2)
    U, X, G, Z = (t.to(products).flatten(1, 2) for t in (U, X, G, Z))
    grad_u = _two_products(G, _toeplitz(taps).mT.to(products), Z, inward.mT.to(products))
    return (
        _joined(grad_u, u),
        grad_x,
        _diagonals((U.mT @ G).to(u.dtype)),
        (U.mT @ Z).to(u.dtype),
        (G.mT @ X).to(u.dtype),
        grad_onward,
    )


def _two_products(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """A B + C D."""
    product = A @ B
    return torch.baddbmm(product, C, D) if _traced() else product.baddbmm_(C, D)


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
    return taps.unfold(-1, taps.shape[-1] // 2 + 1, 1).flip(-2)


def _diagonals(M: Tensor) -> Tensor:
    """The adjoint of `_toeplitz`: sums along diagonals, (h, T, T) to (h, 2T-1)."""
    T = M.shape[-1]
    skewed = pad(M.flip(-2), (0, T)).flatten(-2)[..., :-T]  # as rows one shorter, each starts one later
    return skewed.unflatten(-1, (T, 2 * T - 1)).sum(-2)


def _states(
    U: Tensor, x: Tensor, inward: Tensor, onward: Tensor, reverse: bool, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """States before each chunk (h, B, c, N), and the one after all; `extra` is what the last chunk adds."""
    S = (U.flatten(1, 2) @ inward.to(U.dtype)).to(x.dtype).view(*U.shape[:3], x.shape[2])
    if extra is not None:
        S = S + pad(extra[:, :, None], (0, 0, S.shape[2] - 1, 0))
    recur = _recur_op if torch.compiler.is_compiling() else _recur
    return recur(S, x, onward.contiguous(), reverse)


def _recur(S: Tensor, x: Tensor, P: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """All but the last of x_{i+1} = x_i P + S_i, (h, B, c, N), and the last; reversed, x_{i-1} = x_i P + S_i.

    Many chunks are merged into half as many with P^2, whose states are every other state.
    """
    h, B, c, N = S.shape
    if c <= _SERIAL:
        X = []
        for S_i in S.unbind(2)[:: -1 if reverse else 1]:
            X.append(x)
            x = torch.baddbmm(S_i, x, P)
        return torch.stack(X[:: -1 if reverse else 1], 2), x
    odd, order = c % 2, -1 if reverse else 1
    pairs = S[:, :, odd if reverse else 0 :].narrow(2, 0, c - odd).unflatten(2, (-1, 2))
    first, second = (pairs[:, :, :, i].flatten(1, 2) for i in (0, 1)[::order])
    merged = torch.baddbmm(second, first, P).view(h, B, c // 2, N)
    before, x = _recur(merged, x, P @ P, reverse)
    between = torch.baddbmm(first, before.flatten(1, 2), P).view_as(before)
    states = torch.stack((before, between)[::order], 3).flatten(2, 3)
    if odd:
        states = torch.cat((states, x[:, :, None])[::order], 2)
        x = torch.baddbmm(S[:, :, 0 if reverse else -1], x, P)
    return states, x


@torch.library.custom_op("s4::recur", mutates_args=())
def _recur_op(S: Tensor, x: Tensor, P: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """`_recur` as one node of a graph, which would otherwise hold for one number of chunks."""
    return _recur(S, x, P, reverse)


@_recur_op.register_fake
def _(S: Tensor, x: Tensor, P: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    return S.new_empty(S.shape), x.new_empty(x.shape)
