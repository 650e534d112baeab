"""Files that are whole or absent: atomic writes, and a cache of tensors."""

import hashlib
import os
import pickle
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What `load_whole` raises on a file that is damaged, empty, or not one of its own.
UNREADABLE = (
    AssertionError,
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class DataError(Exception):
    """Data that cannot be used; the message says what was found and what was expected."""


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


def load_whole(file: Path, **options: Any) -> Any:
    """`torch.load` of plain values, after a look at the checksums of all parts, which torch does not take.

    Raises:
        UNREADABLE: if the file is absent, damaged or of another kind.
    """
    with zipfile.ZipFile(file) as parts:
        if damaged := parts.testzip():
            raise ValueError(f"the checksum of {damaged} is another than when it was written")
        # torch writes no attributes. Where they mark a part as a folder, it would read nothing of that part
        # and hand out memory with whatever was there before.
        if odd := next((part.filename for part in parts.infolist() if part.external_attr), None):
            raise ValueError(f"the attributes of {odd} are others than when it was written")
    return torch.load(file, weights_only=True, **options)


def cached(file: Path, build: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
    """Tensors from a file, memory-mapped, made and written first if it is absent or damaged.

    Returns:
        the tensors of `build`, and `digest`, a hash of them.

    Raises:
        DataError: if the file cannot be written.
    """
    try:
        content = load_whole(file, mmap=True)
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
        return {**load_whole(file, mmap=True), **{"digest": whole["digest"]}}
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
