"""A plain ONNX file as a model version: the manifest that nobody wrote, made from the graph and from trying it.

Names, types and shapes come from the graph. Whether requests may share a run does not: a first dimension with a name
says only that it varies. So made-up requests are run alone and together, and only if each gives the same both ways
is the model batched. What cannot be tried is not batched.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from shared.artifacts import ArtifactError, Manifest, TensorSpec, Variant, sha256_of
from shared.serving.bfloat16 import storage_dtype
from shared.serving.memory import private_bytes
from shared.serving.onnx_files import read_onnx_file
from shared.serving.session import Array, OnnxSession

VARIANT = "onnx"
"""Name of the only variant."""
TASK = "plain-onnx"
TRITON_CONFIG = "config.pbtxt"
FREE_SIZES = (16, 32, 64, 224, 1)
"""Sizes that free dimensions behind the first are tried with, all the same, until the graph runs."""
BATCHES = (1, 2, 4, 8, 16, 32)
PROBED_ROWS = 3
WITHIN = 0.97
"""`max_batch` is the smallest that reaches this share of the best throughput, as for trained models."""
TRIAL_SECONDS, TRIAL_BYTES = 1.5, 64_000_000
"""What measuring may take, of time and of memory; the run that exceeds one of them is the last."""
MADE_UP_BYTES = 16_000_000
"""What all made-up requests may take together; a graph whose single request takes more is not tried."""
SAME = {"float16": 1e-2, "bfloat16": 5e-2}
"""Difference between alone and together that is rounding, as a share of the output's range; else 1e-4."""
_TYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "string": "object",
    "bool": "bool",
    **{name: name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}
Requests = dict[str, Array]


@dataclass(frozen=True)
class PlainModel:
    """What was made of a plain ONNX file.

    `free_size` is the size of free dimensions that the graph runs with, None if it never ran. `notice` says how the
    manifest came about.
    """

    manifest: Manifest
    free_size: int | None
    notice: str

    def requests(self, rows: int) -> Requests | None:
        """Made-up requests that the graph runs on; None if there are none."""
        return None if self.free_size is None else made_up(self.manifest.inputs, rows, self.free_size)


@dataclass(frozen=True)
class _Trial:
    """What trying showed; `against` says why requests must not share a run, empty if they may."""

    against: str
    outputs: tuple[TensorSpec, ...]
    free_size: int | None = None
    max_batch: int = 1
    latency_ms: float | None = None


def describe_plain(path: Path, service: str, name: str, version: int, watched: Collection[str] = ()) -> PlainModel:
    """Makes a manifest for the graph at `path`; loads and tries it, which takes seconds.

    Args:
        path: the graph.
        service: of the manifest, as `name` and `version`.
        name: of the model.
        version: of the model.
        watched: names of the files whose change is noticed; the graph's weights must be among them.

    Raises:
        ArtifactError: the file is no whole ONNX graph, or not one that tensors can go through.
    """
    file = read_onnx_file(path)
    for data_file in file.data_files:
        if not (path.parent / data_file).is_file():
            raise ArtifactError(f"{path} has weights in `{data_file}`, which is missing; copy it beside the graph")
        if watched and data_file not in watched:
            raise ArtifactError(
                f"{path} has weights in `{data_file}`, expected a name like {path.name}.data; put both files into a "
                f"folder of their own, as {name}/model.onnx and {name}/{PurePosixPath(data_file).name}"
            )
    try:
        session = OnnxSession(path)
        digest, size = sha256_of(path), path.stat().st_size
    except ArtifactError:
        raise
    except Exception as error:  # ONNX Runtime raises a class of its own for every kind of fault
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error
    inputs = tuple(_spec(tensor, "input", path) for tensor in session.inputs)
    outputs = tuple(_spec(tensor, "output", path) for tensor in session.outputs)
    trial = _try(session, inputs, outputs)
    metrics = {} if trial.latency_ms is None else {"latency_p50_ms": trial.latency_ms}
    variant = Variant(path.name, digest, size, metrics, max_batch=trial.max_batch)
    manifest = Manifest(
        service=service,
        name=name,
        version=version,
        task=TASK,
        description=f"plain ONNX file {path.name}, without a manifest",
        inputs=inputs,
        outputs=trial.outputs,
        variants={VARIANT: variant},
        opset=file.opset,
        batched=not trial.against,
    )
    return PlainModel(manifest, trial.free_size, _notice(path, trial))


def _notice(path: Path, trial: _Trial) -> str:
    verdict = f"batched up to {trial.max_batch}" if trial.max_batch > 1 else "a batch gains nothing, each runs alone"
    if trial.against:
        verdict = f"not batched, since {trial.against}"
    ignored = [f"{TRITON_CONFIG} is not read"] if _has_triton_config(path) else []
    return "; ".join([f"no manifest.json: inferred from {path.name}, {verdict}", *ignored])


def _has_triton_config(path: Path) -> bool:
    return any((folder / TRITON_CONFIG).exists() for folder in (path.parent, path.parent.parent))


def _spec(tensor: Any, role: str, path: Path) -> TensorSpec:
    kind = tensor.type.removeprefix("tensor(").removesuffix(")")
    if not tensor.type.startswith("tensor(") or kind not in _TYPES:
        hint = "; sklearn-onnx: convert with options={'zipmap': False}" if tensor.type.startswith("seq(map") else ""
        raise ArtifactError(
            f"{path}: {role} `{tensor.name}` is a {tensor.type}, expected a tensor of {', '.join(_TYPES)}{hint}"
        )
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in tensor.shape)
    return TensorSpec(tensor.name, _TYPES[kind], shape)


def _try(session: OnnxSession, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> _Trial:
    free = any(-1 in spec.shape[1:] for spec in inputs)
    problem = ""
    for size in FREE_SIZES if free else FREE_SIZES[-1:]:
        row_bytes = sum(_row_bytes(spec, size) for spec in inputs)
        if row_bytes > MADE_UP_BYTES:
            problem = problem or f"one takes {row_bytes} bytes"
            continue
        rows = min(BATCHES[-1], MADE_UP_BYTES // max(1, row_bytes)) if _varying(inputs) == len(inputs) > 0 else 1
        requests = made_up(inputs, rows, size)
        try:
            alone = [session.run(_rows(requests, inputs, row, row + 1)) for row in range(min(rows, PROBED_ROWS))]
        except Exception as error:  # see describe_plain
            problem = problem or _brief(error)
            continue
        outputs = tuple(_ranked(spec, alone[0][spec.name]) for spec in outputs)
        against = _unvarying(inputs, outputs) or ("its requests are too large to try several" if rows == 1 else "")
        together = _Together(session, inputs, outputs, requests, alone)
        against = against or together.unlike(min(rows, PROBED_ROWS))
        rates, against = _throughputs(together, [1] if against else [size for size in BATCHES if size <= rows], against)
        enough = WITHIN * max(rates.values())
        max_batch = 1 if against else min(batch for batch, rate in rates.items() if rate >= enough)
        return _Trial(against, outputs, size, max_batch, round(1000 / rates[1], 4))
    shapeless = [spec.name for spec in inputs if spec.shape == ()]
    if shapeless:
        raise ArtifactError(f"input `{shapeless[0]}` has no shape, and no scalar will do; export the graph with shapes")
    return _Trial(f"it did not run on made-up requests ({problem}), so it is not warm either", outputs)


def _row_bytes(spec: TensorSpec, size: int) -> int:
    inner = [known if known >= 0 else size for known in (spec.shape[1:] if spec.shape[:1] == (-1,) else spec.shape)]
    return math.prod(inner) * storage_dtype(spec.dtype).itemsize


def _varying(specs: tuple[TensorSpec, ...]) -> int:
    return sum(spec.shape[:1] == (-1,) for spec in specs)


def _unvarying(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> str:
    if not inputs or not outputs:
        return "it has no inputs" if outputs else "it has no outputs"
    fixed = [spec.name for spec in (*inputs, *outputs) if spec.shape[:1] != (-1,)]
    return f"the first dimension of `{fixed[0]}` does not vary" if fixed else ""


def _ranked(spec: TensorSpec, array: Array) -> TensorSpec:
    """ONNX Runtime shows an output of unknown rank like a scalar; what came out tells them apart."""
    return spec if len(spec.shape) == array.ndim else TensorSpec(spec.name, spec.dtype, (-1,) * array.ndim)


def made_up(inputs: tuple[TensorSpec, ...], rows: int, free_size: int) -> Requests:
    """Requests of `rows` rows each unlike the others: normal floats, 0 and 1 for whole numbers (small vocabularies)."""
    draws = np.random.default_rng(0)
    made: Requests = {}
    for spec in inputs:
        sizes = [size if size >= 0 else free_size for size in spec.shape]
        if spec.shape[:1] == (-1,):
            sizes[0] = rows
        dtype = np.dtype("float32") if spec.dtype == "bfloat16" else storage_dtype(spec.dtype)
        if dtype == np.object_:
            values: Array = draws.integers(0, 10, sizes).astype(str).astype(object)
        elif dtype.kind == "f":
            values = draws.standard_normal(sizes).astype(dtype)
        else:
            values = draws.integers(0, 2, sizes).astype(dtype)
            if spec.shape[:1] == (-1,):  # a single number a row: neighbours differ
                values.reshape(rows, -1)[:, :1] = (np.arange(rows) % 2).astype(dtype)[:, None]
        if spec.dtype == "bfloat16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        made[spec.name] = values
    return made


def _rows(requests: Requests, inputs: tuple[TensorSpec, ...], start: int, stop: int) -> Requests:
    varying = {spec.name for spec in inputs if spec.shape[:1] == (-1,)}
    return {name: array[start:stop] if name in varying else array for name, array in requests.items()}


@dataclass(frozen=True)
class _Together:
    """Made-up requests, and what the first of them gave alone."""

    session: OnnxSession
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    requests: Requests
    alone: list[Requests]

    def run(self, count: int) -> Requests:
        """The first `count` in one run."""
        return self.session.run(_rows(self.requests, self.inputs, 0, count))

    def unlike(self, count: int) -> str:
        """How the first `count` in one run answer otherwise than alone; empty if they do not."""
        try:
            answers = self.run(count)
        except Exception as error:  # see describe_plain
            return f"it does not run on {count} rows ({_brief(error)})"
        for spec in self.outputs:
            if answers[spec.name].shape[:1] != (count,):
                return f"`{spec.name}` has {list(answers[spec.name].shape)} for {count} rows"
            for row, answer in enumerate(self.alone[:count]):
                if not _same(answers[spec.name][row], answer[spec.name], spec.dtype):
                    return f"`{spec.name}` of a request changes with the others in its batch"
        return ""


def _same(together: Array, alone: Array, dtype: str) -> bool:
    if alone.shape[:1] != (1,) or alone.shape[1:] != together.shape:
        return False
    if dtype in ("object", "bool") or (alone.dtype.kind in "iu" and dtype != "bfloat16"):
        return bool(np.array_equal(together, alone[0]))
    first, second = _floats(together, dtype), _floats(alone[0], dtype)
    scale = float(np.max(np.abs(second), initial=0.0, where=np.isfinite(second)))
    return np.allclose(first, second, rtol=0.0, atol=SAME.get(dtype, 1e-4) * scale, equal_nan=True)


def _floats(array: Array, dtype: str) -> Array:
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array.astype(np.float64)


def _throughputs(together: _Together, batches: list[int], against: str) -> tuple[dict[int, float], str]:
    """Batch -> rows a second for growing batches, as long as there is time and room, and what speaks against them."""
    began, before = time.perf_counter(), private_bytes()
    rates: dict[int, float] = {}
    for batch in batches:
        if batch > 1:
            against = together.unlike(batch)  # and warms it up
        if against and batch > 1:
            break
        seconds: list[float] = []
        while len(seconds) < 7 and (not seconds or time.perf_counter() - began < TRIAL_SECONDS):
            started = time.perf_counter()
            together.run(batch)
            seconds.append(time.perf_counter() - started)
        rates[batch] = batch / statistics.median(seconds)
        if time.perf_counter() - began >= TRIAL_SECONDS or private_bytes() - before >= TRIAL_BYTES:
            break
    return rates, against


def _brief(error: Exception) -> str:
    return " ".join(str(error).rpartition("Status Message:")[2].split())[:200]
