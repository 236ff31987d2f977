"""What Triton's part of the protocol tells about models: configuration, statistics, the repository's index."""

from __future__ import annotations

from typing import Any

from inference import model_config_pb2 as config_pb
from inference import open_inference_grpc_pb2 as pb

from shared.artifacts import Manifest, TensorSpec
from shared.serving.pipelines.registry import PipelineVersion
from shared.serving.repository import ModelVersion, State
from shared.serving.statistics import ComputeDurations, Duration, ModelStatistics
from shared.serving.tensors import datatype_of

PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
ENSEMBLE = "ensemble"


def answers(entry: ModelVersion) -> bool:
    """Whether a request to the version is answered: it is in memory, or loads on first use."""
    return entry.state in (State.READY, State.AVAILABLE)


def index_entry(entry: ModelVersion) -> pb.RepositoryIndexResponse.ModelIndex:
    """A version in the repository's index; what does not answer says why."""
    return pb.RepositoryIndexResponse.ModelIndex(
        name=entry.name,
        version=str(entry.version),
        state="READY" if answers(entry) else "UNAVAILABLE",
        reason=entry.reason,
    )


def platform_of(entry: ModelVersion) -> str:
    """Triton's name for what runs the model."""
    return ENSEMBLE if isinstance(entry, PipelineVersion) else PLATFORM


def model_config(entry: ModelVersion, manifest: Manifest, threads: int) -> config_pb.ModelConfig:
    """A model's configuration in Triton's words, as far as it has a meaning here; `max_batch_size` 0: not batched."""
    if isinstance(entry, PipelineVersion):
        return _pipeline_config(entry, manifest)
    variant = manifest.variants[manifest.auto_variant()]
    batched = manifest.batchable
    config = config_pb.ModelConfig(
        name=manifest.name,
        platform=PLATFORM,
        backend=BACKEND,
        max_batch_size=variant.max_batch if batched else 0,
        default_model_filename=variant.file,
        input=[
            config_pb.ModelInput(name=spec.name, data_type=_data_type(spec), dims=spec.shape[int(batched) :])
            for spec in manifest.inputs
        ],
        output=[
            config_pb.ModelOutput(name=spec.name, data_type=_data_type(spec), dims=spec.shape[int(batched) :])
            for spec in manifest.outputs
        ],
    )
    if entry.cache is not None:
        config.response_cache.enable = True
    config.version_policy.all.SetInParent()
    config.instance_group.add(name=manifest.name, count=threads, kind=config_pb.ModelInstanceGroup.KIND_CPU)
    config.model_transaction_policy.decoupled = False
    if batched:
        config.dynamic_batching.max_queue_delay_microseconds = 0
    return config


def _pipeline_config(entry: PipelineVersion, manifest: Manifest) -> config_pb.ModelConfig:
    """A pipeline as an ensemble; conditions and alternatives have no place in one and are left out."""
    config = config_pb.ModelConfig(name=manifest.name, platform=ENSEMBLE)
    for spec in manifest.inputs:
        config.input.add(name=spec.name, data_type=_data_type(spec), dims=spec.shape)
    for spec in manifest.outputs:
        config.output.add(name=spec.name, data_type=_data_type(spec), dims=spec.shape)
    for step in entry.plan.steps if entry.plan else ():
        definition = step.definition
        config.ensemble_scheduling.step.add(
            model_name=definition.model,
            model_version=int(definition.version or -1),
            model_namespace=definition.upstream,
            input_map={name: planned.spec.name for name, planned in step.inputs.items()},
            output_map={spec.name: f"{definition.name}.{spec.name}" for spec in step.model.outputs},
        )
    return config


def _data_type(spec: TensorSpec) -> Any:
    name = datatype_of(spec.dtype)
    return config_pb.DataType.Value("TYPE_STRING" if name == "BYTES" else f"TYPE_{name}")


def model_statistics(entry: ModelVersion, statistics: ModelStatistics) -> pb.ModelStatistics:
    """A version's statistics as a message."""
    compute = statistics.compute
    return pb.ModelStatistics(
        name=entry.name,
        version=str(entry.version),
        last_inference=statistics.last_inference_ms,
        inference_count=statistics.inferences,
        execution_count=statistics.executions,
        inference_stats=pb.InferStatistics(
            success=_duration(statistics.success),
            fail=_duration(statistics.fail),
            queue=_duration(statistics.queue),
            compute_input=_duration(compute.input),
            compute_infer=_duration(compute.infer),
            compute_output=_duration(compute.output),
            cache_hit=_duration(statistics.cache_hit),
            cache_miss=_duration(statistics.cache_miss),
        ),
        batch_stats=[_batch(size, durations) for size, durations in sorted(statistics.by_batch_size.items())],
    )


def _batch(size: int, durations: ComputeDurations) -> pb.InferBatchStatistics:
    return pb.InferBatchStatistics(
        batch_size=size,
        compute_input=_duration(durations.input),
        compute_infer=_duration(durations.infer),
        compute_output=_duration(durations.output),
    )


def _duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)
