"""Gated recurrent units (Cho et al. 2014), written out in torch's convention."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GruCell(nn.Module):
    """One step.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr); z likewise; n = tanh(W_in x + b_in + r (W_hn h + b_hn)); h' = (1 - z) n
    + z h. `input` and `hidden` hold the matrices of r, z and n in this order. Cho et al. let r act on h before the
    product; here it acts behind the product and its bias, as everywhere in torch, so that W_h h is one product.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, 3 * width)
        self.hidden = nn.Linear(width, 3 * width)
        for weight in self.parameters():
            nn.init.uniform_(weight, -(width**-0.5), width**-0.5)

    def forward(self, projected: Tensor, state: Tensor) -> Tensor:
        """`[B, 3 width]`, made by `input` for many steps at once, and the state `[B, width]` → the new state."""
        width = state.shape[-1]
        recurrent = self.hidden(state)  # [B, 3 width]
        gates = torch.sigmoid(projected[:, : 2 * width] + recurrent[:, : 2 * width])
        reset, keep = gates[:, :width], gates[:, width:]
        new = torch.tanh(projected[:, 2 * width :] + reset * recurrent[:, 2 * width :])
        return new + keep * (state - new)


class Gru(nn.Module):
    """The cell along a sequence. Where nothing is present the state stays as it is: masks instead of packing."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.cell = GruCell(inputs, width)
        self.width = width

    def forward(self, x: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, inputs]`, present `[B, T]` → the states `[B, T, width]`, begun at zero, and the last `[B, width]`."""
        projected = self.cell.input(x)  # [B, T, 3 width]
        state, states = x.new_zeros(len(x), self.width), []
        for step in range(x.shape[1]):
            state = torch.where(present[:, step, None], self.cell(projected[:, step], state), state)
            states.append(state)
        return torch.stack(states, dim=1), state
