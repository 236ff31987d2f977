"""Client of usagi.model.v1.ModelService: which models there are."""

from __future__ import annotations

from collections.abc import Iterator

from usagi.model.v1 import model_service_pb2 as pb
from usagi.model.v1 import model_service_pb2_grpc as pb_grpc

from shared.client.connection import Connection


class ModelsClient:
    """Lists models: of all services through the gateway's catalog, of one if the connection names a service."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = pb_grpc.ModelServiceStub(connection.channel)

    def list(self, page_size: int = 100) -> Iterator[pb.Model]:
        """All models, page by page; raises CallFailed."""
        token = ""
        while True:
            request = pb.ListModelsRequest(page_size=page_size, page_token=token)
            page = self._connection.call(self._stub.ListModels, request)
            yield from page.models
            token = page.next_page_token
            if not token:
                return

    def get(self, name: str, version: str = "") -> pb.GetModelResponse:
        """One model with its card; raises CallFailed."""
        return self._connection.call(self._stub.GetModel, pb.GetModelRequest(name=name, version=version))
