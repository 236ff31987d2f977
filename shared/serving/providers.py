"""Execution providers: on which processor graphs run, as `USAGI_PROVIDERS` says, and whether they really do.

ONNX Runtime gives up a provider in silence: one that it was not built with, and one whose libraries, driver or device
are missing, cost a line on standard error, and the session runs on the CPU, even where the CPU was not asked for. So a
provider is believed only when a session names it, once at the start with a graph of one node and again for every model.

`cuda,cpu` falls back to the CPU and says so; `cuda` alone does not start without the device.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence

import onnxruntime

from shared.errors import ConfigurationError, ProviderUnavailable

log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_SUFFIX = "ExecutionProvider"

# `y = x` on one float32: a ModelProto by hand, since `onnx` stays out of serving. Each line: tag, length, content.
_VALUE = b"\x5a\x0f\x0a\x01x\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01"  # ValueInfoProto: float32 `[1]`
PROBE_GRAPH = (
    b"\x08\x08"  # ir_version 8
    b"\x3a\x3b"  # graph
    b"\x0a\x10\x0a\x01x\x12\x01y\x22\x08Identity"  # its one node
    b"\x12\x05probe"  # its name
    + _VALUE
    + b"\x62"  # the output, like the input but for tag and name
    + _VALUE[1:].replace(b"x", b"y")
    + b"\x42\x02\x10\x0d"  # opset 13
)


def parse_providers(text: str) -> tuple[str, ...]:
    """ONNX Runtime's names of a list such as `cuda,cpu`: each its name there in lower case, without ExecutionProvider.

    Raises:
        ConfigurationError: an empty list, a name that ONNX Runtime does not know or that stands twice, or something
            after `cpu`, which runs everything.
    """
    known = {name.removesuffix(_SUFFIX).lower(): name for name in onnxruntime.get_all_providers()}
    asked = [part.strip().lower() for part in text.split(",")]
    unknown = [part for part in asked if part not in known]
    if unknown:
        raise ConfigurationError(
            f"USAGI_PROVIDERS={text!r} names {unknown[0]!r}, expected some of {', '.join(sorted(known))}, "
            "separated by commas, first the one to prefer"
        )
    if len(set(asked)) < len(asked):
        raise ConfigurationError(f"USAGI_PROVIDERS={text!r} names a provider twice; name each once")
    if "cpu" in asked[:-1]:
        raise ConfigurationError(
            f"USAGI_PROVIDERS={text!r}: cpu runs everything, so nothing can follow it; put it last"
        )
    return tuple(known[part] for part in asked)


def usable_providers(asked: Sequence[str]) -> tuple[str, ...]:
    """Those of `asked` with which a session really runs here; what falls away is logged.

    Raises:
        ConfigurationError: one does not run, and the CPU is not in the list to take its place.
    """
    if tuple(asked) == (CPU,):
        return (CPU,)
    offered = onnxruntime.get_available_providers()
    built_in = [name for name in asked if name in offered]
    if CUDA in built_in:
        _load_libraries()
    real = _providers_of_a_session(built_in)
    missing = [name for name in asked if name not in real]
    if not missing:
        return tuple(asked)
    absent = [name for name in missing if name not in offered]
    cause = (
        f"ONNX Runtime here is built for {', '.join(offered)} only; install the extra `gpu` instead of `cpu`"
        if absent
        else "its libraries, the driver or the device are missing; ONNX Runtime said on standard error which"
    )
    text = f"USAGI_PROVIDERS asks for {', '.join(missing)}, which does not run here: {cause}"
    if CPU not in asked:
        raise ConfigurationError(f"{text}; or add `cpu` at the end to fall back to the CPU")
    log.warning("provider missing", extra={"asked": list(asked), "missing": missing, "reason": text})
    return tuple(name for name in asked if name not in missing)


def check_providers(asked: Sequence[str], got: Sequence[str]) -> None:
    """Whether a session runs with what it was asked to; a loss that the CPU makes good is logged.

    Raises:
        ProviderUnavailable: a provider was lost, and the CPU is not in the list to take its place.
    """
    lost = [name for name in asked if name not in got]
    if not lost:
        return
    text = f"the session runs on {', '.join(got)} without {', '.join(lost)}, which USAGI_PROVIDERS asks for"
    if CPU not in asked:
        raise ProviderUnavailable(f"{text}; free the device's memory, or add `cpu` at the end to fall back to the CPU")
    log.warning("provider lost", extra={"asked": list(asked), "providers": list(got), "reason": text})


def _providers_of_a_session(asked: Sequence[str]) -> list[str]:
    """What a session of one node runs with; empty if it cannot be made."""
    if not asked:
        return []
    try:
        session = onnxruntime.InferenceSession(PROBE_GRAPH, providers=list(asked), enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises a class of its own for every kind of fault
        log.warning("provider failed", extra={"asked": list(asked), "reason": str(error)})
        return [CPU] if CPU in asked else []
    got: list[str] = session.get_providers()
    return got


def _load_libraries() -> None:
    """Loads CUDA and cuDNN from the wheels of the extra `gpu`; without them the system's own are found later."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    if said.getvalue():
        log.warning("CUDA libraries", extra={"reason": said.getvalue().strip()})
