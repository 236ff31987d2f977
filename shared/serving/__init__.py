"""The serving engine: grpc, onnxruntime, numpy."""
