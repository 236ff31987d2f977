"""Predictors of the vision service: numpy in, numpy out; no protobuf."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from services.vision.preprocess import ClassificationPreprocessing, preprocess
from services.vision.serving.config import VisionConfig
from shared.errors import InvalidInput, ModelUnavailable
from shared.images import decode_image
from shared.serving.engine import Engine
from shared.serving.served import Served

CLASSIFICATION = "image-classification"
DEFAULT_TOP_K = 5

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ClassifyQuery:
    """What to classify and how; empty strings mean the default model, the newest version, the variant `auto`."""

    image: bytes
    model: str = ""
    version: str = ""
    variant: str = ""
    top_k: int | None = None
    deadline: float = float("inf")


@dataclass(frozen=True)
class ClassifyAnswer:
    """The `top_k` most probable classes, most probable first, and how they came about; times in seconds.

    Of a pipeline `variant` is the step that answered.
    """

    labels: list[str]
    indices: list[int]
    probabilities: list[float]
    model: str
    version: str
    variant: str
    batch_size: int
    queue_seconds: float
    preprocess_seconds: float
    infer_seconds: float
    postprocess_seconds: float
    cached: bool


class ImageClassifier:
    """Classifies encoded pictures with any model of the repository whose task is image classification."""

    def __init__(self, engine: Engine, config: VisionConfig) -> None:
        self._engine = engine
        self._config = config

    async def classify(self, query: ClassifyQuery) -> ClassifyAnswer:
        """Decodes, preprocesses, runs and ranks one picture.

        Raises:
            InvalidInput: the picture or top_k.
            ModelNotFound: model, version or variant.
            ModelUnavailable: the model is broken, unloaded or no classifier.
            Overloaded: the model's queue is full.
            DeadlinePassed: before the work began.
        """
        self._check_image_size(query.image)
        name = query.model or self._config.default_classifier
        async with self._engine.models.acquire(name, query.version, query.variant) as served:
            count = _check_top_k(query.top_k, served)
            settings = ClassificationPreprocessing.from_dict(served.manifest.preprocessing)
            pixels = self._config.max_image_pixels

            def prepare() -> Floats:
                image = decode_image(query.image, max_pixels=pixels, enough=settings.resize_side)
                return preprocess(image, settings)

            with served.batcher.admit():
                tensor, preprocess_seconds = await self._engine.offload(prepare, query.deadline)
                served.observer.preprocess.observe(preprocess_seconds)
                feeds = {served.manifest.inputs[0].name: tensor[None]}
                result = await served.batcher.submit(feeds, query.deadline)
            started = time.perf_counter()
            logits = result.outputs[served.manifest.outputs[0].name][0]
            indices, probabilities = rank(logits, count)
            postprocess_seconds = time.perf_counter() - started
            served.observer.postprocess.observe(postprocess_seconds)
            return ClassifyAnswer(
                labels=[served.manifest.labels[index] for index in indices],
                indices=indices,
                probabilities=probabilities,
                model=name,
                version=served.version,
                variant=result.exit_steps[0] if result.exit_steps else served.variant,
                batch_size=result.batch_size,
                queue_seconds=result.queue_seconds,
                preprocess_seconds=preprocess_seconds,
                infer_seconds=result.infer_seconds,
                postprocess_seconds=postprocess_seconds,
                cached=result.cached,
            )

    def _check_image_size(self, image: bytes) -> None:
        if len(image) > self._config.max_image_bytes:
            raise InvalidInput(
                "image",
                f"has {len(image)} bytes, expected at most {self._config.max_image_bytes}; send a smaller picture",
                reason="IMAGE_TOO_LARGE",
            )


def _check_top_k(top_k: int | None, served: Served) -> int:
    classes = len(served.manifest.labels)
    if served.manifest.task != CLASSIFICATION or not classes:
        raise ModelUnavailable(f"model {served.manifest.name} does {served.manifest.task}, not {CLASSIFICATION}")
    if top_k is None:
        return min(DEFAULT_TOP_K, classes)
    if not 1 <= top_k <= classes:
        raise InvalidInput("top_k", f"is {top_k}, expected 1 to {classes}, the model's number of classes")
    return top_k


def rank(logits: Floats, count: int) -> tuple[list[int], list[float]]:
    """The `count` most probable classes of one picture.

    Args:
        logits: `[N]`.
        count: 1 to N.

    Returns:
        Indices, most probable first, and their softmax probabilities; equal logits keep the order of the labels.
    """
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = shifted / shifted.sum()
    order = np.argsort(-probabilities, kind="stable")[:count]
    return order.tolist(), probabilities[order].tolist()
