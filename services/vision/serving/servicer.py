"""usagi.vision.v1.VisionService: protobuf in, protobuf out; no ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc.aio
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from services.vision.serving.config import VisionConfig
from services.vision.serving.predictors import ClassifyAnswer, ClassifyQuery, ImageClassifier
from shared.errors import InvalidInput, UsagiError
from shared.logs import request_id
from shared.serving.calls import deadline_of
from shared.serving.status import to_status
from shared.serving.streams import answer_concurrently

log = logging.getLogger(__name__)

MAX_ID_BYTES = 128
Context = grpc.aio.ServicerContext[Any, Any]


class VisionServicer(pb_grpc.VisionServiceServicer):
    """Answers questions about pictures."""

    def __init__(self, classifier: ImageClassifier, config: VisionConfig) -> None:
        self._classifier = classifier
        self._inflight = config.stream_inflight

    async def ClassifyImage(self, request: pb.ClassifyImageRequest, context: Context) -> pb.ClassifyImageResponse:
        """Classifies one picture."""
        return _response(await self._classifier.classify(_query(request, deadline_of(context))))

    async def ClassifyImages(
        self, request_iterator: AsyncIterator[pb.ClassifyImagesRequest], context: Context
    ) -> AsyncIterator[pb.ClassifyImagesResponse]:
        """Classifies a stream of pictures, several at once."""
        deadline = deadline_of(context)

        def answer(request: pb.ClassifyImagesRequest) -> Awaitable[pb.ClassifyImagesResponse]:
            return self._answer(request, deadline)

        async for response in answer_concurrently(request_iterator, answer, self._inflight):
            yield response

    async def _answer(self, request: pb.ClassifyImagesRequest, deadline: float) -> pb.ClassifyImagesResponse:
        response = pb.ClassifyImagesResponse(id=request.id[:MAX_ID_BYTES])
        try:
            if len(request.id.encode()) > MAX_ID_BYTES:
                raise InvalidInput("id", f"has more than {MAX_ID_BYTES} bytes")
            if not request.HasField("request"):
                raise InvalidInput("request", "is not set, expected a picture to classify")
            answer = await self._classifier.classify(_query(request.request, deadline))
            response.response.CopyFrom(_response(answer))
        except Exception as error:
            if not isinstance(error, UsagiError):
                log.exception("unexpected error in a stream")
            response.error.CopyFrom(to_status(error, "vision", request_id.get()))
        return response


def _query(request: pb.ClassifyImageRequest, deadline: float) -> ClassifyQuery:
    return ClassifyQuery(
        image=request.image,
        model=request.model,
        version=request.version,
        variant=request.variant,
        top_k=request.top_k if request.HasField("top_k") else None,
        deadline=deadline,
    )


def _response(answer: ClassifyAnswer) -> pb.ClassifyImageResponse:
    ranked = zip(answer.labels, answer.indices, answer.probabilities, strict=True)
    return pb.ClassifyImageResponse(
        classifications=[
            pb.Classification(label=label, index=index, probability=probability) for label, index, probability in ranked
        ],
        info=model_pb.InferenceInfo(
            model=answer.model,
            version=answer.version,
            variant=answer.variant,
            batch_size=answer.batch_size,
            queue_seconds=answer.queue_seconds,
            preprocess_seconds=answer.preprocess_seconds,
            infer_seconds=answer.infer_seconds,
            postprocess_seconds=answer.postprocess_seconds,
            cached=answer.cached,
        ),
    )
