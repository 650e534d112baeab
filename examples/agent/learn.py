"""Two agents learn to remember: python examples/agent/learn.py [--options]."""

import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from agents import GRUAgent, GRUState, S4Agent
from jsonargparse import auto_cli
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from maze import Maze, Seen
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.distributions import Categorical

from s4 import State, param_groups

AGENTS = {"S4": S4Agent, "GRU": GRUAgent}
SAME = 1e-5  # how far outputs of steps and of chunks may be apart, as a part of the largest


class Chunk(NamedTuple):
    """What happened in L steps of B mazes.

    Shapes: observations (B, L, d_input); starts (B, L), the resets of these; actions, rewards and ends
    (B, L); outputs (B, L, actions + 1) of the agent as it acted.
    """

    observations: Tensor
    starts: Tensor
    actions: Tensor
    rewards: Tensor
    ends: Tensor
    outputs: Tensor


@torch.no_grad()
def act(
    agent: S4Agent | GRUAgent,
    maze: Maze,
    seen: Seen,
    state: State | GRUState,
    steps: int,
    greedy: bool = False,
) -> tuple[Chunk, Seen, State | GRUState]:
    """Act step by step, by drawn actions or, if greedy, the likeliest: what happened, and where to go on."""
    agent.eval()  # where a step keeps what the parameters come to
    found = []
    for _ in range(steps):
        y, state = agent.step(seen.observation, state.reset(seen.starts))
        actions = y[:, :-1].argmax(-1) if greedy else Categorical(logits=y[:, :-1]).sample()
        after = maze.step(actions)
        found.append((seen.observation, seen.starts, actions, after.reward, after.starts, y))
        seen = after
    return Chunk(*(torch.stack(parts, 1) for parts in zip(*found, strict=True))), seen, state


def loss_of(outputs: Tensor, chunk: Chunk, entropy: float) -> Tensor:
    """REINFORCE with the value as baseline. Only turns count: no other action has or changes a reward."""
    y, rewards, actions = outputs[chunk.ends], chunk.rewards[chunk.ends], chunk.actions[chunk.ends]
    policy, value = Categorical(logits=y[:, :-1]), y[:, -1]
    gain = (rewards - value).detach() * policy.log_prob(actions)
    return (0.5 * (rewards - value).square() - gain - entropy * policy.entropy()).mean()


def learn(
    agent: S4Agent | GRUAgent,
    maze: Maze,
    chunks: int,
    length: int,
    lr: float,
    entropy: float,
    progress: Progress,
) -> tuple[list[float | None], int, float]:
    """Act for a chunk, then learn from it in one `forward` with resets that starts at the state before it.

    Returns:
        of each chunk the share of right turns, None if it had none; the number of turns; and how far outputs
        of steps and of the chunk were from each other at most, as a part of the largest.
    """
    optimizer = torch.optim.AdamW(param_groups(agent, lr=lr, ssm_lr=lr / 4, weight_decay=0.01))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 50) * (1 - i / chunks))
    state, seen = agent.initial_state(maze.rows), maze.look()
    shares: list[float | None] = []
    turns, apart = 0, 0.0
    for _ in progress.track(range(chunks), description=type(agent).__name__):
        before = state.detach()
        chunk, seen, state = act(agent, maze, seen, before, length)
        agent.train()
        outputs, _ = agent(chunk.observations, before, resets=chunk.starts, return_state=True)
        apart = max(apart, float((outputs.detach() - chunk.outputs).abs().max() / chunk.outputs.abs().max()))
        if number := int(chunk.ends.sum()):
            loss_of(outputs, chunk, entropy).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        shares.append(float(chunk.rewards.sum()) / number if number else None)
        turns += number
    return shares, turns, apart


def plot(curves: dict[str, list[list[float | None]]], sides: int, file: Path) -> None:
    """Right turns against chunks, a line each run, its mean over 10 chunks."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, runs), color in zip(curves.items(), ("tab:blue", "tab:orange"), strict=False):
        for number, run in enumerate(runs):
            known = np.array([np.nan if share is None else share for share in run])
            windows = [known[max(0, end - 10) : end] for end in range(1, len(known) + 1)]
            means = [
                window[~np.isnan(window)].mean() if len(window[~np.isnan(window)]) else np.nan
                for window in windows
            ]
            axis.plot(means, color=color, alpha=0.8, label=name if number == 0 else None)
    axis.axhline(1 / sides, color="grey", linestyle=":", label="chance")
    axis.set(xlabel="chunks", ylabel="right turns", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(
    out: Path = Path("runs/agent"),
    shortest: NonNegativeInt = 100,
    longest: NonNegativeInt = 400,
    chunks: PositiveInt = 300,
    length: PositiveInt = 64,
    rows: PositiveInt = 128,
    seeds: PositiveInt = 3,
    lr: PositiveFloat = 0.01,
    entropy: NonNegativeFloat = 0.01,
) -> None:
    """Train an agent of S4 and one of a GRU to turn where a cue said that is long gone, by rewards alone.

    Both act step by step and learn from chunks shorter than an episode, so that no gradient reaches the cue.

    Args:
        out: folder for results.json and learning.png.
        shortest: steps of a corridor at least.
        longest: and at most.
        chunks: to learn from.
        length: steps of a chunk.
        rows: mazes side by side.
        seeds: runs of each agent.
        lr: learning rate.
        entropy: weight of the entropy of the actions.
    """
    if longest < shortest:
        raise SystemExit(f"--longest: must be at least --shortest={shortest}, got {longest}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out: cannot make the folder {out}: {error.strerror}") from error
    curves: dict[str, list[list[float | None]]] = {name: [] for name in AGENTS}
    results: dict[str, dict[str, list[float]]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name, kind in AGENTS.items():
            rows_of = results[name] = {"right": [], "turns": [], "apart": [], "seconds": [], "parameters": []}
            for seed in range(seeds):
                torch.manual_seed(seed)
                maze, began = Maze(rows, shortest, longest, seed=seed), time.perf_counter()
                agent = kind(maze.sides + 1, maze.sides)
                shares, turns, apart = learn(agent, maze, chunks, length, lr, entropy, progress)
                curves[name].append(shares)
                fresh = Maze(rows, shortest, longest, seed=10**6 + seed)
                start = fresh.look(), agent.initial_state(rows)
                last, _, _ = act(agent, fresh, *start, steps=5 * (fresh.lengths[1] + 1), greedy=True)
                values = (
                    float(last.rewards.sum() / last.ends.sum()),
                    turns,
                    apart,
                    round(time.perf_counter() - began, 1),
                    sum(p.numel() for p in agent.parameters()),
                )
                for column, value in zip(rows_of.values(), values, strict=True):
                    column.append(value)
    settings = {"shortest": shortest, "longest": longest, "chunks": chunks, "length": length, "rows": rows}
    described = {"settings": {**settings, "lr": lr, "entropy": entropy}, "agents": results, "curves": curves}
    (out / "results.json").write_text(json.dumps(described, indent=1) + "\n")
    plot(curves, maze.sides, out / "learning.png")
    table = Table(title=f"right turns after {shortest} to {longest} steps, chance {1 / maze.sides:.0%}")
    for column in ("agent", "parameters", "right turns, by seed", "steps and chunks differ by"):
        table.add_column(column)
    for name, found in results.items():
        right = ", ".join(f"{share:.1%}" for share in found["right"])
        table.add_row(name, str(int(found["parameters"][0])), right, f"{max(found['apart']):.0e}")
    Console().print(table)
    Console().print(f"wrote {out}/results.json and learning.png", soft_wrap=True)
    if (worst := max(max(found["apart"]) for found in results.values())) > SAME:
        raise SystemExit(f"steps and chunks of an agent differ by {worst:.0e} of its largest output")


if __name__ == "__main__":
    auto_cli(main)
