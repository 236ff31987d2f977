"""Quantisation-aware training, magnitude pruning, float16 storage and dynamic int8."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from shared.errors import ConfigurationError
from shared.training.affine import asymmetric, symmetric
from shared.training.compact import quantize_matrices, store_half
from shared.training.export import export_onnx, onnx_predictor, open_session
from shared.training.magnitude import (
    erf_share,
    finish_masks,
    mask_small_weights,
    removed_share,
    zeros_of_file,
)
from shared.training.qat import ActivationQuantiser, FakeQuantise, WeightQuantiser, finish_qat, prepare_qat
from shared.training.quantize import QuantizeRecipe, quantize_int8


def small_network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    model(torch.randn(64, 3, 8, 8))  # statistics that are not 0 and 1
    return model.eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5)).eval()


def exported(model, example, path):
    export_onnx(model, example, path, input_name="x", output_name="y")
    return path


class TestQuantisationAwareTraining:
    def test_rounding_is_the_quantisers(self):
        x = torch.randn(7, 12)
        weights = symmetric(x.numpy(), axis=0)
        np.testing.assert_allclose(WeightQuantiser()(x).numpy(), weights.dequantise(weights.quantise(x.numpy())), 1e-6)
        ranges = asymmetric(x.numpy())
        rounded = ActivationQuantiser()(x).numpy()
        np.testing.assert_allclose(rounded, ranges.dequantise(ranges.quantise(x.numpy())), atol=1e-6)

    def test_gradient_is_straight_through_inside_and_zero_outside(self):
        x = torch.tensor([-3.0, -1.0, 0.2, 1.0, 3.0], requires_grad=True)
        y = FakeQuantise.apply(x, torch.tensor(0.01), torch.tensor(0.0), -127, 127)
        (y * torch.arange(1.0, 6.0)).sum().backward()
        assert x.grad.tolist() == [0, 2, 3, 4, 0]
        torch.testing.assert_close(y, torch.tensor([-1.27, -1.0, 0.2, 1.0, 1.27]))

    def test_range_follows_the_batches_only_while_training(self):
        quantiser = ActivationQuantiser(momentum=0.5)
        quantiser(torch.tensor([0.0, 4.0]))
        quantiser(torch.tensor([-2.0, 8.0]))
        assert (quantiser.low.item(), quantiser.high.item()) == (-1, 6)
        quantiser.eval()(torch.tensor([-9.0, 99.0]))
        assert quantiser.high.item() == 6

    def test_weights_come_out_on_the_grid_that_onnx_runtime_uses(self, tmp_path):
        model = prepare_qat(small_network())
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()
        x, labels = torch.randn(64, 3, 8, 8), torch.randint(0, 5, (64,))
        losses = []
        for _ in range(8):
            loss = nn.functional.cross_entropy(model(x), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        rounded = model.eval()(x)
        plain = finish_qat(model)
        assert not any("parametrizations" in name for name, _ in plain.named_modules())
        # only the activations' rounding is gone: two steps of some 1/255 of the range
        assert (plain(x) - rounded).abs().max() < 0.05 * rounded.abs().max()
        float_path = exported(plain, x[:2], tmp_path / "float.onnx")
        inputs = np.random.default_rng(0).normal(size=(200, 3, 8, 8)).astype(np.float32)
        quantize_int8(float_path, tmp_path / "int8.onnx", inputs, QuantizeRecipe())
        weight = plain.get_submodule("0").weight.detach().numpy()
        stored = [
            numpy_helper.to_array(tensor)
            for tensor in onnx.load(str(tmp_path / "int8.onnx")).graph.initializer
            if tensor.data_type == TensorProto.INT8 and tuple(tensor.dims) == weight.shape
        ]
        grid = symmetric(weight, axis=0)
        np.testing.assert_array_equal(stored[0], grid.quantise(weight))
        np.testing.assert_allclose(grid.dequantise(stored[0]), weight, rtol=1e-5, atol=1e-9)  # nothing more was lost

    def test_a_norm_that_cannot_be_folded_is_refused(self):
        with pytest.raises(ConfigurationError, match="follows no convolution"):
            prepare_qat(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)))


class TestMagnitudePruning:
    def test_the_share_of_normal_weights_is_the_error_function(self):
        model = nn.Sequential(nn.Linear(500, 400))
        nn.init.normal_(model[0].weight, std=0.3)
        for alpha in (0.5, 1.0, 1.5):
            masked = finish_masks(mask_small_weights(model, ["0"], alpha))
            # three standard errors of a share over 200,000 weights
            assert removed_share(masked, ["0"]) == pytest.approx(erf_share(alpha), abs=3 * (0.25 / 200_000) ** 0.5)
        assert [round(erf_share(alpha), 3) for alpha in (0.5, 1.0, 1.5)] == [0.383, 0.683, 0.866]

    def test_zeros_stay_zeros_in_training_and_in_the_file(self, tmp_path):
        masked = mask_small_weights(mlp(), ["0", "2"], 1.0)
        zeros = masked[0].weight == 0
        assert zeros.any()
        optimiser = torch.optim.AdamW(masked.parameters(), lr=0.05)
        before = masked[0].weight.detach().clone()
        for _ in range(3):
            optimiser.zero_grad()
            masked(torch.randn(16, 40)).square().sum().backward()
            optimiser.step()
        assert not torch.equal(masked[0].weight, before)
        assert torch.equal(masked[0].weight == 0, zeros)
        plain = finish_masks(masked)
        path = exported(plain, torch.randn(2, 40), tmp_path / "m.onnx")
        shares = sorted(zeros_of_file(path).values())
        own = sorted(float((plain[i].weight == 0).float().mean()) for i in (0, 2, 4))
        assert shares == pytest.approx(own)
        assert own[0] == 0  # the layer that was not named

    def test_nothing_left_is_refused(self):
        with pytest.raises(ConfigurationError, match="keeps no weight"):
            mask_small_weights(mlp(), ["0"], 50.0)
        with pytest.raises(ConfigurationError, match="0 or more"):
            mask_small_weights(mlp(), ["0"], -1.0)


class TestFiles:
    def test_half_is_half_as_large_and_almost_equal(self, tmp_path):
        source = exported(mlp(), torch.randn(2, 40), tmp_path / "a.onnx")
        assert store_half(source, tmp_path / "b.onnx") >= 3
        assert (tmp_path / "b.onnx").stat().st_size < 0.7 * source.stat().st_size  # 5,900 weights and 2 kB of graph
        x = np.random.default_rng(0).normal(size=(9, 40)).astype(np.float32)
        full, half = (onnx_predictor(open_session(path))(x) for path in (source, tmp_path / "b.onnx"))
        assert 0 < np.abs(full - half).max() < 5e-3  # eleven bits of each weight

    def test_a_weight_beyond_half_is_refused(self, tmp_path):
        model = mlp()
        with torch.no_grad():
            model[0].weight[0, 0] = 1e6
        with pytest.raises(ConfigurationError, match="beyond float16"):
            store_half(exported(model, torch.randn(2, 40), tmp_path / "a.onnx"), tmp_path / "b.onnx")

    def test_int8_shrinks_matrices(self, tmp_path):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 16)).eval()
        source = exported(model, torch.randn(2, 256), tmp_path / "a.onnx")
        quantize_matrices(source, tmp_path / "b.onnx")
        assert (tmp_path / "b.onnx").stat().st_size < 0.3 * source.stat().st_size
        x = np.random.default_rng(0).normal(size=(9, 256)).astype(np.float32)
        full, small = (onnx_predictor(open_session(path))(x) for path in (source, tmp_path / "b.onnx"))
        assert 0 < np.abs(full - small).max() < 0.02 * np.abs(full).max()

    @pytest.mark.parametrize("inputs", [200, 32, 7])
    def test_int8_of_a_row_does_not_depend_on_its_neighbours(self, tmp_path, inputs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(inputs, 96), nn.ReLU(), nn.Linear(96, 17, bias=False)).eval()
        quantize_matrices(exported(model, torch.randn(2, inputs), tmp_path / "a.onnx"), tmp_path / "b.onnx")
        predict = onnx_predictor(open_session(tmp_path / "b.onnx"))
        x = np.random.default_rng(0).normal(size=(33, inputs)).astype(np.float32)
        x[1] *= 1000  # one scale for the whole batch would leave the others nothing
        together = predict(x)
        for rows in (1, 2, 7):
            apart = np.concatenate([predict(x[at : at + rows]) for at in range(0, 33, rows)])
            np.testing.assert_array_equal(apart, together)

    def test_int8_of_convolutions_alone_is_refused(self, tmp_path):
        convolution = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        source = exported(convolution, torch.randn(2, 3, 8, 8), tmp_path / "a.onnx")
        with pytest.raises(ConfigurationError, match="no matrix product"):
            quantize_matrices(source, tmp_path / "b.onnx")
