"""Text from the shipped language model over a real port, against a loop over its graph without a cache."""

import asyncio
import math
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import grpc
import numpy as np
import pytest
from usagi.nlp.v1 import nlp_service_pb2 as pb
from usagi.nlp.v1 import nlp_service_pb2_grpc as pb_grpc

from services.nlp.serving.__main__ import registration
from services.nlp.serving.config import NlpConfig
from services.nlp.tokenizers.characters import CharacterTokenizer
from services.nlp.training.offline import reading_feeds
from shared.artifacts import read_manifest
from shared.client.cli import main
from shared.client.connection import CallFailed, Connection
from shared.client.nlp import GenerateOptions, NlpClient
from shared.testing.server import running_server
from shared.training.export import open_session

SHIPPED = Path(__file__).parents[3] / "deploy" / "models"
FOLDER = SHIPPED / "nlp" / "shakespeare-gpt" / "1"
PROMPT = "ROMEO:\nBut soft, what light"


@pytest.fixture(scope="module")
def server():
    config = NlpConfig(model_roots=(SHIPPED,), threads=2, queue_size=300, log_level="WARNING")
    with running_server("nlp", config, registration(config)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with Connection(server.address) as connection:
        yield NlpClient(connection)


@pytest.fixture(scope="module")
def session():
    return open_session(FOLDER / read_manifest(FOLDER).variants["fp16"].file)


@pytest.fixture(scope="module")
def tokenizer():
    return CharacterTokenizer.from_json((FOLDER / "vocabulary.json").read_text(encoding="utf-8"))


def written(answers):
    return "".join(answer.text for answer in answers)


def log_probabilities(session, ids):
    return session.run(["log_probabilities"], reading_feeds(session, np.array([ids])))[0][0]


def test_greedy_text_is_that_of_a_loop_without_a_cache(client, session, tokenizer):
    """Far enough that the context fills and is read again from its half."""
    context = read_manifest(FOLDER).preprocessing["context"]
    ids = tokenizer.encode(PROMPT)
    begin, length = 0, 150
    for _ in range(length):
        if len(ids) - begin > context:
            begin = len(ids) - context // 2
        values = log_probabilities(session, ids[begin:])[-1]
        ids.append(4 + int(values[4:].argmax()))
    *answers, last = client.generate(PROMPT, GenerateOptions(variant="fp16", temperature=0, max_tokens=length))
    assert PROMPT + written(answers) + last.text == tokenizer.decode(ids)
    assert (last.tokens, last.finish_reason, len(answers)) == (length, pb.FINISH_REASON_LENGTH, length)
    assert (last.info.model, last.info.variant) == ("shakespeare-gpt", "fp16")
    assert last.info.infer_seconds > 0


def test_a_prompt_beyond_the_context_counts_by_its_end(client):
    long = GenerateOptions(temperature=0, max_tokens=20)
    assert written(client.generate("x" * 900 + PROMPT * 40, long)) == written(client.generate(PROMPT * 40, long))


def test_the_seed_decides(client):
    one, same, other = (
        written(client.generate(PROMPT, GenerateOptions(seed=seed, max_tokens=40))) for seed in (1, 1, 2)
    )
    assert one == same != other
    *_, last = client.generate(PROMPT, GenerateOptions(max_tokens=1))
    again = GenerateOptions(max_tokens=1, seed=last.seed)
    assert list(client.generate(PROMPT, again))[-1].seed == last.seed


def test_tokens_say_how_probable_they_and_others_were(client, session, tokenizer):
    options = GenerateOptions(variant="fp16", seed=3, max_tokens=30, alternatives=3)
    *answers, _ = client.generate(PROMPT, options)
    ids = tokenizer.encode(PROMPT)
    for answer in answers:
        values = log_probabilities(session, ids)[-1]
        token = tokenizer.encode(answer.token.text)[0]
        assert answer.token.log_probability == pytest.approx(float(values[token]), abs=1e-3)
        best = np.sort(values[4:])[::-1][:3]
        np.testing.assert_allclose([entry.log_probability for entry in answer.alternatives], best, atol=1e-3)
        ids.append(token)


def test_a_stop_string_ends_the_text_before_it(client):
    whole = written(client.generate(PROMPT, GenerateOptions(temperature=0, max_tokens=120)))
    stop = whole[40:44]
    *answers, last = client.generate(PROMPT, GenerateOptions(temperature=0, max_tokens=120, stop=("Zounds", stop)))
    assert last.finish_reason == pb.FINISH_REASON_STOP
    assert written([*answers, last]) == whole[: whole.index(stop)]


def test_score_is_the_sum_of_the_tokens(client, session, tokenizer):
    text = "ROMEO:\nWhat is the matter? I will not go to the duke, my lord.\n"
    answer = client.score(text, variant="fp16")
    ids = tokenizer.encode(text)
    values = log_probabilities(session, ids[:-1])
    expected = [float(values[at, token]) for at, token in enumerate(ids[1:])]
    assert "".join(token.text for token in answer.tokens) == text
    np.testing.assert_allclose([token.log_probability for token in answer.tokens[1:]], expected, atol=1e-3)
    assert answer.log_probability == pytest.approx(sum(expected), abs=0.05)
    assert answer.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-3)
    shuffled = "".join(sorted(text))
    assert client.score(shuffled).perplexity > 3 * answer.perplexity


@pytest.mark.parametrize("variant", ["fp16", "int8"])
def test_texts_that_are_written_together_are_those_written_alone(client, variant):
    wishes = [
        GenerateOptions(variant=variant, seed=seed, max_tokens=30 + 12 * seed, temperature=0.5 + seed / 10)
        for seed in range(10)
    ]
    prompts = [PROMPT[: 3 + 2 * seed] for seed in range(10)]
    alone = [written(client.generate(prompt, wish)) for prompt, wish in zip(prompts, wishes, strict=True)]

    async def together():
        async with grpc.aio.insecure_channel(client._connection.target) as channel:
            stub = pb_grpc.NlpServiceStub(channel)

            async def one(prompt, wish):
                return [answer async for answer in stub.GenerateText(wish.request(prompt), timeout=60)]

            return await asyncio.gather(*(one(prompt, wish) for prompt, wish in zip(prompts, wishes, strict=True)))

    found = asyncio.run(together())
    assert [written(answers) for answers in found] == alone
    assert max(answers[-1].info.batch_size for answers in found) > 1, "they shared steps"


def test_half_of_200_streams_leave_and_the_others_do_not_notice(server, client):
    wish = GenerateOptions(variant="fp16", seed=5, max_tokens=60)
    expected = written(client.generate(PROMPT, wish))

    async def storm():
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = pb_grpc.NlpServiceStub(channel)

            async def stays():
                return written([answer async for answer in stub.GenerateText(wish.request(PROMPT), timeout=120)])

            async def leaves():
                call = stub.GenerateText(wish.request(PROMPT), timeout=120)
                await call.read()
                call.cancel()

            return await asyncio.gather(*(stays() if number % 2 else leaves() for number in range(200)))

    texts = asyncio.run(storm())
    assert {text for text in texts if text is not None} == {expected}
    inflight = server.engine.telemetry.inflight.labels("nlp")._value
    ended = time.monotonic() + 10
    while inflight.get() and time.monotonic() < ended:
        time.sleep(0.05)
    assert inflight.get() == 0


def test_a_deadline_ends_a_text(client):
    started = time.monotonic()
    with pytest.raises(CallFailed) as caught:
        list(client.generate(PROMPT, GenerateOptions(max_tokens=2000), timeout=0.2))
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("", {}, "prompt"),
        ("x" * 100_000, {}, "prompt"),
        ("a", {"max_tokens": 0}, "max_tokens"),
        ("a", {"max_tokens": 10**9}, "max_tokens"),
        ("a", {"top_p": 0.0}, "top_p"),
        ("a", {"top_p": 2.0}, "top_p"),
        ("a", {"top_p": math.nan}, "top_p"),
        ("a", {"temperature": -1.0}, "temperature"),
        ("a", {"temperature": math.inf}, "temperature"),
        ("a", {"top_k": -1}, "top_k"),
        ("a", {"alternatives": 11}, "alternatives"),
        ("a", {"stop": ("",)}, "stop[0]"),
        ("a", {"stop": ("x",) * 9}, "stop"),
    ],
)
def test_wrong_requests_are_refused_by_field(client, prompt, options, field):
    with pytest.raises(CallFailed) as caught:
        list(client.generate(prompt, GenerateOptions(**options)))
    assert caught.value.code == "INVALID_ARGUMENT"
    assert list(caught.value.fields) == [field]
    assert "expected" in caught.value.fields[field]


@pytest.mark.parametrize("text", ["", "a", "x" * 100_000])
def test_texts_that_cannot_be_scored(client, text):
    with pytest.raises(CallFailed) as caught:
        client.score(text)
    assert (caught.value.code, list(caught.value.fields)) == ("INVALID_ARGUMENT", ["text"])


@pytest.mark.parametrize("prompt", ["🙂🙂", "日本語", "\x00\x01\t", "مرحبا"])
def test_characters_that_the_model_never_saw_are_no_error(client, prompt):
    *answers, last = client.generate(prompt, GenerateOptions(seed=1, max_tokens=20))
    assert last.tokens == 20
    assert len(written([*answers, last])) == 20
    assert math.isfinite(client.score(prompt + "ab").perplexity)


def test_a_translator_writes_no_text(client):
    with pytest.raises(CallFailed) as caught:
        list(client.generate("a", GenerateOptions(model="enja-transformer")))
    assert caught.value.code == "FAILED_PRECONDITION"


class TestAdder:
    """A model with habits of its own: it writes from the end, stops by itself, and knows what it can be asked."""

    def test_it_adds(self, client):
        *answers, last = client.generate("12+34=", GenerateOptions(model="adder-gpt"))
        assert [answer.token.text for answer in answers] == ["6", "4", "\n"], "units first, and the end"
        assert [answer.text for answer in answers] == ["", "", ""], "nothing can be shown before the last digit"
        assert (last.text, last.finish_reason, last.tokens) == ("46", pb.FINISH_REASON_STOP, 3)

    @pytest.mark.parametrize("variant", ["fp16", "int8"])
    def test_sums_of_all_lengths(self, client, variant):
        for one, other in ((0, 0), (7, 5), (9, 90), (99, 1), (99, 99), (58, 67)):
            options = GenerateOptions(model="adder-gpt", variant=variant)
            assert written(client.generate(f"{one}+{other}=", options)) == str(one + other)

    def test_what_was_written_is_shown_even_if_it_is_cut_off(self, client):
        *_, last = client.generate("99+99=", GenerateOptions(model="adder-gpt", max_tokens=2))
        assert (last.text, last.finish_reason) == ("98", pb.FINISH_REASON_LENGTH)

    @pytest.mark.parametrize("prompt", ["12+34", "123+4=", "a+b=", "12 + 34=", "12+34=4", "1+1=\n", "１+2="])
    def test_another_prompt_is_refused_with_an_example(self, client, prompt):
        with pytest.raises(CallFailed) as caught:
            list(client.generate(prompt, GenerateOptions(model="adder-gpt")))
        assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "PROMPT_NOT_UNDERSTOOD")
        assert "12+34=" in caught.value.fields["prompt"]


class TestFewShot:
    """A function that is in the prompt and in no weight."""

    @pytest.mark.parametrize(("prompt", "answer"), [("a4b1c2b", "1"), ("f6a5c1f", "6"), ("a4b1c2d3e6f", "5")])
    def test_it_reads_the_examples_and_excludes_what_was_seen(self, client, prompt, answer):
        *answers, last = client.generate(prompt, GenerateOptions(model="fewshot-gpt"))
        assert (written([*answers, last]), last.tokens) == (answer, 1)

    @pytest.mark.parametrize("prompt", ["a4b1", "g", "4a", "a4 a", "a1" * 13 + "a"])
    def test_another_prompt_is_refused_with_an_example(self, client, prompt):
        with pytest.raises(CallFailed) as caught:
            list(client.generate(prompt, GenerateOptions(model="fewshot-gpt")))
        assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "PROMPT_NOT_UNDERSTOOD")


class TestCommand:
    """`usagi nlp` against the service itself."""

    @staticmethod
    def run(server, capsys, *words):
        with pytest.raises(SystemExit) as ended:
            main(["nlp", *words, "--target", server.address])
        assert not ended.value.code, ended.value.code
        return capsys.readouterr().out

    def test_a_short_name_is_a_language_models(self, server, capsys):
        assert self.run(server, capsys, "generate", "--model", "adder", "58+67=") == "58+67=125\n"
        assert self.run(server, capsys, "generate", "--model", "adder-gpt", "58+67=") == "58+67=125\n"

    def test_score_draws_the_text(self, server, capsys, tmp_path):
        picture = tmp_path / "text.svg"
        text = "ROMEO:\nBut soft!"
        said = self.run(server, capsys, "score", text, "--model", "shakespeare", "--picture", str(picture))
        assert "perplexity" in said
        drawn = [
            element.text
            for element in ET.fromstring(picture.read_text(encoding="utf-8")).iter()
            if element.tag.endswith("}text")
        ]
        assert "".join(part or " " for part in drawn[1:]).replace("\u21b5", "\n") == text
