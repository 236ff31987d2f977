"""API keys, roles and rates at a real gateway: who comes in, and how every kind of caller learns why not."""

import base64
import json
import os
import random
import subprocess
import time

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from inference import open_inference_grpc_pb2 as oip
from inference import open_inference_grpc_pb2_grpc as oip_grpc
from usagi.model.v1 import model_service_pb2 as models
from usagi.model.v1 import model_service_pb2_grpc as models_grpc
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from services.gateway import admission
from services.gateway.config import load_config
from services.gateway.envoy import bootstrap
from services.gateway.supervisor import envoy_command, write_configuration
from shared.api_keys import ApiKey, KeyFile, digest, make_key, new_secret, parse_rate
from shared.roles import ADMIN_METHODS
from shared.services_table import load_table
from tests.services.gateway.http_calls import (
    CLASSIFY,
    LOAD_MODEL,
    call_json,
    call_web,
    details_of,
    error_of,
)
from tests.services.gateway.processes import free_ports, running_gateway, stub, wait_for_health

VISION = ("usagi-service", "vision")
INFER, ADMIN, FEW = new_secret(), new_secret(), new_secret()
ODD = ["x" * length for length in (1, 54, 55, 56, 63, 64, 119, 120, 128)]
"""Lengths around SHA-256's blocks, for the Lua code; hashlib is the oracle."""
FOLLOW_SECONDS = 5.0


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """The file of the keys; a test that changes it puts it back."""
    file = KeyFile(tmp_path_factory.mktemp("keys") / "keys")
    file.save(
        [
            make_key("alice", "infer", INFER),
            make_key("root", "admin", ADMIN),
            make_key("few", "infer", FEW, parse_rate("3/h")),
            *(ApiKey(f"odd-{len(secret)}", "infer", digest(secret)) for secret in ODD),
        ]
    )
    return file


@pytest.fixture(scope="module")
def gateway(keys):
    with running_gateway(USAGI_KEYS_FILE=keys.path) as running, stub(running.upstream_port):
        wait_for_health(running.target, health_pb2.HealthCheckResponse.SERVING)
        yield running


@pytest.fixture(scope="module")
def channel(gateway):
    with grpc.insecure_channel(gateway.target) as opened:
        yield opened


def bearer(secret):
    return ("authorization", f"Bearer {secret}")


def classify(channel, *metadata, model=""):
    return pb_grpc.VisionServiceStub(channel).ClassifyImage(
        pb.ClassifyImageRequest(model=model), timeout=10, metadata=metadata
    )


def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught


def test_a_key_opens_and_no_key_does_not(channel):
    assert classify(channel, bearer(INFER)).classifications
    caught = refused(lambda: classify(channel))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert error_of(caught).reason == "KEY_MISSING"
    assert error_of(caught).domain == "gateway.usagi.dev"
    assert "authorization" in caught.value.details()


WRONG = [
    new_secret(),
    INFER[:-1],
    INFER + "x",
    INFER.swapcase(),
    digest(INFER),  # who reads the file has no key
    "x" * 57,
]


@pytest.mark.parametrize("secret", WRONG)
def test_wrong_keys(channel, secret):
    caught = refused(lambda: classify(channel, bearer(secret)))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert error_of(caught).reason == "KEY_UNKNOWN"


@pytest.mark.parametrize("value", ["Bearer", "Bearer ", f"Basic {INFER}", INFER, f"Bearer {INFER} x", "x" * 4000])
def test_headers_that_hold_no_key(channel, value):
    caught = refused(lambda: classify(channel, ("authorization", value)))
    assert (caught.value.code(), error_of(caught).reason) == (grpc.StatusCode.UNAUTHENTICATED, "KEY_MISSING")


def test_random_headers_hold_no_key(gateway):
    """Bytes that HTTP allows in a header, seeded; HTTP/1.1, since gRPC's client refuses most of them itself."""
    chance = random.Random(3)
    allowed = [chr(byte) for byte in (*range(32, 127), *range(128, 256))]
    for number in range(300):
        value = "".join(chance.choices(allowed, k=chance.choice([0, 1, 7, 49, 128, 129, 5000])))
        value = chance.choice(["", "Bearer ", "Bearer usagi_"]) + value
        status, _, answer = call_json(gateway.port, CLASSIFY, {}, authorization=value.encode("latin-1"))
        assert (status, json.loads(answer)["code"]) == (401, 16), (number, value, answer)


def test_two_keys_are_none(channel):
    for pair in [(bearer(INFER), bearer(ADMIN)), (bearer(new_secret()), bearer(INFER))]:
        caught = refused(lambda pair=pair: classify(channel, *pair))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("secret", ODD, ids=len)
def test_hashes_of_every_length(channel, secret):
    assert classify(channel, ("authorization", f"bEARER {secret}")).classifications


def call_admin(channel, method, *metadata):
    package, name = method[1:].split("/")
    stubs = {
        "usagi.model.v1.ModelService": (models_grpc.ModelServiceStub, models),
        "inference.GRPCInferenceService": (oip_grpc.GRPCInferenceServiceStub, oip),
    }
    make, messages = stubs[package]
    return getattr(make(channel), name)(getattr(messages, f"{name}Request")(), timeout=10, metadata=(VISION, *metadata))


@pytest.mark.parametrize("method", ADMIN_METHODS)
def test_admin_methods_need_the_role(channel, method):
    caught = refused(lambda: call_admin(channel, method, bearer(INFER)))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert error_of(caught).reason == "ADMIN_ONLY"
    caught = refused(lambda: call_admin(channel, method))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, "also from this machine"


def test_an_admin_comes_in_everywhere(channel):
    assert call_admin(channel, ADMIN_METHODS[0], bearer(ADMIN)).replica == "stub"
    assert classify(channel, bearer(ADMIN)).classifications
    for method in ADMIN_METHODS[1:]:  # the stub does not have them
        caught = refused(lambda method=method: call_admin(channel, method, bearer(ADMIN)))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_the_catalog_is_no_way_round(channel):
    """Without a domain the catalog answers, which asks the services with a key of its own."""
    stub = models_grpc.ModelServiceStub(channel)
    assert stub.ListModels(models.ListModelsRequest(), metadata=(bearer(INFER),), timeout=10).models
    for name in ("ListModels", "GetModel", "LoadModel"):
        call = getattr(stub, name)
        request = getattr(models, f"{name}Request")()
        caught = refused(lambda call=call, request=request: call(request, timeout=10))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    load = models.LoadModelRequest(name="stub")
    caught = refused(lambda: stub.LoadModel(load, metadata=(bearer(INFER),), timeout=10))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    caught = refused(lambda: stub.LoadModel(load, metadata=(bearer(ADMIN),), timeout=10))
    assert error_of(caught).reason == "DOMAIN_MISSING"


@pytest.mark.parametrize("broken", ["error('no')", "local x = nil + 1", "while true do handle:nothing() end"])
def test_a_script_that_fails_does_not_open_the_door(tmp_path, monkeypatch, broken):
    """Envoy logs it and passes the call on to the next filter."""
    script = admission.SCRIPT.read_text().replace("  local headers = handle:headers()\n", f"  {broken}\n", 1)
    assert broken in script
    (tmp_path / "broken.lua").write_text(script)
    monkeypatch.setattr(admission, "SCRIPT", tmp_path / "broken.lua")
    port, admin, upstream = free_ports(3)
    config = load_config(
        {
            "USAGI_GATEWAY_PORT": str(port),
            "USAGI_ADMIN_PORT": str(admin),
            "USAGI_UPSTREAM_VISION": f"127.0.0.1:{upstream}",
        }
    )
    rendered = bootstrap(config, load_table(), [make_key("alice", "infer", INFER)])
    command = envoy_command(write_configuration(tmp_path, rendered))
    envoy = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for metadata in ((), (bearer(INFER),)):
                caught = refused(
                    lambda metadata=metadata: pb_grpc.VisionServiceStub(channel).ClassifyImage(
                        pb.ClassifyImageRequest(), timeout=10, wait_for_ready=True, metadata=metadata
                    )
                )
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    finally:
        envoy.kill()
        envoy.wait()


OTHER_SPELLINGS = [
    "/usagi.model.v1.ModelService/%4coadModel",
    "/usagi.model.v1.ModelService/LoadModel?x=1",
    "/usagi.model.v1.ModelService/LoadModel#x",
    "/usagi.model.v1.ModelService%2fLoadModel",
    "//usagi.model.v1.ModelService/LoadModel",
    "/./usagi.model.v1.ModelService/LoadModel",
    "/usagi.model.v1.ModelService/LoadModel/",
    "/usagi.model.v1.ModelService/loadmodel",
]


@pytest.mark.parametrize("path", OTHER_SPELLINGS)
def test_another_spelling_of_the_path_is_no_way_round(gateway, path):
    headers = {"usagi-service": "vision", "authorization": f"Bearer {INFER}"}
    status, _, answer = call_json(gateway.port, path, {"name": "stub"}, **headers)
    assert status in (400, 403, 404), answer
    assert b"replica" not in answer


def test_health_needs_no_key_and_reflection_does(channel):
    check = health_pb2_grpc.HealthStub(channel).Check
    assert check(health_pb2.HealthCheckRequest(), timeout=5).status == health_pb2.HealthCheckResponse.SERVING
    reflect = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
    caught = refused(lambda: list(reflect(iter([b""]), timeout=5)))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_services_do_not_see_keys_that_they_need_not(channel):
    """The stub repeats what it gets as `authorization`."""
    labels = [entry.label for entry in classify(channel, bearer(INFER)).classifications]
    assert "authorization=" in labels


def test_over_the_rate(channel):
    left = []
    for _ in range(3):
        call = pb_grpc.VisionServiceStub(channel).ClassifyImage.with_call
        _, sent = call(pb.ClassifyImageRequest(), timeout=10, metadata=(bearer(FEW),))
        left.append(dict(sent.initial_metadata())["x-ratelimit-remaining"])
    assert left == ["2", "1", "0"]
    caught = refused(lambda: classify(channel, bearer(FEW)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error_of(caught).reason == "RATE_EXCEEDED"
    assert details_of(caught, error_details_pb2.RetryInfo).retry_delay.seconds > 0
    assert details_of(caught, error_details_pb2.QuotaFailure).violations[0].subject == "calls of this API key"
    for _ in range(10):
        assert classify(channel, bearer(INFER)).classifications, "each key has its own rate, or none"


REFUSALS = [
    (CLASSIFY, None, 401, "KEY_MISSING", grpc.StatusCode.UNAUTHENTICATED),
    (CLASSIFY, new_secret(), 401, "KEY_UNKNOWN", grpc.StatusCode.UNAUTHENTICATED),
    (LOAD_MODEL, INFER, 403, "ADMIN_ONLY", grpc.StatusCode.PERMISSION_DENIED),
    (CLASSIFY, FEW, 429, "RATE_EXCEEDED", grpc.StatusCode.RESOURCE_EXHAUSTED),
]


@pytest.mark.parametrize(("path", "secret", "http", "reason", "code"), REFUSALS)
def test_json_and_web_callers_learn_why(gateway, channel, path, secret, http, reason, code):
    if secret == FEW:
        while True:
            try:
                classify(channel, bearer(FEW))
            except grpc.RpcError:
                break
    headers = {"usagi-service": "vision", **({"authorization": f"Bearer {secret}"} if secret else {})}
    status, answered, answer = call_json(gateway.port, path, {}, **headers)
    error = json.loads(answer)
    assert (status, error["code"], error["details"][0]["reason"]) == (http, code.value[0], reason)
    assert (answered.get("www-authenticate") == "Bearer") == (http in (401, 403))
    kinds = {"/usagi.model.v1.ModelService/LoadModel": models.LoadModelRequest, CLASSIFY: pb.ClassifyImageRequest}
    status, answered, _ = call_web(gateway.port, path, kinds[path](), **headers)
    encoded = answered["grpc-status-details-bin"]
    rich = status_pb2.Status.FromString(base64.b64decode(encoded + "=" * (-len(encoded) % 4)))
    assert (status, rich.code) == (200, code.value[0])
    info = error_details_pb2.ErrorInfo()
    assert rich.details[0].Unpack(info)
    assert info.reason == reason


def within(seconds, condition):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def opens(channel, secret):
    try:
        return bool(classify(channel, bearer(secret)))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            raise
        return False


def test_keys_come_and_go_without_a_restart(channel, keys):
    before, late = keys.load(), new_secret()
    try:
        stream = pb_grpc.VisionServiceStub(channel).ClassifyImages(
            slow_requests(), timeout=20, metadata=(bearer(INFER),)
        )
        assert next(stream).id == "0"
        keys.save([*before, make_key("late", "infer", late)])
        assert within(FOLLOW_SECONDS, lambda: opens(channel, late))
        keys.save([key for key in before if key.name != "alice"])
        assert within(FOLLOW_SECONDS, lambda: not opens(channel, INFER))
        assert not opens(channel, late)
        assert opens(channel, ADMIN)
        assert sum(1 for _ in stream) == 9, "a running call finishes"
    finally:
        keys.save(before)
    assert within(FOLLOW_SECONDS, lambda: opens(channel, INFER))


def slow_requests():
    for number in range(10):
        yield pb.ClassifyImagesRequest(id=str(number))
        time.sleep(0.4)


def test_a_lost_or_broken_file_changes_nothing(channel, keys):
    text = keys.path.read_text()
    try:
        for change in (lambda: keys.path.write_text("alice infer\n"), keys.path.unlink):
            change()
            assert not within(1.5, lambda: not opens(channel, INFER))
            assert not opens(channel, new_secret())
    finally:
        keys.path.write_text(text)
    assert within(FOLLOW_SECONDS, lambda: opens(channel, INFER))


def _log(gateway):
    return os.pread(gateway.process.output.fileno(), 1 << 24, 0).decode()  # seek() would move Envoy's place too


def test_the_first_key_closes_the_door_and_no_log_shows_a_key(tmp_path):
    file, secret, wrong = KeyFile(tmp_path / "keys"), new_secret(), new_secret()
    with (
        running_gateway(USAGI_KEYS_FILE=file.path) as running,
        stub(running.upstream_port),
        grpc.insecure_channel(running.target) as channel,
    ):
        wait_for_health(running.target, health_pb2.HealthCheckResponse.SERVING)
        assert classify(channel).classifications
        assert call_admin(channel, ADMIN_METHODS[0]).replica == "stub"
        file.save([make_key("first", "infer", secret)])
        assert within(FOLLOW_SECONDS, lambda: not opens(channel, wrong))
        assert opens(channel, secret)
        refused(lambda: call_admin(channel, ADMIN_METHODS[0], bearer(secret)))
        refused(lambda: classify(channel, bearer(secret), model="refuse"))
        running.process.terminate()
        assert running.process.wait(20) == 0
        log = _log(running)
    failed = [json.loads(line) for line in log.splitlines() if '"method"' in line]
    assert {(entry["code"], entry["key"]) for entry in failed} >= {
        ("UNAUTHENTICATED", None),
        ("PERMISSION_DENIED", "first"),
        ("INVALID_ARGUMENT", "first"),
    }
    for text in (log, file.path.read_text()):
        assert "usagi_" not in text, "neither a caller's key nor the catalog's"


def test_required_keys_that_are_not_there_let_nobody_in(tmp_path):
    file, secret = KeyFile(tmp_path / "keys"), new_secret()
    with (
        running_gateway(USAGI_KEYS_FILE=file.path, USAGI_KEYS_REQUIRED="1") as running,
        stub(running.upstream_port),
        grpc.insecure_channel(running.target) as channel,
    ):
        wait_for_health(running.target, health_pb2.HealthCheckResponse.SERVING)
        caught = refused(lambda: classify(channel))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        file.save([make_key("first", "infer", secret)])
        assert within(FOLLOW_SECONDS, lambda: opens(channel, secret))


def test_a_broken_file_at_the_start_ends_the_gateway(tmp_path):
    (tmp_path / "keys").write_text("alice infer\n")
    with running_gateway(USAGI_KEYS_FILE=tmp_path / "keys") as running:
        assert running.process.wait(20) == 1
        assert "line 1" in _log(running)
