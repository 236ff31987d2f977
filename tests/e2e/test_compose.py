"""The containers as `make up` starts them: answers in every protocol, locked down, within their budgets."""

import base64
import http.client
import json
import struct
import time

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from usagi.vision.v1 import vision_service_pb2 as pb

from shared.client.connection import Connection
from shared.client.models import ModelsClient
from shared.client.vision import VisionClient
from shared.services_table import load_table
from tests.e2e.stack import NO_RETRIES, PHOTOS, Caller

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]

TABLE = load_table()
RUNNING = ["gateway", *TABLE.services]
CLASSIFY = "/usagi.vision.v1.VisionService/ClassifyImage"
SERVING_SECONDS, HEALTHY_SECONDS = 5.0, 8.0
IMAGE_DELTA_BYTES = 450e6
PROBE_CORE_SHARE, PROBE_INTERVAL_SECONDS = 0.01, 3.0
TRAILERS_FLAG = 0x80  # gRPC-Web: the frame that holds the trailers


def right(path, label):
    return path.name.startswith(f"{label}_")


def post(stack, path, body, content_type):
    connection = http.client.HTTPConnection("127.0.0.1", stack.port, timeout=20)
    try:
        connection.request("POST", path, body, {"content-type": content_type, "x-grpc-web": "1"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_make_up_says_where_to_call(stack):
    assert stack.target in stack.run("make", "up"), "the second `make up` changes nothing and prints the same"


def test_every_container_and_every_service_is_healthy(stack):
    for service in RUNNING:
        (container,) = stack.containers(service)
        assert stack.inspect(container)["State"]["Health"]["Status"] == "healthy", service
    with grpc.insecure_channel(stack.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", *(name for row in TABLE.services.values() for name in row.grpc_services)):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name


def test_photos_are_recognised_over_grpc(stack):
    with Connection(stack.target) as connection:
        client = VisionClient(connection)
        labels = [client.classify(path.read_bytes()).classifications[0].label for path in PHOTOS]
        many = {
            answer.id: answer.response.classifications[0].label
            for answer in client.classify_many((path.name, path.read_bytes()) for path in PHOTOS)
        }
    assert sum(map(right, PHOTOS, labels)) >= 7, f"{labels}: the model is right on 9 of 10 held-back photos"
    assert many == {path.name: label for path, label in zip(PHOTOS, labels, strict=True)}, "the stream says the same"


def test_photo_is_recognised_over_grpc_web(stack):
    message = pb.ClassifyImageRequest(image=PHOTOS[0].read_bytes()).SerializeToString()
    status, body = post(stack, CLASSIFY, struct.pack(">BI", 0, len(message)) + message, "application/grpc-web+proto")
    assert status == 200
    flag, length = struct.unpack(">BI", body[:5])
    assert flag == 0, body
    answer = pb.ClassifyImageResponse.FromString(body[5 : 5 + length])
    assert right(PHOTOS[0], answer.classifications[0].label)
    assert body[5 + length] & TRAILERS_FLAG
    assert b"grpc-status:0" in body[5 + length :].replace(b" ", b"")


def test_photo_is_recognised_over_json(stack):
    body = json.dumps({"image": base64.b64encode(PHOTOS[0].read_bytes()).decode(), "top_k": 2})
    status, answer = post(stack, CLASSIFY, body, "application/json")
    assert status == 200, answer
    classes = json.loads(answer)["classifications"]
    assert len(classes) == 2
    assert right(PHOTOS[0], classes[0]["label"])


def test_a_client_without_protos_finds_and_calls_every_domain(stack):
    """Everything it knows is the address: names by reflection, then the messages, then a call."""
    with grpc.insecure_channel(stack.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        offered = set(database.get_services())
        expected = {name for row in TABLE.services.values() for name in row.grpc_services}
        assert expected <= offered
        pool = descriptor_pool.DescriptorPool(database)
        for name in expected:
            assert pool.FindServiceByName(name).methods, name
        method = pool.FindMethodByName("usagi.vision.v1.VisionService.ClassifyImage")
        request_class = message_factory.GetMessageClass(method.input_type)
        call = channel.unary_unary(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        answer = call(request_class(image=PHOTOS[0].read_bytes()), timeout=20)
    assert right(PHOTOS[0], answer.classifications[0].label)


def test_models_are_listed_by_the_catalog(stack):
    with Connection(stack.target) as connection:
        assert {model.service for model in ModelsClient(connection).list()} == set(TABLE.services)


def test_canaries_are_set_and_seen_from_outside(stack):
    model = "flowers-efficientnet-lite0"

    def canary(*arguments):
        return stack.run("make", "--silent", "canary", f"ARGS={' '.join(map(str, arguments))}")

    canary(
        "set", model, "--service", "vision", "--stable", 1, "--version", 2, "--weight", 50
    )  # version 2 is not there: 1 answers
    try:
        deadline = time.monotonic() + 20
        with Caller(stack.target) as caller:
            while True:
                assert caller.call() is None
                row = next(line.split() for line in canary("status").splitlines() if line.startswith("  1 "))
                if int(row[2]) > 0:
                    break
                assert time.monotonic() < deadline, "no call was routed"
        assert (row[1], row[3]) == ("50%", "0")
        assert 0 < float(row[4]) <= float(row[5])
    finally:
        canary("clear", model)
    assert "no canaries" in canary()


@pytest.mark.parametrize("service", RUNNING)
def test_containers_are_limited(stack, service):
    details = stack.inspect(stack.containers(service)[0])
    host = details["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["Init"]
    assert not host["Privileged"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert 0 < host["Memory"] <= 512 << 20
    assert host["NanoCpus"] > 0
    assert 0 < host["PidsLimit"] <= 256
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}
    assert not [mount for mount in details["Mounts"] if "docker.sock" in mount["Source"]]


def test_only_the_gateway_publishes_a_port_and_on_loopback(stack):
    published = {}
    for service in RUNNING:
        ports = stack.inspect(stack.containers(service)[0])["NetworkSettings"]["Ports"]
        published[service] = [(entry["HostIp"], entry["HostPort"]) for held in ports.values() for entry in held or []]
    assert published.pop("gateway") == [("127.0.0.1", str(stack.port))]
    assert not any(published.values()), published


@pytest.mark.parametrize("service", TABLE.services)
def test_image_is_small(stack, service):
    base = stack.run("bash", "-c", "source .env && echo -n $USAGI_BASE")
    delta = stack.image_size(f"{stack.project}-{service}") - stack.image_size(base)
    print(f"usagi-{service} adds {delta / 1e6:.0f} MB to {base}")
    assert delta <= IMAGE_DELTA_BYTES


@pytest.mark.parametrize("service", TABLE.services)
def test_container_serves_soon_after_its_start(stack, service):
    options = ("--init", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--cpus", "2")
    container = stack.run("docker", "create", *options, f"{stack.project}-{service}").strip()
    try:
        started = time.monotonic()
        stack.run("docker", "start", container)
        address = stack.inspect(container)["NetworkSettings"]["IPAddress"]
        with grpc.insecure_channel(f"{address}:{TABLE.services[service].port}", options=NO_RETRIES) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                try:
                    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=0.5)
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        break
                except grpc.RpcError:
                    pass
                assert time.monotonic() - started < SERVING_SECONDS, stack.run("docker", "logs", container)
                time.sleep(0.02)
        serving = time.monotonic() - started
        while stack.inspect(container)["State"]["Health"]["Status"] != "healthy":
            assert time.monotonic() - started < HEALTHY_SECONDS, stack.run("docker", "logs", container)
            time.sleep(0.1)
        print(f"{service}: SERVING after {serving:.1f} s, healthy after {time.monotonic() - started:.1f} s")
        stack.run("docker", "stop", "--time", "10", container)
        assert stack.inspect(container)["State"]["ExitCode"] == 0, "SIGTERM ends it in good order"
    finally:
        stack.run("docker", "rm", "--force", container, check=False)


PROBES = """
import json, resource, subprocess, sys
command = ["python", "-I", "-S", "/app/shared/serving/probe.py", "127.0.0.1:50051"]
codes = {subprocess.run(command).returncode for _ in range(30)}
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"codes": sorted(codes), "seconds": (used.ru_utime + used.ru_stime) / 30}))
"""


def test_health_probe_is_cheap(stack):
    """CPU seconds of one probe, as the kernel counts them, over the interval between two."""
    measured = stack.python(stack.containers("vision")[0], PROBES)
    print(f"one probe takes {measured['seconds'] * 1000:.1f} ms of CPU")
    assert measured["codes"] == [0]
    assert measured["seconds"] / PROBE_INTERVAL_SECONDS <= PROBE_CORE_SHARE
