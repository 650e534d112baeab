"""Files of frozen models, which need neither s4 nor, as ONNX, PyTorch."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s4.block import S4Block
from s4.checks import check_option
from s4.deploy.frozen import PARTS, Frozen, freeze
from s4.deploy.layer import FrozenLayer

_SUFFIXES = (".onnx", ".pt2")
_LARGEST = 1_900_000_000  # bytes of numbers that one ONNX file holds; more go to a second, FILE.data


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    part: str = "forward",
    *,
    max_length: int | None = None,
    chunk: int | None = None,
    rate: float = 1.0,
    example: Tensor | None = None,
) -> Path:
    """Write a frozen model to a file of any batch from 1 and, for forward, any length from 1 to max_length.

    `.pt2` is for `torch.export.load`, which needs no s4; AOTInductor makes a package of it. States are dicts
    of tensors, zeros at first, named as in `Frozen.part`.

    `.onnx` is for onnxruntime. Inputs are u, state_0, state_1, ..., outputs y, next_state_0, next_state_1,
    ...; of an S4Model also total, length, next_total and next_length (see `s4.State`). Dimensions are named
    batch and length. Inputs and outputs have the model's dtypes, states that of its layers' states; length
    is int64.

    Args:
        model: what `freeze` takes, or has returned: then with its own lengths.
        path: its suffix chooses the format.
        part: "forward", whole sequences; "chunk", so many steps at a time; "step", one.
        max_length, chunk, rate: of `freeze`; chunk is 64 unless told.
        example: inputs as forward takes them, (B, L, ...), whose dtype and last dimensions the file has.
            Needed of every module of your own, and of an S4Model whose encoder does not begin with an
            `nn.Linear` or `nn.Embedding`.

    Returns:
        the path.

    Raises:
        ValueError: another suffix; a part that the model has not; no max_length; no example where needed;
            bfloat16 for .onnx.
        FileNotFoundError: no such folder.
        ImportError: .onnx without the package onnxscript, by which torch writes it.

    Examples:
        >>> path = export(S4Layer(4), "layer.pt2", "step")
        >>> step = torch.export.load(path).module()
        >>> y, state = step(torch.randn(3, 4), {"state_0": torch.zeros(3, 4, 64)})
        >>> y.shape
        torch.Size([3, 4])
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"path must end in '.onnx' or '.pt2', which choose the format, got {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"path must be in a folder that is there, got {path}")
    check_option("part", part, PARTS)
    onnx = path.suffix == ".onnx"
    if onnx:
        _check_onnxscript()
    module = _frozen(model, part, max_length, chunk, rate, onnx)
    example = _example(module) if example is None else example
    kinds = {example.dtype, *(t.dtype for t in (*module.parameters(), *module.buffers()))}
    if onnx and torch.bfloat16 in kinds:
        raise ValueError("onnxruntime computes no bfloat16 on a CPU: export model.float() or model.half()")
    batch = torch.export.Dim("batch", min=1)
    if part == "forward":
        longest = _longest(module, onnx)
        length = torch.export.Dim("length", min=1, max=longest) if longest > 1 else None
        u = example.new_zeros(2, min(longest, 80), *example.shape[2:])
        inputs: tuple[Any, ...] = (u,)
        shapes: tuple[Any, ...] = ({0: batch} if length is None else {0: batch, 1: length},)
    else:
        module = module.part(part)
        state = module.initial_state(2)
        L = module.frozen.chunk_length
        u = example.new_zeros(2, *([L] if part == "chunk" else []), *example.shape[2:])
        inputs, shapes = (u, state), ({0: batch}, {name: {0: batch} for name in state})
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    if not onnx:
        torch.export.save(program, path)
        return path
    names = [] if part == "forward" else list(inputs[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*axis name: batch", UserWarning)  # all inputs have one batch
        torch.onnx.export(
            program,
            f=path,
            dynamic_shapes=shapes,
            dynamo=True,
            input_names=["u", *names],
            output_names=["y", *(f"next_{name}" for name in names)],
            external_data=sum(t.nbytes for t in program.state_dict.values()) > _LARGEST,
            verbose=False,
        )
    return path


def _check_onnxscript() -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("a file .onnx needs: pip install onnx onnxscript") from error


def _frozen(
    model: nn.Module, part: str, max_length: int | None, chunk: int | None, rate: float, onnx: bool
) -> Any:
    """The model, frozen, with no more constants than the part needs."""
    if any(isinstance(module, FrozenLayer) for module in model.modules()):
        if (max_length, chunk, rate) != (None, None, 1.0):
            raise ValueError("max_length, chunk and rate of a frozen model are its own: give them to freeze")
        frozen = model
    else:
        longest = max_length if part == "forward" else None
        mode = "scan" if onnx else "fft"
        frozen = freeze(model, longest, 64 if chunk is None else chunk, mode=mode, rate=rate)
        for layer in frozen.modules():
            if isinstance(layer, FrozenLayer) and part != "chunk":
                layer.pieces = None
    if part != "forward" and any(m.bidirectional for m in frozen.modules() if isinstance(m, FrozenLayer)):
        raise ValueError(f"part={part!r} needs causal layers, but this model has bidirectional ones")
    if part != "forward" and not isinstance(frozen, Frozen):
        name = type(frozen).__name__
        raise ValueError(f"part={part!r} is of S4Layer, S4Block and S4Model: freeze those, got {name}")
    return frozen


def _longest(module: nn.Module, onnx: bool) -> int:
    """Of the sequences that forward takes."""
    layer = next(layer for layer in module.modules() if isinstance(layer, FrozenLayer))
    if layer.max_length is None:
        raise ValueError("part='forward' needs max_length, that of the longest sequence")
    if onnx and layer.mode == "fft":
        raise ValueError("mode='fft' is inexact in onnxruntime: freeze(model, ..., mode='scan') for .onnx")
    return layer.max_length


def _example(module: nn.Module) -> Tensor:
    """Inputs (2, 1, ...) as the first module that knows them takes them."""
    inner = module.module if isinstance(module, Frozen) else module
    if isinstance(inner, (FrozenLayer, S4Block)):
        layer: Any = inner if isinstance(inner, FrozenLayer) else inner.layer
        # Of a block what surrounds the layer, whose own numbers are constants of float32 or more.
        kinds: list[torch.dtype] = [p.dtype for p in inner.parameters()] or [layer.dtype]
        return torch.zeros(2, 1, layer.d_model, dtype=kinds[0], device=layer.D.device)
    first = getattr(inner, "encoder", None)
    while isinstance(first, nn.Sequential) and len(first):
        first = first[0]
    if isinstance(first, nn.Embedding):
        return torch.zeros(2, 1, dtype=torch.int64, device=first.weight.device)
    if isinstance(first, nn.Linear):
        return torch.zeros(2, 1, first.in_features, dtype=first.weight.dtype, device=first.weight.device)
    raise ValueError(
        f"example=inputs (B, L, ...) must be given: {type(inner).__name__} does not tell what it takes"
    )
