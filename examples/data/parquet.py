"""Rows of a data set in the Hugging Face hub's form: from the hub, or from a folder of parquet files."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.storage import UNREADABLE, DataError, first_line


def parquet_files(path: Path, split: str, columns: tuple[str, ...]) -> list[Path]:
    """The parquet files of a split, checked: they are there once, can be read, and have the columns.

    Raises:
        DataError: if not.
    """
    import pyarrow
    import pyarrow.parquet

    expected = f"expected {split}.parquet with columns {' and '.join(map(repr, columns))}"
    if not path.is_dir():
        raise DataError(f"data.path {path} is not a folder; {expected}")
    files, sets = [], {}  # sets: (folder, number of parts) to the parts that are there
    for file in sorted(path.rglob(f"{split}*.parquet")):
        if match := re.fullmatch(rf"{split}(?:-(\d+)-of-(\d+)(?:-\w+)?)?\.parquet", file.name):
            sets.setdefault((file.parent, int(match[2] or 1)), []).append(int(match[1] or 0))
            files.append(file)
    if not files:
        raise DataError(f"data.path {path} has no {split}.parquet; {expected}")
    if len(sets) > 1 or any(parts != list(range(number)) for (_, number), parts in sets.items()):
        names = ", ".join(str(file.relative_to(path)) for file in files)
        raise DataError(
            f"data.path {path} must hold every part of {split} just once, got {names}; {expected}"
        )
    for file in files:
        try:
            found = pyarrow.parquet.read_schema(file).names
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"cannot read {file}: {first_line(error)}; {expected}") from error
        if missing := set(columns) - set(found):
            raise DataError(f"{file} has no column {sorted(missing)}, only {found}; {expected}")
    return files


@contextmanager
def rows(
    hub: str,
    path: Path | None,
    split: str,
    columns: tuple[str, ...],
    expected: str,
    name: str | None = None,
    folder: str | None = None,
    revision: str | None = None,
) -> Iterator[Any]:
    """The rows of a split as a `datasets.Dataset`; what goes wrong with them is a `DataError`.

    Args:
        hub: the data set on the hub, fetched if there is no `path`.
        path: a folder of parquet files.
        split: as the hub names it, also the beginning of the files' names.
        columns: that must be there.
        expected: what a row should hold, for the message.
        name: of the hub's configuration.
        folder: of the files on the hub.
        revision: of the hub's repository.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        # A local folder is converted in a scratch folder, as what is made of it is cached by us.
        with tempfile.TemporaryDirectory() as scratch:
            if path:
                files = [str(file) for file in parquet_files(path, split, columns)]
                yield datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=scratch)
            else:
                yield datasets.load_dataset(hub, name, data_dir=folder, revision=revision, split=split)
    except (*UNREADABLE, TypeError, datasets.exceptions.DatasetsError) as error:
        where = path or hub
        raise DataError(
            f"cannot read {split} of {where}: {first_line(error)}; expected {expected}"
        ) from error


def check_integers(table: Any, column: str) -> None:
    """Raises a ValueError if the numbers of a column of `rows` are of another kind."""
    kind = str(getattr(table.features[column], "dtype", "of no type"))
    if not re.match("u?int", kind):
        raise ValueError(f"column {column!r} is {kind}")
