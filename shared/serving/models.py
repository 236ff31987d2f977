"""All that answers by name in one process: the models of the repository and the pipelines over them."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from shared.errors import ModelNotFound
from shared.serving.pipelines.registry import PipelineRegistry
from shared.serving.repository import ModelRepository, ModelVersion
from shared.serving.served import Served


class Models:
    """Models and pipelines together; a name belongs to one of the two.

    Args:
        repository: the models.
        pipelines: the pipelines.
    """

    def __init__(self, repository: ModelRepository, pipelines: PipelineRegistry) -> None:
        self._repository, self._pipelines = repository, pipelines

    def versions(self) -> list[ModelVersion]:
        """All versions of both, by name and number."""
        every = [*self._repository.versions(), *self._pipelines.versions()]
        return sorted(every, key=lambda entry: (entry.name, entry.version))

    def find(self, name: str, version: str = "") -> ModelVersion:
        """The version that a request means; raises as ModelRepository.find does."""
        if name in self._pipelines:
            return self._pipelines.find(name, version)
        try:
            return self._repository.find(name, version)
        except ModelNotFound as error:
            raise self._with_pipelines(error) from error

    def acquire(self, name: str, version: str = "", variant: str = "") -> AbstractAsyncContextManager[Served]:
        """Leases what the name means for one request; raises as ModelRepository.acquire does."""
        if name in self._pipelines:
            return self._pipelines.acquire(name, version, variant)
        return self._repository.acquire(name, version, variant)

    async def load(self, name: str, version: str = "", variant: str = "") -> ModelVersion:
        """Loads it now; raises as ModelRepository.load does."""
        if name not in self._pipelines:
            await self._pipelines.rescan()  # published just now?
        if name in self._pipelines:
            return await self._pipelines.load(name, version)
        try:
            return await self._repository.load(name, version, variant)
        except ModelNotFound as error:
            raise self._with_pipelines(error) from error

    def unload(self, name: str, version: str = "") -> list[ModelVersion]:
        """Stops serving it; raises as ModelRepository.unload does."""
        if name in self._pipelines:
            return self._pipelines.unload(name, version)
        return self._repository.unload(name, version)

    def _with_pipelines(self, error: ModelNotFound) -> ModelNotFound:
        """The same error; where it lists the models, the pipelines too."""
        if error.field != "model":
            return error
        return ModelNotFound("model", error.name, sorted({entry.name for entry in self.versions()}))
