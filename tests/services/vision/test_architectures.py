"""Every registered network against published numbers: parameters, multiply-adds, shapes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from services.vision.training.models import MODELS
from services.vision.training.models.densenet import DenseLayer
from services.vision.training.models.efficientnet import (
    EFFICIENTNET_CONFIGS,
    Scaling,
    SqueezeExcitation,
    scale,
    scale_repeats,
)
from services.vision.training.models.mobilenet import InvertedResidual, separable
from services.vision.training.models.normalisation import NORMS
from services.vision.training.models.resnet import ResidualBlock, ResNet, ResNetConfig, build_block, small_resnet
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
    "densenet-bc-100-12": (10, 769_162),
    "efficientnet-b0": (1000, 5_288_548),
    "efficientnet-b1": (1000, 7_794_184),
    "efficientnet-b2": (1000, 9_109_994),
    "efficientnet-b3": (1000, 12_233_232),
    "efficientnet-b4": (1000, 19_341_616),
    "efficientnet-b5": (1000, 30_389_784),
    "efficientnet-b6": (1000, 43_040_704),
    "efficientnet-b7": (1000, 66_347_960),
}
ROUNDED = {
    "wrn-28-10": (10, 36.5, 1),
    "wrn-16-4": (10, 2.75, 2),
    "mobilenet-v1": (1000, 4.23, 2),
    "resnet20": (10, 0.27, 2),
    "resnet56": (10, 0.86, 2),  # .85 in the paper, whose shortcuts have no weights
    "resnet110": (10, 1.7, 1),
    "preact-resnet110": (10, 1.7, 1),
    "preact-resnet164": (10, 1.7, 1),
}
"""(classes, millions, decimals)"""
MULTIPLY_ADDS = {"mobilenet-v1": 569, "mobilenet-v2": 301, "resnet50": 4089, "resnet18": 1814, "efficientnet-b0": 386}
"""Millions at 224 pixels: 569 and about 300 in the papers of MobileNet; the ResNets, about 4.1 and 1.8 thousand; B0
about 390."""
GIGA_MULTIPLY_ADDS = {"b0": 0.39, "b1": 0.70, "b2": 1.0, "b3": 1.8, "b4": 4.2, "b5": 9.9, "b6": 19.0, "b7": 37.0}
"""Table 2 of the EfficientNet paper, at each network's own size."""


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


@pytest.mark.parametrize("member", GIGA_MULTIPLY_ADDS)
def test_multiply_adds_of_the_efficientnets_are_the_papers(member):
    name = f"efficientnet-{member}"
    size = EFFICIENTNET_CONFIGS[name].size
    cost = count_macs(on_meta(name), torch.zeros(1, 3, size, size, device="meta")) / 1e9
    assert cost == pytest.approx(
        GIGA_MULTIPLY_ADDS[member], rel=0.05
    )  # the paper rounds, and counts 'FLOPS' by its own rule


def test_compound_scaling_doubles_the_cost_with_each_phi():
    """`1.2 * 1.1^2 * 1.15^2 = 1.92`; the published members stand for phi 0, 0.5, 1 to 6."""
    assert scale(1).depth * scale(1).width ** 2 * scale(1).size ** 2 == pytest.approx(1.92, abs=0.002)
    assert scale(0) == Scaling(1, 1, 1)
    costs = []
    for name in (f"efficientnet-b{member}" for member in range(8)):
        size = EFFICIENTNET_CONFIGS[name].size
        costs.append(count_macs(on_meta(name), torch.zeros(1, 3, size, size, device="meta")))
    steps = [high / low / 2 ** (0.5 if index < 2 else 1) for index, (low, high) in enumerate(itertools.pairwise(costs))]
    # channels go in steps of 8, blocks are rounded up, the multipliers by hand: a quarter above, a tenth below
    assert all(0.9 < step < 1.27 for step in steps), steps


def test_repeats_are_rounded_up():
    assert [scale_repeats(count, 1.2) for count in (1, 2, 3, 4, 5)] == [2, 3, 4, 5, 6]


def test_squeeze_and_excitation_by_hand():
    layer = SqueezeExcitation(2, 1)
    with torch.no_grad():
        layer.reduce.weight.copy_(torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1))
        layer.reduce.bias.fill_(0.5)
        layer.expand.weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
        layer.expand.bias.copy_(torch.tensor([0.0, 0.25]))
    x = torch.tensor([[[[1.0, 3.0]], [[0.0, 1.0]]]])  # means 2 and 0.5
    z = 2 * 1 + 0.5 * 2 + 0.5
    s = z / (1 + math.exp(-z))  # swish
    weights = torch.tensor([1 / (1 + math.exp(-s)), 1 / (1 + math.exp(s - 0.25))])
    torch.testing.assert_close(layer(x), x * weights[None, :, None, None])


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_fits_into_a_residual_network(norm):
    model = ResNet(small_resnet(8, norm))
    logits = model(torch.randn(2, 3, 28, 28))
    logits.sum().backward()
    assert logits.shape == (2, 10)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_plain_network_has_no_shortcut():
    plain, residual = (ResNet(small_resnet(20, residual=choice)) for choice in (False, True))
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)  # weights, and scale and shift of their norms
    assert count_parameters(residual) - count_parameters(plain) == projections
    assert not any(isinstance(module, ResidualBlock) for module in plain.modules())


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
