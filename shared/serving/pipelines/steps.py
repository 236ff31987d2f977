"""Runs one step: in a model of this process like any other call, or at another server.

A step here takes a place in its model's queue and shares its batches with everybody; its tensors are not copied. The
variant is leased only while the step runs, so that a pipeline holds no model in memory.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import grpc.aio
from inference import open_inference_grpc_pb2 as pb

from shared.errors import InvalidInput, ModelUnavailable, Unreachable, UsagiError
from shared.serving.batching import BatchResult
from shared.serving.inference_requests import graph_failure
from shared.serving.pipelines.checking import PlannedStep
from shared.serving.pipelines.upstreams import Upstreams, call_headers
from shared.serving.session import Array
from shared.serving.tensors import datatype_of, from_contents, from_raw, to_raw

if TYPE_CHECKING:
    from shared.serving.models import Models

Tensors = dict[str, Array]


class StepCaller:
    """Runs the steps of all pipelines of a process.

    Args:
        upstreams: the other servers.
    """

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams
        self.models: Models | None = None

    async def call(self, step: PlannedStep, feeds: Tensors, deadline: float, path: tuple[str, ...]) -> BatchResult:
        """The step's outputs for `feeds`.

        Args:
            step: what to run.
            feeds: its model's inputs by name.
            deadline: time.monotonic() after which the answer is worthless.
            path: the pipelines that this call came through.

        Raises:
            UsagiError: the model cannot answer.
        """
        if step.definition.upstream:
            return await self._ask(step, feeds, deadline, path)
        return await self._run(step, feeds, deadline)

    async def _run(self, step: PlannedStep, feeds: Tensors, deadline: float) -> BatchResult:
        definition = step.definition
        assert self.models is not None
        async with self.models.acquire(definition.model, definition.version, definition.variant) as served:
            if (served.manifest.inputs, served.manifest.outputs) != (step.model.inputs, step.model.outputs):
                raise Unreachable("the model has changed; the pipeline will be checked against it in a moment")
            with served.batcher.admit():
                try:
                    return await served.batcher.submit(feeds, deadline)
                except Exception as error:
                    raise graph_failure(error) or error from error

    async def _ask(self, step: PlannedStep, feeds: Tensors, deadline: float, path: tuple[str, ...]) -> BatchResult:
        definition = step.definition
        request = pb.ModelInferRequest(model_name=definition.model, model_version=definition.version)
        if definition.variant:
            request.parameters["variant"].string_param = definition.variant
        for spec in step.model.inputs:
            array = feeds[spec.name]
            request.inputs.add(name=spec.name, datatype=datatype_of(spec.dtype), shape=array.shape)
            request.raw_input_contents.append(to_raw(array))
        for spec in step.model.outputs:
            request.outputs.add(name=spec.name)
        remaining = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        started = time.perf_counter()
        try:
            response = await self._upstreams.stub(definition.upstream).ModelInfer(
                request, timeout=remaining, metadata=call_headers(definition, path)
            )
        except grpc.aio.AioRpcError as error:
            raise self._upstreams.failure(error, definition) from error
        seconds = time.perf_counter() - started
        cached = response.parameters["cached"].bool_param if "cached" in response.parameters else False
        return BatchResult(_outputs(response, step), _batch_size(response), 0.0, seconds, cached=cached)


def _batch_size(response: pb.ModelInferResponse) -> int:
    """What a server of ours says; others say nothing."""
    return response.parameters["batch_size"].int64_param if "batch_size" in response.parameters else 0


def _outputs(response: pb.ModelInferResponse, step: PlannedStep) -> Tensors:
    """The answer's tensors, views of its bytes.

    Raises:
        ModelUnavailable: it is not what the model's metadata says.
    """
    wanted = {spec.name: datatype_of(spec.dtype) for spec in step.model.outputs}
    outputs: Tensors = {}
    raw = response.raw_output_contents
    try:
        if raw and len(raw) != len(response.outputs):
            raise InvalidInput("raw_output_contents", f"has {len(raw)} entries for {len(response.outputs)} outputs")
        for index, tensor in enumerate(response.outputs):
            if wanted.get(tensor.name) != tensor.datatype:
                raise InvalidInput("outputs", f"has `{tensor.name}` of {tensor.datatype}, which its metadata does not")
            field = f"outputs[{index}]"
            if raw:
                outputs[tensor.name] = from_raw(raw[index], tensor.datatype, tensor.shape, field, tensor.name)
            else:
                outputs[tensor.name] = from_contents(tensor.contents, tensor.datatype, tensor.shape, field, tensor.name)
    except InvalidInput as error:
        raise ModelUnavailable(
            f"upstream {step.definition.upstream} answers what it should not: {error.message}"
        ) from error
    missing = [name for name in wanted if name not in outputs]
    if missing:
        raise ModelUnavailable(f"upstream {step.definition.upstream} leaves out the output `{missing[0]}`")
    return outputs


def named(error: Exception, pipeline: str, step: PlannedStep) -> Exception:
    """The same error, telling the step; what is no UsagiError stays as it is.

    A model that vanished is not what the caller asked for, so NOT_FOUND becomes FAILED_PRECONDITION.
    """
    if not isinstance(error, UsagiError):
        return error
    definition = step.definition
    prefix = f"{definition.shown}: "
    metadata = {"pipeline": pipeline, "step": definition.name, "model": definition.model, **error.metadata}
    if error.code == "NOT_FOUND":
        return ModelUnavailable(prefix + error.message, metadata=metadata)
    if isinstance(error, InvalidInput):
        refused = InvalidInput(error.field, prefix + error.description, reason=error.reason)
        refused.metadata.update(metadata)
        return refused
    told = error.__class__.__new__(error.__class__)
    told.__dict__.update(error.__dict__)
    told.message, told.metadata, told.args = prefix + error.message, metadata, (prefix + error.message,)
    return told
