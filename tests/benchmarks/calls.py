"""What a load generator sends: one call, ready made, to one address."""

from __future__ import annotations

import base64
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from inference import open_inference_grpc_pb2 as pb

from shared.client.connection import SERVICE_HEADER
from tests.benchmarks.models import INPUT

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
GRPC, HTTP = "grpc", "http"


@dataclass(frozen=True)
class Call:
    """One request that is sent again and again.

    Attributes:
        target: `host:port`.
        path: of the method.
        body: the message, without gRPC's five bytes of frame.
        protocol: `grpc`, or `http` for HTTP/1.1.
        headers: what else goes with it.
    """

    target: str
    path: str
    body: bytes
    protocol: str = GRPC
    headers: dict[str, str] = field(default_factory=dict)

    def framed(self) -> bytes:
        """The body as it goes over the wire."""
        return b"\0" + len(self.body).to_bytes(4, "big") + self.body if self.protocol == GRPC else self.body

    def dump(self, path: Path) -> None:
        """Writes it for another process."""
        raw = {**dataclasses.asdict(self), "body": base64.b64encode(self.body).decode()}
        path.write_text(json.dumps(raw), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Call:
        """Reads what `dump` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**raw, "body": base64.b64decode(raw["body"])})


def infer_body(model: str, item: np.ndarray) -> bytes:
    """ModelInferRequest with one raw input."""
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name=INPUT, datatype="FP32", shape=item.shape)
    request.raw_input_contents.append(item.tobytes())
    return request.SerializeToString()


def infer_call(target: str, model: str, item: np.ndarray, service: str = "vision") -> Call:
    """ModelInfer at a service, or at the gateway by the header that names the service."""
    return Call(target, MODEL_INFER, infer_body(model, item), headers={SERVICE_HEADER: service})
