"""The vision service over a real port, with a model whose answers are worked out by hand: the colour of a picture."""

import queue
import subprocess
import sys
import threading
import zlib

import cv2
import grpc
import numpy as np
import pytest
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from services.vision.preprocess import ClassificationPreprocessing
from services.vision.serving.__main__ import registration
from services.vision.serving.config import VisionConfig
from services.vision.serving.predictors import rank
from shared.client.connection import CallFailed, Connection
from shared.client.vision import Selection, VisionClient
from shared.testing.graphs import publish_affine, publish_colours
from shared.testing.server import running_server
from tests.shared.pipelines import write_pipeline

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
SETTINGS = ClassificationPreprocessing(size=32, resize_side=32, mean=(0.0,) * 3, std=(255.0,) * 3)


CASCADE = """
[[steps]]
name = "fast"
model = "colours"
variant = "int8"

[[steps]]
name = "exact"
model = "colours"
variant = "fp32"
when = "margin(fast.logits) < 10"

[outputs]
logits = ["exact.logits", "fast.logits"]
"""


def encode(rgb, extension=".png", size=(40, 30), options=()):
    picture = np.full((*size, 3), rgb, np.uint8)
    done, data = cv2.imencode(extension, picture[..., ::-1], list(options))
    assert done
    return data.tobytes()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    publish_colours(root, SETTINGS.to_dict())
    publish_colours(root, SETTINGS.to_dict(), version=2)
    publish_affine(root, service="vision", name="not-a-classifier")
    write_pipeline(root, "cascade", CASCADE, service="vision")
    config = VisionConfig(model_roots=(root,), default_classifier="colours", threads=1)
    with running_server("vision", config, registration(config)) as running:
        yield running.address


@pytest.fixture(scope="module")
def client(address):
    with Connection(address) as connection:
        yield VisionClient(connection)


@pytest.mark.parametrize(("rgb", "label"), [(RED, "red"), (GREEN, "green"), (BLUE, "blue")])
@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp", ".bmp"])
def test_colours_in_every_format(client, rgb, label, extension):
    response = client.classify(encode(rgb, extension))
    assert response.classifications[0].label == label
    assert [entry.probability for entry in response.classifications] == sorted(
        (entry.probability for entry in response.classifications), reverse=True
    )


def test_probabilities_by_hand(client):
    response = client.classify(encode(RED), Selection(variant="fp32"))
    expected = np.exp(10.0) / (np.exp(10.0) + 2)  # logits are 10 times the colour's mean: 10, 0, 0
    assert response.classifications[0].probability == pytest.approx(expected, abs=1e-6)
    assert [entry.index for entry in response.classifications] == [0, 1, 2]


def test_info_says_who_answered(client):
    info = client.classify(encode(RED)).info
    assert (info.model, info.version, info.variant, info.batch_size) == ("colours", "2", "int8", 1)
    assert min(info.preprocess_seconds, info.infer_seconds, info.postprocess_seconds) > 0
    assert info.queue_seconds >= 0


def test_info_says_whether_the_cache_answered(tmp_path):
    publish_colours(tmp_path, SETTINGS.to_dict())
    (tmp_path / "vision/colours/model.toml").write_text("cache = { megabytes = 1 }")
    config = VisionConfig(model_roots=(tmp_path,), default_classifier="colours", threads=1)
    with (
        running_server("vision", config, registration(config)) as running,
        Connection(running.address) as connection,
    ):
        client = VisionClient(connection)
        answers = [client.classify(encode(RED), Selection(top_k=count)) for count in (3, 3, 1)]
        assert [answer.info.cached for answer in answers] == [False, True, True]
        assert [len(answer.classifications) for answer in answers] == [3, 3, 1]
        assert answers[0].classifications == answers[1].classifications
        assert (answers[1].info.infer_seconds, answers[1].info.queue_seconds) == (0.0, 0.0)
        assert not client.classify(encode(RED), Selection(variant="fp32")).info.cached


def test_a_pipeline_classifies_and_says_which_step_did(client):
    sure = client.classify(encode(RED), Selection("cascade"))  # int8's logits are 20, 0, 0
    assert (sure.classifications[0].label, sure.info.model, sure.info.variant) == ("red", "cascade", "fast")
    doubtful = client.classify(encode((120, 0, 0)), Selection("cascade"))  # 9.4, 0, 0
    expected = np.exp(10 * 120 / 255) / (np.exp(10 * 120 / 255) + 2)
    assert doubtful.info.variant == "exact"
    assert doubtful.classifications[0].probability == pytest.approx(expected, abs=1e-5)


def test_selection(client):
    info = client.classify(encode(RED), Selection("colours", "1", "fp32")).info
    assert (info.version, info.variant) == ("1", "fp32")
    assert client.classify(encode(RED), Selection(variant="auto")).info.variant == "int8"
    assert len(client.classify(encode(RED), Selection(top_k=1)).classifications) == 1


def failing(client, image, selection=None, **keywords):
    with pytest.raises(CallFailed) as caught:
        client.classify(image, selection, **keywords)
    return caught.value


PICTURE = encode(RED)


@pytest.mark.parametrize(
    ("image", "selection", "code", "reason", "field"),
    [
        (b"", None, "INVALID_ARGUMENT", "IMAGE_EMPTY", "image"),
        (b"hello, this is no picture", None, "INVALID_ARGUMENT", "IMAGE_FORMAT_UNKNOWN", "image"),
        (encode(RED, ".jpg")[:-200], None, "INVALID_ARGUMENT", "IMAGE_TRUNCATED", "image"),
        (b"\0" * (15 * 1024 * 1024 + 1), None, "INVALID_ARGUMENT", "IMAGE_TOO_LARGE", "image"),
        (PICTURE, Selection(top_k=0), "INVALID_ARGUMENT", "INVALID_INPUT", "top_k"),
        (PICTURE, Selection(top_k=10_000), "INVALID_ARGUMENT", "INVALID_INPUT", "top_k"),
        (PICTURE, Selection(model="nope"), "NOT_FOUND", "MODEL_NOT_FOUND", "model"),
        (PICTURE, Selection(version="99"), "NOT_FOUND", "VERSION_NOT_FOUND", "version"),
        (PICTURE, Selection(variant="int3"), "NOT_FOUND", "VARIANT_NOT_FOUND", "variant"),
        (PICTURE, Selection(model="not-a-classifier"), "FAILED_PRECONDITION", "MODEL_UNAVAILABLE", None),
    ],
)
def test_every_bad_request_has_its_own_typed_error(client, image, selection, code, reason, field):
    error = failing(client, image, selection)
    assert (error.code, error.reason) == (code, reason)
    assert error.metadata.get("field") == field
    if code == "INVALID_ARGUMENT":
        assert list(error.fields) == [field]
    assert error.metadata["request_id"]


def test_bomb_is_refused_by_its_header(client):
    picture = encode(RED, ".png")
    head = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + picture[24:29]
    error = failing(client, picture[:12] + head + zlib.crc32(head).to_bytes(4, "big") + picture[33:])
    assert (error.reason, list(error.fields)) == ("IMAGE_TOO_LARGE", ["image"])
    assert "20000x20000" in error.message


def test_message_over_the_limit(client):
    error = failing(client, b"\0" * (17 * 1024 * 1024))
    assert error.code == "RESOURCE_EXHAUSTED"


def test_expired_deadline(client):
    large = encode(np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8), size=(2000, 2000))
    # gRPC rounds the deadline up to a millisecond, in which a small picture may well be answered
    assert failing(client, large, timeout=1e-6).code == "DEADLINE_EXCEEDED"


def test_stream_answers_every_picture_and_survives_bad_ones(client):
    pictures = {str(index): encode((RED, GREEN, BLUE)[index % 3]) for index in range(60)}
    pictures["bad"] = b"no picture"
    answers = {answer.id: answer for answer in client.classify_many(pictures.items())}
    assert set(answers) == set(pictures)
    for index in range(60):
        assert answers[str(index)].response.classifications[0].label == ("red", "green", "blue")[index % 3]
    assert answers["bad"].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "not" in answers["bad"].error.message or "expected" in answers["bad"].error.message


def test_stream_answers_before_the_next_request_comes(address):
    """A caller that waits for each answer before it sends the next picture must not hang."""
    outbox = queue.Queue()
    with grpc.insecure_channel(address) as channel:
        answers = pb_grpc.VisionServiceStub(channel).ClassifyImages(iter(outbox.get, None), timeout=20)
        for number, (rgb, label) in enumerate([(RED, "red"), (GREEN, "green"), (BLUE, "blue")]):
            request = pb.ClassifyImageRequest(image=encode(rgb))
            outbox.put(pb.ClassifyImagesRequest(id=str(number), request=request))
            answer = next(answers)
            assert (answer.id, answer.response.classifications[0].label) == (str(number), label)
        outbox.put(None)
        assert list(answers) == []


def test_stream_refuses_what_is_missing(address):
    requests = [pb.ClassifyImagesRequest(id="a"), pb.ClassifyImagesRequest(id="b" * 200)]
    with grpc.insecure_channel(address) as channel:
        answers = list(pb_grpc.VisionServiceStub(channel).ClassifyImages(iter(requests), timeout=20))
    assert sorted(answer.error.message.split(":")[0] for answer in answers) == ["id", "request"]


def test_parallel_callers_share_batches_and_get_their_own_answers(address):
    expected = {RED: "red", GREEN: "green", BLUE: "blue"}
    wrong, sizes = [], set()

    def call(rgb):
        with Connection(address) as connection:
            client = VisionClient(connection)
            picture = encode(rgb)
            for _ in range(40):
                response = client.classify(picture)
                sizes.add(response.info.batch_size)
                if response.classifications[0].label != expected[rgb]:
                    wrong.append(rgb)

    threads = [threading.Thread(target=call, args=(rgb,)) for rgb in (RED, GREEN, BLUE) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert max(sizes) <= 8


def test_rank_is_stable_and_safe():
    indices, probabilities = rank(np.array([1000.0, -1000.0, 1000.0], np.float32), 3)
    assert indices == [0, 2, 1]
    assert probabilities == pytest.approx([0.5, 0.5, 0.0])


@pytest.mark.parametrize("variable", ["USAGI_PORT", "USAGI_METRICS_PORT"])
def test_taken_port_is_said_in_one_line(address, variable):
    port = address.rpartition(":")[2]
    ended = subprocess.run(
        [sys.executable, "-m", "services.vision.serving"],
        env={"USAGI_PORT": "0", "USAGI_METRICS_PORT": "0", variable: port, "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode != 0
    assert f"on 127.0.0.1:{port}" in ended.stderr
    assert variable in ended.stderr
    assert "Traceback" not in ended.stderr
