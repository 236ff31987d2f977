"""Dropout (Srivastava et al. 2014) at a quarter of the price: four decisions from each 64-bit draw."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LANES = 4
"""16-bit decisions in a 64-bit draw."""


class Dropout(nn.Module):
    """`nn.Dropout` whose probability is rounded to 1/65536."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, value: Tensor) -> Tensor:
        """The value with each element zero or divided by `1 - probability`; in eval mode the value itself."""
        if not self.training or self.probability == 0:
            return value
        count = value.numel()
        draws = torch.empty((count + LANES - 1) // LANES, dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[:count] >= round(self.probability * 65536) - 32768
        return value * (kept.view(value.shape).to(value.dtype) * (1 / (1 - self.probability)))
