"""The original's blocks as S4Block."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from s4.block import S4Block
from s4.checks import check_flag
from s4.convert.entries import Entries, undisturbed
from s4.convert.kinds import Options, Site
from s4.convert.layers import only, read_layer, with_dt_transform

_GATES = ("input_gate", "output_gate", "input_linear")


class Style(NamedTuple):
    """What a state dict does not tell of its blocks: see `block`."""

    prenorm: bool | None = None
    activation: str = "gelu"
    dropout: float = 0.0
    tie_dropout: bool = False


class Place(NamedTuple):
    """A block in a state dict.

    inner: prefix of the original's `S4Block` or `S4D`, without norm and residual.
    norm: prefix of the norm around it; None if there is none.
    around: "nothing", the "residual" block of the original's train.py, or its "example" of a model.
    """

    inner: str
    norm: str | None
    around: str


def block(
    state_dict: Mapping[str, Any],
    *,
    prenorm: bool | None = None,
    activation: str = "gelu",
    dropout: float = 0.0,
    tie_dropout: bool = False,
    discretization: str | None = None,
    dt_transform: str | None = None,
    real_transform: str = "exp",
    imag_transform: str = "none",
) -> S4Block:
    """The residual block of a state dict of the original repository, github.com/state-spaces/s4.

    Of its `SequenceResidualBlock` around an S4 layer, or of a layer and its norm of example.py
    ("s4_layers.0...", "norms.0..."), the whole block. The original's own `S4Block`, and its minimal `S4D`,
    have neither norm nor residual: of such a dict a block with norm="none", whose output is x plus theirs.
    Sequences are (B, L, d_model), whatever `transposed` was.

    A dict does not tell what has no parameters. What can be converted are the arguments. The following has no
    counterpart, and gives other outputs without an error: a `final_act` other than "glu" and "id", a
    `mult_act`, norms "group" and "instance", residuals "D", "F", or with alpha or beta; `pool` with a stride.

    Args:
        state_dict: tensors by name; a checkpoint's "state_dict" or "model" is found.
        prenorm: whether the norm comes before the layer; None is the default of the original where the block
            stands: True in its `SequenceResidualBlock`, False in example.py.
        activation: before the output map, one of those of `s4.S4Block`.
        dropout: after the activation and, of a whole residual block, before the sum. The original draws a
            second time before the activation where that is within its layer.
        tie_dropout: as in `s4.S4Block`; True in example.py.
        discretization, real_transform, imag_transform: as in `s4.convert.layer`.
        dt_transform: as there; None is "exp". A `SequenceResidualBlock` of version 4 needs it: train.py has
            "softplus" in its configurations.

    Returns:
        the block, in training mode, with parameters of the dict's dtype on its device; `glu` or `linear` by
        the shape of `output_linear`. A weight norm is multiplied out.

    Raises:
        ValueError, TypeError: no block, several, or one with no counterpart, as those with `gate` and
            `bottleneck`; keys that are missing or unknown; the message says which and what to do.

    Examples:
        >>> original = {  # the minimal S4D, with its output map
        ...     "D": torch.ones(4),
        ...     "kernel.log_dt": torch.full((4,), -5.0),
        ...     "kernel.C": torch.randn(4, 32, 2),
        ...     "kernel.log_A_real": torch.zeros(4, 32),
        ...     "kernel.A_imag": torch.arange(32.0).repeat(4, 1),
        ...     "output_linear.0.weight": torch.randn(8, 4, 1),
        ...     "output_linear.0.bias": torch.zeros(8),
        ... }
        >>> block(original)(torch.randn(2, 100, 4)).shape
        torch.Size([2, 100, 4])
    """
    options = Options(discretization, dt_transform, real_transform, imag_transform)
    options.check()
    style = Style(prenorm, activation, dropout, tie_dropout)
    entries = Entries.of(state_dict)
    check_one_way(entries)
    site = only(entries, "block")
    with undisturbed():
        made = read_block(entries, site, place(entries, site), style, options)
    entries.check_known()
    return made


def check_one_way(entries: Entries) -> None:
    """That there is no block with two layers side by side.

    Raises:
        ValueError: there is.
    """
    if two := [key for key in entries if "reverse_layer." in key]:
        raise ValueError(
            f"{two[0]} is of a block of two layers, bidirectional=True of the original's SequenceModel: "
            "there is no counterpart. s4.convert.layer converts each of the two"
        )


def place(entries: Entries, site: Site) -> Place:
    """Where the block around a layer is.

    Raises:
        ValueError: there is none.
    """
    nested = site.kind.name == "version 4"  # its S4Block holds D one level deeper than the others
    inner = site.layer.removesuffix("layer.") if nested and _ends(site.layer, "layer") else site.layer
    found = [name for name in entries.under(inner) if name.startswith("output_linear.")]
    if site.alone or not found or (nested and inner == site.layer):
        raise ValueError(
            f"there is no output_linear beside the S4 layer at {site.layer or 'the top'!r}: this is the dict "
            "of a layer, which s4.convert.layer converts, or of an S4Block with final_act=None, which has no "
            "counterpart"
        )
    for gate in _GATES:
        if any(name.startswith(f"{gate}.") for name in entries.under(inner)):
            raise ValueError(
                f"{inner}{gate} is of an S4Block with `gate` or `bottleneck`: there is no counterpart. "
                "s4.convert.layer converts the S4 layer in it"
            )
    listed = re.fullmatch(r"(|.*\.)s4_layers\.(\d+)\.", inner)  # of example.py
    if listed and entries.under(norm := f"{listed[1]}norms.{listed[2]}."):
        return Place(inner, norm, "example")
    if _ends(inner, "layer"):  # of a SequenceResidualBlock, whose norm may be none
        outer = inner.removesuffix("layer.")
        norms = [outer + name for name in ("norm.norm.", "norm.") if entries.under(outer + name)]
        return Place(inner, norms[0] if norms else None, "residual")
    return Place(inner, None, "nothing")


def read_block(
    entries: Entries, site: Site, at: Place, style: Style, options: Options, ff: str = ""
) -> S4Block:
    """A block from its place in a state dict; `ff` is the prefix of a feed-forward block that joins it."""
    options = with_dt_transform(options, site, at.around == "residual")
    layer = read_layer(entries, site, options)
    H = layer.d_model
    weights, glu = _mixer(entries, at.inner, H)
    kind, norm = norm_of(entries, at.norm, H)
    weights |= {f"norm.{name}": value for name, value in norm.items()}
    d_ff = 0
    if ff:
        weights |= _feed_forward(entries, ff, H, kind)
        d_ff = len(weights["feed_forward.up.weight"])
    if style.prenorm is not None:
        check_flag("prenorm", style.prenorm)
    made = S4Block(
        layer,
        norm=kind,
        prenorm=at.around != "example" if style.prenorm is None else style.prenorm,
        activation=style.activation,
        dropout=style.dropout,
        residual_dropout=0.0 if at.around == "nothing" else style.dropout,
        tie_dropout=style.tie_dropout,
        mixer="glu" if glu else "linear",
        d_ff=d_ff,
    )
    own = {f"layer.{name}": value for name, value in layer.state_dict().items()}
    made.load_state_dict(own | weights)
    return made


def _mixer(entries: Entries, inner: str, H: int) -> tuple[dict[str, Tensor], bool]:
    """The output map of an original block, and whether it is a gated linear unit."""
    prefix = f"{inner}output_linear."
    names = entries.under(prefix)
    within = "0." if any(name.startswith("0.") for name in names) else ""  # a Sequential with its activation
    weight = linear_weight(entries, prefix + within, "mixer", (2 * H, H), (H, H))
    glu = len(weight) == 2 * H
    bias = entries.take(f"{prefix}{within}bias", "mixer", (len(weight),), (len(weight), 1)).flatten()
    ours = "mixer.0." if glu else "mixer."
    return {f"{ours}weight": weight, f"{ours}bias": bias}, glu


def linear_weight(entries: Entries, prefix: str, became: str, *shapes: tuple[int, int]) -> Tensor:
    """Of a linear map, or a convolution of size 1, with its weight norm multiplied out."""
    both = [*shapes, *[(*shape, 1) for shape in shapes]]
    if f"{prefix}weight_g" in entries:
        v = entries.take(f"{prefix}weight_v", f"{became}, its weight norm multiplied out", *both).flatten(1)
        g = entries.take(
            f"{prefix}weight_g", f"{became}, its weight norm multiplied out", (len(v), 1), (len(v), 1, 1)
        )
        return v * (g.flatten(1) / v.norm(dim=1, keepdim=True))
    return entries.take(f"{prefix}weight", became, *both).flatten(1)


def norm_of(entries: Entries, prefix: str | None, H: int) -> tuple[str, dict[str, Tensor]]:
    """What `S4Block` calls a norm, and its parameters."""
    if prefix is None:
        return "none", {}
    names = set(entries.under(prefix))
    if names == {"m", "s"}:
        raise ValueError(
            f"{prefix}m and {prefix}s are of the original's TransposedLN, the layer norm of transposed=True, "
            "which shifts before it scales: there is no counterpart"
        )
    wanted: dict[str, tuple[int, ...]] = {"weight": (H,), "bias": (H,)}
    batch = "running_mean" in names
    if batch:
        wanted |= {"running_mean": (H,), "running_var": (H,), "num_batches_tracked": ()}
    kind = "batch" if batch else "layer"
    return kind, {
        name: entries.take(prefix + name, f"a {kind} norm", shape) for name, shape in wanted.items()
    }


def _feed_forward(entries: Entries, outer: str, H: int, kind: str) -> dict[str, Tensor]:
    """The original's residual block around an FFN: ours has the norm of the S4 block before it."""
    norms = [outer + name for name in ("norm.norm.", "norm.") if entries.under(outer + name)]
    found, norm = norm_of(entries, norms[0] if norms else None, H)
    if found != kind:
        raise ValueError(f"{outer}norm is of kind {found!r}, but that of the S4 block before it {kind!r}")
    up = linear_weight(entries, f"{outer}layer.ff.0.0.", "feed_forward.up", (-1, H))
    d_ff = len(up)
    down = linear_weight(entries, f"{outer}layer.ff.2.", "feed_forward.down", (H, d_ff))
    biases = {
        name: entries.take(f"{outer}layer.ff.{at}.bias", f"feed_forward.{name}", (n,), (n, 1)).flatten()
        for name, at, n in (("up", "0.0", d_ff), ("down", "2", H))
    }
    ours = {"up.weight": up, "up.bias": biases["up"], "down.weight": down, "down.bias": biases["down"]}
    ours |= {f"norm.{name}": value for name, value in norm.items()}
    return {f"feed_forward.{name}": value for name, value in ours.items()}


def _ends(prefix: str, name: str) -> bool:
    return prefix == f"{name}." or prefix.endswith(f".{name}.")
