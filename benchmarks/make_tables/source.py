"""Files of results, the numbers in them, and how a number is written."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "examples" / "results"
Row = Sequence[str]


@cache
def results(name: str) -> Any:
    """A file of benchmarks/results."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@cache
def trained(name: str) -> Any:
    """What a run of the examples came to."""
    return json.loads((RUNS / name / "results.json").read_text())


def cell(name: str, **of: object) -> Any | None:
    """The one cell of a file with these values, or None."""
    found = [c for c in results(name)["cells"] if all(c[key] == value for key, value in of.items())]
    if len(found) > 1:
        raise ValueError(f"{name}: {len(found)} cells with {of}")
    return found[0] if found else None


def measured(name: str, **of: object) -> Any:
    """The same, of what has to be there."""
    found = cell(name, **of)
    if found is None:
        raise ValueError(f"{name}: no cell with {of}")
    return found


def number(value: float) -> str:
    """Two digits below 10, all digits before the point above it: 0.058, 3.4, 35, 11,882."""
    if value == 0:
        return "0"
    if value >= 9.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 0.995 else f"{value:.2g}"


def small(value: float) -> str:
    """An error: 2.0e-7."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def percent(value: float) -> str:
    """A small share or a change: 0.6%, 21%."""
    return f"{100 * value:.1f}%" if value < 0.0995 else f"{100 * value:.0f}%"


def times(slower: float, faster: float) -> str:
    """How often the one is the other: 14x, 6.7x."""
    return f"{number(slower / faster)}x"
