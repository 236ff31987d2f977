"""Client of usagi.nlp.v1.NlpService."""

from __future__ import annotations

from collections.abc import Iterator
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


@dataclass(frozen=True)
class GenerateOptions:
    """How to continue; as TranslateOptions."""

    model: str = ""
    version: str = ""
    variant: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    alternatives: int = 0

    def request(self, prompt: str) -> pb.GenerateTextRequest:
        """The request to continue `prompt`."""
        return pb.GenerateTextRequest(
            prompt=prompt,
            model=self.model,
            version=self.version,
            variant=self.variant,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
            alternatives=self.alternatives,
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

    def generate(
        self, prompt: str, options: GenerateOptions | None = None, *, timeout: float | None = None
    ) -> Iterator[pb.GenerateTextResponse]:
        """Continues a prompt, token by token; the last answer says how it ended. Raises CallFailed."""
        request = (options or GenerateOptions()).request(prompt)
        return self._connection.stream(self._stub.GenerateText, request, timeout=timeout)

    def score(
        self, text: str, *, model: str = "", version: str = "", variant: str = "", timeout: float | None = None
    ) -> pb.ScoreTextResponse:
        """Says how probable a text is, token by token; raises CallFailed."""
        request = pb.ScoreTextRequest(text=text, model=model, version=version, variant=variant)
        return self._connection.call(self._stub.ScoreText, request, timeout=timeout)

    def fill_mask(
        self, text: str, *, model: str = "", variant: str = "", top_k: int | None = None, timeout: float | None = None
    ) -> pb.FillMaskResponse:
        """Says what may stand in the place of each `[MASK]` of a text; raises CallFailed."""
        request = pb.FillMaskRequest(text=text, model=model, variant=variant, top_k=top_k)
        return self._connection.call(self._stub.FillMask, request, timeout=timeout)

    def embed(
        self, text: str, *, model: str = "", variant: str = "", timeout: float | None = None
    ) -> pb.EmbedTextResponse:
        """Turns a text into a vector of length 1; raises CallFailed."""
        request = pb.EmbedTextRequest(text=text, model=model, variant=variant)
        return self._connection.call(self._stub.EmbedText, request, timeout=timeout)

    def classify(
        self, text: str, *, model: str = "", variant: str = "", top_k: int | None = None, timeout: float | None = None
    ) -> pb.ClassifyTextResponse:
        """Says what kind of text a text is; raises CallFailed."""
        request = pb.ClassifyTextRequest(text=text, model=model, variant=variant, top_k=top_k)
        return self._connection.call(self._stub.ClassifyText, request, timeout=timeout)

    def next_sentence(
        self, first: str, second: str, *, model: str = "", variant: str = "", timeout: float | None = None
    ) -> pb.NextSentenceResponse:
        """Says how probable it is that one text follows another; raises CallFailed."""
        request = pb.NextSentenceRequest(first=first, second=second, model=model, variant=variant)
        return self._connection.call(self._stub.NextSentence, request, timeout=timeout)


def cosine(one: pb.EmbedTextResponse, other: pb.EmbedTextResponse) -> float:
    """Of the angle between two vectors of length 1."""
    return float(sum(left * right for left, right in zip(one.embedding, other.embedding, strict=True)))
