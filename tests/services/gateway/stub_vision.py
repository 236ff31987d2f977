"""A vision service without a model, as a process that tests can kill: `python stub_vision.py PORT`.

The label of an answer repeats what arrived. The model's name chooses the behaviour: `refuse`, `sleep` or anything else.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status
from inference import open_inference_grpc_pb2 as oip
from inference import open_inference_grpc_pb2_grpc as oip_grpc
from usagi.model.v1 import model_service_pb2 as models
from usagi.model.v1 import model_service_pb2_grpc as models_grpc
from usagi.vision.v1 import vision_service_pb2 as pb
from usagi.vision.v1 import vision_service_pb2_grpc as pb_grpc

from shared.errors import InvalidInput
from shared.serving.status import to_status

LIMIT = 16 * 1024 * 1024


class StubVision(pb_grpc.VisionServiceServicer):
    def ClassifyImage(self, request, context):
        if request.model == "refuse":
            context.abort_with_status(rpc_status.to_status(to_status(InvalidInput("image", "is no picture"), "vision")))
        if request.model == "sleep":
            time.sleep(3)
        metadata = dict(context.invocation_metadata())
        values = {
            "bytes": str(len(request.image)),
            **{key: metadata.get(key, "") for key in ("x-request-id", "traceparent", "authorization")},
        }
        labels = [pb.Classification(label=f"{key}={value}", probability=0.5) for key, value in values.items()]
        return pb.ClassifyImageResponse(classifications=labels, info=models.InferenceInfo(model=request.model))

    def ClassifyImages(self, requests, context):
        for request in requests:
            yield pb.ClassifyImagesResponse(id=request.id)


class StubModels(models_grpc.ModelServiceServicer):
    MODELS = tuple(models.Model(name="stub", version=str(version), service="vision") for version in (10, 9, 1))

    def ListModels(self, request, context):
        return models.ListModelsResponse(models=self.MODELS)

    def GetModel(self, request, context):
        return models.GetModelResponse(model=self.MODELS[0], card="# stub")

    def LoadModel(self, request, context):
        return models.LoadModelResponse(replica="stub")


class StubInference(oip_grpc.GRPCInferenceServiceServicer):
    def ServerMetadata(self, request, context):
        return oip.ServerMetadataResponse(name="usagi-vision")


def main():
    options = [("grpc.max_receive_message_length", LIMIT), ("grpc.so_reuseport", 0)]
    server = grpc.server(ThreadPoolExecutor(20), options=options)
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    pb_grpc.add_VisionServiceServicer_to_server(StubVision(), server)
    models_grpc.add_ModelServiceServicer_to_server(StubModels(), server)
    oip_grpc.add_GRPCInferenceServiceServicer_to_server(StubInference(), server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    reflection.enable_server_reflection(["usagi.vision.v1.VisionService"], server)
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
