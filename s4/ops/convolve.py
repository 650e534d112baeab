"""Long convolutions by FFT, causal or two-sided, never circular."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from s4.ops import dispatch
from s4.ops.segments import Rows, in_rows, take


def fft_size(n: int) -> int:
    """Smallest even number of at least n with no prime factor above 5: a fast size of a real FFT."""
    best = 1 << max(n - 1, 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            # The least power of two that lifts 3^b 5^c to n, and at least 2.
            size = three << max((-(-n // three) - 1).bit_length(), 1)
            best = min(best, size)
            three *= 3
        five *= 5
    return best


def causal(u: Float[Tensor, "*batch H L"], k: Float[Tensor, "H K"]) -> Float[Tensor, "*batch H L"]:
    """y_t = sum over j <= t of k_{t-j} u_j, where k is 0 from K on."""
    if dispatch.opaque():
        return operator(u, k, None)
    run = circular if dispatch.transformed() else Circular.apply
    return run(u, _kernel(u.shape[-1], k, None))


def two_sided(
    u: Float[Tensor, "*batch H L"], k_forward: Float[Tensor, "H K"], k_backward: Float[Tensor, "H K2"]
) -> Float[Tensor, "*batch H L"]:
    """y_t = sum over j <= t of k_forward_{t-j} u_j + sum over j > t of k_backward_{j-t-1} u_j."""
    if dispatch.opaque():
        return operator(u, k_forward, k_backward)
    run = circular if dispatch.transformed() else Circular.apply
    return run(u, _kernel(u.shape[-1], k_forward, k_backward))


def _kernel(L: int, ahead: Tensor, behind: Tensor | None) -> Tensor:
    """The circular kernel (H, size) of the two for L inputs: no lag wraps onto the L outputs."""
    ahead = ahead[..., :L]
    if behind is None:
        size = fft_size(L + max(ahead.shape[-1], 1) - 1)
        return pad(ahead, (0, size - ahead.shape[-1]))
    behind = behind[..., : max(L - 1, 0)]
    size = fft_size(L + max(ahead.shape[-1] - 1, behind.shape[-1]))
    ahead = pad(ahead, (0, size - ahead.shape[-1] - behind.shape[-1]))
    return torch.cat([ahead, behind.flip(-1)], -1)


def convolve(
    u: Float[Tensor, "B L H"],
    k: Float[Tensor, "c H L"],
    D: Float[Tensor, "H"],
    more: Float[Tensor, "B H L"] | None = None,
    resets: Bool[Tensor, "B L"] | None = None,
) -> Float[Tensor, "B L H"]:
    """Outputs of kernels k, forward and, if there is a second, backward in time, with D a tap at lag 0.

    `more` is added to them: what a state before the first input gives. At a reset a new sequence begins.
    """
    ahead = k[0] + pad(D[:, None], (0, k.shape[-1] - 1))
    if resets is not None:
        apart = plain_segments if dispatch.transformed() else segments
        y = apart(u, ahead, k[1] if len(k) == 2 else None, resets)
        if more is None:
            return y
        return y + torch.where((resets.cumsum(1) == 0)[:, :, None], more.transpose(1, 2), 0)
    # In a graph torch would take a batch for the stride of a sequence of one step.
    turn = transpose if dispatch.opaque() or dispatch.transformed() else Transposed.apply
    rows = turn(u, False)
    y = causal(rows, ahead) if len(k) == 1 else two_sided(rows, ahead, k[1])
    y = y if more is None else y + more
    return turn(y, True)


def transpose(x: Tensor, back: bool) -> Tensor:
    """(B, L, H) to (B, H, L) with the steps of a sequence side by side in memory; back, the inverse.

    The same numbers, as one matrix transpose: a copy by blocks of a batch takes several times as long.
    """
    if back:
        B, H, L = x.shape
        return x.transpose(0, 1).reshape(H, B * L).t().contiguous().view(B, L, H)
    B, L, H = x.shape
    return x.reshape(B * L, H).t().contiguous().view(H, B, L).transpose(0, 1)


class Transposed(torch.autograd.Function):
    """`transpose`, whose gradient is its inverse."""

    generate_vmap_rule = True
    forward = staticmethod(transpose)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, bool], output: Tensor) -> None:  # type: ignore[no-untyped-def]
        ctx.back = inputs[1]

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        turn = transpose if dispatch.transformed() else Transposed.apply
        return turn(g, not ctx.back), None


def circular(u: Tensor, k: Tensor) -> Tensor:
    """The first L of the circular convolution of u (*batch, H, L) and k (H, size), both real."""
    if u.numel() == 0:
        return u.clone()
    size = k.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(k), size)[..., : u.shape[-1]]


class Circular(torch.autograd.Function):
    """`circular`; keeps u and k but no spectrum, and goes back through real transforms only."""

    generate_vmap_rule = True
    forward = staticmethod(circular)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]
        return _gradients(g, *ctx.saved_tensors, *ctx.needs_input_grad)


def _gradients(
    g: Tensor, u: Tensor, k: Tensor, need_u: bool = True, need_k: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `circular`, each if needed."""
    if u.numel() == 0:
        return torch.zeros_like(u), torch.zeros_like(k)
    size, grad_u, grad_k = k.shape[-1], None, None
    G = torch.fft.rfft(g, size)
    if need_u:
        grad_u = torch.fft.irfft(G * torch.fft.rfft(k).conj(), size)[..., : u.shape[-1]]
    if need_k:
        spectrum = (torch.fft.rfft(u, size).conj() * G).sum_to_size(*k.shape[:-1], G.shape[-1])
        grad_k = torch.fft.irfft(spectrum, size)
    return grad_u, grad_k


def _plain(u: Tensor, ahead: Tensor, behind: Tensor | None = None) -> Tensor:
    return circular(u, _kernel(u.shape[-1], ahead, behind))


@torch.library.custom_op("s4::convolve", mutates_args=())
def operator(u: Tensor, ahead: Tensor, behind: Tensor | None) -> Tensor:
    """`causal` or `two_sided`, where a graph is to serve every length: their FFT's size is found inside."""
    dispatch.refuse_tangents()
    return _plain(u, ahead, behind).contiguous()


@torch.library.custom_op("s4::convolve_backward", mutates_args=())
def operator_backward(
    grad: Tensor, u: Tensor, ahead: Tensor, behind: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, ahead and behind; of none, an empty one."""
    grads = torch.zeros_like(ahead), u.new_empty(0) if behind is None else torch.zeros_like(behind)
    return _add_gradients(grad, u, ahead, behind, *grads).contiguous(), *grads


def _add_gradients(
    g: Tensor, u: Tensor, ahead: Tensor, behind: Tensor | None, grad_ahead: Tensor, grad_behind: Tensor
) -> Tensor:
    """The gradient of u; those of the kernels are added to what is given."""
    L = u.shape[-1]
    grad_u, grad_k = _gradients(g, u, _kernel(L, ahead, behind))
    assert grad_u is not None
    assert grad_k is not None
    n = min(L, ahead.shape[-1])
    grad_ahead[..., :n] += grad_k[..., :n]
    if behind is not None:
        n = min(max(L - 1, 0), behind.shape[-1])
        grad_behind[..., :n] += grad_k.flip(-1)[..., :n]
    return grad_u


@operator.register_fake
def _(u: Tensor, ahead: Tensor, behind: Tensor | None) -> Tensor:
    return u.new_empty(u.shape)


@operator_backward.register_fake
def _(grad: Tensor, u: Tensor, ahead: Tensor, behind: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    none = u.new_empty(0) if behind is None else behind.new_empty(behind.shape)
    return u.new_empty(u.shape), ahead.new_empty(ahead.shape), none


def _save(ctx, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _pull(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[no-untyped-def]
    u, ahead, behind = ctx.saved_tensors
    if dispatch.recorded(grad):
        inputs = [t for t in ctx.saved_tensors if t is not None]
        found = dispatch.through(_plain, inputs, grad)
        return found[0], found[1], found[2] if len(found) > 2 else None  # type: ignore[return-value]
    grad_u, grad_ahead, grad_behind = operator_backward(grad, u, ahead, behind)
    return grad_u, grad_ahead, None if behind is None else grad_behind


operator.register_autograd(_pull, setup_context=_save)


def plain_segments(u: Tensor, ahead: Tensor, behind: Tensor | None, resets: Tensor) -> Tensor:
    """Sequences (B, L, H), each segment between resets (B, L) convolved as a sequence of its own."""
    if u.numel() == 0:
        return u.clone()
    layout = in_rows(resets)
    y = [circular(x, _kernel(x.shape[-1], ahead, behind)) for x in _blocks(u, layout)]
    return _joined(y, layout).view(u.shape)


def _blocks(u: Tensor, layout: Rows) -> Iterator[Tensor]:
    """The segments of (B, L, H) as (rows, H, slots), those of one size after the other."""
    flat, start = take(u.reshape(1, -1, u.shape[-1]), layout.source[None])[0], 0
    for rows, slots in layout.sizes:
        block = flat[start : start + rows * slots]
        yield transpose(block.view(rows, slots, u.shape[-1]), False)
        start += rows * slots


def _joined(blocks: list[Tensor], layout: Rows) -> Tensor:
    """The inverse of `_blocks`, (B L, H)."""
    flat = torch.cat([transpose(block, True).flatten(0, 1) for block in blocks])
    return take(flat[None], layout.place[None])[0]


@torch.library.custom_op("s4::convolve_segments", mutates_args=())
def segments(u: Tensor, ahead: Tensor, behind: Tensor | None, resets: Tensor) -> Tensor:
    """`plain_segments`, where segments lie found inside: a graph need not know."""
    dispatch.refuse_tangents()
    return plain_segments(u, ahead, behind, resets)


@torch.library.custom_op("s4::convolve_segments_backward", mutates_args=())
def segments_backward(
    grad: Tensor, u: Tensor, ahead: Tensor, behind: Tensor | None, resets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u, ahead and behind; of none, an empty one."""
    grads = torch.zeros_like(ahead), u.new_empty(0) if behind is None else torch.zeros_like(behind)
    if u.numel() == 0:
        return torch.zeros_like(u), *grads
    layout = in_rows(resets)
    pairs = zip(_blocks(grad, layout), _blocks(u, layout), strict=True)
    grad_u = [_add_gradients(g, x, ahead, behind, *grads) for g, x in pairs]
    return _joined(grad_u, layout).view(u.shape), *grads


@segments.register_fake
def _(u: Tensor, ahead: Tensor, behind: Tensor | None, resets: Tensor) -> Tensor:
    return u.new_empty(u.shape)


@segments_backward.register_fake
def _(
    grad: Tensor, u: Tensor, ahead: Tensor, behind: Tensor | None, resets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    none = u.new_empty(0) if behind is None else behind.new_empty(behind.shape)
    return u.new_empty(u.shape), ahead.new_empty(ahead.shape), none


def _pull_segments(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    u, ahead, behind, resets = ctx.saved_tensors
    if dispatch.recorded(grad):

        def run(*inputs: Tensor) -> Tensor:
            return plain_segments(inputs[0], inputs[1], inputs[2] if len(inputs) == 3 else None, resets)

        found = dispatch.through(run, [t for t in (u, ahead, behind) if t is not None], grad)
        return found[0], found[1], found[2] if len(found) == 3 else None, None
    grad_u, grad_ahead, grad_behind = segments_backward(grad, u, ahead, behind, resets)
    return grad_u, grad_ahead, None if behind is None else grad_behind, None


segments.register_autograd(_pull_segments, setup_context=_save)
