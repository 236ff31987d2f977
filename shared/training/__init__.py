"""The training pipeline: torch and onnx."""
