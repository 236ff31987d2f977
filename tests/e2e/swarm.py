"""The Swarm under test: a stack of its own beside the compose stack, from the same images."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.gateway.tls import AUTHORITY, make_certificate
from shared.services_table import load_table
from tests.e2e.stack import ROOT, ComposeStack

LOOPBACK = ("--advertise-addr", "127.0.0.1", "--listen-addr", "127.0.0.1:2377")
ENDED = ("Shutdown", "Complete", "Failed", "Rejected", "Orphaned", "Remove")


@contextlib.contextmanager
def swarm_mode() -> Iterator[str]:
    """Makes this engine a Swarm of one until the block ends, unless it is one; yields why it cannot."""
    state = json.loads(docker("info", "--format", "{{json .Swarm}}"))
    if state["LocalNodeState"] != "inactive":
        yield "" if state["ControlAvailable"] else "this engine is a worker of somebody's Swarm"
        return
    docker("swarm", "init", *LOOPBACK)
    try:
        yield ""
    finally:
        docker("swarm", "leave", "--force")


def docker(*arguments: str, environment: dict[str, str] | None = None, check: bool = True) -> str:
    """A docker command in the repository's root; what it prints, and that with its errors if it fails."""
    command = ["docker", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass
class SwarmStack:
    """`docker stack deploy` of deploy/swarm, with TLS and the images of a compose project."""

    images: ComposeStack
    key: str = ""
    ca: bytes = b""
    tags: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.name = f"usagi-swarm-{self.port}"
        self.target = f"127.0.0.1:{self.port}"

    def deploy(self) -> None:
        """Makes a certificate, deploys the stack with it, and does not wait; only vision gets replicas."""
        with tempfile.TemporaryDirectory() as folder:
            both = make_certificate(Path(folder))
            self.ca = both.with_name(AUTHORITY).read_bytes()
            for secret in self.secrets.values():
                docker("secret", "create", secret, str(both))
            others = {name: {"deploy": {"replicas": 0}} for name in load_table().services if name != "vision"}
            few = Path(folder) / "few.yaml"
            few.write_text(json.dumps({"version": "3.9", "services": others}), encoding="utf-8")
            files = [f"--compose-file={path}" for path in ("deploy/swarm/stack.yaml", "deploy/swarm/tls.yaml", few)]
            ours = {"USAGI_IMAGES": self.images.project, "USAGI_GATEWAY_PORT": str(self.port)}
            environment = {**os.environ, **ours, **self.secrets}
            docker("stack", "deploy", "--resolve-image=never", *files, self.name, environment=environment)

    @property
    def secrets(self) -> dict[str, str]:
        """The variables of tls.yaml: one file holds certificate and key, and is two secrets."""
        return {f"USAGI_TLS_{what}_SECRET": f"{self.name}-{what.lower()}" for what in ("CERT", "KEY")}

    @property
    def caller(self) -> dict[str, Any]:
        """What a Caller needs to come in."""
        return {"key": self.key, "ca": self.ca}

    def image(self, service: str, tag: str) -> str:
        """The service's image under another tag, which for Swarm is another image."""
        name = f"{self.images.project}-{service}"
        docker("tag", f"{name}:latest", f"{name}:{tag}")
        self.tags.add(f"{name}:{tag}")
        return f"{name}:{tag}"

    def make_key(self) -> None:
        """An API key, as deploy/README.md says."""
        (task,) = self.running("gateway")
        keys = ("python", "-m", "services.gateway", "keys", "make", "test")
        self.key = docker("exec", self.container(task), *keys).strip()

    def service(self, service: str) -> dict[str, Any]:
        """What Swarm knows of a service."""
        return json.loads(docker("service", "inspect", f"{self.name}_{service}"))[0]

    def update(self, service: str, *arguments: str) -> None:
        """Begins an update, and does not wait for it."""
        docker("service", "update", "--detach=true", "--quiet", *arguments, f"{self.name}_{service}")

    def scale(self, service: str, replicas: int) -> None:
        """Begins to start or stop replicas, and does not wait for it."""
        docker("service", "scale", "--detach=true", f"{self.name}_{service}={replicas}")

    def tasks(self, service: str) -> list[dict[str, Any]]:
        """Its tasks, newest first, those that ended too."""
        lines = docker("service", "ps", "--no-trunc", "--format", "{{json .}}", f"{self.name}_{service}", check=False)
        return [json.loads(line) for line in lines.splitlines()]

    def running(self, service: str) -> set[str]:
        """Ids of the tasks whose containers are healthy."""
        return {task["ID"] for task in self.tasks(service) if task["CurrentState"].startswith("Running")}

    def container(self, task: str) -> str:
        """Id of a task's container, also after it ended."""
        return json.loads(docker("inspect", task))[0]["Status"]["ContainerStatus"]["ContainerID"]

    def settled(self, service: str, replicas: int) -> bool:
        """Whether so many tasks run, and no other one starts or stops."""
        live = [task for task in self.tasks(service) if not task["CurrentState"].startswith(ENDED)]
        wanted = [task for task in self.tasks(service) if task["DesiredState"] == "Running"]
        return len(live) == len(wanted) == len(self.running(service)) == replicas

    def updated(self, service: str) -> str:
        """How the last update stands: `completed`, `updating`, `rollback_completed` and so on."""
        return str(self.service(service).get("UpdateStatus", {}).get("State", ""))

    def wait(self, seconds: float, done: Callable[[], bool], what: str) -> float:
        """Waits until `done`; the seconds that it took."""
        started = time.monotonic()
        while not done():
            if time.monotonic() > started + seconds:
                raise AssertionError(f"{what} not within {seconds} s:\n{self.report()}")
            time.sleep(0.2)
        return time.monotonic() - started

    def report(self) -> str:
        """Tasks and logs, for whoever reads why a test failed."""
        lines = [docker("stack", "ps", "--no-trunc", self.name, check=False)]
        return "\n".join([*lines, docker("service", "logs", "--tail", "30", f"{self.name}_vision", check=False)])

    def remove(self) -> None:
        """The stack with its volumes and tags, and waits for the containers' ends."""
        docker("stack", "rm", self.name, check=False)
        label = f"label=com.docker.stack.namespace={self.name}"
        deadline = time.monotonic() + 40
        while docker("ps", "--quiet", "--filter", label) and time.monotonic() < deadline:
            time.sleep(0.2)
        while (left := docker("network", "ls", "--quiet", "--filter", label)) and time.monotonic() < deadline:
            time.sleep(0.2)
        for container in docker("ps", "--all", "--quiet", "--filter", label).split():
            docker("rm", "--force", container, check=False)
        for volume in docker("volume", "ls", "--quiet", "--filter", label).split():
            docker("volume", "rm", volume, check=False)
        for secret in self.secrets.values():
            docker("secret", "rm", secret, check=False)
        for tag in self.tags:
            docker("rmi", tag, check=False)
        assert not left, f"networks of {self.name} are left"
