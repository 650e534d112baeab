"""What a state remembers, fresh and trained."""

from collections.abc import Iterable

from make_tables.source import Row, results


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
