"""What there is to learn: a data set with its parts, labels and preprocessing, under the name that `--data` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from services.vision.preprocess import ClassificationPreprocessing
from services.vision.training.data import LABELS, AugmentConfig, Photos, load_photos
from services.vision.training.fashion import load_clothes
from shared.data.fashion import LABELS as CLOTHES
from shared.errors import ConfigurationError


@dataclass(frozen=True)
class Task:
    """One task of classification."""

    name: str
    """First part of the names of its models."""
    dataset: str
    """As in `shared.data.catalog`."""
    labels: tuple[str, ...]
    load: Callable[[str], Photos]
    """The pictures of `train`, `val` or `test`."""
    division: str
    """How the parts came about, for the manifest."""
    description: str
    """What a model of this task answers, for the manifest."""
    preprocessing: ClassificationPreprocessing = field(default_factory=ClassificationPreprocessing)
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    quick: tuple[int, int, int] = (320, 64, 128)
    """How many pictures of each part `--quick` takes."""


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="flowers",
            dataset="flowers",
            labels=LABELS,
            load=lambda part: load_photos(part),  # looked up at each call, so that a test can put its own photos there
            division="divided by services/vision/training/flowers_split.csv",
            description=(
                "Says which of five flowers a photo shows: daisy, dandelion, rose, sunflower or tulip. It knows "
                "nothing else: a photo of anything else still gets one of them."
            ),
        ),
        Task(
            name="fashion",
            dataset="fashion_mnist",
            labels=CLOTHES,
            load=lambda part: load_clothes(part),
            division="the last 5,000 pictures of its train file validate, its t10k file is the test part",
            description=(
                "Says which of ten kinds of clothes a small picture shows. It knows Fashion-MNIST only: one light "
                "piece of clothing on black, 28 x 28 grey pixels. A photo on a light background should be inverted."
            ),
            preprocessing=ClassificationPreprocessing(
                size=28, resize_side=28, mean=(73.0, 73.0, 73.0), std=(90.0, 90.0, 90.0)
            ),
            augmentation=AugmentConfig(min_area=0.75, max_stretch=1.15, brightness=0.0, contrast=0.0, saturation=0.0),
            quick=(6_400, 500, 1_000),
        ),
    )
}


def task_of_labels(labels: tuple[str, ...]) -> Task:
    """The task that a model with these labels was trained for.

    Raises:
        ConfigurationError: there is none.
    """
    for task in TASKS.values():
        if task.labels == labels:
            return task
    raise ConfigurationError(f"no task has the labels {', '.join(labels)}; known: {', '.join(TASKS)}")
