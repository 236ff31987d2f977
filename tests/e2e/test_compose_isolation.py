"""What a container can do and reach, asked from inside of it."""

import json
import runpy
import socket
import struct
from pathlib import Path

import pytest

from shared.services_table import load_table

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
SCAN = runpy.run_path(str(ROOT / "deploy/scan/find_secrets.py"))
TABLE = load_table()
RUNNING = ["gateway", *TABLE.services]

INSIDE = """
import ctypes, importlib.util, json, os, pathlib, re, stat
libc = ctypes.CDLL(None, use_errno=True)
status = pathlib.Path("/proc/self/status").read_text()
def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return error.strerror
    return ""
def called(name, *arguments):
    return os.strerror(ctypes.get_errno()) if getattr(libc, name)(*arguments) else ""
def write(path):
    pathlib.Path(path).write_text("x")
print(json.dumps({
    "user": [os.getuid(), os.getgid()],
    "groups": os.getgroups(),
    "capabilities": re.findall(r"Cap(?:Inh|Eff|Prm|Bnd|Amb):\\s*(\\w+)", status),
    "no_new_privileges": re.search(r"NoNewPrivs:\\s*(\\d)", status)[1],
    "writes": {path: refused(write, path) for path in ("/x", "/app/x", "/opt/venv/x", "/etc/x", "/var/x", "/tmp/x")},
    "models": refused(write, "/var/lib/usagi/models/x"),
    "attempts": {
        "become root": refused(os.setuid, 0),
        "make a device": refused(os.mknod, "/tmp/device", stat.S_IFBLK | 0o600, os.makedev(8, 0)),
        "mount": called("mount", b"none", b"/tmp", b"tmpfs", 0, None),
        "change root": refused(os.chroot, "/tmp"),
        "load a module": called("syscall", 175, None, 0, b""),
        "raw socket": refused(__import__("socket").socket, 2, 3, 1),
        "run before all others": refused(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1)),
    },
    "packages": [name for name in ("torch", "onnx", "pip", "setuptools") if importlib.util.find_spec(name)],
    "training": [name for name in ("shared.training", "shared.data") if importlib.util.find_spec(name)],
}))
"""


@pytest.mark.parametrize("service", RUNNING)
def test_locked_down(stack, service):
    inside = stack.python(stack.containers(service)[0], INSIDE)
    assert inside["user"] == [10001, 10001]
    assert set(inside["groups"]) <= {10001}
    assert {int(mask, 16) for mask in inside["capabilities"]} == {0}
    assert len(inside["capabilities"]) == 5
    assert inside["no_new_privileges"] == "1"
    writes = inside["writes"]
    assert writes.pop("/tmp/x") == "", "the one place to write"
    assert set(writes.values()) == {"Read-only file system"}
    assert inside["models"] == "Read-only file system"
    assert set(inside["attempts"].values()) == {"Operation not permitted"}, inside["attempts"]
    assert inside["packages"] == []
    assert inside["training"] == []


OURS = ("/app", "/etc", "/home", "/root", "/srv", "/tmp", "/var")
"""Folders with files of ours; packages and the rest of the base image show keys in their documentation."""
SECRETS_INSIDE = """
import json, os
found, files = [], 0
for top in %r:
    for folder, names, paths in os.walk(top):
        for path in (os.path.join(folder, path) for path in paths):
            if os.path.isfile(path) and os.access(path, os.R_OK) and not path.endswith((".onnx", ".pyc", ".binpb")):
                files += 1
                text = open(path, "rb").read(1_000_000).decode("latin-1")
                found += [(path, kind) for kind, pattern in KINDS.items() if pattern.search(text)]
print(json.dumps([files, found, dict(os.environ)]))
"""


@pytest.mark.parametrize("service", RUNNING)
def test_no_secret_is_in_an_image(stack, service):
    """By the patterns of `make scan`: every file that it can read, its environment, its layers' history."""
    source = (ROOT / "deploy/scan/find_secrets.py").read_text().split("if __name__")[0]
    source = source.replace("Path(__file__)", "Path('/x')")
    (container,) = stack.containers(service)
    files, found, environment = stack.python(container, source + SECRETS_INSIDE % (OURS,))
    assert files > 100, "it looked"
    assert found == []
    history = stack.run(
        "docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", stack.inspect(container)["Image"]
    )
    lines = [*history.splitlines(), *(f"{name}={value}" for name, value in environment.items())]
    assert [line for line in lines if list(SCAN["secrets_in"](line))] == []


REACHED = """
import concurrent.futures, json, socket
def reached(address):
    try:
        socket.create_connection(address, 2).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True
addresses = json.loads('%s')
with concurrent.futures.ThreadPoolExecutor(len(addresses)) as pool:
    answers = list(pool.map(reached, map(tuple, addresses)))
print(json.dumps([address for address, answer in zip(addresses, answers) if answer]))
"""


def outside():
    """Addresses beyond this machine: the router, where it has one, and public name servers."""
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    routers = [socket.inet_ntoa(struct.pack("<I", int(route[2], 16))) for route in routes if route[1] == "00000000"]
    return [[host, 53] for host in (*routers, "1.1.1.1", "8.8.8.8")]


def own_address():
    """An address of this machine outside of Docker's networks."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]


@pytest.mark.parametrize("service", RUNNING)
def test_no_way_out(stack, service):
    """Not even from the gateway: nothing translates its address."""
    program = REACHED % json.dumps(outside())
    assert stack.python(stack.containers(service)[0], program) == []


def test_the_test_of_ways_out_can_fail(stack):
    """The same program in a network as Docker makes it reaches at least this machine, which refuses the connection."""
    image = stack.inspect(stack.containers("gateway")[0])["Image"]
    program = REACHED % json.dumps([[own_address(), 1]])
    command = ("docker", "run", "--rm", "-i", "--entrypoint", "python", image, "-")
    assert json.loads(stack.run(*command, stdin=program)) == [[own_address(), 1]]


@pytest.mark.parametrize("service", TABLE.services)
def test_services_cannot_reach_this_machine(stack, service):
    (container,) = stack.containers(service)
    networks = stack.inspect(container)["NetworkSettings"]["Networks"]
    assert set(networks) == {f"{stack.project}_backend"}
    network = json.loads(stack.run("docker", "network", "inspect", *networks))[0]
    assert network["Internal"]
    gateways = [config["Gateway"] for config in network["IPAM"]["Config"] if "Gateway" in config]
    places = [[host, 1] for host in (own_address(), *gateways)]
    assert stack.python(container, REACHED % json.dumps(places)) == []


def test_services_reach_nothing_of_the_gateway_but_its_door(stack):
    """Envoy's administration and the catalog listen on the gateway's loopback."""
    gateway = TABLE.gateway
    door = ["gateway", gateway.port]
    places = [door, ["gateway", gateway.admin_port], ["gateway", gateway.catalog_port]]
    for service in TABLE.services:
        (container,) = stack.containers(service)
        assert stack.python(container, LISTENING % json.dumps(places)) == [door]


LISTENING = REACHED.replace("return True\n    except OSError", "return False\n    except OSError", 1)
"""Here a refused connection does not count: only a listener does."""

SEEN = """
import json, os, pathlib, stat
marker = %r
def walk(root):
    for folder, names, files in os.walk(root):
        if folder == root:
            names[:] = [name for name in names if name not in ("proc", "sys")]
        yield from (os.path.join(folder, name) for name in files)
roots = ["/"]
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        if not os.path.samefile(process / "root", "/"):
            roots.append(str(process / "root"))
    except OSError:
        pass
mounts = [line.split(" - ") for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()]
def kind(name):
    return os.lstat(os.path.join("/dev", name)).st_mode
print(json.dumps({
    "marker": [path for root in roots for path in walk(root) if path.endswith(marker)],
    "processes": sorted({path.read_text().strip() for path in pathlib.Path("/proc").glob("[0-9]*/comm")}),
    "mounts": {left.split()[4]: [right.split()[0], left.split()[5].split(",")[0]] for left, right in mounts},
    "block_devices": [name for name in os.listdir("/dev") if stat.S_ISBLK(kind(name))],
    "sockets": [path for path in walk("/run") if stat.S_ISSOCK(os.lstat(path).st_mode)],
}))
"""
OF_DOCKER = {"/etc/resolv.conf", "/etc/hostname", "/etc/hosts", "/sbin/docker-init", "/usr/sbin/docker-init"}
VOLUMES = {"gateway": {"/var/lib/usagi/gateway": "rw", "/var/lib/usagi/keys": "rw"}}
SERVING_VOLUMES = {"/var/lib/usagi/models": "ro", "/var/lib/usagi/keys": "ro"}
PROCESSES = {"docker-init", "tini", "python", "envoy"}


def test_no_container_sees_files_or_processes_of_another(stack):
    write = "import pathlib, json; pathlib.Path('/tmp/%s').write_text('x'); print('null')"
    containers = {service: stack.containers(service)[0] for service in RUNNING}
    for service, container in containers.items():
        stack.python(container, write % f"marker-of-{service}")
    for service, container in containers.items():
        seen = stack.python(container, SEEN % f"marker-of-{service}")
        assert seen["marker"] == [f"/tmp/marker-of-{service}"], "its own is found, so the search works"
        for other in set(RUNNING) - {service}:
            assert stack.python(container, SEEN % f"marker-of-{other}")["marker"] == []
        assert {name for name in seen["processes"] if not name.startswith("python")} <= PROCESSES
        assert seen["block_devices"] == []
        assert seen["sockets"] == []
        disks = {
            place: access
            for place, (kind, access) in seen["mounts"].items()
            if kind not in {"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"}
        }
        assert disks.pop("/") == "ro"
        own = {place: access for place, access in disks.items() if place not in OF_DOCKER}
        assert own == VOLUMES.get(service, SERVING_VOLUMES)
