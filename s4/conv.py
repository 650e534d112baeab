"""The convolutional view: long convolutions by FFT, causal or two-sided, never circular."""

import torch
from jaxtyping import Float
from torch import Tensor


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
    L, K = u.shape[-1], min(k.shape[-1], u.shape[-1])
    if u.numel() == 0 or K == 0:
        return torch.zeros_like(u) + 0 * k.sum()
    size = fft_size(L + K - 1)
    spectrum = torch.fft.rfft(u, size) * torch.fft.rfft(k[..., :K], size)
    return torch.fft.irfft(spectrum, size)[..., :L]


def two_sided(
    u: Float[Tensor, "*batch H L"], k_forward: Float[Tensor, "H K"], k_backward: Float[Tensor, "H K2"]
) -> Float[Tensor, "*batch H L"]:
    """y_t = sum over j <= t of k_forward_{t-j} u_j + sum over j > t of k_backward_{j-t-1} u_j."""
    L = u.shape[-1]
    ahead, behind = k_forward[..., :L], k_backward[..., : max(L - 1, 0)]
    if u.numel() == 0 or ahead.shape[-1] + behind.shape[-1] == 0:
        return torch.zeros_like(u) + 0 * (k_forward.sum() + k_backward.sum())
    size = fft_size(L + max(ahead.shape[-1] - 1, behind.shape[-1]))  # no lag wraps onto the L outputs
    gap = ahead.new_zeros(ahead.shape[0], size - ahead.shape[-1] - behind.shape[-1])
    k = torch.cat([ahead, gap, behind.flip(-1)], -1)
    spectrum = torch.fft.rfft(u, size) * torch.fft.rfft(k, size)
    return torch.fft.irfft(spectrum, size)[..., :L]
