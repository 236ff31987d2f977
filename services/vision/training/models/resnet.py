"""ResNet: blocks that learn a difference to their input (He et al. 2016, arXiv:1512.03385).

One builder for the basic block (18 layers), the bottleneck (50) and the wide bottleneck (Zagoruyko & Komodakis 2016,
arXiv:1605.07146). The stride of a bottleneck is in its 3x3 convolution, as in all later code ('v1.5'), not in the
first 1x1 as in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.vision.training.models.classifier import Classifier, initialise_he


@dataclass(frozen=True)
class ResNetConfig:
    """Shape of a network for pictures of 224 pixels."""

    blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Blocks in each of the four stages."""
    bottleneck: bool = False
    """1x1, 3x3, 1x1 with four times the channels at the end, instead of two 3x3."""
    width: int = 1
    """Multiplier of a bottleneck's inner channels."""
    classes: int = 1000


RESNET_CONFIGS: Mapping[str, ResNetConfig] = {
    "resnet18": ResNetConfig(),
    "resnet50": ResNetConfig((3, 4, 6, 3), bottleneck=True),
    "wide-resnet50-2": ResNetConfig((3, 4, 6, 3), bottleneck=True, width=2),
}


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (up to the stride), and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ResidualBlock(nn.Module):
    """`relu(branch(x) + shortcut(x))`; the shortcut is the identity unless the shape changes."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C', H/stride, W/stride]`."""
        return torch.relu(self.branch(x) + self.shortcut(x))


def build_block(config: ResNetConfig, inputs: int, channels: int, stride: int) -> ResidualBlock:
    """One block whose 3x3 convolutions have `channels` (times the width)."""
    if config.bottleneck:
        inner, outputs = channels * config.width, 4 * channels
        layers = [conv_norm(inputs, inner, 1), conv_norm(inner, inner, 3, stride), conv_norm(inner, outputs, 1)]
    else:
        outputs = channels
        layers = [conv_norm(inputs, channels, 3, stride), conv_norm(channels, channels, 3)]
    branch = nn.Sequential()
    for index, layer in enumerate(layers):
        branch.append(layer)
        if index < len(layers) - 1:
            branch.append(nn.ReLU(inplace=True))
    same = stride == 1 and inputs == outputs
    return ResidualBlock(branch, nn.Identity() if same else conv_norm(inputs, outputs, 1, stride))


class ResNet(Classifier):
    """The network: `[B, 3, H, W]` → `[B, classes]` logits."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
        self.blocks = nn.Sequential()
        inputs = 64
        for stage, repeats in enumerate(config.blocks):
            channels = 64 * 2**stage
            for repeat in range(repeats):
                stride = 2 if stage > 0 and repeat == 0 else 1
                self.blocks.append(build_block(config, inputs, channels, stride))
                inputs = channels * (4 if config.bottleneck else 1)
        self.classifier = nn.Linear(inputs, config.classes)
        self.apply(initialise_he)

    def features(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, F]`, averaged over the picture."""
        x = self.stem(x)  # [B, 64, H/4, W/4]
        x = self.blocks(x)  # [B, F, H/32, W/32]
        return x.mean(dim=(2, 3))  # [B, F]
