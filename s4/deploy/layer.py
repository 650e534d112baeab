"""One S4 layer in constants: what `s4.S4Layer` computes in evaluation, in a module without parameters."""

from typing import Any

import torch
from torch import Tensor, nn

from s4.checks import check_features, check_integer, check_state
from s4.deploy.tiles import Tiles, tile
from s4.layer import S4Layer
from s4.ops import dispatch, step
from s4.precision import without_denormals
from s4.system import Recurrence, discretize, system


class FrozenLayer(nn.Module):
    """Stands in the place of an `S4Layer` where inputs have one rate and no padding; see `s4.deploy.freeze`.

    It has no operator of ours and no complex number but between a transform and its inverse. Its numbers are
    float32, of a float64 layer float64, made in float64.
    """

    D: Tensor
    kernel: Tensor
    dtype: torch.dtype

    def __init__(self, layer: S4Layer, max_length: int | None, chunk: int, mode: str, rate: float) -> None:
        super().__init__()
        self.d_model, self.d_state, self.bidirectional = layer.d_model, layer.d_state, layer.bidirectional
        self.max_length, self.chunk_length, self.mode = max_length, chunk, mode
        self.rate, self.dtype = rate, layer.D.dtype  # of the layer; what it computes in is that of D
        dtype = torch.float64 if layer.D.dtype == torch.float64 else torch.float32
        P = layer.P if layer.variant == "dplr" else None
        parameters = layer.log_dt, layer.log_A_real, layer.A_imag, layer.B, layer.C, P
        recurrence = discretize(system(*parameters, rate, layer.discretization))
        self.register_buffer("D", layer.D.detach().to(dtype).clone())
        self.pieces: Any = None
        self.tiles: Any = None
        if not layer.bidirectional:
            for name, part in zip(Recurrence._fields, recurrence.to(dtype), strict=True):
                self.register_buffer(name, part)
            T = tile(layer.d_state, chunk)
            self.pieces = Tiles(recurrence, self.D, T, chunk, dtype, stateful=True)
        if max_length is not None and mode == "scan":
            T = tile(layer.d_state, max_length)
            self.tiles = Tiles(recurrence, self.D, T, max_length, dtype, stateful=False)
        elif max_length is not None:
            taps = max_length + 1  # cut to every length, so that the longest is no case of its own to export
            k = layer.kernel(taps, rate=rate).to(dtype).view(-1, layer.d_model, taps)
            k[0, :, 0] += self.D
            if layer.bidirectional:  # at lag -l from l = 1, as the first input behind an output meets K_0
                k[1] = k[1].roll(1, -1)
                k[1, :, 0] = 0
            self.register_buffer("kernel", without_denormals(k))

    def forward(
        self,
        u: Tensor,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        rate: float = 1.0,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map inputs (B, L, H) to outputs, L from 1 to max_length; with a state, what `chunk` returns.

        The arguments are those of `S4Layer.forward`, so that blocks and models around it find them.

        Raises:
            ValueError, TypeError: a wrong shape or dtype, a longer sequence, lengths, resets, another rate.
        """
        self._check_rate(rate)
        if lengths is not None:
            raise ValueError("lengths must be None: a frozen layer takes sequences of one length")
        if resets is not None:
            raise ValueError("resets must be None: a frozen layer takes one sequence a row; set states to 0")
        if state is not None or return_state:
            y, after = self.chunk(u, self.initial_state(len(u)) if state is None else state)
            return (y, after) if return_state else y
        check_features("u", u, self.D, "batch", "length")
        if self.max_length is None:
            raise ValueError("forward needs max_length: freeze(model, max_length=...)")
        if not 1 <= u.shape[1] <= self.max_length:
            raise ValueError(f"u must have 1 to max_length={self.max_length} steps, got {u.shape[1]}")
        with dispatch.full_precision(u.device):
            x = u.to(self.D.dtype)
            return (self._convolved(x) if self.tiles is None else self.tiles(x)[0]).to(u.dtype)

    def _convolved(self, u: Tensor) -> Tensor:
        """By FFT with the ready kernel: K u, of both directions (K_ahead + conj(K_behind)) u, in reals."""
        if dispatch.exporting_onnx():
            raise ValueError("mode='fft' is inexact in onnxruntime: freeze(model, ..., mode='scan') for ONNX")
        L = u.shape[1]
        n = 2 * L
        a = torch.view_as_real(torch.fft.rfft(u.transpose(1, 2), n))
        b = torch.view_as_real(torch.fft.rfft(self.kernel.narrow(-1, 0, L), n))
        re, im = b[0, ..., 0], b[0, ..., 1]
        if self.bidirectional:
            re, im = re + b[1, ..., 0], im - b[1, ..., 1]
        product = torch.stack([a[..., 0] * re - a[..., 1] * im, a[..., 0] * im + a[..., 1] * re], -1)
        return torch.fft.irfft(torch.view_as_complex(product), n).narrow(2, 0, L).transpose(1, 2).contiguous()

    def chunk(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (B, chunk, H) of as many inputs, and the state (B, H, N) after them, from that before."""
        self._check_causal("chunk")
        check_features("u", u, self.D, "batch", "chunk")
        if u.shape[1] != self.chunk_length:
            raise ValueError(
                f"with a state u must have chunk={self.chunk_length} steps, got {u.shape[1]}: "
                "freeze(model, chunk=...)"
            )
        check_state("state", state, (u.shape[0], self.d_model, self.d_state), self.D)
        with dispatch.full_precision(u.device):
            y, after = self.pieces(u.to(self.D.dtype), state)
            return y.to(u.dtype), after

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """One step: inputs (B, H) and the state (B, H, N) to the outputs and the next state."""
        self._check_rate(rate)
        self._check_causal("step")
        check_features("u", u, self.D, "batch")
        check_state("state", state, (u.shape[0], self.d_model, self.d_state), self.D)
        recurrence = Recurrence(*(getattr(self, name) for name in Recurrence._fields))
        with dispatch.full_precision(u.device):
            y, after = step.plain(recurrence, self.D, state, u.to(self.D.dtype))
            return y.to(u.dtype), after

    def initial_state(self, batch_size: int) -> Tensor:
        """The state before any input: zeros (B, H, N)."""
        self._check_causal("initial_state")
        check_integer("batch_size", batch_size, 0)
        return self.D.new_zeros(batch_size, self.d_model, self.d_state)

    def extra_repr(self) -> str:
        """The options."""
        names = ("d_model", "d_state", "bidirectional", "max_length", "chunk_length", "mode")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _check_causal(self, what: str) -> None:
        if self.bidirectional:
            raise ValueError(f"{what} needs a causal layer, but this one has bidirectional=True")

    def _check_rate(self, rate: float) -> None:
        if rate not in (1.0, self.rate):
            raise ValueError(f"rate is frozen at {self.rate}, got {rate}: freeze(model, rate={rate})")
