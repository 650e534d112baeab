"""How do the layer's modes compare with each other, and with what else maps one sequence to another?

    pip install -e ".[test]"
    python benchmarks/layer.py [--budget SECONDS] [--device cuda] [--official DIR]

Time and peak memory of one layer of width H against the length L, forward alone and with backward:

- S4 and S4D: `S4Layer`, the kernel's or the chunks' making included, in each mode.
- LSTM: an `nn.LSTM` of the same width.
- attention: causal, heads of 64, with its linear maps of queries, keys, values and outputs.
- bare FFT: what a convolution with a ready-made kernel (H, L) takes: torch.fft, of the power of two >= 2L.
- original formula: four broadcast Cauchy sums at L/2 + 1 roots of unity, then the same FFT convolution.
- with --official, the original repository's layer without its activation and output map.

Backward is from a ready-made gradient to the input and all parameters. Memory is above the start, where the
input and the output's gradient already are; output and gradients count. Lines in the plot are floors: bytes
that have to be read or written, at the bandwidth of a large copy (which a sequence that fits a cache can
beat), and a scan's dense products at the rate of a large matrix product. Prints a table; writes JSON and
plots to benchmarks/results/.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from generation import HEAD_DIM, Attention
from jsonargparse import auto_cli
from kernels import (
    BROADCAST_LIMIT,
    RESULTS,
    Contender,
    measure,
    official_module,
    once,
    original_kernel,
    provenance,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from s4 import S4Layer

Shape = tuple[int, int, int]
SHAPES: dict[str, list[Shape]] = {
    "cpu": [
        *((16, 128, 1 << i) for i in range(8, 13)),
        (4, 128, 1 << 12),
        *((1, 128, 1 << i) for i in range(12, 21)),
    ]
}
SHAPES["cuda"] = [*SHAPES["cpu"], (50, 512, 1 << 10), (16, 256, 1 << 14)]
TOLERANCE = 1.15  # of the automatic mode's time over that of the faster mode
FFT, ORIGINAL = "bare FFT", "original formula"


@dataclass
class Cell:
    """One measurement: milliseconds (median and quartiles over repeats) and MiB above the start."""

    who: str
    B: int
    H: int
    N: int
    L: int
    backward: bool
    ms: float
    ms_low: float
    ms_high: float
    mib: float


class CausalAttention(Attention):
    """Of all positions at once."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, d_model) to the same."""
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.n_heads)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(y, "b h l d -> b l (h d)"))


def fft_convolution(u: Tensor, k: Tensor) -> Tensor:
    """u (B, H, L) and k (H, L) to (B, H, L)."""
    L = u.shape[-1]
    size = 1 << (2 * L - 1).bit_length()
    return torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(k, size), size)[..., :L]


def official_layers(folder: Path, H: int, N: int, L: int) -> dict[str, nn.Module]:
    """S4 and S4D of a checkout of the original repository: newer ones have an S4Block, older ones an S4."""
    models = official_module(folder)
    new = hasattr(models, "S4Block")
    layer, output = (models.S4Block, "final_act") if new else (models.S4, "postact")
    sizes = {"d_state": N, "l_max": L, "transposed": False, "activation": None, output: None}
    return {
        "official S4": layer(H, mode="dplr" if new else "nplr", **sizes),
        "official S4D": layer(H, mode="diag", **sizes),
    }


def contenders(shape: Shape, N: int, device: torch.device, official: Path | None) -> list[Contender]:
    """All of them at one size; the FFT convolutions get the layout that suits them, (B, H, L)."""
    B, H, L = shape
    n = N // 2
    u, gradient = torch.randn(2, B, L, H, device=device).unbind()
    rows, rows_gradient = torch.randn(2, B, H, L, device=device).unbind()
    u.requires_grad_()
    rows.requires_grad_()
    found: list[Contender] = []

    def add(who: str, module: nn.Module, run: Callable[[], Tensor]) -> None:
        found.append(Contender(who, run, [u, *module.parameters()], gradient))

    for name, variant in (("S4", "dplr"), ("S4D", "diag")):
        layer = S4Layer(H, N, variant=variant, device=device)
        for mode in ("fft", "scan", "auto"):
            add(f"{name} {mode}", layer, partial(_in_mode, layer, mode, u))
    lstm = nn.LSTM(H, H, batch_first=True, device=device)
    add("LSTM", lstm, lambda: lstm(u)[0])
    attention = CausalAttention(H).to(device)
    add("attention", attention, lambda: attention(u))
    k = torch.randn(H, L, device=device, requires_grad=True)
    found.append(Contender(FFT, lambda: fft_convolution(rows, k), [rows, k], rows_gradient))
    if H * n * L <= BROADCAST_LIMIT:
        v = torch.randn(4, H, n, dtype=torch.complex64, device=device, requires_grad=True)
        w = torch.complex(-torch.rand(H, n) - 0.1, torch.randn(H, n)).to(device).requires_grad_()
        found.append(
            Contender(
                ORIGINAL, lambda: fft_convolution(rows, original_kernel(v, w, L)), [rows, v, w], rows_gradient
            )
        )
        if official:
            for who, theirs in official_layers(official, H, N, L).items():
                add(who, theirs.to(device), partial(_first, theirs, u))
    return found


def _in_mode(layer: S4Layer, mode: str, u: Tensor) -> Tensor:
    layer.mode = mode
    return layer(u)


def _first(module: nn.Module, u: Tensor) -> Tensor:
    return module(u)[0]


def fits(cells: list[Cell], who: str, shape: Shape, backward: bool, seconds: float, gib: float) -> bool:
    """Whether one run would keep to these limits, by the last measurement of that width, if there is one."""
    B, H, L = shape
    for last in reversed(cells):
        if (last.who, last.H, last.backward) == (who, H, backward):
            growth = B * L / (last.B * last.L)
            work = growth * L / last.L if who == "attention" else growth
            return work * last.ms <= 1e3 * seconds and growth * last.mib <= 2**10 * gib
    return True


def measured_rates(device: torch.device, quick: bool) -> dict[str, float]:
    """GB/s of a copy, read and written, and Gflop/s of a matrix product: on large tensors, if not quick."""
    size = 256 if quick else 8192 if device.type == "cuda" else 2048
    source, A = torch.randn(16 * size, size, device=device), torch.randn(size, size, device=device)
    target = torch.empty_like(source)
    copy = Contender("copy", lambda: target.copy_(source), [source])
    product = Contender("product", lambda: A @ A, [A])
    best = [min(once(c, False) for _ in range(10)) for c in (copy, product)]
    return {"copy GB/s": 2e-6 * source.nbytes / best[0], "product Gflop/s": 2e-6 * size**3 / best[1]}


def floors(rates: dict[str, float], c: Cell) -> dict[str, float]:
    """Milliseconds. Input and output, backward three more of them; 8N flop an input, backward twice more."""
    inputs, copy, product = c.B * c.H * c.L, rates["copy GB/s"], rates["product Gflop/s"]
    moved, flops = (20, 24 * c.N) if c.backward else (8, 8 * c.N)
    return {
        "floor: bytes": 1e-6 * moved * inputs / copy,
        "floor: scan's flops": 1e-6 * flops * inputs / product,
    }


def ratios(cells: list[Cell], c: Cell) -> dict[str, float | None]:
    """Times as fast as the bare FFT and as the original formula, at the same size in the same run."""
    same = {o.who: o.ms for o in cells if _size(o) == _size(c)}
    return {who: same[who] / c.ms if who in same else None for who in (FFT, ORIGINAL)}


def _size(c: Cell) -> tuple[int, ...]:
    return (c.B, c.H, c.L, c.backward)


def show(cells: list[Cell]) -> None:
    """One line a measurement."""
    table = Table()
    for column in ("B", "H", "L", "pass", "who", "ms", "quartiles", "MiB", f"x {FFT}", f"x {ORIGINAL}"):
        table.add_column(column, justify="right")
    for c in cells:
        table.add_row(
            str(c.B), str(c.H), str(c.L), "fwd+bwd" if c.backward else "fwd", c.who,
            f"{c.ms:.2f}", f"{c.ms_low:.2f} - {c.ms_high:.2f}", f"{c.mib:.0f}",
            *(f"{r:.2f}" if r else "" for r in ratios(cells, c).values()),
        )  # fmt: skip
    Console(width=130).print(table)


def verdict(cells: list[Cell]) -> str:
    """How often mode="auto" is within 15% of the faster of the two modes, and where it is not."""
    count, missed = 0, []
    for c in cells:
        name, _, mode = c.who.partition(" ")
        modes = [o.ms for o in cells if _size(o) == _size(c) and o.who in (f"{name} fft", f"{name} scan")]
        if mode == "auto" and len(modes) == 2:
            count += 1
            if c.ms > TOLERANCE * min(modes):
                shape, what = (c.B, c.H, c.L), "forward + backward" if c.backward else "forward"
                missed.append(f"\n  {name} {shape} {what}: {c.ms / min(modes):.2f} times the faster")
    return f"auto is within 15% of the faster mode in {count - len(missed)} of {count} cells" + "".join(
        missed
    )


def plot(cells: list[Cell], rates: dict[str, float], file: Path) -> None:
    """Time, with its floors, and memory against L, log-log, a column for each B, H and pass."""
    groups: dict[tuple[int, int, bool], list[Cell]] = {}
    for c in cells:
        groups.setdefault((c.B, c.H, c.backward), []).append(c)
    groups = {key: group for key, group in groups.items() if len({c.L for c in group}) > 1} or groups
    names = list(dict.fromkeys(c.who for c in cells))
    figure, axes = plt.subplots(
        2, len(groups), figsize=(4.5 * len(groups), 8), layout="constrained", squeeze=False, sharex="col"
    )
    for (time_axis, memory_axis), ((B, H, backward), group) in zip(axes.T, groups.items(), strict=True):
        for i, who in enumerate(names):
            points = [c for c in group if c.who == who]
            lengths, style = (
                [c.L for c in points],
                {"color": f"C{i}", "marker": "os^d"[i // 10], "label": who},
            )
            time_axis.loglog(lengths, [c.ms for c in points], **style)
            memory_axis.loglog(lengths, [max(c.mib, 0.1) for c in points], **style)
        by_length = {c.L: floors(rates, c) for c in group}
        for floor, line in (("floor: bytes", ":"), ("floor: scan's flops", "--")):
            least = [f[floor] for f in by_length.values()]
            time_axis.loglog(list(by_length), least, line, color="black", label=floor)
        what = "forward + backward" if backward else "forward"
        time_axis.set(title=f"B = {B}, H = {H}, N = {group[0].N}, {what}", ylabel="ms")
        memory_axis.set(xlabel="L", ylabel="peak MiB above the start")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(
    budget: float = 2400.0,
    seconds: float = 0.5,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    shapes: list[Shape] | None = None,
    d_state: int = 64,
    patience: float = 20.0,
    memory_gib: float = 12.0,
    official: Path | None = None,
    name: str = "layer",
) -> None:
    """Time S4Layer's modes beside other layers, and write benchmarks/results/NAME-DEVICE.json and .png.

    Args:
        budget: seconds after which no further measurement starts.
        seconds: spent on one contender of one cell, between 3 and 50 runs.
        device: cpu or cuda.
        shapes: triples [B, H, L], H a multiple of 64; without them L from 256 to 2^20, with H = 128.
        d_state: state size N of the S4 layers.
        patience: a contender sits out where one run would take more seconds, by its last measurement.
        memory_gib: and where it would take more memory than this.
        official: a checkout of the original S4 repository, whose layers then take part at the lengths of
            the original formula.
        name: of the files written.
    """
    where, chosen = torch.device(device), shapes or SHAPES[device]
    for shape in chosen:
        if shape[1] % HEAD_DIM:
            raise SystemExit(
                f"--shapes: H must be a multiple of {HEAD_DIM}, the width of a head, got {shape}"
            )
    torch.manual_seed(0)
    rates = measured_rates(where, quick=seconds == 0)
    stop, cells = time.monotonic() + budget, []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=2 * len(chosen))
        for shape in chosen:
            progress.update(task, description=f"B, H, L = {shape}")
            found = contenders(shape, d_state, where, official) if time.monotonic() < stop else []
            for backward in (False, True):
                B, H, L = shape
                fit = [c for c in found if fits(cells, c.who, shape, backward, patience, memory_gib)]
                for who, values in measure(fit, backward, seconds, stop):
                    cells.append(Cell(who, B, H, d_state, L, backward, *values))
                progress.advance(task)
            found, fit = [], []  # the next size needs their memory
    if not cells:
        raise SystemExit(f"nothing was measured in a budget of {budget:g} seconds: raise --budget")
    show(cells)
    summary = verdict(cells)
    Console().print(summary)
    result = provenance(device) | {
        "auto": summary,
        "rates": rates,
        "cells": [
            asdict(c) | {f"times {who}": r for who, r in ratios(cells, c).items()} | floors(rates, c)
            for c in cells
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}-{device}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(cells, rates, RESULTS / f"{name}-{device}.png")


if __name__ == "__main__":
    auto_cli(main)
