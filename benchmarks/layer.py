"""How do the layer's modes compare with each other, and with what else maps one sequence to another?

    pip install -e ".[test]"
    python benchmarks/layer.py [--budget SECONDS] [--device cuda] [--official DIR] [--out FILE.json]

Time and peak memory of one layer of width H against the length L, forward alone and with backward:

- S4 and S4D: `S4Layer`, the kernel's or the chunks' making included, in each mode.
- LSTM: an `nn.LSTM` of the same width.
- attention: causal, heads of 64, with its linear maps of queries, keys, values and outputs.
- bare FFT: what a convolution with a ready-made kernel (H, L) takes: torch.fft, of the power of two >= 2L.
- original formula: four broadcast Cauchy sums at L/2 + 1 roots of unity, then the same FFT convolution.
- with --official, the original repository's layer without its activation and output map.

Backward is from a ready-made gradient to the input and all parameters. In bfloat16 inputs and outputs are
bfloat16 and all run under autocast, in which PyTorch gives an LSTM on a GPU to cuDNN in float16. Memory is
above the start, where the input and the output's gradient already are; output and gradients count. Lines in
the plot are floors: bytes that have to be read or written, at the bandwidth of a large copy (which a sequence
that fits a cache can beat), and a scan's dense products at the rate of a large matrix product. Prints a
table; writes JSON, and plots beside it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import matplotlib.pyplot as plt
import torch
from contenders.layers import BROADCAST_LIMIT, HEAD_DIM, Attention, Official, fft_convolution, original_kernel
from harness import Budget, Contender, Measured, Report, measure, milliseconds, result_file, run, show, usable
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from rich.console import Console
from torch import Tensor, nn

import s4.sequence
from s4 import S4Layer

Shape = tuple[PositiveInt, PositiveInt, PositiveInt]
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
class Cell(Measured):
    """One measurement; `took` is the mode that "auto" ran in."""

    who: str
    B: int
    H: int
    N: int
    L: int
    dtype: str
    backward: bool
    took: str = ""


def contenders(
    shape: Shape, N: int, dtype: torch.dtype, device: torch.device, official: Official | None
) -> list[Contender]:
    """All of them at one size; the FFT convolutions get the layout that suits them, (B, H, L)."""
    B, H, L = shape
    n = N // 2
    u, gradient = torch.randn(2, B, L, H, device=device, dtype=dtype).unbind()
    rows, rows_gradient = torch.randn(2, B, H, L, device=device, dtype=dtype).unbind()
    u.requires_grad_()
    rows.requires_grad_()
    lower = None if dtype == torch.float32 else dtype
    found: list[Contender] = []

    def add(who: str, module: nn.Module, output: Callable[[], Tensor]) -> None:
        found.append(Contender(who, output, [u, *module.parameters()], gradient, lower))

    for name, variant in (("S4", "dplr"), ("S4D", "diag")):
        layer = S4Layer(H, N, variant=variant, device=device)
        for mode in ("fft", "scan", "auto"):
            add(f"{name} {mode}", layer, partial(_in_mode, layer, mode, u))
    lstm = nn.LSTM(H, H, batch_first=True, device=device)
    add("LSTM", lstm, lambda: lstm(u)[0])
    attention = Attention(H).to(device)
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
        # It has no FFT of bfloat16.
        for who, theirs in official.layers(H, N, L).items() if official and lower is None else ():
            add(who, theirs, partial(_first, theirs, u))
    return found


def _in_mode(layer: S4Layer, mode: str, u: Tensor) -> Tensor:
    layer.mode = mode
    return layer(u)


def _first(module: nn.Module, u: Tensor) -> Tensor:
    return module(u)[0]


def taken(contender: Contender) -> str:
    """The mode that a layer runs in: seen, as what "auto" decides by is its own affair."""
    with mock.patch.object(s4.sequence, "scan", wraps=s4.sequence.scan) as scan, torch.no_grad():
        contender.run()
    return "scan" if scan.called else "fft"


def fits(
    cells: list[Cell], who: str, shape: Shape, dtype: str, backward: bool, seconds: float, gib: float
) -> bool:
    """Whether one run would keep to these limits, by the last measurement of that width, if there is one."""
    B, H, L = shape
    for last in reversed(cells):
        if (last.who, last.H, last.dtype, last.backward) == (who, H, dtype, backward):
            growth = B * L / (last.B * last.L)
            work = growth * L / last.L if who == "attention" else growth
            return work * last.ms <= 1e3 * seconds and growth * last.mib <= 2**10 * gib
    return True


def measured_rates(device: torch.device, quick: bool) -> dict[str, float]:
    """GB/s of a copy, read and written, and Gflop/s of products by dtype: on large tensors, if not quick."""
    size = 256 if quick else 8192 if device.type == "cuda" else 2048
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 2**34:
        size = min(size, 2048)
    source = torch.randn(16 * size, size, device=device)
    target = torch.empty_like(source)
    found = {"copy GB/s": 2e-6 * source.nbytes / _best(lambda: target.copy_(source), source)}
    for dtype in (torch.float32, torch.bfloat16):
        A = source[:size].to(dtype)
        name = f"product Gflop/s, {str(dtype).removeprefix('torch.')}"
        found[name] = 2e-6 * size**3 / _best(lambda A=A: A @ A, A)
    return found


def _best(run: Callable[[], Tensor], of: Tensor) -> float:
    return min(milliseconds(Contender("", run, [of]), False) for _ in range(10))


def floors(rates: dict[str, float], c: Cell) -> dict[str, float]:
    """Milliseconds. Input and output, backward three more of them; 8N flop an input, backward twice more."""
    inputs, copy, product = c.B * c.H * c.L, rates["copy GB/s"], rates[f"product Gflop/s, {c.dtype}"]
    size = 4 if c.dtype == "float32" else 2
    moved, flops = (5 * size, 24 * c.N) if c.backward else (2 * size, 8 * c.N)
    return {
        "floor: bytes": 1e-6 * moved * inputs / copy,
        "floor: scan's flops": 1e-6 * flops * inputs / product,
    }


def ratios(cells: list[Cell], c: Cell) -> dict[str, float | None]:
    """Times as fast as the bare FFT and as the original formula, at the same size in the same run."""
    same = {o.who: o.ms for o in cells if _size(o) == _size(c)}
    return {who: same[who] / c.ms if who in same else None for who in (FFT, ORIGINAL)}


def _size(c: Cell) -> tuple[object, ...]:
    return (c.B, c.H, c.L, c.dtype, c.backward)


def table(cells: list[Cell]) -> None:
    """One line a measurement."""
    columns = ("B", "H", "L", "dtype", "pass", "who", "ms", "quartiles", "MiB", f"x {FFT}", f"x {ORIGINAL}")
    show(
        columns,
        (
            (
                c.B, c.H, c.L, c.dtype, "fwd+bwd" if c.backward else "fwd",
                f"{c.who}: {c.took}" if c.took else c.who, f"{c.ms:.3f}", f"{c.ms_low:.3f} - {c.ms_high:.3f}",
                f"{c.mib:.0f}", *(f"{r:.2f}" if r else "" for r in ratios(cells, c).values()),
            )
            for c in cells
        ),
    )  # fmt: skip


def verdict(cells: list[Cell]) -> str:
    """How often mode="auto" is within 15% of the faster of the two modes, and where it is not."""
    count, missed = 0, []
    for c in cells:
        name, _, mode = c.who.partition(" ")
        modes = [o.ms for o in cells if _size(o) == _size(c) and o.who in (f"{name} fft", f"{name} scan")]
        if mode == "auto" and len(modes) == 2:
            count += 1
            if c.ms > TOLERANCE * min(modes):
                shape = f"{(c.B, c.H, c.L)} {c.dtype}"
                what = "forward + backward" if c.backward else "forward"
                missed.append(f"\n  {name} {shape} {what}: {c.ms / min(modes):.2f} times the faster")
    return f"auto is within 15% of the faster mode in {count - len(missed)} of {count} cells" + "".join(
        missed
    )


def plot(cells: list[Cell], rates: dict[str, float], file: Path) -> None:
    """Time, with its floors, and memory against L, log-log, a column for each B, H, dtype and pass."""
    groups: dict[tuple[int, int, str, bool], list[Cell]] = {}
    for c in cells:
        groups.setdefault((c.B, c.H, c.dtype, c.backward), []).append(c)
    groups = {key: group for key, group in groups.items() if len({c.L for c in group}) > 1} or groups
    names = list(dict.fromkeys(c.who for c in cells))
    figure, axes = plt.subplots(
        2, len(groups), figsize=(4.5 * len(groups), 8), layout="constrained", squeeze=False, sharex="col"
    )
    for (time_axis, memory_axis), ((B, H, dtype, backward), group) in zip(
        axes.T, groups.items(), strict=True
    ):
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
        time_axis.set(title=f"B = {B}, H = {H}, N = {group[0].N}, {dtype}, {what}", ylabel="ms")
        memory_axis.set(xlabel="L", ylabel="peak MiB above the start")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(
    budget: PositiveFloat = 2400.0,
    seconds: NonNegativeFloat = 0.5,
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu",
    shapes: list[Shape] = [],  # noqa: B006  # read only; a tuple has no command-line form
    dtypes: list[Literal["float32", "bfloat16"]] = ["float32"],  # noqa: B006
    d_state: PositiveInt = 64,
    patience: PositiveFloat = 20.0,
    memory_gib: PositiveFloat = 12.0,
    official: Path | None = None,
    out: Path | None = None,
    replace: bool = False,
    plots: bool = True,
) -> None:
    """Time S4Layer's modes beside other layers.

    Args:
        budget: seconds after which no further measurement starts.
        seconds: spent on one contender of one cell, between 3 and 50 runs.
        device: cpu or cuda.
        shapes: triples [[B,H,L]], H a multiple of 64; without them L from 256 to 2^20, with H = 128.
        dtypes: of inputs and outputs; bfloat16 under autocast.
        d_state: state size N of the S4 layers, even.
        patience: a contender sits out where one run would take more seconds, by its last measurement.
        memory_gib: and where it would take more memory than this.
        official: a checkout of the original S4 repository, whose layers then take part at the lengths of
            the original formula, in float32.
        out: file of results; without it ~/.cache/s4/benchmarks/layer-DEVICE.json.
        replace: write over a committed result.
        plots: also draw time and memory, into a PNG beside the file of results.
    """
    where, file, chosen = usable(device), result_file("layer", device, out, replace), shapes or SHAPES[device]
    for shape in chosen:
        if shape[1] % HEAD_DIM:
            raise SystemExit(
                f"--shapes: H must be a multiple of {HEAD_DIM}, the width of a head, got {list(shape)}"
            )
    if d_state % 2:
        raise SystemExit(f"--d_state: a state size must be even, got {d_state}")
    theirs = Official(official, where) if official else None
    torch.manual_seed(0)
    rates = measured_rates(where, quick=seconds == 0)
    clock = Budget(budget)
    with Report(file, where, clock, total=2 * len(chosen) * len(dtypes), rates=rates) as report:
        for shape, dtype in ((shape, dtype) for shape in chosen for dtype in dtypes):
            if not report.begin(f"B, H, L = {shape}, {dtype}"):
                break
            B, H, L = shape
            found = contenders(shape, d_state, getattr(torch, dtype), where, theirs)
            for backward in (False, True):
                fit = [
                    c
                    for c in found
                    if fits(report.cells, c.who, shape, dtype, backward, patience, memory_gib)
                ]
                measured, failed = measure(fit, backward, seconds, clock)
                took = {c.who: taken(c) for c in fit if c.who.endswith(" auto") and c.who in measured}
                kind = f"{shape} {dtype}{', backward' if backward else ''}"
                report.add(
                    (
                        Cell(**asdict(m), who=who, B=B, H=H, N=d_state, L=L, dtype=dtype, backward=backward,
                             took=took.get(who, ""))
                        for who, m in measured.items()
                    ),
                    {f"{who}: {kind}": message for who, message in failed.items()},
                    len(fit),
                )  # fmt: skip
            found, fit = [], []  # the next size needs their memory
        if cells := report.cells:
            table(cells)
            summary = verdict(cells)
            Console().print(summary)
            ratio = [{f"times {who}": r for who, r in ratios(cells, c).items()} for c in cells]
            report.write(
                [asdict(c) | r | floors(rates, c) for c, r in zip(cells, ratio, strict=True)], auto=summary
            )
            if plots:
                plot(cells, rates, file.with_suffix(".png"))
    report.finish()


if __name__ == "__main__":
    run(main)
