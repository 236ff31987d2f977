"""What the containers do when something breaks or stops: clear errors, quick recovery, no lost call."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from usagi.vision.v1 import vision_service_pb2 as pb

from tests.e2e.load import WORKERS, Load
from tests.e2e.stack import Caller, refused

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]

RECOVERY_SECONDS = 10.0


def calls_logged(stack, container):
    return stack.run("bash", "-c", f"docker logs {container} 2>&1").count('"message": "call"')


def kill_on_host(stack, container):
    """SIGKILL to the container's first process by its id on the engine's machine.

    Not `docker kill` or `docker compose kill`: after those Docker holds the end for wanted and does not restart.
    """
    pid = stack.inspect(container)["State"]["Pid"]
    options = ("--rm", "--pid", "host", "--user", "0", "--entrypoint", "sh")
    stack.run("docker", "run", *options, f"{stack.project}-vision", "-c", f"kill -9 {pid}")


def test_killed_service_is_refused_clearly_and_comes_back(stack):
    (container,), (gateway,) = stack.containers("vision"), stack.containers("gateway")
    with Load(stack.target, rate=40) as load:
        time.sleep(1.0)
        kill_on_host(stack, container)
        killed = time.monotonic()
        while time.monotonic() < killed + RECOVERY_SECONDS:
            time.sleep(0.25)
            if load.failures() and all(outcome is None for _, _, outcome in load.outcomes[-WORKERS:]):
                break
    failed = [(started, outcome) for started, _, outcome in load.outcomes if outcome is not None]
    assert failed, "the kill was seen"
    first = min(started for started, _ in failed)
    answered = [ended for started, ended, outcome in load.outcomes if outcome is None and started > first]
    assert answered, f"no answer within {RECOVERY_SECONDS} s: {failed[-1]}"
    down = max(started for started, _ in failed) - first
    print(f"{len(failed)} calls refused, the last {down:.1f} s after the first: { ({o.reason for _, o in failed}) }")
    assert {outcome.code for _, outcome in failed} == {grpc.StatusCode.UNAVAILABLE}
    assert all(outcome.reason and outcome.message for _, outcome in failed), "every refusal says why"
    assert down < RECOVERY_SECONDS
    assert stack.inspect(container)["RestartCount"] == 1
    state = stack.inspect(gateway)
    assert (state["RestartCount"], state["State"]["Health"]["Status"]) == (0, "healthy"), "the gateway stays up"


def test_stopping_one_of_two_replicas_at_half_load_loses_no_call(stack):
    stack.compose("up", "--detach", "--wait", "--no-recreate", "--scale", "vision=2", "vision")
    oldest, newest = stack.containers("vision")
    stack.wait_until_serving(10)
    with Load(stack.target) as full:  # also long enough for the gateway to see the second replica
        time.sleep(4.0)
    assert full.failures() == []
    assert calls_logged(stack, newest) > 0, "the gateway found the new replica"
    rate = len(full.outcomes) / 4.0 / 2
    with Load(stack.target, rate=rate) as half:
        time.sleep(2.0)
        stack.run("docker", "stop", "--time", "30", oldest)
        stopped = time.monotonic()
        time.sleep(2.0)
    print(f"{len(half.outcomes)} calls at {rate:.0f}/s, half of full load, {len(half.failures())} failed")
    assert half.failures() == []
    assert any(started > stopped for started, _, _ in half.outcomes)
    assert stack.inspect(oldest)["State"]["ExitCode"] == 0
    stack.run("docker", "rm", oldest)


def test_calls_accepted_before_sigterm_complete(stack):
    """One replica, so nobody else could answer. A stream that outlives the drain must end well too."""
    (container,) = stack.containers("vision")

    def photos(caller, seconds, pause=0.25):
        for number in range(int(seconds / pause)):
            photo = caller.photos[number % len(caller.photos)]
            yield pb.ClassifyImagesRequest(id=str(number), request=pb.ClassifyImageRequest(image=photo))
            time.sleep(pause)

    def stream(seconds):
        with Caller(stack.target) as caller:
            try:
                answers = list(caller.stub.ClassifyImages(photos(caller, seconds), timeout=40))
            except grpc.RpcError as error:
                return refused(error)
            return sorted(int(answer.id) for answer in answers if answer.HasField("response"))

    with Load(stack.target) as load, ThreadPoolExecutor(1) as pool:
        streamed = pool.submit(stream, 6.0)
        time.sleep(1.5)
        sigterm = time.monotonic()
        stack.run("docker", "stop", "--time", "30", container)
        took = time.monotonic() - sigterm
        time.sleep(0.5)
    accepted = [outcome for started, _, outcome in load.outcomes if started < sigterm]
    later = [outcome for started, _, outcome in load.outcomes if started >= sigterm and outcome is not None]
    running = sum(started < sigterm < ended for started, ended, _ in load.outcomes)
    print(f"{running} of {len(accepted)} calls ran at SIGTERM; stopped after {took:.1f} s; {len(later)} refused later")
    assert running > 0
    assert [outcome for outcome in accepted if outcome is not None] == []
    assert streamed.result() == list(range(24)), "the stream was answered whole"
    assert {outcome.code for outcome in later} <= {grpc.StatusCode.UNAVAILABLE}
    assert all(outcome.reason for outcome in later), "every refusal says why"
    assert stack.inspect(container)["State"]["ExitCode"] == 0
    stack.run("docker", "start", container)
    print(f"answers again {stack.wait_until_serving(RECOVERY_SECONDS):.1f} s after docker start")
