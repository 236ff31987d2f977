"""What the containers do when something breaks or stops: clear errors, quick recovery, no lost call."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from usagi.vision.v1 import vision_service_pb2 as pb

from tests.e2e.stack import Caller, refused

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]

RECOVERY_SECONDS = 10.0
WORKERS = 16
REFUSED_PAUSE_SECONDS = 0.05  # a refusal takes no time; without a pause they would be all that runs


class Load:
    """Calls in the background, each with its start in seconds and how it went.

    Args:
        target: the gateway.
        rate: calls a second, started on time whether or not earlier ones are answered; None calls as fast as
            `WORKERS` callers can.
    """

    def __init__(self, target, rate=None):
        self.outcomes = []  # (started, ended, Refused or None)
        self._target, self._rate = target, rate
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(WORKERS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number):
        pause = WORKERS / self._rate if self._rate else 0.0
        due = time.monotonic() + number / WORKERS * pause
        with Caller(self._target) as caller:
            while not self._stop.wait(max(0.0, due - time.monotonic())):
                started = time.monotonic()
                outcome = caller.call(number)
                ended = time.monotonic()
                if outcome is not None:
                    self._stop.wait(REFUSED_PAUSE_SECONDS)
                self.outcomes.append((started, ended, outcome))
                number += 1
                due = max(due + pause, time.monotonic() - 1.0)

    def failures(self):
        return [outcome for _, _, outcome in self.outcomes if outcome is not None]


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
