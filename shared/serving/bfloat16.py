"""bfloat16 in and out of ONNX Runtime, which has no numpy type for it: its bits go as uint16.

Only graphs with such an input or output take this way; it copies their bfloat16 outputs once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Array = npt.NDArray[Any]

GRAPH_TYPE = "tensor(bfloat16)"
_ONNX_TYPE = 16
"""onnx.TensorProto.BFLOAT16; serving does not install `onnx`."""


def storage_dtype(dtype: str) -> np.dtype[np.generic]:
    """The numpy dtype that holds a manifest's dtype: uint16 for the bits of `bfloat16`, else the one of that name."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def occurs_in(session: Any) -> bool:
    """Whether an input or output of an onnxruntime.InferenceSession is bfloat16."""
    return any(tensor.type == GRAPH_TYPE for tensor in (*session.get_inputs(), *session.get_outputs()))


def run(session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Runs the graph; bfloat16 inputs and outputs are uint16 arrays of the same shape."""
    types = {tensor.name: tensor.type for tensor in session.get_inputs()}
    values = {name: _to_value(array, types.get(name, "")) for name, array in feeds.items()}
    names = [tensor.name for tensor in session.get_outputs()]
    return dict(zip(names, map(_from_value, session.run_with_ort_values(names, values)), strict=True))


def _to_value(array: Array, graph_type: str) -> Any:
    if graph_type == GRAPH_TYPE:
        contiguous = np.ascontiguousarray(array)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(contiguous, _ONNX_TYPE)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _from_value(value: Any) -> Array:
    if value.data_type() != GRAPH_TYPE:
        array: Array = value.numpy()
        return array
    bits = np.empty(value.shape(), np.uint16)
    ctypes.memmove(bits.ctypes.data, value.data_ptr(), bits.nbytes)
    return bits
