"""ONNX graphs as people export them, with and without a batch that may be shared."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def graph(nodes, inputs, outputs, **constants):
    """`inputs` and `outputs`: name -> (element type, shape or None)."""
    made = helper.make_graph(
        nodes,
        "plain",
        [helper.make_tensor_value_info(name, *tensor) for name, tensor in inputs.items()],
        [helper.make_tensor_value_info(name, *tensor) for name, tensor in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def simple(*nodes, shape=("n", 4), out=("n", 4), **constants):
    """`y` of `x`, both float32."""
    return graph(nodes, {"x": (FLOAT, shape)}, {"y": (FLOAT, out)}, **constants)


def doubling(scale=2.0, **shapes):
    return simple(node("Mul", "x scale", "y"), scale=np.float32(scale), **shapes)


def minus_the_mean_of_the_batch():
    return simple(node("ReduceMean", "x axes", "m", keepdims=1), node("Sub", "x m", "y"), axes=np.array([0]))


def quantised_over_the_whole_tensor():
    return simple(node("DynamicQuantizeLinear", "x", "q s z"), node("DequantizeLinear", "q s z", "y"))


def noise():
    return simple(node("RandomNormalLike", "x", "r", seed=1.0), node("Add", "x r", "y"))


def rows_turned_to_columns():
    return simple(node("Transpose", "x", "y"), shape=("n", "k"), out=("m", "n"))


def a_single_row():
    """Takes the first dimension away, which fails for more than one row."""
    nodes = node("Squeeze", "x axis", "flat"), node("Add", "x flat", "y")
    return simple(*nodes, axis=np.array([0]))


def convolution(kernel):
    return simple(
        *(node("Conv", "x w", "c"), node("GlobalAveragePool", "c", "y")),
        shape=("n", 3, "h", "w"),
        out=("n", 2, 1, 1),
        w=np.random.default_rng(0).standard_normal((2, 3, kernel, kernel)).astype(np.float32),
    )


def of_seven_words():
    """Runs with exactly seven columns, which nothing declares."""
    return simple(
        *(node("Reshape", "x s", "m"), node("Identity", "m", "y")),
        shape=("n", "words"),
        out=("n", "m"),
        s=np.array([0, 7]),
    )


def embedding():
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    return graph(
        [node("Gather", "table ids", "y")], {"ids": (INT64, ("n", "t"))}, {"y": (FLOAT, ("n", "t", 3))}, table=table
    )


def identity(element, shape=("n", 2), out=("n", 2)):
    return graph([node("Identity", "x", "y")], {"x": (element, shape)}, {"y": (element, out)})


def sequence():
    made = graph([node("SequenceConstruct", "x", "y")], {"x": (FLOAT, ("n", 4))}, {})
    made.graph.output.append(helper.make_tensor_sequence_value_info("y", FLOAT, None))
    return made


def with_branches():
    """Weights inside the branches of an If; `y = x` or `x * 3`."""
    branches = []
    for number, scale in enumerate((1.0, 3.0)):
        out = f"b{number}"
        branches.append(
            helper.make_graph(
                [node("Mul", f"x s{number}", out)],
                f"branch{number}",
                [],
                [helper.make_tensor_value_info(out, FLOAT, None)],
                [numpy_helper.from_array(np.full((4,), scale, np.float32), f"s{number}")],
            )
        )
    return graph(
        [
            node("ReduceSum", "x", "sum", keepdims=0),
            node("Greater", "sum zero", "positive"),
            node("If", "positive", "y", then_branch=branches[1], else_branch=branches[0]),
        ],
        {"x": (FLOAT, (1, 4))},
        {"y": (FLOAT, (1, 4))},
        zero=np.float32(0),
    )


def save(model, path, data=None):
    """Writes a graph, with its weights in the file `data` beside it if that is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if data:
        onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0, convert_attribute=True)
    else:
        path.write_bytes(model.SerializeToString())
    return path
