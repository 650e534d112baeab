"""The original's kernels and convolutions as S4Layer."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s4.convert.entries import Entries, some, undisturbed
from s4.convert.kinds import Options, Site, sites
from s4.layer import S4Layer
from s4.system import dense, discretize, readout, row_modes, system

_AT_ONCE = 2**24  # numbers of dense state matrices


def layer(
    state_dict: Mapping[str, Any],
    *,
    discretization: str | None = None,
    dt_transform: str | None = None,
    real_transform: str = "exp",
    imag_transform: str = "none",
) -> S4Layer:
    """The S4 layer of a state dict of the original repository, github.com/state-spaces/s4.

    Of the dict of its `FFTConv`, `S4Block`, `SSMKernelDPLR` or `SSMKernelDiag`, of its minimal `S4D`, or of
    anything with one of these in it, under any prefix, by the names of version 4 or 3. The layer is the
    linear part, behind which the original has an activation: the same kernel, outputs and state (real, then
    imaginary parts). A kernel's dict has no D, so it is 0. All is converted in float64 and rounded once.

    Outputs are the same for sequences up to `l_max`, where the original cuts its kernel; at a `rate` other
    than 1 its DPLR kernel is approximate. Where `n_ssm` is neither 1 nor d_model, each channel gets its own A
    and B, as channels share them in another order here. With `dt_tie=False` the mean of a channel's log steps
    becomes its dt, what is left goes into A and B, and in DPLR also into P, C and the state.

    A dict does not tell all. Arguments have the defaults of the original's classes, but mind that the
    configurations of its train.py have dt_transform="softplus". What is no argument: for `dt_fast` give sinh
    of inv_dt; for `bandlimit` zero C where dt |Im A| / (2 pi) is not below half of it; `drop_kernel` has no
    counterpart.

    Args:
        state_dict: tensors by name; a checkpoint's "state_dict" or "model" is found.
        discretization: `disc` of a diagonal kernel, "zoh" or "bilinear"; None is the default, "zoh", but in
            version 3 "bilinear". DPLR is always bilinear.
        dt_transform, real_transform, imag_transform: what maps its parameters to dt and to the parts of -A:
            "none", "exp", "relu", "sigmoid" or "softplus". Version 3 has the second alone, `S4D` none. None
            is "exp", but a layer of version 4 in a `SequenceResidualBlock` needs its dt_transform.

    Returns:
        the layer, with parameters of the dict's dtype on its device. Its `init`, `dt_min` and `dt_max` are
        not the original's: any that have such shapes.

    Raises:
        ValueError, TypeError: no layer, several, or one with no counterpart; keys that are missing or
            unknown; the message says which and what to do.

    Examples:
        >>> original = {  # of the minimal S4D: 4 channels, 32 modes
        ...     "D": torch.ones(4),
        ...     "kernel.log_dt": torch.full((4,), -5.0),
        ...     "kernel.C": torch.randn(4, 32, 2),
        ...     "kernel.log_A_real": torch.zeros(4, 32),
        ...     "kernel.A_imag": torch.arange(32.0).repeat(4, 1),
        ... }
        >>> found = layer(original)
        >>> found.d_model, found.d_state, found.variant
        (4, 64, 'diag')
    """
    options = Options(discretization, dt_transform, real_transform, imag_transform)
    options.check()
    entries = Entries.of(state_dict)
    site = only(entries, "layer")
    residual = f".{site.layer}".endswith(".layer.layer.")
    with undisturbed():
        return read_layer(entries, site, with_dt_transform(options, site, residual))


def with_dt_transform(options: Options, site: Site, residual: bool) -> Options:
    """The options with "exp", the default of the original's classes, for a dt_transform of None.

    Raises:
        ValueError: it is None for a layer in a SequenceResidualBlock, as train.py builds them.
    """
    if options.dt_transform is not None:
        return options
    if residual and "dt_transform" in site.kind.options:
        raise ValueError(
            f"dt_transform must be given: {site.kernel}inv_dt does not tell whether it is 'softplus', as "
            "the configurations of the original's train.py have it, or 'exp', the default of its classes"
        )
    return options._replace(dt_transform="exp")


def only(entries: Entries, name: str) -> Site:
    """The one layer, for the function `name`.

    Raises:
        ValueError: there are none, or several.
    """
    found = sites(entries)
    if len(found) > 1:
        places = [site.layer if name == "layer" else _outer(site.layer) for site in found]
        raise ValueError(
            f"the state dict has {len(found)} S4 layers, at {some(places)}: s4.convert.model converts a "
            f"whole model, and s4.convert.{name} one of them, of {{k: v for k, v in state_dict.items() if "
            f"k.startswith({places[0]!r})}}"
        )
    return found[0]


def _outer(prefix: str) -> str:
    """That of the block, with its norm if there is one."""
    while prefix == "layer." or prefix.endswith(".layer."):
        prefix = prefix.removesuffix("layer.")
    return prefix


def read_layer(entries: Entries, site: Site, options: Options) -> S4Layer:
    """A layer from its place in a state dict."""
    options = site.resolved(options)
    length = _length(entries, site)
    parameters, dtype, device = _parameters(entries, site, options)
    H, n = parameters["C"].shape[1:3]
    rank = len(parameters["P"]) if "P" in parameters else 0
    made = S4Layer(
        H,
        2 * n,
        variant="dplr" if rank else "diag",
        init=_init(parameters, rank),
        discretization=options.discretization,
        n_ssm=len(parameters["B"]),
        bidirectional=len(parameters["C"]) == 2,
        dtype=torch.float64,
    )
    if length:
        parameters["C"] = _true_C(parameters, length, str(options.discretization))
    made.load_state_dict(parameters)
    made = made.to(device, dtype)
    if wrong := [name for name, p in made.named_parameters() if not bool(torch.isfinite(p).all())]:
        raise ValueError(
            f"of the kernel at {site.kernel!r}, {some(wrong)} would have inf or nan, with steps from "
            f"{made.dt.min():.3g} to {made.dt.max():.3g}: was it trained with another dt_transform?"
        )
    return made


def _init(parameters: Mapping[str, Tensor], rank: int) -> Any:
    """An init of `S4Layer` with such shapes."""
    if rank <= 2:
        return ("lin", "legs", "legt")[rank]
    Lambda = torch.complex(-torch.exp(parameters["log_A_real"][0]), parameters["A_imag"][0])
    return Lambda, torch.view_as_complex(parameters["P"][:, 0]), torch.view_as_complex(parameters["B"][0])


def _parameters(
    entries: Entries, site: Site, options: Options
) -> tuple[dict[str, Tensor], torch.dtype, torch.device]:
    """Ours in float64 on the CPU, C as it was trained; the dtype and device that the layer is to have."""
    taken: list[Tensor] = []

    def take(name: str, became: str, *shapes: tuple[int, ...]) -> Tensor:
        taken.append(entries.take(site.kernel + name, became, *shapes))
        return taken[-1].to("cpu", torch.float64)

    kind, pair = site.kind, () if site.real else (2,)
    dt = take(kind.dt, "log_dt", (-1,), (-1, 1), (-1, -1))
    real = take(kind.mark, "log_A_real", (-1, -1))
    (S, n), H = real.shape, len(dt)
    if dt.dim() == 2 and dt.shape[1] not in (1, n):
        raise ValueError(f"{site.kernel}{kind.dt} must have 1 or {n} columns, got {tuple(dt.shape)}")
    if H % S:
        raise ValueError(f"{site.kernel}{kind.mark} has {S} rows, which do not divide the {H} channels of dt")
    shape = (S, n, *pair)
    B = take("B", "B", (1, *shape), shape) if not site.minimal else torch.tensor([1.0, 0.0]).expand(S, n, 2)
    C = take("C", "C", (-1, H, n, *pair), *[(H, n, *pair)] * site.minimal)
    B, C = B.reshape(shape), C.reshape(-1, H, n, *pair)
    D = _D(entries, site, C)
    log_dt = log_positive(f"{site.kernel}{kind.dt}", dt.reshape(H, -1), options.dt_transform or "exp", 1e-4)
    log_real = log_positive(f"{site.kernel}{kind.mark}", real, options.real_transform, kind.relu)
    found = {"log_A_real": log_real, "B": B, "C": C, "D": D.to("cpu", torch.float64)}
    if site.real:
        found |= {"A_imag": torch.zeros(S, n), "B": _paired(B), "C": _paired(C)}
    else:
        found["A_imag"] = kind.sign * positive(
            take(kind.imag, "A_imag", (S, n)), options.imag_transform, 1e-4
        )
    if site.dplr:
        found["P"] = take("P", "P", (-1, S, n, 2))
    for name in site.names.intersection(kind.dead):
        take(name, "nothing: not used by the original either")
    entries.check_known(site.kernel, site.layer)
    dtype = reduce(torch.promote_types, [t.dtype for t in ([] if site.alone else [D]) + taken])
    found = _by_channel(found, log_dt, dtype)
    return {name: value.double().contiguous() for name, value in found.items()}, dtype, taken[0].device


def _D(entries: Entries, site: Site, C: Tensor) -> Tensor:
    """Of shape (H,); with it, how many rows C has to have."""
    H, rows = C.shape[1], len(C)
    if site.alone:
        if rows > 1:
            raise ValueError(
                f"{site.kernel}C has {rows} rows: a bidirectional layer has two, one with `channels` also "
                "more, and a kernel's dict does not tell which. Give the dict of the whole layer, with its D"
            )
        return torch.zeros(H)
    if f"{site.layer}D" not in entries:
        raise ValueError(
            f"{site.layer}D is missing beside {site.kernel}C. Of a kernel with no layer around it, give the "
            "parameters without 'kernel.' before their names"
        )
    D = entries.take(f"{site.layer}D", "D", (-1, H), *[(H,)] * site.minimal)
    channels = 1 if D.dim() == 1 else len(D)
    if channels > 1:
        raise ValueError(
            f"{site.layer}D has {channels} rows: {channels} outputs of each channel, by channels={channels} "
            "or by a gated activation ('glu', hyper_act) inside the layer. There is no counterpart"
        )
    if rows > 2:
        raise ValueError(f"{site.kernel}C must have a row, or two if bidirectional, got {tuple(C.shape)}")
    return D.reshape(H)


def _by_channel(found: dict[str, Tensor], log_dt: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """With rows in our order, and one dt for each channel.

    Channel h of the original has system h mod S, ours h // (H / S): the same if S is 1 or H. A step dt_n for
    each mode is one step dt of the system diag(r) A, diag(r) B with r = dt_n / dt. In DPLR, for the state
    over sqrt(r), that is diag(r Lambda) - P' P'*, with P' = sqrt(r) P, B' = sqrt(r) B and C' = sqrt(r) C.
    """
    H, S = len(log_dt), len(found["B"])
    tied = log_dt.shape[1] == 1
    if tied and S in (1, H):
        return {**found, "log_dt": log_dt[:, 0]}
    rows = torch.arange(H) % S
    found |= {name: found[name][rows] for name in ("log_A_real", "A_imag", "B")}
    if "P" in found:
        found["P"] = found["P"][:, rows]
    mean = log_dt.mean(1).to(dtype).double()  # what rounding it would lose goes into A
    if not tied:
        rest = log_dt - mean[:, None]
        r = torch.exp(rest)
        found["log_A_real"] = found["log_A_real"] + rest
        found["A_imag"] = found["A_imag"] * r
        scaled = {"B": r} if "P" not in found else {name: torch.sqrt(r) for name in "BCP"}
        found |= {name: found[name] * factor[..., None] for name, factor in scaled.items()}
    return {**found, "log_dt": mean}


def _length(entries: Entries, site: Site) -> int:
    if not site.dplr:
        return 0
    key = f"{site.kernel}{site.kind.length}"
    value = entries.take(key, "C, which was multiplied by I - A^length", (), (1,))
    if value.is_floating_point() or value.item() < 0:
        raise ValueError(f"{key} must be an integer of at least 0, a length, got {value.item()}")
    return int(value.item())


def _true_C(parameters: Mapping[str, Tensor], length: int, discretization: str) -> Tensor:
    """C of the system, from the C (I - Abar^length) that the original trains for its kernel's FFT."""
    p = parameters
    systems = system(p["log_dt"], p["log_A_real"], p["A_imag"], p["B"], p["C"], p["P"], 1.0, discretization)
    n = p["C"].shape[2]
    parts = []
    for rows in torch.arange(len(p["log_dt"])).split(max(1, _AT_ONCE // (4 * n * n))):
        some_of = systems._replace(
            Lambda=systems.Lambda[rows], P=systems.P[:, rows], B=systems.B[rows], C=systems.C[:, rows],
            dt=systems.dt[rows],
        )  # fmt: skip
        A = dense(discretize(some_of))
        left = torch.eye(2 * n, dtype=A.dtype) - torch.linalg.matrix_power(A, length)
        # One by one: MKL on several threads may solve a batch of 160 columns or more wrongly, without a word.
        solved = [
            torch.linalg.solve_ex(one, C, left=False)[0]
            for one, C in zip(left, readout(some_of.C).unbind(1), strict=True)
        ]
        parts.append(torch.stack(solved, 1))
    return torch.view_as_real(row_modes(torch.cat(parts, 1)))


def positive(p: Tensor, transform: str, relu: float) -> Tensor:
    """A parameter under the original's transform; `relu` is added behind that of the same name."""
    if transform == "none":
        return p
    if transform == "relu":
        return F.relu(p) + relu
    return F.softplus(p) if transform == "softplus" else getattr(torch, transform)(p)


def log_positive(key: str, p: Tensor, transform: str, relu: float) -> Tensor:
    """The logarithm of `positive`.

    Raises:
        ValueError: it is of no positive number.
    """
    if transform == "exp":
        return p
    if transform == "sigmoid":
        return F.logsigmoid(p)
    value = positive(p, transform, relu)
    if not bool((value > 0).all()):
        raise ValueError(
            f"{key} comes to {value.min():.3g} under the transform {transform!r}, but steps, and the decays "
            "of a stable system, are above 0: was it trained with another transform?"
        )
    return torch.log(value)


def _paired(p: Tensor) -> Tensor:
    return torch.stack([p, torch.zeros_like(p)], -1)
