"""Checkpoints that are whole or absent, and say when they are damaged."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.storage import UNREADABLE, atomic_save, first_line, load_whole
from lightning.pytorch.plugins.io import TorchCheckpointIO

# What testing and resuming read of a checkpoint, and of which kind it is.
CONTENT: dict[str, type] = {
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "lr_schedulers": list,
    "optimizer_states": list,
    "pytorch-lightning_version": str,
    "state_dict": dict,
}
OPTIONAL: dict[str, type] = {"callbacks": dict, "hyper_parameters": dict}


class ConfigError(Exception):
    """A value in the configuration that the model or the data refuses."""


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
        content = load_whole(path, map_location=map_location)
    except UNREADABLE as error:
        # What torch says of a file that is none of its own is how to open it in spite of the danger.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint{reason}; nothing was changed; give another by ckpt_path, "
            "such as best.ckpt or last.ckpt of the same run"
        ) from error
    if missing := [name for name in CONTENT if not isinstance(content, dict) or name not in content]:
        raise CheckpointError(
            f"{path} is not a checkpoint of this program, it has no {', '.join(missing)}; nothing was changed"
        )
    kinds = {**CONTENT, **{name: kind for name, kind in OPTIONAL.items() if name in content}}
    if wrong := [name for name, kind in kinds.items() if not isinstance(content[name], kind)]:
        raise CheckpointError(
            f"{path} is not a checkpoint of this program, its {wrong[0]} is no {kinds[wrong[0]].__name__}; "
            "nothing was changed"
        )
    return content


def divide_steps(checkpoint: dict[str, Any], parts: int) -> None:
    """Count the batches that a checkpoint is behind as if each step were made of `parts` of them.

    A run that goes on with other `trainer.accumulate_grad_batches` is at the same step, but at another batch.
    """
    loop = checkpoint["loops"]["fit_loop"]
    place = next(iter(loop["state_dict"].get("combined_loader", [])), {})
    saved = place.get("parts", parts)
    for counts in (loop["epoch_loop.batch_progress"][span] for span in ("total", "current")):
        moved = counts["ready"] // saved * parts + counts["ready"] % saved - counts["ready"]
        counts.update({name: count + moved for name, count in counts.items()})


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
