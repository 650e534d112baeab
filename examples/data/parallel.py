"""Work in blocks, over several processes, in order, with a progress bar."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from rich.progress import track

Result = TypeVar("Result")


def run_blocks(
    function: Callable[[range], Result], count: int, block: int, workers: int | None, description: str
) -> Iterator[Result]:
    """`function(rows)` for the blocks of rows that make up range(count), one after the other.

    Args:
        function: importable by name, or a `functools.partial` of such a function, as workers are processes of
            their own. They import its module and the main script.
        count: rows in all.
        block: rows of a block.
        workers: processes, None for one a core; 1 does everything in this process.
        description: beside the progress bar, which is shown on a terminal only.

    Raises:
        ValueError: if count is negative, or block or workers is less than 1.
    """
    for name, value, least in (("count", count, 0), ("block", block, 1), ("workers", workers, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    blocks = [range(start, min(start + block, count)) for start in range(0, count, block)]

    def progress(results: Iterator[Result]) -> Iterable[Result]:
        hidden = not sys.stdout.isatty()
        return track(results, description, total=len(blocks), transient=True, disable=hidden)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(workers or cores or 1, len(blocks))
    if workers <= 1:
        yield from progress(map(function, blocks))
    else:
        # Not forked: a process with threads, such as those of torch, must not be.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield from progress(pool.map(function, blocks))
