"""deploy/k8s: valid by the published schemas, and of one mind with docker-compose.yml and services.toml."""

import json
import shutil
import subprocess
import tomllib

import kubernetes_validate
import pytest
import yaml

from services.gateway.canaries import CanaryFile
from services.gateway.config import CANARY_FILE
from shared.api_keys import KeyFile, digest, new_secret
from shared.services_table import load_table
from tests.architecture.deployments import ROOT, byte_count, compose_services, environment, load, mounts
from tests.architecture.kubernetes import (
    K8S,
    OVERLAYS,
    containers,
    kustomize_problem,
    matches,
    of_kind,
    pod_labels,
    rendered,
    variables,
)

pytestmark = pytest.mark.skipif(bool(kustomize_problem()), reason=kustomize_problem())

OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()
"""The oldest Kubernetes that the manifests are for (`preStop.sleep`), and the newest that the package knows."""
TABLE = load_table()
SERVICES = list(TABLE.services)
COMPOSE = compose_services()
NAMES = ["gateway", *SERVICES]
PRODUCTION = OVERLAYS["production"]
README = (ROOT / "deploy/README.md").read_text(encoding="utf-8")
SERVING_PORT = TABLE.services["vision"].port


# The schemas


def validate(manifests, version):
    known = [each for each in manifests if not each["apiVersion"].startswith("keda.sh/")]
    assert known
    for manifest in known:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_manifests_are_valid(manifests):
    validate(manifests, NEWEST)


def test_manifests_are_valid_for_the_oldest_kubernetes():
    validate(rendered(PRODUCTION), OLDEST)


def test_schemas_refuse_what_they_should():
    manifest = json.loads(json.dumps(of_kind(rendered(OVERLAYS["base"]), "Deployment")["vision"]))
    manifest["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["grpc"]["prot"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="prot"):
        kubernetes_validate.validate(manifest, NEWEST, strict=True)


def test_scaled_objects_are_valid():
    """By KEDA's own definition. Its models drop what they do not know, so they must give back all of what they took."""
    from cloudcoil.models.keda.v1alpha1 import ScaledObject

    found = of_kind(rendered(PRODUCTION), "ScaledObject")
    assert sorted(found) == sorted(SERVICES)
    for manifest in found.values():
        model = ScaledObject.model_validate(manifest)
        assert json.loads(model.model_dump_json(by_alias=True, exclude_unset=True)) == manifest


# Of one mind with the rest


def test_every_service_of_the_table_stands_there(manifests):
    assert set(pod_labels(manifests)) - {"prometheus"} == set(NAMES), "add deploy/k8s/services/<service>"
    for name, service in of_kind(manifests, "Service").items():
        chosen = [
            pod
            for pod, labels in pod_labels(manifests).items()
            if service["spec"]["selector"].items() <= labels.items()
        ]
        assert chosen == ["gateway" if name == "usagi" else name]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_ports_are_those_that_the_gateway_and_prometheus_ask(name):
    service = of_kind(rendered(OVERLAYS["base"]), "Service")[name]["spec"]
    assert service["clusterIP"] == "None", "the name answers with every replica"
    port, metrics = (TABLE.gateway.port, TABLE.gateway.metrics_port) if name == "gateway" else ports_of(name)
    assert {each["name"]: each["port"] for each in service["ports"]} == {"grpc": port, "metrics": metrics}
    _, container = containers(rendered(OVERLAYS["base"]))[name]
    assert {each["name"]: each["containerPort"] for each in container["ports"]} == {"grpc": port, "metrics": metrics}


def ports_of(name):
    return TABLE.services[name].port, TABLE.services[name].metrics_port


@pytest.mark.parametrize("name", NAMES)
def test_the_same_limits_as_in_compose(name):
    _, container = containers(rendered(OVERLAYS["base"]))[name]
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    theirs = (float(COMPOSE[name]["cpus"]), byte_count(COMPOSE[name]["mem_limit"]))
    assert (float(limits["cpu"]), byte_count(limits["memory"])) == theirs
    assert byte_count(requests["memory"]) <= theirs[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_environment_but_that_keys_are_required(name):
    _, container = containers(rendered(OVERLAYS["base"]))[name]
    ours = variables(container)
    assert ours.pop("USAGI_KEYS_REQUIRED") == "1"
    assert ours == environment(COMPOSE[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_paths_as_in_compose(name):
    """The gateway writes neither keys nor canaries here: a Secret and a ConfigMap hold them, for all its pods alike."""
    pod, container = containers(rendered(PRODUCTION))[name]
    ours = {each["mountPath"]: each.get("readOnly", False) for each in container["volumeMounts"]}
    assert ours.pop("/tmp") is False
    assert ours.pop("/run/secrets/usagi-tls", True)
    assert set(ours) == set(mounts(COMPOSE[name]))
    assert all(ours.values())
    (tmpfs,) = COMPOSE[name]["tmpfs"]
    (tmp,) = [each["emptyDir"] for each in pod["volumes"] if each["name"] == "tmp"]
    assert tmp["medium"] == "Memory"
    assert byte_count(tmp["sizeLimit"]) == byte_count(tmpfs.split("size=")[1].split(",")[0])


@pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")
@pytest.mark.parametrize(
    ("command", "path", "kind", "variable"),
    [
        ("create secret generic usagi-api-keys", "var/keys/api-keys", "secret", "USAGI_KEYS_FILE"),
        ("create configmap usagi-canaries", "var/gateway/canaries.json", "configMap", "USAGI_STATE_DIR"),
    ],
)
def test_commands_of_the_readme_make_the_files_that_the_gateway_reads(command, path, kind, variable, tmp_path):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text("{}", encoding="utf-8")
    words = f"-n usagi {command} --from-file={path} --dry-run=client --output=yaml"
    assert f"kubectl {words} | kubectl apply --filename=-" in README
    done = subprocess.run(
        ["kubectl", *words.split()], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    made = yaml.safe_load(done.stdout)
    pod, container = containers(rendered(OVERLAYS["base"]))["gateway"]
    (volume,) = [each for each in pod["volumes"] if kind in each]
    assert volume[kind].get("secretName", volume[kind].get("name")) == made["metadata"]["name"]
    assert volume[kind]["optional"], "it starts without"
    (mount,) = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == volume["name"]]
    (name,) = made["data"]
    read = variables(container)[variable]
    assert f"{mount}/{name}" == (f"{read}/{CANARY_FILE}" if kind == "configMap" else read)


def test_files_are_followed_through_the_kubelets_links(tmp_path):
    """It swaps the link `..data`; what is mounted are links through it."""
    secret = new_secret()
    for folder, entries in (("..1", ""), ("..2", f"alice infer {digest(secret)}\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "api-keys").write_text(entries, encoding="utf-8")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "api-keys").symlink_to("..data/api-keys")
    keys, canaries = KeyFile(tmp_path / "api-keys"), CanaryFile(tmp_path / "api-keys")
    before = keys.signature(), canaries.signature()
    assert keys.load() == ()
    (tmp_path / "..new").symlink_to("..2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert all(old != new for old, new in zip(before, (keys.signature(), canaries.signature()), strict=True))
    assert [key.name for key in keys.load()] == ["alice"]


def test_images_have_the_projects_version(manifests):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for name, (_, container) in containers(manifests).items():
        image, tag = container["image"].rsplit(":", 1)
        assert image in (f"usagi-{name}", f"registry.example.com/usagi/{name}")
        assert tag in (version, f"{version}-gpu")


# Started, replaced, scaled


@pytest.mark.parametrize("name", NAMES)
def test_probes_ask_over_grpc_for_what_the_images_health_check_asks(name):
    _, container = containers(rendered(OVERLAYS["base"]))[name]
    asked = {"port": SERVING_PORT}
    if name == "gateway":
        asked = {"port": TABLE.gateway.port, "service": "usagi.model.v1.ModelService"}
        dockerfile = (ROOT / "deploy/docker/service.Dockerfile").read_text(encoding="utf-8")
        assert f'"127.0.0.1:{asked["port"]}", "{asked["service"]}"]' in dockerfile
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"] == asked


def test_with_tls_the_gateways_probes_are_the_images_own():
    """The kubelet's speak plain gRPC, which the gateway then takes over loopback only."""
    dockerfile = (ROOT / "deploy/docker/service.Dockerfile").read_text(encoding="utf-8")
    pod, container = containers(rendered(PRODUCTION))["gateway"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert set(container[probe]) & {"exec", "grpc"} == {"exec"}
        assert f"CMD {json.dumps(container[probe]['exec']['command'])}\n" in dockerfile
    (mount,) = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == "tls"]
    assert {"secretName": "usagi-tls", "defaultMode": 0o440} in [each.get("secret") for each in pod["volumes"]]
    files = {variables(container)[name] for name in ("USAGI_TLS_CERT", "USAGI_TLS_KEY")}
    assert files == {f"{mount}/tls.crt", f"{mount}/tls.key"}, "as the type kubernetes.io/tls names them"


def test_pods_get_more_time_to_stop_than_they_ask_for():
    found = containers(rendered(OVERLAYS["base"]))
    for name in SERVICES:
        pod, container = found[name]
        assert pod["terminationGracePeriodSeconds"] > float(variables(container)["USAGI_DRAIN_SECONDS"]) + 20
    pod, container = found["gateway"]
    assert pod["terminationGracePeriodSeconds"] > container["lifecycle"]["preStop"]["sleep"]["seconds"] + 20 + 5


def test_updates_and_evictions_leave_pods_that_answer(manifests):
    deployments, budgets = of_kind(manifests, "Deployment"), of_kind(manifests, "PodDisruptionBudget")
    assert set(budgets) == set(NAMES)
    for name in NAMES:
        assert deployments[name]["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        assert budgets[name]["spec"]["maxUnavailable"] == 1
        chosen = [
            pod for pod, labels in pod_labels(manifests).items() if matches(budgets[name]["spec"]["selector"], labels)
        ]
        assert chosen == [name]


def test_who_scales_a_deployment_is_the_only_one(with_hpa):
    """`replicas` in a manifest that is applied again would undo what the scaler did."""
    for manifests, kind in ((rendered(PRODUCTION), "ScaledObject"), (with_hpa, "HorizontalPodAutoscaler")):
        deployments, scalers = of_kind(manifests, "Deployment"), of_kind(manifests, kind)
        assert set(SERVICES) <= set(scalers)
        for name, scaler in scalers.items():
            assert scaler["spec"]["scaleTargetRef"]["name"] == name
            assert "replicas" not in deployments[name]["spec"]


@pytest.mark.parametrize("name", SERVICES)
def test_keda_asks_prometheus_for_the_queue_of_its_service(name):
    """That the query has an answer is shown by tests/e2e/test_metrics.py."""
    spec = load(f"deploy/k8s/components/keda/{name}.yaml")["spec"]
    (trigger,) = spec["triggers"]
    assert f'usagi_queue_depth{{job="{name}"}}' in trigger["metadata"]["query"]
    assert trigger["metadata"]["serverAddress"] == "http://prometheus.usagi:9090"
    assert "prometheus" in of_kind(rendered(PRODUCTION), "Service")
    assert spec["fallback"]["replicas"] >= spec["minReplicaCount"] >= 2


def test_every_folder_is_used():
    text = "".join(path.read_text(encoding="utf-8") for path in K8S.glob("**/kustomization.yaml"))
    for component in (path.name for path in (K8S / "components").iterdir()):
        assert f"components/{component}" in text or component == "hpa"
    for service in (path.name for path in (K8S / "services").iterdir()):
        assert f"services/{service}" in text
