"""Smaller files for the same graph: weights stored as float16, and int8 weights for matrix products alone."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from shared.errors import ConfigurationError

MIN_VALUES = 64
"""Smaller tensors (biases, shapes, constants) stay as they are."""


def store_half(source: Path, target: Path) -> int:
    """Writes a graph whose large float32 weights are stored as float16 and cast where they are used.

    ONNX Runtime casts them once while loading, so the file is half as large and a run costs what it did.

    Returns:
        How many tensors were stored so.

    Raises:
        ConfigurationError: a weight is beyond float16's range.
    """
    model = onnx.load(str(source))
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < MIN_VALUES:
            continue
        values = numpy_helper.to_array(tensor)
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise ConfigurationError(f"weight {tensor.name} has values beyond float16; keep this network in float32")
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], f"cast.{name}", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(target))
    return len(casts)


def quantize_matrices(source: Path, target: Path, *, embeddings: bool = False) -> None:
    """Writes a graph whose matrix products (Gemm, MatMul) have int8 weights and quantise their inputs as they come.

    Needs no calibration. It suits fully connected networks; convolutions would become slower than in float, and stay.
    With `embeddings`, tables that are looked up (Gather) are stored in int8 too.

    Raises:
        ConfigurationError: the graph has no matrix product with weights.
    """
    graph = onnx.load(str(source)).graph
    if not any(node.op_type in ("Gemm", "MatMul") for node in graph.node):
        raise ConfigurationError(f"{source.name} has no matrix product; dynamic int8 would change nothing")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the tool asks on the root logger for preparations that change nothing here
    try:
        quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=["Gemm", "MatMul", *(["Gather"] if embeddings else [])],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    finally:
        root.setLevel(level)
