"""ResNet: blocks that learn a difference to their input (He et al. 2016, arXiv:1512.03385).

One builder for the basic block (18 layers), the bottleneck (50), the wide bottleneck (Zagoruyko & Komodakis 2016,
arXiv:1605.07146) and the thin networks for small pictures (section 4.2: three stages of 16, 32 and 64 channels, depth
6 n + 2). The stride of a bottleneck is in its 3x3 convolution, as in all later code ('v1.5'), not in the first 1x1 as
in the paper. The small networks project where the shape changes (the paper's option B), which pruning can follow; the
paper pads with zeros there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from services.vision.training.models.classifier import Classifier, initialise_he
from services.vision.training.models.normalisation import Norm, build_norm


@dataclass(frozen=True)
class ResNetConfig:
    """Shape of a network, by default for pictures of 224 pixels."""

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks in each stage; each stage has half the size and twice the channels of the one before."""
    bottleneck: bool = False
    """1x1, 3x3, 1x1 with four times the channels at the end, instead of two 3x3."""
    width: int = 1
    """Multiplier of a bottleneck's inner channels."""
    channels: int = 64
    """Of the stem and of the first stage."""
    stem: Literal["large", "small"] = "large"
    """A 7x7 convolution of stride 2 and a pooling, or a 3x3 one for pictures of about 32 pixels."""
    norm: Norm = "batch"
    residual: bool = True
    """False leaves the shortcuts out: the plain network that the paper compares with."""
    classes: int = 1000


def small_resnet(depth: int, norm: Norm = "batch", residual: bool = True) -> ResNetConfig:
    """The network of section 4.2 with `depth` = 6 n + 2 layers."""
    blocks = (depth - 2) // 6
    return ResNetConfig((blocks,) * 3, channels=16, stem="small", norm=norm, residual=residual, classes=10)


RESNET_CONFIGS: Mapping[str, ResNetConfig] = {
    "resnet18": ResNetConfig(),
    "resnet50": ResNetConfig((3, 4, 6, 3), bottleneck=True),
    "wide-resnet50-2": ResNetConfig((3, 4, 6, 3), bottleneck=True, width=2),
    **{f"resnet{depth}": small_resnet(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
}


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, norm: Norm = "batch") -> nn.Sequential:
    """A convolution that keeps the size (up to the stride), and its normalisation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, build_norm(norm, outputs))


class ResidualBlock(nn.Module):
    """`relu(branch(x) + shortcut(x))`; the shortcut is the identity unless the shape changes."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C', H/stride, W/stride]`."""
        return torch.relu(self.branch(x) + self.shortcut(x))


def build_block(config: ResNetConfig, inputs: int, channels: int, stride: int) -> nn.Module:
    """One block whose 3x3 convolutions have `channels` (times the width)."""
    norm = config.norm
    if config.bottleneck:
        inner, outputs = channels * config.width, 4 * channels
        first, last = conv_norm(inputs, inner, 1, norm=norm), conv_norm(inner, outputs, 1, norm=norm)
        layers = [first, conv_norm(inner, inner, 3, stride, norm), last]
    else:
        outputs = channels
        layers = [conv_norm(inputs, channels, 3, stride, norm), conv_norm(channels, channels, 3, norm=norm)]
    branch = nn.Sequential()
    for index, layer in enumerate(layers):
        branch.append(layer)
        if index < len(layers) - 1:
            branch.append(nn.ReLU(inplace=True))
    if not config.residual:
        return branch.append(nn.ReLU(inplace=True))
    same = stride == 1 and inputs == outputs
    return ResidualBlock(branch, nn.Identity() if same else conv_norm(inputs, outputs, 1, stride, norm))


def build_stem(config: ResNetConfig) -> nn.Sequential:
    """What comes before the blocks."""
    if config.stem == "small":
        return nn.Sequential(*conv_norm(3, config.channels, 3, norm=config.norm), nn.ReLU(inplace=True))
    layers = conv_norm(3, config.channels, 7, 2, config.norm)
    return nn.Sequential(*layers, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))


class ResNet(Classifier):
    """The network: `[B, 3, H, W]` → `[B, classes]` logits."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.stem = build_stem(config)
        self.blocks = nn.Sequential()
        inputs = config.channels
        for stage, repeats in enumerate(config.blocks):
            channels = config.channels * 2**stage
            for repeat in range(repeats):
                stride = 2 if stage > 0 and repeat == 0 else 1
                self.blocks.append(build_block(config, inputs, channels, stride))
                inputs = channels * (4 if config.bottleneck else 1)
        self.classifier = nn.Linear(inputs, config.classes)
        self.apply(initialise_he)

    def features(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, F]`, averaged over the picture."""
        x = self.stem(x)  # [B, channels, H/4, W/4], or [B, channels, H, W] with the small stem
        x = self.blocks(x)  # [B, F, ...], halved in size by every stage but the first
        return x.mean(dim=(2, 3))  # [B, F]
