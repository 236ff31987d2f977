"""The three models that every measurement uses, with random weights, written as ONNX graphs without torch.

tiny is an MLP 4-64-64-2, small MobileNetV2 at 3x96x96, medium ResNet-18 at 3x224x224; batch norms count as folded into
the convolutions. Speed does not depend on the weights, so nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shared.testing.graphs import publish_graph

INPUT, OUTPUT = "x", "y"
MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, repeats, stride of the first (Sandler et al. 2018, table 2)."""


class GraphBuilder:
    """Adds nodes one after the other; every method takes and returns the name of a tensor."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []

    def _add(self, kind: str, *inputs: str, **attributes: object) -> str:
        output = f"t{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def _weight(self, *shape: int) -> str:
        name = f"w{len(self._weights)}"
        scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.01
        values = self._random.normal(0, scale, shape).astype(np.float32)
        self._weights.append(numpy_helper.from_array(values, name))
        return name

    def relu(self, x: str) -> str:
        return self._add("Relu", x)

    def relu6(self, x: str) -> str:
        limits = [f"limit{value}" for value in (0, 6)]
        if not any(weight.name == limits[0] for weight in self._weights):
            self._weights += [numpy_helper.from_array(np.float32(v), n) for v, n in zip((0, 6), limits, strict=True)]
        return self._add("Clip", x, *limits)

    def add(self, x: str, y: str) -> str:
        return self._add("Add", x, y)

    def max_pool(self, x: str) -> str:
        return self._add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])

    def mean_pool(self, x: str) -> str:
        return self._add("Flatten", self._add("GlobalAveragePool", x))

    def conv(self, x: str, channels: tuple[int, int], kernel: int, stride: int = 1, groups: int = 1) -> str:
        weight = self._weight(channels[1], channels[0] // groups, kernel, kernel)
        pads, strides = [kernel // 2] * 4, [stride, stride]
        return self._add("Conv", x, weight, self._weight(channels[1]), group=groups, pads=pads, strides=strides)

    def linear(self, x: str, features: tuple[int, int]) -> str:
        return self._add("Gemm", x, self._weight(features[1], features[0]), self._weight(features[1]), transB=1)

    def model(self, x: str, shape: tuple[int, ...], outputs: int) -> onnx.ModelProto:
        """The finished graph, whose output is `x`."""
        self._nodes.append(helper.make_node("Identity", [x], [OUTPUT]))
        source = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *shape])
        sink = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", outputs])
        graph = helper.make_graph(self._nodes, "bench", [source], [sink], self._weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def mlp() -> onnx.ModelProto:
    """4-64-64-2."""
    graph = GraphBuilder()
    x = graph.relu(graph.linear(INPUT, (4, 64)))
    x = graph.relu(graph.linear(x, (64, 64)))
    return graph.model(graph.linear(x, (64, 2)), (4,), 2)


def mobilenet_v2() -> onnx.ModelProto:
    """MobileNetV2 with 1,000 classes at 3x96x96."""
    graph = GraphBuilder()
    x, width = graph.relu6(graph.conv(INPUT, (3, 32), 3, 2)), 32
    for expansion, channels, repeats, first in MOBILENET_V2:
        for repeat in range(repeats):
            stride, hidden, y = first if repeat == 0 else 1, width * expansion, x
            if expansion > 1:
                y = graph.relu6(graph.conv(y, (width, hidden), 1))
            y = graph.relu6(graph.conv(y, (hidden, hidden), 3, stride, groups=hidden))
            y = graph.conv(y, (hidden, channels), 1)
            x, width = graph.add(x, y) if stride == 1 and width == channels else y, channels
    x = graph.relu6(graph.conv(x, (width, 1280), 1))
    return graph.model(graph.linear(graph.mean_pool(x), (1280, 1000)), (3, 96, 96), 1000)


def resnet18() -> onnx.ModelProto:
    """ResNet-18 with 1,000 classes at 3x224x224."""
    graph = GraphBuilder()
    x, width = graph.max_pool(graph.relu(graph.conv(INPUT, (3, 64), 7, 2))), 64
    for channels, first in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for stride in (first, 1):
            y = graph.relu(graph.conv(x, (width, channels), 3, stride))
            y = graph.conv(y, (channels, channels), 3)
            shortcut = x if stride == 1 and width == channels else graph.conv(x, (width, channels), 1, stride)
            x, width = graph.relu(graph.add(y, shortcut)), channels
    return graph.model(graph.linear(graph.mean_pool(x), (512, 1000)), (3, 224, 224), 1000)


def echo(features: int) -> onnx.ModelProto:
    """`[B, features]` → `[B, 1]`, the mean: as good as no work, so that a payload's own cost shows."""
    nodes = [helper.make_node("ReduceMean", [INPUT, "axes"], [OUTPUT], keepdims=1)]
    source = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", features])
    sink = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["batch", 1])
    axes = numpy_helper.from_array(np.array([1]), "axes")
    graph = helper.make_graph(nodes, "echo", [source], [sink], [axes])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@dataclass(frozen=True)
class BenchModel:
    """One model: `shape` of an item, `outputs` of an answer, items that run together at most."""

    name: str
    build: Callable[[], onnx.ModelProto]
    shape: tuple[int, ...]
    outputs: int
    max_batch: int

    def item(self) -> np.ndarray:
        """`[1, ...]`, one input with real numbers in it."""
        return np.random.default_rng(0).random((1, *self.shape), dtype=np.float32)

    def publish(self, root: Path, *, service: str = "vision", name: str = "") -> Path:
        """Publishes it as a model version; returns its folder."""
        return publish_graph(
            root, self.build(), service=service, name=name or self.name, shape=self.shape,
            outputs=self.outputs, max_batch=self.max_batch,
        )  # fmt: skip


MODELS = {
    "tiny": BenchModel("tiny", mlp, (4,), 2, 64),
    "small": BenchModel("small", mobilenet_v2, (3, 96, 96), 1000, 8),
    "medium": BenchModel("medium", resnet18, (3, 224, 224), 1000, 4),
}
