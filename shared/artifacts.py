"""The manifest: the one contract between training, which writes it, and serving, which reads and verifies it.

A model version is a folder `<root>/<service>/<model>/<version>/` with one ONNX file per variant, `manifest.json` and
`card.md`. It is published whole or not at all: written to a temporary folder beside it, manifest last, synced, and then
put in place by one rename. A reader that sees a manifest therefore sees everything that it names, and a full disk
leaves what was there before.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UsagiError

MANIFEST_NAME = "manifest.json"
CARD_NAME = "card.md"
FORMAT = 1
"""Version of the manifest's own format."""


class ArtifactError(UsagiError):
    """A model version on disk is incomplete, corrupt or not understood."""

    code = "FAILED_PRECONDITION"
    reason = "MODEL_CORRUPT"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; `shape` has -1 for a dimension that varies, `dtype` is numpy's name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """One set of weights with what was measured on it.

    `metrics` holds the task's own measure (`accuracy`, share from 0 to 1), latencies in milliseconds
    (`latency_p50_ms`, `latency_p95_ms`: batch 1, one thread) and whatever else training measured. `max_batch` is the
    smallest batch within 3% of the best throughput. `within_budget` says whether `auto` may choose the variant.
    """

    file: str
    sha256: str
    bytes: int
    metrics: Mapping[str, float]
    max_batch: int = 8
    within_budget: bool = True


@dataclass(frozen=True)
class Asset:
    """A file that all variants of a version need besides their graph, such as a vocabulary."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class TrainingRecord:
    """How the model came to be: enough to make it again."""

    command: str
    seed: int
    data: str
    data_licence: str
    device: str
    wall_seconds: float
    baselines: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Measure -> {mean, min, max} over the RNG seeds, where it was reproduced."""


@dataclass(frozen=True)
class Manifest:
    """What a model version is.

    `preprocessing` holds the parameters of the service's own preprocess module. `batched` is false for a graph whose
    requests must run alone. `measure` names the variants' metric that is the task's own; `assets` are files by name.
    """

    service: str
    name: str
    version: int
    task: str
    description: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: Mapping[str, Variant]
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    opset: int = 0
    training: TrainingRecord | None = None
    format: int = FORMAT
    batched: bool = True
    measure: str = "accuracy"
    assets: Mapping[str, Asset] = field(default_factory=dict)

    @property
    def batchable(self) -> bool:
        """Whether requests may share a run: every tensor's first dimension varies, and nothing says otherwise."""
        return self.batched and all(spec.shape[:1] == (-1,) for spec in (*self.inputs, *self.outputs))

    def auto_variant(self) -> str:
        """Name of the variant that `auto` means: the fastest within its accuracy budget at batch 1.

        Raises:
            ArtifactError: no variant is within its budget.
        """
        return self.variants_by_preference()[0]

    def variants_by_preference(self) -> list[str]:
        """All variants, those within budget first, the fastest of them first."""
        names = sorted(
            self.variants,
            key=lambda name: (
                not self.variants[name].within_budget,
                self.variants[name].metrics.get("latency_p50_ms", float("inf")),
                name,
            ),
        )
        if not names:
            raise ArtifactError(f"{self.name} version {self.version} has no variants; publish it again")
        return names

    def to_json(self) -> str:
        """The manifest as JSON, keys in the order of the fields."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def parse_manifest(text: str, *, origin: str = "manifest") -> Manifest:
    """Reads a manifest from JSON.

    Raises:
        ArtifactError: not JSON, a missing field, or a newer format than this code knows.
    """
    try:
        raw = json.loads(text)
        if raw.get("format", FORMAT) != FORMAT:
            raise ArtifactError(f"{origin} has format {raw['format']}, this version reads {FORMAT}; upgrade Usagi")
        training = raw.get("training")
        return Manifest(
            **{
                **raw,
                "inputs": tuple(_tensor_spec(spec) for spec in raw["inputs"]),
                "outputs": tuple(_tensor_spec(spec) for spec in raw["outputs"]),
                "variants": {name: Variant(**variant) for name, variant in raw["variants"].items()},
                "labels": tuple(raw.get("labels", ())),
                "assets": {name: Asset(**asset) for name, asset in raw.get("assets", {}).items()},
                "training": TrainingRecord(**training) if training else None,
            }
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{origin} cannot be read: {error!r}; publish the model version again") from error


def _tensor_spec(raw: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(name=raw["name"], dtype=raw["dtype"], shape=tuple(raw["shape"]))


def read_manifest(folder: Path, content: bytes | None = None) -> Manifest:
    """Reads `folder/manifest.json` and checks that the folder is where the manifest says it belongs.

    Args:
        folder: of the version.
        content: of the manifest, if it was read already.

    Raises:
        ArtifactError: missing, unreadable, or lying under another name or version than its own.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8") if content is None else content.decode()
        manifest = parse_manifest(text, origin=str(path))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder} has no {MANIFEST_NAME}: half published? publish the model version again"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    if (manifest.name, str(manifest.version)) != (folder.parent.name, folder.name):
        raise ArtifactError(
            f"{path} says {manifest.name} version {manifest.version}, but lies in {folder.parent.name}/{folder.name}; "
            "move or republish it"
        )
    return manifest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(folder: Path, variant: Variant) -> Path:
    """Checks that a variant's file is there with its size, at the cost of a look into the folder; returns its path.

    Raises:
        ArtifactError: missing, or of another size than the manifest says.
    """
    path = folder / variant.file
    if Path(variant.file).name != variant.file:
        raise ArtifactError(f"{folder}: variant file `{variant.file}` must be a plain name inside the version's folder")
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}; publish the model version again") from error
    if size != variant.bytes:
        raise ArtifactError(
            f"{path} is not the file of its manifest: it has {size} bytes, expected {variant.bytes}; "
            "publish the model version again"
        )
    return path


def verify_variant(folder: Path, variant: Variant) -> Path:
    """Checks size and SHA-256 of a variant's file and returns its path.

    Raises:
        ArtifactError: missing, or not the file that the manifest was written for.
    """
    path = check_size(folder, variant)
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}; publish the model version again") from error
    _check_digest(path, digest, variant)
    return path


def read_verified(folder: Path, variant: Variant) -> bytes:
    """A variant's file, read once: what was checked is what is returned, whatever becomes of the file.

    Raises:
        ArtifactError: as verify_variant.
    """
    path = check_size(folder, variant)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}; publish the model version again") from error
    _check_digest(path, hashlib.sha256(content).hexdigest(), variant)
    return content


def _check_digest(path: Path, digest: str, variant: Variant) -> None:
    if digest != variant.sha256:
        raise ArtifactError(
            f"{path} is not the file of its manifest: its sha256 is {digest[:12]}…, expected {variant.sha256[:12]}…; "
            "publish the model version again"
        )


def read_assets(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """The assets of a version by name, each checked by its SHA-256.

    Raises:
        ArtifactError: one is missing, or not the file that the manifest was written for.
    """
    contents: dict[str, bytes] = {}
    for name, asset in manifest.assets.items():
        path = folder / name
        if path.parent != folder:
            raise ArtifactError(f"{folder}: asset `{name}` must be a plain name inside the version's folder")
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error}; publish the model version again") from error
        if hashlib.sha256(contents[name]).hexdigest() != asset.sha256:
            raise ArtifactError(f"{path} is not the file of its manifest; publish the model version again")
    return contents


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that readers see the old content or the new, never a part; syncs file and folder."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        _name_place(error, path)
        raise
    _sync_folder(path.parent)


def _name_place(error: BaseException, path: Path) -> None:
    """A full disk says `No space left on device` and not where."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def publish(root: Path, manifest: Manifest, fill: Callable[[Path], None]) -> Path:
    """Publishes a model version under `root`, whole or not at all, replacing the same version if it is there.

    Args:
        root: a model root.
        manifest: what to publish; its variants' files are verified before anything becomes visible.
        fill: writes the files that the manifest names into the folder that it is given.

    Returns:
        The folder of the version.

    Raises:
        ArtifactError: a file that the manifest names is missing or differs.
        OSError: the disk is full or cannot be written; what was there before is untouched.
    """
    final = root / manifest.service / manifest.name / str(manifest.version)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{manifest.version}."))
    try:
        fill(staging)
        for variant in manifest.variants.values():
            verify_variant(staging, variant)
        read_assets(staging, manifest)
        write_atomically(staging / MANIFEST_NAME, manifest.to_json())
        for path in staging.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        staging.chmod(0o755)
        _sync_folder(staging)
        _put_in_place(staging, final)
        _sync_folder(final.parent)
    except OSError as error:
        _name_place(error, final)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # after an exchange it holds the old version
    return final


def _put_in_place(staging: Path, final: Path) -> None:
    """Renames `staging` to `final`; what was there is then in `staging`, or gone."""
    try:
        staging.replace(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if _exchange(staging, final):
            return
        # No atomic exchange on this file system: for an instant the version is not there.
        retired = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".retired.{final.name}."))
        try:
            final.replace(retired / "old")
            try:
                staging.replace(final)
            except OSError:
                (retired / "old").replace(final)
                raise
        finally:
            shutil.rmtree(retired, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step (Linux's renameat2); False where the system or the file system has no such step."""
    at_working_directory, exchange = -100, 2
    with contextlib.suppress(AttributeError, OSError):
        rename = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(
            rename(at_working_directory, os.fsencode(one), at_working_directory, os.fsencode(other), exchange) == 0
        )
    return False


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
