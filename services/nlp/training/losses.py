"""Losses over sequences."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from services.nlp.tokenizers.special import PAD


def token_cross_entropy(label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross-entropy of a token in nats, PAD left out.

    Args:
        label_smoothing: share of the target spread over the vocabulary (Szegedy et al. 2016, section 7).

    Returns:
        `(logits [B, T, V], targets [B, T]) -> scalar`.
    """

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, label_smoothing=label_smoothing
        )

    return loss


def sentence_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over sentences of the sum over their tokens, in nats, PAD left out: the report's loss.

    Args:
        logits: `[B, T, V]`.
        targets: `[B, T]`.
    """
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum")
    return total / len(targets)
