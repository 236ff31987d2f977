"""Services that die and return, and a gateway that stops: each test has processes of its own."""

import contextlib
import json
import signal
import threading
import time
import urllib.request

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from usagi.model.v1 import model_service_pb2 as models
from usagi.model.v1 import model_service_pb2_grpc as models_grpc
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from shared.serving.probe import OTHER_CODE, SERVING_CODE, probe
from tests.services.gateway.http_calls import CLASSIFY, call_json, call_web, details_of, error_of
from tests.services.gateway.processes import running_gateway, stub, wait_for_health

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
VISION = "usagi.vision.v1.VisionService"
RECOVERY_SECONDS = 6  # measured up to 3.1 s with the start of the process, up to 1.3 s of it Envoy; the rest is for CI


def test_a_dead_service_is_unavailable_at_once_and_back_within_seconds():
    with running_gateway() as gateway, grpc.insecure_channel(gateway.target) as channel:
        classify = pb_grpc.VisionServiceStub(channel).ClassifyImage
        with stub(gateway.upstream_port) as upstream:
            wait_for_health(gateway.target, SERVING, VISION)
            assert classify(pb.ClassifyImageRequest(), wait_for_ready=True)
            upstream.kill()
            upstream.wait()
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            classify(pb.ClassifyImageRequest(), timeout=5)
        assert time.monotonic() - started < 2
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error_of(caught).reason == "SERVICE_UNAVAILABLE"
        assert details_of(caught, error_details_pb2.RetryInfo).retry_delay.seconds == 1
        other_callers_learn_it_too(gateway)
        catalog_says_who_is_away(gateway, channel)
        with stub(gateway.upstream_port):
            started = time.monotonic()
            while time.monotonic() < started + RECOVERY_SECONDS:
                with contextlib.suppress(grpc.RpcError):
                    classify(pb.ClassifyImageRequest(), timeout=1)
                    break
                time.sleep(0.05)
            else:
                raise AssertionError(f"not back within {RECOVERY_SECONDS} s")
            wait_for_health(gateway.target, SERVING, VISION, within=3)


def other_callers_learn_it_too(gateway):
    status, _, body = call_json(gateway.port, CLASSIFY, {})
    assert status == 503
    details = json.loads(body)["details"]
    assert [details[0]["reason"], details[1]["retryDelay"]] == ["SERVICE_UNAVAILABLE", "1s"]
    status, headers, _ = call_web(gateway.port, CLASSIFY, pb.ClassifyImageRequest())
    assert (status, headers["grpc-status"]) == (200, str(grpc.StatusCode.UNAVAILABLE.value[0]))


def catalog_says_who_is_away(gateway, channel):
    wait_for_health(gateway.target, NOT_SERVING, VISION, within=3)
    wait_for_health(gateway.target, NOT_SERVING, "", within=1)
    wait_for_health(gateway.target, SERVING, "usagi.model.v1.ModelService", within=1)
    response, call = models_grpc.ModelServiceStub(channel).ListModels.with_call(models.ListModelsRequest())
    assert not response.models
    assert dict(call.trailing_metadata())["usagi-unreachable"] == "vision"
    with pytest.raises(grpc.RpcError) as caught:
        models_grpc.ModelServiceStub(channel).GetModel(models.GetModelRequest(name="stub"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_watch_sees_a_service_come():
    with running_gateway() as gateway, grpc.insecure_channel(gateway.target) as channel:
        request = health_pb2.HealthCheckRequest(service=VISION)
        changes = health_pb2_grpc.HealthStub(channel).Watch(request, wait_for_ready=True, timeout=20)
        assert next(changes).status == NOT_SERVING
        with stub(gateway.upstream_port):
            assert next(changes).status == SERVING
        changes.cancel()


def test_sigterm_lets_a_running_call_finish():
    with running_gateway() as gateway, stub(gateway.upstream_port):
        wait_for_health(gateway.target, SERVING, VISION)
        answers = []
        with grpc.insecure_channel(gateway.target) as channel:
            classify = pb_grpc.VisionServiceStub(channel).ClassifyImage
            classify(pb.ClassifyImageRequest(), wait_for_ready=True)
            request = pb.ClassifyImageRequest(model="sleep")  # 3 s
            caller = threading.Thread(target=lambda: answers.append(classify(request, timeout=15)))
            caller.start()
            time.sleep(0.5)
            gateway.process.send_signal(signal.SIGTERM)
            caller.join()
        assert answers[0].info.model == "sleep"
        assert gateway.process.wait(10) == 0


def test_the_gateway_ends_when_envoy_dies():
    with running_gateway() as gateway:
        wait_for_health(gateway.target, SERVING, "usagi.model.v1.ModelService")
        with contextlib.suppress(ConnectionError):  # the reply may not make it out
            request = urllib.request.Request(f"http://127.0.0.1:{gateway.admin_port}/quitquitquit", method="POST")
            urllib.request.urlopen(request, timeout=5).close()
        assert gateway.process.wait(10) == 1


def test_probe_works_through_envoy(gateway):
    assert probe("127.0.0.1", gateway.port) == SERVING_CODE
    assert probe("127.0.0.1", gateway.port, "usagi.model.v1.ModelService") == SERVING_CODE
    assert probe("127.0.0.1", gateway.port, "usagi.nobody.v1.NobodyService") == OTHER_CODE


def test_one_line_says_ready_and_nothing_warns():
    with running_gateway() as gateway:
        wait_for_health(gateway.target, SERVING, "usagi.model.v1.ModelService")
        with urllib.request.urlopen(f"http://127.0.0.1:{gateway.metrics_port}/metrics", timeout=5) as response:
            assert b"envoy_cluster_membership_healthy" in response.read()
        gateway.process.send_signal(signal.SIGTERM)
        gateway.process.wait(timeout=10)
        gateway.process.output.seek(0)
        output = gateway.process.output.read()
    lines = [json.loads(line) for line in output.decode().splitlines()]
    assert [line["message"] for line in lines if line.get("level") == "INFO"] == ["ready", "draining", "stopped"]
    assert [line["message"] for line in lines if line.get("level") in {"warning", "error", "WARNING", "ERROR"}] == [
        "caught ENVOY_SIGTERM"
    ]
