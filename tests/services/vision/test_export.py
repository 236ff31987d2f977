"""From training to a published, verified model on made-up photos and a thin network; and what is shipped."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from services.vision.preprocess import ClassificationPreprocessing
from services.vision.training import data, evaluate, export, prune, tasks, train
from services.vision.training.data import LABELS, Photos
from services.vision.training.models import MODELS
from services.vision.training.models.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from shared.artifacts import CARD_NAME, ArtifactError, read_manifest, sha256_of
from shared.data.locate import locate
from shared.errors import ConfigurationError
from shared.training import gate
from shared.training.card import render_card
from shared.training.machine import spread
from shared.training.prune import PruneConfig

ROOT = Path(__file__).parents[3]
SHIPPED = sorted(path.parent for path in (ROOT / "deploy" / "models" / "vision").glob("*/*/manifest.json"))
COLOURS = np.array([(220, 30, 30), (30, 220, 30), (30, 30, 220), (210, 210, 20), (20, 200, 210)])


def coloured(split: str) -> Photos:
    """Noisy photos whose class is their colour: learnable in one epoch."""
    count = {"train": 220, "val": 40, "test": 60}[split]
    rng = np.random.default_rng(len(split))
    labels = np.arange(count) % 5
    images = tuple(np.clip(rng.normal(COLOURS[label], 25, (40, 48, 3)), 0, 255).astype(np.uint8) for label in labels)
    return Photos(tuple(f"{split}{index}" for index in range(count)), images, labels)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Model root with a thin network trained, exported and published by the real programs."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("chain")
    patch.setattr(tasks, "load_photos", coloured)
    if "thin" not in MODELS:
        shape = EfficientNetLiteConfig(width=0.2, depth=0.3, stem_channels=8, head_channels=64, batch_norm_momentum=0.5)
        MODELS.register("thin")(
            lambda classes, _: EfficientNetLite(dataclasses.replace(shape, classes=classes, dropout=0.0))
        )
    threads = torch.get_num_threads()
    settings = {"model": "thin", "runs": folder / "runs"}
    try:
        train.train(train.TrainConfig(mode="frozen", seed=1, threads=1, **settings))
        train.train(
            train.TrainConfig(mode="scratch", epochs=2, final_epochs=1, train_size=48, threads=1, batch=20, **settings)
        )
        pruning = PruneConfig(share=0.2, block=4)
        small = {"epochs": 1, "final_epochs": 0, "train_size": 48, "batch": 20, "importance_batches": 2}
        prune.train_pruned(prune.PruneRunConfig(base="scratch-seed0", seed=1, pruning=pruning, **small, **settings))
        patch.setattr(gate, "MAX_LOSS", 1.0)  # so little training is not enough for the real gate: every variant ships
        patch.setattr(gate, "MIN_AGREEMENT", 0.0)
        config = export.ExportConfig(mode="scratch", pruned="pruned-seed1", root=folder / "models", **settings)
        plain = export.export(dataclasses.replace(config, pruned="", root=folder / "plain"))
        path = export.export(config)
        yield folder, path, plain
    finally:
        torch.set_num_threads(threads)
        patch.undo()


def test_manifest_says_what_was_done(published):
    manifest = read_manifest(published[1])
    record = manifest.training
    assert (manifest.service, manifest.name, manifest.labels) == ("vision", "flowers-thin", LABELS)
    assert (manifest.inputs[0].shape, manifest.outputs[0].shape) == ((-1, 3, 224, 224), (-1, 5))
    assert ClassificationPreprocessing.from_dict(manifest.preprocessing) == ClassificationPreprocessing()
    assert record.command == (
        "python -m services.vision.training.train --mode scratch --seed 0 --model thin --epochs 2 --batch 20 "
        "--train-size 48 --final-epochs 1 --threads 1 && "
        "python -m services.vision.training.prune --seed 1 --base scratch-seed0 --model thin --importance-batches 2 "
        "--epochs 1 --batch 20 --train-size 48 --final-epochs 0 --pruning.share 0.2 --pruning.block 4 && "
        "python -m services.vision.training.export --mode scratch --seed 0 --model thin --pruned pruned-seed1"
    )
    assert str(published[0]) not in manifest.to_json()
    assert record.baselines["majority_class"] == 0.2
    assert "frozen" in record.baselines
    fp32 = manifest.variants["fp32"]
    assert fp32.metrics["agreement"] == 1
    assert fp32.metrics["test_photos"] == 60
    assert record.spread == {}  # one seed has none
    assert 0 < fp32.metrics["latency_p50_ms"] <= fp32.metrics["latency_p95_ms"]


def test_pruned_variants_join_what_is_published(published, tmp_path):
    """As on a machine that no longer has the other runs."""
    folder, whole, plain = published
    runs, root = tmp_path / "runs", tmp_path / "models"
    shutil.copytree(folder / "runs", runs, ignore=shutil.ignore_patterns("frozen*"))
    again = json.loads((runs / "flowers-thin" / "pruned-seed1" / "result.json").read_text())
    for seed, change in ((2, ""), (3, " --pruning.share 0.3")):  # another seed, and another recipe
        other = again | {"seed": seed, "command": again["command"].replace("--seed 1", f"--seed {seed}") + change}
        (runs / "flowers-thin" / f"other{seed}").mkdir()
        (runs / "flowers-thin" / f"other{seed}" / "result.json").write_text(json.dumps(other))
    before, target = read_manifest(plain), root / plain.relative_to(folder / "plain")
    shutil.copytree(plain, target)
    assert set(before.variants) == {"fp32", "int8"}
    export.export(
        export.ExportConfig(mode="scratch", pruned="pruned-seed1", add=True, root=root, model="thin", runs=runs)
    )
    after = read_manifest(target)
    assert set(after.variants) == set(read_manifest(whole).variants)
    for name, variant in before.variants.items():
        now = after.variants[name]
        assert now.sha256 == variant.sha256 == sha256_of(target / now.file)
        assert now.metrics["accuracy"] == variant.metrics["accuracy"]
        assert now.metrics["macs"] == variant.metrics["macs"]
    assert after.training.baselines == before.training.baselines  # `frozen` among them, whose run is not here
    assert {name: one["runs"] for name, one in after.training.spread.items()} == {"accuracy_pruned": 2}
    assert after.training.command == read_manifest(whole).training.command  # which makes all of it


def test_nothing_joins_what_is_not_there(published, tmp_path):
    config = export.ExportConfig(
        mode="scratch", pruned="pruned-seed1", add=True, root=tmp_path, model="thin", runs=published[0] / "runs"
    )
    with pytest.raises(ArtifactError, match="manifest"):
        export.export(config)


def test_pruned_variant_is_really_smaller(published):
    manifest = read_manifest(published[1])
    fp32, pruned = (manifest.variants[name] for name in ("fp32", "pruned"))
    assert pruned.metrics["macs"] <= 0.8 * fp32.metrics["macs"]
    assert pruned.bytes < fp32.bytes
    assert set(manifest.variants) == {"fp32", "int8", "pruned", "pruned_int8"}
    assert "pruned" not in manifest.training.baselines


def test_killed_pruning_starts_from_the_same_channels(published):
    run = published[0] / "runs" / "flowers-thin" / "pruned-seed1"
    start, end = (torch.load(run / name, weights_only=True) for name in ("start.pt", "weights.pt"))
    assert {name: tensor.shape for name, tensor in start.items()} == {n: tensor.shape for n, tensor in end.items()}
    (run / "last.pt").unlink()
    config = prune.PruneRunConfig(model="thin", seed=1, runs=published[0] / "runs")
    model = prune._start(torch.nn.Identity(), None, config)  # the teacher is not pruned again
    assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())


def test_pruning_before_training_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "load_photos", coloured)
    with pytest.raises(ConfigurationError, match="train first"):
        prune.train_pruned(prune.PruneRunConfig(runs=tmp_path))


def test_run_folder_holds_log_curves_and_result(published):
    run = published[0] / "runs" / "flowers-thin" / "scratch-seed0"
    assert {"metrics.jsonl", "curves.png", "result.json", "weights.pt", "last.pt", "best.pt"} <= {
        path.name for path in run.iterdir()
    }
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_verification_passes_what_export_published(published, capsys):
    assert evaluate.main(evaluate.EvaluateConfig(root=published[0] / "models", confusion=True)) == 0
    assert "agrees" in capsys.readouterr().out


@pytest.fixture
def spoilt(published):
    """The published folder, put back as it was afterwards."""
    kept = {path: path.read_bytes() for path in published[1].iterdir()}
    yield published[1]
    for path, content in kept.items():
        path.write_bytes(content)


def problems(folder: Path) -> list[str]:
    return [check.problem for check in evaluate.check_root(folder.parents[2])]


def rewrite(folder: Path, right_by: int) -> None:
    """Changes the accuracy that manifest and card claim by so many photos."""
    raw = json.loads((folder / "manifest.json").read_text())
    for variant in raw["variants"].values():
        variant["metrics"]["accuracy"] += right_by / 60
    (folder / "manifest.json").write_text(json.dumps(raw))
    (folder / CARD_NAME).write_text(render_card(read_manifest(folder)))


@pytest.mark.parametrize(("right_by", "passes"), [(1, True), (-1, True), (2, False), (-2, False)])
def test_verification_allows_one_photo(spoilt, right_by, passes):
    rewrite(spoilt, right_by)
    assert [not problem for problem in problems(spoilt)] == [passes] * len(problems(spoilt))
    assert evaluate.main(evaluate.EvaluateConfig(root=spoilt.parents[2])) == (0 if passes else 1)


def test_verification_finds_a_changed_file(spoilt):
    path = spoilt / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert any("is not the file of its manifest" in problem for problem in problems(spoilt))


def test_verification_finds_a_changed_card(spoilt):
    card = spoilt / CARD_NAME
    card.write_text(card.read_text().replace("0.", "1."))
    assert all("is not the manifest's card" in problem for problem in problems(spoilt))


def test_verification_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match="holds no vision model"):
        evaluate.check_root(tmp_path)


def test_export_before_training_says_what_to_do(tmp_path):
    with pytest.raises(ConfigurationError, match="train first"):
        export.export(export.ExportConfig(runs=tmp_path))


def test_spread_by_hand():
    assert spread([0.9, 0.94, 0.95]) == {"mean": pytest.approx(0.93), "min": 0.9, "max": 0.95, "runs": 3.0}


def test_command_names_what_differs_from_the_defaults_and_nothing_of_the_machine():
    config = train.TrainConfig(seed=2, learning_rate=1e-4, runs=Path("/somewhere/else"))
    assert config.command == "python -m services.vision.training.train --mode finetune --seed 2 --learning-rate 0.0001"


def test_size_grows_in_the_last_epochs():
    config = train.TrainConfig(epochs=5, train_size=128, final_epochs=2)
    assert [config.size_at(epoch) for epoch in range(5)] == [128, 128, 128, 224, 224]


def test_batch_norm_keeps_its_statistics_when_frozen():
    model = MODELS.get("efficientnet-lite0")(5, False)
    train.freeze_batch_norm(model)
    before = model.stem.bn.running_mean.clone()
    model(torch.randn(2, 3, 32, 32))
    assert torch.equal(model.stem.bn.running_mean, before)
    assert model.dropout.training


@pytest.mark.parametrize("verb", ["train", "prune", "evaluate", "export"])
def test_help_explains_every_option(verb):
    command = [sys.executable, "-m", f"services.vision.training.{verb}", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True).stdout
    option = {"train": "--label-smoothing", "prune": "--pruning.share", "evaluate": "--confusion", "export": "--pruned"}
    words = {"train": "distort the features", "prune": "Whole channels", "evaluate": "measured", "export": "gate"}
    assert option[verb] in shown
    assert words[verb] in " ".join(shown.split())


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.parent.name)
class TestShipped:
    def test_files_and_cards_are_the_manifests(self, folder):
        manifest = read_manifest(folder)
        assert (folder / CARD_NAME).read_text() == render_card(manifest)
        assert (ROOT / "services" / "vision" / "cards" / f"{manifest.name}.md").read_text() == render_card(manifest)
        for variant in manifest.variants.values():
            evaluate.verify_variant(folder, variant)

    def test_manifest_names_no_path_of_a_machine(self, folder):
        text = (folder / "manifest.json").read_text()
        assert not any(prefix in text for prefix in ("/work", "/home", "/root", "/tmp"))

    def test_int8_is_within_its_budget_and_faster(self, folder):
        fp32, int8 = (read_manifest(folder).variants[name] for name in ("fp32", "int8"))
        assert fp32.metrics["accuracy"] - int8.metrics["accuracy"] <= 0.01
        assert int8.metrics["agreement"] >= 0.97
        assert fp32.metrics["latency_p50_ms"] / int8.metrics["latency_p50_ms"] >= 1.7
        assert int8.bytes < 0.3 * fp32.bytes

    @pytest.mark.data
    def test_accuracy_is_what_the_manifest_says(self, folder):
        try:
            locate("flowers", download=False)
        except ConfigurationError as error:
            pytest.skip(error.message)
        test = data.load_photos("test")
        few = test.take(150)
        manifest = read_manifest(folder)
        config = ClassificationPreprocessing.from_dict(manifest.preprocessing)
        for variant in manifest.variants.values():
            predict = evaluate.onnx_predictor(evaluate.open_session(folder / variant.file))
            accuracy = evaluate.classify(predict, few.tensors(config), few.labels).accuracy
            # 150 of the 605 photos, drawn without looking: three standard errors of a share near 0.93
            assert abs(accuracy - variant.metrics["accuracy"]) < 3 * (0.93 * 0.07 / 150) ** 0.5
