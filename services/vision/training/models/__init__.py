"""The vision models, one file each, by the name that the command line knows them by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from services.vision.training.models.classifier import Classifier
from services.vision.training.models.densenet import DenseNet, DenseNetConfig
from services.vision.training.models.efficientnet_lite import (
    LITE_CONFIGS,
    EfficientNetLite,
    load_imagenet_weights,
)
from services.vision.training.models.mobilenet import MobileNetConfig, build_mobilenet_v1, build_mobilenet_v2
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
        if pretrained and name != "efficientnet-lite0":
            raise ConfigurationError(f"there are ImageNet weights for efficientnet-lite0 only, not for {name}")
        if pretrained:
            load_imagenet_weights(model)
        return model


def _register_scratch(name: str, make: Callable[[int], Classifier]) -> None:
    """Registers a network that has no pretrained weights here."""

    @MODELS.register(name)
    def build(classes: int, pretrained: bool) -> Classifier:
        if pretrained:
            raise ConfigurationError(f"there are ImageNet weights for efficientnet-lite0 only, not for {name}")
        return make(classes)


for _name in LITE_CONFIGS:
    _register_lite(_name)
for _name, _resnet in RESNET_CONFIGS.items():
    _register_scratch(_name, lambda classes, config=_resnet: ResNet(dataclasses.replace(config, classes=classes)))  # type: ignore[misc]
for _name, _wide in WIDE_RESNET_CONFIGS.items():
    _register_scratch(_name, lambda classes, config=_wide: WideResNet(dataclasses.replace(config, classes=classes)))  # type: ignore[misc]
_register_scratch("vgg16", lambda classes: Vgg16(VggConfig(classes=classes)))
_register_scratch("densenet121", lambda classes: DenseNet(DenseNetConfig(classes=classes)))
_register_scratch("mobilenet-v1", lambda classes: build_mobilenet_v1(MobileNetConfig(classes=classes)))
_register_scratch("mobilenet-v2", lambda classes: build_mobilenet_v2(MobileNetConfig(classes=classes)))
