"""A service that stands still (SIGSTOP) or dies (SIGKILL) in mid-call: deadlines hold, and callers learn why."""

import signal
import threading
import time

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from shared.serving.front import FRONTS
from tests.fuzz.campaign import check_answers
from tests.fuzz.gateway import gateway_before
from tests.fuzz.pictures import red_square
from tests.fuzz.server import fuzzed_server
from tests.services.gateway.http_calls import CLASSIFY, call_web, details_of
from tests.services.gateway.processes import wait_for_health
from tests.services.gateway.test_refusals import web_status

CALLERS = 8
LATE_SECONDS = 5.0
"""What a busy machine may add to a deadline; calls without any would wait for ever."""
ADR_7 = "the native front ends a connection on which it finds more than 20 calls that their callers have given up"
REQUEST = pb.ClassifyImageRequest(image=red_square())


class Callers:
    """Callers that classify in turns until the block ends; `failures` has how each failed call ended, and when."""

    def __init__(self, target, timeout):
        self.answered, self.failures = 0, []
        self._stop, self._timeout = threading.Event(), timeout
        self._channel = grpc.insecure_channel(target, options=[("grpc.enable_retries", 0)])
        self._threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._channel.close()

    def _call(self):
        classify = pb_grpc.VisionServiceStub(self._channel).ClassifyImage
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                classify(REQUEST, timeout=self._timeout)
                self.answered += 1
            except grpc.RpcError as error:
                self.failures.append((error.code().name, time.monotonic() - began))
                time.sleep(0.05)


def wait_until(condition, seconds=20):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("front", FRONTS)
def test_a_service_that_stands_still_and_then_dies(tmp_path, front):
    with fuzzed_server(tmp_path, front) as server, gateway_before(server) as target:
        deadlines_hold_while_it_stands_still(server, target)
        killing_it_ends_every_call_at_once(server, target)


def deadlines_hold_while_it_stands_still(server, target):
    port = int(target.rsplit(":", 1)[1])
    with Callers(server.address, 1.0) as callers:
        wait_until(lambda: callers.answered > 20)
        server.process.send_signal(signal.SIGSTOP)
        try:
            # gRPC-Web leaves the deadline to the gateway, so this is no client that gives up by itself
            began = time.monotonic()
            _, headers, _ = call_web(port, CLASSIFY, REQUEST, **{"grpc-timeout": "1S"})
            assert time.monotonic() - began < 1.0 + LATE_SECONDS
            assert web_status(headers).message == "the deadline passed before the service answered"
            wait_until(lambda: len(callers.failures) >= CALLERS)
            # after two health checks without an answer the gateway does not even try
            wait_for_health(target, health_pb2.HealthCheckResponse.NOT_SERVING)
            with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
                pb_grpc.VisionServiceStub(channel).ClassifyImage(REQUEST, timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert details_of(caught, error_details_pb2.RetryInfo).retry_delay.seconds == 1
        finally:
            server.process.send_signal(signal.SIGCONT)
        before = callers.answered
        wait_until(lambda: callers.answered > before + 20)
    codes = {code for code, _ in callers.failures}
    assert "DEADLINE_EXCEEDED" in codes
    assert codes <= ({"DEADLINE_EXCEEDED", "UNAVAILABLE"} if server.front == "native" else {"DEADLINE_EXCEEDED"}), ADR_7
    assert max(seconds for _, seconds in callers.failures) < 1.0 + LATE_SECONDS
    wait_for_health(target, health_pb2.HealthCheckResponse.SERVING)
    with grpc.insecure_channel(target) as channel:
        check_answers(channel)
    assert server.complaints() == []


def killing_it_ends_every_call_at_once(server, target):
    with Callers(target, 20.0) as callers:
        wait_until(lambda: callers.answered > 20)
        server.process.kill()
        wait_until(lambda: len(callers.failures) >= 2 * CALLERS)
    assert {code for code, _ in callers.failures} == {"UNAVAILABLE"}
    assert max(seconds for _, seconds in callers.failures) < LATE_SECONDS
