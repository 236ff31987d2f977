"""WideResNet for small pictures: fewer layers, more channels (Zagoruyko & Komodakis 2016, arXiv:1605.07146).

Pre-activation blocks (He et al. 2016b, arXiv:1603.05027): BatchNorm and ReLU come before each convolution, so that the
identity path is never interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from services.vision.training.models.classifier import Classifier, initialise_he
from shared.errors import ConfigurationError


@dataclass(frozen=True)
class WideResNetConfig:
    """WRN-depth-width."""

    depth: int = 16
    """Convolutions and the classifier: 6 n + 4 for n blocks in each of the three stages."""
    width: int = 4
    """Multiplier of the channels 16, 32, 64."""
    dropout: float = 0.0
    """Share of the channels' values dropped between the two convolutions of a block."""
    classes: int = 10

    def __post_init__(self) -> None:
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ConfigurationError(f"a WideResNet has depth 6 n + 4 with n >= 1, got {self.depth}")


WIDE_RESNET_CONFIGS: Mapping[str, WideResNetConfig] = {
    "wrn-10-2": WideResNetConfig(10, 2),
    "wrn-16-1": WideResNetConfig(16, 1),
    "wrn-16-4": WideResNetConfig(16, 4),
    "wrn-28-10": WideResNetConfig(28, 10, dropout=0.3),
}


class PreActivationBlock(nn.Module):
    """BN-ReLU-3x3-dropout-BN-ReLU-3x3, added to the input, or to its 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        same = stride == 1 and inputs == outputs
        self.project = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C', H/stride, W/stride]`."""
        active = torch.relu(self.norm1(x))  # [B, C, H, W]
        y = self.dropout(torch.relu(self.norm2(self.conv1(active))))  # [B, C', H/stride, W/stride]
        shortcut = x if self.project is None else self.project(active)
        return shortcut + self.conv2(y)  # type: ignore[no-any-return]


class WideResNet(Classifier):
    """The network: `[B, 3, H, W]` → `[B, classes]` logits, made for 32 pixels."""

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.blocks = nn.Sequential()
        inputs = 16
        for stage in range(3):
            outputs = 16 * 2**stage * config.width
            for repeat in range((config.depth - 4) // 6):
                stride = 2 if stage > 0 and repeat == 0 else 1
                self.blocks.append(PreActivationBlock(inputs, outputs, stride, config.dropout))
                inputs = outputs
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, config.classes)
        self.apply(initialise_he)

    def features(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, 64 * width]`, averaged over the picture."""
        x = self.blocks(self.stem(x))  # [B, 64 * width, H/4, W/4]
        return torch.relu(self.norm(x)).mean(dim=(2, 3))
