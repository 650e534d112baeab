"""S4Block: the residual block around an S4 layer."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from s4 import distributed
from s4.checks import (
    check_features,
    check_flag,
    check_integer,
    check_kind,
    check_lengths,
    check_number,
    check_option,
    check_tensor,
)
from s4.distributed import Piece
from s4.layer import S4Layer
from s4.ops import dispatch
from s4.padding import Sequences, padding, zero_padding
from s4.pretrained import Modules, Pretrained, check_known, check_unused, described_part
from s4.sharded import first_state, hooked

_ACTIVATION_OPTIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "none": nn.Identity,
}
_NORM_OPTIONS: dict[str, type[nn.Module]] = {
    "layer": nn.LayerNorm,
    "batch": nn.BatchNorm1d,
    "rms": nn.RMSNorm,
    "none": nn.Identity,
}


class S4Block(Pretrained):
    """x + mix(dropout(activation(S4(x)))), with a norm before S4 or after the sum.

    With `d_ff`, x + down(dropout(activation(up(x)))) follows, with a norm of its own in the same place.

    Args:
        layer: the S4 layer; its width, device and dtype are the block's.
        norm: "layer", "batch" (over the batch and time; padding does not count), "rms" or "none".
        prenorm: norm the input of S4 (True), or the sum (False, as in the S4 paper).
        activation: "gelu", "relu", "silu", "tanh" or "none".
        dropout: probability of zeroing an activation.
        residual_dropout: probability of zeroing what is added to x.
        tie_dropout: draw one mask a sequence and channel, the same at every time.
        mixer: what mixes the channels at each time: "glu", a gated linear unit, or "linear".
        d_ff: hidden width of the position-wise feed-forward network that follows; 0 for none.

    Raises:
        ValueError, TypeError: an option that does not exist; the message names it.

    Examples:
        >>> block = S4Block(S4Layer(16), dropout=0.1, d_ff=64)
        >>> block(torch.randn(8, 100, 16)).shape
        torch.Size([8, 100, 16])
    """

    def __init__(
        self,
        layer: S4Layer,
        *,
        norm: str = "layer",
        prenorm: bool = True,
        activation: str = "gelu",
        dropout: float = 0.0,
        residual_dropout: float = 0.0,
        tie_dropout: bool = False,
        mixer: str = "glu",
        d_ff: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(layer, S4Layer):
            raise TypeError(f"layer must be an S4Layer, got {type(layer).__name__}")
        check_option("norm", norm, _NORM_OPTIONS)
        check_flag("prenorm", prenorm)
        check_option("activation", activation, _ACTIVATION_OPTIONS)
        for name, p in (("dropout", dropout), ("residual_dropout", residual_dropout)):
            check_number(name, p, 0)
            if p >= 1:
                raise ValueError(f"{name} must be below 1, got {p}")
        check_flag("tie_dropout", tie_dropout)
        check_option("mixer", mixer, ("glu", "linear"))
        check_integer("d_ff", d_ff, 0)
        d_model, device, dtype = layer.d_model, layer.D.device, layer.D.dtype

        def linear(d_in: int, d_out: int) -> nn.Linear:
            return nn.Linear(d_in, d_out, device=device, dtype=dtype)

        self.prenorm = prenorm
        self.norm = _NORM_OPTIONS[norm](d_model, device=device, dtype=dtype)
        self.layer = layer
        self.activation = _ACTIVATION_OPTIONS[activation]()
        drop = nn.Dropout1d if tie_dropout else nn.Dropout
        self.dropout = drop(dropout)
        self.residual_dropout = drop(residual_dropout) if residual_dropout else None
        self.mixer: nn.Module = (
            nn.Sequential(linear(d_model, 2 * d_model), nn.GLU(dim=-1))
            if mixer == "glu"
            else linear(d_model, d_model)
        )
        self.feed_forward = (
            nn.ModuleDict(
                {
                    "norm": _NORM_OPTIONS[norm](d_model, device=device, dtype=dtype),
                    "up": linear(d_model, d_ff),
                    "down": linear(d_ff, d_model),
                }
            )
            if d_ff
            else None
        )

    def config(self) -> dict[str, Any]:
        """The options that `S4Block(layer, ...)` makes such a block with, and as "layer" those of its layer.

        Returns:
            a dict that JSON can hold.

        Raises:
            ValueError: a part was replaced by one that no option makes.

        Examples:
            >>> block = S4Block(S4Layer(16), norm="rms")
            >>> block.config()["norm"], block.config()["layer"]["d_model"]
            ('rms', 16)
        """
        kinds: tuple[type, ...] = type(self.mixer), *map(type, self.mixer.children())
        mixers: dict[tuple[type, ...], str] = {
            (nn.Linear,): "linear",
            (nn.Sequential, nn.Linear, nn.GLU): "glu",
        }
        tie = _option("dropout", self.dropout, {"each": nn.Dropout, "tied": nn.Dropout1d})
        options: dict[str, Any] = {
            "norm": _option("norm", self.norm, {**_NORM_OPTIONS, "batch": nn.modules.batchnorm._BatchNorm}),
            "prenorm": self.prenorm,
            "activation": _option("activation", self.activation, _ACTIVATION_OPTIONS),
            "dropout": self.dropout.p,
            "residual_dropout": 0.0 if self.residual_dropout is None else self.residual_dropout.p,
            "tie_dropout": tie == "tied",
            "mixer": mixers.get(kinds) or _option("mixer", self.mixer, {}),
            "d_ff": 0 if self.feed_forward is None else self.feed_forward["up"].out_features,
        }
        with torch.device("meta"):
            made = S4Block(S4Layer(self.layer.d_model, 2), **options)
        for name, part in self.named_children():
            if name != "layer" and not _alike(part, getattr(made, name)):
                raise ValueError(f"{name} was replaced by {part}, which no option of S4Block makes")
        return {"layer": described_part(self.layer, S4Layer, "layer"), **options}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], modules: Modules | None = None) -> "S4Block":
        """A new block of the options that `config()` returns.

        Args:
            config: as `config()` returns it, or JSON of that.
            modules: none; a block is described by its options alone.

        Returns:
            the block, with new numbers.

        Raises:
            ValueError, TypeError: an option that does not exist, or no "layer"; the message names it.
        """
        names = list(inspect.signature(S4Block.__init__).parameters)[1:]
        check_known(config, names, cls.__name__)
        check_unused(modules, {}, cls.__name__)
        if "layer" not in config:
            raise ValueError(f"a config of {cls.__name__} needs 'layer', that of its layer")
        return cls(**{**config, "layer": S4Layer.from_config(config["layer"])})

    def forward(
        self,
        x: Sequences,
        state: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        rate: float | Tensor = 1.0,
        return_state: bool = False,
    ) -> Sequences | tuple[Sequences, Tensor]:
        """Map a batch of sequences to one of the same shape.

        Args:
            x: inputs (B, L, d_model), or a PackedSequence of such.
            state: (B, d_model, N), that of the layer, to go on from; None is zero.
            lengths: (B,) integers, the lengths of right-padded sequences. Outputs past them mean nothing.
            resets: (B, L) booleans, True where a new sequence begins, as in `S4Layer.forward`.
            rate: multiplies dt; a number, (B,) or (B, L), as in `S4Layer.forward`.
            return_state: also return the layer's state after the last input.

        Returns:
            outputs (B, L, d_model), packed as x is; or (outputs, state).

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the argument.

        Examples:
            >>> block = S4Block(S4Layer(16))
            >>> y, state = block(torch.randn(8, 100, 16), return_state=True)
            >>> y.shape, state.shape
            (torch.Size([8, 100, 16]), torch.Size([8, 16, 64]))
        """
        if isinstance(x, PackedSequence):
            return distributed.packed(S4Block.forward, self, x, state, lengths, resets, rate, return_state)
        check_features("x", x, self.layer.d_model, "batch", "length")
        given = x, state, lengths, resets, rate
        piece = distributed.piece(self, *given, return_state) if distributed.engaged else None
        own = None  # of lengths, what lies in x
        if lengths is not None:
            lengths = check_lengths(lengths, x.shape[0], x.shape[1] if piece is None else piece.total, x)
            own = lengths if piece is None else piece.own(lengths)
            x = zero_padding(x, own)
        # A causal layer carries nothing back from behind the ends, where all is finite. Its masks are spared
        # in training only: in eval batch norm may put large numbers there, whose rounding an FFT spreads.
        spared = self.training and not (return_state or self.layer.bidirectional or isinstance(rate, Tensor))
        ends = None if spared else lengths
        after = None
        try:
            z = normed(self.norm, x, own, piece) if self.prenorm else x
            z = self.layer(z, state, lengths=ends, resets=resets, rate=rate, return_state=return_state)
            if return_state:
                z, after = z
            y = self._position_wise(x, z, own, piece)
        except RuntimeError as error:
            check_kind("x", x, self._position_wise_parameters(), error)
            raise
        return y if after is None else (y, after)

    def step(self, x: Tensor, state: Tensor, *, rate: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """One time step.

        In evaluation mode it gives what `forward` gives. In training mode dropout draws a mask for each step,
        also where it is tied, and batch norm takes its statistics over the batch alone.

        Args:
            x: inputs (B, d_model).
            state: (B, d_model, N), from `initial_state`, `forward` or an earlier `step`.
            rate: multiplies dt; a number, or (B,) the step of time before each input.

        Returns:
            outputs (B, d_model), and the next state.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination, or a bidirectional layer; the message
                names the argument.

        Examples:
            >>> block = S4Block(S4Layer(16)).eval()
            >>> y, state = block.step(torch.randn(8, 16), block.initial_state(8))
            >>> y.shape
            torch.Size([8, 16])
        """
        check_features("x", x, self.layer.d_model, "batch")
        if distributed.engaged:
            distributed.refuse("step")
        if hooked(self):
            check_tensor("state", state)
            y, state = self(x[:, None], state, rate=rate, return_state=True)
            return y[:, 0], state
        try:
            z = normed(self.norm, x[:, None], None)[:, 0] if self.prenorm else x
            z, state = self.layer.step(z, state, rate=rate)
            return self._position_wise(x[:, None], z[:, None], None)[:, 0], state
        except RuntimeError as error:
            check_kind("x", x, self._position_wise_parameters(), error)
            raise

    def initial_state(self, batch_size: int) -> Tensor:
        """The layer's state before any input.

        Args:
            batch_size: B, 0 or more.

        Returns:
            zeros (B, d_model, N).

        Raises:
            ValueError, TypeError: a batch size that is none, or a bidirectional layer.
        """
        state = first_state(self, self.layer.D, batch_size)
        return self.layer.initial_state(batch_size) if state is None else state

    def _position_wise(
        self, x: Tensor, z: Tensor, lengths: Tensor | None, piece: Piece | None = None
    ) -> Tensor:
        """What follows the S4 layer, from the block's input and the layer's output (B, L, d_model)."""
        x = self._add(x, self.mixer(self._activate(z, piece)), piece)
        if not self.prenorm:
            x = normed(self.norm, x, lengths, piece)
        if self.feed_forward is None:
            return x
        norm, up, down = self.feed_forward["norm"], self.feed_forward["up"], self.feed_forward["down"]
        z = down(self._activate(up(normed(norm, x, lengths, piece) if self.prenorm else x), piece))
        x = self._add(x, z, piece)
        return x if self.prenorm else normed(norm, x, lengths, piece)

    def _activate(self, z: Tensor, piece: Piece | None) -> Tensor:
        return dropped(self.dropout, self.activation(z), piece)

    def _add(self, x: Tensor, z: Tensor, piece: Piece | None) -> Tensor:
        return x + (z if self.residual_dropout is None else dropped(self.residual_dropout, z, piece))

    def _position_wise_parameters(self) -> list[Tensor]:
        return [p for name, p in self.named_parameters() if not name.startswith("layer.")]


def dropped(dropout: nn.Module, z: Tensor, piece: Piece | None) -> Tensor:
    """A dropout of z (B, L, d_model), tied over time or not."""
    if not isinstance(dropout, nn.Dropout1d):
        out: Tensor = dropout(z)
        return out
    if piece is not None and dropout.training:
        return z * piece.shared(dropout(z.new_ones(z.shape[0], z.shape[2], 1))).mT
    return rearrange(dropout(rearrange(z, "b l h -> b h l")), "b h l -> b l h")


def normed(norm: nn.Module, x: Tensor, lengths: Tensor | None, piece: Piece | None = None) -> Tensor:
    """A norm of x (B, L, d_model) at each position; padding does not enter the statistics of a batch norm."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):  # also SyncBatchNorm
        out: Tensor = norm(x)
        return out
    if piece is not None and isinstance(norm, nn.BatchNorm1d) and (norm.training or norm.running_var is None):
        return piece.batch_norm(norm, x, lengths)
    flat = x.flatten(0, 1)
    if lengths is None or not norm.training:
        all_of_it: Tensor = norm(flat)
        return all_of_it.view_as(x)
    inside = (~padding(lengths, x.shape[1])).flatten().nonzero()[:, 0]
    if dispatch.compiling():  # what a graph has to know of a number that it does not
        torch._check(inside.shape[0] > 1)
    some = norm(flat.index_select(0, inside)).to(x.dtype)
    return flat.detach().index_copy(0, inside, some).view_as(x)


def _alike(a: nn.Module, b: nn.Module) -> bool:
    """Whether torch shows the same arguments of two modules, and of all their parts."""
    parts = dict(a.named_children()), dict(b.named_children())
    same = a.extra_repr() == b.extra_repr() and parts[0].keys() == parts[1].keys()
    return same and all(_alike(part, parts[1][name]) for name, part in parts[0].items())


def _option(name: str, part: nn.Module, options: Mapping[str, type[nn.Module]]) -> str:
    """The option that makes a part of a block."""
    found = [option for option, kind in options.items() if isinstance(part, kind)]
    if not found:
        raise ValueError(f"{name} was replaced by {type(part).__name__}, which no option of S4Block makes")
    return found[0]
