"""Where in a state dict the original's layers are, and by which names and rules each is stored."""

from typing import NamedTuple

from s4.checks import check_option
from s4.convert.entries import Entries, some

TRANSFORMS = ("none", "exp", "relu", "sigmoid", "softplus")


class Options(NamedTuple):
    """What a state dict does not tell of its layers: see `s4.convert.layer`."""

    discretization: str | None = None
    dt_transform: str | None = "exp"  # None until it is known where the layer stands
    real_transform: str = "exp"
    imag_transform: str = "none"

    def check(self) -> None:
        """Whether the original has them, and they a counterpart."""
        if self.discretization == "dss":
            raise ValueError(
                "discretization='dss' has no counterpart: its kernel is divided by a sum over its own "
                "length, so no recurrence has it"
            )
        if self.discretization is not None:
            check_option("discretization", self.discretization, ("zoh", "bilinear"))
        for name, value in self._asdict().items():
            if name != "discretization" and value is not None:
                check_option(name, value, TRANSFORMS)


class Kind(NamedTuple):
    """A way in which the original has stored a kernel."""

    name: str
    mark: str  # the name that tells it, of the real parts of A
    imag: str
    dt: str
    sign: float  # of the imaginary parts
    options: tuple[str, ...]  # those of `Options` that it has
    nested: int = 1  # how many "kernel." are between D and it
    length: str | None = None  # of DPLR: at which C was multiplied by I - Abar^length
    discretization: str = "zoh"  # of diagonal ones
    dead: tuple[str, ...] = ()  # parameters that the original itself did not use, and later dropped
    relu: float = 1e-4  # what it adds after its transform "relu"


KINDS = (
    Kind("version 4", "A_real", "A_imag", "inv_dt", -1.0, Options._fields, length="l_kernel"),
    Kind("version 3", "inv_w_real", "w_imag", "log_dt", 1.0, ("real_transform",), 2, "L", relu=0.0),
    Kind("version 3", "log_w_real", "w_imag", "log_dt", 1.0, (), 2, "L"),
    Kind(
        "version 3", "inv_A_real", "A_imag", "log_dt", 1.0, ("discretization", "real_transform"), 2,
        discretization="bilinear", dead=("A",),
    ),
    Kind("the minimal S4D", "log_A_real", "A_imag", "log_dt", 1.0, ()),
)  # fmt: skip


class Site(NamedTuple):
    """A layer in a state dict.

    kernel, layer: prefixes of its kernel's parameters, and of D.
    names: of the kernel's parameters.
    alone: a kernel with no layer around it.
    """

    kernel: str
    layer: str
    kind: Kind
    names: frozenset[str]
    alone: bool

    @property
    def dplr(self) -> bool:
        """Whether there is a low-rank part, or was one."""
        return "P" in self.names or self.kind.length in self.names

    @property
    def real(self) -> bool:
        """Whether A, B and C are real: is_real=True of version 4."""
        return self.kind.mark == "A_real" and "A_imag" not in self.names and "P" not in self.names

    @property
    def minimal(self) -> bool:
        """Whether B is 1 and not stored."""
        return self.kind.mark == "log_A_real"

    def resolved(self, options: Options) -> Options:
        """The options with the discretisation of this layer.

        Raises:
            ValueError: one that it does not have.
        """
        what = f"{self.kernel}{self.kind.mark} is a parameter of {self.kind.name}"
        for name in Options._fields:
            value, default = getattr(options, name), Options._field_defaults[name]
            if value != default and name not in self.kind.options and not self._redundant(name, value):
                raise ValueError(
                    f"{what}, which has no option {name}: leave it at {default!r}, got {value!r}"
                )
        given = options.discretization
        if self.dplr and given not in (None, "bilinear"):
            raise ValueError(
                f"discretization must be None or 'bilinear', as {self.kernel}P makes this a DPLR layer, "
                f"got {given!r}"
            )
        return options._replace(discretization="bilinear" if self.dplr else given or self.kind.discretization)

    def _redundant(self, name: str, value: str) -> bool:
        return name == "discretization" and value == ("bilinear" if self.dplr else self.kind.discretization)


def sites(entries: Entries) -> list[Site]:
    """The layers of a state dict, in its order.

    Raises:
        ValueError: there are none, or one of no known kind.
    """
    marks = {name for kind in KINDS for name in (kind.mark, kind.dt)}
    prefixes = dict.fromkeys(key[: len(key) - len(_last(key))] for key in entries if _last(key) in marks)
    if not prefixes:
        raise ValueError(
            "no S4 layer of the original found: no key ends in inv_dt or A_real, as in its version 4, in "
            f"log_dt or inv_w_real, as in version 3, or in log_A_real, as in its minimal S4D. There are "
            f"{some(entries)}"
        )
    return [_site(entries, prefix) for prefix in prefixes]


def _site(entries: Entries, prefix: str) -> Site:
    names = frozenset(name for name in entries.under(prefix) if "." not in name)
    where = f"the kernel at {prefix!r}" if prefix else "the kernel"
    if {"log_A_real", "B", "D"} <= names:
        raise ValueError(
            f"{prefix}log_A_real, B and D are parameters of an S4Layer of this library, not of the original: "
            "load_state_dict takes them as they are"
        )
    if {"w", "Q"} & names or ("log_w_real" in names and "L" not in names):
        raise ValueError(
            f"{where} has names of version 2 or older, {some(sorted(names))}: it does not tell the length "
            "that its C was made for, and its A may be of another form. There is no conversion"
        )
    kind = next((kind for kind in KINDS if kind.mark in names), None)
    if kind is None:
        raise ValueError(
            f"{where} has {some(sorted(names))}, but no real parts of A (one of "
            f"{', '.join(k.mark for k in KINDS)}): the state dict is not complete, or there is no counterpart"
        )
    layer, nested = prefix, 0
    while nested < kind.nested and (layer == "kernel." or layer.endswith(".kernel.")):
        layer, nested = layer.removesuffix("kernel."), nested + 1
    alone = nested < kind.nested
    return Site(prefix, prefix if alone else layer, kind, names, alone)


def _last(key: str) -> str:
    return key.rpartition(".")[2]
