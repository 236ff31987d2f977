"""What a serving process knows of its models: their versions by name and number, and which of them a name means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from shared.errors import ModelNotFound, Unreachable
from shared.serving.model_config import CONFIG_NAME, ModelConfig
from shared.serving.model_folders import Stamp
from shared.serving.response_cache import ResponseCache
from shared.serving.versions import ModelVersion, State

UNLOADED = "unloaded on request; load it to serve it again"


@dataclass(eq=False)
class Model:
    """All versions of a model, oldest first; `forced` holds what LoadModel (True) and UnloadModel (False) ask for."""

    name: str
    versions: list[ModelVersion] = field(default_factory=list)
    config: ModelConfig = field(default_factory=ModelConfig)
    config_stamp: Stamp | None = None
    config_problem: str = ""
    cache: ResponseCache | None = None
    unloaded: bool = False
    forced: dict[int, bool] = field(default_factory=dict)

    def refusal(self, version: ModelVersion, among: Iterable[ModelVersion]) -> str:
        """Why a version is not to be served, given what else there is; empty if it is."""
        forced = self.forced.get(version.version)
        if forced is not None or self.unloaded:
            return "" if forced else UNLOADED
        policy = self.config.versions
        if version.version in policy.select([other.version for other in among if not other.failure]):
            return ""
        return f"not chosen by the version policy `{policy}` of {CONFIG_NAME}; LoadModel serves it nonetheless"

    def newest(self, following: list[ModelVersion]) -> ModelVersion | None:
        """The newest of `following` that is to be served."""
        serving = (entry for entry in reversed(following) if not entry.failure and not entry.superseded)
        return next((entry for entry in serving if not self.refusal(entry, following)), None)


class ModelTable:
    """The models of one service by name; `complete` once the roots were looked through for the first time."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.complete = False

    def versions(self) -> list[ModelVersion]:
        """All versions, by name and number."""
        return [entry for name in sorted(self.models) for entry in self.models[name].versions]

    def find(self, name: str, version: str = "") -> ModelVersion:
        """The version that a request means; an empty version is the newest that is not broken.

        Raises:
            ModelNotFound: no such model or version; `field` is `model` or `version`.
            Unreachable: the process starts and does not know its models yet.
        """
        model = self.models.get(name)
        if model is None and not self.complete:  # the port is open before the models are warm
            raise Unreachable("the models are still loading; come back in a moment")
        if model is None:
            raise ModelNotFound("model", name, sorted(self.models))
        if version == "":
            for entry in reversed(model.versions):
                if entry.state in (State.READY, State.AVAILABLE):
                    return entry
            return model.versions[-1]
        for entry in model.versions:
            if str(entry.version) == version:
                return entry
        raise ModelNotFound("version", version, [str(entry.version) for entry in model.versions])
