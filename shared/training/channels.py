"""Which channels of a network belong together: the dependency graph of structured pruning.

A channel cannot be removed from one layer alone. The layer that makes it, the normalisation and the depthwise
convolution that pass it on, the layers that read it and every residual branch that is added to it must all let go of
the same channel (Fang et al. 2023, DepGraph, arXiv:2301.12900). The groups are found by walking the traced graph once:
a convolution or linear layer opens a new group, channel-wise layers hand theirs on, an addition merges two.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from shared.errors import ConfigurationError

LEAVES = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
CHANNELWISE_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Dropout,
    nn.Identity,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
)
CHANNELWISE_FUNCTIONS = (F.relu, F.relu6, F.silu, F.dropout, F.max_pool2d, F.avg_pool2d, torch.relu, torch.flatten)
CHANNELWISE_METHODS = ("mean", "flatten", "relu", "contiguous")
ADDITIONS = (operator.add, operator.iadd, torch.add)


@dataclass
class ChannelGroup:
    """Channels that stay or go together, as names of modules.

    `producers` make them (dimension 0 of their weight), `followers` hold one entry for each of them (BatchNorm,
    depthwise convolutions), `consumers` read them (dimension 1). `fixed` groups are the network's input and output.
    """

    size: int
    producers: list[str] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    fixed: bool = False

    def absorb(self, other: ChannelGroup) -> None:
        """Takes over another group's members."""
        self.producers += other.producers
        self.followers += other.followers
        self.consumers += other.consumers
        self.fixed |= other.fixed


class _LayerTracer(fx.Tracer):
    """Takes whole layers as leaves, subclasses too, whatever they compute inside."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)


def channel_groups(model: nn.Module) -> list[ChannelGroup]:
    """The groups of channels that may be pruned, in the order in which the network makes them.

    Raises:
        ConfigurationError: an operation is not understood; the message names it.
    """
    walk = _Walk(model)
    for node in _LayerTracer().trace(model).nodes:
        walk.visit(node)
    return [group for group in walk.distinct() if not group.fixed]


class _Walk:
    """Carries the group of each value through the graph."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.groups: list[ChannelGroup] = []
        self.of: dict[fx.Node, int] = {}
        self.merged: dict[int, int] = {}

    def distinct(self) -> list[ChannelGroup]:
        return [group for index, group in enumerate(self.groups) if index not in self.merged]

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._open(node, ChannelGroup(0, fixed=True))
        elif node.op == "call_module":
            self._visit_module(node, self.model.get_submodule(str(node.target)))
        elif node.op == "output":
            for value in _tensors(node):
                self._group(value).fixed = True
        elif node.op in ("call_function", "call_method"):
            self._visit_operation(node)
        else:
            raise ConfigurationError(f"pruning does not understand the node `{node}` ({node.op})")

    def _visit_module(self, node: fx.Node, module: nn.Module) -> None:
        name, source = str(node.target), _tensors(node)[0]
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            self._follow(node, source, name)
            if module.groups != module.in_channels or module.out_channels != module.in_channels:
                self._group(source).fixed = True  # grouped, or several outputs a channel: leave it whole
        elif isinstance(module, nn.Conv2d | nn.Linear):
            self._group(source).consumers.append(name)
            self._open(node, ChannelGroup(int(module.weight.shape[0]), producers=[name]))
        elif isinstance(module, nn.BatchNorm2d):
            self._follow(node, source, name)
        elif isinstance(module, CHANNELWISE_MODULES):
            self.of[node] = self.of[source]
        else:
            raise ConfigurationError(f"pruning does not understand the layer `{name}` ({type(module).__name__})")

    def _visit_operation(self, node: fx.Node) -> None:
        sources = _tensors(node)
        if node.target in ADDITIONS and len(sources) == 2:
            self.of[node] = self._merge(self.of[sources[0]], self.of[sources[1]])
        elif node.target is torch.cat:
            for source in sources:
                self._group(source).fixed = True
            self._open(node, ChannelGroup(0, fixed=True))
        elif node.target in CHANNELWISE_FUNCTIONS or node.target in CHANNELWISE_METHODS:
            self.of[node] = self.of[sources[0]]
        else:
            raise ConfigurationError(f"pruning does not understand the operation `{node.target}`")

    def _open(self, node: fx.Node, group: ChannelGroup) -> None:
        self.of[node] = len(self.groups)
        self.groups.append(group)

    def _follow(self, node: fx.Node, source: fx.Node, name: str) -> None:
        self._group(source).followers.append(name)
        self.of[node] = self.of[source]

    def _group(self, node: fx.Node) -> ChannelGroup:
        return self.groups[self._find(self.of[node])]

    def _find(self, index: int) -> int:
        while index in self.merged:
            index = self.merged[index]
        return index

    def _merge(self, one: int, other: int) -> int:
        first, second = sorted((self._find(one), self._find(other)))
        if first != second:
            self.groups[first].absorb(self.groups[second])
            self.merged[second] = first
        return first


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, lists opened."""
    found: list[Any] = []
    for argument in node.args:
        found += argument if isinstance(argument, list | tuple) else [argument]
    return [argument for argument in found if isinstance(argument, fx.Node)]
