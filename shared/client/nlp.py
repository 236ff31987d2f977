"""Client of usagi.nlp.v1.NlpService."""

from __future__ import annotations

from dataclasses import dataclass

from usagi.nlp.v1 import nlp_service_pb2 as pb
from usagi.nlp.v1 import nlp_service_pb2_grpc as pb_grpc

from shared.client.connection import Connection


@dataclass(frozen=True)
class TranslateOptions:
    """How to translate; empty strings mean the default model, the newest version, the variant `auto`, and None the
    service's own setting."""

    model: str = ""
    version: str = ""
    variant: str = ""
    beam: int | None = None
    n_best: int | None = None
    max_tokens: int | None = None
    length_penalty: float | None = None
    attention: bool = False

    def request(self, text: str) -> pb.TranslateRequest:
        """The request to translate `text`."""
        return pb.TranslateRequest(
            text=text,
            model=self.model,
            version=self.version,
            variant=self.variant,
            beam=self.beam,
            n_best=self.n_best,
            max_tokens=self.max_tokens,
            length_penalty=self.length_penalty,
            attention=self.attention,
        )


class NlpClient:
    """Asks about text."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = pb_grpc.NlpServiceStub(connection.channel)

    def translate(
        self, text: str, options: TranslateOptions | None = None, *, timeout: float | None = None
    ) -> pb.TranslateResponse:
        """Translates one English sentence into Japanese; raises CallFailed."""
        request = (options or TranslateOptions()).request(text)
        return self._connection.call(self._stub.Translate, request, timeout=timeout)
