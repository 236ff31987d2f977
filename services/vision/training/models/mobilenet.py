"""MobileNet V1 (Howard et al. 2017, arXiv:1704.04861) and V2 (Sandler et al. 2018, arXiv:1801.04381).

A 3x3 convolution is split into a depthwise one, which filters each channel on its own, and a 1x1, which mixes them:
`1/C' + 1/9` of the multiply-adds. V2 turns the block inside out: wide in the middle, thin and linear at its ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from services.vision.training.models.classifier import Classifier, initialise_he

V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Channels and stride, table 1 of V1."""
V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, repeats, stride of the first; table 2 of V2."""


@dataclass(frozen=True)
class MobileNetConfig:
    """What the task needs; the shapes are the papers' at width 1 unless said otherwise."""

    dropout: float = 0.2
    stages: tuple[tuple[int, int, int, int], ...] = V2_STAGES
    """Of V2."""
    stem_channels: int = 32
    stem_stride: int = 2
    """1 for pictures of about 32 pixels."""
    head_channels: int = 1280
    """Of V2."""
    classes: int = 1000


MOBILENET_V2_CONFIGS: Mapping[str, MobileNetConfig] = {
    "mobilenet-v2": MobileNetConfig(),
    "mobilenet-v2-28px": MobileNetConfig(
        stages=((1, 16, 1, 1), (4, 24, 2, 2), (4, 40, 2, 2), (4, 64, 2, 2)),
        stem_channels=16,
        stem_stride=1,
        head_channels=256,
    ),
}
"""The paper's, and a small one for pictures of 28 pixels."""


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size (up to the stride), and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """V1's block: depthwise 3x3 and pointwise 1x1, each with BatchNorm and ReLU."""
    depthwise = conv_norm(inputs, inputs, 3, stride, groups=inputs)
    return nn.Sequential(*depthwise, nn.ReLU(inplace=True), *conv_norm(inputs, outputs, 1), nn.ReLU(inplace=True))


class InvertedResidual(nn.Module):
    """V2's block: widen, filter, project without activation; added to the input where the shape allows."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        widen = [] if expand == 1 else [*conv_norm(inputs, hidden, 1), nn.ReLU6(inplace=True)]
        depthwise = [*conv_norm(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*widen, *depthwise, *conv_norm(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C', H/stride, W/stride]`."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class MobileNet(Classifier):
    """A stack of blocks, average pooling, dropout, classifier: `[B, 3, H, W]` → `[B, classes]` logits."""

    def __init__(self, blocks: nn.Sequential, channels: int, config: MobileNetConfig) -> None:
        super().__init__()
        self.blocks, self.dropout = blocks, nn.Dropout(config.dropout)
        self.classifier = nn.Linear(channels, config.classes)
        self.apply(initialise_he)

    def features(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, F]`, averaged over the picture."""
        x = self.blocks(x)  # [B, F, H/32, W/32]
        return self.dropout(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def build_mobilenet_v1(config: MobileNetConfig) -> MobileNet:
    """MobileNet 1.0 for 224 pixels."""
    blocks = nn.Sequential(*conv_norm(3, 32, 3, 2), nn.ReLU(inplace=True))
    inputs = 32
    for outputs, stride in V1_BLOCKS:
        blocks.append(separable(inputs, outputs, stride))
        inputs = outputs
    return MobileNet(blocks, inputs, config)


def build_mobilenet_v2(config: MobileNetConfig) -> MobileNet:
    """MobileNetV2, by default 1.0 for 224 pixels."""
    inputs = config.stem_channels
    blocks = nn.Sequential(*conv_norm(3, inputs, 3, config.stem_stride), nn.ReLU6(inplace=True))
    for expand, outputs, repeats, stride in config.stages:
        for repeat in range(repeats):
            blocks.append(InvertedResidual(inputs, outputs, stride if repeat == 0 else 1, expand))
            inputs = outputs
    blocks.extend([*conv_norm(inputs, config.head_channels, 1), nn.ReLU6(inplace=True)])
    return MobileNet(blocks, config.head_channels, config)
