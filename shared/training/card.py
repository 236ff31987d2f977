"""The model card, written from the manifest by program, so that its numbers cannot differ from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from shared.artifacts import CARD_NAME, Manifest, TrainingRecord, Variant
from shared.measures import Measure, measure_named


def render_card(manifest: Manifest) -> str:
    """The card of a model version as Markdown (after Mitchell et al. 2019)."""
    sections = [
        f"# {manifest.name}, version {manifest.version}",
        "Written from `manifest.json` by `shared.training.card`; a test compares the two. Do not edit.",
        manifest.description,
        "## Interface",
        _interface(manifest),
        "## Variants",
        _variants(manifest),
    ]
    if manifest.training:
        sections += ["## Training", _training(manifest.training)]
    if manifest.training and manifest.training.baselines:
        sections += ["## Against baselines", _baselines(manifest)]
    return "\n\n".join(sections) + "\n"


def card_problem(folder: Path, manifest: Manifest, cards: Path) -> str:
    """Why the card beside a manifest, or of a bundled model the one in its service's `cards`, is not the manifest's."""
    expected = render_card(manifest)
    paths = [folder / CARD_NAME]
    if folder.resolve().is_relative_to(Path("deploy/models").resolve()):
        paths.append(cards / f"{manifest.name}.md")
    for path in paths:
        if not path.exists() or path.read_text(encoding="utf-8") != expected:
            return f"{path} is not the manifest's card; export again"
    return ""


def _interface(manifest: Manifest) -> str:
    lines = [f"- Task: {manifest.task}; service `{manifest.service}`; ONNX opset {manifest.opset}."]
    for kind, specs in (("Input", manifest.inputs), ("Output", manifest.outputs)):
        lines += [f"- {kind} `{spec.name}`: {spec.dtype} {list(spec.shape)} (-1 is the batch)." for spec in specs]
    if manifest.labels:
        lines.append(f"- Labels, in order: {', '.join(manifest.labels)}.")
    if manifest.preprocessing:
        parameters = ", ".join(f"{name} {_parameter(value)}" for name, value in manifest.preprocessing.items())
        lines.append(f"- Preprocessing: {parameters}.")
    return "\n".join(lines)


def _parameter(value: object) -> str:
    """The value; as code where blanks or signs would not be seen or would be taken for Markdown."""
    text = str(value)
    return text if not isinstance(value, str) or re.fullmatch(r"[\w.-]+", text) else f"`{text!r}`"


def _variants(manifest: Manifest) -> str:
    names = list(manifest.variants)
    rows = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---|" + "---:|" * len(names)]
    rows.append(_row("file", [f"`{manifest.variants[name].file}`" for name in names]))
    rows.append(_row("size (MB)", [f"{manifest.variants[name].bytes / 1e6:.2f}" for name in names]))
    measures = dict.fromkeys(measure for name in names for measure in manifest.variants[name].metrics)
    for measure in measures:
        rows.append(_row(measure.replace("_", " "), [_number(manifest.variants[name], measure) for name in names]))
    rows.append(_row("largest useful batch", [str(manifest.variants[name].max_batch) for name in names]))
    rows.append(
        _row("within its accuracy budget", ["yes" if manifest.variants[n].within_budget else "no" for n in names])
    )
    note = f"`auto` means `{manifest.auto_variant()}`. Latencies are milliseconds at batch 1 on one thread of "
    device = manifest.training.device if manifest.training else "the training machine"
    return "\n".join(rows) + f"\n\n{note}{device}."


def _row(title: str, cells: list[str]) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"


def _number(variant: Variant, measure: str) -> str:
    value = variant.metrics.get(measure)
    if value is None:
        return ""
    return f"{value:.0f}" if value == round(value) and abs(value) > 1 else f"{value:.4g}"


def _training(record: TrainingRecord) -> str:
    return "\n".join(
        [
            f"- Data: {record.data}",
            f"- Licence of the data: {record.data_licence}",
            f"- Command: `{record.command}`",
            f"- Seed {record.seed}; {record.wall_seconds:.0f} s on {record.device}.",
        ]
    )


def _baselines(manifest: Manifest) -> str:
    record, measure = manifest.training, measure_named(manifest.measure)
    assert record is not None
    rows = [f"| | {measure.name} |", "|---|---:|"]
    rows += [f"| {name.replace('_', ' ')} | {measure.text(value)} |" for name, value in record.baselines.items()]
    rows += [
        f"| **this model**, {name} | {measure.text(variant.metrics[measure.name])} |"
        for name, variant in manifest.variants.items()
        if measure.name in variant.metrics
    ]
    for name, spread in record.spread.items():
        rows.append(f"| {name} over the seeds: mean (min to max) | {_spread(spread, measure)} |")
    return "\n".join(rows)


def _spread(spread: Mapping[str, float], measure: Measure) -> str:
    mean, least, most = (measure.text(spread[name]) for name in ("mean", "min", "max"))
    return f"{mean} ({least} to {most})"
