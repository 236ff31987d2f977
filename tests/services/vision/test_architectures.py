"""Every registered network against published numbers: parameters, multiply-adds, shapes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from services.vision.training.models import MODELS
from services.vision.training.models.densenet import DenseLayer
from services.vision.training.models.mobilenet import InvertedResidual, separable
from services.vision.training.models.resnet import ResNetConfig, build_block
from services.vision.training.models.wide_resnet import PreActivationBlock, WideResNetConfig
from shared.errors import ConfigurationError
from shared.training.macs import count_macs, count_parameters

PARAMETERS = {  # (classes, exactly): counted from the papers' own code; the WideResNets are published rounded
    "resnet18": (1000, 11_689_512),
    "resnet50": (1000, 25_557_032),
    "wide-resnet50-2": (1000, 68_883_240),
    "vgg16": (1000, 138_357_544),
    "densenet121": (1000, 7_978_856),
    "mobilenet-v2": (1000, 3_504_872),
}
ROUNDED = {"wrn-28-10": (10, 36.5, 1), "wrn-16-4": (10, 2.75, 2), "mobilenet-v1": (1000, 4.23, 2)}
"""(classes, millions, decimals)"""
MULTIPLY_ADDS = {"mobilenet-v1": 569, "mobilenet-v2": 301, "resnet50": 4089, "resnet18": 1814}
"""Millions at 224 pixels: 569 and about 300 in the papers of MobileNet; the ResNets, about 4.1 and 1.8 thousand."""


def on_meta(name: str, classes: int = 1000) -> torch.nn.Module:
    with torch.device("meta"):
        return MODELS.get(name)(classes, False).eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_exact(name):
    classes, expected = PARAMETERS[name]
    assert count_parameters(on_meta(name, classes)) == expected


@pytest.mark.parametrize("name", ROUNDED)
def test_parameters_round_to_the_published_figure(name):
    classes, millions, decimals = ROUNDED[name]
    assert round(count_parameters(on_meta(name, classes)) / 1e6, decimals) == millions


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_are_the_papers(name):
    assert round(count_macs(on_meta(name), torch.zeros(1, 3, 224, 224, device="meta")) / 1e6) == MULTIPLY_ADDS[name]


@pytest.mark.parametrize("name", list(MODELS))
def test_counter_agrees_with_torch_and_logits_have_a_shape(name):
    model, x = on_meta(name, 7), torch.zeros(1, 3, 224, 224, device="meta")
    with FlopCounterMode(display=False) as oracle:
        assert model(x).shape == (1, 7)
    assert count_macs(model, x) == oracle.get_total_flops() // 2


def test_separable_block_costs_the_closed_form():
    """`1/M + 1/9` of a 3x3 convolution from C to M channels."""
    cost = count_macs(separable(64, 128, 1), torch.zeros(1, 64, 14, 14))
    assert cost / (14 * 14 * 9 * 64 * 128) == pytest.approx(1 / 128 + 1 / 9)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_residual_block_with_a_silent_branch_is_the_identity(bottleneck):
    channels = 4 if bottleneck else 16
    block = build_block(ResNetConfig(bottleneck=bottleneck), 16, channels, 1).eval()
    torch.nn.init.zeros_(block.branch[-1][1].weight)
    x = torch.rand(2, 16, 5, 5)  # not negative, so that the last ReLU changes nothing
    assert torch.equal(block(x), x)


def test_preactivation_path_is_never_interrupted():
    block = PreActivationBlock(8, 8, 1, 0.0).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x)  # negative values too


def test_inverted_residual_adds_only_where_the_shape_stays():
    assert InvertedResidual(8, 8, 1, 6).residual
    assert not InvertedResidual(8, 8, 2, 6).residual
    assert not InvertedResidual(8, 16, 1, 6).residual


def test_dense_layer_keeps_what_it_was_given():
    x = torch.randn(2, 6, 4, 4)
    y = DenseLayer(6, 5)(x)
    assert y.shape == (2, 11, 4, 4)
    assert torch.equal(y[:, :6], x)


def test_impossible_depth_and_missing_weights_are_refused():
    with pytest.raises(ConfigurationError, match="6 n"):
        WideResNetConfig(depth=20)
    with pytest.raises(ConfigurationError, match="not for resnet18"):
        MODELS.get("resnet18")(5, True)
