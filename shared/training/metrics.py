"""What a classifier is measured by: one implementation for PyTorch and ONNX.

Both come in as `predict(batch) -> logits` over numpy arrays, so that a difference between two figures is a difference
between two models and never between two ways to count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""`[B, 3, H, W]` → `[B, classes]` logits."""


@dataclass(frozen=True)
class Classification:
    """Answers over a part of the data, in its order."""

    logits: NDArray[np.float32]
    """`[N, classes]`"""
    labels: NDArray[np.int64]
    """`[N]`"""

    @property
    def answers(self) -> NDArray[np.int64]:
        """`[N]` class of the largest logit."""
        return np.asarray(self.logits.argmax(axis=1), np.int64)

    @property
    def correct(self) -> int:
        """Number of right answers."""
        return int((self.answers == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / len(self.labels)

    @property
    def cross_entropy(self) -> float:
        """Mean of -log p(label), in nats."""
        shifted = self.logits - self.logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return float(-log_p[np.arange(len(self.labels)), self.labels].mean())

    def confusion(self) -> NDArray[np.int64]:
        """`[classes, classes]`: rows are labels, columns are answers."""
        classes = self.logits.shape[1]
        flat = np.bincount(self.labels * classes + self.answers, minlength=classes * classes)
        return flat.reshape(classes, classes).astype(np.int64)


def classify(
    predict: Predict, images: Iterable[NDArray[np.float32]], labels: NDArray[np.int64], batch: int = 32
) -> Classification:
    """Runs a model over images, `batch` at a time."""
    outputs: list[NDArray[np.float32]] = []
    waiting: list[NDArray[np.float32]] = []
    for image in images:
        waiting.append(image)
        if len(waiting) == batch:
            outputs.append(predict(np.stack(waiting)))
            waiting = []
    if waiting:
        outputs.append(predict(np.stack(waiting)))
    return Classification(np.concatenate(outputs), labels)


def agreement(one: Classification, other: Classification) -> float:
    """Share of the examples to which two models give the same answer."""
    return float((one.answers == other.answers).mean())


def torch_predictor(model: nn.Module) -> Predict:
    """`predict` of a PyTorch model, in eval mode, without gradients."""

    def predict(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = model(torch.from_numpy(batch)).float().numpy()
        return logits

    model.eval()
    return predict
