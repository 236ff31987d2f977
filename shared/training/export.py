"""From a PyTorch model to one ONNX file, with proof that both answer the same.

The exporter is PyTorch's graph capture (`dynamo=True`). It specialises silently on example sizes of 0 and 1, so the
example has a batch of 2, and the result is refused unless its batch dimension is symbolic and named `batch`.
"""

from __future__ import annotations

import copy
import io
import itertools
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from shared.artifacts import TensorSpec
from shared.errors import ConfigurationError
from shared.training.metrics import Predict

PARITY_BATCHES = (1, 2, 5)
PARITY_TOLERANCE = 1e-4
"""On logits of order 10: a hundred times the rounding of float32 over some fifty layers, far below a wrong layer."""
MAX_BYTES = 16 * 1024 * 1024
"""A bundled file lies in Git; larger ones belong in a model store."""


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose convolutions have swallowed the BatchNorm that follows them inside a `Sequential`."""
    folded = copy.deepcopy(model).eval()
    for parent in [module for module in folded.modules() if isinstance(module, nn.Sequential)]:
        names = list(parent._modules)
        for name, following in itertools.pairwise(names):
            convolution, norm = parent._modules[name], parent._modules[following]
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                parent._modules[name] = fuse_conv_bn_eval(convolution, norm)
                parent._modules[following] = nn.Identity()
    return folded


def export_onnx(
    model: nn.Module, example: Tensor, path: Path, *, input_name: str, output_name: str, max_bytes: int = MAX_BYTES
) -> None:
    """Exports a model of one input and one output whose first dimension is the batch.

    Args:
        model: exported in eval mode with BatchNorm folded; left as it is.
        example: `[2, ...]` input; its batch must be 2 or more.
        path: file to write.
        input_name: name of the graph's input.
        output_name: name of the graph's output.
        max_bytes: largest file allowed; only what is never bundled may be larger.

    Raises:
        ConfigurationError: the example's batch is below 2, or the exported batch dimension is not symbolic.
    """
    if example.shape[0] < 2:
        raise ConfigurationError(
            f"example has batch {example.shape[0]}, expected 2 or more; the exporter specialises on 1"
        )
    folded = fold_batch_norm(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    batch = torch.export.Dim("batch", min=1)
    export_graph(
        folded,
        (example.contiguous(),),
        ({0: batch},),
        path,
        input_names=[input_name],
        output_names=[output_name],
        max_bytes=max_bytes,
    )


def export_graph(
    model: nn.Module,
    examples: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    path: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    max_bytes: int = MAX_BYTES,
) -> None:
    """Exports a model of any number of inputs and outputs; the first dimension of all is the batch.

    Args:
        model: in eval mode.
        examples: arguments of its forward, tensors or lists of tensors; free dimensions must be 2 or more in them.
        dynamic_shapes: the free dimensions of each argument, as torch.export takes them.
        path: file to write.
        input_names: of the tensors in the order of the arguments.
        output_names: of the tensors in the order of the results.
        max_bytes: largest file allowed; only what is never bundled may be larger.

    Raises:
        ConfigurationError: the exported batch dimension is not symbolic, or the file is too large.
    """
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")  # deprecations inside the exporter, none of which a caller can mend
        torch.onnx.export(
            model,
            examples,
            str(path),
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=list(input_names),
            output_names=list(output_names),
            external_data=False,
            verbose=False,
        )
    _finish(path, max_bytes)


def tensor_specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """A graph's inputs or outputs as the manifest has them."""
    return tuple(
        TensorSpec(
            value.name,
            np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)).name,
            tuple(-1 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim),
        )
        for value in values
    )


def _finish(path: Path, max_bytes: int) -> None:
    """Names the batch dimension, drops the exporter's traces (paths of this machine), checks the graph."""
    graph = onnx.load(str(path))
    for tensor in (*graph.graph.input, *graph.graph.output):
        dimension = tensor.type.tensor_type.shape.dim[0]
        if not dimension.dim_param:
            raise ConfigurationError(f"{tensor.name} was exported with a fixed batch of {dimension.dim_value}")
        dimension.dim_param = "batch"
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.graph.value_info[:]
    del graph.graph.metadata_props[:]
    graph.doc_string = graph.graph.doc_string = ""
    onnx.checker.check_model(graph, full_check=True)
    onnx.save(graph, str(path))
    if path.stat().st_size > max_bytes:
        raise ConfigurationError(f"{path.name} has {path.stat().st_size} bytes, at most {max_bytes} may be bundled")


class _quiet:  # noqa: N801 - reads as a verb at its one place of use
    """Silences loggers below ERROR for a while."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(name) for name in names]
        self.levels = [logger.level for logger in self.loggers]

    def __enter__(self) -> None:
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self.loggers, self.levels, strict=True):
            logger.setLevel(level)


def open_session(path: Path, *, threads: int = 1) -> ort.InferenceSession:
    """A CPU session with `threads` threads that do not spin while they wait, as in serving."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_predictor(session: ort.InferenceSession) -> Predict:
    """`predict` of an ONNX model of one input and one output."""
    name = session.get_inputs()[0].name

    def predict(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(session.run(None, {name: batch})[0], np.float32)

    return predict


def opset_of(path: Path) -> int:
    """Version of the standard operators that a file uses."""
    return next(entry.version for entry in onnx.load(str(path)).opset_import if entry.domain in ("", "ai.onnx"))


def check_parity(
    reference: Predict, exported: Predict, inputs: NDArray[np.float32], batches: Sequence[int] = PARITY_BATCHES
) -> float:
    """Largest absolute difference of the outputs over several batch sizes.

    Raises:
        ConfigurationError: above `PARITY_TOLERANCE`; the export is wrong.
    """
    worst = 0.0
    for batch in batches:
        difference = float(np.abs(reference(inputs[:batch]) - exported(inputs[:batch])).max())
        if not difference <= PARITY_TOLERANCE:
            raise ConfigurationError(
                f"the exported model differs from PyTorch by {difference:.2e} at batch {batch}, "
                f"expected at most {PARITY_TOLERANCE:.0e}; compare the layers one by one"
            )
        worst = max(worst, difference)
    return worst
