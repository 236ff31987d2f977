"""What the deployment files promise, read without Docker; tests/e2e asks the running containers the same."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from services.gateway.dashboard import dashboard
from shared.services_table import load_table

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "deploy/docker/service.Dockerfile").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SERVICES = list(load_table().services)
IMAGES = ("serve", "train", "gateway", "load")
HARDENING = (
    'user: "10001:10001"',
    "read_only: true",
    "tmpfs:",
    "cap_drop: [ALL]",
    'security_opt: ["no-new-privileges:true"]',
    "init: true",
    "pids_limit:",
    "restart: unless-stopped",
    "stop_grace_period:",
    "max-size:",
)


def blocks(text):
    """The entries of compose's `services:`, by name."""
    section = re.search(r"^services:\n(.*?)^(?=\S)", text, re.M | re.S)[1]
    parts = re.split(r"^  ([\w-]+):\n", section, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def anchor(name):
    return re.search(rf"^x-{name}: &{name}\n(.*?)^(?=\S)", COMPOSE, re.M | re.S)[1]


def stages():
    """The Dockerfile's instructions by stage."""
    joined = re.sub(r"\\\n", " ", DOCKERFILE)
    lines = [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found, current = {}, "global"
    for line in lines:
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            current = match[2]
            found[current] = [line]
        else:
            found.setdefault(current, []).append(line)
    return found


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_of_the_table_stands_in_compose(service):
    block = blocks(COMPOSE)[service]
    assert "<<: *serving" in block
    assert f"SERVICE: {service}" in block
    assert "target: serve" in block
    assert "profiles" not in block, "it starts with `make up`"
    depends = re.search(r"depends_on: \[(.*?)\]", blocks(COMPOSE)["gateway"])[1]
    assert service in depends.split(", "), "the gateway stops before it"


def test_compose_holds_nothing_that_the_table_does_not_know():
    allowed = {"gateway", "load", "prometheus", "grafana", *SERVICES, *(f"{service}-train" for service in SERVICES)}
    assert set(blocks(COMPOSE)) <= allowed


def test_every_service_of_the_table_can_have_a_gpu():
    text = (ROOT / "deploy/compose.gpu.yaml").read_text(encoding="utf-8")
    assert re.findall(r"^  ([\w-]+): \*gpu$", text, re.M) == SERVICES, "add a line `  <service>: *gpu` for each"


@pytest.mark.parametrize("key", HARDENING)
def test_hardening_is_complete(key):
    assert key in anchor("hardened")


@pytest.mark.parametrize("service", blocks(COMPOSE))
def test_every_container_is_hardened_and_limited(service):
    block = blocks(COMPOSE)[service]
    hardened = block + "".join(anchor(name) for name in ("serving", "training") if f"<<: *{name}" in block)
    assert "<<: *hardened" in hardened
    assert "cpus:" in hardened
    assert "mem_limit:" in hardened
    assert not re.search(r"privileged|cap_add|docker\.sock|network_mode", block)


def test_only_the_gateway_publishes_a_port_and_on_loopback():
    default = {name: block for name, block in blocks(COMPOSE).items() if "profiles:" not in block}
    assert [name for name, block in default.items() if "ports:" in block] == ["gateway"]
    published = re.findall(r"ports: \[(.*)\]", COMPOSE)
    assert all(each.startswith('"127.0.0.1:') for each in published), "in a profile too, this machine only"
    assert 'ports: ["127.0.0.1:${USAGI_GATEWAY_PORT:-8080}:8080"]' in blocks(COMPOSE)["gateway"]
    assert "  backend:\n    internal: true" in COMPOSE
    assert COMPOSE.count('enable_ip_masquerade: "false"') == 1
    assert "monitoring: *published" in COMPOSE
    assert "networks: [backend]" in anchor("serving")


def test_containers_get_more_time_to_stop_than_they_ask_for():
    grace = int(re.search(r"stop_grace_period: (\d+)s", COMPOSE)[1])
    drain = int(re.search(r"USAGI_DRAIN_SECONDS: (\d+)", COMPOSE)[1])
    default = re.search(r"grace_seconds: float = ([\d.]+)", (ROOT / "shared/serving/config.py").read_text())[1]
    assert grace > drain + float(default)


def test_env_file_holds_every_variable_with_the_default_that_compose_has():
    lines = (ROOT / ".env").read_text(encoding="utf-8").splitlines()
    declared = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    used = dict(re.findall(r"\$\{(USAGI_\w+):-([^}]*)\}", COMPOSE))
    assert declared == used
    assert not [name for name in declared if re.search(r"KEY(?!S_REQUIRED)|SECRET|TOKEN|PASSWORD", name)]


@pytest.mark.parametrize("image", IMAGES)
def test_images_run_as_a_numeric_user_that_is_not_root(image):
    users = [line.split()[1] for line in stages()[image] if line.startswith("USER ")]
    assert users
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])


@pytest.mark.parametrize("image", IMAGES)
def test_images_have_an_exec_entrypoint_labels_and_a_word_on_health(image):
    lines = stages()[image]
    assert [line for line in lines if line.startswith('ENTRYPOINT ["')]
    assert not [line for line in lines if re.match(r"(ENTRYPOINT|CMD) [^\[]", line)]
    assert [line for line in lines if line.startswith("LABEL org.opencontainers.image.title=")]
    (health,) = [line for line in lines if line.startswith("HEALTHCHECK ")]
    # a job has no health but its exit code
    assert ("probe.py" in health) == (image in ("serve", "gateway"))
    assert ("HEALTHCHECK NONE" in health) == (image in ("train", "load"))


def test_dockerfile_builds_without_a_registry_of_other_images():
    assert "# syntax=" not in DOCKERFILE
    assert "<<EOF" not in DOCKERFILE
    sources = {line.split()[1] for lines in stages().values() for line in lines if line.startswith("FROM ")}
    assert sources <= {"${BASE}", *stages()}
    copied = set(re.findall(r"COPY --from=(\S+)", DOCKERFILE))
    assert copied <= set(stages())


def test_image_version_is_the_projects():
    assert f"ARG VERSION={PYPROJECT['version']}\n" in DOCKERFILE


def requirements(*extras):
    program = [sys.executable, "-I", "-S", "deploy/docker/requirements.py", *extras]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)


def test_requirements_are_the_plain_ones_and_the_extras():
    printed = requirements("cpu", "vision").stdout.splitlines()
    optional = PYPROJECT["optional-dependencies"]
    assert printed == sorted({*PYPROJECT["dependencies"], *optional["cpu"], *optional["vision"]})
    assert not [line for line in printed if re.match(r"torch|onnx\b", line)]


def test_unknown_extra_is_refused():
    done = requirements("cpu", "visoin")
    assert done.returncode == 1
    assert "no extra visoin" in done.stderr


def test_grafana_is_provisioned_with_the_dashboard_and_its_datasource():
    """Grafana itself is in no package index, so its files are held against each other and against compose."""
    folder = ROOT / "deploy/observability/grafana"
    datasource = (folder / "provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    provider = (folder / "provisioning/dashboards/usagi.yml").read_text(encoding="utf-8")
    committed = (folder / "dashboards/overview.json").read_text(encoding="utf-8")
    assert committed == dashboard(), "run `python -m services.gateway dashboard`"
    uid = re.search(r"uid: (\S+)", datasource)[1]
    panels = json.loads(committed)["panels"]
    assert {target["datasource"]["uid"] for panel in panels for target in panel["targets"]} == {uid}
    assert len({panel["id"] for panel in panels}) == len({str(panel["gridPos"]) for panel in panels}) == len(panels)
    assert "url: http://prometheus:9090" in datasource
    mounted = re.search(r"grafana/dashboards:(\S+):ro", blocks(COMPOSE)["grafana"])[1]
    assert f"path: {mounted}" in provider
    assert re.search(r"image: grafana/grafana:\d+\.\d+\.\d+\n", blocks(COMPOSE)["grafana"]), "a version, never latest"
