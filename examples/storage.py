"""Files that are whole or absent: atomic writes, checkpoints that say when they are damaged, a cache."""

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

# What torch.load raises on a file that is truncated, empty, or not one of its own.
UNREADABLE = (RuntimeError, EOFError, OSError, KeyError, ValueError, pickle.UnpicklingError)

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


class DataError(Exception):
    """Data that cannot be used; the message says what was found and what was expected."""


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged, or of another run; the message names the file."""


def first_line(error: Exception) -> str:
    """What an error of a library says, in short."""
    return (str(error) or type(error).__name__).splitlines()[0]


def atomic_save(content: object, path: Path) -> None:
    """`torch.save` that a crash at any moment leaves as the old file or the new one, never half of either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # such as a full disk, which torch hides
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


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


def cached(file: Path, build: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
    """Tensors from a file, memory-mapped, made and written first if it is absent or damaged.

    Returns:
        the tensors of `build`, and `digest`, a hash of them.

    Raises:
        DataError: if the file cannot be written.
    """
    try:
        content = torch.load(file, mmap=True, weights_only=True)
        if (
            isinstance(content, dict)
            and "digest" in content
            and content.pop("layout", None) == _layout(content)
        ):
            return content
    except UNREADABLE:  # absent, or damaged by something other than this program: built anew
        pass
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # before the building, which may take a while
    except OSError as error:
        raise _unwritable(file, error) from error
    tensors = {name: tensor.contiguous() for name, tensor in build().items()}
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.numpy())
    # Of the content alone: a folder may move.
    whole = {**tensors, "digest": digest.hexdigest()[:16]}
    try:
        atomic_save({**whole, "layout": _layout(whole)}, file)
        return {**torch.load(file, mmap=True, weights_only=True), **{"digest": whole["digest"]}}
    except OSError as error:
        raise _unwritable(file, error) from error


def default_cache() -> Path:
    """Where tensors are kept unless `cache_dir` says so."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "s4-examples"


def _unwritable(file: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot keep tensors in data.cache_dir {file.parent}: {first_line(error)}; "
        "expected a folder that can be written, with room for them"
    )


def _layout(content: dict[str, Any]) -> dict[str, Any]:
    return {name: (str(x.dtype), list(x.shape)) for name, x in content.items() if isinstance(x, Tensor)}


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
