"""Normalisation as a choice: batch, layer, instance or group, each with its forward and backward pass written out.

All four subtract a mean, divide by a standard deviation and give every channel a scale and a shift. They differ in what
the mean is taken over, for a map `[B, C, H, W]`:

- batch (Ioffe & Szegedy 2015, arXiv:1502.03167): one channel of all pictures, so it depends on the batch;
- layer (Ba et al. 2016, arXiv:1607.06450): all channels of one picture;
- instance (Ulyanov et al. 2016, arXiv:1607.08022): one channel of one picture;
- group (Wu & He 2018, arXiv:1803.08494): a group of channels of one picture; one group is layer, C groups are instance.

Networks that ship use PyTorch's BatchNorm, which is this one in a single kernel (a test compares them), and is folded
into the convolution before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shared.errors import ConfigurationError

Norm = Literal["batch", "layer", "instance", "group"]
NORMS: tuple[Norm, ...] = ("batch", "layer", "instance", "group")
GROUPS = 32
"""Of group normalisation, as in the paper; fewer where the channels do not divide by them."""


class Standardise(torch.autograd.Function):
    """`(x - mean) / sqrt(var + eps)` over the dimensions `over`, `var` being the biased variance.

    Backward, with `n` the normalised values and `s = 1 / sqrt(var + eps)`: `s (g - mean(g) - n mean(g n))`, the means
    over the same dimensions (Ioffe & Szegedy 2015, section 3, the three sums put together).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, over: tuple[int, ...], eps: float) -> Tensor:
        """Same shape as `x`."""
        mean = x.mean(over, keepdim=True)
        centred = x - mean
        inverse = torch.rsqrt((centred * centred).mean(over, keepdim=True) + eps)
        normal = centred * inverse
        ctx.save_for_backward(normal, inverse)
        ctx.over = over
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Gradient by `x`."""
        normal, inverse = ctx.saved_tensors
        along = (gradient * normal).mean(ctx.over, keepdim=True)
        return inverse * (gradient - gradient.mean(ctx.over, keepdim=True) - normal * along), None, None


class ScaleAndShift(torch.autograd.Function):
    """`weight * x + bias` for each channel of `[B, C, H, W]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Same shape as `x`."""
        ctx.save_for_backward(x, weight)
        return x * weight[:, None, None] + bias[:, None, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by `x`, `weight` and `bias`."""
        x, weight = ctx.saved_tensors
        return gradient * weight[:, None, None], (gradient * x).sum((0, 2, 3)), gradient.sum((0, 2, 3))


class _Normalisation(nn.Module):
    """A scale and a shift for each channel, at first 1 and 0."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def _scaled(self, x: Tensor) -> Tensor:
        y: Tensor = ScaleAndShift.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return y


class BatchNormalisation(_Normalisation):
    """Over the batch while training; by running statistics in eval mode.

    The running variance averages the unbiased estimate, `n / (n - 1)` times the one that normalises.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps)
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → the same shape."""
        if not self.training:
            inverse = torch.rsqrt(self.running_var + self.eps)
            return self._scaled((x - self.running_mean[:, None, None]) * inverse[:, None, None])
        self._follow(x.detach())
        return self._scaled(Standardise.apply(x, (0, 2, 3), self.eps))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        count = x.numel() // x.shape[1]
        if count < 2:
            raise ConfigurationError("batch normalisation needs more than one value a channel while training")
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class GroupNormalisation(_Normalisation):
    """Over groups of channels of one picture, the same in training and eval mode."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        if groups < 1 or channels % groups:
            raise ConfigurationError(f"{channels} channels do not divide into {groups} groups")
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` → the same shape."""
        grouped = x.reshape(x.shape[0], self.groups, -1)  # [B, G, C/G * H * W]
        normal: Tensor = Standardise.apply(grouped, (2,), self.eps)  # type: ignore[no-untyped-call]
        return self._scaled(normal.reshape(x.shape))


def build_norm(norm: Norm, channels: int) -> nn.Module:
    """The normalisation of a name, for maps of so many channels.

    Raises:
        ConfigurationError: the name is unknown.
    """
    builders: dict[str, Callable[[int], nn.Module]] = {
        "batch": nn.BatchNorm2d,
        "layer": lambda count: GroupNormalisation(count, 1),
        "instance": lambda count: GroupNormalisation(count, count),
        "group": lambda count: GroupNormalisation(count, math.gcd(GROUPS, count)),
    }
    if norm not in builders:
        raise ConfigurationError(f"normalisation `{norm}` is unknown, expected one of {', '.join(NORMS)}")
    return builders[norm](channels)
