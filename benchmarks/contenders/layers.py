"""What S4 is compared with: attention, an FFT convolution, the published formula, the original repository."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from einops import rearrange
from harness import folder
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from s4.kernel import cauchy

HEAD_DIM = 64
BROADCAST_LIMIT = 2**26  # elements H n L above which baselines that hold them several times are left out


class Attention(nn.Module):
    """Causal self-attention with heads of 64: of all positions at once, or of the newest over all so far."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.n_heads = d_model // HEAD_DIM
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, d_model) to the same."""
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.n_heads)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(y, "b h l d -> b l (h d)"))

    def step(self, x: Tensor, cache: Tensor, t: int) -> Tensor:
        """x (B, d_model) at position t; writes there in the cache (2, B, heads, max_len, head_dim)."""
        qkv = rearrange(self.qkv(x), "b (three h d) -> three b h 1 d", three=3, h=self.n_heads)
        cache[:, :, :, t : t + 1] = qkv[1:]
        keys, values = cache[:, :, :, : t + 1]
        y = scaled_dot_product_attention(qkv[0], keys, values)
        return self.out(rearrange(y, "b h 1 d -> b (h d)"))


def fft_convolution(u: Tensor, k: Tensor) -> Tensor:
    """u (B, H, L) and k (H, L) to (B, H, L) in the dtype of u, in float32."""
    L = u.shape[-1]
    size = 1 << (2 * L - 1).bit_length()
    y = torch.fft.irfft(torch.fft.rfft(_wide(u), size) * torch.fft.rfft(_wide(k), size), size)
    return y[..., :L].to(u.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def original_kernel(v: Tensor, w: Tensor, L: int) -> Tensor:
    """The published formula: v (4, H, n) residues of the four sums, w (H, n) poles, broadcast."""
    node = torch.exp(-2j * torch.pi * torch.arange(L // 2 + 1, device=w.device) / L).to(w.dtype)
    z = 2 * (1 - node) / (1 + node + 1e-6)
    r = cauchy(v, z, w, backend="naive")
    return torch.fft.irfft((r[0] - r[1] * r[2] / (1 + r[3])) * 2 / (1 + node + 1e-6), L)


class Official:
    """The kernels and layers of a checkout of the original repository, github.com/state-spaces/s4.

    Its `models/s4/s4.py` must have FFTConv, SSMKernelDPLR and SSMKernelDiag with a `backend`, as at e757cef.
    Contenders are named by its backends: on a CPU "naive" alone, on a GPU also "keops" where pykeops is
    installed and "cuda" where its extension is.

    Raises:
        SystemExit: the folder is no such checkout.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        if not (folder("--official", path) / "models" / "s4" / "s4.py").is_file():
            raise SystemExit(
                f"--official: no models/s4/s4.py in {path}: give a checkout of github.com/state-spaces/s4"
            )
        sys.path.insert(0, str(path))
        try:
            self._models = import_module("models.s4.s4")
        except ImportError as error:
            raise SystemExit(f"--official: {path} needs what is not installed here: {error}") from error
        finally:
            sys.path.remove(str(path))
        self._device = device
        self.backends = ["naive"]
        if device.type == "cuda":
            self.backends += ["keops"] * self._models.has_pykeops
            self.backends += ["cuda"] * self._models.has_cuda_extension

    def sums(self, name: str) -> dict[str, Callable[..., Tensor]]:
        """Its "cauchy" (v, z, w) or "log_vandermonde" (v, x, L), by contender."""
        return {f"official {b}": getattr(self._models, f"{name}_{b}") for b in self.backends}

    def kernels(self, variant: str, H: int, N: int, L: int) -> dict[str, nn.Module]:
        """Modules that make a kernel when called with L=L, by contender."""
        kinds = {"dplr": self._models.SSMKernelDPLR, "diag": self._models.SSMKernelDiag}
        return {
            f"official {b}": kinds[variant](
                d_model=H, l_max=L, d_state=N, n_ssm=1, init=_INITS[variant], backend=b
            ).to(self._device)
            for b in self.backends
        }

    def layers(self, H: int, N: int, L: int) -> dict[str, nn.Module]:
        """Its layers without activation and output map, (B, L, H) to the same and a state, by contender."""
        return {
            f"official {name} {b}": self._models.FFTConv(
                H, l_max=L, d_state=N, mode=variant, init=_INITS[variant], n_ssm=1,
                activation=None, transposed=False, backend=b,
            ).to(self._device)
            for name, variant in (("S4", "dplr"), ("S4D", "diag"))
            for b in self.backends
        }  # fmt: skip


_INITS = {"dplr": "legs", "diag": "diag-lin"}
