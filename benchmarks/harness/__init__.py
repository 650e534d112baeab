"""What the benchmarks share: their command lines, timing side by side, memory, and files of results."""

from harness.command_line import folder, run, usable
from harness.results import RESULTS, ROOT, Report, provenance, result_file, show
from harness.timing import (
    Budget,
    Contender,
    Measured,
    Peak,
    first_line,
    lost,
    measure,
    milliseconds,
    synchronize,
)

__all__ = [
    "RESULTS",
    "ROOT",
    "Budget",
    "Contender",
    "Measured",
    "Peak",
    "Report",
    "first_line",
    "folder",
    "lost",
    "measure",
    "milliseconds",
    "provenance",
    "result_file",
    "run",
    "show",
    "synchronize",
    "usable",
]
