"""Serving: numpy, ONNX Runtime and gRPC; never torch."""
