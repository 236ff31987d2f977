"""TLS over real sockets: who must speak it, whom clients trust, and how a certificate is renewed."""

import hashlib
import os
import socket
import ssl
import stat
import subprocess
import sys
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from services.gateway.tls import make_certificate
from shared.api_keys import KeyFile, make_key, new_secret
from shared.client.connection import CallFailed, Connection
from shared.client.vision import VisionClient
from shared.errors import ConfigurationError, InvalidInput
from tests.services.gateway.http_calls import CLASSIFY, call_json
from tests.services.gateway.processes import ROOT, other_address, running_gateway, stub, wait_for_health

KEY = new_secret()
RENEWED_SECONDS = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tls")
    address = other_address()
    make_certificate(made, [address] if address else [])
    return made


@pytest.fixture(scope="module")
def gateway(folder):
    KeyFile(folder / "keys").save([make_key("alice", "infer", KEY)])
    environment = {"USAGI_TLS_CERT": folder / "server.pem", "USAGI_KEYS_FILE": folder / "keys"}
    with running_gateway(**environment) as running, stub(running.upstream_port):
        wait_for_health(running.target, health_pb2.HealthCheckResponse.SERVING)
        yield running


def trusting(folder):
    return ssl.create_default_context(cafile=folder / "ca.crt")


def classify(target, **options):
    with Connection(target, timeout=5, **options) as connection:
        return VisionClient(connection).classify(b"abc").classifications


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_grpc_over_tls(gateway, folder, host):
    assert classify(f"{host}:{gateway.port}", ca=str(folder / "ca.crt"), key=KEY)


def test_keys_are_asked_for_over_tls_too(gateway, folder):
    with pytest.raises(CallFailed) as caught:
        classify(gateway.target, ca=str(folder / "ca.crt"), key="")
    assert (caught.value.code, caught.value.reason) == ("UNAUTHENTICATED", "KEY_MISSING")


def test_json_over_tls(gateway, folder):
    headers = {"authorization": f"Bearer {KEY}"}
    assert call_json(gateway.port, CLASSIFY, {}, tls=trusting(folder), **headers)[0] == 200


def test_an_authority_that_is_not_trusted(gateway, tmp_path):
    make_certificate(tmp_path)
    for ca in (str(tmp_path / "ca.crt"), "system"):
        with pytest.raises(CallFailed) as caught:
            classify(gateway.target, ca=ca, key=KEY)
        assert caught.value.code == "UNAVAILABLE"


def test_a_name_that_is_not_in_the_certificate(gateway, folder):
    with pytest.raises(ssl.SSLCertVerificationError), connected(gateway, folder, "usagi.example"):
        pass


def test_other_machines_must_speak_tls(gateway, folder):
    address = other_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    target = f"{address}:{gateway.port}"
    assert classify(target, ca=str(folder / "ca.crt"), key=KEY)
    with pytest.raises(CallFailed) as caught:
        classify(target, key=KEY, ca="")
    assert caught.value.code == "UNAVAILABLE"
    with pytest.raises(OSError, match=r"reset|closed|Remote"):
        call_json(gateway.port, CLASSIFY, {}, host=address)


def test_this_machine_need_not(gateway):
    """Over loopback come the container's health check and the catalog."""
    with grpc.insecure_channel(gateway.target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def connected(gateway, folder, name="localhost", newest=None):
    context = trusting(folder)
    context.set_alpn_protocols(["h2"])
    if newest is not None:
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = newest
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context.wrap_socket(socket.create_connection(("127.0.0.1", gateway.port), 5), server_hostname=name)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")  # it is what is tested
def test_versions(gateway, folder):
    with connected(gateway, folder) as opened:
        assert (opened.version(), opened.selected_alpn_protocol()) == ("TLSv1.3", "h2")
    with connected(gateway, folder, newest=ssl.TLSVersion.TLSv1_2) as opened:
        assert opened.version() == "TLSv1.2"
    with pytest.raises(OSError, match=r"version|closed|reset"):
        connected(gateway, folder, newest=ssl.TLSVersion.TLSv1_1)


def fingerprint(gateway):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection(("127.0.0.1", gateway.port), 5)) as opened:
        return hashlib.sha256(opened.getpeercert(binary_form=True)).hexdigest()


def slow_requests():
    for number in range(6):
        yield pb.ClassifyImagesRequest(id=str(number))
        time.sleep(0.3)


def test_a_renewed_certificate_needs_no_restart(gateway, folder):
    before = fingerprint(gateway)
    credentials = grpc.ssl_channel_credentials((folder / "ca.crt").read_bytes())
    with grpc.secure_channel(f"localhost:{gateway.port}", credentials) as channel:
        metadata = (("authorization", f"Bearer {KEY}"),)
        stream = pb_grpc.VisionServiceStub(channel).ClassifyImages(slow_requests(), timeout=20, metadata=metadata)
        assert next(stream).id == "0"
        make_certificate(folder)
        deadline = time.monotonic() + RENEWED_SECONDS
        while fingerprint(gateway) == before:
            assert time.monotonic() < deadline, "Envoy does not look at the file"
            time.sleep(0.05)
        assert sum(1 for _ in stream) == 5, "a running call finishes"
    assert classify(gateway.target, ca=str(folder / "ca.crt"), key=KEY)


def test_no_private_key_is_rendered_or_logged(gateway, folder):
    log = os.pread(gateway.process.output.fileno(), 1 << 24, 0).decode()
    assert "PRIVATE KEY" not in log
    (line,) = (folder / "server.pem").read_text().split("-----")[2].split("\n")[1:2]
    assert line
    assert line not in log


def test_files_are_their_owners_alone_and_the_authority_signs_nothing_else(tmp_path):
    path = make_certificate(tmp_path / "tls")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert sorted(made.name for made in path.parent.iterdir()) == ["ca.crt", "server.pem"], (
        "the authority's key is gone"
    )


@pytest.mark.parametrize("name", ["", "a b", "x,DNS:evil.example", "-x;", "a/b"])
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(InvalidInput, match="expected a host name or an address"):
        make_certificate(tmp_path, [name])


def tls(folder, *arguments, check=True, **environment):
    command = [sys.executable, "-m", "services.gateway", "tls", "make", *arguments]
    environment = {"USAGI_TLS_CERT": str(folder / "server.pem"), "PATH": os.environ["PATH"], **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == check, done.stderr
    return done.stdout if check else done.stderr


def test_the_command_makes_one_and_keeps_it(tmp_path):
    printed = tls(tmp_path, "--print", "--name", "usagi.example")
    assert printed == (tmp_path / "ca.crt").read_text()
    first = (tmp_path / "server.pem").read_bytes()
    tls(tmp_path)
    assert (tmp_path / "server.pem").read_bytes() == first
    tls(tmp_path, "--force", "--days", "20")
    soon_over = (tmp_path / "server.pem").read_bytes()
    assert soon_over != first
    tls(tmp_path)
    assert (tmp_path / "server.pem").read_bytes() != soon_over, "it holds for less than a month"
    assert "there is no openssl command" in tls(tmp_path / "new", check=False, PATH="")


def test_a_certificate_that_is_not_there_is_named(tmp_path):
    with running_gateway(USAGI_TLS_CERT=tmp_path / "none.pem") as running:
        assert running.process.wait(20) == 1
        log = os.pread(running.process.output.fileno(), 1 << 20, 0).decode()
        assert "USAGI_TLS_CERT" in log
        assert "usagi tls make" in log
    with pytest.raises(ConfigurationError, match="see --ca"):
        Connection("localhost:1", ca=str(tmp_path / "none.crt"))
