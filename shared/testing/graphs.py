"""Tiny ONNX graphs whose answers can be worked out by hand, published as real model versions; needs `onnx`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shared.artifacts import CARD_NAME, Manifest, TensorSpec, Variant, publish, sha256_of

OPSET = 20
COLOURS = ("red", "green", "blue")


def affine_graph(scale: float = 2.0, offset: float = 0.0, features: int = 4) -> onnx.ModelProto:
    """A graph `y = scale * x + offset` on float32 `x` `[B, features]`."""
    nodes = [helper.make_node("Mul", ["x", "scale"], ["scaled"]), helper.make_node("Add", ["scaled", "offset"], ["y"])]
    constants = {"scale": np.float32(scale), "offset": np.float32(offset)}
    return _model(nodes, ("x", ["batch", features]), ("y", ["batch", features]), constants)


def colour_graph(gain: float = 10.0) -> onnx.ModelProto:
    """A classifier of pictures `image` `[B, 3, H, W]`: `logits` `[B, 3]` are the mean of each colour times `gain`."""
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["means"], keepdims=0),
        helper.make_node("Mul", ["means", "gain"], ["logits"]),
    ]
    constants = {"axes": np.array([2, 3], np.int64), "gain": np.float32(gain)}
    return _model(nodes, ("image", ["batch", 3, "height", "width"]), ("logits", ["batch", 3]), constants)


def _model(
    nodes: list[onnx.NodeProto],
    source: tuple[str, list[str | int]],
    sink: tuple[str, list[str | int]],
    constants: Mapping[str, Any],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(source[0], TensorProto.FLOAT, source[1])],
        [helper.make_tensor_value_info(sink[0], TensorProto.FLOAT, sink[1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def publish_affine(
    root: Path,
    *,
    service: str = "test",
    name: str = "affine",
    version: int = 1,
    scale: float = 2.0,
    offset: float = 0.0,
    max_batch: int = 8,
    features: int = 4,
) -> Path:
    """Publishes `affine_graph` as the variant `fp32` of a model version and returns its folder."""
    spec = (-1, features)
    return _publish(
        root,
        {"fp32": affine_graph(scale, offset, features)},
        max_batch,
        service=service,
        name=name,
        version=version,
        task="affine",
        description="y = scale * x + offset",
        inputs=(TensorSpec("x", "float32", spec),),
        outputs=(TensorSpec("y", "float32", spec),),
    )


def publish_colours(
    root: Path, preprocessing: Mapping[str, object], *, name: str = "colours", version: int = 1, max_batch: int = 8
) -> Path:
    """Publishes `colour_graph` as a vision classifier with the variants `fp32` and, sharper and faster, `int8`."""
    return _publish(
        root,
        {"fp32": colour_graph(10.0), "int8": colour_graph(20.0)},
        max_batch,
        service="vision",
        name=name,
        version=version,
        task="image-classification",
        description="the colour of a picture",
        inputs=(TensorSpec("image", "float32", (-1, 3, -1, -1)),),
        outputs=(TensorSpec("logits", "float32", (-1, 3)),),
        labels=COLOURS,
        preprocessing=dict(preprocessing),
    )


def publish_graph(
    root: Path,
    graph: onnx.ModelProto,
    *,
    name: str,
    shape: tuple[int, ...],
    outputs: int,
    max_batch: int,
    service: str = "test",
    version: int = 1,
) -> Path:
    """Publishes a graph `x` `[B, *shape]` → `y` `[B, outputs]`, float32."""
    return _publish(
        root,
        {"fp32": graph},
        max_batch,
        service=service,
        name=name,
        version=version,
        task="bench",
        description="random weights",
        inputs=(TensorSpec("x", "float32", (-1, *shape)),),
        outputs=(TensorSpec("y", "float32", (-1, outputs)),),
    )


def publish_identity(
    root: Path, element: int, dtype: str, *, service: str = "test", name: str, version: int = 1
) -> Path:
    """Publishes `y = x` `[B, 2]` of an ONNX type (`TensorProto.STRING`) that manifests call `dtype`."""
    tensors = [helper.make_tensor_value_info(tensor, element, ["batch", 2]) for tensor in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", tensors[:1], tensors[1:])
    return _publish(
        root,
        {"fp32": helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)},
        8,
        service=service,
        name=name,
        version=version,
        task="identity",
        description="y = x",
        inputs=(TensorSpec("x", dtype, (-1, 2)),),
        outputs=(TensorSpec("y", dtype, (-1, 2)),),
    )


def _publish(root: Path, graphs: Mapping[str, onnx.ModelProto], max_batch: int, **fields: object) -> Path:
    contents = {variant: graph.SerializeToString() for variant, graph in graphs.items()}
    files = {variant: "model.onnx" if variant == "fp32" else f"model.{variant}.onnx" for variant in graphs}

    def fill(folder: Path) -> None:
        for variant, content in contents.items():
            (folder / files[variant]).write_bytes(content)
        (folder / CARD_NAME).write_text("# a tiny model\n", encoding="utf-8")

    staging = root / ".measure"
    staging.mkdir(parents=True, exist_ok=True)
    fill(staging)
    variants = {
        variant: Variant(
            file=files[variant],
            sha256=sha256_of(staging / files[variant]),
            bytes=len(content),
            metrics={"accuracy": 1.0, "latency_p50_ms": 1.0 if variant == "fp32" else 0.5},
            max_batch=max_batch,
        )
        for variant, content in contents.items()
    }
    manifest = Manifest(variants=variants, opset=OPSET, **fields)  # type: ignore[arg-type]
    return publish(root, manifest, fill)
