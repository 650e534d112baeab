"""Checkpoints that are whole or absent, and say when they are damaged."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data.storage import UNREADABLE, atomic_save, first_line
from lightning.pytorch.plugins.io import TorchCheckpointIO

# What testing and resuming read of a checkpoint.
CONTENT = (
    "epoch",
    "global_step",
    "loops",
    "lr_schedulers",
    "optimizer_states",
    "pytorch-lightning_version",
    "state_dict",
)


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged, or of another run; the message names the file."""


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint written by Lightning.

    Raises:
        CheckpointError: if the file is missing, damaged or no Lightning checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except UNREADABLE as error:
        # What torch says of a file that is none of its own is how to open it in spite of the danger.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint{reason}; nothing was changed"
        ) from error
    if missing := [name for name in CONTENT if not isinstance(content, dict) or name not in content]:
        raise CheckpointError(
            f"{path} is not a checkpoint of this program, it has no {', '.join(missing)}; nothing was changed"
        )
    return content


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files through `atomic_save` and `load_checkpoint`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Write `checkpoint` to `path`, or leave what was there."""
        for partial in Path(path).parent.glob(f".{Path(path).name}.*"):  # left by a run that was killed
            partial.unlink()
        atomic_save(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read `path`; only tensors and plain values are ever unpickled, whatever `weights_only` says."""
        return load_checkpoint(Path(path), map_location)
