"""The command line of a script: its function's arguments, and what is refused in a line."""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_origin

import torch
from jsonargparse import auto_cli


def run(main: Callable[..., None]) -> None:
    """Call main with the command line; a list may be given as 256,1024 as well as [256,1024].

    Raises:
        SystemExit: a wrong option, in one line.
    """
    kinds = {name: p.annotation for name, p in inspect.signature(main).parameters.items()}
    lists = {f"--{name}" for name, kind in kinds.items() if get_origin(kind) is list}
    arguments: list[str] = []
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=")
        if name in lists and equals:
            argument = f"{name}={_bracketed(name, value)}"
        elif arguments and arguments[-1] in lists:
            argument = _bracketed(arguments[-1], argument)
        arguments.append(argument)
    try:
        auto_cli(main, args=arguments, exit_on_error=False)
    except argparse.ArgumentError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}; see --help") from None


def _bracketed(option: str, text: str) -> str:
    if not text.strip("[] "):
        raise SystemExit(f"{option}: give at least one value")
    return text if text.startswith(("[", "--")) else f"[{text}]"


def usable(device: str) -> torch.device:
    """The device, if it is there.

    Raises:
        SystemExit: no such GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device cuda: torch {torch.__version__} finds no GPU; use --device cpu")
    return torch.device(device)


def folder(option: str, path: Path | None) -> Path | None:
    """A folder that exists, or None.

    Raises:
        SystemExit: it does not exist.
    """
    if path is not None and not path.is_dir():
        raise SystemExit(f"{option}: there is no folder {path}")
    return path
