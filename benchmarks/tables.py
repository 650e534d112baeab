"""The tables of results in the pages, written from the files of results: no number is typed by hand.

    python benchmarks/tables.py           # writes every table of every page anew
    python benchmarks/tables.py --check   # writes nothing; names the pages that would change, exit code 1

A page says where a table goes by two comments, `<!-- table: layer-cpu -->` and `<!-- end -->`; what is
between them is replaced. Numbers come from `benchmarks/results/*.json` and `examples/results/`. Needs nothing
but Python.
"""

import argparse
import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "examples" / "results"
MARKED = re.compile(
    r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n)(?P<table>.*?)(?P<end><!-- end -->)", re.DOTALL
)
Row = Sequence[str]
READY = "FFT convolution, ready-made kernel"
SHAPES = ((16, 1024), (4, 4096), (1, 16384), (1, 65536), (1, 131072))  # B, L of a layer with H = 128, N = 64

# Published in arXiv 2111.00396, in percent of the test set unless it says so.
PAPER: dict[str, tuple[str, str, str]] = {
    # task: what the paper reports, the run of ours that comes nearest, and how that run is smaller
    "Sequential MNIST": ("99.63%", "smnist_small", "causal, 2 layers of 64"),
    "Permuted MNIST": ("98.70%", "pmnist_small", "causal, 2 layers of 64, 2 epochs"),
    "Sequential CIFAR-10": ("91.13%", "scifar_small", "300 steps, of a JPEG copy"),
    "LRA ListOps": ("59.60%", "listops_small", "1,500 steps"),
    "LRA Text": ("86.82%", "text_small", "2,048 bytes, 3 layers"),
    "LRA Retrieval, Image, Pathfinder, Path-X": ("90.90%, 88.65%, 94.20%, 96.35%", "", ""),
    "Speech Commands of ten words; WikiText-103": ("98.3%; perplexity 20.95", "", ""),
}


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


def paper() -> Iterable[Row]:
    """The paper's results, and the small runs of ours."""
    yield "task", "S4 paper", "here, so far", "that run"
    for task, (published, run, smaller) in PAPER.items():
        if run:
            r = trained(run)
            link = f"[{r['steps']:,} steps, {r['parameters']:,} parameters](examples/results/{run})"
            yield task, published, f"{100 * r['test accuracy']:.2f}%", f"{smaller}; {link}"
        else:
            yield task, published, "not run yet", ""


def forecast() -> Iterable[Row]:
    """Mean squared errors of one channel, by the steps ahead."""
    with (RUNS / "forecast" / "cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    ahead = list(dict.fromkeys(c["horizon"] for c in cells))
    yield "`forecast`, steps ahead", *ahead
    for data, name in (("etth1", "ETTh1"), ("etth2", "ETTh2")):
        for who, column in (("published", "published mse"), ("ours", "test mse")):
            mine = {c["horizon"]: float(c[column]) for c in cells if c["dataset"] == data}
            yield f"{name}, {who}", *(f"{mine[h]:.3f}" for h in ahead)


def accuracy() -> Iterable[Row]:
    """Errors of float32 kernels."""
    lengths = ("1024", "16384", "65536")
    yield "variant", "init", "N", *(f"L = {int(length):,}" for length in lengths)
    rows = [r for r in results("accuracy")["kernel"] if r["backend"] == "auto"]
    for r in sorted(rows, key=lambda r: (r["N"], r["variant"] != "dplr")):
        yield r["variant"], r["init"], str(r["N"]), *(small(r["error"][length]) for length in lengths)


def agreement() -> Iterable[Row]:
    """How far forward and step are apart."""
    found = results("accuracy")["forward_against_step_at_4096"]
    yield "variant", "float32", "float64"
    for variant in ("dplr", "diag"):
        yield variant, *(small(found[f"{variant} {dtype}"]) for dtype in ("float32", "float64"))


def features() -> Iterable[Row]:
    """Errors of what sequences come with, beside loops of plain calls."""
    errors = results("sequences-cpu")["errors"]
    yield "", "float64, value", "gradient", "float32, value", "gradient"
    for name in dict.fromkeys(e["feature"] for e in errors):
        of = {e["dtype"]: e for e in errors if e["feature"] == name}
        found = [of[dtype][what] for dtype in ("float64", "float32") for what in ("value", "gradient")]
        yield f"`{name}`", *map(small, found)


def half_errors() -> Iterable[Row]:
    """What is lost given the rounded parameters: the worst of six kinds of layers."""
    yield "parameters", "kernel", "output, before and after rounding it", "gradient, before and after"
    for dtype in ("bfloat16", "float16"):
        rows = [r["error"] for r in results("half")["layers"] if r["dtype"] == dtype]
        worst = {key: small(max(r[key] for r in rows)) for key in rows[0]}
        both = [f"{worst[f'{what} in float32']}, {worst[what]}" for what in ("output", "gradient")]
        yield dtype, worst["kernel"], *both


def half_rounding() -> Iterable[Row]:
    """What the rounding of each parameter changes."""
    names = ("log_dt", "A_imag", "all but log_dt, A_imag", "all")
    yield (
        "rounded to bfloat16, the rest in float32",
        "`log_dt`",
        "`A_imag`",
        "all others",
        "all",
        "all, float16",
    )
    for variant, init in (("dplr", "legs"), ("dplr", "fout"), ("diag", "lin")):
        of = {r["dtype"]: r["rounding"] for r in results("half")["layers"]
              if (r["variant"], r["init"]) == (variant, init)}  # fmt: skip
        what = "kernel of a new layer, {}: change over its norm, median channel" if init == "legs" else "{}"
        changes = [*(of["bfloat16"][name][0] for name in names), of["float16"]["all"][0]]
        yield what.format(f"{variant} {init}"), *map(percent, changes)
    copying, smnist = (_rounded(recipe) for recipe in ("copying", "smnist_small"))
    keys = [*(("bfloat16", name) for name in (*names[:3], "S4 layers")), ("float16", "S4 layers")]
    whole = copying["float32", "nothing"]["accuracy"]
    yield (
        f"accuracy of a model trained to copy over 1,000 steps, {100 * whole:.1f}% in float32",
        *(f"{100 * copying[key]['accuracy']:.1f}%" for key in keys),
    )
    yield (
        "logits of one trained on sequential MNIST: change over their deviation",
        *(percent(smnist[key]["moved"]) for key in keys),
    )


def _rounded(recipe: str) -> dict[tuple[str, str], Any]:
    return {(m["dtype"], m["rounded"]): m for m in results("half")["models"] if m["recipe"] == recipe}


def half_training() -> Iterable[Row]:
    """Training in half precision."""
    said = {
        "bfloat16 autocast": "bfloat16 by autocast (`bf16-mixed`)",
        "bfloat16 parameters": "bfloat16 parameters (`bf16-true`)",
    }
    yield (
        "",
        "training loss, steps 200 to 300",
        "validation loss",
        "accuracy",
        "numbers of dt, A, P, B and C that ever moved",
    )
    for r in results("half-training")["runs"]:
        moved = r.get("share of numbers that moved", {})
        shares = {
            name: moved[name] for name in ("log_dt", "log_A_real", "A_imag", "P", "B", "C") if name in moved
        }
        if not moved or min(shares.values()) == 1:
            text = "all"
        else:
            text = ", ".join(f"`{name}` {share:.0%}" for name, share in shares.items())
        losses = (r["train loss, steps 200 to 300"], r["validation loss"])
        yield (
            said.get(r["run"], r["run"]),
            *(f"{x:.3f}" for x in losses),
            f"{100 * r['validation accuracy']:.1f}%",
            text,
        )


def kernel_cpu() -> Iterable[Row]:
    """The kernel beside the original formula."""
    yield "L", "forward, original", "s4", "with backward, original", "s4", "memory, original", "s4"
    for L in (1024, 4096, 16384):
        row = [f"{L:,}"]
        pairs = [
            [measured("kernels-cpu", what="S4 kernel", who=who, H=128, N=64, L=L, backward=backward)
             for who in ("original formula", "auto")]
            for backward in (False, True)
        ]  # fmt: skip
        for original, ours in pairs:
            row += [number(original["ms"]), f"{number(ours['ms'])} ({times(original['ms'], ours['ms'])})"]
        yield *row, *(f"{number(c['mib'])} MiB" for c in pairs[1])


def layer_cpu(backward: bool = True, shapes: Sequence[tuple[int, int]] = SHAPES) -> Iterable[Row]:
    """A layer beside others."""
    names = {"S4 auto": "S4 auto", "S4 fft": "S4 fft", "LSTM": "LSTM", "attention": "attention",
             "bare FFT": READY, "original formula": "original formula"}  # fmt: skip
    yield "B × L", *names.values()
    for B, L in shapes:
        row = {who: cell("layer-cpu", who=who, B=B, H=128, N=64, L=L, backward=backward) for who in names}
        cells = {who: number(c["ms"]) if c else "not run" for who, c in row.items()}
        if original := row["original formula"]:
            cells["original formula"] += f" ({times(original['ms'], row['S4 auto']['ms'])})"
        yield f"{B} × {L:,}", *cells.values()


def floors_cpu() -> Iterable[Row]:
    """How near to what the machine can do."""
    rates = results("layer-cpu")["rates"]
    copy, product = number(rates["copy GB/s"]), number(rates["product Gflop/s"])
    floors = (f"bytes alone at {copy} GB/s", f"products alone at {product} Gflop/s")
    yield "B × L", "pass", "S4 auto, ms", *floors, "share of the larger"
    for B, L in SHAPES:
        for backward in (False, True):
            c = measured("layer-cpu", who="S4 auto", B=B, H=128, N=64, L=L, backward=backward)
            least = (c["floor: bytes"], c["floor: scan's flops"])
            what = "forward and backward" if backward else "forward"
            yield f"{B} × {L:,}", what, number(c["ms"]), *map(number, least), f"{max(least) / c['ms']:.0%}"


def operations_cpu() -> Iterable[Row]:
    """How near each operation is."""
    of = results("floors-cpu")["rates"]
    fast = ", ".join(f"{number(of[f'product Gflop/s, float{bits}'])} (float{bits})" for bits in (32, 64))
    copy = number(of["copy GB/s"])
    yield "operation", "of", "ms", f"bytes alone at {copy} GB/s", f"flops alone at {fast} Gflop/s", "share"
    for c in results("floors-cpu")["cells"]:
        floors = (number(c["floor: bytes"]), f"{number(c['floor: flops'])} ({c['dtype']})")
        yield f"`{c['operation']}`", c["case"], number(c["ms"]), *floors, f"{c['share']:.0%}"


def memory_cpu() -> Iterable[Row]:
    """Peak memory of forward and backward."""
    names = {"S4 scan": "S4 scan", "S4 fft": "S4 fft", "LSTM": "LSTM", "attention": "attention"}
    yield "B × L", "input and output", *names.values()
    for B, L in SHAPES[:-1]:
        of = [measured("layer-cpu", who=who, B=B, H=128, N=64, L=L, backward=True) for who in names]
        yield f"{B} × {L:,}", number(2 * B * L * 128 * 4 / 2**20), *(number(c["mib"]) for c in of)


def resets_cpu() -> Iterable[Row]:
    """What resets cost."""
    shares = {"plain": "none given", "0": "0", "0.001": "1/1,000", "0.01": "1/100", "0.1": "1/10", "1": "1"}
    yield "", *shares.values()
    for mode in ("scan", "fft"):
        of = {(c["who"], c["backward"]): c["ms"] for c in results("sequences-cpu")["cells"]
              if (c["what"], c["variant"], c["mode"]) == ("resets", "dplr", mode)}  # fmt: skip
        yield f"`{mode}`", *(f"{number(of[s, False])}, {number(of[s, True])}" for s in shares)


def rates_cpu() -> Iterable[Row]:
    """What irregular steps and chosen states cost."""
    yield (
        "",
        "forward, plain",
        "with it",
        "and backward, plain",
        "with it",
        "memory with backward, plain",
        "with it",
    )
    kinds = (
        ("rates", "rate (B, L)", "`rate` (B, L)"),
        ("states", "states (B, 16)", "16 `states` of a sequence"),
    )
    for what, who, said in kinds:
        for variant, name in (("dplr", "S4"), ("diag", "S4D")):
            row: list[str] = []
            for backward in (False, True):
                of = {"what": what, "variant": variant, "mode": "scan", "backward": backward}
                plain, ours = (measured("sequences-cpu", who=each, **of) for each in ("plain", who))
                row += [number(plain["ms"]), f"{number(ours['ms'])} ({times(ours['ms'], plain['ms'])})"]
            yield f"{said}, {name}", *row, *(f"{number(c['mib'])} MiB" for c in (plain, ours))


def compiled_cpu() -> Iterable[Row]:
    """Eager and compiled."""
    yield "", "a step", "forward", "forward and backward"
    for what in ("S4 layer", "S4D layer", "model of 4"):
        row = []
        for part in ("step", "forward", "training"):
            ms = [
                measured("compiled-cpu", who=who, what=what, part=part)["ms"] for who in ("eager", "compiled")
            ]
            row.append(", ".join(map(number, ms)))
        yield what.replace("model of 4", "model of 4 blocks"), *row


def generation(name: str) -> Iterable[Row]:
    """Tokens a second."""
    cells = results(name)["cells"]
    contexts = list(dict.fromkeys(c["context"] for c in cells))
    yield "batch", "", *(f"after {context:,} tokens" for context in contexts), "held, at the last"
    for batch in dict.fromkeys(c["batch"] for c in cells):
        for who in ("S4", "LSTM", "Transformer"):
            of = [measured(name, who=who, batch=batch, context=context) for context in contexts]
            held = of[-1]["held_mib"]
            kept = f"{number(held / 1024)} GiB" if held >= 1024 else f"{number(held)} MiB"
            yield str(batch), who, *(number(c["tokens_per_second"]) for c in of), kept


def recall_by_lag() -> Iterable[Row]:
    """What fresh states tell of the input of some steps ago."""
    data = results("memory-cpu")
    shown = (0, 10, 100, 300, 500, 700, 900, 1100, 2000)
    yield "variant, init", *(f"{lag:,}" for lag in shown)
    for r in data["recall"]:
        of = dict(zip(data["lags"], r["r2"], strict=True))
        yield f"`{r['variant']}`, `{r['init']}`", *(f"{max(of[lag], 0):.0%}" for lag in shown)


def reach_by_dt() -> Iterable[Row]:
    """How far back half of the input is told."""
    steps = {(r["init"], r["N"], r["dt"]): r["steps"] for r in results("memory-cpu")["reach"]}
    dts = list(dict.fromkeys(dt for _, _, dt in steps))
    yield "init", "N", *(f"dt = {dt:g}" for dt in dts)
    for init, N in dict.fromkeys((init, N) for init, N, _ in steps):
        yield f"`{init}`", str(N), *(f"{steps[init, N, dt]:,}" for dt in dts)


def _learned(**of: object) -> str:
    """R2 of the delay that was trained: the mean of its seeds, and the least and the most."""
    of = {"variant": "dplr", "init": "legs", "d_state": 64, "n_ssm": 1, "dt_min": 1e-3, "dt_max": 1e-1, **of}
    runs = [r["r2"] for r in results("memory-cpu")["delay"] if all(r[key] == of[key] for key in of)]
    if not runs:
        raise ValueError(f"memory-cpu: no run with {of}")
    mean, least, most = (round(x, 3) + 0.0 for x in (sum(runs) / len(runs), min(runs), max(runs)))  # not -0
    return f"{mean:.3f} ({least:.3f} to {most:.3f})"


def learned_by_init() -> Iterable[Row]:
    """The delay by initialisation."""
    yield "variant, init", "dt from 0.001 to 0.1", "dt = 1/256 in all channels"
    for r in results("memory-cpu")["recall"]:
        kind = {"variant": r["variant"], "init": r["init"]}
        window = _learned(**kind, dt_min=1 / 256, dt_max=1 / 256)
        yield f"`{r['variant']}`, `{r['init']}`", _learned(**kind), window


def learned_by_option() -> Iterable[Row]:
    """The delay by dt, state size and number of systems, of dplr with legs."""
    yield "what differs from the defaults", "R2"
    yield "nothing: N = 64, dt from 0.001 to 0.1, `n_ssm` 1", _learned()
    for dt in (1e-1, 1e-2, 1e-3):
        yield f"dt = {dt:g} in all channels", _learned(dt_min=dt, dt_max=dt)
    for N in (4, 16, 256):
        yield f"N = {N}", _learned(d_state=N)
    yield "`n_ssm` 16, a system for each channel", _learned(n_ssm=16)


def modes_by_shape() -> Iterable[Row]:
    """Both ways of both variants."""
    who = ("S4 scan", "S4 fft", "S4D scan", "S4D fft")
    yield "machine", "B × L × H", *(f"{name[:-4].strip()}, `{name.split()[1]}`" for name in who)
    for B, L in SHAPES[:-1]:
        row = []
        for name in who:
            of = {"who": name, "B": B, "L": L, "N": 64, "H": 128}
            row.append(
                ", ".join(number(measured("layer-cpu", backward=b, **of)["ms"]) for b in (False, True))
            )
        yield "2 cores", f"{B} × {L:,} × 128", *row
    for B, L, H in ((50, 1024, 512), (16, 16384, 256)):
        row = []
        for name in who:
            of = {"who": name, "B": B, "L": L, "H": H, "dtype": "float32"}
            row.append(
                ", ".join(number(measured("layer-h200", backward=b, **of)["ms"]) for b in (False, True))
            )
        yield "H200", f"{B} × {L:,} × {H}", *row


def backends_by_sum() -> Iterable[Row]:
    """The Cauchy sums by who computes them."""
    names = ("auto", "cpu", "cuda", "triton", "keops", "torch", "naive")
    yield "machine", "H, N, L", *(f"`{name}`" for name in names)
    for file, machine, H in (("kernels-cpu", "2 cores", 128), ("kernels-h200", "H200", 512)):
        for L in (1024, 16384):
            row = []
            for who in names:
                of = {"what": "cauchy", "who": who, "H": H, "N": 64, "L": L}
                pair = [cell(file, backward=backward, **of) for backward in (False, True)]
                row.append(", ".join(number(c["ms"]) for c in pair if c))
            yield machine, f"{H}, 64, {L:,}", *row


def generation_short() -> Iterable[Row]:
    """Of the README: tokens a second of 16 sequences."""
    head, *rows = generation("generation-cpu")
    yield from ([row[1], *row[2:]] for row in (head, *rows) if row[0] in ("batch", "16"))


def distributed_cpu() -> Iterable[Row]:
    """A sequence of a million steps over processes; both directions in brackets."""
    head = ("MiB each, {}", "seconds")
    yield (
        "processes", *(part.format(dtype) for dtype in ("float64", "float32") for part in head),
        "outputs, gradients differ from one process, float64",
    )  # fmt: skip
    for ranks in (1, 2, 4):
        row, apart = [str(ranks)], []
        for dtype in ("float64", "float32"):
            one, two = (
                measured("distributed-cpu", ranks=ranks, dtype=dtype, variant="dplr", bidirectional=both)
                for both in (False, True)
            )
            row.append(f"{number(max(one['mib']))} ({number(max(two['mib']))})")
            row.append(f"{one['seconds']:.1f} ({two['seconds']:.1f})")
            apart += [f"{small(c['outputs'])}, {small(c['gradients'])}" for c in (one, two)]
        yield *row, f"{apart[0]} ({apart[1]})" if ranks > 1 else ""


def peers_cpu() -> Iterable[Row]:
    """Layers of other libraries."""
    data = results("peers-cpu")
    names = {"S4": "S4", "S4D": "S4D", "official S4 naive": "original S4",
             "official S4D naive": "original S4D", "S5": f"S5 (s5-pytorch {data['versions']['s5-pytorch']})",
             "GRU": "nn.GRU", "LSTM": "nn.LSTM"}  # fmt: skip
    shapes = ((16, 1024), (4, 4096))
    yield (
        "", *(f"{B} × {L:,}" for B, L in shapes), "MiB, both",
        "a step at batch 16, ms", "kernel error at 4,096",
        "output, gradient error", "numbers of state",
    )  # fmt: skip
    for who, said in names.items():
        ours = who.replace("official ", "").replace(" naive", "")
        row, memory = [], []
        for B, L in shapes:
            forward, both = (
                measured("peers-cpu", who=who, what=w, B=B, L=L) for w in ("forward", "backward")
            )
            best = measured("peers-cpu", who=ours, what="backward", B=B, L=L)["ms"]
            more = f" ({times(both['ms'], best)})" if who.startswith("official") else ""
            row.append(f"{number(forward['ms'])}, {number(both['ms'])}{more}")
            memory.append(number(both["mib"]))
        step = measured("peers-cpu", who=who, what="step", B=16, L=1024)
        error = next(e for e in data["errors"] if (e["who"], e["L"]) == (who, 4096))
        kernel = small(error["kernel"]) if error["kernel"] is not None else ""
        yield (
            said, *row, ", ".join(memory), number(step["ms"]), kernel,
            f"{small(error['output'])}, {small(error['gradient'])}", f"{step['state']:,}",
        )  # fmt: skip


def layer_h200() -> Iterable[Row]:
    """A layer on one H200."""
    names = {"S4 auto": "S4 auto", "S4D auto": "S4D auto", "bare FFT": READY,
             "original formula": "original formula", "LSTM": "LSTM", "attention": "attention"}  # fmt: skip
    yield "B × L × H", "dtype", *names.values()
    for B, L, H in ((50, 1024, 512), (16, 16384, 256)):
        for dtype in ("float32", "bfloat16"):
            row = []
            for who in names:
                of = {"who": who, "B": B, "L": L, "H": H, "dtype": dtype}
                pair = [cell("layer-h200", backward=backward, **of) for backward in (False, True)]
                row.append(
                    ", ".join(number(c["ms"]) if c else "not run" for c in pair) if pair[0] else "not run"
                )
            yield f"{B} × {L:,} × {H}", dtype, *row


def kernel_h200() -> Iterable[Row]:
    """The kernel on one H200."""
    names = {"auto": "auto", "cuda sums": "sums, CUDA", "triton sums": "sums, Triton",
             "torch sums": "sums, PyTorch",
             "powers": "powers, PyTorch", "original formula": "original formula"}  # fmt: skip
    yield "L", "pass", *names.values()
    for L in (1024, 16384):
        for backward in (False, True):
            of = [
                cell("kernels-h200", what="S4 kernel", who=who, H=512, N=64, L=L, backward=backward)
                for who in names
            ]
            what = "forward and backward" if backward else "forward"
            yield f"{L:,}", what, *(number(c["ms"]) if c else "not run" for c in of)


def training_h200() -> Iterable[Row]:
    """Steps of a training run on one H200."""
    yield "precision", "sequences a second", "steps of 50 a second"
    for c in results("training-h200")["cells"]:
        yield f"`{c['precision']}`", number(c["per_second"]), f"{c['per_second'] / c['batch']:.1f}"


def deploy_cpu() -> Iterable[Row]:
    """What became of a model, in the runtimes that take it."""
    yield "", "model", "frozen", "onnxruntime", "AOTInductor", "largest error"
    for part, frozen, said in (("chunk", "frozen", "chunk of 64"), ("forward", "frozen, fft", "1,024 steps")):
        for what in ("S4 layer", "S4D layer", "model of 4"):
            of = [
                measured("deploy-cpu", who=who, what=what, part=part)
                for who in ("model", frozen, "onnxruntime", "AOTInductor")
            ]
            name = what.replace("of 4", "of 4 blocks")
            yield f"{name}, {said}", *(number(c["ms"]) for c in of), small(max(c["error"] for c in of))


def peers_short() -> Iterable[Row]:
    """Of the README: time and error beside the original."""
    yield (
        "H = 128, N = 64, B = 4, L = 4,096",
        "forward, ms",
        "with backward, ms",
        "memory, MiB",
        "kernel error",
    )
    errors = {e["who"]: e["kernel"] for e in results("peers-cpu")["errors"] if e["L"] == 4096}
    names = {"S4": "S4 here", "official S4 naive": "S4 original", "S4D": "S4D here",
             "official S4D naive": "S4D original", "LSTM": "nn.LSTM"}  # fmt: skip
    for who, said in names.items():
        forward, both = (measured("peers-cpu", who=who, what=w, B=4, L=4096) for w in ("forward", "backward"))
        error = small(errors[who]) if errors[who] is not None else ""
        yield said, number(forward["ms"]), number(both["ms"]), number(both["mib"]), error


TABLES: dict[str, Callable[[], Iterable[Row]]] = {
    "accuracy": accuracy,
    "agreement": agreement,
    "backends-by-sum": backends_by_sum,
    "compiled-cpu": compiled_cpu,
    "deploy-cpu": deploy_cpu,
    "distributed-cpu": distributed_cpu,
    "features": features,
    "floors-cpu": floors_cpu,
    "forecast": forecast,
    "generation-cpu": lambda: generation("generation-cpu"),
    "generation-h200": lambda: generation("generation-h200"),
    "generation-short": generation_short,
    "half-errors": half_errors,
    "half-rounding": half_rounding,
    "half-training": half_training,
    "kernel-cpu": kernel_cpu,
    "kernel-h200": kernel_h200,
    "layer-cpu": layer_cpu,
    "layer-cpu-forward": lambda: layer_cpu(backward=False),
    "layer-h200": layer_h200,
    "learned-by-init": learned_by_init,
    "learned-by-option": learned_by_option,
    "memory-cpu": memory_cpu,
    "modes-by-shape": modes_by_shape,
    "operations-cpu": operations_cpu,
    "paper": paper,
    "peers-cpu": peers_cpu,
    "peers-short": peers_short,
    "rates-cpu": rates_cpu,
    "reach-by-dt": reach_by_dt,
    "recall-by-lag": recall_by_lag,
    "resets-cpu": resets_cpu,
    "training-h200": training_h200,
}


def runs(table: str) -> str:
    """The results of the examples: in rows that link to a run's folder, its numbers anew, words as they are.

    Columns: recipe, published, test result, steps, wall time, machine, seed, commit, log.
    """
    lines = []
    for line in table.splitlines():
        cells = line.strip("| ").split(" | ")
        if link := re.search(r"\]\(results/(\w+)\)", cells[-1]):
            r = trained(link[1])
            cells[2] = re.sub(r"^[^;]*", result(r), cells[2])
            cells[3] = re.sub(r"^[\d,]+", f"{r['steps']:,}", cells[3])
            cells[4] = re.sub(r"^[\d,]+", f"{r['wall time (s)']:,.0f}", cells[4])
            cells[6] = str(r["seed"])
            cells[7] = re.sub(r"^[\da-f]+", r["commit"][:7], cells[7])
            line = f"| {' | '.join(cells)} |"
        lines.append(line + "\n")
    return "".join(lines)


def result(run: dict[str, Any]) -> str:
    """What a run is judged by, as its task has it."""
    if "test r2" in run:
        return f"R2 {run['test r2']:.4f}"
    if run["recipe"].startswith("shakespeare"):
        return f"{run['test bits']:.3f} bits"
    half = run.get("test_half_rate accuracy")
    return f"{run['test accuracy']:.2%}" + (f", at half rate {half:.2%}" if half else "")


def markdown(name: str) -> str:
    """A table as Markdown, with an empty line on each side.

    Raises:
        ValueError: there is no such table, or its rows differ in length.
    """
    if name not in TABLES:
        raise ValueError(f"no table {name!r}: there are {', '.join(TABLES)}")
    head, *rows = [list(row) for row in TABLES[name]()]
    if any(len(row) != len(head) for row in rows):
        raise ValueError(
            f"table {name}: rows of {sorted({len(row) for row in rows})} cells below {len(head)}"
        )
    lines = [f"| {' | '.join(line)} |\n" for line in (head, *rows)]
    return "\n" + lines[0] + "|---" * len(head) + "|\n" + "".join(lines[1:]) + "\n"


def written(text: str) -> str:
    """A page with its tables as the results have them.

    Raises:
        ValueError: a marker without its end, or of no table.
    """
    if text.count("<!-- table: ") != len(MARKED.findall(text)):
        raise ValueError("a `<!-- table: NAME -->` has no `<!-- end -->`")

    def table(m: re.Match[str]) -> str:
        return m["begin"] + (runs(m["table"]) if m["name"] == "runs" else markdown(m["name"])) + m["end"]

    return MARKED.sub(table, text)


def pages() -> list[Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    """Write, or with --check compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page would change")
    check, changed, failed = parser.parse_args().check, 0, 0
    for page in pages():
        text, name = page.read_text(), page.relative_to(ROOT)
        try:
            new = written(text)
        except ValueError as error:  # the other pages are written all the same
            failed += 1
            print(f"{name}: {error}")
            continue
        if new != text:
            changed += 1
            print(f"{name}: {'is not what the results say' if check else 'written'}")
            if not check:
                page.write_text(new)
    return int(failed > 0 or (check and changed > 0))


if __name__ == "__main__":
    raise SystemExit(main())
