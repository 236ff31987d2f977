"""The profile `observability`: Prometheus in its container finds every container by name and scrapes it."""

import json
import time

import pytest

from shared.services_table import load_table

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]

TARGETS = {"prometheus", "gateway", *load_table().services}
ASK = """
import json, urllib.request
with urllib.request.urlopen("http://127.0.0.1:9090/api/v1/query?query=up", timeout=5) as response:
    samples = json.load(response)["data"]["result"]
print(json.dumps(sorted([sample["metric"]["job"], sample["value"][1]] for sample in samples)))
"""


def test_prometheus_scrapes_every_container_once(stack):
    stack.environment["USAGI_PROMETHEUS_PORT"] = "0"  # any free one
    try:
        stack.compose("up", "--detach", "--build", "--wait", "--no-recreate", "prometheus")
        (container,) = stack.containers("prometheus")
        assert stack.inspect(container)["Config"]["User"] == "10001:10001"
        address = stack.compose("port", "prometheus", "9090").strip()
        assert address.startswith("127.0.0.1:"), address
        expected = sorted([name, "1"] for name in TARGETS)
        deadline = time.monotonic() + 60
        while (up := stack.python(container, ASK)) != expected:
            assert time.monotonic() < deadline, f"{json.dumps(up)}\n{stack.compose('logs', 'prometheus')[-2000:]}"
            time.sleep(0.5)
    finally:
        stack.compose("rm", "--stop", "--force", "prometheus", check=False)
