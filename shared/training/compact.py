"""Smaller files for the same graph: weights stored as float16, and int8 weights for matrix products alone."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from shared.errors import ConfigurationError

MIN_VALUES = 64
"""Smaller tensors (biases, shapes, constants) stay as they are."""
BLOCK = 64
"""Inputs that share a scale. With 128 and 256 rows are no longer rounded alone (docs/log.md)."""
INT8_SUMS = 4
"""`accuracy_level` of MatMulNBits: the input is rounded to int8 too, so that products are summed in integers."""


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

    Weights are symmetric with a scale for each output and each BLOCK inputs, and so is every row's input: what a row
    gives does not depend on the rows beside it, which ONNX Runtime's dynamic quantisation (one scale for the whole
    batch) does not promise. Needs no calibration. It suits fully connected networks; convolutions stay. With
    `embeddings`, tables that are looked up (Gather) are stored in int8 too.

    Raises:
        ConfigurationError: the graph has no matrix product with weights, nor a table that is asked for.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    model = onnx.load(str(source))
    _turn_gemm_into_matmul(model.graph)
    inputs = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    inputs_of_products = [
        inputs[node.input[1]] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in inputs
    ]
    tables = embeddings and any(node.op_type == "Gather" and node.input[0] in inputs for node in model.graph.node)
    if not inputs_of_products and not tables:
        raise ConfigurationError(f"{source.name} has no matrix product with weights; int8 would change nothing")
    block = BLOCK if min(inputs_of_products, default=BLOCK) >= BLOCK else BLOCK // 2  # else narrow ones are padded
    config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, accuracy_level=INT8_SUMS, bits=8)
    with _quiet(MatMulNBitsQuantizer.__module__):
        quantizer = MatMulNBitsQuantizer(model, algo_config=config)
        quantizer.process()
        onnx.save(quantizer.model.model, str(target))
        if embeddings:
            quantize_dynamic(str(target), str(target), op_types_to_quantize=["Gather"], weight_type=QuantType.QInt8)


def _turn_gemm_into_matmul(graph: onnx.GraphProto) -> None:
    """Writes every Gemm that is a plain product with weights as MatMul and Add: those alone are quantised by block."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        plain = all(attributes.get(name, 1) == 1 for name in ("alpha", "beta")) and not attributes.get("transA", 0)
        if node.op_type != "Gemm" or not plain or node.input[1] not in weights:
            nodes.append(node)
            continue
        values = numpy_helper.to_array(weights[node.input[1]])
        turned = f"{node.output[0]}.weight"
        straight = np.ascontiguousarray(values.T) if attributes.get("transB", 0) else values
        graph.initializer.append(numpy_helper.from_array(straight, turned))
        product, bias = node.output[0], node.input[2:3]
        if bias:
            product += ".product"
            nodes.append(helper.make_node("MatMul", [node.input[0], turned], [product], f"{node.name}.product"))
            nodes.append(helper.make_node("Add", [product, *bias], [node.output[0]], node.name))
        else:
            nodes.append(helper.make_node("MatMul", [node.input[0], turned], [product], node.name))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


@contextlib.contextmanager
def _quiet(module: str) -> Iterator[None]:
    """Silences the quantisers, which tell every node, and ask on the root logger for what changes nothing here."""
    loggers = [logging.getLogger(name) for name in (None, module)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
