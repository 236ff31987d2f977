"""Counts a network's multiply-adds, layer by layer, on one example.

A convolution costs `H' * W' * C' * C/groups * K * K`, a linear layer `inputs * outputs`; biases, normalisation,
activations and pooling are left out, as in the tables of the papers (which call the result FLOPs, MACs or Mult-Adds).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer: `positions` are the output's pixels, so `macs` is positions times weights per position."""

    name: str
    positions: int
    macs: int
    parameters: int


def layer_costs(model: nn.Module, example: Tensor) -> list[LayerCost]:
    """The convolutions and linear layers in the order in which they run.

    Args:
        model: left in its mode; no gradients are made.
        example: `[1, ...]` input; a meta tensor with a meta model costs no time.
    """
    costs: list[LayerCost] = []
    names = {module: name for name, module in model.named_modules()}

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        positions = output[0].numel() // weight.shape[0]
        macs = positions * weight.numel()
        costs.append(LayerCost(names[module], positions, macs, sum(p.numel() for p in module.parameters())))

    hooks = [m.register_forward_hook(count) for m in names if isinstance(m, nn.Conv2d | nn.Linear)]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return costs


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of one forward pass of `[1, ...]`."""
    return sum(cost.macs for cost in layer_costs(model, example))


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers; BatchNorm's running statistics are not among them."""
    return sum(parameter.numel() for parameter in model.parameters())
