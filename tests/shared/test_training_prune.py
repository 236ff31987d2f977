"""Structured pruning: groups by hand, equivalence to zeroed channels, counted cost; multiply-adds against an oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from services.vision.training.models.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from shared.errors import ConfigurationError
from shared.training.channels import channel_groups
from shared.training.macs import count_macs, count_parameters, layer_costs
from shared.training.prune import PruneConfig, load_pruned, prune, recalibrate_batch_norm, remove_channels


class Residual(nn.Module):
    """Stem, one residual branch with a depthwise layer, a flattened map of 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.widen, self.depthwise = nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.inner, self.narrow = nn.BatchNorm2d(24), nn.Conv2d(24, 8, 1)
        self.classifier = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.narrow(torch.relu(self.inner(self.depthwise(self.widen(x)))))
        return self.classifier(x.flatten(1))


def lite() -> EfficientNetLite:
    torch.manual_seed(0)
    return EfficientNetLite(EfficientNetLiteConfig(width=0.5, classes=5, stem_channels=16, head_channels=64)).eval()


def batches(size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, size, size, generator=generator), torch.arange(4) % 5) for _ in range(2)]


def test_groups_of_a_residual_network_by_hand():
    stream, hidden = channel_groups(Residual())
    assert (stream.size, sorted(stream.producers), stream.followers) == (8, ["narrow", "stem"], ["norm"])
    assert sorted(stream.consumers) == ["classifier", "widen"]
    assert (hidden.size, hidden.producers, hidden.consumers) == (24, ["widen"], ["narrow"])
    assert sorted(hidden.followers) == ["depthwise", "inner"]


def test_every_layer_of_lite_is_in_a_group_and_its_logits_are_not():
    model = lite()
    groups = channel_groups(model)
    made = {name for group in groups for name in (*group.producers, *group.followers)}
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)}
    assert made == layers


@pytest.mark.parametrize("build", [Residual, lite])
def test_removing_a_channel_equals_silencing_it(build):
    """Oracle: a group whose norms give 0 in some channels computes what the network without them computes."""
    torch.manual_seed(3)
    model, size = build().eval(), 4 if build is Residual else 32
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias)
    groups = channel_groups(model)
    kept = [torch.arange(group.size)[torch.arange(group.size) % 3 != 1] for group in groups]
    silenced = build().eval()
    silenced.load_state_dict(model.state_dict())
    with torch.no_grad():
        for group, indices in zip(groups, kept, strict=True):
            gone = torch.ones(group.size, dtype=torch.bool).index_fill(0, indices, False)
            for name in group.consumers:  # whatever still comes out of a dead channel is not read
                weight = silenced.get_submodule(name).weight
                weight[:, gone.repeat_interleave(weight.shape[1] // group.size)] = 0
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(remove_channels(model, groups, kept)(x), silenced(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("criterion", ["taylor", "bn_scale", "l1"])
def test_target_is_met_and_counted_truly(criterion):
    model, example = lite(), torch.zeros(1, 3, 32, 32)
    pruned = prune(model, example, PruneConfig(share=0.4, criterion=criterion, block=4), batches())
    groups = channel_groups(model)
    assert pruned.macs_before == count_macs(model, example)
    assert pruned.macs_after == count_macs(pruned.model, example)
    assert 0.5 < pruned.macs_after / pruned.macs_before <= 0.6
    assert count_parameters(pruned.model) < count_parameters(model)
    assert all(len(indices) >= 0.25 * group.size for indices, group in zip(pruned.kept, groups, strict=True))


def test_taylor_removes_the_channels_that_do_nothing():
    """Channels whose norm has scale and shift 0 change nothing: they go first, and the answers stay."""
    model = lite()
    for block in model.blocks[1:4]:
        gone = torch.arange(0, block.depthwise.bn.num_features, 2)
        for norm in (block.expand.bn, block.depthwise.bn):
            norm.weight.data[gone], norm.bias.data[gone] = 0.0, 0.0
    pruned = prune(model, torch.zeros(1, 3, 32, 32), PruneConfig(share=0.05, block=2), batches())
    x = batches()[0][0]
    torch.testing.assert_close(pruned.model(x), model(x), atol=1e-5, rtol=1e-5)


def test_pruned_weights_load_into_an_unpruned_network():
    pruned = prune(lite(), torch.zeros(1, 3, 32, 32), PruneConfig(share=0.3, criterion="l1", block=4))
    loaded = load_pruned(lite(), pruned.model.state_dict())
    x = batches()[0][0]
    assert torch.equal(loaded.eval()(x), pruned.model(x))
    with pytest.raises(ConfigurationError, match="another network"):
        load_pruned(Residual(), pruned.model.state_dict())


def test_statistics_are_measured_anew_and_then_fit_the_data():
    model = Residual()
    x = torch.randn(64, 3, 4, 4) * 5 + 2
    recalibrate_batch_norm(model, x.split(32))
    out = model.stem(x)
    torch.testing.assert_close(model.norm.running_mean, out.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    assert model.norm.momentum == 0.1


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ConfigurationError, match="cannot remove 99%"):
        prune(lite(), torch.zeros(1, 3, 32, 32), PruneConfig(share=0.99, criterion="l1"))
    with pytest.raises(ConfigurationError, match="needs batches"):
        prune(lite(), torch.zeros(1, 3, 32, 32), PruneConfig())
    with pytest.raises(ConfigurationError, match="0 < share < 1"):
        PruneConfig(share=1.5)
    with pytest.raises(ConfigurationError, match="Softmax2d"):
        channel_groups(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Softmax2d()))


def test_multiply_adds_by_hand_and_against_torch():
    layer = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(8 * 9, 5))
    costs = layer_costs(layer, torch.zeros(1, 4, 6, 6))
    assert [cost.macs for cost in costs] == [9 * 8 * 2 * 9, 72 * 5]  # 3 x 3 positions, 8 filters of 2 x 3 x 3
    model, x = lite(), torch.zeros(1, 3, 64, 64)
    with FlopCounterMode(display=False) as oracle:
        model(x)
    assert count_macs(model, x) == oracle.get_total_flops() // 2
