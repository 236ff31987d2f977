"""Affine quantisation written out: `real = scale * (q - zero_point)` (Jacob et al. 2018, arXiv:1712.05877, eq. 1).

The same arithmetic as ONNX's QuantizeLinear and DequantizeLinear: `q = clip(round(x / scale) + zero_point)`, ties to
the even neighbour. What ships is made by ONNX Runtime's own tool (`quantize.py`); this module is what the tool is
checked against, and what quantisation-aware training (`qat.py`) imitates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigurationError

Floats = NDArray[np.float32]
Integers = NDArray[np.integer]
Calibration = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True)
class Affine:
    """Scale and zero point, one each or one for every channel along `axis`; both of shape `[]` or `[C]`."""

    scale: Floats
    zero_point: NDArray[np.int32]
    lowest: int
    highest: int
    axis: int | None = None

    def __post_init__(self) -> None:
        if not np.all(np.isfinite(self.scale)) or np.any(self.scale <= 0):
            raise ConfigurationError("a quantisation scale must be finite and above 0")

    @property
    def dtype(self) -> type[np.int8] | type[np.uint8]:
        """The integers' type."""
        return np.int8 if self.lowest < 0 else np.uint8

    def quantise(self, x: Floats) -> Integers:
        """Nearest integers, clipped to the range; the shape of `x`."""
        scale, zero_point = self._along(self.scale, x.ndim), self._along(self.zero_point, x.ndim)
        rounded = np.rint(np.asarray(x, np.float32) / scale) + zero_point
        return np.asarray(np.clip(rounded, self.lowest, self.highest), self.dtype)

    def dequantise(self, q: Integers) -> Floats:
        """What the integers stand for; the shape of `q`."""
        scale, zero_point = self._along(self.scale, q.ndim), self._along(self.zero_point, q.ndim)
        return np.asarray((q.astype(np.int32) - zero_point) * scale, np.float32)

    def _along(self, values: NDArray[Any], dimensions: int) -> NDArray[Any]:
        if self.axis is None:
            return values
        shape = [1] * dimensions
        shape[self.axis] = -1
        return values.reshape(shape)


def asymmetric(x: Floats, *, calibration: Calibration = "minmax", percentile: float = 99.99) -> Affine:
    """uint8 over the range of `x`, widened to hold 0, so that 0 (padding, ReLU) is represented exactly."""
    return _unsigned(*_range(x, calibration, percentile))


def symmetric(x: Floats, *, axis: int | None = None) -> Affine:
    """int8 from -127 to 127 with zero point 0; with `axis`, a scale for each channel."""
    magnitude = np.abs(np.asarray(x, np.float32))
    if axis is None:
        largest = np.asarray(magnitude.max(initial=0.0), np.float32)
    else:
        others = tuple(dimension for dimension in range(magnitude.ndim) if dimension != axis % magnitude.ndim)
        largest = magnitude.max(axis=others, initial=0.0)
    scale = np.asarray(_usable(largest / np.float32(127)), np.float32)
    return Affine(scale, np.zeros_like(scale, np.int32), -127, 127, axis)


def _unsigned(low: float, high: float) -> Affine:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = _usable(np.asarray((high - low) / 255, np.float32))
    zero_point = np.asarray(np.clip(np.rint(-np.float32(low) / scale), 0, 255), np.int32)
    return Affine(scale, zero_point, 0, 255)


def _usable(scale: Floats) -> Floats:
    """Where everything is 0 (or too small for a scale of normal size), 1: then every integer but 0 is unused."""
    return np.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale).astype(np.float32)


def _range(x: Floats, calibration: Calibration, percentile: float) -> tuple[float, float]:
    values = np.asarray(x, np.float32).ravel()
    if not len(values) or not np.all(np.isfinite(values)):
        raise ConfigurationError("calibration needs values, all of them finite")
    low, high = float(values.min()), float(values.max())
    if calibration == "percentile":
        tail = (100 - percentile) / 2
        low, high = (float(value) for value in np.percentile(values, (tail, 100 - tail)))
    elif calibration == "mse":
        bounds = [(share * low, share * high) for share in np.linspace(0.3, 1.0, 71)]
        low, high = min(bounds, key=lambda pair: _squared_error(values, _unsigned(*pair)))
    elif calibration != "minmax":
        raise ConfigurationError(f"calibration `{calibration}` is unknown, expected minmax, percentile or mse")
    return low, high


def _squared_error(values: Floats, affine: Affine) -> float:
    return float(np.square(values - affine.dequantise(affine.quantise(values))).mean())


def integer_linear(x: Integers, of_x: Affine, w: Integers, of_w: Affine, bias: Floats | None, of_y: Affine) -> Integers:
    """A linear layer in integers: `[B, I]` and `[O, I]` → `[B, O]`, with 32-bit sums (Jacob et al., equation 7).

    The bias is quantised at `scale_x * scale_w`, so it is added before anything is scaled. Weights are symmetric.
    """
    sums = (x.astype(np.int32) - of_x.zero_point) @ w.astype(np.int32).T  # [B, O]
    return _rescale(sums, of_x, of_w, bias, of_y)


def integer_conv(
    x: Integers, of_x: Affine, w: Integers, of_w: Affine, bias: Floats | None, of_y: Affine, *, padding: int = 0
) -> Integers:
    """A convolution of stride 1 in integers: `[B, C, H, W]` and `[O, C, K, K]` → `[B, O, H', W']`.

    Padded pixels hold the zero point, which stands for 0.
    """
    kernel = w.shape[2]
    centred = x.astype(np.int32) - of_x.zero_point
    padded = np.pad(centred, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(2, 3))  # [B, C, H', W', K, K]
    sums = np.einsum("bchwij,ocij->bhwo", windows, w.astype(np.int32))  # [B, H', W', O]
    return np.moveaxis(_rescale(sums, of_x, of_w, bias, of_y), -1, 1)


def _rescale(sums: NDArray[np.int32], of_x: Affine, of_w: Affine, bias: Floats | None, of_y: Affine) -> Integers:
    """`[..., O]` sums to the output's integers."""
    scale = of_x.scale * of_w.scale
    if bias is not None:
        sums = sums + np.rint(bias / scale).astype(np.int32)
    return of_y.quantise(np.asarray(sums * scale, np.float32))
