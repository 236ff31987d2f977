"""Tensors between the Open Inference Protocol and numpy; raw contents are viewed, not copied.

Raw BYTES elements carry a 4-byte little-endian length each, as Triton defines it. BF16 has no numpy type: its bits
travel as uint16, and the manifest's `bfloat16` says what they are.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
from inference import open_inference_grpc_pb2 as pb

from shared.errors import InvalidInput
from shared.serving.bfloat16 import storage_dtype
from shared.serving.session import Array

_DTYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "BF16": "bfloat16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",
}
_DATATYPES = {dtype: datatype for datatype, dtype in _DTYPES.items()}
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_MAX_RANK = 16


def datatype_of(dtype: str) -> str:
    """The protocol's name of a numpy dtype name: `float32` -> `FP32`."""
    return _DATATYPES.get(dtype, dtype.upper())


def dtype_name_of(datatype: str) -> str:
    """The manifest's name of a protocol datatype: `FP32` -> `float32`; an unknown one in small letters."""
    return _DTYPES.get(datatype, datatype.lower())


def dtype_of(datatype: str, field: str) -> np.dtype[np.generic]:
    """The numpy dtype of a protocol datatype.

    Raises:
        InvalidInput: unknown datatype.
    """
    if datatype not in _DTYPES:
        raise InvalidInput(f"{field}.datatype", f"is `{datatype}`, expected one of {', '.join(_DTYPES)}")
    return storage_dtype(_DTYPES[datatype])


def element_count(shape: Sequence[int], field: str) -> int:
    """Number of elements of a shape.

    Raises:
        InvalidInput: a negative dimension or too many of them.
    """
    if len(shape) > _MAX_RANK or any(size < 0 for size in shape):
        raise InvalidInput(
            f"{field}.shape", f"is {list(shape)[:_MAX_RANK]}, expected up to {_MAX_RANK} sizes of 0 or more"
        )
    return math.prod(shape)


def from_raw(data: bytes, datatype: str, shape: Sequence[int], field: str, tensor: str = "the tensor") -> Array:
    """A view of row-major bytes as an array of `shape`.

    Raises:
        InvalidInput: the bytes do not fill the shape exactly; the message names the tensor.
    """
    dtype = dtype_of(datatype, field)
    count = element_count(shape, field)
    if dtype == np.object_:
        return _from_length_prefixed(data, count, field, tensor).reshape(tuple(shape))
    if len(data) != count * dtype.itemsize:
        raise InvalidInput(
            field,
            f"{tensor} has {len(data)} raw bytes, "
            f"expected {count * dtype.itemsize} for shape {list(shape)} of {datatype}",
        )
    return np.frombuffer(data, dtype=dtype).reshape(tuple(shape))


def _from_length_prefixed(data: bytes, count: int, field: str, tensor: str) -> Array:
    elements: list[bytes] = []
    position = 0
    while position + 4 <= len(data) and len(elements) <= count:
        (length,) = struct.unpack_from("<I", data, position)
        position += 4
        if position + length > len(data):
            break
        elements.append(data[position : position + length])
        position += length
    if position != len(data) or len(elements) != count:
        raise InvalidInput(
            field, f"the raw bytes of {tensor} are not {count} elements with a 4-byte little-endian length each"
        )
    array = np.empty(count, dtype=object)
    array[:] = elements
    return array


def from_contents(
    contents: pb.InferTensorContents, datatype: str, shape: Sequence[int], field: str, tensor: str = "the tensor"
) -> Array:
    """An array from the typed contents of a tensor.

    Raises:
        InvalidInput: FP16 or BF16, which must be raw; a value outside its type; a wrong number of values.
    """
    dtype = dtype_of(datatype, field)
    if datatype not in _CONTENTS:
        raise InvalidInput(f"{field}.contents", f"cannot hold {datatype}; send it in raw_input_contents")
    values = getattr(contents, _CONTENTS[datatype])
    count = element_count(shape, field)
    if len(values) != count:
        raise InvalidInput(
            f"{field}.contents.{_CONTENTS[datatype]}",
            f"{tensor} has {len(values)} values, expected {count} for shape {list(shape)} of {datatype}",
        )
    if dtype == np.object_:
        array = np.empty(count, dtype=object)
        array[:] = list(values)
        return array.reshape(tuple(shape))
    wide = np.array(values)
    if dtype.kind in "iu" and count:
        limits = np.iinfo(dtype.name)
        if wide.min() < limits.min or wide.max() > limits.max:
            raise InvalidInput(f"{field}.contents", f"has a value outside {datatype}, {limits.min} to {limits.max}")
    return wide.astype(dtype, copy=False).reshape(tuple(shape))


def decode_text(array: Array, field: str, tensor: str) -> Array:
    """BYTES as the text that ONNX Runtime takes.

    Raises:
        InvalidInput: bytes that are no UTF-8, which an ONNX string tensor cannot hold.
    """
    decoded = np.empty(array.size, dtype=object)
    try:
        decoded[:] = [item.decode() for item in array.ravel()]
    except UnicodeDecodeError as error:
        raise InvalidInput(field, f"{tensor} has an element that is not UTF-8, as the graph's strings are") from error
    return decoded.reshape(array.shape)


def to_contents(array: Array, datatype: str, field: str) -> pb.InferTensorContents:
    """The typed contents of an array.

    Raises:
        InvalidInput: FP16 and BF16 have none.
    """
    if datatype not in _CONTENTS:
        raise InvalidInput(field, f"typed contents cannot hold {datatype}; leave it out to get raw contents")
    values = array.ravel().tolist()
    if array.dtype == np.object_:
        values = [item if isinstance(item, bytes) else str(item).encode() for item in values]
    contents = pb.InferTensorContents()
    getattr(contents, _CONTENTS[datatype]).extend(values)
    return contents


def to_raw(array: Array) -> bytes:
    """Row-major bytes of an array."""
    if array.dtype == np.object_:
        encoded = (item if isinstance(item, bytes) else str(item).encode() for item in array.ravel())
        return b"".join(struct.pack("<I", len(item)) + item for item in encoded)
    return array.tobytes()
