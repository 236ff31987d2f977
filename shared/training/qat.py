"""Quantisation-aware training: the network learns while its weights and activations are rounded to 8 bits.

The forward pass rounds as the integer graph will; the backward pass lets the gradient through unchanged inside the
range and stops it outside (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432; Jacob et al. 2018).
BatchNorm is folded into the convolutions first, since that is what will be quantised. `finish_qat` leaves plain layers
whose weights lie on the int8 grid; ONNX Runtime's per-channel scales are the same, so quantising loses nothing more of
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from shared.errors import ConfigurationError
from shared.training.export import fold_batch_norm

QUANTISED = (nn.Conv2d, nn.Linear)


class FakeQuantise(torch.autograd.Function):
    """`scale * (clip(round(x / scale) + zero_point) - zero_point)`, with the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
        """The shape of `x`; `scale` and `zero_point` broadcast to it."""
        q = torch.round(x / scale) + zero_point
        ctx.save_for_backward((q >= lowest) & (q <= highest))
        return (q.clamp(lowest, highest) - zero_point) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Gradient by `x`."""
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None, None


class WeightQuantiser(nn.Module):
    """Rounds a weight `[O, ...]` to int8, symmetric, with a scale for each output."""

    def forward(self, weight: Tensor) -> Tensor:
        """The shape of `weight`."""
        largest = weight.detach().abs().flatten(1).amax(1)
        scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny).reshape(-1, *[1] * (weight.ndim - 1))
        rounded: Tensor = FakeQuantise.apply(weight, scale, torch.zeros_like(scale), -127, 127)  # type: ignore[no-untyped-call]
        return rounded


class ActivationQuantiser(nn.Module):
    """Rounds a tensor to uint8 over a range that follows the batches while training (a moving average)."""

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, momentum: float = 0.05) -> None:
        super().__init__()
        self.momentum = momentum
        for name in ("low", "high", "seen"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """The shape of `x`."""
        if self.training:
            self._follow(x.detach())
        scale = ((self.high - self.low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
        zero_point = torch.round(-self.low / scale).clamp(0, 255)
        rounded: Tensor = FakeQuantise.apply(x, scale, zero_point, 0, 255)  # type: ignore[no-untyped-call]
        return rounded

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
        weight = self.momentum if self.seen else 1.0
        self.low.lerp_(low, weight)
        self.high.lerp_(high, weight)
        self.seen.fill_(1)


class _QuantisedInput(nn.Module):
    """A layer whose input is rounded first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.quantiser, self.layer = ActivationQuantiser(), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.quantiser(x))  # type: ignore[no-any-return]


def prepare_qat(model: nn.Module) -> nn.Module:
    """A copy with BatchNorm folded and every convolution and linear layer rounding its weight and its input.

    Raises:
        ConfigurationError: a BatchNorm has no convolution before it to be folded into.
    """
    folded = fold_batch_norm(model).requires_grad_(True)
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    if left:
        raise ConfigurationError(f"BatchNorm `{left[0]}` follows no convolution; this network cannot be trained so")
    for parent in list(folded.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QUANTISED):
                parametrize.register_parametrization(child, "weight", WeightQuantiser())
                setattr(parent, name, _QuantisedInput(child))
    return folded


def finish_qat(model: nn.Module) -> nn.Module:
    """Takes the rounding out again, in place: plain layers, weights on the int8 grid; returns the model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _QuantisedInput):
                parametrize.remove_parametrizations(child.layer, "weight", leave_parametrized=True)
                setattr(parent, name, child.layer)
    return model.eval()
