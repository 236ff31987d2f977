"""API keys in the containers: made by one command, asked for by the gateway, looked at again by the services."""

import time

import grpc
import pytest
from usagi.model.v1 import model_service_pb2 as models
from usagi.model.v1 import model_service_pb2_grpc as models_grpc
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from tests.e2e.stack import NO_RETRIES, PHOTOS, refused

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]

MODEL = "flowers-efficientnet-lite0"
VISION = ("usagi-service", "vision")
FOLLOW_SECONDS = 5.0


@pytest.fixture
def keys(stack):
    """Runs `make keys`; afterwards no keys are set."""

    def run(arguments):
        return stack.run("make", "--silent", "keys", f"ARGS={arguments}").strip()

    try:
        yield run
    finally:
        stack.python(stack.containers("gateway")[0], REMOVE)
        stack.compose("restart", "gateway")
        stack.wait_until_serving(30)


REMOVE = "import pathlib; pathlib.Path('/var/lib/usagi/keys/api-keys').unlink(missing_ok=True); print('null')"
FILES = """
import json, os, pathlib
folder = pathlib.Path("/var/lib/usagi/keys")
def refused():
    try:
        (folder / "mine").write_text("x")
    except OSError as error:
        return error.strerror
def mode(path):
    return oct(path.stat().st_mode & 0o777)
print(json.dumps({"mode": mode(folder / "api-keys"), "folder": mode(folder),
                  "text": (folder / "api-keys").read_text(), "write": refused()}))
"""


def outcome(call, request, *metadata):
    try:
        call(request, timeout=20, metadata=metadata)
    except grpc.RpcError as error:
        return refused(error).code.name, refused(error).reason
    return "OK", ""


def test_keys_of_the_containers(stack, keys):
    assert "no keys are set" in keys("list")
    infer, admin = keys("make alice"), keys("make root --role admin")
    assert "root" in keys("list")
    with grpc.insecure_channel(stack.target, options=NO_RETRIES) as channel:
        classify = pb_grpc.VisionServiceStub(channel).ClassifyImage
        photo = pb.ClassifyImageRequest(image=PHOTOS[0].read_bytes())
        deadline = time.monotonic() + FOLLOW_SECONDS
        while outcome(classify, photo)[0] == "OK":
            assert time.monotonic() < deadline, "the gateway does not follow"
        assert outcome(classify, photo) == ("UNAUTHENTICATED", "KEY_MISSING")
        assert outcome(classify, photo, bearer(infer)) == ("OK", "")
        load, request = models_grpc.ModelServiceStub(channel).LoadModel, models.LoadModelRequest(name=MODEL)
        assert outcome(load, request, VISION, bearer(infer)) == ("PERMISSION_DENIED", "ADMIN_ONLY")
        assert outcome(load, request, VISION, bearer(admin)) == ("OK", ""), "it is asked for from another machine"
        keys("revoke root")
        deadline = time.monotonic() + FOLLOW_SECONDS
        while outcome(load, request, VISION, bearer(admin))[0] == "OK":
            assert time.monotonic() < deadline, "the gateway does not follow"
        assert outcome(load, request, VISION, bearer(admin))[0] == "UNAUTHENTICATED"
    seen = stack.python(stack.containers("vision")[0], FILES)
    assert (seen["mode"], seen["folder"], seen["write"]) == ("0o600", "0o700", "Read-only file system")
    logs = stack.compose("logs", "--no-color")
    for secret in (infer, admin):
        assert secret not in seen["text"]
        assert secret not in logs


def bearer(secret):
    return ("authorization", f"Bearer {secret}")


FROM_THE_NETWORK = """
import json, grpc
from usagi.model.v1 import model_service_pb2 as models, model_service_pb2_grpc as models_grpc
channel = grpc.insecure_channel("vision:50051")
try:
    models_grpc.ModelServiceStub(channel).LoadModel(models.LoadModelRequest(name="x"), timeout=10)
    print(json.dumps("OK"))
except grpc.RpcError as error:
    print(json.dumps(error.code().name))
"""


def test_who_reaches_a_service_past_the_gateway_cannot_control_it(stack, keys):
    container = stack.containers("gateway")[0]
    assert stack.python(container, FROM_THE_NETWORK) == "PERMISSION_DENIED"
    keys("make root --role admin")
    assert stack.python(container, FROM_THE_NETWORK) == "UNAUTHENTICATED"
