"""The third view: a chunked scan. Matrix products over chunks of T steps, and a recurrence from chunk to chunk.

With rows u_c of T inputs, y_c of T outputs and x_c, the state before them, a chunk is one linear map:

    y_c = u_c Toep(K_0, ..., K_{T-1}) + x_c [C A, ..., C A^T]
    x_{c+1} = u_c [A^{T-1} B, ..., B] + x_c A^T

Exact, linear in the length, no FFT. Its gradient is a scan of the transposed map from the last chunk to the first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.nn.functional import hardshrink, pad

from s4.ssm import Propagator

_BLOCK = 1 << 18  # inputs in flight on a CPU: what a core's cache holds, with the products made of them
_SERIAL = 32  # chunks that a loop goes over: more of them are first merged two by two


class Chunk(NamedTuple):
    """The maps of one chunk, one system a channel, applied to rows from the right.

    Shapes: taps (H, 2T-1), the kernel at lags 1-T, ..., T-1; inward (H, T, N), inputs to the next state;
    outward (H, N, T), state to outputs; onward (H, N, N), state to the next state.
    """

    taps: Tensor
    inward: Tensor
    outward: Tensor
    onward: Tensor


def chunk_length(B: int, L: int, N: int) -> int:
    """T, a power of two: the products cost 2T + 4N + 4N^2/T flop an input, the maps T N numbers a channel."""
    T = 1
    while T < L and T < 2 * N:
        T *= 2
    return T


def chunks(
    propagator: Propagator, D: Float[Tensor, "H"], T: int, dtype: torch.dtype
) -> tuple[Chunk, Chunk | None]:
    """The maps forward in time, with D the tap at lag 0, and backward if there is a second row C.

    The second is strict: the kernel's lag 0 meets the input just after an output.
    """
    C, B = propagator.recurrence.C, propagator.recurrence.B
    columns, rows = propagator.columns(T), propagator.rows(T)
    onward = _rounded(propagator.power(T).mT, dtype)
    inclusive = torch.cat([C[:, :, None], rows[:, :, :-1]], 2)  # C A^b for b < T
    K = (inclusive @ B[..., None])[..., 0].to(dtype)
    lagged = torch.cat([K[0, :, :1] + D[:, None], K[0, :, 1:]], -1)
    columns = _rounded(columns, dtype).mT
    ahead = Chunk(pad(lagged, (T - 1, 0)), columns.flip(1), _rounded(rows[0], dtype).mT, onward)
    if C.shape[0] == 1:
        return ahead, None
    outward = _rounded(inclusive[1], dtype).flip(1).mT
    return ahead, Chunk(pad(K[1, :, : T - 1].flip(-1), (0, T)), columns, outward, onward)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In dtype, without what decayed to denormal numbers there or would in products: each costs a CPU 100 cycles."""
    return hardshrink(x.to(dtype), 1e8 * torch.finfo(dtype).tiny)


def scan(
    u: Float[Tensor, "B H L"],
    propagator: Propagator,
    D: Float[Tensor, "H"],
    x: Float[Tensor, "B H N"] | None = None,
    products: torch.dtype | None = None,
) -> tuple[Float[Tensor, "B H L"], Float[Tensor, "B H N"]]:
    """Outputs, and the state after the last input, from the state x or zero.

    Args:
        u: inputs.
        propagator: the systems; with two rows C, the second runs backward in time, from zero.
        D: what an input adds to its own output.
        x: the state before the first input.
        products: the dtype of the large products' factors, if not that of u. The recurrence keeps that of u.
    """
    B, H, L = u.shape
    N = propagator.recurrence.B.shape[-1]
    T = chunk_length(B, L, N)
    ahead, behind = chunks(propagator, D, T, u.dtype)
    x = u.new_zeros(H, B, N) if x is None else x.transpose(0, 1)
    by_channel = u.transpose(0, 1)
    y, x = _Scan.apply(by_channel, x, *ahead, products or u.dtype, False)
    if behind is not None:
        later, _ = _Scan.apply(by_channel, torch.zeros_like(x), *behind, products or u.dtype, True)
        y = y + later
    x = x.transpose(0, 1)
    whole = L // T * T
    if whole < L:
        rest = torch.full((B,), L - whole, device=u.device)
        tail = by_channel[..., whole:] @ ahead.inward[:, T - L + whole :]
        x = propagator.advance(x, rest, T - 1) + tail.transpose(0, 1)
    return y.transpose(0, 1), x


class _Scan(torch.autograd.Function):
    """(H, B, L) inputs and (H, B, N) states to outputs, and the states after the last whole chunk.

    In reverse from the last chunk to the first; the last may be ragged. Keeps no states: they would be N / T of
    the inputs to hold, and are a quarter of the forward pass to make again.
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
        return _blockwise(_forward, (u, x, taps, inward, outward, onward), products, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.products, ctx.reverse = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        inputs = (*ctx.saved_tensors, grad_y, grad_x)
        return *_blockwise(_backward, inputs, ctx.products, ctx.reverse), None, None


def _blockwise(
    run: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...], products: torch.dtype, reverse: bool
) -> tuple[Tensor, ...]:
    """`run`, on a CPU over a few channels at a time: products of one stay in cache for the next."""
    u = tensors[0]
    H, size = u.shape[0], u.shape[1:].numel()
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling() or maybe_current_level() is not None
    if traced or u.device.type != "cpu" or H * size <= _BLOCK:
        return run(*tensors, products, reverse)
    h = max(1, _BLOCK // size)
    out: tuple[Tensor, ...] | None = None
    for start in range(0, H, h):
        block = run(*(t[start : start + h] for t in tensors), products, reverse)
        if out is None:
            out = tuple(t.new_empty(H, *t.shape[1:]) for t in block)
        for whole, part in zip(out, block, strict=True):
            whole[start : start + h] = part
    assert out is not None
    return out


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
    T, L = inward.shape[1], u.shape[-1]
    U = _chunked(u, T).to(products)
    X, last = _states(U, x, inward, onward, reverse)
    y = torch.baddbmm(U @ _toeplitz(taps).to(products), X.flatten(1, 2).to(products), outward.to(products))
    if L % T and not reverse:
        last = X[:, :, -1]
    return y.to(u.dtype).view(*u.shape[:2], -1)[..., :L], last


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
    """Gradients of the first six: the inputs' and the state's by a scan of the transposed map, the other way."""
    T, L = inward.shape[1], u.shape[-1]
    U, G = _chunked(u, T).to(products), _chunked(grad_y, T).to(products)
    X, _ = _states(U, x, inward, onward, reverse)
    later = None
    if L % T and not reverse:  # the state came out before the ragged chunk, and none after it
        grad_x, later = torch.zeros_like(grad_x), grad_x
    Z, grad_x = _states(G, grad_x, outward.mT, onward.mT, not reverse, later)
    X, Z = X.flatten(1, 2), Z.flatten(1, 2)
    Xp, Zp = X.to(products), Z.to(products)
    grad_u = torch.baddbmm(G @ _toeplitz(taps).mT.to(products), Zp, inward.mT.to(products))
    return (
        grad_u.to(u.dtype).view(*u.shape[:2], -1)[..., :L],
        grad_x,
        _diagonals((U.mT @ G).to(u.dtype)),
        (U.mT @ Zp).to(u.dtype),
        (Xp.mT @ G).to(u.dtype),
        X.mT @ Z,
    )


def _chunked(u: Tensor, T: int) -> Tensor:
    """(h, B, L) to (h, B c, T), the last chunk filled up with zeros; at least one chunk."""
    L = u.shape[-1]
    c = max(1, -(-L // T))
    return (u if L == c * T else pad(u, (0, c * T - L))).reshape(u.shape[0], -1, T)


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
    """States before each chunk (h, B, c, N), and the one after all; `extra` is what the last chunk adds besides."""
    S = (U @ inward.to(U.dtype)).to(x.dtype).unflatten(1, (x.shape[1], -1))
    if extra is not None:
        S = S + pad(extra[:, :, None], (0, 0, S.shape[2] - 1, 0))
    return _recur(S, x, onward.contiguous(), reverse)


def _recur(S: Tensor, x: Tensor, P: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """x_0, ..., x_{c-1} along dimension 2, and x_c, of x_{i+1} = x_i P + S_i; in reverse from x_{c-1} to x_{-1}.

    Many chunks are merged into half as many with P^2, whose states are every other state.
    """
    h, _, c, N = S.shape
    if c <= _SERIAL:
        X = []
        for S_i in S.unbind(2)[:: -1 if reverse else 1]:
            X.append(x)
            x = torch.baddbmm(S_i, x, P)
        return torch.stack(X[:: -1 if reverse else 1], 2), x
    odd, order = c % 2, -1 if reverse else 1
    pairs = S[:, :, odd if reverse else 0 :].narrow(2, 0, c - odd).unflatten(2, (-1, 2))
    first, second = (pairs[:, :, :, i].flatten(1, 2) for i in (0, 1)[::order])
    merged = torch.baddbmm(second, first, P).view(h, -1, c // 2, N)
    before, x = _recur(merged, x, P @ P, reverse)
    between = torch.baddbmm(first, before.flatten(1, 2), P).view_as(before)
    states = torch.stack((before, between)[::order], 3).flatten(2, 3)
    if odd:
        states = torch.cat((states, x[:, :, None])[::order], 2)
        x = torch.baddbmm(S[:, :, 0 if reverse else -1], x, P)
    return states, x
