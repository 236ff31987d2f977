"""`make up TLS=1`: the gateway's container makes its certificate, and whoever comes from outside needs TLS."""

import json
import time

import pytest

from shared.client.connection import CallFailed, Connection
from shared.client.vision import VisionClient
from tests.e2e.stack import PHOTOS, ROOT

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]

AUTHORITY = ROOT / "var/tls/containers.crt"
PRIVATE = """
import json, pathlib
path = pathlib.Path("/var/lib/usagi/gateway/tls/server.pem")
print(json.dumps([oct(path.stat().st_mode & 0o777), path.read_text().split("-----")[2].split()[1]]))
"""


@pytest.fixture
def encrypted(stack):
    printed = stack.run("make", "up", "TLS=1")
    try:
        yield printed
    finally:
        stack.run("make", "up")
        stack.wait_until_serving(30)


def classify(stack, ca):
    with Connection(stack.target, ca=ca, timeout=10) as connection:
        return VisionClient(connection).classify(PHOTOS[0].read_bytes()).classifications[0].label


def test_containers_with_tls(stack, encrypted):
    assert f"--ca {AUTHORITY.relative_to(ROOT)}" in encrypted
    label = classify(stack, str(AUTHORITY))
    with pytest.raises(CallFailed) as caught:
        classify(stack, "")
    assert caught.value.code == "UNAVAILABLE", "the published port is no loopback for the gateway"
    (gateway,) = stack.containers("gateway")
    assert stack.inspect(gateway)["State"]["Health"]["Status"] == "healthy"
    mode, line = stack.python(gateway, PRIVATE)
    assert mode == "0o600"
    for text in (stack.compose("logs", "--no-color"), json.dumps(stack.inspect(gateway)), AUTHORITY.read_text()):
        assert line not in text
    before = time.monotonic()
    stack.run("make", "up", "TLS=1")
    assert classify(stack, str(AUTHORITY)) == label, f"the same certificate after {time.monotonic() - before:.0f} s"


def test_a_certificate_of_ones_own(stack):
    files = {"USAGI_TLS_CERT_FILE": str(AUTHORITY), "USAGI_TLS_KEY_FILE": str(AUTHORITY)}
    both = (
        "docker",
        "compose",
        "-f",
        "docker-compose.yml",
        "-f",
        "deploy/compose.tls.yaml",
        "config",
        "--format",
        "json",
    )
    config = json.loads(stack.run("env", *(f"{name}={value}" for name, value in files.items()), *both))
    mounted = {entry["source"] for entry in config["services"]["gateway"]["secrets"]}
    assert mounted == {"usagi-tls-cert", "usagi-tls-key"}
    assert config["services"]["gateway"]["environment"]["USAGI_TLS_CERT"] == "/run/secrets/usagi-tls-cert"
    assert set(config["secrets"]) == mounted
