"""One ONNX Runtime session: how every graph of every service is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime

from shared.serving import bfloat16
from shared.serving.onnx_files import read_data_files
from shared.serving.providers import CPU, check_providers

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

CPU_PROVIDERS = (CPU,)

onnxruntime.disable_telemetry_events()


class Session(Protocol):
    """Anything that runs a batch; the batcher knows no more than this."""

    def run(self, feeds: Arrays) -> dict[str, Array]:
        """Runs one batch; every array has the batch as its first dimension."""


class OnnxSession:
    """An ONNX graph in memory. `run` is thread-safe; `only_computes` says that it never waits for anything.

    `inputs` and `outputs` have ONNX Runtime's `name`, `type` and `shape`.

    Spinning is off, since a spinning thread burns the quota of the container; threads are set explicitly, since ONNX
    Runtime counts the host's cores.

    Args:
        graph: path of the graph, or its bytes.
        threads: intra-op threads; 1 is best under load, where the pool runs several batches at once.
        providers: ONNX Runtime execution providers in order of preference; `providers` of the session are those that it
            has, of which the first runs every operator that it knows.

    Raises:
        ProviderUnavailable: see check_providers.
    """

    def __init__(self, graph: Path | bytes, *, threads: int = 1, providers: Sequence[str] = CPU_PROVIDERS) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.log_severity_level = 3
        source = graph if isinstance(graph, bytes) else str(graph)
        if isinstance(graph, Path) and (files := read_data_files(graph)):
            # by itself ONNX Runtime maps them: whoever writes to such a file would change or end a running model
            sizes = [len(content) for content in files.values()]
            options.add_external_initializers_from_files_in_memory(list(files), list(files.values()), sizes)
        self._session = onnxruntime.InferenceSession(source, options, providers=list(providers), enable_fallback=0)
        self.providers: list[str] = self._session.get_providers()
        check_providers(providers, self.providers)
        self.only_computes = self.providers == list(CPU_PROVIDERS)
        self.inputs, self.outputs = self._session.get_inputs(), self._session.get_outputs()
        self.output_names: list[str] = [output.name for output in self.outputs]
        self._has_bfloat16 = bfloat16.occurs_in(self._session)

    def run(self, feeds: Arrays) -> dict[str, Array]:
        """Runs the graph on `feeds`, by input name; returns all outputs by name. bfloat16 goes in and out as uint16."""
        if self._has_bfloat16:
            return bfloat16.run(self._session, feeds)
        return dict(zip(self.output_names, self._session.run(self.output_names, dict(feeds)), strict=True))


def zeros_for(shapes: Mapping[str, tuple[str, tuple[int, ...]]], batch: int) -> dict[str, Array]:
    """Zero inputs to warm a graph with: a free first dimension is `batch`, other free dimensions are 1.

    Args:
        shapes: input name -> (numpy dtype name, shape with -1 for free dimensions).
        batch: number of items.
    """
    return {
        name: np.zeros(
            tuple(size if size >= 0 else 1 if axis else batch for axis, size in enumerate(shape)),
            dtype=bfloat16.storage_dtype(dtype),
        )
        for name, (dtype, shape) in shapes.items()
    }
