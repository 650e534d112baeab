"""Errors: of kernels, of features of sequences, in half precision."""

from collections.abc import Iterable
from typing import Any

from make_tables.source import Row, percent, results, small


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
