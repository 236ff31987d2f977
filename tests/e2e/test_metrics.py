"""Prometheus itself, as Debian packages it, against the real local stack: targets, dashboard, alerts."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from services.gateway.dashboard import dashboard
from services.gateway.prometheus import scrape_config
from shared.client.connection import CallFailed, Connection
from shared.client.local import local_stack
from shared.client.vision import Selection, VisionClient
from shared.services_table import load_table

ROOT = Path(__file__).parents[2]
OBSERVABILITY = ROOT / "deploy/observability"
CACHE = ROOT / "var/cache/prometheus"
PHOTO = next((ROOT / "tests/data/flowers").glob("*.jpg")).read_bytes()
DOCUMENT = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
QUERIES = {
    f"{panel['title']}: {target['legendFormat']}": target["expr"]
    for panel in json.loads(dashboard())["panels"]
    for target in panel["targets"]
}
QUERIES |= {
    f"replicas of {path.stem} by KEDA": yaml.safe_load(path.read_text(encoding="utf-8"))["spec"]["triggers"][0][
        "metadata"
    ]["query"]
    for path in (ROOT / "deploy/k8s/components/keda").glob("*.yaml")
    if path.stem != "kustomization"
}


@pytest.fixture(scope="module")
def programs():
    """The folder with prometheus and promtool; fetched once into the git-ignored `var/cache`."""
    done = subprocess.run(
        [OBSERVABILITY / "fetch_prometheus.sh", CACHE], capture_output=True, text=True, check=False, timeout=170
    )
    if done.returncode:
        pytest.skip(f"no Prometheus here: {done.stderr.strip()[-200:]}")
    return CACHE / "usr/bin"


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port):
        self.port = port

    def get(self, path, **parameters):
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]

    def query(self, expression):
        return self.get("/api/v1/query", query=expression)["result"]


@pytest.fixture(scope="module")
def observed(programs, tmp_path_factory):
    """The local stack after some traffic, with a Prometheus that scrapes it every second; yields both."""
    folder = tmp_path_factory.mktemp("prometheus")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with local_stack(folder / "logs", free_ports=True) as stack:
        config = scrape_config(load_table(), stack.metrics, port)
        for slow, fast in (
            ("scrape_interval: 5s", "1s"),
            ("scrape_timeout: 4s", "1s"),
            ("evaluation_interval: 15s", "1s"),
        ):
            config = config.replace(slow, f"{slow.partition(':')[0]}: {fast}")
        (folder / "prometheus.yml").write_text(config)
        shutil.copy(OBSERVABILITY / "rules.yml", folder)
        with (folder / "prometheus.log").open("w") as log:
            process = subprocess.Popen(
                [
                    programs / "prometheus",
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            prometheus = Prometheus(port)
            wait_until_scraped(prometheus, stack.metrics, process, folder / "prometheus.log")
            make_traffic(stack)
            yield stack, prometheus
        finally:
            process.terminate()
            process.wait(20)


def wait_until_scraped(prometheus, metrics, process, log):
    """Until every target has been scraped before the traffic begins, so that the traffic is a rate."""
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            if len(prometheus.query("up == 1")) == len(metrics) + 1:
                return
        time.sleep(0.1)
    raise AssertionError(f"not every target is up:\n{prometheus.get('/api/v1/targets')}")


def make_traffic(stack):
    """Photos of both variants, one by one and in a stream, and one refusal, over three scrapes."""
    with Connection(stack.target) as connection:
        client = VisionClient(connection)
        for _ in range(4):
            for _ in range(5):
                client.classify(PHOTO)
            with pytest.raises(CallFailed):
                client.classify(b"no picture")
            assert len(list(client.classify_many((str(number), PHOTO) for number in range(4)))) == 4
            time.sleep(1)  # the next scrape


def test_every_target_is_up(observed):
    stack, prometheus = observed
    up = {sample["metric"]["job"]: sample["value"][1] for sample in prometheus.query("up")}
    assert up == dict.fromkeys(["prometheus", *stack.metrics], "1")


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_of_the_dashboard_returns_data(observed, name):
    """With more traffic if need be: Envoy adds up its histograms every 5 s, and a rate needs two scrapes of them."""
    stack, prometheus = observed
    result = []
    with Connection(stack.target) as connection:
        for _ in range(60):
            result = prometheus.query(QUERIES[name])
            if any(sample["value"][1] != "NaN" for sample in result):
                return
            assert list(VisionClient(connection).classify_many([("more", PHOTO)]))
            time.sleep(0.5)
    raise AssertionError(f"{QUERIES[name]} gives {result}")


def test_figures_agree_with_the_traffic(observed):
    _, prometheus = observed
    method = "/usagi.vision.v1.VisionService/ClassifyImage"
    by_code = prometheus.query(f'sum by (code) (usagi_requests_total{{method="{method}"}})')
    assert {sample["metric"]["code"]: int(sample["value"][1]) for sample in by_code} == {
        "OK": 20,
        "INVALID_ARGUMENT": 4,
    }
    counts = prometheus.query(f'sum by (stage) (usagi_stage_duration_seconds_count{{method="{method}"}})')
    counted = {sample["metric"]["stage"]: int(sample["value"][1]) for sample in counts}
    assert counted == dict.fromkeys(["queue", "preprocess", "infer", "postprocess"], 20)
    (whole,) = prometheus.query(f'sum(usagi_inference_duration_seconds_count{{method="{method}"}})')
    assert whole["value"][1] == "20"


def test_alert_rules_are_loaded_and_silent(observed):
    _, prometheus = observed
    rules = [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules] == ["TargetDown", "ErrorRatio", "SlowCalls", "QueueFull"]
    assert {(rule["health"], rule["state"]) for rule in rules} == {("ok", "inactive")}


def test_promtool_accepts_rules_and_configuration_and_their_test_passes(programs):
    for arguments in (
        ("check", "rules", "rules.yml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "rules_test.yml"),
    ):
        command = [programs / "promtool", *arguments]
        done = subprocess.run(command, cwd=OBSERVABILITY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def exposed(stack):
    """Names and labels of every metric of ours on the real /metrics; `le` belongs to every histogram."""
    with urllib.request.urlopen(f"http://{stack.metrics['vision']}/metrics", timeout=5) as response:
        text = response.read().decode()
    names = re.findall(r"^# TYPE (usagi_\w+) (\w+)", text, re.M)
    found = {}
    for name, kind in names:
        labels = re.search(rf"^{name}(?:_count)?(?:\{{(.*?)\}})? ", text, re.M)
        found[name] = (kind, tuple(re.findall(r'(\w+)="', labels[1] or "")) if labels else None)
    return found


def test_the_documents_table_is_what_the_service_says(observed):
    stack, _ = observed
    rows = re.findall(r"^\| `(usagi_\w+)` \| (\w+) \| ([\w, ]*) \|", DOCUMENT, re.M)
    documented = {name: (kind, tuple(labels.replace(" ", "").split(","))) for name, kind, labels in rows}
    real = exposed(stack)
    assert set(documented) == set(real)
    for name, (kind, labels) in real.items():
        assert documented[name][0] == kind, name
        assert labels is None or sorted(documented[name][1]) == sorted(labels), name


def test_nothing_that_a_caller_sends_becomes_a_label(observed):
    stack, _ = observed
    strange = "no-such-model-7f3a"
    with Connection(stack.target) as connection, pytest.raises(CallFailed):
        connection.call(connection.channel.unary_unary(f"/usagi.vision.v1.VisionService/{strange}"), b"")
    with Connection(stack.target) as connection, pytest.raises(CallFailed):
        VisionClient(connection).classify(PHOTO, Selection(model=strange, version=strange, variant=strange))
    for address in stack.metrics.values():
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as response:
            assert strange not in response.read().decode()
