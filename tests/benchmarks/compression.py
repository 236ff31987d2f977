"""How much faster compression makes ResNet-18 at 224 pixels: `python -m tests.benchmarks.compression`.

The weights are random, which changes no time; what compression costs in accuracy is not measured here. Structured
pruning removes the given share of the multiply-adds by the L1 criterion. One thread, batch 1, variants in turns.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn

from services.vision.training.models import MODELS
from shared.training.export import export_onnx, onnx_predictor, open_session
from shared.training.latency import _time_in_turns
from shared.training.macs import count_macs
from shared.training.metrics import Predict
from shared.training.prune import PruneConfig, prune
from shared.training.quantize import MIN_CALIBRATION, QuantizeRecipe, quantize_int8


@dataclass(frozen=True)
class CompressionBenchConfig:
    """Measures fp32, int8, pruned and pruned int8 of one network with random weights."""

    model: str = "resnet18"
    """Network, by its name in the registry."""
    share: float = 0.45
    """Share of the multiply-adds to remove."""
    rounds: int = 100
    """Calls of each variant."""
    size: int = 224
    """Side of the picture."""


def variants(model: nn.Module, name: str, folder: Path, size: int) -> dict[str, Predict]:
    """Exports and quantises one network; `predict` of both by name."""
    inputs = np.random.default_rng(0).normal(size=(MIN_CALIBRATION, 3, size, size)).astype(np.float32)
    path = folder / f"{name}.onnx"
    quantised = path.with_suffix(".int8.onnx")
    names = {"input_name": "image", "output_name": "logits"}
    export_onnx(model, torch.from_numpy(inputs[:2]), path, **names, max_bytes=2**31)
    quantize_int8(path, quantised, inputs, QuantizeRecipe())
    return {file.name: onnx_predictor(open_session(file)) for file in (path, quantised)}


def main(config: CompressionBenchConfig) -> None:
    """Prints a table."""
    torch.manual_seed(0)
    example = torch.zeros(1, 3, config.size, config.size)
    model = MODELS.get(config.model)(1000, False).eval()
    pruned = prune(model, example, PruneConfig(config.share, "l1")).model
    with tempfile.TemporaryDirectory() as folder:
        predictors = variants(model, "full", Path(folder), config.size)
        predictors |= variants(pruned, "pruned", Path(folder), config.size)
        times = _time_in_turns(predictors, example.numpy(), config.rounds)
    print(f"{config.model}: {count_macs(model, example) / 1e6:.0f} million multiply-adds", end=", ")
    print(f"pruned {count_macs(pruned, example) / 1e6:.0f}")
    base = float(np.median(times["full.onnx"]))
    for name, seconds in times.items():
        p50, p95 = (1e3 * float(np.percentile(seconds, q)) for q in (50, 95))
        print(f"{name:18} p50 {p50:6.2f} ms  p95 {p95:6.2f} ms  {1e3 * base / p50:.2f}x")


if __name__ == "__main__":
    main(tyro.cli(CompressionBenchConfig, description=__doc__))
