"""Losses of the vision models."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def smoothed_cross_entropy(smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy against `(1 - s) * one_hot + s / classes` (Szegedy et al. 2016, section 7).

    The returned function takes logits `[B, classes]` and labels `[B]` and gives a scalar in nats.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)

    return loss
