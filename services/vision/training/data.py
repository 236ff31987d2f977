"""The flower photos as training sees them: decoded once, divided by the list, augmented by (seed, epoch, index)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.vision.preprocess import ClassificationPreprocessing, normalise, preprocess, resize
from services.vision.training.split import read_split
from shared.data.locate import locate
from shared.errors import ConfigurationError
from shared.images import decode_image
from shared.training.seed import epoch_order, sample_rng

LABELS = ("daisy", "dandelion", "roses", "sunflowers", "tulips")
"""Sorted, as the network numbers them."""


@dataclass(frozen=True)
class Photos:
    """One part of the data: `images` are uint8 RGB `[H, W, 3]` of any size, `labels` is `[N]`."""

    names: tuple[str, ...]
    images: tuple[NDArray[np.uint8], ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, count: int) -> Photos:
        """The first `count` photos of a mixed order that is always the same."""
        chosen = epoch_order(0, 0, len(self))[:count]
        return Photos(tuple(self.names[i] for i in chosen), tuple(self.images[i] for i in chosen), self.labels[chosen])

    def tensors(self, config: ClassificationPreprocessing) -> Iterator[NDArray[np.float32]]:
        """Each photo as serving would see it, `[3, size, size]`."""
        return (preprocess(image, config) for image in self.images)


def load_photos(split: str) -> Photos:
    """Decodes one part (`train`, `val` or `test`) of the flower photos into memory, about 200 kB a photo.

    Raises:
        ConfigurationError: the data set is not to be had, or lacks photos of the committed list.
    """
    names = [row.file for row in read_split() if row.split == split]
    if not names:
        raise ConfigurationError(f"split `{split}` has no photos, expected `train`, `val` or `test`")
    with zipfile.ZipFile(locate("flowers")) as archive:
        missing = sorted(set(names) - set(archive.namelist()))
        if missing:
            raise ConfigurationError(
                f"data set `flowers` lacks {len(missing)} photos, first {missing[0]}; get it again"
            )
        images = tuple(decode_image(archive.read(name), field=name) for name in names)
    labels = np.array([LABELS.index(name.split("/")[0]) for name in names], np.int64)
    return Photos(tuple(names), images, labels)


@dataclass(frozen=True)
class AugmentConfig:
    """How a training photo is varied (Szegedy et al. 2015: random area and aspect ratio; flip; light colours)."""

    min_area: float = 0.35
    """Smallest share of the photo that a crop keeps."""
    max_stretch: float = 4 / 3
    """Largest aspect ratio of a crop, either way."""
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    """Largest relative changes of colour."""


def augment(rgb: NDArray[np.uint8], size: int, rng: np.random.Generator, config: AugmentConfig) -> NDArray[np.uint8]:
    """`[H, W, 3]` → `[size, size, 3]` uint8: random crop, flip and colours, all drawn from `rng`."""
    top, left, height, width = _random_crop(rgb.shape[0], rgb.shape[1], rng, config)
    patch = resize(rgb[top : top + height, left : left + width], size, size)
    if rng.random() < 0.5:
        patch = patch[:, ::-1]
    return _jitter_colours(patch, rng, config)


def _random_crop(height: int, width: int, rng: np.random.Generator, config: AugmentConfig) -> tuple[int, int, int, int]:
    area = height * width * rng.uniform(config.min_area, 1.0)
    ratio = float(np.exp(rng.uniform(-1, 1) * np.log(config.max_stretch)))
    crop_height = int(np.clip(round((area / ratio) ** 0.5), 1, height))
    crop_width = int(np.clip(round((area * ratio) ** 0.5), 1, width))
    top = int(rng.integers(0, height - crop_height + 1))
    left = int(rng.integers(0, width - crop_width + 1))
    return top, left, crop_height, crop_width


def _jitter_colours(rgb: NDArray[np.uint8], rng: np.random.Generator, config: AugmentConfig) -> NDArray[np.uint8]:
    if not (config.brightness or config.contrast or config.saturation):
        return np.ascontiguousarray(rgb)
    brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * (
        config.brightness,
        config.contrast,
        config.saturation,
    )
    x = rgb.astype(np.float32) * np.float32(brightness)
    grey = cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_RGB2GRAY)[..., None]  # [H, W, 1]
    x = grey + (x - grey) * np.float32(saturation)
    x = (x - grey.mean()) * np.float32(contrast) + grey.mean()
    return np.asarray(np.clip(x, 0, 255).round(), np.uint8)


class AugmentedBatches:
    """Training batches of a part; the last, incomplete batch of an epoch is left out.

    Every example is a pure function of (seed, epoch, index), every batch of (seed, epoch, step).
    """

    def __init__(
        self,
        photos: Photos,
        config: ClassificationPreprocessing,
        *,
        size_at: Callable[[int], int],
        batch: int,
        seed: int,
        augmentation: AugmentConfig | None = None,
    ) -> None:
        self.photos, self.config, self.size_at, self.batch_size, self.seed = photos, config, size_at, batch, seed
        self.augmentation = augmentation or AugmentConfig()
        self.steps_per_epoch = len(photos) // batch

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """`[B, 3, size, size]`, with the size of the epoch, and `[B]`."""
        order = epoch_order(self.seed, epoch, len(self.photos))
        chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
        images = np.stack([self.example(epoch, int(index)) for index in chosen])
        inputs = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
        return inputs, torch.from_numpy(self.photos.labels[chosen])

    def example(self, epoch: int, index: int) -> NDArray[np.float32]:
        """`[3, size, size]`: one photo as this epoch sees it."""
        rng = sample_rng(self.seed, epoch, index)
        return normalise(augment(self.photos.images[index], self.size_at(epoch), rng, self.augmentation), self.config)


class TensorBatches:
    """Batches of examples that are tensors already, such as cached features: `inputs` `[N, ...]`, `labels` `[N]`."""

    def __init__(self, inputs: Tensor, labels: Tensor, *, batch: int, seed: int) -> None:
        self.inputs, self.labels, self.batch_size, self.seed = inputs, labels, batch, seed
        self.steps_per_epoch = len(labels) // batch

    def batch(self, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """`[B, ...]` and `[B]`."""
        order = epoch_order(self.seed, epoch, len(self.labels))
        chosen = torch.from_numpy(order[step * self.batch_size : (step + 1) * self.batch_size])
        return self.inputs[chosen], self.labels[chosen]
