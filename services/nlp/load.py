"""The nlp domain's locust users: sentences as people send them, with an empty one now and then."""

from __future__ import annotations

import random
from typing import ClassVar

from usagi.nlp.v1 import nlp_service_pb2 as pb
from usagi.nlp.v1 import nlp_service_pb2_grpc as pb_grpc

from services.nlp.demo import SENTENCES
from shared.client.load import GrpcUser, WrongAnswer


class NlpUser(GrpcUser):
    """Mostly the default search, some greedy ones, and one request in ten that holds no words."""

    service = "nlp"
    _answers: ClassVar[dict[tuple[str, int], str]] = {}
    """(sentence, beam) -> translation, shared by all users."""

    def on_start(self) -> None:
        """Connects."""
        super().on_start()
        self.nlp = pb_grpc.NlpServiceStub(self.channel)

    def translate(self) -> None:
        """The search that the service chooses."""
        self._translate(4)

    def translate_greedily(self) -> None:
        """Greedy search."""
        self._translate(1)

    def translate_nothing(self) -> None:
        """A text without words must be refused, with the reason."""
        request = pb.TranslateRequest(text=" \t ")
        self.measure("Translate empty", self.nlp.Translate, request, refused_as="TEXT_EMPTY")

    def _translate(self, beam: int) -> None:
        sentence = random.choice(SENTENCES)  # noqa: S311

        def check(answer: pb.TranslateResponse) -> None:
            if not answer.hypotheses or not answer.hypotheses[0].text:
                raise WrongAnswer(f"no translation of {sentence!r}")
            text = answer.hypotheses[0].text
            first = self._answers.setdefault((sentence, beam), text)
            if first != text:
                raise WrongAnswer(f"{sentence!r} was {first} and is now {text}")

        request = pb.TranslateRequest(text=sentence, beam=beam)
        self.measure(f"Translate beam {beam}", self.nlp.Translate, request, check)

    tasks: ClassVar = {translate: 6, translate_greedily: 3, translate_nothing: 1}
