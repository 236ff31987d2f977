"""DenseNet: every layer of a block sees the maps of all layers before it (Huang et al. 2017, arXiv:1608.06993).

The bottleneck variant with compression ('BC'): BN-ReLU-1x1 to four times the growth, BN-ReLU-3x3 to the growth; a
transition halves channels and size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from services.vision.training.models.classifier import Classifier, initialise_he


@dataclass(frozen=True)
class DenseNetConfig:
    """DenseNet-121 for 224 pixels by default."""

    layers: tuple[int, ...] = (6, 12, 24, 16)
    """Layers in each block."""
    growth: int = 32
    """Maps that each layer adds."""
    stem: Literal["large", "small"] = "large"
    """A 7x7 convolution of stride 2 and a pooling, or a 3x3 one for pictures of about 32 pixels."""
    classes: int = 1000


DENSENET_CONFIGS: Mapping[str, DenseNetConfig] = {
    "densenet121": DenseNetConfig(),
    "densenet-bc-100-12": DenseNetConfig((16, 16, 16), 12, "small", 10),
    "densenet-28px": DenseNetConfig((3, 6, 6), 12, "small", 10),
}
"""The paper's for 224 and for 32 pixels, and a small one for 28."""


def norm_relu_conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """BatchNorm, ReLU and a convolution that keeps the size."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv)


class DenseLayer(nn.Module):
    """Adds `growth` maps to what it is given."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.squeeze, self.grow = norm_relu_conv(inputs, 4 * growth, 1), norm_relu_conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C + growth, H, W]`."""
        return torch.cat([x, self.grow(self.squeeze(x))], dim=1)


class DenseNet(Classifier):
    """The network: `[B, 3, H, W]` → `[B, classes]` logits."""

    def __init__(self, config: DenseNetConfig) -> None:
        super().__init__()
        channels = 2 * config.growth
        if config.stem == "small":
            self.blocks = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False))
        else:
            stem = nn.Conv2d(3, channels, 7, 2, padding=3, bias=False)
            self.blocks = nn.Sequential(stem, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        for index, layers in enumerate(config.layers):
            if index > 0:
                self.blocks.extend([norm_relu_conv(channels, channels // 2, 1), nn.AvgPool2d(2)])
                channels //= 2
            for _ in range(layers):
                self.blocks.append(DenseLayer(channels, config.growth))
                channels += config.growth
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, config.classes)
        self.apply(initialise_he)

    def features(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, F]`, averaged over the picture."""
        x = self.blocks(x)  # [B, F, H/32, W/32], or H/4 and W/4 with the small stem
        return torch.relu(self.norm(x)).mean(dim=(2, 3))
