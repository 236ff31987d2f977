"""VGG16: thirteen 3x3 convolutions and three linear layers (Simonyan & Zisserman 2015, arXiv:1409.1556, table 1, D)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.vision.training.models.classifier import Classifier, initialise_he

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions between two poolings."""


@dataclass(frozen=True)
class VggConfig:
    """What the task needs."""

    hidden: int = 4096
    """Width of the two hidden linear layers."""
    dropout: float = 0.5
    classes: int = 1000


class Vgg16(Classifier):
    """The network: `[B, 3, 224, 224]` → `[B, classes]` logits."""

    def __init__(self, config: VggConfig) -> None:
        super().__init__()
        self.convolutions = nn.Sequential()
        inputs = 3
        for channels, repeats in STAGES:
            for _ in range(repeats):
                self.convolutions.extend([nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(inplace=True)])
                inputs = channels
            self.convolutions.append(nn.MaxPool2d(2))
        self.hidden1, self.hidden2 = nn.Linear(inputs * 7 * 7, config.hidden), nn.Linear(config.hidden, config.hidden)
        self.classifier = nn.Linear(config.hidden, config.classes)
        self.dropout = config.dropout
        self.apply(initialise_he)

    def features(self, x: Tensor) -> Tensor:
        """`[B, 3, 224, 224]` → `[B, hidden]`."""
        x = self.convolutions(x).flatten(1)  # [B, 512 * 7 * 7]
        x = F.dropout(torch.relu(self.hidden1(x)), self.dropout, self.training)
        return F.dropout(torch.relu(self.hidden2(x)), self.dropout, self.training)  # [B, hidden]
