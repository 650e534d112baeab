"""Two agents with the same calls: blocks of S4, and a GRU. Both give logits of the actions and a value."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from s4 import S4Block, S4Layer, S4Model


class S4Agent(S4Model):
    """Observations (B, L, d_input) to (B, L, actions + 1): two blocks of S4.

    Steps are so small at first that a state holds what was hundreds of inputs ago.
    """

    def __init__(self, d_input: int, actions: int, d_model: int, dt_min=1e-3, dt_max=1e-2, prenorm=False, N=8) -> None:
        blocks = [S4Block(S4Layer(d_model, N, dt_min=dt_min, dt_max=dt_max), prenorm=prenorm) for _ in range(2)]
        encoder, decoder = nn.Linear(d_input, d_model), nn.Linear(d_model, actions + 1)
        super().__init__(encoder, blocks, decoder,norm=nn.LayerNorm(d_model) if prenorm else None)


class GRUState(NamedTuple):
    """What a GRU carries on, (B, d_model), with what the loop needs of an `s4.State`."""

    hidden: Tensor

    def reset(self, rows: Tensor) -> "GRUState":
        """The rows (B,) that are True as before any input."""
        return GRUState(self.hidden.masked_fill(rows[:, None], 0))

    def detach(self) -> "GRUState":
        """The same without its history."""
        return GRUState(self.hidden.detach())


class GRUAgent(nn.Module):
    """The same calls around a GRU."""

    def __init__(self, d_input: int, actions: int, d_model: int) -> None:
        super().__init__()
        self.encoder, self.norm = nn.Linear(d_input, d_model), nn.LayerNorm(d_model)
        self.cell, self.decoder = nn.GRUCell(d_model, d_model), nn.Linear(d_model, actions + 1)

    def initial_state(self, batch_size: int) -> GRUState:
        """Zeros."""
        return GRUState(torch.zeros(batch_size, self.cell.hidden_size))

    def step(self, u: Tensor, state: GRUState) -> tuple[Tensor, GRUState]:
        """One observation (B, d_input) to (B, actions + 1)."""
        hidden = self.cell(self.encoder(u), state.hidden)
        return self.decoder(self.norm(hidden)), GRUState(hidden)

    def forward(
        self, u: Tensor, state: GRUState, *, resets: Tensor, return_state: bool = True
    ) -> tuple[Tensor, GRUState]:
        """Observations (B, L, d_input) to (B, L, actions + 1); the state is zero before those with a reset."""
        outputs = []
        for t in range(u.shape[1]):
            y, state = self.step(u[:, t], state.reset(resets[:, t]))
            outputs.append(y)
        return torch.stack(outputs, 1), state


AGENTS = {"s4": S4Agent, "gru": GRUAgent}
