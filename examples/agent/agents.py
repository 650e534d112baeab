"""Two agents with the same calls, of S4 and of a GRU: at each step logits of the actions, and a value."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model


class S4Agent(S4Model):
    """Observations (B, L, d_input) to (B, L, actions + 1): two blocks of S4.

    Its dt is so small at first that a state remembers the last 100 to 1,000 inputs.
    """

    def __init__(self, d_input: int, actions: int) -> None:
        d_model = 32
        blocks = [S4Block(S4Layer(d_model, 8, dt_min=1e-3, dt_max=1e-2), prenorm=False) for _ in range(2)]
        super().__init__(nn.Linear(d_input, d_model), blocks, nn.Linear(d_model, actions + 1))


class GRUState(NamedTuple):
    """The state of a GRU, (B, d_model), with the methods of a state that `learn.py` calls."""

    hidden: Tensor

    def reset(self, rows: Tensor) -> "GRUState":
        """The same with zeros in the rows that are True in (B,)."""
        return GRUState(self.hidden.masked_fill(rows[:, None], 0))

    def detach(self) -> "GRUState":
        """The same without its history."""
        return GRUState(self.hidden.detach())


class GRUAgent(nn.Module):
    """The same around a GRU, with about as many parameters."""

    def __init__(self, d_input: int, actions: int) -> None:
        super().__init__()
        d_model = 28
        self.encoder, self.cell = nn.Linear(d_input, d_model), nn.GRUCell(d_model, d_model)
        self.decoder = nn.Linear(d_model, actions + 1)

    def initial_state(self, batch_size: int) -> GRUState:
        """The state before any input."""
        return GRUState(self.cell.weight_hh.new_zeros(batch_size, self.cell.hidden_size))

    def step(self, u: Tensor, state: GRUState) -> tuple[Tensor, GRUState]:
        """(B, d_input) to (B, actions + 1), one step."""
        hidden = self.cell(self.encoder(u), state.hidden)
        return self.decoder(hidden), GRUState(hidden)

    def forward(
        self, u: Tensor, state: GRUState, *, resets: Tensor, return_state: bool = True
    ) -> tuple[Tensor, GRUState]:
        """(B, L, d_input) to (B, L, actions + 1); the state is zero before the input at a True of (B, L)."""
        outputs = []
        for t in range(u.shape[1]):
            y, state = self.step(u[:, t], state.reset(resets[:, t]))
            outputs.append(y)
        return torch.stack(outputs, 1), state
