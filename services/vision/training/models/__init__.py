"""The vision models, one file each, by the name that the command line knows them by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from services.vision.training.models.classifier import Classifier
from services.vision.training.models.densenet import DENSENET_CONFIGS, DenseNet
from services.vision.training.models.efficientnet import EFFICIENTNET_CONFIGS, EfficientNet
from services.vision.training.models.efficientnet_lite import (
    LITE_CONFIGS,
    PRETRAINED,
    EfficientNetLite,
    imagenet_weights_path,
    load_imagenet_weights,
)
from services.vision.training.models.mobilenet import (
    MOBILENET_V2_CONFIGS,
    MobileNetConfig,
    build_mobilenet_v1,
    build_mobilenet_v2,
)
from services.vision.training.models.preactivation_resnet import PREACTIVATION_CONFIGS, PreActivationResNet
from services.vision.training.models.resnet import RESNET_CONFIGS, ResNet
from services.vision.training.models.vgg import Vgg16, VggConfig
from services.vision.training.models.wide_resnet import WIDE_RESNET_CONFIGS, WideResNet
from shared.errors import ConfigurationError
from shared.training.registry import Registry

MODELS: Registry[Callable[[int, bool], Classifier]] = Registry("model")
"""Builders: `(classes, pretrained) -> model`."""


def _register_lite(name: str) -> None:
    @MODELS.register(name)
    def build(classes: int, pretrained: bool) -> Classifier:
        model = EfficientNetLite(dataclasses.replace(LITE_CONFIGS[name], classes=classes))
        if pretrained:
            load_imagenet_weights(model, imagenet_weights_path(name))
        return model


def _register_scratch(name: str, make: Callable[[int], Classifier]) -> None:
    """Registers a network that has no pretrained weights here."""

    @MODELS.register(name)
    def build(classes: int, pretrained: bool) -> Classifier:
        if pretrained:
            raise ConfigurationError(f"there are ImageNet weights for {', '.join(PRETRAINED)} only, not for {name}")
        return make(classes)


for _name in LITE_CONFIGS:
    _register_lite(_name)


def _register_family(configs: Mapping[str, Any], build: Callable[[Any], Classifier]) -> None:
    """Registers the networks of one file, each by its configuration."""
    for name, config in configs.items():
        _register_scratch(name, lambda classes, config=config: build(dataclasses.replace(config, classes=classes)))  # type: ignore[misc]


_register_family(RESNET_CONFIGS, ResNet)
_register_family(PREACTIVATION_CONFIGS, PreActivationResNet)
_register_family(WIDE_RESNET_CONFIGS, WideResNet)
_register_family(DENSENET_CONFIGS, DenseNet)
_register_family(MOBILENET_V2_CONFIGS, build_mobilenet_v2)
_register_family(EFFICIENTNET_CONFIGS, EfficientNet)
_register_scratch("vgg16", lambda classes: Vgg16(VggConfig(classes=classes)))
_register_scratch("mobilenet-v1", lambda classes: build_mobilenet_v1(MobileNetConfig(classes=classes)))
