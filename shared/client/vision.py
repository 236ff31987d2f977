"""Client of usagi.vision.v1.VisionService."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from shared.client.connection import Connection


@dataclass(frozen=True)
class Selection:
    """Which model answers; empty strings mean the default model, the newest version, the variant `auto`."""

    model: str = ""
    version: str = ""
    variant: str = ""
    top_k: int | None = None

    def request(self, image: bytes) -> pb.ClassifyImageRequest:
        """The request to classify `image`."""
        return pb.ClassifyImageRequest(
            image=image, model=self.model, version=self.version, variant=self.variant, top_k=self.top_k
        )


class VisionClient:
    """Classifies pictures."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = pb_grpc.VisionServiceStub(connection.channel)

    def classify(
        self, image: bytes, selection: Selection | None = None, *, timeout: float | None = None
    ) -> pb.ClassifyImageResponse:
        """Classifies one encoded picture (JPEG, PNG, WebP or BMP); raises CallFailed."""
        request = (selection or Selection()).request(image)
        return self._connection.call(self._stub.ClassifyImage, request, timeout=timeout)

    def classify_many(
        self,
        images: Iterable[tuple[str, bytes]],
        selection: Selection | None = None,
        *,
        timeout: float | None = None,
    ) -> Iterator[pb.ClassifyImagesResponse]:
        """Classifies many pictures over one stream; answers come as they are ready, an error for each bad picture.

        Args:
            images: id and encoded picture of each; read as fast as the server takes them.
            selection: which model answers.
            timeout: deadline for the whole stream in seconds.
        """
        selection = selection or Selection()
        requests = (pb.ClassifyImagesRequest(id=key, request=selection.request(image)) for key, image in images)
        return self._connection.stream(self._stub.ClassifyImages, requests, timeout=timeout)
