"""usagi.vision.v1.VisionService: protobuf in, protobuf out; no ONNX Runtime."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from usagi.model.v1 import model_service_pb2 as model_pb
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from services.vision.serving.config import VisionConfig
from services.vision.serving.predictors import ClassifyAnswer, ClassifyQuery, ImageClassifier
from shared.errors import InvalidInput
from shared.serving.calls import deadline_of
from shared.serving.status import to_status

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
        """Classifies a stream of pictures, `stream_inflight` at once; the rest waits in the caller's window."""
        deadline = deadline_of(context)
        running: set[asyncio.Task[pb.ClassifyImagesResponse]] = set()
        try:
            async for request in request_iterator:
                running.add(asyncio.create_task(self._answer(request, deadline)))
                if len(running) >= self._inflight:
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        yield task.result()
            for next_done in asyncio.as_completed(running):
                yield await next_done
        finally:
            for task in running:
                task.cancel()

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
            response.error.CopyFrom(to_status(error, "vision"))
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
            pb.Classification(label=label, index=index, probability=probability)
            for label, index, probability in ranked
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
        ),
    )
