"""Exports a trained run and publishes it: `python -m services.vision.training.export --seed 0`.

Writes the fp32 graph, quantises it to int8, measures both on the held-back part, lets the gate decide, and publishes
what passes with its manifest and card. The int8 recipe is chosen on the validation part; the test part only judges the
result.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import nn

from services.vision.preprocess import ClassificationPreprocessing
from services.vision.training.data import Photos
from services.vision.training.models import MODELS
from services.vision.training.record import describe_variant, training_record
from services.vision.training.tasks import TASKS, Task
from services.vision.training.train import RunResult
from shared.artifacts import (
    CARD_NAME,
    Manifest,
    TensorSpec,
    publish,
    read_manifest,
    verify_variant,
    write_atomically,
)
from shared.errors import ConfigurationError
from shared.training.card import render_card
from shared.training.export import check_parity, export_onnx, onnx_predictor, open_session, opset_of
from shared.training.gate import Measured, Verdict, judge
from shared.training.latency import Latency, measure_latencies
from shared.training.macs import count_macs
from shared.training.metrics import Classification, agreement, classify, torch_predictor
from shared.training.prune import load_pruned
from shared.training.quantize import QuantizeRecipe, quantize_int8

LOG = logging.getLogger("usagi.export")
CARDS = Path(__file__).parents[1] / "cards"
FILES = {
    "fp32": "model.onnx",
    "int8": "model.int8.onnx",
    "pruned": "model.pruned.onnx",
    "pruned_int8": "model.pruned.int8.onnx",
}
HOW_LEARNED = {"finetune": "ImageNet weights, fine-tuned", "scratch": "learned from random weights"}
RECIPES = (QuantizeRecipe("minmax"), QuantizeRecipe("minmax", keep_ends=True))
"""In order of preference; a later one is taken only if it agrees with fp32 on more validation photos."""


@dataclass(frozen=True)
class ExportConfig:
    """Exports a trained run to ONNX, quantises it, and publishes both with a manifest."""

    mode: str = "finetune"
    """Mode of the run to ship."""
    seed: int = 0
    """Seed of the run to ship."""
    data: Literal["flowers", "fashion"] = "flowers"
    """What the run learned."""
    model: str = "efficientnet-lite0"
    """Network."""
    pruned: str = ""
    """Pruned run of the same network to ship as further variants, such as `pruned-seed0`."""
    add: bool = False
    """Leave what is published as it is, and add the pruned run's variants, judged by the published fp32."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    root: Path = Path("var/models")
    """Model root to publish into; `deploy/models` holds what the images are built with."""
    version: int = 1
    """Version number to publish as; the same version is replaced."""
    calibration: int = 256
    """Photos of the training part that set the int8 ranges."""
    quick: bool = False
    """Export a `--quick` run; the card is not copied to `services/vision/cards`."""

    @property
    def task(self) -> Task:
        """What `data` names."""
        return TASKS[self.data]

    @property
    def run_folder(self) -> Path:
        """Where the run to ship lives."""
        return self._folder(f"{self.mode}-seed{self.seed}")

    @property
    def pruned_folder(self) -> Path | None:
        """Where the pruned run to ship lives."""
        return self._folder(self.pruned) if self.pruned else None

    @property
    def published_folder(self) -> Path:
        """Where the version is or will be published."""
        return self.root / "vision" / f"{self.task.name}-{self.model}" / str(self.version)

    def _folder(self, name: str) -> Path:
        return self.runs / f"{self.data}-{self.model}" / (name + ("-quick" if self.quick else ""))


@dataclass(frozen=True)
class Candidate:
    """One variant with all that was measured on it."""

    path: Path
    test: Classification
    val: Classification
    latency: Latency
    verdict: Verdict
    extra: dict[str, float]


def export(config: ExportConfig) -> Path:
    """Exports, measures, judges and publishes a run; returns the folder of the published version.

    Raises:
        ConfigurationError: the run is not finished, or the export differs from PyTorch.
        ArtifactError: there is nothing published to add to, or it is damaged.
    """
    result = read_result(config.run_folder)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        candidates = _make_candidates(config, Path(folder))
        manifest = _manifest(config, result, candidates)
        for name, candidate in candidates.items():
            LOG.info("%s: %s", name, "ships" if candidate.verdict.ships else "; ".join(candidate.verdict.reasons))

        def fill(target: Path) -> None:
            for name in manifest.variants:
                shutil.copy(candidates[name].path, target / FILES[name])
            (target / CARD_NAME).write_text(render_card(manifest), encoding="utf-8")

        published = publish(config.root, manifest, fill)
    if not config.quick and config.root.resolve() == Path("deploy/models").resolve():
        write_atomically(CARDS / f"{manifest.name}.md", render_card(manifest))
    return published


def read_result(folder: Path) -> RunResult:
    """The `result.json` of a run.

    Raises:
        ConfigurationError: the run is missing or not finished.
    """
    path = folder / "result.json"
    if not path.exists():
        raise ConfigurationError(f"{path} does not exist; train first: python -m services.vision.training.train --help")
    return RunResult(**json.loads(path.read_text(encoding="utf-8")))


def _make_candidates(config: ExportConfig, folder: Path) -> dict[str, Candidate]:
    task, preprocessing = config.task, config.task.preprocessing
    val, test = task.load("val"), task.load("test")
    inputs = stack(val, preprocessing)
    calibration = stack(task.load("train").take(config.calibration), preprocessing)
    if config.add:
        extra = _take_published(config.published_folder, folder)
    else:
        extra = _write_graphs(_load(config.run_folder, config), "", folder, inputs, calibration)
    if config.pruned_folder:
        extra |= _write_graphs(_load(config.pruned_folder, config), "pruned", folder, inputs, calibration)
    paths = {name: folder / FILES[name] for name in extra}
    predictors = {name: onnx_predictor(open_session(path)) for name, path in paths.items()}
    latencies = measure_latencies(predictors, inputs[:1])
    on_val = {name: classify(predict, inputs, val.labels) for name, predict in predictors.items()}
    on_test = {n: classify(predict, test.tensors(preprocessing), test.labels) for n, predict in predictors.items()}
    measured = {name: _measure(paths[name], on_test[name], on_test["fp32"], latencies[name]) for name in paths}
    verdicts = {name: judge(measured[name], measured["fp32"]) for name in paths if name != "fp32"}
    verdicts["fp32"] = Verdict(True, ())
    return {
        name: Candidate(paths[name], on_test[name], on_val[name], latencies[name], verdicts[name], extra[name])
        for name in paths
    }


def _take_published(source: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Copies what is published of the unpruned network; returns what its manifest says beyond what is measured anew."""
    variants = {name: variant for name, variant in read_manifest(source).variants.items() if name in ("fp32", "int8")}
    for name, variant in variants.items():
        shutil.copy(verify_variant(source, variant), folder / FILES[name])
    kept = ("parity_max_abs_diff", "calibration_photos", "macs")
    return {name: {key: v.metrics[key] for key in kept if key in v.metrics} for name, v in variants.items()}


def _load(run: Path, config: ExportConfig) -> nn.Module:
    """The network of a run, pruned or not."""
    read_result(run)
    model = MODELS.get(config.model)(len(config.task.labels), False)
    return load_pruned(model, torch.load(run / "weights.pt", weights_only=True))


def _write_graphs(
    model: nn.Module, prefix: str, folder: Path, inputs: NDArray[np.float32], calibration: NDArray[np.float32]
) -> dict[str, dict[str, float]]:
    """Writes a network's float and int8 graphs; returns what else is to be said about each, by variant."""
    name, quantised = (prefix, f"{prefix}_int8") if prefix else ("fp32", "int8")
    path = folder / FILES[name]
    export_onnx(model, torch.from_numpy(inputs[:2]), path, input_name="image", output_name="logits")
    parity = check_parity(torch_predictor(model), onnx_predictor(open_session(path)), inputs)
    LOG.info("%s exported, largest difference from PyTorch %.1e", name, parity)
    recipe = choose_recipe(path, folder / FILES[quantised], calibration, inputs)
    LOG.info("%s recipe: %s", quantised, recipe.name)
    macs = {"macs": float(count_macs(model, torch.from_numpy(inputs[:1])))}
    return {
        name: {"parity_max_abs_diff": parity, **macs},
        quantised: {"calibration_photos": float(len(calibration)), **macs},
    }


def stack(photos: Photos, preprocessing: ClassificationPreprocessing) -> NDArray[np.float32]:
    """`[N, 3, size, size]`: a part of the data as serving would see it."""
    return np.stack(list(photos.tensors(preprocessing)))


def choose_recipe(
    source: Path, target: Path, calibration: NDArray[np.float32], inputs: NDArray[np.float32]
) -> QuantizeRecipe:
    """Writes `target` with the first recipe whose answers on validation agree with fp32 most; returns the recipe."""
    labels = np.zeros(len(inputs), np.int64)
    reference = classify(onnx_predictor(open_session(source)), inputs, labels)
    best: tuple[float, QuantizeRecipe] | None = None
    for recipe in RECIPES:
        attempt = target.with_suffix(".attempt.onnx")
        quantize_int8(source, attempt, calibration, recipe)
        share = agreement(classify(onnx_predictor(open_session(attempt)), inputs, labels), reference)
        LOG.info("int8 with %s: agrees with fp32 on %.4f of validation", recipe.name, share)
        if best is None or share > best[0]:
            best = (share, recipe)
            attempt.replace(target)
    assert best is not None
    return best[1]


def _measure(path: Path, test: Classification, reference: Classification, latency: Latency) -> Measured:
    return Measured(test.accuracy, agreement(test, reference), path.stat().st_size, latency.p50_ms)


def _manifest(config: ExportConfig, result: RunResult, candidates: dict[str, Candidate]) -> Manifest:
    task, preprocessing = config.task, config.task.preprocessing
    shipped = {name: candidate for name, candidate in candidates.items() if candidate.verdict.ships}
    pruned = read_result(config.pruned_folder) if config.pruned_folder else None
    return Manifest(
        service="vision",
        name=f"{task.name}-{config.model}",
        version=config.version,
        task="image-classification",
        description=f"{task.description} {config.model}, {HOW_LEARNED.get(config.mode, config.mode)}.",
        inputs=(TensorSpec("image", "float32", (-1, 3, preprocessing.size, preprocessing.size)),),
        outputs=(TensorSpec("logits", "float32", (-1, len(task.labels))),),
        variants={
            name: describe_variant(c.path, FILES[name], c.test, c.val, candidates["fp32"].test, c.latency, c.extra)
            for name, c in shipped.items()
        },
        preprocessing=preprocessing.to_dict(),
        labels=task.labels,
        opset=opset_of(candidates["fp32"].path),
        training=training_record(
            result,
            task,
            config.run_folder.parent,
            candidates["fp32"].test,
            [*([pruned.command] if pruned else []), export_command(config)],
            pruned,
            read_manifest(config.published_folder).training if config.add else None,
        ),
    )


def export_command(config: ExportConfig) -> str:
    """The command line that exports this run again, without paths of the machine."""
    words = ["python -m services.vision.training.export", f"--mode {config.mode}", f"--seed {config.seed}"]
    default = ExportConfig()
    for name in ("data", "model", "pruned", "version", "calibration"):
        if getattr(config, name) != getattr(default, name):
            words.append(f"--{name} {getattr(config, name)}")
    return " ".join([*words, "--quick"] if config.quick else words)


def main(config: ExportConfig) -> None:
    """Publishes and says where."""
    print(f"published {export(config)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main(tyro.cli(ExportConfig, description=__doc__))
