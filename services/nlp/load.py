"""The nlp domain's locust users: sentences as people send them, texts, sums, and now and then what must be refused."""

from __future__ import annotations

import random
from typing import Any, ClassVar

from usagi.nlp.v1 import nlp_service_pb2 as pb
from usagi.nlp.v1 import nlp_service_pb2_grpc as pb_grpc

from services.nlp.demo import GAPS, SENTENCES
from shared.client.load import GrpcUser, WrongAnswer

SUMS = ((0, 0), (7, 5), (9, 90), (99, 1), (58, 67), (99, 99))
SEEDS = 8


class NlpUser(GrpcUser):
    """Mostly translations, texts, sums and gaps, and now and then what must be refused.

    A translation must not change, nor a text with its seed, whoever shares their steps.
    """

    service = "nlp"
    _answers: ClassVar[dict[tuple[str, int, str], str]] = {}
    """(Sentence, beam, model) -> translation, (prompt, seed, model) -> text, (text with a gap, 0, "fill") -> filled,
    shared by all users; beam 0 and no model are the service's defaults."""

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

    def translate_by_gru(self) -> None:
        """By the recurrent translator."""
        request = pb.TranslateRequest(text=random.choice(SENTENCES), model="enja-gru")  # noqa: S311
        self._translate(request, "Translate GRU")

    def translate_nothing(self) -> None:
        """A text without words must be refused, with the reason."""
        request = pb.TranslateRequest(text=" \t ")
        self.measure("Translate empty", self.nlp.Translate, request, refused_as="TEXT_EMPTY")

    def fill_mask(self) -> None:
        """A gap, whose answer must not change."""
        text = random.choice(GAPS)  # noqa: S311

        def check(answer: pb.FillMaskResponse) -> None:
            if (known := self._answers.setdefault((text, 0, "fill"), answer.text)) != answer.text:
                raise WrongAnswer(f"{text!r} was {known} and is now {answer.text}")

        self.measure("FillMask", self.nlp.FillMask, pb.FillMaskRequest(text=text), check)

    def embed(self) -> None:
        """A vector, which must have length 1."""

        def check(answer: pb.EmbedTextResponse) -> None:
            length = sum(value * value for value in answer.embedding)
            if abs(length - 1) > 1e-3:
                raise WrongAnswer(f"a vector of length {length**0.5:.4f}")

        request = pb.EmbedTextRequest(text=random.choice(SENTENCES))  # noqa: S311
        self.measure("EmbedText", self.nlp.EmbedText, request, check)

    def fill_nothing(self) -> None:
        """A text without a gap must be refused, with the reason."""
        request = pb.FillMaskRequest(text="no gap here")
        self.measure("FillMask without a gap", self.nlp.FillMask, request, refused_as="MASK_MISSING")

    def continue_text(self) -> None:
        """A text of a few dozen characters; its seed decides it."""
        prompt, seed = "ROMEO:\n", random.randrange(SEEDS)  # noqa: S311
        request = pb.GenerateTextRequest(prompt=prompt, seed=seed, max_tokens=40)

        def check(answer: pb.GenerateTextResponse) -> None:
            first = self._answers.setdefault((prompt, seed, request.model), answer.text)
            if first != answer.text:
                raise WrongAnswer(f"the text of seed {seed} was {first!r} and is now {answer.text!r}")

        self.measure("GenerateText", self._whole_text, request, check)

    def add(self) -> None:
        """A sum, which must be right."""
        one, other = random.choice(SUMS)  # noqa: S311
        request = pb.GenerateTextRequest(prompt=f"{one}+{other}=", model="adder-gpt")

        def check(answer: pb.GenerateTextResponse) -> None:
            if answer.text != str(one + other):
                raise WrongAnswer(f"{one}+{other}={answer.text}")

        self.measure("GenerateText sum", self._whole_text, request, check)

    def add_nothing(self) -> None:
        """What is no sum must be refused."""
        request = pb.GenerateTextRequest(prompt="one and one", model="adder-gpt")
        self.measure("GenerateText no sum", self._whole_text, request, refused_as="PROMPT_NOT_UNDERSTOOD")

    def _whole_text(self, request: pb.GenerateTextRequest, **options: Any) -> pb.GenerateTextResponse:
        """The last answer of a stream with the text of all."""
        answers = list(self.nlp.GenerateText(request, **options))
        answers[-1].text = "".join(answer.text for answer in answers)
        return answers[-1]

    def _translate(self, request: pb.TranslateRequest, name: str) -> None:
        def check(answer: pb.TranslateResponse) -> None:
            if not answer.hypotheses or not answer.hypotheses[0].text:
                raise WrongAnswer(f"no translation of {request.text!r}")
            text = answer.hypotheses[0].text
            first = self._answers.setdefault((request.text, request.beam, request.model), text)
            if first != text:
                raise WrongAnswer(f"{request.text!r} was {first} and is now {text}")

        self.measure(name, self.nlp.Translate, request, check)

    tasks: ClassVar = {
        translate: 6,
        fill_mask: 5,
        embed: 4,
        fill_nothing: 1,
        translate_greedily: 2,
        translate_by_gru: 1,
        translate_nothing: 1,
        continue_text: 2,
        add: 3,
        add_nothing: 1,
    }
