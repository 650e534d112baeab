"""S4Layer: the parameters of one S4 layer, and its convolutional, recurrent and dense views."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from s4 import conv, hippo, scan, ssm
from s4._cache import Cache, usable, watched
from s4.backends import cpu
from s4.checks import (
    check_features,
    check_flag,
    check_integer,
    check_lengths,
    check_number,
    check_option,
    check_state,
)
from s4.kernel import _stepping, diag, dplr
from s4.kernel._choice import check_backend, exporting, has_autocast, has_fused_powers, transformed
from s4.padding import zero_padding
from s4.ssm import Propagator, System

_INITS = {"dplr": ("legs", "legt", "fout"), "diag": ("legs", "lin", "inv")}
_DISCRETIZATIONS = {"dplr": ("bilinear",), "diag": ("zoh", "bilinear")}
_MODES = ("auto", "fft", "scan")
_MIN_DECAY = (
    1e-4  # of -Re Lambda at initialisation: LegT and FouT have none, and its logarithm is a parameter
)


class S4Layer(nn.Module):
    """One structured state space layer: H independent systems x' = A x + B u, y = C x + D u over time.

    `forward` convolves, `step` recurs, `dense` writes the matrices out; all three are one system with one
    state: the real, then the imaginary parts of the N/2 stored modes, (B, H, N). Parameters are those of the
    continuous system and serve every length.

    Args:
        d_model: H, number of channels.
        d_state: N, state size of each channel, even; N/2 conjugate pairs are stored.
        variant: "dplr", diagonal plus low rank (S4, arXiv 2111.00396), or "diag" (S4D, arXiv 2206.11893).
        init: for "dplr" "legs", "legt" or "fout"; for "diag" "legs", "lin" or "inv". See `s4.hippo`.
        discretization: "bilinear" for "dplr"; "zoh" (default) or "bilinear" for "diag".
        dt_min, dt_max: range of the initial step sizes, log-uniform over the channels.
        n_ssm: independent (A, B) pairs, each shared by d_model / n_ssm neighbouring channels.
        bidirectional: also convolve backwards, with an output row C of its own. No state, no step.
        mode: how `forward` processes a sequence: "fft", by FFT convolution; "scan", by matrix products over
            chunks, under autocast to bfloat16 the larger ones in that, within 2% of the largest output; or
            "auto", by the shape the faster one on a CPU, elsewhere "fft".
        backend: who computes the kernel: "auto", or the Cauchy or Vandermonde sums of one of
            `s4.kernel.backends()`.
        device: of the parameters.
        dtype: of the parameters and the state, torch.float32 or torch.float64.

    Raises:
        ValueError, TypeError: an option or a combination that does not exist; the message names it.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        variant: str = "dplr",
        init: str = "legs",
        discretization: str | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        n_ssm: int = 1,
        bidirectional: bool = False,
        mode: str = "auto",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("d_model", d_model, 1)
        check_integer("d_state", d_state, 2)
        check_integer("n_ssm", n_ssm, 1)
        if d_state % 2:
            raise ValueError(f"d_state must be even, as modes come in conjugate pairs, got {d_state}")
        if d_model % n_ssm:
            raise ValueError(f"n_ssm must divide d_model ({d_model}), got {n_ssm}")
        check_option("variant", variant, _INITS)
        check_option("init", init, _INITS[variant], f" for variant={variant!r}")
        if discretization is None:
            discretization = _DISCRETIZATIONS[variant][0]
        check_option("discretization", discretization, _DISCRETIZATIONS[variant], f" for variant={variant!r}")
        check_number("dt_min", dt_min, 0, above=True)
        check_number("dt_max", dt_max, dt_min)
        check_flag("bidirectional", bidirectional)
        check_option("mode", mode, _MODES)
        check_backend(backend)
        dtype = dtype or torch.get_default_dtype()
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")

        self.d_model = d_model
        self.d_state = d_state
        self.variant = variant
        self.init = init
        self.discretization = discretization
        self.dt_min = dt_min
        self.dt_max = dt_max
        self.n_ssm = n_ssm
        self.bidirectional = bidirectional
        self.mode = mode
        self.backend = backend
        self._cache: Cache[ssm.Recurrence] = Cache()  # of `step`

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        n = d_state // 2
        rank = 0 if variant == "diag" else 2 if init == "legt" else 1
        self.log_dt = empty(d_model)
        self.log_A_real = empty(n_ssm, n)  # Re Lambda = -exp(log_A_real) < 0: always stable
        self.A_imag = empty(n_ssm, n)
        if rank:
            self.P = empty(rank, n_ssm, n, 2)
        self.B = empty(n_ssm, n, 2)
        self.C = empty(1 + bidirectional, d_model, n, 2)
        self.D = empty(d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw dt, C and D anew and set A and B to their initialisation."""
        if self.variant == "dplr":
            Lambda, P, B = hippo.dplr(self.init, self.d_state)
            self.P.copy_(torch.view_as_real(P)[:, None])
        else:
            Lambda, B = hippo.diag(self.init, self.d_state)
        self.log_A_real.copy_(torch.log((-Lambda.real).clamp(min=_MIN_DECAY)))
        self.A_imag.copy_(Lambda.imag)
        self.B.copy_(torch.view_as_real(B))
        self.C.normal_(std=math.sqrt(0.5))
        self.D.normal_()
        self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))

    def ssm_parameters(self) -> list[Tensor]:
        """dt, A and B, which train at a smaller rate and without weight decay (S4 appendix D.2).

        Parameters, but for those that a parametrization has put a tensor in the place of.
        """
        low_rank = [self.P] if self.variant == "dplr" else []
        return [self.log_dt, self.log_A_real, self.A_imag, *low_rank, self.B]

    def forward(
        self,
        u: Tensor,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        rate: float = 1.0,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map a batch of sequences to one of the same shape.

        Args:
            u: inputs (B, L, H), floating point, any L from 0.
            state: (B, H, N) to go on from, as `step` or an earlier `forward` returned it; None is zero.
            lengths: (B,) integers, the lengths of right-padded sequences. What lies past them is ignored,
                outputs there are zero, and a sequence's state is the one at its own end.
            rate: multiplies dt; 0.5 for inputs sampled twice as fast as those trained on.
            return_state: also return the state after the last input.

        Returns:
            y (B, L, H) in the dtype of u, or (y, state) with the state (B, H, N) in that of the parameters.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the argument.
        """
        self._check_parameters(rate)
        check_features("u", u, self.D, "batch", "length")
        if state is not None:
            self._check_causal("state")
            check_state("state", state, (u.shape[0], self.d_model, self.d_state), self.D)
        if return_state:
            self._check_causal("return_state")
        if lengths is not None:
            lengths = check_lengths(lengths, u.shape[0], u.shape[1], self.D)
        products = self._product_dtype()
        with _full_precision(u.device):
            return self._forward(u, state, lengths, rate, return_state, products)

    def _forward(
        self,
        u: Tensor,
        state: Tensor | None,
        lengths: Tensor | None,
        rate: float,
        return_state: bool,
        products: torch.dtype,
    ) -> Tensor | tuple[Tensor, Tensor]:
        L = u.shape[1]
        x = u.to(self.D.dtype)
        if lengths is not None:
            x = zero_padding(x, lengths)
        system = self._system(rate)
        propagator = Propagator(ssm.discretize(system, self.discretization))
        scans = self.mode == "scan" or (
            (self.mode, self.backend) == ("auto", "auto")
            and scan.pays(u.shape[0], L, propagator, return_state or state is not None)
        )
        if scans:
            y, last = scan.scan(x, propagator, self.D, state, products)
            x = x.mT
        else:
            x = conv.by_channel(x)
            k = self._kernel(system, propagator, L)
            ahead = k[0] + torch.nn.functional.pad(self.D[:, None], (0, L - 1))  # D is a tap at lag 0
            y = conv.two_sided(x, ahead, k[1]) if self.bidirectional else conv.causal(x, ahead)
            if state is not None:
                y = y + propagator.continuation(state, L)
            y = conv.by_time(y)
        if lengths is not None:
            y = zero_padding(y, lengths)
        y = y.to(u.dtype)
        if not return_state:
            return y
        if lengths is None and scans:
            return y, last
        if lengths is None:
            lengths = torch.full(u.shape[:1], L, device=u.device)
        else:  # right-align, so that every sequence ends with its last input
            source = torch.arange(L, device=u.device) - (L - lengths[:, None, None])
            x = x.gather(-1, source.clamp(min=0).expand_as(x)).masked_fill(source < 0, 0)
        after = propagator.drive(x)
        return y, after if state is None else after + propagator.advance(state, lengths, L)

    def step(self, u: Tensor, state: Tensor, *, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """One step of the recurrence; needs no call before it.

        Args:
            u: inputs (B, H) of one time step, floating point.
            state: (B, H, N), from `initial_state`, `forward` or an earlier `step`.
            rate: multiplies dt, as in `forward`.

        Returns:
            y (B, H) in the dtype of u, and the next state.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the argument.
        """
        self._check_parameters(rate)
        self._check_causal("step")
        D = self.D
        check_features("u", u, D, "batch")
        check_state("state", state, (u.shape[0], self.d_model, self.d_state), D)
        v = u.to(D.dtype)
        still = not self.training and not torch.is_grad_enabled() and not transformed()
        fused = still and has_fused_powers(D.device.type) and (self.variant == "diag" or len(self.P) <= 2)
        plain = type(D) in (Tensor, torch.nn.Parameter)
        if fused and plain and torch.compiler.is_compiling() and not exporting():
            y, state = _stepping.step_kept(self._of_system(), D, state, v, rate, self.discretization)
            return y.to(u.dtype), state
        keeps = still and usable(D) and not watched(v, state)
        if keeps and fused:
            if len(D) != self.d_model:
                raise ValueError(f"D must have shape ({self.d_model},), got {tuple(D.shape)}")
            # Without an operator, whose call takes a third of the time of a step.
            y, state = cpu.step(*self._recurrence_kept(rate), D, state, v)
            return y.to(u.dtype), state
        if fused and usable(D):
            y, state = _stepping.step(*self._recurrence(rate), D, state, v)
            return y.to(u.dtype), state
        with _full_precision(u.device):
            recurrence = self._recurrence_kept(rate) if keeps else self._recurrence(rate)
            y, state = ssm.step(recurrence, state, v)
            return (y + D * v).to(u.dtype), state

    def _recurrence(self, rate: float) -> ssm.Recurrence:
        """Discretised, in the precision of the parameters."""
        return ssm.discretize(self._system(rate), self.discretization).to(self.D.dtype)

    def _recurrence_kept(self, rate: float) -> ssm.Recurrence:
        """The same, made anew only after a change."""
        parameters = [p for p in self._of_system() if p is not None]
        options = rate, self.discretization

        def make() -> ssm.Recurrence:
            recurrence = self._recurrence(rate)
            _stepping.check_shapes(recurrence, self.d_model, self.d_state)
            return recurrence

        return self._cache.get(parameters, options, make)

    def initial_state(self, batch_size: int) -> Tensor:
        """The state before any input: zeros (B, H, N)."""
        self._check_causal("initial_state")
        check_integer("batch_size", batch_size, 0)
        return self.D.new_zeros(batch_size, self.d_model, self.d_state)

    def kernel(self, L: int, *, rate: float = 1.0) -> Tensor:
        """Impulse response without D: (H, L); if bidirectional (2, H, L), forward and backward."""
        self._check_parameters(rate)
        check_integer("L", L, 0)
        with _full_precision(self.D.device):
            system = self._system(rate)
            k = self._kernel(system, Propagator(ssm.discretize(system, self.discretization)), L)
        return k if self.bidirectional else k[0]

    def dense(self, *, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The discretised systems in float64: x = A x' + B u, y = C x + D u, with x' the state before.

        Returns:
            A (H, N, N), B (H, N), C (H, N), or (2, H, N) if bidirectional, and D (H,).
        """
        self._check_parameters(rate)
        recurrence = ssm.discretize(self._system(rate), self.discretization)
        C = recurrence.C if self.bidirectional else recurrence.C[0]
        return ssm.dense(recurrence), recurrence.B, C, self.D.double()

    def extra_repr(self) -> str:
        """The options, and with them the shapes: d_state counts real numbers a channel."""
        parts = [
            f"d_model={self.d_model}",
            f"d_state={self.d_state}",
            f"variant={self.variant!r}",
            f"init={self.init!r}",
            f"discretization={self.discretization!r}",
            f"n_ssm={self.n_ssm}",
            f"bidirectional={self.bidirectional}",
            f"mode={self.mode!r}",
            f"backend={self.backend!r}",
        ]
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in self.named_parameters())
        return f"{', '.join(parts)}\n{shapes}"

    def _system(self, rate: float) -> System:
        """Parameters in double precision, one system a channel."""
        return ssm.system(*self._of_system(), rate)

    def _of_system(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        P = self.P if self.variant == "dplr" else None
        return self.log_dt, self.log_A_real, self.A_imag, self.B, self.C, P

    def _kernel(self, system: System, propagator: Propagator, L: int) -> Tensor:
        if self.variant == "dplr":
            return dplr.kernel(system, propagator, L, self.D.dtype, self.backend)
        return diag.kernel(propagator, L, self.D.dtype, self.backend)

    def _product_dtype(self) -> torch.dtype:
        """Of the large products of a scan: that of the parameters, or bfloat16 where autocast asks for it.

        Not where "auto" chose the scan: what is chosen for its speed alone keeps its precision.
        """
        kind = self.D.device.type
        if self.mode != "scan" or not has_autocast(kind) or not torch.is_autocast_enabled(kind):
            return self.D.dtype
        lower = torch.get_autocast_dtype(kind)
        return lower if (self.D.dtype, lower) == (torch.float32, torch.bfloat16) else self.D.dtype

    def _check_parameters(self, rate: float) -> None:
        if self.D.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"S4Layer computes with float32 or float64 parameters, got {self.D.dtype}: "
                "keep the layer in float32 and use torch.autocast for reduced precision"
            )
        check_number("rate", rate, 0, above=True)

    def _check_causal(self, what: str) -> None:
        if self.bidirectional:
            raise ValueError(f"{what} needs a causal layer, but this one has bidirectional=True")


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast, where the device has one."""
    if has_autocast(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
