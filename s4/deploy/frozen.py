"""Modules with S4 layers in, each in the place of a copy whose layers are constants."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from s4.block import S4Block
from s4.checks import check_integer, check_module, check_number, check_option
from s4.deploy.layer import FrozenLayer
from s4.layer import S4Layer
from s4.model import S4Model
from s4.state import State

MODES = ("fft", "scan")
PARTS = ("forward", "chunk", "step")


class Frozen(nn.Module):
    """A copy of a layer, block or model in evaluation, its S4 layers constants. Made by `freeze`.

    States are those of the original: (B, H, N), of a model a `State`.

    Args:
        module: the copy, whose S4 layers are constants.
        max_length: of the longest sequence that `forward` takes; None: there is no `forward`.
        chunk: steps of the sequences that `chunk` takes.

    Examples:
        >>> frozen = s4.deploy.freeze(S4Layer(16), chunk=10)
        >>> y, state = frozen.chunk(torch.randn(2, 10, 16), frozen.initial_state(2))
        >>> y, state = frozen.step(torch.randn(2, 16), state)
        >>> y.shape
        torch.Size([2, 16])
    """

    def __init__(self, module: nn.Module, max_length: int | None, chunk: int) -> None:
        super().__init__()
        self.module: Any = module
        self.max_length, self.chunk_length = max_length, chunk

    def forward(self, u: Tensor) -> Tensor:
        """Outputs of whole sequences, as the original gives them.

        Args:
            u: inputs (B, L, ...), L from 1 to max_length.

        Returns:
            outputs (B, L, ...), of a model that pools (B, ...).

        Raises:
            ValueError, TypeError: a wrong shape, dtype or length; no max_length.
        """
        return self.module(u)

    def chunk(self, u: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Outputs of the next inputs of a sequence.

        Args:
            u: inputs (B, chunk, ...), as many steps as `freeze` was told.
            state: from `initial_state`, or an earlier `chunk` or `step`.

        Returns:
            outputs (B, chunk, ...), or pooled up to the end of the chunk (B, ...); and the next state.

        Raises:
            ValueError, TypeError: a wrong shape or dtype; a bidirectional layer.
        """
        if u.shape[1] != self.chunk_length:
            raise ValueError(f"u must have chunk={self.chunk_length} steps, got {u.shape[1]}")
        return self.module(u, state, return_state=True)

    def step(self, u: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Outputs of one time step.

        Args:
            u: inputs (B, ...).
            state: from `initial_state`, or an earlier `chunk` or `step`.

        Returns:
            outputs (B, ...), and the next state.

        Raises:
            ValueError, TypeError: a wrong shape or dtype; a bidirectional layer.
        """
        return self.module.step(u, state)

    def initial_state(self, batch_size: int) -> Any:
        """The state before any input.

        Args:
            batch_size: B, 0 or more.

        Returns:
            zeros (B, H, N), of a model a `State` of zeros.

        Raises:
            ValueError, TypeError: a batch size that is none, or a bidirectional layer.
        """
        return self.module.initial_state(batch_size)

    def train(self, mode: bool = True) -> "Frozen":
        """Nothing: a frozen module stays in evaluation mode, its dropout and batch norm too.

        Args:
            mode: not looked at.

        Returns:
            the module itself.
        """
        return super().train(False)

    def part(self, name: str) -> "Part":
        """One of the three as a module of its own, for tools that take a module's forward.

        Args:
            name: "forward", "chunk" or "step".

        Returns:
            the module. It maps u to y, or u and a state to (y, state), with states as dicts of tensors. Their
            names are state_0, state_1, ... of the layers and, of a model, total and length.

        Raises:
            ValueError: another name.
        """
        check_option("part", name, PARTS)
        return Part(self, name).eval()


class Part(nn.Module):
    """One of the three, with states as dicts of tensors: `forward(u)`, or `forward(u, state)` to (y, state).

    The names are state_0, state_1, ..., those of the layers from first to last (B, H, N), and of a model
    total (B, d_model) and length (B,), as in `State`.
    """

    def __init__(self, frozen: Frozen, name: str) -> None:
        super().__init__()
        self.frozen, self.name = frozen, name

    def forward(self, u: Tensor, state: dict[str, Tensor] | None = None) -> Any:
        """Outputs, and where a state was given the next."""
        if self.name == "forward":
            return self.frozen(u)
        if state is None:
            raise ValueError(f"{self.name} needs a state, as initial_state gives it")
        run = self.frozen.chunk if self.name == "chunk" else self.frozen.step
        y, after = run(u, self._unnamed(state))
        return y, self._named(after)

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        """The state before any input."""
        return self._named(self.frozen.initial_state(batch_size))

    def _named(self, state: Any) -> dict[str, Tensor]:
        if not isinstance(state, State):
            return {"state_0": state}
        layers = {f"state_{i}": x for i, x in enumerate(state.layers)}
        return {**layers, "total": state.total, "length": state.length}

    def _unnamed(self, state: dict[str, Tensor]) -> Any:
        if not isinstance(self.frozen.module, S4Model):
            return state["state_0"]
        layers = tuple(state[f"state_{i}"] for i in range(len(self.frozen.module.blocks)))
        return State(layers, state["total"], state["length"])


@torch.no_grad()
def freeze(
    model: nn.Module,
    max_length: int | None = None,
    chunk: int = 64,
    *,
    mode: str = "fft",
    rate: float = 1.0,
) -> nn.Module:
    """A copy of a module in evaluation, its S4 layers turned into constants; the original is as before.

    Equal to it to 1e-5 of the largest output in float32. No operator of ours, no complex parameter or buffer,
    no gradients: it goes where PyTorch's own layers go (ONNX, AOTInductor, TorchScript, int8 weights), by
    `export` in one line. States are those of the original, so one may go on where the other stopped.

    Args:
        model: an S4Layer, S4Block or S4Model, which becomes a `Frozen` with forward, chunk, step and
            initial_state; or any module with S4 layers inside, of which the copy itself is returned. It may
            call them with u alone.
        max_length: of the longest sequence that forward takes; None: there is no forward.
        chunk: steps of the sequences that `chunk` takes.
        mode: of forward, as of S4Layer: "fft", by FFT with a ready kernel, H max_length numbers; "scan", by
            products of matrices, (T^2 + 2 T N + N^2 log2(max_length / T)) H numbers with T = 64 or more, for
            tools without a fast and exact FFT of any size, such as onnxruntime.
        rate: multiplies dt, as in `S4Layer.forward`; a number.

    Returns:
        a `Frozen`, or of any other module a copy of it.

    Raises:
        ValueError, TypeError: an option that does not exist, a module without an S4Layer.

    Examples:
        >>> block, u = S4Block(S4Layer(16)).eval(), torch.randn(2, 700, 16)
        >>> frozen = freeze(block, max_length=1000)
        >>> torch.allclose(frozen(u), block(u), atol=1e-4)
        True
    """
    check_module("model", model)
    if max_length is not None:
        check_integer("max_length", max_length, 1)
    check_integer("chunk", chunk, 1)
    check_option("mode", mode, MODES)
    check_number("rate", rate, 0, above=True)
    layers = [module for module in model.modules() if isinstance(module, S4Layer)]
    if not layers:
        frozen_already = any(isinstance(module, FrozenLayer) for module in model.modules())
        lacks = "is frozen already" if frozen_already else "must have an S4Layer inside"
        raise ValueError(f"model {lacks}, got {type(model).__name__}")
    frozen = {id(layer): FrozenLayer(layer, max_length, chunk, mode, rate) for layer in layers}
    copied = copy.deepcopy(model, frozen).eval().requires_grad_(False)
    if not isinstance(model, (S4Layer, S4Block, S4Model)):
        return copied
    return Frozen(copied, max_length, chunk).eval()
