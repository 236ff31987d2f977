"""Magnitude pruning: the smallest weights become zeros and stay zeros while the rest is trained again.

Han et al. 2015 (arXiv:1506.02626); the threshold is `alpha` standard deviations of a layer's weights, as Sasaki et al.
chose it. Zeros save space where weights are stored sparsely or compressed, and no time in dense kernels; whole channels
(`prune.py`) do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shared.errors import ConfigurationError


class Mask(nn.Module):
    """Multiplies a weight by zeros and ones; the gradient of what is zero is zero."""

    keep: Tensor

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)

    def forward(self, weight: Tensor) -> Tensor:
        """The shape of `weight`."""
        return weight * self.keep


def mask_small_weights(model: nn.Module, layers: Iterable[str], alpha: float) -> nn.Module:
    """A copy whose named layers lose every weight below `alpha` standard deviations of the layer.

    Raises:
        ConfigurationError: `alpha` is negative, or a layer keeps no weight.
    """
    if alpha < 0:
        raise ConfigurationError(f"alpha is {alpha}, expected 0 or more")
    masked = copy.deepcopy(model)
    for name in layers:
        layer = masked.get_submodule(name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        keep = weight.detach().abs() >= alpha * weight.detach().std()
        if not keep.any():
            raise ConfigurationError(f"layer `{name}` keeps no weight at alpha {alpha}; use a smaller one")
        parametrize.register_parametrization(layer, "weight", Mask(keep.to(weight.dtype)))
    return masked


def finish_masks(model: nn.Module) -> nn.Module:
    """Writes the zeros into the weights and takes the masks out, in place; returns the model."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return model


def removed_share(model: nn.Module, layers: Iterable[str]) -> float:
    """Share of the named layers' weights that are zero."""
    weights = [model.get_submodule(name).weight for name in layers]
    zeros = sum(int((weight == 0).sum()) for weight in weights if isinstance(weight, Tensor))
    return zeros / sum(weight.numel() for weight in weights if isinstance(weight, Tensor))


def zeros_of_file(path: Path) -> dict[str, float]:
    """Share of zeros in every weight matrix or filter of an ONNX file, by name: the count that needs no torch."""
    found = {}
    for tensor in onnx.load(str(path)).graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim > 1 and np.issubdtype(values.dtype, np.floating):
            found[tensor.name] = float((values == 0).mean())
    return found


def erf_share(alpha: float) -> float:
    """Share of normally distributed weights within `alpha` standard deviations: `erf(alpha / sqrt 2)`."""
    return float(torch.erf(torch.tensor(alpha / 2**0.5)))
