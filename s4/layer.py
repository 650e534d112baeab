"""S4Layer: the parameters of one S4 layer, and its convolutional, recurrent and dense views."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from s4 import distributed, hippo, kernel, options
from s4.checks import (
    check_features,
    check_flag,
    check_integer,
    check_number,
    check_option,
    check_positions,
    check_sequence,
    check_state,
    check_tensor,
)
from s4.ops import dispatch, step
from s4.ops.kept import Kept
from s4.padding import Sequences, zero_padding
from s4.precision import double
from s4.pretrained import Modules, Pretrained, check_known, check_unused
from s4.sequence import sequence, states_at
from s4.sharded import fill, first_state
from s4.system import DISCRETIZATIONS, dense, discretize, system

# The arguments of a layer. Those that parameters are made from are read-only.
_FIXED = ("d_model", "d_state", "variant", "init", "dt_min", "dt_max", "n_ssm", "bidirectional")
_OPTIONS = ("discretization", "mode", "backend")
_MEANINGS = {"dt": "log_dt", "Lambda": "log_A_real and A_imag"}  # properties, by what they are made from


class S4Layer(Pretrained):
    """One structured state space layer: H independent systems x' = A x + B u, y = C x + D u over time.

    `forward` convolves, `step` recurs, `dense` writes the matrices out. All three are one system with one
    state (B, H, N): the real, then the imaginary parts of the N/2 stored modes. The parameters are those of
    the system in continuous time and serve every length.

    `mode`, `backend` and `discretization` can be set on a layer that exists; all else is read-only.

    In evaluation on a CPU, without gradients, the layer keeps what it computed from its parameters, some
    3 N^2 + L numbers a channel. It does so for one rate, until a parameter changes or the layer is moved or
    trained.

    Args:
        d_model: H, the number of channels.
        d_state: N, the state size of each channel, even; N/2 conjugate pairs are stored.
        variant: "dplr", diagonal plus low rank (S4, arXiv 2111.00396), or "diag" (S4D, arXiv 2206.11893).
        init: for "dplr" "legs", "legt" or "fout"; for "diag" "legs", "lin" or "inv": see `s4.hippo`. Or one's
            own tensors, (Lambda, P, B) or (Lambda, B): see `s4.hippo.own`.
        discretization: "bilinear" for "dplr"; "zoh" (default) or "bilinear" for "diag".
        dt_min, dt_max: range of the initial step sizes, log-uniform over the channels.
        n_ssm: independent (A, B) pairs, each shared by d_model / n_ssm neighbouring channels.
        bidirectional: also convolve backwards, with an output row C of its own. No state, no step.
        mode: how `forward` processes a sequence. "fft": by FFT convolution. "scan": by matrix products over
            chunks; under autocast to bfloat16 the larger products are in bfloat16, within 2% of the largest
            output. "auto": on a CPU the faster of the two by the shape, elsewhere "fft"; with a state "scan"
            on any device. A nan, or the rounding of a 1e10, reaches earlier outputs too: in "fft" all of its
            channel, in "scan" those of its chunk, in `step` none.
        backend: who computes, in every operation. "auto": the fastest that can run. Or a name of
            `s4.kernel.backends()`: that one where it has the operation, plain PyTorch where not. The kernel
            of "dplr" is then made by the sums of that backend, but not in graphs of torch.compile and
            torch.export.
        device: of the parameters. On a device without float64 (Apple's MPS), all that depends on parameters
            alone is computed on the CPU and copied to the device once a call, in float32. Calls with a state
            then take "scan" also where the mode is "fft", and `dense` returns its matrices on the CPU.
        dtype: of the parameters: torch.float64, float32, bfloat16 or float16, or its name. Each parameter may
            have a dtype of its own, as `layer.float()` or `layer.log_dt.data = ...` gives it. The mathematics
            is in float64; sequences and the state are in float32, or in float64 where D is. float16 ends at
            65504, which Lambda of "legs", "legt" and "inv" passes above d_state = 452.

    Attributes:
        log_dt: parameter (H,), the logarithms of the step sizes; see `dt`.
        log_A_real: parameter (n_ssm, N/2), of the real parts of the diagonal of A; see `Lambda`.
        A_imag: parameter (n_ssm, N/2), the imaginary parts.
        P: parameter (r, n_ssm, N/2, 2), the low-rank part of A; "dplr" alone has it.
        B: parameter (n_ssm, N/2, 2).
        C: parameter (1, H, N/2, 2); if bidirectional (2, H, N/2, 2).
        D: parameter (H,), what an input adds to its own output.

    Raises:
        ValueError, TypeError: an option or a combination that does not exist; the message names it.
        AttributeError: setting what is read-only.

    Examples:
        >>> layer = S4Layer(d_model=16, d_state=32)
        >>> u = torch.randn(8, 100, 16)  # batch, length, channels
        >>> layer(u).shape
        torch.Size([8, 100, 16])
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        variant: str = "dplr",
        init: str | Sequence[Any] = "legs",
        discretization: str | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        n_ssm: int = 1,
        bidirectional: bool = False,
        mode: str = "auto",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__()
        self._made = False
        options.check_sizes(d_model, d_state, n_ssm)
        init = options.initialisation(variant, init, d_state)
        options.check_steps(dt_min, dt_max)
        check_flag("bidirectional", bidirectional)
        dtype = options.dtype(dtype)

        self.d_model, self.d_state = d_model, d_state
        self.variant = variant
        self.init = init
        self.discretization = options.VARIANTS[variant] if discretization is None else discretization
        self.dt_min, self.dt_max = float(dt_min), float(dt_max)
        self.n_ssm, self.bidirectional = n_ssm, bidirectional
        self.mode, self.backend = mode, backend
        self._kept = Kept()

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        n, rank = d_state // 2, hippo.rank(init, variant, d_state)
        self.log_dt = empty(d_model)
        self.log_A_real = empty(n_ssm, n)  # Re Lambda = -exp(log_A_real) < 0: always stable
        self.A_imag = empty(n_ssm, n)
        if rank:
            self.P = empty(rank, n_ssm, n, 2)
        self.B = empty(n_ssm, n, 2)
        self.C = empty(1 + bidirectional, d_model, n, 2)
        self.D = empty(d_model)
        self.reset_parameters()
        self._made = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Options are checked as in the constructor, or read-only once the layer is made."""
        if name in (*_FIXED, "dtype", "device") and self.__dict__.get("_made"):
            raise AttributeError(
                f"{name} is read-only: make a new layer, S4Layer(**{{**layer.config(), ...}})"
            )
        if name in _MEANINGS:
            raise AttributeError(f"{name} is read-only: set what it is made of, {_MEANINGS[name]}")
        if name == "discretization":
            low_rank = self.variant == "dplr"
            names = [n for n, it in DISCRETIZATIONS.items() if it.low_rank or not low_rank]
            check_option(name, value, names, f" for variant={self.variant!r}")
        elif name == "mode":
            check_option(name, value, options.MODES)
        elif name == "backend":
            dispatch.check_backend(value)
        super().__setattr__(name, value)

    def config(self) -> dict[str, Any]:
        """The arguments that `S4Layer(**config)` makes such a layer with, but not its numbers or device.

        Returns:
            a dict that JSON can hold, with dtype by its name and one's own init as nested lists of [re, im].

        Raises:
            ValueError: parameters were moved to a dtype that no layer is made in.

        Examples:
            >>> layer = S4Layer(16, 32, dt_max=0.5)
            >>> layer.config()["dt_max"]
            0.5
            >>> again = S4Layer(**layer.config())  # the same options, new numbers
        """
        config = {name: getattr(self, name) for name in (*_FIXED, *_OPTIONS)}
        if not isinstance(self.init, str):
            config["init"] = [torch.view_as_real(part).tolist() for part in self.init]
        dtype = str(self.D.dtype).removeprefix("torch.")
        check_option("dtype", dtype, options.DTYPES, " to make a layer with")
        return {**config, "dtype": dtype}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], modules: Modules | None = None) -> "S4Layer":
        """A new layer of the options that `config()` returns: `S4Layer(**config)`.

        Args:
            config: as `config()` returns it, or JSON of that.
            modules: none; a layer is described by its options alone.

        Returns:
            the layer, with new numbers.

        Raises:
            ValueError, TypeError: an option that does not exist; the message names it.
        """
        check_known(config, (*_FIXED, *_OPTIONS, "dtype"), cls.__name__)
        check_unused(modules, {}, cls.__name__)
        return cls(**config)

    @property
    def dt(self) -> Tensor:
        """The step sizes exp(log_dt), (H,), above 0, float32 or float64."""
        return torch.exp(self.log_dt.to(options.wide(self.log_dt)))

    @property
    def Lambda(self) -> Tensor:
        """The diagonal of A, -exp(log_A_real) + i A_imag: (n_ssm, N/2), one of each conjugate pair."""
        dtype = options.wide(self.log_A_real, self.A_imag)
        return torch.complex(-torch.exp(self.log_A_real.to(dtype)), self.A_imag.to(dtype))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw dt, C and D anew and set A and B to their initialisation.

        A seed draws the same numbers for half-precision parameters as for float32, rounded.
        """
        for name, value in options.start(self.init, self.variant, self.d_state).items():
            if getattr(self, name).dtype == torch.float16:
                options.check_range(name, value, self.init, self.d_state)
            fill(getattr(self, name), value)
        self.C.copy_(options.unfilled(self.C).normal_(std=math.sqrt(0.5)))
        self.D.copy_(options.unfilled(self.D).normal_())
        self.log_dt.copy_(options.unfilled(self.log_dt).uniform_(*map(math.log, (self.dt_min, self.dt_max))))

    def ssm_parameters(self) -> list[Tensor]:
        """dt, A and B, which train at a smaller rate and without weight decay (S4 appendix D.2).

        Returns:
            log_dt, log_A_real, A_imag, P (of "dplr" alone) and B. Where a parametrization has replaced a
            parameter, its tensor.
        """
        low_rank = [self.P] if self.variant == "dplr" else []
        return [self.log_dt, self.log_A_real, self.A_imag, *low_rank, self.B]

    def train(self, mode: bool = True) -> "S4Layer":
        """Set training or evaluation mode, as every module does; training lets go what evaluation kept.

        Args:
            mode: True for training, False for evaluation.

        Returns:
            the layer itself.
        """
        if mode:
            self._kept.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "S4Layer":
        self._kept.clear()
        for name, p in self.named_parameters(recurse=False):
            large = p.dtype != torch.float16 and not options.fits_float16(p.detach())
            if large and fn(p.detach()).dtype == torch.float16:
                options.check_range(name, p.detach(), self.init, self.d_state)
        return super()._apply(fn, recurse)

    def forward(
        self,
        u: Sequences,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        rate: float | Tensor = 1.0,
        return_state: bool = False,
    ) -> Sequences | tuple[Sequences, Tensor]:
        """Map a batch of sequences to one of the same shape.

        Args:
            u: inputs (B, L, H), floating point, any L from 0; or a PackedSequence of such, without `lengths`.
            state: (B, H, N) to go on from, as `step` or an earlier `forward` returned it; None is zero.
            lengths: (B,) integers, the lengths of right-padded sequences. What lies past them is ignored,
                outputs there are zero, and a sequence's state is the one at its own end.
            resets: (B, L) booleans. At True a new sequence begins: the state is zero before that input, and
                backwards nothing passes it either. What lies before, even a nan, reaches no output behind.
                With mode="fft" outputs are accurate relative to the largest of their row.
            rate: multiplies dt, the time from one input to the next. After training at 16 kHz, 0.5 is for
                inputs at 32 kHz, whose steps are half as long, and 2 for those at 8 kHz. A tensor (B,) has a
                number for each sequence. A tensor (B, L) is for inputs at irregular times: dt rate[:, t]
                lies between inputs t-1 and t, in both directions. The first one, with no state before it,
                scales its input alone; past `lengths` it may be 0. With a tensor every mode is a recurrence
                of O(N) a step, which takes several times as long as a scan.
            return_state: also return the state after the last input.

        Returns:
            y (B, L, H) in the dtype of u, packed as u is; or (y, state) with the state (B, H, N), which is
            float64 where D is, else float32.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the argument.

        Examples:
            >>> layer, u = S4Layer(16), torch.randn(2, 100, 16)
            >>> y = layer(u)
            >>> first, state = layer(u[:, :60], return_state=True)  # in two pieces
            >>> second = layer(u[:, 60:], state)
            >>> torch.allclose(torch.cat([first, second], 1), y, atol=1e-4)
            True
        """
        if isinstance(u, PackedSequence):
            return distributed.packed(S4Layer.forward, self, u, state, lengths, resets, rate, return_state)
        causal = "state" if state is not None else "return_state" if return_state else ""
        dtype = self._check(1.0 if isinstance(rate, Tensor) else rate, causal)
        given = u, state, lengths, resets, rate
        piece = distributed.piece(self, *given, return_state) if distributed.engaged else None
        run, total = (sequence, None) if piece is None else (piece.sequence, piece.total)
        lengths, resets, rate = check_sequence(*given, self.D, self.d_state, dtype, total)
        x = u.to(dtype)
        # What "auto" chooses for its speed alone keeps its precision.
        products = dispatch.product_dtype(x) if self.mode == "scan" else dtype
        with dispatch.full_precision(u.device):
            if lengths is not None:
                x = zero_padding(x, lengths if piece is None else piece.own(lengths))
            how = self.mode, products, self.backend, return_state
            kept = None if self.training else self._kept
            y, after = run(self._systems(rate), self.D, x, state, lengths, resets, *how, kept)
            y = y.to(u.dtype)
        return (y, after) if after is not None else y

    def step(self, u: Tensor, state: Tensor, *, rate: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """One step of the recurrence x = A x' + B u, y = C x + D u; needs no call before it.

        A step is a `forward` of one input where the rate is a tensor, and where a hook runs before `forward`
        or another function stands in its place, as for sharded and offloaded parameters.

        Args:
            u: inputs (B, H) of one time step, floating point.
            state: (B, H, N), from `initial_state`, `forward` or an earlier `step`.
            rate: multiplies dt, as in `forward`; a number, or (B,) the step of time before each input.

        Returns:
            y (B, H) in the dtype of u, and the next state, in the dtype of the one before.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination, or a bidirectional layer; the message
                names the argument.

        Examples:
            >>> layer = S4Layer(16)
            >>> state = layer.initial_state(batch_size=2)
            >>> y, state = layer.step(torch.randn(2, 16), state)
            >>> y.shape, state.shape
            (torch.Size([2, 16]), torch.Size([2, 16, 64]))
        """
        dtype = self._check(1.0 if (many := isinstance(rate, Tensor)) else rate, "step")
        if many or self._forward_pre_hooks or "forward" in self.__dict__:
            check_features("u", u, self.d_model, "batch")
            check_tensor("state", state)
            y, state = self(u[:, None], state, rate=rate, return_state=True)
            return y[:, 0], state
        check_features("u", u, self.D, "batch")
        check_state("state", state, (u.shape[0], self.d_model, self.d_state), self.D, dtype)
        y, state = step.advance(
            self._systems(rate),
            self.D,
            state,
            u.to(dtype),
            self.backend,
            None if self.training else self._kept,
        )
        return y.to(u.dtype), state

    def states(
        self,
        u: Tensor,
        positions: Tensor,
        state: Tensor | None = None,
        *,
        resets: Tensor | None = None,
        rate: float | Tensor = 1.0,
    ) -> Tensor:
        """The states after chosen inputs of each sequence. The states between are not held in memory.

        There are no `lengths`, as what comes behind a position does not count.

        Args:
            u: inputs (B, L, H), as those of `forward`.
            positions: (B, P) integers, inputs from 0 to L-1 in any order; -1 is before the first.
            state, resets, rate: as in `forward`. A tensor `rate` must be above 0 in padding too.

        Returns:
            states (B, P, H, N), each as `forward` returns it of the inputs up to there; differentiable.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination, or a bidirectional layer; the message
                names the argument.

        Examples:
            >>> layer = S4Layer(16)
            >>> layer.states(torch.randn(2, 100, 16), torch.tensor([[9, 49], [0, 99]])).shape
            torch.Size([2, 2, 16, 64])
        """
        dtype = self._check(1.0 if isinstance(rate, Tensor) else rate, "states")
        _, resets, rate = check_sequence(u, state, None, resets, rate, self.D, self.d_state, dtype)
        positions = check_positions(positions, u.shape[0], u.shape[1], self.D)
        with dispatch.full_precision(u.device):
            return states_at(self._systems(rate), self.D, u.to(dtype), state, positions, resets, self.backend)

    def initial_state(self, batch_size: int) -> Tensor:
        """The state before any input.

        Args:
            batch_size: B, 0 or more.

        Returns:
            zeros (B, H, N), always a plain tensor, also where parameters are sharded or offloaded.

        Raises:
            ValueError, TypeError: a batch size that is none, or a bidirectional layer.
        """
        dtype = self._check(1.0, "initial_state")
        check_integer("batch_size", batch_size, 0)
        if (state := first_state(self, self.D, batch_size)) is not None:
            return state
        shape = (batch_size, self.d_model, self.d_state)
        return torch.zeros(shape, dtype=dtype, device=self.D.device)

    def kernel(self, L: int, *, rate: float = 1.0, method: str = "auto") -> Tensor:
        """The impulse response without D, K_l = C Abar^l Bbar (S4 equation 5).

        Args:
            L: length, 0 or more.
            rate: multiplies dt, as in `forward`; a number.
            method: "sums", over the modes; "powers", of the state matrix; "auto", the faster, or the sums of
                a backend that a "dplr" layer was given by name.

        Returns:
            (H, L); if bidirectional (2, H, L), forwards and backwards. float64 where D is, else float32.

        Raises:
            ValueError, TypeError: a wrong option or number; the message names the argument.

        Examples:
            >>> layer = S4Layer(16)
            >>> layer.kernel(1000).shape
            torch.Size([16, 1000])
        """
        dtype = self._check(rate)
        check_integer("L", L, 0)
        check_option("method", method, kernel.METHODS)
        with dispatch.full_precision(self.D.device):
            systems = system(*self._systems(rate))
            k = kernel.kernel(systems, discretize(systems), L, dtype, method=method, backend=self.backend)
        return (k if self.bidirectional else k[0]).to(self.D.device)

    def dense(self, *, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The discretised systems in float64: x = A x' + B u, y = C x + D u, with x' the state before.

        On the device of the parameters, or on the CPU if that has no float64.

        Args:
            rate: multiplies dt, as in `forward`; a number.

        Returns:
            A (H, N, N), B (H, N), C (H, N), or (2, H, N) if bidirectional, and D (H,).

        Raises:
            ValueError, TypeError: a rate that is no number above 0.

        Examples:
            >>> layer = S4Layer(16, d_state=4)
            >>> A, B, C, D = layer.dense()
            >>> A.shape, B.shape, C.shape, D.shape
            (torch.Size([16, 4, 4]), torch.Size([16, 4]), torch.Size([16, 4]), torch.Size([16]))
            >>> bool((torch.linalg.eigvals(A).abs() < 1).all())  # stable, at every step size
            True
        """
        self._check(rate)
        recurrence = discretize(system(*self._systems(rate)))
        C = recurrence.C if self.bidirectional else recurrence.C[0]
        return dense(recurrence), recurrence.B, C, double(self.D)

    def extra_repr(self) -> str:
        """The options and the shapes of the parameters, for `print(layer)`."""
        names = [n for n in (*_FIXED, *_OPTIONS) if n not in ("dt_min", "dt_max")]
        parts = [f"{n}=(...)" if isinstance(v := getattr(self, n), tuple) else f"{n}={v!r}" for n in names]
        shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in self.named_parameters())
        return f"{', '.join(parts)}\n{shapes}"

    def _systems(self, rate: float | Tensor) -> tuple[Any, ...]:
        """The arguments of `s4.system.system`."""
        P = self.P if self.variant == "dplr" else None
        return self.log_dt, self.log_A_real, self.A_imag, self.B, self.C, P, rate, self.discretization

    def _check(self, rate: float, causal: str = "") -> torch.dtype:
        """Of what every call needs; `causal` names what a bidirectional layer does not have.

        Returns:
            the dtype of states and of sequences within.
        """
        if distributed.engaged and causal in ("step", "states"):
            distributed.refuse(causal)
        if (dtype := options.COMPUTED.get(self.D.dtype)) is None:
            names = ", ".join(options.DTYPES)
            raise TypeError(f"S4Layer computes with parameters of {names}, got {self.D.dtype}")
        if type(rate) is not float or not 0 < rate < math.inf:
            check_number("rate", rate, 0, above=True)
        if len(self.D) != self.d_model:
            raise ValueError(f"D must have shape ({self.d_model},), got {tuple(self.D.shape)}")
        if self.backend != "auto" and (reason := dispatch.refusal(self.backend, self.D.device.type)):
            raise ValueError(reason)
        if causal and self.bidirectional:
            raise ValueError(f"{causal} needs a causal layer, but this one has bidirectional=True")
        return dtype
