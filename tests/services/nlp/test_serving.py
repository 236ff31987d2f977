"""The nlp service over a real port: a toy translator whose right answers are known, and the shipped one."""

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from usagi.nlp.v1 import nlp_service_pb2 as pb
from usagi.nlp.v1 import nlp_service_pb2_grpc as pb_grpc

from services.nlp.preprocess import join_japanese
from services.nlp.serving.__main__ import registration
from services.nlp.serving.config import NlpConfig
from services.nlp.serving.predictors import DEFAULT_PENALTY
from shared.client.connection import CallFailed, Connection, to_call_failed
from shared.client.nlp import NlpClient, TranslateOptions
from shared.serving.session import OnnxSession
from shared.testing.server import running_server

SHIPPED = Path(__file__).parents[3] / "deploy" / "models"
SENTENCES = (
    "Yes.",
    "Show your own business.",
    "I can't tell who will arrive first.",
    "Please bear this fact in mind.",
    "She was reading a book when I came home.",
    "How long does it take to get to Tokyo?",
    "It is no use crying over spilt milk, because all the forces of the universe were bent on spilling it.",
    "He said that he would come, but he did not come, and nobody knew why.",
)


def toy_config(chain, **changes):
    settings = {"threads": 2, "default_translator": "toy"} | changes
    return NlpConfig(model_roots=(chain.root,), **settings)


@pytest.fixture(scope="module")
def toy(chain):
    config = toy_config(chain, queue_size=300)
    with running_server("nlp", config, registration(config)) as running:
        yield running


@pytest.fixture(scope="module")
def toy_client(toy):
    with Connection(toy.address) as connection:
        yield NlpClient(connection)


@pytest.fixture(scope="module")
def shipped():
    config = NlpConfig(model_roots=(SHIPPED,), threads=2)
    with running_server("nlp", config, registration(config)) as running:
        yield running.address


@pytest.fixture(scope="module")
def client(shipped):
    with Connection(shipped) as connection:
        yield NlpClient(connection)


@pytest.fixture(scope="module")
def known(chain, toy_corpus):
    """Sentence as people write it -> its translation."""
    return {
        " ".join(english[:-1]).capitalize() + ".": join_japanese(japanese)
        for english, japanese in zip(toy_corpus.english[:64], toy_corpus.japanese[:64], strict=True)
    }


class SlowSession:
    """A step's graph that takes its time, and counts its rows."""

    rows: list[int]
    seconds = 0.04

    def __init__(self, graph):
        self._inner = OnnxSession(graph)
        self._slow = "step" in str(graph)
        if self._slow:
            SlowSession.rows = []

    def run(self, feeds):
        if self._slow:
            time.sleep(self.seconds)
            self.rows.append(len(feeds["token"]))
        return self._inner.run(feeds)


@pytest.fixture
def slow(chain):
    config = toy_config(chain, queue_size=0, threads=1)
    with running_server("nlp", config, registration(config), open_session=SlowSession) as running:
        yield running


class TestToy:
    @pytest.mark.parametrize("variant", ["fp16", "int8"])
    def test_right_answers(self, toy_client, known, variant):
        right = 0
        for sentence, expected in known.items():
            answer = toy_client.translate(sentence, TranslateOptions(variant=variant))
            assert (answer.info.model, answer.info.version, answer.info.variant) == ("toy", "1", variant)
            assert not answer.unknown_words
            right += answer.hypotheses[0].text == expected
        assert right >= 60  # of 64, as in training

    def test_200_calls_half_of_them_cancelled(self, toy, toy_client, known):
        expected = {sentence: toy_client.translate(sentence).hypotheses[0].text for sentence in known}
        rng, sentences = random.Random(0), list(known)
        with grpc.insecure_channel(toy.address) as channel:
            stub = pb_grpc.NlpServiceStub(channel)
            for _ in range(2):
                calls = []
                for number in range(200):
                    sentence = rng.choice(sentences)
                    request = pb.TranslateRequest(text=sentence, beam=rng.choice((1, 2, 4, 4, 8)) if number % 2 else 16)
                    calls.append((number, sentence, request.beam, stub.Translate.future(request, timeout=30)))
                for number, *_, call in sorted(calls, key=lambda _: rng.random()):
                    if number % 2 == 0:
                        call.cancel()
                        time.sleep(rng.random() * 0.002)
                wrong = [
                    sentence
                    for number, sentence, beam, call in calls
                    if number % 2 and (beam == 4) and call.result().hypotheses[0].text != expected[sentence]
                ]
                assert wrong == []
                assert all(call.result().hypotheses for number, *_, call in calls if number % 2)
                assert sum(call.cancelled() for *_, call in calls) > 50
        assert places_taken(toy) == [0, 0]

    def test_a_short_deadline_ends_one_call_and_not_its_neighbour(self, slow, known, monkeypatch):
        monkeypatch.setattr(SlowSession, "seconds", 0.2)  # so that a busy machine does not matter
        sentence = next(iter(known))
        with grpc.insecure_channel(slow.address) as channel:
            stub = pb_grpc.NlpServiceStub(channel)
            stub.Translate(pb.TranslateRequest(text=sentence, beam=1), timeout=10)  # loads the model
            SlowSession.rows.clear()
            long = stub.Translate.future(pb.TranslateRequest(text=sentence, beam=2), timeout=10)
            started = time.monotonic()
            short = stub.Translate.future(pb.TranslateRequest(text=sentence, beam=16), timeout=0.7)
            error = short.exception()
            assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            assert time.monotonic() - started < 1.2
            assert long.result().hypotheses[0].finished
            steps = long.result().steps
        assert max(SlowSession.rows) > 2  # they ran together
        assert SlowSession.rows[-1] <= 2  # and then one of them alone
        settled = len(SlowSession.rows)
        time.sleep(0.5)
        assert len(SlowSession.rows) == settled <= steps + 5
        assert places_taken(slow) == [0, 0]

    def test_who_cancels_frees_the_service(self, slow, known):
        sentence = next(iter(known))
        with grpc.insecure_channel(slow.address) as channel:
            stub = pb_grpc.NlpServiceStub(channel)
            stub.Translate(pb.TranslateRequest(text=sentence, beam=1), timeout=10)
            SlowSession.rows.clear()
            calls = [stub.Translate.future(pb.TranslateRequest(text=sentence, beam=16), timeout=10) for _ in range(6)]
            while not SlowSession.rows:
                time.sleep(0.01)
            for call in calls:
                call.cancel()
            time.sleep(0.2)
            settled = len(SlowSession.rows)
            assert settled <= 6
            time.sleep(0.15)
            assert len(SlowSession.rows) == settled
            assert places_taken(slow) == [0, 0]
            assert stub.Translate(pb.TranslateRequest(text=sentence), timeout=10).hypotheses

    def test_a_full_queue_says_so_and_serves_those_inside(self, slow, known):
        sentence = next(iter(known))
        with grpc.insecure_channel(slow.address) as channel:
            stub = pb_grpc.NlpServiceStub(channel)
            expected = stub.Translate(pb.TranslateRequest(text=sentence, beam=1), timeout=10).hypotheses[0].text
            calls = [stub.Translate.future(pb.TranslateRequest(text=sentence, beam=1), timeout=20) for _ in range(100)]
            errors = [to_call_failed(call.exception(), slow.address) for call in calls if call.exception()]
            texts = [call.result().hypotheses[0].text for call in calls if not call.exception()]
        assert set(texts) == {expected}
        assert {(error.code, error.reason) for error in errors} == {("RESOURCE_EXHAUSTED", "QUEUE_FULL")}
        assert all(error.retry_after > 0 for error in errors)
        assert places_taken(slow) == [0, 0]


def places_taken(running):
    """Of the encoder's and the step's queue, once everything has settled."""

    async def count():
        models = running.engine.models
        async with models.acquire("toy", "", "") as encoder, models.acquire("toy-step", "", "") as step:
            for _ in range(100):
                taken = [encoder.batcher._admitted, step.batcher._admitted]
                if not any(taken):
                    break
                await asyncio.sleep(0.02)
            return taken

    return running.submit(count()).result(10)


def check_shape(answer, n_best):
    assert 1 <= len(answer.hypotheses) <= n_best
    order = [(not hypothesis.finished, -hypothesis.score) for hypothesis in answer.hypotheses]
    assert order == sorted(order)
    assert len({tuple(hypothesis.tokens) for hypothesis in answer.hypotheses}) == len(answer.hypotheses)
    for hypothesis in answer.hypotheses:
        assert hypothesis.text == join_japanese(hypothesis.words)
        assert "".join(hypothesis.tokens).replace("▁", " ").split() == list(hypothesis.words)
        assert not {"<pad>", "<bos>", "<eos>", "<unk>"} & set(hypothesis.tokens)
        assert hypothesis.log_probability < 0
        length = len(hypothesis.tokens) + hypothesis.finished
        penalty = ((5 + length) / 6) ** DEFAULT_PENALTY
        assert hypothesis.score == pytest.approx(hypothesis.log_probability / penalty, rel=1e-5)


class TestShipped:
    @pytest.mark.parametrize("sentence", SENTENCES)
    def test_answers_are_whole(self, client, sentence):
        answer = client.translate(sentence, TranslateOptions(beam=5, n_best=5, attention=True))
        check_shape(answer, 5)
        assert len(answer.hypotheses) == 5
        assert all(hypothesis.finished for hypothesis in answer.hypotheses[:1])
        assert answer.hypotheses[0].text
        assert not answer.unknown_words
        for hypothesis in answer.hypotheses:
            matrix = hypothesis.attention
            assert list(matrix.target_tokens) == [*hypothesis.tokens, *["<eos>"] * hypothesis.finished]
            assert matrix.rows == len(matrix.target_tokens)
            assert matrix.columns == len(matrix.source_tokens)
            assert matrix.source_tokens[-1] == "<eos>"
            assert "".join(matrix.source_tokens[:-1]).replace("▁", " ").split() == list(answer.source_words)
            weights = np.array(matrix.weights).reshape(matrix.rows, matrix.columns)
            assert (weights >= 0).all()
            np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-4)
        info = answer.info
        assert (info.model, info.version) == ("enja-transformer", "1")
        assert answer.steps >= len(answer.hypotheses[0].tokens)
        assert min(info.preprocess_seconds, info.infer_seconds, info.postprocess_seconds) > 0
        assert info.queue_seconds >= 0

    @pytest.mark.parametrize("sentence", SENTENCES[:5])
    def test_the_recurrent_translator(self, client, sentence):
        options = TranslateOptions(model="enja-gru", beam=3, n_best=3)
        answer = client.translate(sentence, options)
        assert (answer.info.model, answer.info.variant) == ("enja-gru", "int8")
        assert answer.hypotheses[0].finished
        for hypothesis in answer.hypotheses:
            assert hypothesis.text == join_japanese(hypothesis.words)
            assert list(hypothesis.tokens) == list(hypothesis.words)  # whole words
            assert "<unk>" not in hypothesis.words
            length = len(hypothesis.tokens) + hypothesis.finished
            penalty = ((5 + length) / 6) ** 0.6  # its own, said in its manifest
            assert hypothesis.score == pytest.approx(hypothesis.log_probability / penalty, rel=1e-5)
        assert list(client.translate(sentence, options).hypotheses) == list(answer.hypotheses)
        with pytest.raises(CallFailed) as refused:
            client.translate(sentence, TranslateOptions(model="enja-gru", attention=True))
        assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", "NO_ATTENTION")

    def test_the_same_again(self, client):
        for options in (TranslateOptions(), TranslateOptions(beam=7, n_best=7)):
            first, second = (client.translate(SENTENCES[4], options).hypotheses for _ in range(2))
            assert list(first) == list(second)

    def test_defaults(self, client):
        whole = client.translate(SENTENCES[4])
        assert len(whole.hypotheses) == 1
        assert not whole.hypotheses[0].HasField("attention")
        said = client.translate(
            SENTENCES[4],
            TranslateOptions(
                model="enja-transformer", version="1", variant="auto", beam=4, n_best=1, length_penalty=DEFAULT_PENALTY
            ),
        )
        assert [found.words for found in said.hypotheses] == [found.words for found in whole.hypotheses]
        # the penalty travels as float32
        assert said.hypotheses[0].score == pytest.approx(whole.hypotheses[0].score, rel=1e-6)

    def test_case_spaces_and_quotes_do_not_matter(self, client):
        texts = ["I can't tell.", "i CAN’T  tell .", "\tＩ　can't\ntell.", "I can\u00ad't te\u200dll."]
        answers = [client.translate(text) for text in texts]
        assert {tuple(answer.source_words) for answer in answers} == {("i", "can", "'t", "tell", ".")}
        assert len({answer.hypotheses[0].text for answer in answers}) == 1

    def test_max_tokens_cuts_off(self, client):
        for most in (1, 3):
            answer = client.translate(SENTENCES[6], TranslateOptions(max_tokens=most, beam=2, n_best=2))
            assert [(len(one.tokens), one.finished) for one in answer.hypotheses] == [(most, False)] * 2
            assert answer.steps == most
        assert client.translate(SENTENCES[0], TranslateOptions(max_tokens=200)).hypotheses[0].finished

    def test_24_at_once_get_what_each_gets_alone(self, client):
        """int8 as well: every row is rounded by itself."""
        asked = [
            (SENTENCES[number % 8], TranslateOptions(beam=1 + number % 5, attention=number % 3 == 0))
            for number in range(24)
        ]
        alone = [client.translate(*one) for one in asked]
        with ThreadPoolExecutor(24) as pool:
            together = list(pool.map(lambda one: client.translate(*one), asked))
        assert max(answer.info.batch_size for answer in together) > 5  # rows of more than one of them
        for one, other in zip(alone, together, strict=True):
            assert list(one.source_words) == list(other.source_words)
            assert one.hypotheses[0].text == other.hypotheses[0].text
            assert one.hypotheses[0].score == pytest.approx(other.hypotheses[0].score, abs=1e-4)
            np.testing.assert_allclose(
                one.hypotheses[0].attention.weights, other.hypotheses[0].attention.weights, atol=1e-4
            )

    @pytest.mark.parametrize(
        ("text", "unknown"),
        [
            ("I ate 🍣 today.", ["🍣"]),
            ("👨‍👩‍👧", ["👨", "👩", "👧"]),
            ("東京に行きます", ["東京に行きます"]),
            ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
            ("नमस्ते", None),
            ("I \x00know\x07 him.", []),
            ("\ufeffI know him.", []),
            ("�", ["�"]),
            ("...", []),
            ("?", []),
            ("a" * 60, []),
            (". " * 199, []),
        ],
    )
    def test_odd_text_gets_sensible_answers(self, client, text, unknown):
        answer = client.translate(text)
        check_shape(answer, 1)
        if unknown is not None:
            assert list(answer.unknown_words) == unknown
        assert set(answer.unknown_words) <= set(answer.source_words)

    @pytest.mark.parametrize(
        ("text", "options", "reason", "field"),
        [
            ("", {}, "TEXT_EMPTY", "text"),
            (" \t\r\n\u3000", {}, "TEXT_EMPTY", "text"),
            ("\x00\x01\x1f\x7f\u200b\u202e\ufeff", {}, "TEXT_EMPTY", "text"),
            ("a" * 100_000, {}, "TEXT_TOO_LONG", "text"),
            ("I am. " * 334, {}, "TEXT_TOO_LONG", "text"),
            ("xq" * 1000, {}, "TEXT_TOO_LONG", "text"),
            ("㎭" * 2000, {}, "TEXT_TOO_LONG", "text"),  # one character that stands for three
            ("Yes.", {"beam": 0}, "INVALID_INPUT", "beam"),
            ("Yes.", {"beam": -1}, "INVALID_INPUT", "beam"),
            ("Yes.", {"beam": 17}, "INVALID_INPUT", "beam"),
            ("Yes.", {"beam": 1000}, "INVALID_INPUT", "beam"),
            ("Yes.", {"n_best": 0}, "INVALID_INPUT", "n_best"),
            ("Yes.", {"n_best": 5}, "INVALID_INPUT", "n_best"),  # the beam is 4 of itself
            ("Yes.", {"beam": 2, "n_best": 3}, "INVALID_INPUT", "n_best"),
            ("Yes.", {"max_tokens": 0}, "INVALID_INPUT", "max_tokens"),
            ("Yes.", {"max_tokens": 201}, "INVALID_INPUT", "max_tokens"),
            ("Yes.", {"max_tokens": 10**9}, "INVALID_INPUT", "max_tokens"),
            ("Yes.", {"length_penalty": -1.0}, "INVALID_INPUT", "length_penalty"),
            ("Yes.", {"length_penalty": 2.5}, "INVALID_INPUT", "length_penalty"),
            ("Yes.", {"length_penalty": float("nan")}, "INVALID_INPUT", "length_penalty"),
            ("Yes.", {"length_penalty": float("inf")}, "INVALID_INPUT", "length_penalty"),
        ],
    )
    def test_bad_input_is_refused_by_name(self, client, text, options, reason, field):
        started = time.monotonic()
        with pytest.raises(CallFailed) as caught:
            client.translate(text, TranslateOptions(**options))
        error = caught.value
        assert (error.code, error.reason, list(error.fields)) == ("INVALID_ARGUMENT", reason, [field])
        assert error.metadata["field"] == field
        assert "expected" in error.fields[field]
        assert len(error.message) < 300
        assert time.monotonic() - started < 1.0

    @pytest.mark.parametrize(
        ("options", "code", "reason"),
        [
            ({"model": "nope"}, "NOT_FOUND", "MODEL_NOT_FOUND"),
            ({"version": "99"}, "NOT_FOUND", "VERSION_NOT_FOUND"),
            ({"variant": "int3"}, "NOT_FOUND", "VARIANT_NOT_FOUND"),
            ({"model": "enja-transformer-step"}, "FAILED_PRECONDITION", "MODEL_UNAVAILABLE"),
        ],
    )
    def test_models_that_cannot_translate(self, client, options, code, reason):
        with pytest.raises(CallFailed) as caught:
            client.translate("Yes.", TranslateOptions(**options))
        assert (caught.value.code, caught.value.reason) == (code, reason)
        if code == "NOT_FOUND":
            assert caught.value.metadata["field"] == next(iter(options))

    def test_a_deadline_that_has_passed_already(self, client):
        with pytest.raises(CallFailed) as caught:
            client.translate(SENTENCES[6], TranslateOptions(beam=16), timeout=1e-6)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        assert client.translate("Yes.").hypotheses
