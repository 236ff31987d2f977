"""ResNet with normalisation and ReLU before each convolution (He et al. 2016b, arXiv:1603.05027).

Nothing stands on the identity path but additions, so the gradient reaches the first block unchanged, however deep the
network is. The blocks of `wide_resnet.py` are these with another width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from services.vision.training.models.classifier import Classifier, initialise_he
from services.vision.training.models.wide_resnet import PreActivationBlock


@dataclass(frozen=True)
class PreActivationConfig:
    """Shape of a network, by default for pictures of 224 pixels."""

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks in each stage; each stage has half the size and twice the channels of the one before."""
    bottleneck: bool = False
    channels: int = 64
    """Of the stem and of the first stage's 3x3 convolutions."""
    stem: Literal["large", "small"] = "large"
    """A 7x7 convolution of stride 2 and a pooling, or a 3x3 one for pictures of about 32 pixels."""
    classes: int = 1000


def small_preactivation(blocks: int, *, bottleneck: bool) -> PreActivationConfig:
    """Three equal stages for 32 pixels; depth 6 n + 2, or 9 n + 2 with bottlenecks."""
    return PreActivationConfig((blocks,) * 3, bottleneck=bottleneck, channels=16, stem="small", classes=10)


PREACTIVATION_CONFIGS: Mapping[str, PreActivationConfig] = {
    "preact-resnet18": PreActivationConfig(),
    "preact-resnet50": PreActivationConfig((3, 4, 6, 3), bottleneck=True),
    "preact-resnet20": small_preactivation(3, bottleneck=False),
    "preact-resnet110": small_preactivation(18, bottleneck=False),
    "preact-resnet164": small_preactivation(18, bottleneck=True),
}


class PreActivationBottleneck(nn.Module):
    """BN-ReLU-1x1, BN-ReLU-3x3, BN-ReLU-1x1 to four times the channels, added to the input or to its projection."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * channels
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.norm3, self.conv3 = nn.BatchNorm2d(channels), nn.Conv2d(channels, outputs, 1, bias=False)
        same = stride == 1 and inputs == outputs
        self.project = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, 4 * channels, H/stride, W/stride]`."""
        active = torch.relu(self.norm1(x))  # [B, C, H, W]
        y = self.conv2(torch.relu(self.norm2(self.conv1(active))))  # [B, channels, H/stride, W/stride]
        y = self.conv3(torch.relu(self.norm3(y)))  # [B, 4 * channels, H/stride, W/stride]
        shortcut = x if self.project is None else self.project(active)
        return shortcut + y  # type: ignore[no-any-return]


class PreActivationResNet(Classifier):
    """The network: `[B, 3, H, W]` → `[B, classes]` logits."""

    def __init__(self, config: PreActivationConfig) -> None:
        super().__init__()
        large = config.stem == "large"
        kernel, stride = (7, 2) if large else (3, 1)
        stem = nn.Conv2d(3, config.channels, kernel, stride, padding=kernel // 2, bias=False)
        self.blocks = nn.Sequential(stem, *([nn.MaxPool2d(3, 2, padding=1)] if large else []))
        inputs = config.channels
        for stage, repeats in enumerate(config.blocks):
            channels = config.channels * 2**stage
            for repeat in range(repeats):
                stride = 2 if stage > 0 and repeat == 0 else 1
                if config.bottleneck:
                    self.blocks.append(PreActivationBottleneck(inputs, channels, stride))
                    inputs = 4 * channels
                else:
                    self.blocks.append(PreActivationBlock(inputs, channels, stride, dropout=0.0))
                    inputs = channels
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, config.classes)
        self.apply(initialise_he)

    def features(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, F]`, averaged over the picture."""
        x = self.blocks(x)  # [B, F, ...], halved in size by every stage but the first
        return torch.relu(self.norm(x)).mean(dim=(2, 3))
