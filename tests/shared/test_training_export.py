"""Export and quantisation of a network small enough to take apart."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationMethod
from torch import nn

from shared.errors import ConfigurationError
from shared.training.export import (
    check_parity,
    export_onnx,
    fold_batch_norm,
    onnx_predictor,
    open_session,
    opset_of,
)
from shared.training.metrics import torch_predictor
from shared.training.quantize import METHODS, QuantizeRecipe, quantize_int8


def network() -> nn.Module:
    """Convolution, BatchNorm with statistics worth folding, residual, classifier."""
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(x)

    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    model = nn.Sequential(stem, Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


INPUTS = np.random.default_rng(0).standard_normal((220, 3, 16, 16), np.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(network(), torch.from_numpy(INPUTS[:2]), path, input_name="image", output_name="logits")
    return path


def test_folding_keeps_the_answers_and_removes_the_norms():
    model = network()
    folded = fold_batch_norm(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 2
    x = torch.from_numpy(INPUTS[:4])
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_one_file_with_a_symbolic_batch(exported):
    assert [path.name for path in exported.parent.iterdir()] == ["model.onnx"]
    graph = onnx.load(str(exported)).graph
    for tensor, name in ((graph.input[0], "image"), (graph.output[0], "logits")):
        assert tensor.name == name
        assert tensor.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert opset_of(exported) >= 18


def test_file_holds_no_trace_of_this_machine(exported):
    content = exported.read_bytes()
    assert b"/work" not in content
    assert b"site-packages" not in content
    assert b".py" not in content


@pytest.mark.parametrize("batch", [1, 2, 5, 32])
def test_answers_as_pytorch_does(exported, batch):
    session = onnx_predictor(open_session(exported))
    np.testing.assert_allclose(session(INPUTS[:batch]), torch_predictor(network())(INPUTS[:batch]), atol=1e-5)


def test_parity_is_measured_and_a_wrong_export_refused(exported):
    right = onnx_predictor(open_session(exported))
    assert 0 <= check_parity(torch_predictor(network()), right, INPUTS) < 1e-5
    with pytest.raises(ConfigurationError, match=r"differs from PyTorch by 1\.00e-03 at batch 1"):
        check_parity(right, lambda batch: right(batch) + np.float32(1e-3), INPUTS)
    with pytest.raises(ConfigurationError):
        check_parity(right, lambda batch: right(batch) * np.float32("nan"), INPUTS)
    with pytest.raises(ConfigurationError, match="at batch 5"):
        check_parity(right, lambda batch: right(batch) + np.float32(len(batch) == 5), INPUTS)


def test_example_of_one_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="batch 1"):
        export_onnx(network(), torch.zeros(1, 3, 16, 16), tmp_path / "x.onnx", input_name="a", output_name="b")


def test_export_leaves_the_model_as_it_was(tmp_path):
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, torch.from_numpy(INPUTS[:2]), tmp_path / "m.onnx", input_name="a", output_name="b")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "recipe",
    [QuantizeRecipe(), QuantizeRecipe(keep_ends=True), QuantizeRecipe("percentile", 99.99)],
    ids=lambda r: r.name,
)
def test_int8_is_close_to_float(exported, tmp_path, recipe):
    target = tmp_path / "model.int8.onnx"
    quantize_int8(exported, target, INPUTS, recipe)

    float32, int8 = (onnx_predictor(open_session(path))(INPUTS) for path in (exported, target))

    scale = np.abs(float32).max()
    assert 0 < np.abs(float32 - int8).max() < 0.1 * scale  # a few of 256 steps, through two layers
    graph = onnx.load(str(target)).graph
    weights = [
        tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    ]
    assert len(weights) == (1 if recipe.keep_ends else 2)
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_every_method_exists_in_onnx_runtime():
    assert set(METHODS.values()) <= set(CalibrationMethod)


def test_too_few_calibration_inputs_are_refused(exported, tmp_path):
    with pytest.raises(ConfigurationError, match="199 inputs, expected at least 200"):
        quantize_int8(exported, tmp_path / "q.onnx", INPUTS[:199], QuantizeRecipe())


def test_unknown_method_is_refused(exported, tmp_path):
    with pytest.raises(ConfigurationError, match="`guess` is unknown"):
        quantize_int8(exported, tmp_path / "q.onnx", INPUTS, QuantizeRecipe("guess"))
