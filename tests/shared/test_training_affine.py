"""Our affine quantiser against ONNX Runtime's operators, and its own laws."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from shared.errors import ConfigurationError
from shared.training.affine import Affine, asymmetric, integer_conv, integer_linear, symmetric

RNG = np.random.default_rng(7)
CASES = {
    "normal": RNG.normal(size=(6, 5, 4)),
    "all above 0": RNG.uniform(2, 3, (6, 5, 4)),
    "all below 0": RNG.uniform(-9, -8, (6, 5, 4)),
    "zeros": np.zeros((6, 5, 4)),
    "one value": np.full((6, 5, 4), 0.37),
    "tiny": RNG.normal(size=(6, 5, 4)) * 1e-42,
    "huge": RNG.normal(size=(6, 5, 4)) * 1e35,
    "an outlier": np.append(RNG.normal(size=119), 1e4).reshape(6, 5, 4),
}
CASES = {name: values.astype(np.float32) for name, values in CASES.items()}
QUANTISERS = {
    "asymmetric": asymmetric,
    "symmetric": symmetric,
    "per channel 0": lambda x: symmetric(x, axis=0),
    "per channel -1": lambda x: symmetric(x, axis=-1),
}


def session(nodes, inputs, outputs, constants):
    graph = helper.make_graph(
        nodes,
        "oracle",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def onnx_quantised(x: np.ndarray, affine: Affine) -> tuple[np.ndarray, np.ndarray]:
    """QuantizeLinear and DequantizeLinear of ONNX Runtime."""
    axis = {} if affine.axis is None else {"axis": affine.axis % x.ndim}
    kind = TensorProto.INT8 if affine.dtype is np.int8 else TensorProto.UINT8
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], **axis),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **axis),
    ]
    constants = {"scale": affine.scale, "zero": affine.zero_point.astype(affine.dtype)}
    run = session(nodes, {"x": TensorProto.FLOAT}, {"q": kind, "y": TensorProto.FLOAT}, constants)
    return tuple(run.run(["q", "y"], {"x": x}))


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_onnx_runtime_within_one_quantum(case, quantiser):
    x = CASES[case]
    affine = QUANTISERS[quantiser](x)
    theirs, back = onnx_quantised(x, affine)
    ours = affine.quantise(x)
    assert ours.dtype == theirs.dtype
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    # the same integer but for ties that x / scale and x * (1 / scale) round apart
    assert (ours == theirs).mean() >= 0.99
    np.testing.assert_array_equal(affine.dequantise(theirs), back)


@pytest.mark.parametrize("quantiser", QUANTISERS)
@pytest.mark.parametrize("case", CASES)
def test_round_trip_errs_by_half_a_step_and_keeps_zero(case, quantiser):
    x = CASES[case]
    affine = QUANTISERS[quantiser](x)
    step = affine._along(affine.scale, x.ndim)
    error = np.abs(affine.dequantise(affine.quantise(x)).astype(np.float64) - x)
    # half a step; a whole one at the ends, where rounding the zero point cuts off up to half a step more
    ends = 1.0 if quantiser == "asymmetric" else 0.5
    assert np.all(error <= ends * step * (1 + 1e-4) + 1e-45)
    assert np.mean(error <= 0.5 * step * (1 + 1e-4) + 1e-45) >= 0.95
    assert np.all(affine.dequantise(affine.quantise(np.zeros_like(x))) == 0)


def test_scale_and_zero_point_by_hand():
    affine = asymmetric(np.array([-1.0, 0.0, 4.1], np.float32))
    assert affine.scale == pytest.approx(5.1 / 255)
    assert affine.zero_point == 50
    assert affine.quantise(np.array([-1, 0, 0.02, 4.1, 9], np.float32)).tolist() == [0, 50, 51, 255, 255]
    assert symmetric(np.array([[1.27, 0.635], [-0.127, 0]], np.float32), axis=0).scale.tolist() == pytest.approx(
        [0.01, 0.001]
    )


def test_ties_go_to_the_even_neighbour():
    affine = Affine(np.float32(1), np.int32(0), -127, 127)
    assert affine.quantise(np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)).tolist() == [0, 2, 2, 0, -2]


def test_percentile_and_mse_ignore_an_outlier():
    x = np.append(np.random.default_rng(0).normal(size=20_000), 40).astype(np.float32)
    scales = {name: float(asymmetric(x, calibration=name).scale) for name in ("minmax", "percentile", "mse")}
    assert scales["percentile"] < 0.3 * scales["minmax"]
    assert scales["mse"] < scales["minmax"]  # not far: the square of what is cut off counts
    errors = {
        name: np.square(x - (a := asymmetric(x, calibration=name)).dequantise(a.quantise(x))).mean() for name in scales
    }
    assert errors["mse"] < errors["minmax"]
    assert errors["mse"] < errors["percentile"]


def qdq_output(x, w, bias, of_x, of_w, of_y, node):
    """A float layer between QuantizeLinear and DequantizeLinear, as the exported int8 graphs have it."""
    constants = {"w_q": of_w.quantise(w), "b": bias}
    for name, affine in (("x", of_x), ("w", of_w), ("y", of_y)):
        constants |= {f"{name}_s": affine.scale, f"{name}_z": affine.zero_point.astype(affine.dtype)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_s", "x_z"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_s", "x_z"], ["x_f"]),
        helper.make_node("DequantizeLinear", ["w_q", "w_s", "w_z"], ["w_f"], axis=0),
        node,
        helper.make_node("QuantizeLinear", ["y_f", "y_s", "y_z"], ["y"]),
    ]
    run = session(nodes, {"x": TensorProto.FLOAT}, {"y": TensorProto.UINT8}, constants)
    return run.run(None, {"x": x})[0]


def test_integer_linear_agrees_with_qdq_within_one_quantum():
    rng = np.random.default_rng(3)
    x, w = rng.normal(size=(40, 96)).astype(np.float32), rng.normal(size=(17, 96)).astype(np.float32)
    bias = rng.normal(size=17).astype(np.float32)
    of_x, of_w, of_y = asymmetric(x), symmetric(w, axis=0), asymmetric(x @ w.T + bias)
    node = helper.make_node("Gemm", ["x_f", "w_f", "b"], ["y_f"], transB=1)
    theirs = qdq_output(x, w, bias, of_x, of_w, of_y, node)
    ours = integer_linear(of_x.quantise(x), of_x, of_w.quantise(w), of_w, bias, of_y)
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1
    real = x @ w.T + bias
    assert np.abs(of_y.dequantise(ours) - real).max() < 0.05 * np.abs(real).max()


@pytest.mark.parametrize("padding", [0, 1])
def test_integer_convolution_agrees_with_qdq_within_one_quantum(padding):
    rng = np.random.default_rng(4)
    x = np.maximum(rng.normal(size=(2, 8, 9, 7)), 0).astype(np.float32)
    w, bias = rng.normal(size=(6, 8, 3, 3)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    of_x, of_w = asymmetric(x), symmetric(w, axis=0)
    of_y = asymmetric(np.array([-25.0, 30.0], np.float32))
    node = helper.make_node("Conv", ["x_f", "w_f", "b"], ["y_f"], pads=[padding] * 4)
    theirs = qdq_output(x, w, bias, of_x, of_w, of_y, node)
    ours = integer_conv(of_x.quantise(x), of_x, of_w.quantise(w), of_w, bias, of_y, padding=padding)
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(ConfigurationError, match="finite"):
        asymmetric(np.array([1, np.nan], np.float32))
    with pytest.raises(ConfigurationError, match="needs values"):
        asymmetric(np.array([], np.float32))
    with pytest.raises(ConfigurationError, match="expected minmax"):
        asymmetric(np.ones(3, np.float32), calibration="best")
    with pytest.raises(ConfigurationError, match="above 0"):
        Affine(np.float32(0), np.int32(0), 0, 255)
