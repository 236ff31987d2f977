"""The vision domain's locust users: photos as people send them, with a broken one now and then."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.model.v1 import model_service_pb2_grpc as model_grpc
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from shared.client.load import GrpcUser, WrongAnswer

PHOTOS = sorted(Path("tests/data/flowers").glob("*.jpg"))
SUM_TOLERANCE = 1e-3  # probabilities are float32 and come from at most int8 logits


class VisionUser(GrpcUser):
    """Mostly the default variant, some fp32, the list of models, and one picture in ten that is cut short."""

    service = "vision"
    _answers: ClassVar[dict[tuple[str, str], str]] = {}
    """(photo, variant) -> label, shared by all users."""

    def on_start(self) -> None:
        """Connects and reads the photos."""
        super().on_start()
        self.photos = {path.name: path.read_bytes() for path in PHOTOS}
        if not self.photos:
            raise RuntimeError("no photos in tests/data/flowers; run locust from the repository's root")
        self.vision = pb_grpc.VisionServiceStub(self.channel)
        self.models = model_grpc.ModelServiceStub(self.channel)

    def classify(self) -> None:
        """The variant that the service chooses."""
        self._classify("")

    def classify_fp32(self) -> None:
        """The uncompressed variant."""
        self._classify("fp32")

    def list_models(self) -> None:
        """What the console and the command line ask first."""
        self.measure("ListModels", self.models.ListModels, model_pb.ListModelsRequest(), _check_models)

    def classify_truncated(self) -> None:
        """A picture that ends early must be refused, with the reason, and harm nobody else."""
        photo = random.choice(list(self.photos.values()))  # noqa: S311
        request = pb.ClassifyImageRequest(image=photo[: len(photo) // 2])
        self.measure("ClassifyImage truncated", self.vision.ClassifyImage, request, refused_as="IMAGE_TRUNCATED")

    def _classify(self, variant: str) -> None:
        name, photo = random.choice(list(self.photos.items()))  # noqa: S311

        def check(answer: pb.ClassifyImageResponse) -> None:
            _check_classes(answer, variant)
            label = answer.classifications[0].label
            first = self._answers.setdefault((name, answer.info.variant), label)
            if first != label:
                raise WrongAnswer(f"{name} was {first} and is now {label}")

        request = pb.ClassifyImageRequest(image=photo, variant=variant)
        self.measure(f"ClassifyImage {variant or 'auto'}", self.vision.ClassifyImage, request, check)

    tasks: ClassVar = {classify: 6, classify_fp32: 2, list_models: 1, classify_truncated: 1}


def _check_classes(answer: pb.ClassifyImageResponse, variant: str) -> None:
    probabilities = [entry.probability for entry in answer.classifications]
    if not probabilities or probabilities != sorted(probabilities, reverse=True):
        raise WrongAnswer(f"probabilities {probabilities}, expected some, largest first")
    if not 0 < sum(probabilities) < 1 + SUM_TOLERANCE:
        raise WrongAnswer(f"probabilities add up to {sum(probabilities)}")
    if variant and answer.info.variant != variant:
        raise WrongAnswer(f"answered by {answer.info.variant}, expected {variant}")
    if answer.info.batch_size < 1:
        raise WrongAnswer(f"batch of {answer.info.batch_size}")


def _check_models(answer: Any) -> None:
    states = {model.name: model.state for model in answer.models}
    if not states or model_pb.MODEL_STATE_FAILED in states.values():
        raise WrongAnswer(f"models {states}, expected at least one and none failed")
