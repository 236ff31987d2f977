"""Pipelines in a test's model root, and calls of the Open Inference Protocol."""

import grpc
import numpy as np
from inference import open_inference_grpc_pb2 as pb
from inference import open_inference_grpc_pb2_grpc as pb_grpc

from shared.artifacts import write_atomically
from shared.client.connection import to_call_failed


def write_pipeline(root, name, text, *, service="test", version=1):
    write_atomically(root / service / name / str(version) / "pipeline.toml", text)


class Client:
    """Float tensors in and out of one server."""

    def __init__(self, address):
        self.channel = grpc.insecure_channel(address)
        self.stub = pb_grpc.GRPCInferenceServiceStub(self.channel)

    def send(self, model, array, *, version="", timeout=20, metadata=()):
        array = np.asarray(array, np.float32)
        request = pb.ModelInferRequest(model_name=model, model_version=version)
        request.inputs.add(name="x", datatype="FP32", shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
        return self.stub.ModelInfer.future(request, timeout=timeout, metadata=metadata)

    def infer(self, model, array, **options):
        """Outputs by name, and the step at which each item ended."""
        answer = self.send(model, array, **options).result()
        outputs = {
            output.name: np.frombuffer(raw, np.float32).reshape(tuple(output.shape))
            for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }
        return outputs, answer.parameters["exit_step"].string_param.split(",")

    def failure(self, model, array, **options):
        """The decoded error of a call that must fail."""
        return self.failure_of(self.send(model, array, **options))

    def failure_of(self, call):
        """The decoded error of a call that was sent."""
        try:
            call.result()
        except grpc.RpcError as error:
            return to_call_failed(error, "")
        raise AssertionError("the call did not fail")

    def index(self, name):
        """State and reason of the only version."""
        models = self.stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=10).models
        (entry,) = [entry for entry in models if entry.name == name]
        return entry.state, entry.reason

    def ready(self, name):
        return self.stub.ModelReady(pb.ModelReadyRequest(name=name), timeout=10).ready


def metric(engine, name, **labels):
    """The value of one sample of a server's metrics; 0 without it."""
    return engine.telemetry.registry.get_sample_value(name, labels) or 0.0
