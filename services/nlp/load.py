"""The nlp domain's locust users: sentences as people send them, with an empty one now and then."""

from __future__ import annotations

import random
from typing import ClassVar

from usagi.nlp.v1 import nlp_service_pb2 as pb
from usagi.nlp.v1 import nlp_service_pb2_grpc as pb_grpc

from services.nlp.demo import SENTENCES
from shared.client.load import GrpcUser, WrongAnswer


class NlpUser(GrpcUser):
    """Mostly the default, some greedy searches, and one request in ten that holds no words.

    A translation must not change, whoever shares its steps.
    """

    service = "nlp"
    _answers: ClassVar[dict[tuple[str, int], str]] = {}
    """(Sentence, beam) -> translation, shared by all users; beam 0 is the service's default."""

    def on_start(self) -> None:
        """Connects."""
        super().on_start()
        self.nlp = pb_grpc.NlpServiceStub(self.channel)

    def translate(self) -> None:
        """The search and the variant that the service chooses."""
        self._translate(pb.TranslateRequest(text=random.choice(SENTENCES)), "Translate")  # noqa: S311

    def translate_greedily(self) -> None:
        """Greedy search."""
        request = pb.TranslateRequest(text=random.choice(SENTENCES), beam=1)  # noqa: S311
        self._translate(request, "Translate greedy")

    def translate_nothing(self) -> None:
        """A text without words must be refused, with the reason."""
        request = pb.TranslateRequest(text=" \t ")
        self.measure("Translate empty", self.nlp.Translate, request, refused_as="TEXT_EMPTY")

    def _translate(self, request: pb.TranslateRequest, name: str) -> None:
        def check(answer: pb.TranslateResponse) -> None:
            if not answer.hypotheses or not answer.hypotheses[0].text:
                raise WrongAnswer(f"no translation of {request.text!r}")
            text = answer.hypotheses[0].text
            first = self._answers.setdefault((request.text, request.beam), text)
            if first != text:
                raise WrongAnswer(f"{request.text!r} was {first} and is now {text}")

        self.measure(name, self.nlp.Translate, request, check)

    tasks: ClassVar = {translate: 6, translate_greedily: 3, translate_nothing: 1}
