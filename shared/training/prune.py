"""Structured pruning: whole channels are taken out, so the network really becomes smaller and faster.

Masks alone (`torch.nn.utils.prune`) leave zeros that cost as much as before. Here the weights of a group of dependent
channels (`channels.py`) are cut together. Which channels go is decided globally: in small blocks, always the block
that costs least importance for each multiply-add that it saves, until the target is reached.

Criteria, each summed over a group:
- `taylor`: `(g_gamma * gamma + g_beta * beta)^2` of the BatchNorm that scales the channel, summed over batches: the
  squared first-order change of the loss if the channel vanished (Molchanov et al. 2019, arXiv:1906.10771, equation 8);
- `bn_scale`: `|gamma|` (Liu et al. 2017, network slimming, arXiv:1708.06519);
- `l1`: the mean of the absolute weights of the filter that makes the channel (Li et al. 2017, arXiv:1608.08710).
The last two are divided by their mean over the group, since layers differ in scale.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from shared.errors import ConfigurationError
from shared.training.channels import ChannelGroup, channel_groups
from shared.training.macs import layer_costs

Criterion = Literal["taylor", "bn_scale", "l1"]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PruneConfig:
    """How much to remove, and by which measure."""

    share: float = 0.5
    """Share of the multiply-adds to remove."""
    criterion: Criterion = "taylor"
    """Measure of a channel's importance."""
    block: int = 16
    """Widths become multiples of this, a vector of the CPU: at half the multiply-adds, Lite0 in int8 takes 3.0 ms with
    blocks of 16 and 3.7 ms with blocks of 8."""
    keep: float = 0.25
    """No group loses more than all but this share of its channels."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or not 0 < self.keep <= 1 or self.block < 1:
            raise ConfigurationError(
                "pruning needs 0 < share < 1, 0 < keep <= 1 and block >= 1, "
                f"got {self.share}, {self.keep}, {self.block}"
            )


@dataclass(frozen=True)
class Pruned:
    """A pruned copy: `kept` has, for each group, the indices of the channels that stay, in their old order."""

    model: nn.Module
    kept: tuple[Tensor, ...]
    macs_before: int
    macs_after: int


def prune(
    model: nn.Module,
    example: Tensor,
    config: PruneConfig,
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    loss: Loss = nn.functional.cross_entropy,
) -> Pruned:
    """Returns a smaller copy of a network; the network itself stays as it is.

    Args:
        model: any network that `channel_groups` understands.
        example: `[1, ...]` input, on which the multiply-adds are counted.
        config: how.
        batches: inputs and targets of the training part; only `taylor` needs them.
        loss: `(outputs, targets) -> scalar` that `taylor` differentiates.

    Raises:
        ConfigurationError: the target cannot be reached with so many channels kept, or `taylor` has no batches.
    """
    groups = channel_groups(model)
    importance = _importance(model, groups, config.criterion, batches, loss)
    budget = _Budget(model, groups, example)
    before = budget.total()
    widths = _choose_widths(groups, importance, budget, config)
    kept = tuple(
        scores.argsort(descending=True, stable=True)[:width].sort().values
        for scores, width in zip(importance, widths, strict=True)
    )
    smaller = remove_channels(model, groups, kept)
    return Pruned(smaller, kept, before, budget.total())


def remove_channels(model: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> nn.Module:
    """A copy of `model` whose groups have only the channels `kept`, an index tensor for each group."""
    smaller = copy.deepcopy(model)
    for group, indices in zip(groups, kept, strict=True):
        for name in group.producers:
            _cut(smaller.get_submodule(name), 0, indices)
        for name in group.followers:
            _cut(smaller.get_submodule(name), 0, indices)
        for name in group.consumers:
            module = smaller.get_submodule(name)
            repeats = _weight(module).shape[1] // group.size
            spread = (indices[:, None] * repeats + torch.arange(repeats)).flatten()  # pixels of a flattened map
            _cut(module, 1, spread)
    return smaller


def load_pruned(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Gives an unpruned network the shapes and the weights of a pruned one's state; returns the network.

    Raises:
        ConfigurationError: the state belongs to another network.
    """
    own = model.state_dict()
    if set(own) != set(state) or any(own[name].ndim != state[name].ndim for name in own):
        raise ConfigurationError("the pruned weights belong to another network; prune again")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            prefix = f"{name}." if name else ""
            for key in (*module._parameters, *module._buffers):
                if f"{prefix}{key}" in state:
                    _replace(module, key, state[f"{prefix}{key}"].clone())
            _fit_attributes(module)
    model.load_state_dict(dict(state))
    return model


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Measures the statistics of every BatchNorm anew, as plain averages over the batches `[B, ...]`.

    Taking channels out changes what the next layers see; without this the accuracy after pruning says little.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    training = model.training
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    for batch in inputs:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)


def _importance(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
) -> list[Tensor]:
    """`[size]` for each group; higher stays."""
    if criterion == "taylor":
        return _taylor(model, groups, batches, loss)
    scores = []
    for group in groups:
        norms, producers = _norms(model, group), [model.get_submodule(name) for name in group.producers]
        if criterion == "bn_scale" and norms:
            score = torch.stack([norm.weight.detach().abs() for norm in norms]).sum(0)
        else:
            filters = [_weight(module).flatten(1).abs().mean(1) for module in producers]
            score = torch.stack(filters).sum(0)
        scores.append(score / score.mean())
    return scores


def _taylor(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[tuple[Tensor, Tensor]], loss: Loss
) -> list[Tensor]:
    measured = copy.deepcopy(model).eval().requires_grad_(True)
    scores = [torch.zeros(group.size) for group in groups]
    count = 0
    for inputs, targets in batches:
        measured.zero_grad()
        loss(measured(inputs), targets).backward()  # type: ignore[no-untyped-call]
        for group, score in zip(groups, scores, strict=True):
            score += _first_order_change(measured, group)
        count += 1
    if not count:
        raise ConfigurationError("the criterion `taylor` needs batches of the training part")
    return [score / count for score in scores]


def _first_order_change(model: nn.Module, group: ChannelGroup) -> Tensor:
    """`[size]`: squared sum of weight times gradient, of the norms, or of the filters where there is no norm."""
    layers: list[nn.Module] = [*_norms(model, group)] or [model.get_submodule(name) for name in group.producers]
    total = torch.zeros(group.size)
    for layer in layers:
        change = torch.zeros(group.size)
        for parameter in layer.parameters():
            if parameter.grad is not None:
                change += (
                    (parameter.detach() * parameter.grad)
                    .flatten(1 if parameter.ndim > 1 else 0)
                    .reshape(group.size, -1)
                    .sum(1)
                )
        total += change**2
    return total


def _norms(model: nn.Module, group: ChannelGroup) -> list[nn.BatchNorm2d]:
    followers = [model.get_submodule(name) for name in group.followers]
    return [module for module in followers if isinstance(module, nn.BatchNorm2d)]


class _Budget:
    """Multiply-adds as a function of the widths of the groups."""

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup], example: Tensor) -> None:
        self.widths = [group.size for group in groups]
        self.sizes = tuple(self.widths)
        made_by = {name: index for index, group in enumerate(groups) for name in group.producers}
        read_by = {name: index for index, group in enumerate(groups) for name in group.consumers}
        passed_by = {name: index for index, group in enumerate(groups) for name in group.followers}
        self.layers = [
            (cost.macs, [i[cost.name] for i in (made_by, read_by, passed_by) if cost.name in i])
            for cost in layer_costs(model, example)
        ]

    def total(self) -> int:
        """At the current widths."""
        return round(sum(self._cost(layer) for layer in self.layers))

    def saving(self, group: int, channels: int) -> float:
        """What a group's loss of so many channels would save."""
        touched = [layer for layer in self.layers if group in layer[1]]
        before = sum(self._cost(layer) for layer in touched)
        self.widths[group] -= channels
        after = sum(self._cost(layer) for layer in touched)
        self.widths[group] += channels
        return before - after

    def _cost(self, layer: tuple[int, list[int]]) -> float:
        macs, indices = layer
        share = 1.0
        for index in indices:
            share *= self.widths[index] / self.sizes[index]
        return macs * share


def _choose_widths(
    groups: Sequence[ChannelGroup], importance: Sequence[Tensor], budget: _Budget, config: PruneConfig
) -> list[int]:
    """Removes block after block until the target is met; `budget` ends at the chosen widths."""
    ranked = [scores.sort().values.double() for scores in importance]
    target = (1 - config.share) * budget.total()
    while budget.total() > target:
        best, best_price, best_count = -1, float("inf"), 0
        for index, group in enumerate(groups):
            width = budget.widths[index]
            count = width % config.block or config.block
            if width - count < max(1, config.keep * group.size):
                continue
            gone = group.size - width
            price = float(ranked[index][gone : gone + count].sum()) / budget.saving(index, count)
            if price < best_price:
                best, best_price, best_count = index, price, count
        if best < 0:
            raise ConfigurationError(
                f"cannot remove {config.share:.0%} of the multiply-adds and keep {config.keep:.0%} of each group"
            )
        budget.widths[best] -= best_count
    return list(budget.widths)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _cut(module: nn.Module, dimension: int, indices: Tensor) -> None:
    """Keeps `indices` of one dimension of a layer's weight and, for outputs, of everything else it holds."""
    for key, value in [*module._parameters.items(), *module._buffers.items()]:
        if value is not None and value.ndim > dimension and (dimension == 0 or key == "weight"):
            _replace(module, key, value.detach().index_select(dimension, indices))
    _fit_attributes(module)


def _replace(module: nn.Module, key: str, value: Tensor) -> None:
    if key in module._parameters:
        module._parameters[key] = nn.Parameter(value)
    else:
        module._buffers[key] = value


def _fit_attributes(module: nn.Module) -> None:
    """Lets a layer's own description follow its weight."""
    if isinstance(module, nn.BatchNorm2d):
        module.num_features = len(module.weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        outputs, inputs = module.weight.shape[:2]
        if module.groups == module.out_channels:  # depthwise: a filter for each channel
            module.groups = outputs
        module.out_channels, module.in_channels = outputs, inputs * module.groups
