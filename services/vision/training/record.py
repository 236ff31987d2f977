"""What a manifest says about measurements and training, gathered from the runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from services.vision.training.tasks import Task
from services.vision.training.train import RunResult
from shared.artifacts import TrainingRecord, Variant, sha256_of
from shared.data.catalog import DATASETS
from shared.training.latency import Latency
from shared.training.machine import cpu_name, spread
from shared.training.metrics import Classification, agreement


def describe_variant(
    path: Path,
    file: str,
    test: Classification,
    val: Classification,
    reference: Classification,
    latency: Latency,
    extra: dict[str, float],
) -> Variant:
    """A variant's entry in the manifest; `reference` is the fp32 model on the test part."""
    return Variant(
        file=file,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        metrics={
            "accuracy": test.accuracy,
            "accuracy_val": val.accuracy,
            "cross_entropy": test.cross_entropy,
            "agreement": agreement(test, reference),
            "test_photos": float(len(test.labels)),
            "latency_p50_ms": round(latency.p50_ms, 3),
            "latency_p95_ms": round(latency.p95_ms, 3),
            "throughput_per_second": round(latency.throughput[latency.max_batch], 2),
            **extra,
        },
        max_batch=latency.max_batch,
    )


def training_record(
    result: RunResult, task: Task, runs: Path, test: Classification, further_commands: list[str]
) -> TrainingRecord:
    """How the shipped run came to be, with the other runs beside it as baselines and spread."""
    others = [r for r in finished_runs(runs) if r.test_photos == result.test_photos]
    of_mode = {"accuracy": result.mode, "accuracy_pruned": "pruned"}
    accuracies = {name: [r.accuracy for r in others if r.mode == mode] for name, mode in of_mode.items()}
    dataset = DATASETS[task.dataset]
    return TrainingRecord(
        command=" && ".join([result.command, *further_commands]),
        seed=result.seed,
        data=f"{dataset.description}; {dataset.source_url}; {task.division}",
        data_licence=dataset.licence,
        device=cpu_name(),
        wall_seconds=result.wall_seconds,
        baselines={"majority_class": majority_share(test), **_means(others, exclude=result.mode)},
        spread={name: spread(values) for name, values in accuracies.items() if values},
    )


def finished_runs(folder: Path) -> list[RunResult]:
    """All runs of a model that have a result."""
    paths = sorted(folder.glob("*/result.json"))
    return [RunResult(**json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def majority_share(test: Classification) -> float:
    """Accuracy of always answering the most frequent class of the test part: the floor."""
    return float(np.bincount(test.labels).max() / len(test.labels))


def _means(runs: list[RunResult], *, exclude: str) -> dict[str, float]:
    modes = sorted({run.mode for run in runs} - {exclude, "pruned"}, reverse=True)
    return {mode: float(np.mean([run.accuracy for run in runs if run.mode == mode])) for mode in modes}
