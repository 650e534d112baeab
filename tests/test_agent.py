"""The example of agents in mazes: the mazes by their rules, chunks with resets as steps, what is said."""

import json
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from s4 import State

pytest.importorskip("jsonargparse")
FOLDER = Path(__file__).parents[1] / "examples" / "agent"
sys.path.insert(0, str(FOLDER))  # as the script is started

from agents import GRUAgent, S4Agent  # noqa: E402
from maze import Maze  # noqa: E402


def played(rows: int, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Observations, starts, actions and rewards (B, L, ...) of short mazes, with actions at random."""
    maze = Maze(rows, 2, 9, shown=3, noise=0.1, seed=7)
    seen, found = maze.look(), []
    for _ in range(steps):
        actions = torch.randint(2, (rows,))
        after = maze.step(actions)
        found.append((seen.observation, seen.starts, actions, after.reward))
        seen = after
    observations, starts, actions, rewards = (torch.stack(part, 1) for part in zip(*found, strict=True))
    return observations, starts, actions, rewards


def test_mazes_by_their_rules() -> None:
    """From what an agent sees alone: each row for itself, episode after episode."""
    rows, steps = 5, 400
    observations, starts, actions, rewards = played(rows, steps)
    lengths, ends_at = set(), []
    for row in range(rows):
        first = starts[row].nonzero()[:, 0].tolist()
        assert first[0] == 0
        ends_at.append(first)
        for start, stop in pairwise(first):
            cue = observations[row, start : start + 3, :2]
            side = int(cue.sum(0).argmax())
            assert ((cue - torch.eye(2)[side]).abs() < 0.6).all()
            corridor = observations[row, start + 3 : stop, :2]
            assert (corridor.abs() < 0.6).all()
            assert observations[row, start:stop, 2].tolist() == [0.0] * (stop - start - 1) + [1.0]
            assert not rewards[row, start : stop - 1].any()
            assert rewards[row, stop - 1] == (actions[row, stop - 1] == side)
            lengths.add(stop - start - 1)
    assert lengths == set(range(3 + 2, 3 + 9 + 1))
    assert all(a != b for i, a in enumerate(ends_at) for b in ends_at[:i])


@pytest.mark.parametrize("kind", [S4Agent, GRUAgent])
def test_chunks_with_resets_are_steps(kind: type[S4Agent] | type[GRUAgent]) -> None:
    """Outputs and gradients, over episodes that end anywhere, the state handed from chunk to chunk."""
    observations, starts, _, _ = played(6, 70)
    observations = observations.double()
    agent = kind(3, 2).double()
    state = agent.initial_state(6)
    stepped, at = [], state
    for t in range(70):
        y, at = agent.step(observations[:, t], at.reset(starts[:, t]))
        stepped.append(y)
    want = torch.stack(stepped, 1)
    got, last = [], state
    for chunk, resets in zip(observations.split(32, 1), starts.split(32, 1), strict=True):
        y, last = agent(chunk, last, resets=resets, return_state=True)
        got.append(y)
    assert want.abs().max() > 0.1
    assert (torch.cat(got, 1) - want).abs().max() < 1e-10
    weights = torch.randn_like(want)
    of_steps = torch.autograd.grad((want * weights).sum(), [*agent.parameters()])
    of_chunks = torch.autograd.grad((torch.cat(got, 1) * weights).sum(), [*agent.parameters()])
    for one, other in zip(of_steps, of_chunks, strict=True):
        assert (one - other).abs().max() <= 1e-9 * (1 + one.abs().max())


def test_acting_and_learning_give_the_same_numbers() -> None:
    """In float32, as the example runs; what an agent did is what the chunk says of it."""
    learn = runpy.run_path(str(FOLDER / "learn.py"))
    agent, maze = S4Agent(3, 2), Maze(8, 5, 60, seed=1)
    state: State = agent.initial_state(8)
    seen = maze.look()
    for _ in range(3):
        chunk, seen, after = learn["act"](agent, maze, seen, state, 64)
        outputs, also = agent.train()(chunk.observations, state, resets=chunk.starts, return_state=True)
        assert chunk.starts[:, 1:].any()
        assert torch.equal(chunk.starts[:, 1:], chunk.ends[:, :-1])
        assert (outputs - chunk.outputs).abs().max() < 1e-5
        for a, b in zip(after.layers, also.layers, strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
        state = after


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rows", "8", "--chunks", "2", "--length", "16", "--seeds", "1", "--longest", "4"]
    monkeypatch.setattr(
        sys, "argv", ["learn.py", "--out", str(tmp_path / "out"), "--shortest", "1", *options]
    )
    runpy.run_path(str(FOLDER / "learn.py"), run_name="__main__")
    assert "right turns after 1 to 4 steps" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["agents"]) == {"S4", "GRU"}
    assert len(results["curves"]["S4"][0]) == 2
    assert (tmp_path / "out" / "learning.png").stat().st_size > 1000


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    learn = runpy.run_path(str(FOLDER / "learn.py"))
    with pytest.raises(SystemExit, match="--longest: must be at least --shortest=5, got 4"):
        learn["main"](shortest=5, longest=4)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"--out: cannot make the folder .*file"):
        learn["main"](tmp_path / "file")
