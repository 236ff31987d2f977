"""Our EfficientNet-Lite against the published implementation and the published numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from services.vision.training.models import MODELS
from services.vision.training.models.efficientnet import SamePadConv2d, scale_channels, scale_stages
from services.vision.training.models.efficientnet_lite import (
    LITE_CONFIGS,
    PRETRAINED,
    EfficientNetLite,
    EfficientNetLiteConfig,
    imagenet_weights_path,
    load_imagenet_weights,
)
from shared.errors import ConfigurationError


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def reference(name: str) -> nn.Module:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    return package.EfficientNet.from_name(name).eval()


def test_lite0_has_the_published_number_of_parameters():
    assert count(EfficientNetLite(LITE_CONFIGS["efficientnet-lite0"])) == 4_652_008


@pytest.mark.parametrize("name", LITE_CONFIGS)
def test_every_member_has_as_many_parameters_as_the_reference(name):
    with torch.device("meta"):
        ours = count(EfficientNetLite(LITE_CONFIGS[name]))
    assert ours == count(reference(name))


@pytest.mark.parametrize("name", PRETRAINED)
def test_imagenet_weights_give_the_logits_of_the_reference(name):
    theirs = reference(name)  # its padding is fixed for the size of the config; ours follows the size at hand
    theirs.load_state_dict(torch.load(imagenet_weights_path(name), weights_only=True))
    ours = EfficientNetLite(LITE_CONFIGS[name]).eval()
    load_imagenet_weights(ours, imagenet_weights_path(name))
    size = LITE_CONFIGS[name].size
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=0)


def test_weights_for_another_task_keep_their_own_classifier():
    model = MODELS.get("efficientnet-lite0")(5, True)
    published = torch.load(imagenet_weights_path(), weights_only=True)
    assert model.classifier.weight.shape == (5, 1280)
    assert torch.equal(model.stem.conv.weight, published["_conv_stem.weight"])


def test_weights_for_another_network_are_refused():
    with pytest.raises(ConfigurationError, match="do not fit"):
        load_imagenet_weights(EfficientNetLite(dataclasses.replace(LITE_CONFIGS["efficientnet-lite0"], width=1.1)))
    with pytest.raises(ConfigurationError, match="not for efficientnet-lite3"):
        MODELS.get("efficientnet-lite3")(5, True)


@pytest.mark.parametrize("size", [5, 6, 7, 8, 224])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (1, 1)])
def test_same_padding_keeps_the_ceiling_of_the_size(size, kernel, stride):
    layer = SamePadConv2d(1, 1, kernel, stride, bias=False)
    assert layer(torch.zeros(1, 1, size, size)).shape[-1] == -(-size // stride)


def test_odd_padding_goes_to_the_end_by_hand():
    layer = SamePadConv2d(1, 1, 3, 2, bias=False)
    nn.init.ones_(layer.weight)
    row = torch.tensor([1.0, 2.0, 4.0, 8.0]).reshape(1, 1, 1, 4)
    # height 1 needs one row on either side; width 4 needs one column, which goes to the right
    assert layer(row).flatten().tolist() == [7.0, 12.0]


@pytest.mark.parametrize(
    ("channels", "width", "expected"), [(16, 1.0, 16), (24, 1.1, 24), (40, 1.1, 48), (112, 1.4, 160)]
)
def test_channels_are_rounded_to_eights(channels, width, expected):
    # 40 * 1.1 = 44 -> 48, ties away from zero; 112 * 1.4 = 156.8 -> 160
    assert scale_channels(channels, width) == expected


@pytest.mark.parametrize("channels", range(8, 400, 7))
def test_rounding_never_loses_more_than_a_tenth(channels):
    for width in (0.5, 1.0, 1.1, 1.4):
        assert scale_channels(channels, width) >= 0.9 * channels * width
        assert scale_channels(channels, width) % 8 == 0


def test_depth_leaves_the_first_and_the_last_stage():
    repeats = [stage.repeats for stage in scale_stages(EfficientNetLiteConfig(depth=1.8))]
    assert repeats == [1, 4, 4, 6, 6, 8, 1]


def test_features_are_what_the_classifier_sees():
    model = MODELS.get("efficientnet-lite0")(5, False).eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.features(x)
    assert features.shape == (2, 1280)
    torch.testing.assert_close(model.classifier(features), model(x))
