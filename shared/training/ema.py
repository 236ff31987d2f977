"""Exponential moving average of the weights (Polyak averaging): smoother than the last step, for one copy."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """Keeps `average <- decay * average + (1 - decay) * weights`; buffers (BN statistics) are copied.

    The decay is warmed up, `min(decay, (1 + n) / (10 + n))` after n updates, so that the initial weights fade quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the model's weights of this step into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight.detach(), 1 - decay)
        for kept, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
