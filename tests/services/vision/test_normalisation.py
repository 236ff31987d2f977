"""The written-out normalisations against PyTorch's, forward and backward, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from services.vision.training.models.normalisation import (
    BatchNormalisation,
    GroupNormalisation,
    Standardise,
    build_norm,
)
from shared.errors import ConfigurationError

B, C, H, W = 5, 12, 4, 3
TOLERANCE = {"atol": 1e-10, "rtol": 1e-8}  # float64; PyTorch sums in another order


class LayerNormOfMaps(nn.Module):
    """PyTorch's LayerNorm over C, H and W, with a scale and a shift for each channel."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[1:]) * self.weight[:, None, None] + self.bias[:, None, None]


PAIRS = {
    "batch": (lambda: BatchNormalisation(C), lambda: nn.BatchNorm2d(C)),
    "layer": (lambda: build_norm("layer", C), LayerNormOfMaps),
    "instance": (lambda: build_norm("instance", C), lambda: nn.InstanceNorm2d(C, affine=True)),
    "group": (lambda: GroupNormalisation(C, 3), lambda: nn.GroupNorm(3, C)),
}


def pair(name):
    """Ours and PyTorch's with the same scale and shift, in float64."""
    ours, theirs = (make().double() for make in PAIRS[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ("weight", "bias"):
            values = torch.randn(C, generator=generator, dtype=torch.float64)
            getattr(ours, parameter).copy_(values)
            getattr(theirs, parameter).copy_(values)
    return ours, theirs


def maps(seed=0):
    x = torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 3 * x + torch.arange(C)[:, None, None]  # means far from 0


@pytest.mark.parametrize("name", PAIRS)
def test_forward_and_backward_are_pytorchs(name):
    ours, theirs = pair(name)
    results = []
    for module in (ours, theirs):
        x = maps().requires_grad_()
        y = module(x)
        y.backward(maps(seed=2))
        results.append((y, x.grad, module.weight.grad, module.bias.grad))
    for own, reference in zip(*results, strict=True):
        torch.testing.assert_close(own, reference, **TOLERANCE)


def test_backward_is_the_numerical_gradient():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda value: Standardise.apply(value, (1,), 1e-5), x)


def test_running_statistics_are_pytorchs_and_decide_in_eval_mode():
    ours, theirs = pair("batch")
    for seed in range(3):
        ours(maps(seed)), theirs(maps(seed))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, **TOLERANCE)
    torch.testing.assert_close(ours.running_var, theirs.running_var, **TOLERANCE)
    one = maps(9)[:1]
    torch.testing.assert_close(ours.eval()(one), theirs.eval()(one), **TOLERANCE)


def test_running_variance_is_the_unbiased_one_by_hand():
    norm = BatchNormalisation(1, momentum=1.0)
    norm(torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1))
    assert norm.running_mean.item() == 2.0
    assert norm.running_var.item() == 2.0  # (1 + 1) / (2 - 1); the biased one would be 1


def test_eval_mode_with_frozen_statistics_passes_a_gradient():
    ours, theirs = pair("batch")
    gradients = []
    for module in (ours.eval(), theirs.eval()):
        x = maps().requires_grad_()
        module(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, **TOLERANCE)


def test_one_group_is_layer_and_a_group_for_each_channel_is_instance():
    x = maps()
    layer, instance = build_norm("layer", C).double(), build_norm("instance", C).double()
    torch.testing.assert_close(GroupNormalisation(C, 1).double()(x), layer(x))
    torch.testing.assert_close(GroupNormalisation(C, C).double()(x), instance(x))


def test_only_batch_looks_at_the_other_pictures():
    x, others = maps(), maps()
    others[1:] = 0
    for name in ("layer", "instance", "group"):
        norm = build_norm(name, C).double()
        torch.testing.assert_close(norm(x)[0], norm(others)[0], atol=0, rtol=0)
    norm = BatchNormalisation(C).double()
    assert (norm(x)[0] - norm(others)[0]).abs().max() > 0.1


def test_impossible_groups_and_names_are_refused():
    with pytest.raises(ConfigurationError, match="do not divide"):
        GroupNormalisation(12, 5)
    with pytest.raises(ConfigurationError, match="one of batch, layer"):
        build_norm("weight", 3)
    with pytest.raises(ConfigurationError, match="more than one value"):
        BatchNormalisation(3)(torch.zeros(1, 3, 1, 1))
