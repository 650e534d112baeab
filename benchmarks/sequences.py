"""What do resets, lengths, chosen states and irregular steps cost, and how exact are they?

    pip install -e ".[test]"
    python benchmarks/sequences.py [--budget SECONDS] [--out FILE.json]

- errors: each feature against loops of plain calls, a segment, a sequence or a step at a time, over the
  largest value, in float64 and float32: outputs, states and gradients by inputs and parameters, the worst of
  both variants and, where they have it, both directions and modes.
- times: milliseconds and peak MiB of a layer with a feature and without, both in turns, forward alone and
  with backward: resets at densities from 0 to 1, states after 16 inputs of each sequence, irregular steps.

Prints tables and writes JSON.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Budget, Contender, Measured, Report, measure, result_file, run, show
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from s4 import S4Layer

DENSITIES = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
Outputs = tuple[Tensor, ...]


@dataclass
class Cell(Measured):
    """One measurement."""

    who: str
    what: str
    variant: str
    mode: str
    backward: bool
    B: int
    L: int
    d_model: int
    d_state: int


@dataclass
class Case:
    """A layer and what it is given."""

    layer: S4Layer
    u: Tensor
    state: Tensor | None
    resets: Tensor
    lengths: Tensor
    positions: Tensor
    rate: Tensor  # (B, L)


def cases(dtype: torch.dtype, both: bool, L: int) -> Iterator[Case]:
    """Layers of every kind, over several chunks, the last of them ragged."""
    B, H, N = 3, 4, 16
    for variant in ("dplr", "diag"):
        for mode in ("fft", "scan"):
            torch.manual_seed(0)
            layer = S4Layer(H, N, variant=variant, mode=mode, bidirectional=both, dtype=torch.float64)
            layer = layer.to(dtype)
            state = None if both else torch.randn(B, H, N, dtype=torch.float64).to(dtype).requires_grad_()
            yield Case(
                layer,
                torch.randn(B, L, H, dtype=torch.float64).to(dtype).requires_grad_(),
                state,
                torch.rand(B, L) < 0.05,
                torch.tensor([L, L - L // 4, 1]),
                torch.randint(-1, L, (B, 5)),
                (0.5 + torch.rand(B, L, dtype=torch.float64)).to(dtype).requires_grad_(),
            )


def returned(both: bool, result: Any) -> Outputs:
    """Outputs, and the state where there is one."""
    return (result,) if both else tuple(result)


def by_segment(case: Case, both: bool) -> Outputs:
    """Resets, as plain calls."""
    rows, states = [], []
    for b, resets in enumerate(case.resets):
        starts = sorted({0, *resets.nonzero()[:, 0].tolist()})
        y, last = [], None if case.state is None else case.state[b : b + 1]
        for start, stop in zip(starts, [*starts[1:], len(resets)], strict=True):
            before = None if resets[start] else last
            found = case.layer(case.u[b : b + 1, start:stop], before, return_state=not both)
            if not both:
                found, last = found
            y.append(found)
        rows.append(torch.cat(y, 1))
        states.append(last)
    return (torch.cat(rows),) if both else (torch.cat(rows), torch.cat(states))  # type: ignore[arg-type]


def by_length(case: Case, both: bool) -> Outputs:
    """Lengths, as plain calls."""
    rows, states = [], []
    for b, n in enumerate(case.lengths.tolist()):
        before = None if case.state is None else case.state[b : b + 1]
        found = returned(both, case.layer(case.u[b : b + 1, :n], before, return_state=not both))
        rows.append(torch.nn.functional.pad(found[0], (0, 0, 0, case.u.shape[1] - n)))
        states += found[1:]
    return (torch.cat(rows), *([torch.cat(states)] if states else []))


def by_prefix(case: Case, both: bool) -> Outputs:
    """States after chosen inputs, as plain calls."""
    found = []
    for b, row in enumerate(case.positions.tolist()):
        assert case.state is not None
        before = case.state[b : b + 1]
        prefixes = [case.layer(case.u[b : b + 1, : p + 1], before, return_state=True)[1] for p in row]
        found.append(torch.stack(prefixes, 1))
    return (torch.cat(found),)


def by_row(case: Case, both: bool) -> Outputs:
    """A rate for each sequence, as plain calls."""
    found = []
    for b, rate in enumerate(case.rate[:, 0].tolist()):
        before = None if case.state is None else case.state[b : b + 1]
        row = case.layer(case.u[b : b + 1], before, rate=rate, return_state=not both)
        found.append(returned(both, row))
    return tuple(map(torch.cat, zip(*found, strict=True)))


def by_step(case: Case, both: bool) -> Outputs:
    """A rate for each input, as single steps: each sequence's own number."""
    rows, states = [], []
    for b, rates in enumerate(case.rate.tolist()):
        assert case.state is not None
        y, x = [], case.state[b : b + 1]
        for t, rate in enumerate(rates):
            y_t, x = case.layer.step(case.u[b : b + 1, t], x, rate=rate)
            y.append(y_t)
        rows.append(torch.stack(y, 1))
        states.append(x)
    return torch.cat(rows), torch.cat(states)


def called(case: Case, both: bool, **options: Any) -> Outputs:
    """The feature itself."""
    return returned(both, case.layer(case.u, case.state, return_state=not both, **options))


# What is given, the same by loops, and whether it is there in both directions.
FEATURES: dict[str, tuple[Callable[[Case, bool], Outputs], Callable[[Case, bool], Outputs], bool]] = {
    "resets": (lambda c, both: called(c, both, resets=c.resets), by_segment, True),
    "lengths": (lambda c, both: called(c, both, lengths=c.lengths), by_length, True),
    "states": (lambda c, both: (c.layer.states(c.u, c.positions, c.state),), by_prefix, False),
    "rate (B,)": (lambda c, both: called(c, both, rate=c.rate[:, 0].detach()), by_row, True),
    "rate (B, L)": (lambda c, both: called(c, both, rate=c.rate.detach()), by_step, False),
}


def errors(L: int) -> list[dict[str, Any]]:
    """The worst of each feature, over the largest value: of outputs and states, and of gradients."""
    found = []
    for what, (feature, loop, two_sided) in FEATURES.items():
        for dtype in (torch.float64, torch.float32):
            value = gradient = 0.0
            for both in (False, True) if two_sided else (False,):
                for case in cases(dtype, both, L):
                    leaves = [case.u, *case.layer.parameters(), *([] if both else [case.state])]
                    results = [feature(case, both), loop(case, both)]
                    back = [torch.randn_like(y) for y in results[0]]
                    grads = [
                        torch.autograd.grad(y, leaves, back, allow_unused=True, materialize_grads=True)
                        for y in results
                    ]
                    value = max(value, *map(_off, *results))
                    gradient = max(gradient, *map(_off, *grads))
            name = str(dtype).removeprefix("torch.")
            found.append({"feature": what, "dtype": name, "value": value, "gradient": gradient})
    return found


def _off(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max() / want.detach().abs().max().clamp(min=1e-30))


def contenders(what: str, layer: S4Layer, u: Tensor) -> list[Contender]:
    """The layer with a feature and without."""
    B, L, _ = u.shape
    torch.manual_seed(0)
    given: dict[str, dict[str, Any]] = {"plain": {}}
    if what == "resets":
        given |= {f"{density:g}": {"resets": torch.rand(B, L) < density} for density in DENSITIES}
    elif what == "rates":
        rate = 0.5 + torch.rand(B, L)
        given |= {"rate (B,)": {"rate": rate[:, 0]}, "rate (B, L)": {"rate": rate}}
    parameters = list(layer.parameters())
    found = [Contender(who, partial(layer, u, **options), parameters) for who, options in given.items()]
    if what == "states":
        positions = torch.randint(0, L, (B, 16))
        found.append(Contender("states (B, 16)", partial(layer.states, u, positions), parameters))
    return found


def main(
    budget: PositiveFloat = 600.0,
    seconds: NonNegativeFloat = 1.0,
    threads: PositiveInt = 2,
    part: PositiveInt = 1,
    out: Path | None = None,
    replace: bool = False,
) -> None:
    """Measure resets, lengths, states after chosen inputs, and irregular steps on a CPU.

    Args:
        budget: seconds after which no further measurement starts.
        seconds: spent on one contender of one cell, between 3 and 50 runs.
        threads: of torch.
        part: what lengths and widths are divided by, to try the script.
        out: file of results; without it ~/.cache/s4/benchmarks/sequences-cpu.json.
        replace: write over a committed result.
    """
    device, file = torch.device("cpu"), result_file("sequences", "cpu", out, replace)
    torch.set_num_threads(threads)
    shapes = {"resets": (4, 4096, 128, 64), "states": (4, 4096, 128, 64), "rates": (8, 1024, 64, 32)}
    shapes = {what: (B, L // part, -(-H // part), N) for what, (B, L, H, N) in shapes.items()}
    sizes = [
        (what, variant, mode, backward)
        for what in shapes
        for variant in ("dplr", "diag")
        for mode in (("fft", "scan") if what == "resets" else ("scan",))
        for backward in (False, True)
    ]
    clock, exact = Budget(budget), errors(max(150 // part, 2))
    with Report(file, device, clock, total=len(sizes), threads=threads, errors=exact) as report:
        for what, variant, mode, backward in sizes:
            if not report.begin(f"{what}, {variant}, {mode}"):
                break
            B, L, H, N = shapes[what]
            torch.manual_seed(0)
            here = contenders(what, S4Layer(H, N, variant=variant, mode=mode), torch.randn(B, L, H))
            measured, failed = measure(here, backward, seconds, clock)
            size = {"B": B, "L": L, "d_model": H, "d_state": N}
            report.add(
                (
                    Cell(
                        **asdict(m), who=who, what=what, variant=variant, mode=mode, backward=backward, **size
                    )
                    for who, m in measured.items()
                ),
                {f"{who}: {what}, {variant}, {mode}": message for who, message in failed.items()},
                len(here),
            )
        show(
            ("feature", "dtype", "outputs and states", "gradients"),
            ((e["feature"], e["dtype"], f"{e['value']:.1e}", f"{e['gradient']:.1e}") for e in exact),
            "largest error over the largest value",
        )
        plain = {(c.what, c.variant, c.mode, c.backward): c for c in report.cells if c.who == "plain"}
        rows = []
        for c in report.cells:
            beside = plain[c.what, c.variant, c.mode, c.backward]
            ratio, low, high = (ms / beside.ms for ms in (c.ms, c.ms_low, c.ms_high))
            ms = (f"{c.ms:.1f}", f"{ratio:.2f} ({low:.2f} - {high:.2f})", f"{c.mib:.0f}")
            passes = "with backward" if c.backward else "forward"
            rows.append((f"{c.what}, {c.variant}", c.mode, passes, c.who, *ms))
        show(("what", "mode", "passes", "who", "ms", "over plain", "MiB"), rows)
    report.finish()


if __name__ == "__main__":
    run(main)
