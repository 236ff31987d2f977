"""The vision models, one file each, by the name that the command line knows them by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from services.vision.training.models.efficientnet_lite import (
    LITE_CONFIGS,
    EfficientNetLite,
    load_imagenet_weights,
)
from shared.errors import ConfigurationError
from shared.training.registry import Registry

MODELS: Registry[Callable[[int, bool], EfficientNetLite]] = Registry("model")
"""Builders: `(classes, pretrained) -> model`."""


def _register_lite(name: str) -> None:
    @MODELS.register(name)
    def build(classes: int, pretrained: bool) -> EfficientNetLite:
        model = EfficientNetLite(dataclasses.replace(LITE_CONFIGS[name], classes=classes))
        if pretrained and name != "efficientnet-lite0":
            raise ConfigurationError(f"there are ImageNet weights for efficientnet-lite0 only, not for {name}")
        if pretrained:
            load_imagenet_weights(model)
        return model


for _name in LITE_CONFIGS:
    _register_lite(_name)
