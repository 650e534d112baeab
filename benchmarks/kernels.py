"""Which backend is fastest, and how much memory does it take?

    pip install -e ".[test]"
    python benchmarks/kernels.py [--budget SECONDS] [--device cuda] [--official DIR] [--out FILE.json]

Times the sums and `S4Layer.kernel`, forward and forward with backward, beside two baselines: the sums
broadcast in plain PyTorch ("naive"), and the original formula of a DPLR kernel, four broadcast Cauchy sums at
L/2 + 1 roots of unity. With --official also the original repository's sums and kernels. Prints a table;
writes JSON, and plots of time and memory beside it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
from contenders.layers import BROADCAST_LIMIT, Official, original_kernel
from harness import Budget, Contender, Measured, Report, measure, result_file, run, show, usable
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from rich.console import Console
from torch import Tensor, nn

import s4
from s4 import S4Layer
from s4.backends import BACKENDS
from s4.ops import dispatch

KINDS = ("cauchy", "S4 kernel", "S4D kernel")


@dataclass
class Cell(Measured):
    """One measurement; `took` is the contender that "auto" is."""

    what: str
    who: str
    H: int
    N: int
    L: int
    backward: bool
    took: str = ""


def contenders(
    H: int, N: int, L: int, device: torch.device, fused: list[str], official: Official | None
) -> Iterator[tuple[str, list[Contender]]]:
    """What is computed at one size, and by whom: the fused backends and the baselines."""
    n = N // 2
    v = torch.randn(H, 4, n, dtype=torch.complex64, device=device, requires_grad=True)
    w = torch.complex(-torch.rand(H, n) - 0.1, torch.randn(H, n)).to(device).requires_grad_()
    z = torch.polar(torch.ones(L // 2 + 1), torch.linspace(0, torch.pi, L // 2 + 1)).to(device)
    rows = v.detach().transpose(0, 1).contiguous().requires_grad_()
    broadcast = H * n * L <= BROADCAST_LIMIT
    sums = [*(["naive"] if broadcast else []), *fused, "auto"]
    theirs = official if broadcast else None  # its KeOps and CUDA code too, so that all are in one cell

    def cauchy(backend: str) -> Tensor:
        return s4.kernel.cauchy(v, z, w[:, None], backend=backend).abs()

    found = [Contender(name, partial(cauchy, name), [v, w]) for name in sums]
    for who, f in theirs.sums("cauchy").items() if theirs else ():
        found.append(Contender(who, lambda f=f: f(rows, z, w).abs(), [rows, w]))
    yield "cauchy", found
    for what, variant in (("S4 kernel", "dplr"), ("S4D kernel", "diag")):
        layer = S4Layer(H, N, variant=variant, device=device)
        parameters = list(layer.parameters())
        ways = (
            {f"{b} sums": (b, "sums") for b in fused} if what == "S4 kernel" else {"sums": ("torch", "sums")}
        )
        ways |= {"powers": ("auto", "powers"), "auto": ("auto", "auto")}
        found = [
            Contender(who, partial(_layer_kernel, layer, *way, L), parameters) for who, way in ways.items()
        ]
        if what == "S4 kernel" and broadcast:
            found.append(Contender("original formula", lambda: original_kernel(rows, w, L), [rows, w]))
        for who, module in theirs.kernels(variant, H, N, L).items() if theirs else ():
            found.append(Contender(who, partial(_official_kernel, module, L), list(module.parameters())))
        yield what, found


def _layer_kernel(layer: S4Layer, backend: str, method: str, L: int) -> Tensor:
    layer.backend = backend
    return layer.kernel(L, method=method)


def _official_kernel(module: nn.Module, L: int) -> Tensor:
    return module(L=L)[0]


def table(cells: list[Cell]) -> None:
    """One line a measurement; speed against the broadcast baseline of the same cell."""
    baseline = {
        (c.what, c.H, c.N, c.L, c.backward): c.ms for c in cells if c.who in ("naive", "original formula")
    }
    rows = []
    for c in cells:
        base = baseline.get((c.what, c.H, c.N, c.L, c.backward))
        rows.append(
            (
                c.what, c.who, c.H, c.N, c.L, "fwd+bwd" if c.backward else "fwd", f"{c.ms:.3f}",
                f"{c.ms_low:.3f} - {c.ms_high:.3f}", f"{c.mib:.0f}", f"{base / c.ms:.1f}" if base else "",
            )
        )  # fmt: skip
    show(("what", "who", "H", "N", "L", "pass", "ms", "quartiles", "MiB", "x baseline"), rows)


def pick(what: str, N: int, L: int, device: torch.device) -> str:
    """The contender that "auto" is."""
    module = dispatch.implementation("cauchy", "auto", device)
    sums = next((name for name, it in BACKENDS.items() if it is module), "torch")
    if what == "cauchy":
        return sums
    return f"{sums} sums" if what == "S4 kernel" and dispatch.takes_sums(N, L, device.type) else "powers"


def verdict(cells: list[Cell], device: torch.device) -> str:
    """How often what "auto" picks was the fastest, or within a tenth of it; and where it was not."""
    groups: dict[tuple[str, int, int, int, bool], dict[str, float]] = {}
    for c in cells:
        if c.who != "auto":  # the same code as its pick, so that the two differ by noise alone
            groups.setdefault((c.what, c.H, c.N, c.L, c.backward), {})[c.who] = c.ms
    judged, missed = 0, []
    for (what, H, N, L, backward), times in groups.items():
        picked, fastest = pick(what, N, L, device), min(times, key=lambda who: times[who])
        if picked in times:
            judged += 1
            if times[picked] > 1.1 * times[fastest]:
                kind = "fwd+bwd" if backward else "fwd"
                missed.append(
                    f"{what} H={H} N={N} L={L} {kind}: {fastest} {times[picked] / times[fastest]:.2f}x"
                )
    good = f"auto picks the fastest, or within 10% of it, in {judged - len(missed)} of {judged} cells"
    return "; not in ".join([good, *missed])


def plot(cells: list[Cell], file: Path) -> None:
    """Time and memory of forward and backward against L, log-log, one line a contender."""
    kinds = list(dict.fromkeys(c.what for c in cells))
    states = sorted({c.N for c in cells})
    H, N = max(c.H for c in cells), states[len(states) // 2]
    figure, axes = plt.subplots(
        2, len(kinds), figsize=(4 * len(kinds), 7), layout="constrained", squeeze=False
    )
    for column, what in enumerate(kinds):
        for who in dict.fromkeys(c.who for c in cells if c.what == what):
            points = [c for c in cells if (c.what, c.who, c.H, c.N, c.backward) == (what, who, H, N, True)]
            for axis, values in zip(
                axes[:, column], ([c.ms for c in points], [c.mib for c in points]), strict=True
            ):
                axis.loglog([c.L for c in points], values, marker="o", label=who)
        axes[0, column].set(title=f"{what}, H = {H}, N = {N}", ylabel="ms, forward + backward")
        axes[1, column].set(xlabel="L", ylabel="peak MiB")
        axes[0, column].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(
    budget: PositiveFloat = 900.0,
    seconds: NonNegativeFloat = 0.5,
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu",
    widths: list[PositiveInt] = [32, 128],  # noqa: B006  # read only; a tuple has no command-line form
    states: list[PositiveInt] = [16, 64, 256],  # noqa: B006
    lengths: list[PositiveInt] = [256, 1024, 4096, 16384],  # noqa: B006
    official: Path | None = None,
    out: Path | None = None,
    replace: bool = False,
    plots: bool = True,
) -> None:
    """Time the kernel backends side by side.

    Args:
        budget: seconds after which no further measurement starts, compiling at first use left out.
        seconds: spent on one contender of one cell, between 3 and 50 runs.
        device: cpu or cuda.
        widths: numbers of channels H.
        states: state sizes N, even.
        lengths: sequence lengths L.
        official: a checkout of the original S4 repository, to run its sums and kernels in the same table.
        out: file of results; without it ~/.cache/s4/benchmarks/kernels-DEVICE.json.
        replace: write over a committed result.
        plots: also draw time and memory, into a PNG beside the file of results.
    """
    where, file = usable(device), result_file("kernels", device, out, replace)
    if odd := [N for N in states if N % 2]:
        raise SystemExit(f"--states: a state size must be even, got {odd[0]}")
    theirs = Official(official, where) if official else None
    torch.manual_seed(0)
    sizes = [(H, N, L) for H in widths for N in states for L in lengths]
    # Asked before the clock starts: to know whether KeOps works is to compile with it.
    fused = [b for b, module in BACKENDS.items() if b != "naive" and module.status(where) is True]
    clock = Budget(budget)
    with Report(file, where, clock, total=2 * len(KINDS) * len(sizes)) as report:
        for H, N, L in sizes:
            if not report.begin(f"H {H}, N {N}, L {L}"):
                break
            for what, found in contenders(H, N, L, where, fused, theirs):
                for backward in (False, True):
                    measured, failed = measure(found, backward, seconds, clock)
                    kind = f"{what}, H {H}, N {N}, L {L}{', backward' if backward else ''}"
                    report.add(
                        (Cell(**asdict(m), what=what, who=who, H=H, N=N, L=L, backward=backward,
                              took=pick(what, N, L, where) if who == "auto" else "")
                         for who, m in measured.items()),
                        {f"{who}: {kind}": message for who, message in failed.items()},
                        len(found),
                    )  # fmt: skip
        if report.cells:
            table(report.cells)
            summary = verdict(report.cells, where)
            Console().print(summary)
            report.write(auto=summary)
            if plots:
                plot(report.cells, file.with_suffix(".png"))
    report.finish()


if __name__ == "__main__":
    run(main)
