"""What a request gets when it asks for a model by name, be it a graph in memory or a pipeline of several."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from shared.artifacts import Manifest
from shared.serving.batching import BatchResult
from shared.serving.model_observer import ModelObserver
from shared.serving.session import Array


class Queue(Protocol):
    """Where its requests wait and run; see Batcher."""

    def admit(self) -> AbstractContextManager[None]:
        """Reserves a place; raises Overloaded if all are taken."""

    def submit(self, feeds: dict[str, Array], deadline: float = ...) -> Awaitable[BatchResult]:
        """Runs a request."""


class Served(Protocol):
    """A model or a pipeline that answers, leased for one request."""

    @property
    def manifest(self) -> Manifest:
        """Its description."""

    @property
    def version(self) -> str:
        """The version as the API shows it."""

    @property
    def variant(self) -> str:
        """Which of its weights; `pipeline` for a pipeline."""

    @property
    def batcher(self) -> Queue:
        """Takes its requests."""

    @property
    def assets(self) -> Mapping[str, bytes]:
        """Contents of the version's assets, by name."""

    @property
    def observer(self) -> ModelObserver:
        """Is told of them."""
