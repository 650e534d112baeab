"""Times and memory of a layer: beside others, near to what the machine can do, with what sequences bring."""

from collections.abc import Iterable, Sequence

from make_tables.source import Row, cell, measured, number, results, small, times

READY = "FFT convolution, ready-made kernel"
SHAPES = ((16, 1024), (4, 4096), (1, 16384), (1, 65536), (1, 131072))  # B, L of a layer with H = 128, N = 64


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


def training_h200() -> Iterable[Row]:
    """Steps of a training run on one H200."""
    yield "precision", "sequences a second", "steps of 50 a second"
    for c in results("training-h200")["cells"]:
        yield f"`{c['precision']}`", number(c["per_second"]), f"{c['per_second'] / c['batch']:.1f}"


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
