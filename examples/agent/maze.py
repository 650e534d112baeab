"""Mazes of memory, many at once: a cue, a long corridor of noise, a turn to the side that the cue said."""

from typing import NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    """What there is in all rows after a step.

    Shapes: observation (B, sides + 1); starts (B,), whether it is the first of an episode, before which an
    agent forgets; reward (B,), of the action before.
    """

    observation: Tensor
    starts: Tensor
    reward: Tensor


class Maze:
    """B mazes side by side, which start and end at times of their own.

    An episode shows in its first steps the side to turn to, a one in one of `sides` channels, then a
    corridor. A last channel is one at its end, where an action, one of the sides, has the reward 1 if it is
    the right one; all other rewards are 0. Noise is in all channels but the last. After the turn, whatever it
    was, the next episode of the row begins; no other row waits for it.

    Args:
        rows: B.
        shortest, longest: steps from the end of the cue to the turn, drawn anew for each episode.
        sides: how many there are.
        shown: steps that the cue is shown for.
        noise: standard deviation.
        seed: of cues, lengths and noise.
    """

    def __init__(
        self,
        rows: int,
        shortest: int,
        longest: int,
        *,
        sides: int = 2,
        shown: int = 10,
        noise: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.rows, self.sides, self.shown, self.noise = rows, sides, shown, noise
        self.lengths = shown + shortest, shown + longest
        self.generator = torch.Generator().manual_seed(seed)
        self.clock = torch.zeros(rows, dtype=torch.long)
        self.side, self.turn = self._drawn()

    def look(self) -> Seen:
        """What there is before the first action."""
        return Seen(self._observation(), self.clock == 0, torch.zeros(self.rows))

    def step(self, actions: Tensor) -> Seen:
        """What follows one action (B,) a row."""
        ends = self.clock == self.turn
        reward = (ends & (actions == self.side)).float()
        side, turn = self._drawn()
        self.side, self.turn = torch.where(ends, side, self.side), torch.where(ends, turn, self.turn)
        self.clock = torch.where(ends, 0, self.clock + 1)
        return Seen(self._observation(), ends, reward)

    def _observation(self) -> Tensor:
        cue = torch.nn.functional.one_hot(self.side, self.sides) * (self.clock < self.shown)[:, None]
        noise = self.noise * torch.randn(self.rows, self.sides, generator=self.generator)
        return torch.cat([cue + noise, (self.clock == self.turn)[:, None]], 1)

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """For all rows, of which those that start take it: a side, and the step to turn at."""
        shortest, longest = self.lengths
        side = torch.randint(self.sides, (self.rows,), generator=self.generator)
        return side, torch.randint(shortest, longest + 1, (self.rows,), generator=self.generator)
