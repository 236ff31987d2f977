"""Whether a pipeline fits together: every name, type and shape, before the first call. What fits becomes a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shared.artifacts import ArtifactError, Manifest, TensorSpec
from shared.serving.pipelines.definition import PipelineDefinition, Source, StepDefinition
from shared.serving.pipelines.expressions import Expression, Reference
from shared.serving.tensors import datatype_of

TASK = "pipeline"


@dataclass(frozen=True)
class StepModel:
    """What is known of the model behind a step; `manifest` only of a model of this process."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    manifest: Manifest | None = None


@dataclass(frozen=True)
class PlannedSource:
    """A source with the type and shape of what it gives."""

    source: Source
    spec: TensorSpec


@dataclass(frozen=True)
class PlannedStep:
    """A step with its model; `after` holds the indices of the steps that it names."""

    definition: StepDefinition
    model: StepModel
    inputs: Mapping[str, PlannedSource]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A pipeline that fits together; `manifest` describes it as a model."""

    steps: tuple[PlannedStep, ...]
    outputs: Mapping[str, PlannedSource]
    manifest: Manifest
    linear: bool
    """Each step names the one before it, so that none can run beside another."""


def make_plan(
    service: str, name: str, version: int, definition: PipelineDefinition, models: Mapping[str, StepModel]
) -> Plan:
    """Checks a definition against its models, by step.

    Raises:
        ArtifactError: a tensor that a model lacks, a type or shape that does not fit, an output that may be missing.
    """
    return _Check(definition, models).plan(service, name, version)


class _Check:
    def __init__(self, definition: PipelineDefinition, models: Mapping[str, StepModel]) -> None:
        self._definition, self._models = definition, models
        self._order = {step.name: index for index, step in enumerate(definition.steps)}
        self._inputs: dict[str, TensorSpec] = {}
        self._certain: dict[str, bool] = {}

    def plan(self, service: str, name: str, version: int) -> Plan:
        definition = self._definition
        wired = {step.name: self._wiring(step) for step in definition.steps}
        for step in definition.steps:
            self._find_inputs(step, wired[step.name])
        steps = tuple(self._step(step, wired[step.name]) for step in definition.steps)
        outputs = {output: self._output(output, source) for output, source in definition.outputs.items()}
        inputs = tuple(self._inputs.values())
        if not inputs:
            raise ArtifactError("no step takes an input of the pipeline; name one, such as `image`")
        manifest = Manifest(
            service=service,
            name=name,
            version=version,
            task=definition.task or self._agreed("task", self._answering()) or TASK,
            description=definition.description,
            inputs=inputs,
            outputs=tuple(replace(planned.spec, name=output) for output, planned in outputs.items()),
            variants={},
            labels=self._agreed("labels", self._answering()) or (),
            preprocessing=self._agreed("preprocessing", self._taking(wired)) or {},
            batched=all(model.manifest.batchable for model in self._models.values() if model.manifest),
        )
        if not manifest.batchable and any(step.when for step in definition.steps):
            raise ArtifactError("`when` decides for each item, so every tensor's first dimension must be the batch")
        linear = all(index - 1 in step.after for index, step in enumerate(steps) if index)
        return Plan(steps, outputs, manifest, linear)

    def _wiring(self, step: StepDefinition) -> Mapping[str, Source]:
        specs = self._models[step.name].inputs
        known = [spec.name for spec in specs]
        if step.inputs is None:
            return {name: Source((Expression(Reference("", name)),)) for name in known}
        unknown = [name for name in step.inputs if name not in known]
        if unknown:
            raise ArtifactError(f"{step.shown} has no input `{unknown[0]}`; it has {', '.join(known)}")
        missing = [name for name in known if name not in step.inputs]
        if missing:
            raise ArtifactError(f"{step.shown} gets nothing for its input `{missing[0]}`")
        return step.inputs

    def _find_inputs(self, step: StepDefinition, wiring: Mapping[str, Source]) -> None:
        """The pipeline's own inputs have the types of the models' inputs that they feed."""
        for spec in self._models[step.name].inputs:
            for alternative in wiring[spec.name].alternatives:
                if isinstance(alternative, float) or alternative.reference.step or alternative.functions:
                    continue
                name = alternative.reference.tensor
                own = replace(spec, name=name)
                try:
                    self._inputs[name] = _merged([self._inputs.get(name, own), own], narrow=True)
                except ArtifactError as error:
                    raise ArtifactError(f"{step.shown}: input `{name}` of the pipeline {error.message}") from error

    def _spec(self, reference: Reference, place: str) -> TensorSpec:
        if not reference.step:
            if reference.tensor not in self._inputs:
                raise ArtifactError(
                    f"{place}: the type of the pipeline's input `{reference.tensor}` is not known, "
                    "since it feeds no model's input as it is"
                )
            return self._inputs[reference.tensor]
        outputs = {spec.name: spec for spec in self._models[reference.step].outputs}
        if reference.tensor not in outputs:
            shown = self._definition.steps[self._order[reference.step]].shown
            raise ArtifactError(f"{place}: {shown} has no output `{reference.tensor}`; it has {', '.join(outputs)}")
        return replace(outputs[reference.tensor], name=str(reference))

    def _planned(self, source: Source, place: str) -> PlannedSource:
        try:
            specs = [
                alternative.spec(self._spec(alternative.reference, place))
                for alternative in source.alternatives
                if isinstance(alternative, Expression)
            ]
            spec = _merged(specs)
        except ArtifactError as error:
            shown = error.message if error.message.startswith(place) else f"{place}: {error.message}"
            raise ArtifactError(shown) from error
        if isinstance(source.alternatives[-1], float) and (
            spec.shape[:1] != (-1,) or -1 in spec.shape[1:] or spec.dtype in ("object", "bfloat16")
        ):
            raise ArtifactError(f"{place}: a number cannot stand in for {_shown(spec)}, whose size varies")
        return PlannedSource(source, spec)

    def _step(self, step: StepDefinition, wiring: Mapping[str, Source]) -> PlannedStep:
        inputs = {}
        for spec in self._models[step.name].inputs:
            planned = self._planned(wiring[spec.name], f"{step.shown}: input `{spec.name}`")
            if not _fits(planned.spec, spec):
                raise ArtifactError(
                    f"{step.shown}: input `{spec.name}` is {_shown(spec)}, gets {planned.spec.name}: "
                    f"{_shown(planned.spec)}"
                )
            inputs[spec.name] = planned
        references = [reference for source in wiring.values() for reference in source.references()]
        if step.when is not None:
            expression = step.when.expression
            references.append(expression.reference)
            spec = expression.spec(self._spec(expression.reference, f"{step.shown}: when"))
            if spec.shape[:1] != (-1,) or any(size != 1 for size in spec.shape[1:]) or spec.dtype == "object":
                raise ArtifactError(
                    f"{step.shown}: when compares {spec.name}, {_shown(spec)}, with a number; "
                    "expected one number an item, such as max(...)"
                )
        self._certain[step.name] = step.when is None and all(map(self._is_certain, wiring.values()))
        after = sorted({self._order[reference.step] for reference in references if reference.step})
        return PlannedStep(step, self._models[step.name], inputs, tuple(after))

    def _is_certain(self, source: Source) -> bool:
        """Whether every item has it."""
        return any(
            isinstance(alternative, float)
            or not alternative.reference.step
            or self._certain[alternative.reference.step]
            for alternative in source.alternatives
        )

    def _output(self, name: str, source: Source) -> PlannedSource:
        if not self._is_certain(source):
            raise ArtifactError(
                f"output `{name}` may be missing for an item, since what it names need not run; "
                "end it with a step that always runs, or with a number"
            )
        return self._planned(source, f"output `{name}`")

    def _answering(self) -> set[str]:
        """Steps whose outputs are outputs of the pipeline as they are."""
        return {
            alternative.reference.step
            for source in self._definition.outputs.values()
            for alternative in source.alternatives
            if isinstance(alternative, Expression) and alternative.reference.step and not alternative.functions
        }

    def _taking(self, wired: Mapping[str, Mapping[str, Source]]) -> set[str]:
        """Steps that take an input of the pipeline as it is."""
        return {
            step
            for step, wiring in wired.items()
            for source in wiring.values()
            for alternative in source.alternatives
            if isinstance(alternative, Expression) and not alternative.reference.step and not alternative.functions
        }

    def _agreed(self, name: str, steps: Iterable[str]) -> Any:
        """What the manifests of those steps say alike; None where they differ or one is not here."""
        manifests = [self._models[step].manifest for step in steps]
        values = [getattr(manifest, name, None) for manifest in manifests]
        return values[0] if values and all(value == values[0] for value in values) else None


def _merged(specs: Sequence[TensorSpec], *, narrow: bool = False) -> TensorSpec:
    """One spec for several: with `narrow` the strictest of what varies, else the loosest."""
    merged = specs[0]
    for spec in specs[1:]:
        if not _fits(merged, spec):
            raise ArtifactError(f"is {_shown(merged)} in one place and {_shown(spec)} in another")
        shape = tuple(
            (max(a, b) if narrow else -1) if a != b else a for a, b in zip(merged.shape, spec.shape, strict=True)
        )
        merged = replace(merged, shape=shape)
    return merged


def _fits(given: TensorSpec, wanted: TensorSpec) -> bool:
    return (
        given.dtype == wanted.dtype
        and len(given.shape) == len(wanted.shape)
        and all(a == b or -1 in (a, b) for a, b in zip(given.shape, wanted.shape, strict=True))
    )


def _shown(spec: TensorSpec) -> str:
    return f"{datatype_of(spec.dtype)} {list(spec.shape)}"
