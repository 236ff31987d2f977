"""EfficientNet: one searched network, and its scaling in depth, width and resolution at once.

Tan & Le 2019 (arXiv:1905.11946). The base B0 is a stack of inverted bottlenecks with squeeze-and-excitation and swish;
`scale` multiplies depth by `1.2^phi`, width by `1.1^phi` and resolution by `1.15^phi`, so that the multiply-adds grow
about as `2^phi`. The published B1 to B7 use multipliers that were rounded by hand.

Differences from TensorFlow's own code: stochastic depth is left out (our runs are short), and the 'same' padding is
computed from the size at hand, so that one model trains at 160 pixels and answers at 224. The Lite family
(`efficientnet_lite.py`) is a configuration of the same network.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from services.vision.training.models.classifier import Classifier


@dataclass(frozen=True)
class Stage:
    """A run of equal MBConv blocks; the first of them changes stride and channels."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


BASE_STAGES = (
    Stage(repeats=1, kernel=3, stride=1, expand=1, channels=16),
    Stage(repeats=2, kernel=3, stride=2, expand=6, channels=24),
    Stage(repeats=2, kernel=5, stride=2, expand=6, channels=40),
    Stage(repeats=3, kernel=3, stride=2, expand=6, channels=80),
    Stage(repeats=3, kernel=5, stride=1, expand=6, channels=112),
    Stage(repeats=4, kernel=5, stride=2, expand=6, channels=192),
    Stage(repeats=1, kernel=3, stride=1, expand=6, channels=320),
)
"""EfficientNet-B0, table 1 of the paper."""


@dataclass(frozen=True)
class EfficientNetConfig:
    """Shape of a network: the multipliers of the compound scaling and what the task needs."""

    width: float = 1.0
    """Multiplier of the channels."""
    depth: float = 1.0
    """Multiplier of the blocks in a stage."""
    size: int = 224
    """Side of the square picture it was made for, in pixels."""
    dropout: float = 0.2
    """Share of the features dropped before the classifier while training."""
    classes: int = 1000
    """Number of answers."""
    stages: tuple[Stage, ...] = BASE_STAGES
    """What is scaled."""
    stem_channels: int = 32
    stem_stride: int = 2
    """1 for pictures of about 32 pixels."""
    head_channels: int = 1280
    scale_ends: bool = True
    """Whether width also scales stem and head, and depth the first and the last stage."""
    activation: Literal["swish", "relu6"] = "swish"
    squeeze: float = 0.25
    """Width of squeeze-and-excitation as a share of a block's input channels; 0 leaves it out."""
    batch_norm_epsilon: float = 1e-3
    batch_norm_momentum: float = 0.01
    """PyTorch's sense: weight of the new batch."""


EFFICIENTNET_CONFIGS: Mapping[str, EfficientNetConfig] = {
    "efficientnet-b0": EfficientNetConfig(width=1.0, depth=1.0, size=224, dropout=0.2),
    "efficientnet-b1": EfficientNetConfig(width=1.0, depth=1.1, size=240, dropout=0.2),
    "efficientnet-b2": EfficientNetConfig(width=1.1, depth=1.2, size=260, dropout=0.3),
    "efficientnet-b3": EfficientNetConfig(width=1.2, depth=1.4, size=300, dropout=0.3),
    "efficientnet-b4": EfficientNetConfig(width=1.4, depth=1.8, size=380, dropout=0.4),
    "efficientnet-b5": EfficientNetConfig(width=1.6, depth=2.2, size=456, dropout=0.4),
    "efficientnet-b6": EfficientNetConfig(width=1.8, depth=2.6, size=528, dropout=0.5),
    "efficientnet-b7": EfficientNetConfig(width=2.0, depth=3.1, size=600, dropout=0.5),
    "efficientnet-28px": EfficientNetConfig(
        width=0.5, depth=0.5, size=28, stem_stride=1, head_channels=512, batch_norm_momentum=0.1
    ),
}
"""The published family, and a small one for pictures of 28 pixels."""

DEPTH_BASE, WIDTH_BASE, SIZE_BASE = 1.2, 1.1, 1.15
"""The paper's alpha, beta and gamma: `1.2 * 1.1^2 * 1.15^2 = 1.92`, near 2."""


@dataclass(frozen=True)
class Scaling:
    """Multipliers of depth, width and resolution."""

    depth: float
    width: float
    size: float


def scale(phi: float, bases: tuple[float, float, float] = (DEPTH_BASE, WIDTH_BASE, SIZE_BASE)) -> Scaling:
    """Compound scaling, equation 3: each base to the power of `phi`."""
    depth, width, size = bases
    return Scaling(depth**phi, width**phi, size**phi)


def scale_channels(channels: int, width: float, divisor: int = 8) -> int:
    """Channels times `width`, rounded to a multiple of `divisor`, never more than a tenth below."""
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def scale_repeats(repeats: int, depth: float) -> int:
    """Blocks times `depth`, rounded up."""
    return math.ceil(repeats * depth)


def scale_stages(config: EfficientNetConfig) -> list[Stage]:
    """The stages scaled; without `scale_ends` the first and the last keep their number of blocks."""
    stages = []
    for index, stage in enumerate(config.stages):
        fixed = not config.scale_ends and index in (0, len(config.stages) - 1)
        repeats = stage.repeats if fixed else scale_repeats(stage.repeats, config.depth)
        channels = scale_channels(stage.channels, config.width)
        stages.append(Stage(repeats, stage.kernel, stage.stride, stage.expand, channels))
    return stages


class SamePadConv2d(nn.Conv2d):
    """Convolution with TensorFlow's 'same' padding: `[B, C, H, W]` → `[B, C', ceil(H/stride), ceil(W/stride)]`.

    The odd pixel of padding goes to the right and the bottom, which is what PyTorch's own padding cannot express.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pads by what this size needs, then convolves."""
        top, bottom = self._padding(x.shape[-2])
        left, right = self._padding(x.shape[-1])
        if (top, left) == (bottom, right):  # symmetric: the convolution pads by itself, without a copy
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), self.dilation, self.groups)
        x = F.pad(x, (left, right, top, bottom))  # [B, C, H + top + bottom, W + left + right]
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _padding(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


def conv_bn(
    config: EfficientNetConfig, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
) -> OrderedDict[str, nn.Module]:
    """A convolution without bias and its batch normalisation, by name."""
    return OrderedDict(
        conv=SamePadConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
        bn=nn.BatchNorm2d(outputs, eps=config.batch_norm_epsilon, momentum=config.batch_norm_momentum),
    )


def conv_bn_activation(
    config: EfficientNetConfig, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """`conv_bn` with the activation behind it."""
    layers = conv_bn(config, inputs, outputs, kernel=kernel, stride=stride, groups=groups)
    activation = nn.SiLU(inplace=True) if config.activation == "swish" else nn.ReLU6(inplace=True)
    return nn.Sequential(OrderedDict(layers, activation=activation))


class SqueezeExcitation(nn.Module):
    """Weighs each channel by what all channels say on average over the picture (Hu et al. 2018, arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → the same shape."""
        y = F.silu(self.reduce(x.mean(dim=(2, 3), keepdim=True)))  # [B, squeezed, 1, 1]
        return x * self.expand(y).sigmoid()  # type: ignore[no-any-return]


class MBConv(nn.Module):
    """Inverted bottleneck (MobileNetV2): widen by `expand`, filter each channel on its own, project linearly."""

    def __init__(self, config: EfficientNetConfig, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        hidden = inputs * stage.expand
        self.expand = conv_bn_activation(config, inputs, hidden) if stage.expand != 1 else nn.Identity()
        self.depthwise = conv_bn_activation(config, hidden, hidden, kernel=stage.kernel, stride=stride, groups=hidden)
        squeezed = max(1, int(inputs * config.squeeze))
        self.squeeze = SqueezeExcitation(hidden, squeezed) if config.squeeze else nn.Identity()
        self.project = nn.Sequential(conv_bn(config, hidden, stage.channels))
        self.residual = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C', H/stride, W/stride]`."""
        y: Tensor = self.expand(x)  # [B, C * expand, H, W]
        y = self.depthwise(y)  # [B, C * expand, H/stride, W/stride]
        y = self.squeeze(y)
        y = self.project(y)  # [B, C', H/stride, W/stride]
        return x + y if self.residual else y


class EfficientNet(Classifier):
    """The network: `[B, 3, H, W]` normalised RGB → `[B, classes]` logits."""

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, head = (
            scale_channels(count, config.width) if config.scale_ends else count
            for count in (config.stem_channels, config.head_channels)
        )
        self.stem = conv_bn_activation(config, 3, channels, kernel=3, stride=config.stem_stride)
        blocks: list[MBConv] = []
        for stage in scale_stages(config):
            for repeat in range(stage.repeats):
                blocks.append(MBConv(config, channels, stage, stage.stride if repeat == 0 else 1))
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn_activation(config, channels, head)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(head, config.classes)
        self.apply(_initialise)

    def features(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, head]`: what the classifier sees, averaged over the picture."""
        x = self.stem(x)  # [B, 32, H/2, W/2]
        x = self.blocks(x)  # [B, 320, H/32, W/32]
        x = self.head(x)  # [B, 1280, H/32, W/32]
        pooled: Tensor = x.mean(dim=(2, 3))  # [B, 1280]
        return pooled

    def forward(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, classes]` logits."""
        logits: Tensor = self.classifier(self.dropout(self.features(image)))
        return logits


def _initialise(module: nn.Module) -> None:
    """He initialisation by fan-out for convolutions, as the paper's code does; a small uniform classifier."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)
