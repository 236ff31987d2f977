"""gRPC-Web and JSON by hand, over the standard library's HTTP/1.1 client."""

import http.client
import json
import struct

from google.rpc import error_details_pb2
from grpc_status import rpc_status

CLASSIFY = "/usagi.vision.v1.VisionService/ClassifyImage"
LIST_MODELS = "/usagi.model.v1.ModelService/ListModels"
INFER = "/inference.GRPCInferenceService/ModelInfer"
LOAD_MODEL = "/usagi.model.v1.ModelService/LoadModel"


def call_json(port, path, body, *, method="POST", host="127.0.0.1", tls=None, **headers):
    """Status, headers by lower-case name, and body. `body` is bytes or text as they are, or becomes JSON.

    `tls` is an ssl.SSLContext.
    """
    data = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
    headers = {"content-type": "application/json", **headers}
    if tls is None:
        connection = http.client.HTTPConnection(host, port, timeout=10)
    else:
        connection = http.client.HTTPSConnection(host, port, timeout=10, context=tls)
    try:
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def call_web(port, path, message, **options):
    """A unary gRPC-Web call."""
    data = message.SerializeToString()
    headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
    return call_json(port, path, struct.pack(">BI", 0, len(data)) + data, **headers, **options)


def web_frames(body):
    """The message and the trailers of a gRPC-Web response."""
    parts = {}
    while body:
        flags, length = struct.unpack(">BI", body[:5])
        parts[flags] = body[5 : 5 + length]
        body = body[5 + length :]
    return parts[0x00], parts[0x80]


def details_of(caught, kind):
    """The detail of a type in a caught RpcError's rich status."""
    for detail in rpc_status.from_call(caught.value).details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    raise AssertionError(f"no {kind.__name__} in {caught.value}")


def error_of(caught):
    """The google.rpc.ErrorInfo of a caught RpcError."""
    return details_of(caught, error_details_pb2.ErrorInfo)
