"""`<root>/<service>/<pipeline>/<version>/pipeline.toml`: a chain of models as a file.

    description = "flowers by int8; where it is not sure, by fp32"

    [[steps]]
    name = "fast"
    model = "flowers-efficientnet-lite0"
    variant = "int8"
    inputs = { image = "image" }               # the model's input = what it gets; may be left out if the names agree

    [[steps]]
    name = "exact"
    model = "flowers-efficientnet-lite0"       # version = "2", upstream = "nlp" name another version, another server
    variant = "fp32"
    when = "max(softmax(fast.logits)) < 0.9"   # runs for the items for which this holds

    [outputs]
    logits = ["exact.logits", "fast.logits"]   # of each item the first that it has

A step runs for an item when all that it names is there for that item and `when` holds. What comes from a step that did
not run is not there, so nothing behind it runs either: that is the early exit.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.artifacts import ArtifactError
from shared.serving.pipelines.expressions import Condition, Expression, Reference, parse_condition, parse_expression

MAX_STEPS = 32
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_KEYS = ("description", "task", "steps", "outputs")
_STEP_KEYS = ("name", "model", "version", "variant", "upstream", "inputs", "when")


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from: of each item the first alternative that it has; a number is always there."""

    alternatives: tuple[Expression | float, ...]

    def references(self) -> Iterator[Reference]:
        """What it names."""
        for alternative in self.alternatives:
            if isinstance(alternative, Expression):
                yield alternative.reference


@dataclass(frozen=True)
class StepDefinition:
    """One step; an empty `upstream` means a model of this process. without `inputs` those of the model's names."""

    name: str
    model: str
    version: str = ""
    variant: str = ""
    upstream: str = ""
    inputs: Mapping[str, Source] | None = None
    when: Condition | None = None

    @property
    def shown(self) -> str:
        """For messages."""
        return f"step `{self.name}` (model {self.model}{f' of {self.upstream}' if self.upstream else ''})"


@dataclass(frozen=True)
class PipelineDefinition:
    """A pipeline as its file says it."""

    steps: tuple[StepDefinition, ...]
    outputs: Mapping[str, Source]
    description: str = ""
    task: str = ""
    origin: Path = field(default_factory=Path)


def read_definition(path: Path, content: bytes | None = None) -> PipelineDefinition:
    """Reads a `pipeline.toml`.

    Args:
        path: of the file.
        content: of the file, if it was read already.

    Raises:
        ArtifactError: unreadable, or with keys, values or names that mean nothing.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8") if content is None else content.decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    try:
        return _definition(raw, path)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error.message}") from error


def _definition(raw: Mapping[str, Any], path: Path) -> PipelineDefinition:
    _only(raw, _KEYS, "the file")
    listed = raw.get("steps")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_STEPS:
        raise ArtifactError(f"expected 1 to {MAX_STEPS} steps, each in a table [[steps]]")
    steps: list[StepDefinition] = []
    for entry in listed:
        step = _step(entry, len(steps))
        if any(step.name == other.name for other in steps):
            raise ArtifactError(f"two steps are called `{step.name}`")
        for reference in _references(step):
            _known(reference, steps, step.shown)
        steps.append(step)
    outputs = _sources(raw.get("outputs"), "[outputs]")
    for name, source in outputs.items():
        for reference in source.references():
            _known(reference, steps, f"output `{name}`")
    return PipelineDefinition(
        tuple(steps), outputs, _text(raw, "description", "the file"), _text(raw, "task", "the file"), path
    )


def _step(raw: Any, index: int) -> StepDefinition:
    place = f"steps[{index}]"
    if not isinstance(raw, Mapping):
        raise ArtifactError(f"{place} is no table")
    _only(raw, _STEP_KEYS, place)
    name = _text(raw, "name", place)
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"{place}.name is `{name}`, expected letters, digits, `_` and `-`")
    place = f"step `{name}`"
    model, version = _text(raw, "model", place), str(raw.get("version", ""))
    if not model:
        raise ArtifactError(f"{place} names no model")
    if version and not (version.isascii() and version.isdigit()):
        raise ArtifactError(f"{place}: version is `{version}`, expected a whole number, or none for the newest")
    condition = _text(raw, "when", place)
    return StepDefinition(
        name=name,
        model=model,
        version=version,
        variant=_text(raw, "variant", place),
        upstream=_text(raw, "upstream", place),
        inputs=_sources(raw["inputs"], f"{place}: inputs") if "inputs" in raw else None,
        when=parse_condition(condition) if condition else None,
    )


def _sources(raw: Any, place: str) -> dict[str, Source]:
    if not isinstance(raw, Mapping) or not raw:
        raise ArtifactError(f"{place} is empty, expected name = source")
    return {name: _source(value, f"{place}.{name}") for name, value in raw.items()}


def _source(raw: Any, place: str) -> Source:
    listed = raw if isinstance(raw, list) else [raw]
    alternatives: list[Expression | float] = []
    for value in listed:
        if isinstance(value, str):
            alternatives.append(parse_expression(value))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            alternatives.append(float(value))
        else:
            raise ArtifactError(f"{place} has {value!r}, expected a source as text, a number, or a list of them")
    if not alternatives or isinstance(alternatives[0], float):
        raise ArtifactError(f"{place} names no tensor")
    if any(isinstance(value, float) for value in alternatives[:-1]):
        raise ArtifactError(f"{place}: a number is always there, so it can only be the last")
    return Source(tuple(alternatives))


def _references(step: StepDefinition) -> Iterator[Reference]:
    for source in (step.inputs or {}).values():
        yield from source.references()
    if step.when is not None:
        yield step.when.expression.reference


def _known(reference: Reference, steps: list[StepDefinition], place: str) -> None:
    if reference.step and all(reference.step != step.name for step in steps):
        names = ", ".join(step.name for step in steps) or "none"
        raise ArtifactError(f"{place}: `{reference}` names no step before it; steps before it: {names}")


def _only(raw: Mapping[str, Any], keys: tuple[str, ...], place: str) -> None:
    unknown = sorted(set(raw) - set(keys))
    if unknown:
        raise ArtifactError(f"`{unknown[0]}` in {place} means nothing here, expected {', '.join(keys)}")


def _text(raw: Mapping[str, Any], key: str, place: str) -> str:
    value = raw.get(key, "")
    if not isinstance(value, str):
        raise ArtifactError(f"{key} of {place} is {value!r}, expected text")
    return value
