"""Layers of several libraries under one interface: (B, L, H) to the same, and one step at a time.

Each is made as its library makes it, with H channels and, where it can, N numbers of state a channel.
"""

import copy
import subprocess
from collections.abc import Callable, Iterable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contenders.layers import BROADCAST_LIMIT, Official
from s4 import S4Layer

State = Any


class Peer:
    """A layer of one library: called, (B, L, H) to the same. This one is `S4Layer`."""

    no_float64 = ""  # why it cannot be run in float64

    def __init__(self, who: str, module: nn.Module) -> None:
        self.who, self.module = who, module

    def __call__(self, u: Tensor) -> Tensor:
        """Outputs of whole sequences, from no state."""
        return self.module(u)

    def start(self, batch: int) -> State:
        """The state before any input; what has to be set up for steps is."""
        return self.module.initial_state(batch)

    def step(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """u (B, H) and a state to an output (B, H) and the next state, which may be the same object."""
        return self.module.step(u, state)

    def wide(self) -> "Peer":
        """A copy in float64, to be made before the first call."""
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module)
        for p in other.module.parameters():  # module.double() leaves complex ones as they are
            p.data = p.data.to(torch.complex128 if p.is_complex() else torch.float64)
        other.module.double()
        return other

    def system(self) -> tuple[dict[str, Tensor], str] | None:
        """Before the first call: parameters as `S4Layer` names them, and the discretisation."""
        return dict(self.module.named_parameters()), self.module.discretization

    def kernel(self, L: int) -> Tensor:
        """The impulse response (H, L) without D, of what has a `system`."""
        return self.module.kernel(L)

    def numbers(self) -> int:
        """Real numbers in the state of one sequence."""
        with torch.no_grad():
            p = next(self.module.parameters())
            state = self.step(p.new_zeros(1, self.width, dtype=p.real.dtype), self.start(1))[1]
        return sum(x.numel() * (2 if x.is_complex() else 1) for x in _tensors(state))

    @property
    def width(self) -> int:
        """H."""
        return self.module.d_model


def _tensors(state: State) -> Iterable[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for part in state.values():
            yield from _tensors(part)
    elif state is not None and not isinstance(state, (int, float, str, bool)):
        for part in state:
            yield from _tensors(part)


class Original(Peer):
    """FFTConv of the original repository, with no activation; its state for "dplr" has both of each pair."""

    def __call__(self, u: Tensor) -> Tensor:
        return self.module(u)[0]

    def start(self, batch: int) -> State:
        self.module.setup_step()
        return self.module.default_state(batch)

    def kernel(self, L: int) -> Tensor:
        return self.module.kernel(L=L)[0][0]

    def system(self) -> tuple[dict[str, Tensor], str]:
        theirs = {name.removeprefix("kernel."): p for name, p in self.module.named_parameters()}
        ours = {
            "log_dt": theirs["inv_dt"][:, 0],
            "log_A_real": theirs["A_real"],
            "A_imag": -theirs["A_imag"],
            "B": theirs["B"][0],
            "C": theirs["C"],  # the true one: it is replaced at the first call
            "D": theirs["D"][0],
        }
        if "P" in theirs:
            return ours | {"P": theirs["P"]}, "bilinear"
        return ours, self.module.kernel.disc


class Other(Peer):
    """What is no sum of H systems of one input and one output."""

    def system(self) -> None:
        return None


class Recurrent(Other):
    """`nn.GRU` and `nn.LSTM`, whose state is as wide as the layer."""

    def __call__(self, u: Tensor) -> Tensor:
        return self.module(u)[0]

    def start(self, batch: int) -> State:
        return None

    def step(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.module(u[:, None], state)
        return y[:, 0], state

    @property
    def width(self) -> int:
        return self.module.input_size


class S5(Other):
    """`s5.S5`: one state of H complex numbers that all channels share."""

    def start(self, batch: int) -> State:
        return self.module.seq.Lambda.new_zeros(batch, len(self.module.seq.Lambda))

    def step(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        return torch.vmap(self.module.seq.forward_rnn)(u, state)

    @property
    def width(self) -> int:
        return self.module.width


class Mamba(Other):
    """`mamba_ssm.Mamba` and `Mamba2`: their projections, short convolution and gate included."""

    no_float64 = "its kernels have no float64"

    def start(self, batch: int) -> State:
        return self.module.allocate_inference_cache(batch, 1)

    def step(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        y, *state = self.module.step(u[:, None], *state)
        return y[:, 0], state


class LinearAttention(Other):
    """Layers of flash-linear-attention: their projections and gates included."""

    no_float64 = "its kernels have no float64"

    def __call__(self, u: Tensor) -> Tensor:
        return self.module(u)[0]

    def start(self, batch: int) -> State:
        return import_module("fla.models.utils").Cache()

    def step(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        y, _, state = self.module(u[:, None], past_key_values=state, use_cache=True)
        return y[:, 0], state

    @property
    def width(self) -> int:
        return self.module.hidden_size


def s4(H: int, N: int, L: int) -> list[Peer]:
    """Both variants of S4Layer."""
    return [Peer("S4", S4Layer(H, N)), Peer("S4D", S4Layer(H, N, variant="diag", init="lin"))]


def recurrent(H: int, N: int, L: int) -> list[Peer]:
    """What torch has."""
    return [Recurrent(kind.__name__, kind(H, H, batch_first=True)) for kind in (nn.GRU, nn.LSTM)]


def s5(H: int, N: int, L: int) -> list[Peer]:
    """s5-pytorch."""
    return [S5("S5", import_module("s5").S5(H, H))]


def mamba(H: int, N: int, L: int) -> list[Peer]:
    """mamba-ssm, with expand=1, so that width and state are those of S4; heads of 64 at most."""
    module = import_module("mamba_ssm")
    options = {"d_state": N, "expand": 1}
    return [
        Mamba("Mamba", module.Mamba(H, **options)),
        Mamba("Mamba2", module.Mamba2(H, headdim=min(64, H), **options)),
    ]


def fla(H: int, N: int, L: int) -> list[Peer]:
    """flash-linear-attention, with heads of N by N, so that width and state are those of S4."""
    module = import_module("fla.layers")
    heads = {"hidden_size": H, "num_heads": max(1, H // N), "expand_v": 1.0, "layer_idx": 0}
    return [
        LinearAttention("GLA", module.GatedLinearAttention(expand_k=1.0, **heads)),
        LinearAttention("GatedDeltaNet", module.GatedDeltaNet(head_dim=min(N, H), **heads)),
    ]


# By package: its layers, and whether they need a GPU.
LIBRARIES: dict[str, tuple[Callable[[int, int, int], list[Peer]], bool]] = {
    "s4": (s4, False),
    "torch": (recurrent, False),
    "s5-pytorch": (s5, False),
    "mamba-ssm": (mamba, True),
    "flash-linear-attention": (fla, True),
}


def original(official: Official, H: int, N: int, L: int) -> list[Peer]:
    """The original's layers, where the sums of its plain code fit."""
    found = official.layers(H, N, L)
    fits = H * N // 2 * L <= BROADCAST_LIMIT
    return [Original(who, layer) for who, layer in found.items() if fits or not who.endswith("naive")]


def versions(official: Path | None) -> tuple[dict[str, str], dict[str, str]]:
    """Of the packages that are here, and why the others are not."""
    here, absent = {}, {}
    for package in LIBRARIES:
        if package == "s4":
            continue
        try:
            here[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            absent[package] = f"not installed: pip install {package}"
    if official is None:
        absent["original"] = "not given: --official, a checkout of github.com/state-spaces/s4"
    else:
        asked = ["git", "-C", str(official), "rev-parse", "--short", "HEAD"]
        here["original"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"
    return here, absent


def peers(
    official: Official | None, absent: dict[str, str], device: torch.device, H: int, N: int, L: int
) -> list[Peer]:
    """All that can take part, on the device; who cannot, and why, is added to `absent`."""
    found: list[Peer] = []
    for package, (make, gpu) in LIBRARIES.items():
        if package in absent:
            continue
        if gpu and device.type != "cuda":
            absent[package] = "needs a GPU"
            continue
        try:
            found += make(H, N, L)
        except Exception as error:  # whatever a package raises that does not suit this machine
            absent[package] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if official is not None:
        found += original(official, H, N, L)
    for peer in found:
        peer.module.to(device)
    return found
