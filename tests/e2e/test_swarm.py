"""`docker stack deploy`: replaced, scaled and wrongly updated under load, without one failed call."""

import json

import grpc
import pytest

from tests.e2e.load import Load
from tests.e2e.stack import Caller
from tests.e2e.swarm import SwarmStack, swarm_mode
from tests.e2e.test_compose_faults import calls_logged
from tests.e2e.test_compose_isolation import INSIDE, REACHED, outside, own_address

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

RATE = 25.0  # calls a second, started on time whether or not earlier ones are answered
SECONDS = 150.0  # on a busy machine; alone, nothing takes more than 20


@pytest.fixture(scope="module")
def swarm(stack):
    with swarm_mode() as problem:
        if problem:
            pytest.skip(problem)
        swarm = SwarmStack(stack)
        try:
            swarm.deploy()
            swarm.wait(SECONDS, lambda: swarm.settled("vision", 2) and swarm.settled("gateway", 1), "the start")
            with Caller(swarm.target, ca=swarm.ca) as caller:
                assert caller.call().reason == "KEY_MISSING", "the port is open to the network, the door is not"
            with Caller(swarm.target) as caller:
                assert caller.call().code is grpc.StatusCode.UNAVAILABLE, "without TLS nobody comes in at all"
            swarm.make_key()
            swarm.wait(SECONDS, lambda: answered(swarm), "an answer to the key")
            with Load(swarm.target, rate=RATE, **swarm.caller):
                swarm.wait(SECONDS, lambda: answering(swarm) == 2, "calls to both replicas")
            yield swarm
        finally:
            swarm.remove()


def answered(swarm):
    with Caller(swarm.target, **swarm.caller) as caller:
        return caller.call() is None


def answering(swarm):
    """How many of the running replicas have answered calls."""
    return sum(calls_logged(swarm.images, swarm.container(task)) > 0 for task in swarm.running("vision"))


def test_update_scaling_and_a_bad_update_fail_no_call(swarm):
    """Nobody calls twice: what fails, fails."""
    first = swarm.running("vision")
    with Load(swarm.target, rate=RATE, **swarm.caller) as load:

        def report(what, seconds):
            print(f"{what}: {seconds:.1f} s; {len(load.outcomes)} calls, {len(load.failures())} failed")

        swarm.update("vision", "--no-resolve-image", "--image", swarm.image("vision", "next"))
        took = swarm.wait(SECONDS, lambda: swarm.updated("vision") == "completed", "the update")
        took += swarm.wait(SECONDS, lambda: swarm.settled("vision", 2), "the end of the old ones")
        report("2 replicas replaced", took)
        assert not first & swarm.running("vision")
        assert answering(swarm) == 2, "the new ones"

        swarm.scale("vision", 3)
        report("2 to 3 replicas", swarm.wait(SECONDS, lambda: swarm.settled("vision", 3), "three replicas"))
        swarm.wait(SECONDS, lambda: answering(swarm) == 3, "a call to the third")
        swarm.scale("vision", 1)
        report("3 to 1 replica", swarm.wait(SECONDS, lambda: swarm.settled("vision", 1), "one replica"))

        last = swarm.running("vision")
        swarm.update("vision", "--env-add=USAGI_PROVIDERS=nonsense")
        undone = swarm.wait(SECONDS, lambda: swarm.updated("vision") == "rollback_completed", "the rollback")
        report("an update that cannot start, taken back", undone)
        assert swarm.running("vision") == last, "the old one has served all the while"
        assert "nonsense" not in json.dumps(swarm.service("vision")["Spec"])
    assert load.failures() == []
    slowest = max(ended - started for started, ended, _ in load.outcomes)
    print(f"{len(load.outcomes)} calls, the slowest took {slowest:.2f} s")


@pytest.mark.parametrize("service", ["gateway", "vision"])
def test_containers_are_locked_down_as_in_compose(swarm, service):
    (task,) = swarm.running(service)
    container = swarm.container(task)
    inside = swarm.images.python(container, INSIDE)
    assert inside["user"] == [10001, 10001]
    assert {int(mask, 16) for mask in inside["capabilities"]} == {0}
    assert inside["writes"].pop("/tmp/x") == "", "the one place to write"
    assert set(inside["writes"].values()) == {inside["models"]} == {"Read-only file system"}
    assert set(inside["attempts"].values()) == {"Operation not permitted"}
    host = swarm.images.inspect(container)["HostConfig"]
    assert (host["NanoCpus"], host["PidsLimit"]) == (2_000_000_000, 256)
    assert host["Memory"] == {"gateway": 384, "vision": 512}[service] << 20
    assert host["Init"]


def test_services_reach_neither_the_outside_nor_this_machine(swarm):
    (task,) = swarm.running("vision")
    places = [*outside(), [own_address(), 1]]
    assert swarm.images.python(swarm.container(task), REACHED % json.dumps(places)) == []
