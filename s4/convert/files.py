"""Checkpoints and state dicts from files, of which no code is run."""

import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Unknown:
    """Stands for an object of a checkpoint that is no tensor: nothing of it is made or kept."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, value: Any) -> None:  # asked for by torch 2.9 only
        pass


def load(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What a checkpoint holds, on the CPU: a state dict, or a dict with one in it, to be converted.

    Args:
        path: a file of torch.save, as Lightning's checkpoints are, or a .safetensors file. It is read with
            weights_only=True: none of its code is run, and objects of other libraries in it, such as the
            configuration in a checkpoint of the original's train.py, are left empty.

    Returns:
        the dict, as `layer`, `block` and `model` of `s4.convert` take it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read so, or it holds no dict.
        ImportError: it ends in .safetensors, and that package is missing.

    Examples:
        >>> torch.save({"state_dict": {"D": torch.ones(2)}, "epoch": 3}, "last.ckpt")
        >>> load("last.ckpt")["state_dict"]
        {'D': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    advice = "Where you trust it, load it with what wrote it, and save its state_dict() alone by torch.save"
    try:
        found = _weights(path)
    except Exception as error:  # of many classes
        raise ValueError(f"{path} cannot be read with weights_only=True: {_why(error)}. {advice}") from error
    if not isinstance(found, Mapping):
        what = "a pickled module or other object" if isinstance(found, Unknown) else type(found).__name__
        raise ValueError(f"{path} holds {what}, no dict of tensors. {advice}")
    return found


def _why(error: Exception) -> str:
    """The sentence of an error that says what is wrong, which torch puts behind advice to trust the file."""
    lines = [line.strip() for line in str(error).partition("WeightsUnpickler error:")[2].splitlines()]
    lines = [line for line in [*lines, *str(error).splitlines(), type(error).__name__] if line]
    return lines[0].rstrip(".")


def _weights(path: Path) -> Any:
    """What torch.load finds, with stand-ins for other objects: it tells which are dicts by refusing those."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a format that has none, or no checkpoint
        names = []
    kinds: dict[str, type] = dict.fromkeys(names, Unknown)
    while True:
        classes = {name: type(name, (kind,), {}) for name, kind in kinds.items()}
        try:
            with torch.serialization.safe_globals([(made, name) for name, made in classes.items()]):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = [n for n in names if repr(classes[n]) in str(error) and kinds[n] is Unknown]
            if "SETITEM" not in str(error) or not refused:
                raise
            kinds.update(dict.fromkeys(refused, _Items))


class _Items:
    """Stands for a dict of another class, whose items follow."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()  # which may have attributes, too


def _safetensors(path: Path) -> Mapping[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # a class of its own, which is no OSError
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
