"""How does a layer compare with those of other libraries: time, memory, and how exact is its float32?

    pip install -e ".[test]" s5-pytorch
    python benchmarks/peers.py [--budget SECONDS] [--device cuda] [--official DIR] [--out FILE.json]

What is installed takes part, at one width H, with N numbers of state a channel where a layer has the choice:

- S4, S4D: `S4Layer`, with mode="auto".
- official ...: with --official, the original repository's FFTConv for both variants, by its backends; its
  steps in the mode that it sets up by default.
- GRU, LSTM: `torch.nn`, whose state is as wide as the layer.
- S5: `s5.S5` of the package s5-pytorch, one state of H complex numbers for all channels.
- Mamba, Mamba2 of mamba-ssm, GLA and GatedDeltaNet of flash-linear-attention, on a GPU: with H * N numbers of
  state. Their projections and gates count.

What is measured, all of them in turns:

- forward, forward with backward (to the input and all parameters), and a step of the recurrence in
  evaluation, the mean of 16: milliseconds, and peak MiB above the start. Parameters are float32.
- errors, over the largest value, of 2 sequences of at most 4,096: outputs and gradients (the worst tensor)
  against the same module in float64; the kernel (the worst channel) against the dense system that the
  parameters stand for, in float64; and the first steps, at most 1,024, against forward.

Prints tables and writes JSON, where `absent` says who did not take part, and why.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from contenders.layers import Official
from contenders.libraries import Peer, peers, versions
from harness import (
    ROOT,
    Budget,
    Contender,
    Measured,
    Report,
    first_line,
    measure,
    result_file,
    run,
    show,
    usable,
)
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

sys.path.insert(0, str(ROOT / "tests"))

import oracle  # the float64 truth of the test suite, which shares no code with s4

Shape = tuple[PositiveInt, PositiveInt, PositiveInt]
SHAPES: dict[str, list[Shape]] = {
    "cpu": [(16, 128, 1024), (4, 128, 4096)],
    "cuda": [(16, 128, 1024), (4, 128, 4096), (50, 512, 1024)],
}
WORK = ("forward", "backward", "step")
STEPS = 16
LONGEST, STEPPED = 4096, 1024  # of errors: float64 takes twice the memory, a step a call


@dataclass
class Cell(Measured):
    """One measurement; `state` counts the real numbers that one sequence's state holds."""

    who: str
    what: str
    B: int
    H: int
    N: int
    L: int
    parameters: int
    state: int


def off(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value."""
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


def leaves(peer: Peer) -> list[Tensor]:
    """Its parameters that are trained."""
    return [p for p in peer.module.parameters() if p.requires_grad]


def gradients(peer: Peer, u: Tensor, back: Tensor) -> tuple[Tensor, ...]:
    """By input and parameters."""
    u = u.clone().requires_grad_()
    return torch.autograd.grad(peer(u), [u, *leaves(peer)], back)


def kernel_error(peer: Peer, truth: Tensor) -> float:
    """Largest |K - truth| of a channel over its largest |truth|, worst of all channels."""
    off_by = (peer.kernel(truth.shape[1]).cpu().double() - truth).abs().amax(1)
    return float((off_by / truth.abs().amax(1)).max())


def dense_kernel(peer: Peer, L: int) -> Tensor | None:
    """In float64 from the dense system, if it is one; the peer must not have been called before."""
    if (found := peer.system()) is None:
        return None
    parameters = {name: p.detach().cpu() for name, p in found[0].items()}
    return oracle.long_kernel(oracle.discrete(parameters, found[1]), L)[0]


def errors(peer: Peer, B: int, L: int) -> dict[str, float | str | None]:
    """Of float32. Where there is none, the reason, or None for the kernel of what has none."""
    p = next(peer.module.parameters())
    u = torch.randn(B, L, peer.width, device=p.device)
    back = torch.randn_like(u)
    found: dict[str, float | str | None] = dict.fromkeys(("output", "gradient"), peer.no_float64)
    truth = dense_kernel(peer, L)
    if not peer.no_float64:
        wide = peer.wide()
        outputs, slopes = wide(u.double()), gradients(wide, u.double(), back.double())
        found = {
            "output": off(peer(u), outputs),
            "gradient": max(map(off, gradients(peer, u, back), slopes)),
        }
    with torch.no_grad():
        y = peer(u)[:, :STEPPED]
        peer.module.eval()
        state, steps = peer.start(B), []
        for u_t in u[:, :STEPPED].unbind(1):
            y_t, state = peer.step(u_t, state)
            steps.append(y_t)
        found["kernel"] = None if truth is None else kernel_error(peer, truth)
        found["step"] = off(torch.stack(steps, 1), y)
    return found


def contenders(found: list[Peer], what: str, B: int, L: int, device: torch.device) -> Iterator[Contender]:
    """All of them at one size, for one kind of work."""
    for peer in found:
        peer.module.train(what != "step")
        u = torch.randn(B, L, peer.width, device=device, requires_grad=what == "backward")
        if what == "step":
            steps = partial(stepped, peer, u[:, 0].clone(), peer.start(B))
            yield Contender(peer.who, steps, leaves(peer))
        else:
            yield Contender(peer.who, partial(peer, u), [u, *leaves(peer)], torch.randn_like(u))


def stepped(peer: Peer, u: Tensor, state: Any) -> Tensor:
    """So many steps from one state."""
    y = u
    for _ in range(STEPS):
        y, state = peer.step(u, state)
    return y


def each(m: Measured, what: str) -> Measured:
    """Of one step, where several were timed."""
    times = STEPS if what == "step" else 1
    return Measured(m.ms / times, m.ms_low / times, m.ms_high / times, m.mib)


def tables(cells: list[Cell], exact: list[dict[str, Any]], absent: dict[str, str]) -> None:
    """A line a contender and size: times and memory, then errors, then who is not here."""
    rows = []
    for key in dict.fromkeys((c.B, c.H, c.N, c.L, c.who, c.parameters, c.state) for c in cells):
        by = {c.what: c for c in cells if (c.B, c.H, c.N, c.L, c.who, c.parameters, c.state) == key}
        ms = [f"{by[w].ms:.3f}" if w in by else "" for w in WORK]
        mib = [f"{by[w].mib:.0f}" if w in by else "" for w in WORK[:2]]
        rows.append((*key[:4], key[4], f"{key[5]:,}", f"{key[6]:,}", *ms, *mib))
    columns = ("B", "H", "N", "L", "who", "parameters", "state", "forward, ms", "with backward", "a step")
    show((*columns, "MiB", "with backward"), rows)
    what = ("output", "gradient", "kernel", "step")
    show(
        ("H", "L", "who", *what),
        ((e["H"], e["L"], e["who"], *(_written(e[w]) for w in what)) for e in exact),
        "largest error of float32 over the largest value",
    )
    show(("not here", "why"), absent.items())


def _written(error: float | str | None) -> str:
    return f"{error:.1e}" if isinstance(error, float) else error or ""


def main(
    budget: PositiveFloat = 1200.0,
    seconds: NonNegativeFloat = 1.0,
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu",
    shapes: list[Shape] = [],  # noqa: B006  # read only; a tuple has no command-line form
    d_state: PositiveInt = 64,
    threads: PositiveInt | None = None,
    official: Path | None = None,
    out: Path | None = None,
    replace: bool = False,
) -> None:
    """Time S4Layer beside the layers of other libraries, and measure the errors of all.

    Args:
        budget: seconds after which no further measurement of time starts.
        seconds: spent on one contender of one cell, between 3 and 50 runs.
        device: cpu or cuda.
        shapes: triples [[B,H,L]]; without them 16 of 1,024 and 4 of 4,096 positions, with H = 128.
        d_state: state size N of a channel, even.
        threads: of torch on a CPU.
        official: a checkout of the original S4 repository, whose layers then take part.
        out: file of results; without it ~/.cache/s4/benchmarks/peers-DEVICE.json.
        replace: write over a committed result.
    """
    where, file, chosen = usable(device), result_file("peers", device, out, replace), shapes or SHAPES[device]
    if d_state % 2:
        raise SystemExit(f"--d_state: a state size must be even, got {d_state}")
    theirs = Official(official, where) if official else None
    torch.set_num_threads(threads or torch.get_num_threads())
    (here, absent), exact, clock = versions(official), [], Budget(budget)
    with Report(file, where, clock, total=len(WORK) * len(chosen), versions=here, absent=absent) as report:
        for H, L in dict.fromkeys((H, min(L, LONGEST)) for _, H, L in chosen):
            torch.manual_seed(0)
            for peer in peers(theirs, absent, where, H, d_state, L):
                report.begin(f"errors, {peer.who}")
                try:
                    exact.append({"who": peer.who, "H": H, "N": d_state, "L": L, **errors(peer, 2, L)})
                except Exception as error:  # whatever a kernel or its compiler raises
                    report.failures[f"{peer.who}: errors, {H, L}"] = first_line(error)
            report.write(errors=exact, absent=absent)
        clock.begin()
        for B, H, L in chosen:
            found = peers(theirs, absent, where, H, d_state, L)
            sizes = {p.who: (sum(x.numel() for x in p.module.parameters()), p.numbers()) for p in found}
            for what in WORK:
                if not report.begin(f"B, H, L = {B, H, L}, {what}"):
                    break
                ready = list(contenders(found, what, B, L, where))
                measured, failed = measure(ready, what == "backward", seconds, clock)
                size = {"what": what, "B": B, "H": H, "N": d_state, "L": L}
                report.add(
                    (
                        Cell(
                            **asdict(each(m, what)),
                            who=who,
                            parameters=sizes[who][0],
                            state=sizes[who][1],
                            **size,
                        )
                        for who, m in measured.items()
                    ),
                    {f"{who}: {what}, {B, H, L}": message for who, message in failed.items()},
                    len(ready),
                )
                ready = []  # the next size needs their memory
        tables(report.cells, exact, absent)
    report.finish()


if __name__ == "__main__":
    run(main)
