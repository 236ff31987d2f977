"""What an ONNX file says of itself without being loaded: its operator set, and the files that its weights lie in.

Serving does not install `onnx`, and ONNX Runtime does not tell either. So this walks the message by its lengths, past
the weights without reading them. https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shared.artifacts import ArtifactError

# Message -> field -> the message in it: the ways from a model to its tensors, and to what is read of them.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "opset", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 64
_PIECE_BYTES = 4096


@dataclass(frozen=True)
class OnnxFile:
    """`opset`: of the default domain, 0 if it names none; `data_files`: as the graph names them, relative to it."""

    opset: int
    data_files: tuple[str, ...]


class _Pieces:
    """A file's bytes by position, read in pieces; a mapped file would end the process when somebody cuts it off."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._start, self._piece = 0, b""
        self.size = os.fstat(descriptor).st_size

    def byte(self, position: int) -> int:
        """One byte; IndexError if the file became shorter."""
        offset = position - self._start
        if not 0 <= offset < len(self._piece):
            self._start, self._piece, offset = position, os.pread(self._descriptor, _PIECE_BYTES, position), 0
        return self._piece[offset]

    def read(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`."""
        return os.pread(self._descriptor, end - begin, begin)


def read_onnx_file(path: Path) -> OnnxFile:
    """Reads what the file says of itself.

    Raises:
        ArtifactError: it cannot be read, is no whole ONNX message, or names a data file outside its folder.
    """
    try:
        with path.open("rb", buffering=0) as file:
            opset, locations = _walk_model(_Pieces(file.fileno()))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{path} is no whole ONNX file: {error}; copy or export it again") from error
    for location in locations:
        pure = PurePosixPath(location)
        if not location or pure.is_absolute() or ".." in pure.parts:
            raise ArtifactError(f"{path} has weights in `{location}`, expected a file beside it; export it again")
    return OnnxFile(opset, tuple(locations))


def read_data_files(path: Path) -> dict[str, bytes]:
    """The contents of a graph's data files by the names that it gives them; empty when all weights are inside.

    Raises:
        ArtifactError: as `read_onnx_file`, or a data file is missing.
    """
    contents: dict[str, bytes] = {}
    for name in read_onnx_file(path).data_files:
        try:
            contents[name] = (path.parent / name).read_bytes()
        except OSError as error:
            raise ArtifactError(
                f"{path} has weights in `{name}`, which cannot be read: {error.strerror}; copy it beside the graph"
            ) from error
    return contents


def _walk_model(data: _Pieces) -> tuple[int, list[str]]:
    opset, locations, has_graph = 0, dict[str, None](), False
    for kind, start, stop in _messages(data, 0, data.size, "model", 0):
        has_graph = has_graph or kind == "graph"
        if kind == "opset":
            opset = _default_opset(data, start, stop) or opset
        elif kind == "entry":
            key, value = _entry(data, start, stop)
            if key == b"location":
                locations[value.decode()] = None
    if not has_graph:
        raise ValueError("it has no graph")
    return opset, list(locations)


def _messages(data: _Pieces, start: int, stop: int, kind: str, depth: int) -> Iterator[tuple[str, int, int]]:
    """All messages that `_FIELDS` leads to below one, depth first: kind, begin, end."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"graphs more than {_MAX_DEPTH} deep")
    inner = _FIELDS[kind]
    for number, wire, begin, end in _fields(data, start, stop):
        below = inner.get(number) if wire == _BYTES else None
        if below is not None:
            yield below, begin, end
            if below in _FIELDS:
                yield from _messages(data, begin, end, below, depth + 1)


def _fields(data: _Pieces, position: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Field number, wire type, begin and end of each field's value."""
    while position < stop:
        key, position = _varint(data, position, stop)
        wire = key & 7
        if wire == _VARINT:
            end = _varint(data, position, stop)[1]
        elif wire == _BYTES:
            length, position = _varint(data, position, stop)
            end = position + length
        elif wire in (_FIXED64, _FIXED32):
            end = position + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError(f"unknown wire type {wire}")
        if end > stop:
            raise ValueError("it is cut off")
        yield key >> 3, wire, position, end
        position = end


def _varint(data: _Pieces, position: int, stop: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= stop:
            raise ValueError("it is cut off")
        byte = data.byte(position)
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than 10 bytes")


def _entry(data: _Pieces, start: int, stop: int) -> tuple[bytes, bytes]:
    parts = {number: data.read(begin, end) for number, wire, begin, end in _fields(data, start, stop) if wire == _BYTES}
    return parts.get(1, b""), parts.get(2, b"")


def _default_opset(data: _Pieces, start: int, stop: int) -> int:
    domain, version = b"", 0
    for number, wire, begin, end in _fields(data, start, stop):
        if number == 1 and wire == _BYTES:
            domain = data.read(begin, end)
        elif number == 2 and wire == _VARINT:
            version = _varint(data, begin, end)[0]
    return version if domain in (b"", b"ai.onnx") else 0
