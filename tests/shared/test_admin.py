"""The server's own look at who may control it, whatever let the call reach its port."""

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from inference import open_inference_grpc_pb2 as oip
from inference import open_inference_grpc_pb2_grpc as oip_grpc
from usagi.model.v1 import model_service_pb2 as pb
from usagi.model.v1 import model_service_pb2_grpc as pb_grpc

from shared.api_keys import KeyFile, make_key, new_secret
from shared.errors import PermissionRefused, Unauthenticated
from shared.serving.admin import AdminGate
from shared.serving.config import ServingConfig
from shared.serving.front import FRONTS
from shared.testing.graphs import publish_affine
from shared.testing.server import running_server

ADMIN, INFER = new_secret(), new_secret()
CALLS = [
    lambda channel: (pb_grpc.ModelServiceStub(channel).LoadModel, pb.LoadModelRequest(name="affine")),
    lambda channel: (pb_grpc.ModelServiceStub(channel).UnloadModel, pb.UnloadModelRequest(name="affine")),
    lambda channel: (
        oip_grpc.GRPCInferenceServiceStub(channel).RepositoryModelLoad,
        oip.RepositoryModelLoadRequest(model_name="affine"),
    ),
    lambda channel: (
        oip_grpc.GRPCInferenceServiceStub(channel).RepositoryModelUnload,
        oip.RepositoryModelUnloadRequest(model_name="affine"),
    ),
]


@pytest.fixture(scope="module", params=FRONTS)
def served(tmp_path_factory, request):
    root = tmp_path_factory.mktemp("admin")
    publish_affine(root / "models")
    file = KeyFile(root / "keys")
    config = ServingConfig(
        model_roots=(root / "models",), threads=1, log_level="WARNING", front=request.param, keys_file=str(file.path)
    )
    with running_server("test", config) as server, grpc.insecure_channel(server.address) as channel:
        yield channel, file


def outcome(channel, make, *secrets):
    call, request = make(channel)
    metadata = tuple(("authorization", f"Bearer {secret}") for secret in secrets)
    ended = call.future(request, timeout=10, metadata=metadata)
    info = error_details_pb2.ErrorInfo()
    if ended.exception() is not None:
        rpc_status.from_call(ended).details[0].Unpack(info)
    return ended.code().name, info.reason


@pytest.mark.parametrize("make", CALLS, ids=["load", "unload", "repository-load", "repository-unload"])
def test_with_keys_the_caller_needs_one_of_an_admin(served, make):
    channel, file = served
    assert outcome(channel, make) == ("OK", ""), "without keys, this machine may"
    file.save([make_key("root", "admin", ADMIN), make_key("alice", "infer", INFER)])
    try:
        assert outcome(channel, make, ADMIN) == ("OK", "")
        assert outcome(channel, make, INFER) == ("PERMISSION_DENIED", "ADMIN_ONLY")
        for wrong in ((), (new_secret(),), (ADMIN, ADMIN), (INFER, ADMIN)):
            assert outcome(channel, make, *wrong) == ("UNAUTHENTICATED", "KEY_UNKNOWN")
        file.save([make_key("alice", "infer", INFER)])
        assert outcome(channel, make, ADMIN) == ("UNAUTHENTICATED", "KEY_UNKNOWN"), "revoked: at once"
        file.path.write_text("broken")
        assert outcome(channel, make, ADMIN) == ("PERMISSION_DENIED", "ADMIN_ONLY")
    finally:
        file.path.unlink()
        assert outcome(channel, CALLS[0])[0] == "OK"


class Context:
    def __init__(self, peer, *metadata):
        self._peer, self._metadata = peer, metadata

    def peer(self):
        return self._peer

    def invocation_metadata(self):
        return self._metadata


def test_without_keys_other_machines_may_not(tmp_path):
    gate = AdminGate(str(tmp_path / "keys"))
    gate.require(Context("ipv4:127.0.0.1:5"))
    with pytest.raises(PermissionRefused):
        gate.require(Context("ipv4:10.0.0.1:5", ("authorization", f"Bearer {ADMIN}")))


@pytest.mark.parametrize("path", ["", "missing"])
def test_required_keys_that_are_not_there_let_nobody_in(tmp_path, path):
    gate = AdminGate(path and str(tmp_path / path), required=True)
    with pytest.raises((PermissionRefused, Unauthenticated)):
        gate.require(Context("ipv4:127.0.0.1:5", ("authorization", f"Bearer {ADMIN}")))
