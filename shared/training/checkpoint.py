"""Checkpoints from which a killed run continues bit by bit.

A checkpoint holds everything the next step depends on: weights, optimiser, weight average, the states of the random
generators, and the position inside the epoch. It is written atomically, so a kill at any moment leaves the last one
whole.
The learning rate is a function of the step number and needs no state.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.artifacts import write_atomically
from shared.errors import ConfigurationError

FORMAT = 1


@dataclass
class Progress:
    """Where a run stands: `step` batches of `epoch` (from 0) are done; `best_*` is the best epoch on validation."""

    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_score: float = float("-inf")
    wall_seconds: float = 0.0
    log_bytes: int = 0
    """Length of `metrics.jsonl` at this point; a resumed run cuts off what was logged after it."""
    sums: dict[str, float] = field(default_factory=dict)
    """Running sums of this epoch's training measures."""


def save_checkpoint(path: Path, *, parts: dict[str, Any], progress: Progress, fingerprint: str) -> None:
    """Writes a checkpoint.

    Args:
        path: file to write.
        parts: state dicts by name.
        progress: where the run stands.
        fingerprint: what the run is (its configuration); a resume with another one is refused.

    Raises:
        ConfigurationError: it cannot be written; the one before is whole.
    """
    buffer = io.BytesIO()
    state = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "parts": parts,
        "progress": vars(progress),
        "random": _random_state(),
    }
    torch.save(state, buffer)
    _write(path, buffer.getvalue())


def load_checkpoint(path: Path, *, fingerprint: str) -> tuple[dict[str, Any], Progress]:
    """Reads a checkpoint and restores the random generators; returns the state dicts by name and the position.

    Raises:
        ConfigurationError: it belongs to a run with another configuration, or to another format.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["format"] != FORMAT:
        raise ConfigurationError(f"{path} has format {state['format']}, expected {FORMAT}; start the run afresh")
    if state["fingerprint"] != fingerprint:
        raise ConfigurationError(
            f"{path} belongs to a run with another configuration:\n"
            f"  there: {state['fingerprint']}\n  here:  {fingerprint}\n"
            "use another output folder, or delete the old one"
        )
    _restore_random_state(state["random"])
    return state["parts"], Progress(**state["progress"])


def save_weights(path: Path, model: nn.Module) -> None:
    """Writes a model's weights alone, atomically; raises as `save_checkpoint` does."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    _write(path, buffer.getvalue())


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ConfigurationError(
            f"{path} ({len(content)} bytes) cannot be written: {error.strerror}; what was there before is whole: "
            "make room and start the same command again, it goes on from there"
        ) from error


def _random_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
