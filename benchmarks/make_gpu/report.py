"""The table that `make gpu` ends with, from the files of its parts.

    python benchmarks/make_gpu/report.py FOLDER

At most 60 lines: what failed, milliseconds beside floors and peers, who won where and what `auto` took.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LINES, WIDTH = 60, 140
LEAST_FAILURES = 6  # lines for them at least

Cells = list[dict[str, Any]]


def read(folder: Path, name: str) -> dict[str, Any]:
    """A file of results, empty where there is none."""
    try:
        return json.loads((folder / name).read_text())
    except (OSError, ValueError):
        return {}


def tests(folder: Path) -> tuple[dict[str, int], list[str]]:
    """How many tests had which outcome, and a line for each that failed or never ended."""
    try:
        rows = [json.loads(line) for line in (folder / "tests.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return {}, []
    ended = {row["test"]: row for row in rows if row["outcome"] != "began"}
    counts: dict[str, int] = {}
    for row in ended.values():
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    lines = [f"{t}: {row['message']}" for t, row in ended.items() if row["outcome"] == "failed"]
    for row in rows:
        if row["test"] not in ended:
            ended[row["test"]] = row
            counts["not ended"] = counts.get("not ended", 0) + 1
            lines.append(f"{row['test']}: begun, and never ended")
    return counts, lines


def grid(*columns: str, rows: list[list[str]]) -> list[str]:
    """Lines of a table without borders, the first column to the left."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=WIDTH, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def groups(cells: Cells, *keys: str) -> Iterator[tuple[tuple[Any, ...], dict[str, dict[str, Any]]]]:
    """Cells of one size by contender."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for cell in cells:
        found.setdefault(tuple(cell[key] for key in keys), {})[cell["who"]] = cell
    yield from found.items()


def layers(cells: Cells, rates: dict[str, float]) -> list[str]:
    """Milliseconds of S4's modes beside the floor and the peers."""
    rows = []
    for (B, L, H, dtype, backward), by in groups(cells, "B", "L", "H", "dtype", "backward"):
        for name in ("S4", "S4D"):
            modes = {mode: by[f"{name} {mode}"] for mode in ("auto", "fft", "scan") if f"{name} {mode}" in by}
            if not modes:
                continue
            best = min((m for m in modes if m != "auto"), key=lambda m, ms=modes: ms[m]["ms"], default="")
            took = modes.get("auto", {}).get("took", "")
            peers = [by.get(who) for who in ("bare FFT", "LSTM", "attention", "original formula")]
            tensors = 5 if backward else 2  # of the inputs' size that are read or written: u, y and gradients
            size = tensors * (4 if dtype == "float32" else 2)
            floor = 1e-6 * size * B * L * H / rates["copy GB/s"] if rates else None
            rows.append(
                [f"{name} ({B}, {L}, {H}) {dtype}{' +bwd' if backward else ''}", _ms(floor)]
                + [
                    _ms(cell["ms"] if cell else None)
                    for cell in (*map(modes.get, ("auto", "fft", "scan")), *peers)
                ]
                + [best, took]
            )
    names = ("auto", "fft", "scan", "bare FFT", "LSTM", "attention", "original", "won", "auto took")
    return grid("ms of a layer (B, L, H)", "floor", *names, rows=rows) if rows else []


def kernels(cells: Cells, auto: str) -> list[str]:
    """The two fastest of each kernel, and how far `auto` is from the first."""
    rows = []
    chosen = [cell for cell in cells if cell["what"] != "vandermonde"]
    for (what, H, N, L, backward), by in groups(chosen, "what", "H", "N", "L", "backward"):
        order = sorted((who for who in by if who != "auto"), key=lambda who, of=by: of[who]["ms"])
        two = [f"{who} {_ms(by[who]['ms'])}" for who in order[:2]] + [""] * (2 - len(order[:2]))
        name = f"{what}, H {H}, N {N}, L {L}{' +bwd' if backward else ''}"
        own = by.get("auto", {})
        rows.append([name, _ms(own.get("ms")), own.get("took", ""), *two])
    if not rows:
        return []
    lines = grid("ms of a kernel", "auto", "auto took", "fastest", "next", rows=rows)
    return [*lines, *([auto.split("; not in")[0]] if auto else [])]


def generation(cells: Cells) -> list[str]:
    """Tokens a second."""
    rows = []
    for (batch, context), by in groups(cells, "batch", "context"):
        speeds = {who: by[who]["tokens_per_second"] for who in ("S4", "LSTM", "Transformer") if who in by}
        ratio = f"{speeds['S4'] / speeds['Transformer']:.1f}" if {"S4", "Transformer"} <= set(speeds) else ""
        shown = [f"{speeds[who]:,.0f}" if who in speeds else "" for who in ("S4", "LSTM", "Transformer")]
        rows.append([f"batch {batch}, context {context}", *shown, ratio])
    names = ("S4", "LSTM", "Transformer", "S4 / Transformer")
    return grid("tokens a second", *names, rows=rows) if rows else []


def training(cells: Cells) -> list[str]:
    """Steps a second of the recipe."""
    rows = [
        [f"{c['recipe']}, {c['what']} {c['precision']}".rstrip(), f"{c['per_second'] / c['batch']:,.2f}",
         f"{c['per_second']:,.0f}"]
        for c in cells
    ]  # fmt: skip
    return grid("training", "steps/s", "sequences/s", rows=rows) if rows else []


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def report(folder: Path) -> list[str]:
    """All lines."""
    files = {name: read(folder, f"{name}.json") for name in ("kernels", "layer", "generation", "training")}
    counts, failures = tests(folder)
    parts: Any = read(folder, "parts.json") or []
    bad = [part for part in parts if part["state"] != "ok"]
    failures = [f"{part['name']}: {part['state']}; {part['said']}".rstrip("; ") for part in bad] + failures
    for name, content in files.items():
        failures += [f"{name}: {where}: {message}" for where, message in content.get("failures", {}).items()]
    rows = []
    for part in parts:
        content = files.get(part["name"], {})
        done = f"{len(content['cells'])} cells" if "cells" in content else ""
        done += "" if content.get("complete", True) else ", not all"
        if part["name"] == "tests":
            done = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
        rows.append(
            [part["name"], "ok" if part["state"] == "ok" else "FAILED", f"{part['seconds']:.0f} s", done]
        )
    made = next((content for content in files.values() if "machine" in content), {})
    facts = [
        f"{key} {made[key]}"
        for key in ("machine", "driver", "cuda", "torch", "python", "commit")
        if key in made
    ]
    head = ["", ", ".join(facts)]
    tables = grid("part", "", "time", "done", rows=rows)
    tables += [note[:WIDTH] for part in parts for note in part.get("notes", [])]
    for lines in (
        layers(files["layer"].get("cells", []), files["layer"].get("rates", {})),
        kernels(files["kernels"].get("cells", []), files["kernels"].get("auto", "")),
        generation(files["generation"].get("cells", [])),
        training(files["training"].get("cells", [])),
    ):
        tables += lines
    room = max(LEAST_FAILURES, LINES - len(head) - len(tables) - 1)
    shown = [line[:WIDTH] for line in failures[:room]]
    if len(failures) > room:
        shown[-1] = f"and {len(failures) - room + 1} more, in {folder}"
    if failures:
        shown.insert(0, f"FAILED: {len(failures)}")
    return [*head, *shown, *tables][:LINES]


if __name__ == "__main__":
    print("\n".join(report(Path(sys.argv[1]))))
