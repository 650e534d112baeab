"""How fast does a model generate after a long context, and what does it have to hold for that?

    pip install -e ".[test]"
    python benchmarks/generation.py [--budget SECONDS] [--device cuda] [--out FILE.json]

Three language models of one width, depth and parameter count, that differ in what carries the past:

- Transformer: causal attention over cached keys and values, the cache allocated once, sinusoidal positions.
- LSTM: the same blocks with an LSTM cell in the place of attention.
- S4: an `S4Model`, its blocks mixing channels by the same kind of two-layer perceptron.

The hidden widths of the perceptrons are what makes the parameter counts agree. Measured is one greedy token
for each sequence of a batch, from token to token, at the end of a context. The context itself is not
computed: cache and states hold random numbers, on whose values the time does not depend. On a GPU every
contender replays a CUDA graph; that of S4 holds the discretisation of its parameters, which a step without a
graph does once. Prints a table; writes JSON, and plots against context beside it.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch
from contenders.language_models import LSTM, Sizes, Transformer, matched, n_parameters, s4_model
from contenders.layers import HEAD_DIM
from harness import Budget, Peak, Report, first_line, lost, result_file, run, show, synchronize, usable
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from s4 import State

MIN_ROUNDS, MAX_ROUNDS = 5, 200
TURN = 0.05  # seconds of a turn at least: the next one finds the caches full of other contenders' numbers


@dataclass
class Cell:
    """One measurement: tokens a second of the whole batch (median and quartiles over turns) and memory.

    held_mib is what stays from token to token, peak_mib the most that was taken beside the parameters.
    """

    who: str
    parameters: int
    batch: int
    context: int
    tokens_per_second: float
    low: float
    high: float
    held_mib: float
    peak_mib: float


class Decoding:
    """Generation under way: `step` turns tokens and what is held from token to token into the next."""

    def __init__(
        self,
        advance: Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]],
        token: Tensor,
        held: Sequence[Tensor],
        compiled: bool,
    ) -> None:
        def newest(token: Tensor, held: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
            logits, after = advance(token, held)
            return logits.argmax(-1), after

        self.advance = torch.compile(newest, dynamic=False) if compiled else newest
        self.token, self.held = token, held
        self.step: Callable[[], None] = self._step
        if token.is_cuda:
            self.step = self._captured().replay

    def _step(self) -> None:
        self.token, self.held = self.advance(self.token, self.held)

    def _captured(self) -> torch.cuda.CUDAGraph:
        token, held = self.token, self.held
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            newest, after = self.advance(token, held)
            token.copy_(newest)
            for old, new in zip(held, after, strict=True):
                if new is not old:  # a cache is written in place
                    old.copy_(new)
        self.token, self.held = token, held
        return graph


def decoding(
    model: nn.Module, sizes: Sizes, batch: int, context: int, device: torch.device, compiled: bool = False
) -> Decoding:
    """At the last position of a context: the past is random numbers, the token is computed in full."""
    token = torch.randint(sizes.vocabulary, (batch,), device=device)

    def noise(*shape: int) -> Tensor:
        return torch.empty(shape, device=device).uniform_(-1, 1)

    if isinstance(model, Transformer):
        heads = sizes.d_model // HEAD_DIM
        cache = noise(sizes.n_layers, 2, batch, heads, context, HEAD_DIM)
        return Decoding(lambda u, held: (model.step(u, held[0], context - 1), held), token, [cache], compiled)
    if isinstance(model, LSTM):
        held = [noise(batch, sizes.d_model) for _ in range(2 * sizes.n_layers)]
        return Decoding(model.step, token, held, compiled)
    state = model.initial_state(batch)
    layers = [noise(*x.shape) for x in state.layers]

    def advance(u: Tensor, held: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        y, after = model.step(u, State(tuple(held[:-2]), held[-2], held[-1]))
        return y, [*after.layers, after.total, after.length]

    return Decoding(advance, token, [*layers, state.total, state.length + context], compiled)


def turn(run: Decoding, steps: int, device: torch.device) -> float:
    """Seconds a step."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        run.step()
    synchronize(device)
    return (time.perf_counter() - start) / steps


def measure(
    models: dict[str, nn.Module],
    sizes: Sizes,
    batch: int,
    context: int,
    device: torch.device,
    seconds: float,
    budget: Budget,
    compiled: bool,
) -> tuple[list[Cell], dict[str, str]]:
    """All contenders at one size, taking turns, so that what else the machine does meets all of them.

    Also the messages of those that failed.
    """
    runs, peaks, steps, failed = {}, {}, {}, {}
    if compiled:
        torch.compiler.reset()  # the graphs of other sizes
    for who, model in models.items():
        gc.collect()
        peak = Peak(device)
        try:
            began = time.monotonic()
            run = decoding(model, sizes, batch, context, device, compiled)
            if compiled:
                run.step()
                budget.spare(time.monotonic() - began, 0.0)
            first = turn(run, 2, device)
        except Exception as error:  # out of memory, a kernel that fails, a graph that cannot be captured
            failed[f"{who}: batch {batch}, context {context}"] = first_line(error)
            if lost(device):
                budget.end()
            continue
        runs[who], peaks[who] = run, peak.above_start()
        steps[who] = max(1, math.ceil(TURN / first))
    times: dict[str, list[float]] = {who: [] for who in runs}
    spent = dict.fromkeys(runs, 0.0)
    for done in range(MAX_ROUNDS):
        for who, run in runs.items():
            if (done < MIN_ROUNDS or spent[who] < seconds) and not budget.over():
                times[who].append(turn(run, steps[who], device))
                spent[who] += times[who][-1] * steps[who]
    cells = []
    for who, values in times.items():
        if len(values) >= MIN_ROUNDS:
            low, median, high = statistics.quantiles(values, n=4)
            held = sum(x.nbytes for x in runs[who].held) / 2**20
            parameters = n_parameters(models[who])
            speeds = batch / median, batch / high, batch / low
            cells.append(Cell(who, parameters, batch, context, *speeds, held, peaks[who]))
    return cells, failed


def ratio(cells: list[Cell], cell: Cell) -> float | None:
    """Times the Transformer's tokens a second, at the same batch and context."""
    base = [c for c in cells if (c.who, c.batch, c.context) == ("Transformer", cell.batch, cell.context)]
    return cell.tokens_per_second / base[0].tokens_per_second if base else None


def table(cells: list[Cell]) -> None:
    """One line a measurement; the ratio is to the Transformer's tokens a second."""
    rows = []
    for c in cells:
        times = ratio(cells, c)
        rows.append(
            (
                c.batch, c.context, c.who, f"{c.parameters:,}", f"{c.tokens_per_second:.0f}",
                f"{c.low:.0f} - {c.high:.0f}", f"{c.held_mib:.2f}", f"{c.peak_mib:.0f}",
                f"{times:.1f}" if times else "",
            )
        )  # fmt: skip
    columns = (
        "batch",
        "context",
        "who",
        "parameters",
        "tokens/s",
        "quartiles",
        "held MiB",
        "peak MiB",
        "ratio",
    )
    show(columns, rows)


def plot(cells: list[Cell], file: Path) -> None:
    """Tokens a second and what is held against the context, log-log, one line a contender."""
    batches = sorted({c.batch for c in cells})
    figure, axes = plt.subplots(
        2, len(batches), figsize=(5 * len(batches), 7), layout="constrained", squeeze=False, sharex=True
    )
    for column, batch in enumerate(batches):
        for who in dict.fromkeys(c.who for c in cells):
            points = [c for c in cells if (c.who, c.batch) == (who, batch)]
            contexts = [c.context for c in points]
            speed, memory = axes[:, column]
            speed.loglog(contexts, [c.tokens_per_second for c in points], marker="o", label=who)
            speed.fill_between(contexts, [c.low for c in points], [c.high for c in points], alpha=0.2)
            memory.loglog(contexts, [c.held_mib for c in points], marker="o", label=who)
        speed.set(title=f"batch {batch}", ylabel="tokens a second")
        memory.set(xlabel="context", ylabel="MiB held from token to token")
        speed.legend(frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(
    budget: PositiveFloat = 900.0,
    seconds: NonNegativeFloat = 2.0,
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu",
    contexts: list[PositiveInt] = [256, 1024, 4096, 16384, 65536],  # noqa: B006  # read only; a tuple has no command-line form
    batches: list[PositiveInt] = [1, 16],  # noqa: B006
    d_model: PositiveInt = 256,
    n_layers: PositiveInt = 4,
    d_state: PositiveInt = 64,
    variant: Literal["dplr", "diag"] = "dplr",
    vocabulary: PositiveInt = 256,
    expand: PositiveInt = 4,
    cache_gib: PositiveFloat = 4.0,
    compile: bool = False,
    out: Path | None = None,
    replace: bool = False,
    plots: bool = True,
) -> None:
    """Time generation by S4, a Transformer and an LSTM.

    Args:
        budget: seconds after which no further measurement starts, compiling left out.
        seconds: spent on one contender at one size, between 5 and 200 turns.
        device: cpu or cuda.
        contexts: numbers of positions, of which the last is the token computed.
        batches: numbers of sequences.
        d_model: width of all models, a multiple of 64.
        n_layers: depth of all models.
        d_state: state size N of the S4 layers, even.
        variant: of the S4 layers, dplr or diag.
        vocabulary: number of tokens.
        expand: hidden width of the Transformer's perceptrons over its width.
        cache_gib: the Transformer sits out where its cache would be larger.
        compile: all contenders by torch.compile, each size by itself; peak memory is then the compiler's.
        out: file of results; without it ~/.cache/s4/benchmarks/generation-DEVICE.json.
        replace: write over a committed result.
        plots: also draw speed and memory, into a PNG beside the file of results.
    """
    where, file = usable(device), result_file("generation", device, out, replace)
    if d_model % HEAD_DIM:
        raise SystemExit(f"--d_model must be a multiple of {HEAD_DIM}, the width of a head, got {d_model}")
    if d_state % 2:
        raise SystemExit(f"--d_state: a state size must be even, got {d_state}")
    torch.manual_seed(0)
    sizes = Sizes(d_model, n_layers, d_state, variant, vocabulary, expand, max(contexts))
    transformer = Transformer(sizes, expand * d_model)
    target = n_parameters(transformer)
    models: dict[str, nn.Module] = {
        "Transformer": transformer,
        "LSTM": matched(LSTM, sizes, target),
        "S4": matched(s4_model, sizes, target),
    }
    with torch.no_grad():
        clock = Budget(budget)
        total, about = len(batches) * len(contexts), {"sizes": asdict(sizes), "compiled": compile}
        with Report(file, where, clock, total, **about) as report:
            for who, model in list(models.items()):
                try:  # what is set up once is in no measurement
                    decoding(model.eval().to(where), sizes, 1, 1, where).step()
                except Exception as error:
                    report.failures[f"{who}: its first step"] = first_line(error)
                    del models[who]
            clock.begin()
            for batch, context in ((batch, context) for batch in batches for context in contexts):
                if not report.begin(f"batch {batch}, context {context}"):
                    break
                cache = 8 * n_layers * batch * context * d_model / 2**30
                found = {w: m for w, m in models.items() if w != "Transformer" or cache <= cache_gib}
                report.add(*measure(found, sizes, batch, context, where, seconds, clock, compile), len(found))
            if cells := report.cells:
                table(cells)
                report.write([asdict(c) | {"times_transformer": ratio(cells, c)} for c in cells])
                if plots:
                    plot(cells, file.with_suffix(".png"))
    report.finish()


if __name__ == "__main__":
    run(main)
