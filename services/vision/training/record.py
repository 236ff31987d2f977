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
    result: RunResult,
    task: Task,
    runs: Path,
    test: Classification,
    further_commands: list[str],
    pruned: RunResult | None = None,
    earlier: TrainingRecord | None = None,
) -> TrainingRecord:
    """How the shipped run, and the pruned one if that ships too, came to be.

    Beside them stand other modes as baselines, and the spread over runs that differ in the seed alone. What an
    `earlier` record says of runs of the published network stays, since that network stays.
    """
    others = [r for r in finished_runs(runs) if r.test_photos == result.test_photos]
    shipped = {"accuracy": result, **({"accuracy_pruned": pruned} if pruned else {})}
    accuracies = {name: [r.accuracy for r in others if _recipe(r) == _recipe(run)] for name, run in shipped.items()}
    dataset = DATASETS[task.dataset]
    baselines = {"majority_class": majority_share(test), **_means(others, exclude=result.mode)}
    spreads = {name: spread(values) for name, values in accuracies.items() if len(values) > 1}
    return TrainingRecord(
        command=" && ".join([result.command, *further_commands]),
        seed=result.seed,
        data=f"{dataset.description}; {dataset.source_url}; {task.division}",
        data_licence=dataset.licence,
        device=earlier.device if earlier else cpu_name(),
        wall_seconds=earlier.wall_seconds if earlier else result.wall_seconds,
        baselines=baselines | (dict(earlier.baselines) if earlier else {}),
        spread=spreads | (dict(earlier.spread) if earlier else {}),
    )


def _recipe(run: RunResult) -> str:
    """A run's command without its seed."""
    return run.command.replace(f"--seed {run.seed}", "")


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
