"""What the state of a fresh S4 layer remembers, and its kernels: python examples/hippo.py [--options]."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from jsonargparse import auto_cli
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import track
from torch import Tensor

from s4 import S4Layer
from s4.hippo import basis, from_modes, reconstruct

DT = 1e-3  # of every layer here: a window of length 1 is 1,000 steps
MEASURES = {
    "legs": "LegS\nall of the past",
    "legt": "LegT\npolynomials on a window",
    "fout": "FouT\nFourier series on a window",
}
# variant and init: title
INITS = {
    ("dplr", "legs"): "S4, LegS",
    ("dplr", "legt"): "S4, LegT",
    ("dplr", "fout"): "S4, FouT",
    ("diag", "legs"): "S4D, LegS",
    ("diag", "lin"): "S4D, Lin",
    ("diag", "inv"): "S4D, Inv",
}
COLORS = ["tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple"]


def smooth_noise(length: int, seed: int) -> Tensor:
    """(length,) random waves of up to two periods in a time of 1, of unit variance, faded in from zero."""
    generator = torch.Generator().manual_seed(seed)
    t = (torch.arange(length, dtype=torch.float64) + 0.5) * DT
    frequency = torch.linspace(0.2, 2, 10, dtype=torch.float64)
    phase = torch.rand(10, generator=generator, dtype=torch.float64)
    waves = torch.sin(2 * math.pi * (frequency * t[:, None] + phase))
    return (1 - torch.exp(-((4 * t) ** 3))) * waves.sum(-1) / math.sqrt(5)


def fresh(variant: str, init: str, d_model: int, d_state: int) -> S4Layer:
    """A layer as it is before training, all of its channels with the same dt."""
    return S4Layer(
        d_model, d_state, variant=variant, init=init, dt_min=DT, dt_max=DT, dtype=torch.float64
    ).requires_grad_(False)


def recall(measure: str, d_state: int, signal: Tensor, moments: list[int]) -> Iterator[Tensor]:
    """What the state knows of the signal after each of these numbers of steps: values, the latest first."""
    layer = fresh("dplr", measure, 1, d_state)
    state = layer.initial_state(1)
    for start, end in pairwise([0, *moments]):
        _, state = layer(signal[None, start:end, None], state, return_state=True)
        steps = torch.arange(end if measure == "legs" else min(end, round(1 / DT)))
        yield reconstruct(measure, from_modes(measure, state)[0, 0], (steps + 0.5) * DT)


def draw_moment(axis: Axes, measure: str, signal: Tensor, now: int, recalled: dict[int, Tensor]) -> None:
    """The signal up to now and on, and what states of several sizes say of it."""
    t = (torch.arange(len(signal)) + 0.5) * DT
    axis.plot(t[:now], signal[:now], color="0.25", linewidth=1.2)
    axis.plot(t[now:], signal[now:], color="0.85", linewidth=1.2)
    for color, (d_state, values) in zip(COLORS, recalled.items(), strict=False):
        axis.plot(t[:now].flip(0)[: len(values)], values, color=color, linewidth=1.6, label=f"N = {d_state}")
    if measure == "legs":
        weight = torch.exp(t[:now] - now * DT)
        axis.imshow(
            weight[None].numpy(),
            extent=(0, now * DT, 0, 1),
            transform=axis.get_xaxis_transform(),
            cmap="Blues",
            vmin=0,
            vmax=4,
            aspect="auto",
            zorder=0,
        )
    else:
        axis.axvspan(max(now * DT - 1, 0), now * DT, color="tab:blue", alpha=0.1, linewidth=0)
    axis.axvline(now * DT, color="0.25", linewidth=0.8)
    axis.set(xlim=(0, len(signal) * DT), ylim=(-3.2, 3.2), yticks=(-2, 0, 2))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_memory(
    file: Path, signal: Tensor, moments: list[int], states: dict[str, dict[int, list[Tensor]]]
) -> None:
    """One row a measure, one column a moment."""
    figure, axes = plt.subplots(
        len(states), len(moments), figsize=(13, 6.5), sharex=True, sharey=True, layout="constrained"
    )
    for row, (measure, sizes) in zip(axes, states.items(), strict=True):
        row[0].set_ylabel(MEASURES[measure])
        for column, (axis, now) in enumerate(zip(row, moments, strict=True)):
            draw_moment(axis, measure, signal, now, {N: values[column] for N, values in sizes.items()})
    for axis, now in zip(axes[0], moments, strict=True):
        axis.set_title(f"at t = {now * DT:g}")
    for axis in axes[-1]:
        axis.set_xlabel("time t = steps x dt")
    axes[0, 0].legend(frameon=False, loc="upper right", fontsize=9)
    save(figure, file)


def draw_animation(
    file: Path, signal: Tensor, moments: list[int], states: dict[str, dict[int, list[Tensor]]]
) -> None:
    """The same as time goes on."""
    figure, axes = plt.subplots(len(states), figsize=(8, 6), sharex=True, layout="constrained")
    writer = PillowWriter(fps=20)
    with writer.saving(figure, file, dpi=80):
        for frame, now in enumerate(track(moments, "drawing frames", transient=True)):
            for axis, (measure, sizes) in zip(axes, states.items(), strict=True):
                axis.clear()
                draw_moment(axis, measure, signal, now, {N: values[frame] for N, values in sizes.items()})
                axis.set_title(MEASURES[measure].replace("\n", ": "), fontsize=10, loc="left")
            axes[0].legend(frameon=False, loc="upper right", fontsize=9)
            writer.grab_frame()
    plt.close(figure)


def state_kernels(layer: S4Layer, length: int) -> Tensor:
    """(length, N): what a unit impulse leaves in the state, HiPPO's coefficients where there are any."""
    A, B, _, _ = (x[0] for x in layer.dense())
    x = [B / DT]
    for _ in range(length - 1):
        x.append(A @ x[-1])
    states = torch.stack(x)
    if layer.init in MEASURES:
        return from_modes(layer.init, states)
    slowest = layer.A_imag[0].argsort()  # real parts of modes
    return states[:, : layer.d_state // 2][:, slowest]


def draw_kernels(file: Path, d_state: int, length: int) -> None:
    """For every initialisation: basis functions, and the kernels that a random C mixes from all N of them."""
    figure, axes = plt.subplots(2, len(INITS), figsize=(13, 4.6), sharex=True, layout="constrained")
    s = (torch.arange(length, dtype=torch.float64) + 0.5) * DT
    for (top, bottom), ((variant, init), title) in zip(axes.T, INITS.items(), strict=True):
        layer = fresh(variant, init, 3, d_state)
        functions, shown = state_kernels(layer, length), [0, 1, 2, 3]
        if init == "fout":
            shown = [0, 2, 3, 4]  # 1 is a sine of frequency 0
        width = 1.2
        if (variant, init) == ("diag", "legs"):
            shown, width = [0, 2], 0.3  # it oscillates about its limit, too fast for more lines
        for color, n in zip(COLORS, shown, strict=False):
            top.plot(s, functions[:, n], color=color, linewidth=width)
        if init in MEASURES:
            limit = s if init == "legs" else s[s <= 1]
            weight = torch.exp(-limit)[:, None] if init == "legs" else 1
            top.plot(limit, (weight * basis(init, d_state, limit))[:, shown], "k--", linewidth=0.7)
        kernels = layer.kernel(length) / DT
        for color, kernel in zip(COLORS, kernels, strict=False):
            bottom.plot(s, kernel, color=color, linewidth=width / 1.5)
        top.set(title=title, ylim=(-3.2, 3.2), yticks=(-2, 0, 2))
        reach = 1.3 * kernels[:, 30:].abs().max().item()  # the first steps of LegS are far higher
        bottom.set(xlabel="lag s = steps x dt", ylim=(-reach, reach))
    axes[0, 0].set_ylabel(f"basis functions, N = {d_state}")
    axes[1, 0].set_ylabel("kernels of three channels")
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Write and close it."""
    figure.savefig(file, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)


def error(measure: str, values: Tensor, past: Tensor) -> float:
    """Root mean square of what is missed of the past, the latest first, under the weight of the measure."""
    weight = (
        torch.exp(-(torch.arange(len(values)) + 0.5) * DT) if measure == "legs" else torch.ones(len(values))
    )
    return math.sqrt((weight * (values - past[: len(values)]) ** 2).sum() / weight.sum())


def main(
    out: Path = Path("runs/hippo"),
    d_state: list[int] = [16, 64],  # noqa: B006  # read only; the command line shows it
    duration: float = 4.0,
    seed: int = 4,
    animate: Path | None = None,
) -> None:
    """Show how the states of fresh S4 layers remember a signal, and what their kernels look like.

    Args:
        out: folder for memory.png and kernels.png.
        d_state: state sizes to compare; the kernels are those of the largest.
        duration: of the signal, in windows of 1/dt = 1,000 steps.
        seed: of the signal.
        animate: file of an animated GIF to draw as well.
    """
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    signal = smooth_noise(round(duration / DT), seed)
    moments = [len(signal) * part // 4 for part in (1, 2, 4)]
    states = {m: {N: list(recall(m, N, signal, moments)) for N in d_state} for m in MEASURES}
    draw_memory(out / "memory.png", signal, moments, states)
    draw_kernels(out / "kernels.png", max(d_state), length=2000)
    files = [out / "memory.png", out / "kernels.png"]
    if animate:
        animate.parent.mkdir(parents=True, exist_ok=True)
        frames = list(range(40, len(signal) + 1, 40))
        states_on_the_way = {m: {N: list(recall(m, N, signal, frames)) for N in d_state} for m in MEASURES}
        draw_animation(animate, signal, frames, states_on_the_way)
        files.append(animate)
    console = Console(soft_wrap=True)
    for measure, sizes in states.items():
        missed = (f"{error(measure, x[-1], signal.flip(0)):.1e} (N = {N})" for N, x in sizes.items())
        console.print(f"{measure}: root mean square error at the end", ", ".join(missed))
    console.print("written:", ", ".join(map(str, files)))


if __name__ == "__main__":
    auto_cli(main)
