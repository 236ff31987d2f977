"""What tests import: in-process servers, tiny ONNX graphs."""
