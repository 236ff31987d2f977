"""GRU translators from training to answers: the real programs on the made-up corpus, then a server on a real port."""

import io
import logging
import random
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tyro
from rich.console import Console
from usagi.nlp.v1 import nlp_service_pb2 as pb
from usagi.nlp.v1 import nlp_service_pb2_grpc as pb_grpc

from services.nlp.preprocess import join_japanese
from services.nlp.serving.__main__ import registration
from services.nlp.serving.config import NlpConfig
from services.nlp.training import evaluate, export, train
from services.nlp.training.models.gru_translator import GruTranslator
from services.nlp.training.networks import load_network
from shared.artifacts import read_manifest
from shared.client.connection import CallFailed, Connection
from shared.client.nlp import NlpClient, TranslateOptions
from shared.errors import ConfigurationError
from shared.testing.server import running_server

RECIPE = (
    "--recipe report --division report --merges 0 --batch 16 --teacher-forcing 0.5 --epochs 60 "
    "--learning-rate 1e-2 --width 32"
)
ARCHITECTURES = {"toy-gru": "gru", "toy-looking": "gru-attention"}


@pytest.fixture(scope="module")
def root(toy_corpus, tmp_path_factory):
    """A model root with both, made by the commands that a person types."""
    folder = tmp_path_factory.mktemp("gru")
    logging.disable(logging.WARNING)
    try:
        for name, architecture in ARCHITECTURES.items():
            words = (
                f"--architecture {architecture} {RECIPE} --teacher-forcing 0.5 --name {name} --runs {folder / 'runs'}"
            )
            train.main(tyro.cli(train.TrainConfig, args=words.split()))
            words = f"--name {name} --runs {folder / 'runs'} --root {folder / 'models'}"
            export.main(tyro.cli(export.ExportConfig, args=words.split()))
    finally:
        logging.disable(logging.NOTSET)
    return folder / "models"


@pytest.fixture(scope="module")
def running(root):
    config = NlpConfig(model_roots=(root,), threads=2, default_translator="toy-looking")
    with running_server("nlp", config, registration(config)) as server:
        yield server


@pytest.fixture(scope="module")
def client(running):
    with Connection(running.address) as connection:
        yield NlpClient(connection)


@pytest.fixture(scope="module")
def known(toy_corpus):
    """Sentence as people write it -> its translation."""
    return {
        " ".join(english[:-1]).capitalize() + ".": join_japanese(japanese)
        for english, japanese in zip(toy_corpus.english[:64], toy_corpus.japanese[:64], strict=True)
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_says_what_it_was(root, name):
    folder = root.parent / "runs" / name / "seed0"
    result = export.read_result(folder)
    assert result["architecture"] == ARCHITECTURES[name]
    assert result["best_epoch"] == 59  # the report's recipe keeps the last epoch
    assert {"dev_greedy_bleu", "dev_greedy_bleu_as_reported", "dev_forced_bleu_as_reported"} < result.keys()
    model = load_network(folder, result)
    assert isinstance(model, GruTranslator)
    assert not model.training
    assert (model.attention is None) is (name == "toy-gru")


def test_a_transformer_cannot_run_free():
    config = train.TrainConfig(teacher_forcing=0.5)
    with pytest.raises(ConfigurationError, match="reads all of the target at once"):
        train.build(config, train.make_vocabularies(train.Pairs([["a"]], [["b"]]), 0))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_published(root, name):
    encoder, step = (read_manifest(root / "nlp" / part / "1") for part in (name, f"{name}-step"))
    assert list(encoder.variants) == list(step.variants) == ["fp16", "int8"]
    assert "two GRUs" in encoder.description
    assert "its state outside" in step.description
    assert "as the report divides" in encoder.training.data
    assert f"--architecture {ARCHITECTURES[name]} --recipe report" in encoder.training.command
    looks = name == "toy-looking"
    source = ["source_length", "cross_states", "cross_keys"] if looks else []
    assert [spec.name for spec in step.inputs] == ["token", "state", *source]
    assert [spec.name for spec in encoder.outputs] == ["state", *source[1:]]
    assert ("attention" in [spec.name for spec in step.outputs]) is looks
    assert encoder.variants["fp16"].metrics["parity_max_abs_diff"] <= 1e-4


def test_verify_finds_it_as_claimed(root, toy_corpus):
    text = io.StringIO()
    assert evaluate.evaluate(evaluate.EvaluateConfig(root), Console(file=text, width=300)), text.getvalue()
    assert text.getvalue().count("as claimed") == 8


@pytest.mark.parametrize("variant", ["fp16", "int8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_right_answers(client, known, name, variant):
    right = 0
    for sentence, expected in known.items():
        answer = client.translate(sentence, TranslateOptions(model=name, variant=variant))
        assert (answer.info.model, answer.info.variant) == (name, variant)
        right += answer.hypotheses[0].text == expected
    assert right >= 55  # of 64, learnt by heart


def test_attention_is_where_it_looked(client, known):
    for sentence in list(known)[:5]:
        answer = client.translate(sentence, TranslateOptions(beam=3, n_best=3, attention=True))
        for hypothesis in answer.hypotheses:
            matrix = hypothesis.attention
            assert (matrix.rows, matrix.columns) == (len(matrix.target_tokens), len(answer.source_words) + 1)
            weights = np.array(matrix.weights).reshape(matrix.rows, matrix.columns)
            np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-3)


def test_without_attention_it_says_so(client, known):
    sentence = next(iter(known))
    with pytest.raises(CallFailed, match="toy-gru, whose decoder has one state") as refused:
        client.translate(sentence, TranslateOptions(model="toy-gru", attention=True))
    assert (refused.value.code, refused.value.reason) == ("INVALID_ARGUMENT", "NO_ATTENTION")
    assert client.translate(sentence, TranslateOptions(model="toy-gru")).hypotheses


def test_half_a_translator_is_none(client):
    with pytest.raises(CallFailed) as refused:
        client.translate("The red cat runs.", TranslateOptions(model="toy-gru-step"))
    assert "does translation-step, not translation" in str(refused.value)


@pytest.mark.parametrize("variant", ["fp16", "int8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_together_is_alone(client, known, name, variant):
    sentences = list(known)
    asked = [
        (sentences[number % 8], TranslateOptions(model=name, variant=variant, beam=1 + number % 5))
        for number in range(24)
    ]
    alone = [client.translate(*one) for one in asked]
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(lambda one: client.translate(*one), asked))
    for one, other in zip(alone, together, strict=True):
        assert one.hypotheses[0].text == other.hypotheses[0].text
        assert one.hypotheses[0].score == pytest.approx(other.hypotheses[0].score, abs=1e-4)


def test_deadlines_and_cancelled_calls_harm_nobody(running, client, known):
    expected = {sentence: client.translate(sentence).hypotheses[0].text for sentence in known}
    rng, sentences = random.Random(0), list(known)
    with grpc.insecure_channel(running.address) as channel:
        stub, calls = pb_grpc.NlpServiceStub(channel), []
        for number in range(60):
            sentence = rng.choice(sentences)
            timeout = 0.003 if number % 3 == 1 else 60
            calls.append((number, sentence, stub.Translate.future(pb.TranslateRequest(text=sentence), timeout=timeout)))
        for number, _, call in calls:
            if number % 3 == 2:
                call.cancel()
        for number, sentence, call in calls:
            if number % 3 == 0:
                assert call.result().hypotheses[0].text == expected[sentence]
            elif call.exception() is not None if not call.cancelled() else False:
                assert call.exception().code() == grpc.StatusCode.DEADLINE_EXCEEDED
