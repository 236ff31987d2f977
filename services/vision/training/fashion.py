"""Fashion-MNIST as training sees it: grey pictures as RGB, so that clothes take the same way as photos."""

from __future__ import annotations

import numpy as np

from services.vision.training.data import Photos
from shared.data.fashion import read_fashion
from shared.data.locate import locate
from shared.errors import ConfigurationError

VALIDATION = 5_000
"""The last pictures of the train file; they never train anything."""


def load_clothes(split: str) -> Photos:
    """One part (`train` 55,000, `val` 5,000 or `test` 10,000) as RGB `[28, 28, 3]`.

    Raises:
        ConfigurationError: no such part, or the data set is not to be had.
    """
    slices = {"train": slice(None, -VALIDATION), "val": slice(-VALIDATION, None), "test": slice(None)}
    if split not in slices:
        raise ConfigurationError(f"split `{split}` has no pictures, expected `train`, `val` or `test`")
    part = "t10k" if split == "test" else "train"
    images, labels = read_fashion(locate("fashion_mnist"), part)
    chosen = slices[split]
    rgb = np.repeat(images[chosen, :, :, None], 3, axis=3)  # [N, 28, 28, 3]
    names = tuple(f"{part}/{index}" for index in range(len(images))[chosen])
    return Photos(names, tuple(rgb), labels[chosen])
