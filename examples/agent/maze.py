"""A maze of memory, many at once: a cue, a long corridor of noise, and a question about the cue."""

from typing import NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    """What every row shows after a step.

    Shapes: observation (B, cues + 1); starts (B,), whether it is the first of an episode, before which an agent
    forgets; reward (B,), of the action before; ended (B,), whether that action was the last of its episode.
    """

    observation: Tensor
    starts: Tensor
    reward: Tensor
    ended: Tensor


class Maze:
    """B mazes side by side, each with episodes of its own.

    An episode shows one of the cues as a one-hot vector, then noise in the same channels, in the last step
    noise and a one in the channel behind, the question. The reward of that step is 1 if the action is the
    cue, all others are 0. The next episode of a row begins at once; no other row waits for it.

    Args:
        rows: B.
        cues: how many there are, and actions.
        shortest, longest: a corridor's length, drawn anew for each episode; it has two steps more.
        noise: standard deviation.
        seed: of cues, lengths and noise.
    """

    def __init__(
        self, rows: int, cues: int, shortest: int, longest: int, noise: float, seed: int = 0, shown: int = 1
    ) -> None:
        self.shown = shown
        self.rows, self.cues, self.shortest, self.longest, self.noise = rows, cues, shortest, longest, noise
        self.generator = torch.Generator().manual_seed(seed)
        self.cue, self.corridor = self._draw()
        self.clock = torch.zeros(rows, dtype=torch.long)

    def look(self) -> Seen:
        """What there is before the first action."""
        nothing = torch.zeros(self.rows)
        return Seen(self._observation(), self.clock == 0, nothing, nothing.bool())

    def step(self, actions: Tensor) -> Seen:
        """What follows one action (B,) a row."""
        ended = self.clock > self.corridor
        reward = (ended & (actions == self.cue)).float()
        cue, corridor = self._draw()
        self.cue = torch.where(ended, cue, self.cue)
        self.corridor = torch.where(ended, corridor, self.corridor)
        self.clock = torch.where(ended, 0, self.clock + 1)
        return Seen(self._observation(), ended, reward, ended)

    def _observation(self) -> Tensor:
        shown = torch.nn.functional.one_hot(self.cue, self.cues) * (self.clock < self.shown)[:, None]
        noise = self.noise * torch.randn(self.rows, self.cues, generator=self.generator)
        asked = (self.clock > self.corridor)[:, None]
        return torch.cat([shown + noise, asked], 1)

    def _draw(self) -> tuple[Tensor, Tensor]:
        cue = torch.randint(self.cues, (self.rows,), generator=self.generator)
        longest = self.longest + 1
        return cue, torch.randint(self.shortest, longest, (self.rows,), generator=self.generator)
