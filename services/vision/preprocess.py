"""From a decoded picture to the tensor a classifier takes; numpy and OpenCV only.

Training and serving both call this module, so what a model learned from and what it is asked about cannot drift apart.
The parameters travel in the manifest: `ClassificationPreprocessing.from_dict(manifest.preprocessing)`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigurationError

RESIZE_POLICY = "short-side-centre-crop"
"""The one policy so far: short side to `resize_side`, then the middle `size` x `size`."""


@dataclass(frozen=True)
class ClassificationPreprocessing:
    """Parameters: `tensor = (crop(resize(rgb)) - mean) / std`, channels first.

    `mean` and `std` are in units of a byte (0 to 255), in the order R, G, B.
    """

    size: int = 224
    """Side of the square that the network sees, in pixels."""
    resize_side: int = 224
    """Short side after resizing, in pixels; at least `size`."""
    mean: tuple[float, float, float] = (127.0, 127.0, 127.0)
    std: tuple[float, float, float] = (128.0, 128.0, 128.0)
    policy: str = RESIZE_POLICY

    def __post_init__(self) -> None:
        if self.policy != RESIZE_POLICY:
            raise ConfigurationError(f"preprocessing policy `{self.policy}` is unknown, expected `{RESIZE_POLICY}`")
        if not 0 < self.size <= self.resize_side:
            raise ConfigurationError(
                f"preprocessing needs 0 < size <= resize_side, got size {self.size} and resize_side {self.resize_side}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigurationError("preprocessing needs three means and three positive standard deviations (R, G, B)")

    def to_dict(self) -> dict[str, Any]:
        """The parameters as plain values, for the manifest."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ClassificationPreprocessing:
        """Reads the parameters of a manifest.

        Raises:
            ConfigurationError: a parameter is missing, unknown, or of no use.
        """
        expected = {field.name for field in dataclasses.fields(cls)}
        if set(raw) != expected:
            raise ConfigurationError(
                f"manifest's preprocessing has {sorted(raw)}, expected {sorted(expected)}; publish the model again"
            )
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in raw.items()}
        return cls(**values)


def preprocess(rgb: NDArray[np.uint8], config: ClassificationPreprocessing) -> NDArray[np.float32]:
    """`[H, W, 3]` uint8 RGB → `[3, size, size]` float32, resized, cut and normalised.

    Any picture works, from one pixel to a 1:1000 strip: the part outside the middle square is cut away before resizing,
    so the work is bounded by the result and not by the long side.
    """
    return normalise(resize_and_crop(rgb, config), config)


def resize_and_crop(rgb: NDArray[np.uint8], config: ClassificationPreprocessing) -> NDArray[np.uint8]:
    """`[H, W, 3]` → `[size, size, 3]` uint8: short side to `resize_side`, then the middle square.

    The square is cut first, in the picture's own pixels, and then resized: the same area as in the other order, at less
    work.
    """
    height, width = rgb.shape[:2]
    side = max(1, round(min(height, width) * config.size / config.resize_side))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(rgb[top : top + side, left : left + side], config.size, config.size)


def resize(rgb: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """`[H, W, 3]` → `[height, width, 3]`: averages areas when it shrinks (no aliasing), interpolates when it grows."""
    if rgb.shape[:2] == (height, width):
        return rgb
    shrinks = rgb.shape[0] >= height and rgb.shape[1] >= width
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(np.ascontiguousarray(rgb), (width, height), interpolation=method), np.uint8)


def normalise(rgb: NDArray[np.uint8], config: ClassificationPreprocessing) -> NDArray[np.float32]:
    """`[H, W, 3]` uint8 → `[3, H, W]` float32.

    A byte has 256 values, so each channel is looked up in a table: a thirtieth of the time of the arithmetic.
    """
    tensor = np.empty((3, *rgb.shape[:2]), np.float32)
    for channel, (pixels, table) in enumerate(zip(cv2.split(rgb), _tables(config.mean, config.std), strict=True)):
        cv2.LUT(pixels, table, dst=tensor[channel])
    return tensor


@functools.lru_cache(maxsize=64)
def _tables(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """`[3, 256]`: what each byte of each channel becomes."""
    values = np.arange(256, dtype=np.float32)[:, None]
    return np.ascontiguousarray(((values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).T)
