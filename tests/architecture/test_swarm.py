"""deploy/swarm/stack.yaml says what docker-compose.yml says, in the words that Swarm obeys."""

import pytest

from shared.services_table import load_table
from tests.architecture.deployments import ROOT, byte_count, compose_services, environment, load, mounts

COMPOSE = compose_services()
STACK = load("deploy/swarm/stack.yaml")
SERVICES = STACK["services"]
NAMES = sorted(COMPOSE)
IGNORED = (
    *("build", "cgroup_parent", "container_name", "depends_on", "devices", "external_links", "links", "network_mode"),
    *("profiles", "restart", "security_opt", "tmpfs", "userns_mode", "cpus", "mem_limit", "pids_limit"),
)
"""Keys of Compose that `docker stack deploy` leaves out, most of them without a word."""


def test_it_holds_the_gateway_and_every_service_of_the_table():
    wanted = {"gateway", *load_table().services}
    assert set(SERVICES) == wanted == set(COMPOSE), "add the service below `vision`, in the same two lines"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stands_there_that_swarm_ignores(name):
    assert not set(SERVICES[name]) & set(IGNORED)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["user", "read_only", "cap_drop", "init", "stop_grace_period", "logging", "networks"])
def test_the_same_as_in_compose(name, key):
    assert SERVICES[name][key] == COMPOSE[name][key]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_limits(name):
    limits = SERVICES[name]["deploy"]["resources"]["limits"]
    ours = (float(limits["cpus"]), byte_count(limits["memory"]), limits["pids"])
    theirs = (float(COMPOSE[name]["cpus"]), byte_count(COMPOSE[name]["mem_limit"]), COMPOSE[name]["pids_limit"])
    assert ours == theirs


@pytest.mark.parametrize("name", NAMES)
def test_the_same_environment_but_that_keys_are_required(name):
    ours = environment(SERVICES[name])
    assert ours.pop("USAGI_KEYS_REQUIRED") == "1", "the port is open to the network"
    assert ours == environment(COMPOSE[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_places_to_write(name):
    volumes = {volume["target"]: volume for volume in SERVICES[name]["volumes"]}
    assert list(volumes) == sorted(volumes, key=lambda path: volumes[path].get("source", "")), "see the stack's comment"
    (tmpfs,) = COMPOSE[name]["tmpfs"]
    size = byte_count(tmpfs.split("size=")[1].split(",")[0])
    assert volumes.pop("/tmp") == {"type": "tmpfs", "target": "/tmp", "tmpfs": {"size": size}}
    assert {path: (volume["source"], volume.get("read_only", False)) for path, volume in volumes.items()} == mounts(
        COMPOSE[name]
    )


@pytest.mark.parametrize("name", NAMES)
def test_containers_that_are_only_slow_are_not_killed(name):
    """What the image asks, as often, with patience: the gateway turns away from a sick replica in seconds by itself."""
    check = SERVICES[name]["healthcheck"]
    assert "test" not in check
    assert check == {"interval": "3s", "timeout": "10s", "retries": 10}
    assert "HEALTHCHECK --interval=3s" in (ROOT / "deploy/docker/service.Dockerfile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_new_container_takes_calls_before_an_old_one_stops(name):
    deploy = SERVICES[name]["deploy"]
    assert deploy["endpoint_mode"] == "dnsrr", "else a name is one address, and HTTP/2 stays with one replica"
    assert deploy["update_config"]["failure_action"] == "rollback"
    expected = "stop-first" if name == "gateway" else "start-first"
    assert deploy["update_config"]["order"] == expected
    assert deploy["restart_policy"]["condition"] == "any"


@pytest.mark.parametrize("name", NAMES)
def test_images_are_those_that_compose_builds(name):
    assert SERVICES[name]["image"] == f"usagi-{name}:latest"


def test_services_have_no_way_out_and_only_the_gateway_a_port():
    assert STACK["networks"]["backend"] == {"driver": "overlay", "internal": True}
    assert [name for name in NAMES if "ports" in SERVICES[name]] == ["gateway"]
    (port,) = SERVICES["gateway"]["ports"]
    assert (port["target"], port["mode"]) == (load_table().gateway.port, "host")
