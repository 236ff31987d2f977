"""Brings the table of models up to date with the model roots: checks and warms what is new, retires what is gone.

What replaces a version becomes visible when it is warm, and what it replaces goes only after that. What came from a
folder that cannot be read any more stays, and so does a version whose file was replaced by one that cannot be served.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from shared.artifacts import ArtifactError
from shared.errors import UsagiError
from shared.serving.model_config import ModelConfig, read_config
from shared.serving.model_folders import FoundModel, FoundVersion, Scan, scan
from shared.serving.model_table import Model, ModelTable
from shared.serving.residency import Residency
from shared.serving.response_cache import ResponseCache
from shared.serving.settling import Settling
from shared.serving.telemetry import Telemetry
from shared.serving.versions import ModelVersion
from shared.signatures import TrustedKey

log = logging.getLogger(__name__)

COPYING = "its file changed just now and may still be copied; it is served once it looks the same in two scans"


class ModelUpdates:
    """Applies what lies in the roots to the table; one at a time, which the repository's lock sees to.

    Args:
        service: the domain; the folder below each root.
        roots: model roots, searched in order.
        table: the models.
        residency: what of them is in memory.
        telemetry: is told of caches.
        settling: says which files without a manifest are whole.
        trusted: with any, one of these keys must have signed a version.
    """

    def __init__(
        self,
        service: str,
        roots: Sequence[Path],
        table: ModelTable,
        residency: Residency,
        telemetry: Telemetry,
        settling: Settling,
        trusted: Sequence[TrustedKey],
    ) -> None:
        self._service, self._roots = service, roots
        self._table, self._residency, self._telemetry = table, residency, telemetry
        self._settling, self._trusted = settling, trusted

    async def look(self, patiently: bool = False, name: str = "") -> Scan:
        """What lies in the roots; `patiently`, files that may still be copied (those of `name`) get time to settle."""
        found, unsettled = await self._scan()
        if patiently and (name in unsettled or (unsettled and not name)):
            await asyncio.sleep(self._settling.seconds)
            found, _ = await self._scan()
        return found

    async def _scan(self) -> tuple[Scan, set[str]]:
        found = await asyncio.to_thread(scan, self._roots, self._service)
        return found, self._settling.judge(found)

    async def update(self, name: str, found: Scan) -> None:
        """Brings one model up to date with what was found."""
        model = self._table.models.get(name) or Model(name)
        there = found.models.get(name, FoundModel())
        await self._update_config(model, there)
        known = {entry.version: entry for entry in model.versions}
        following: dict[int, ModelVersion] = {}
        for number, version in there.versions.items():
            entry = known.get(number)
            if entry is not None and self._is_same(entry, version):
                following[number] = entry
                entry.successor = None
                self._warn(entry, "")
            else:
                following[number] = ModelVersion(name, number, version)
        for number, entry in known.items():
            cause = found.cause_for(entry.folder)
            if cause and not entry.failure and (number not in there.versions or following[number] is not entry):
                following[number] = entry
                self._warn(entry, f"{cause}; serving from memory")
            elif entry.loaded and following.get(number) is not entry:
                self._keep_replaced(entry, following)
        await self.settle(model, [following[number] for number in sorted(following)])

    @staticmethod
    def _is_same(entry: ModelVersion, version: FoundVersion) -> bool:
        before = entry.found
        if (before.folder, before.published, before.settled) != (version.folder, version.published, version.settled):
            return False
        return not (entry.failure and before.files != version.files)

    def _keep_replaced(self, entry: ModelVersion, following: dict[int, ModelVersion]) -> None:
        """Keeps a version without a manifest while what lies in its place now cannot be served."""
        graph = entry.found.graph
        for number, other in list(following.items()):
            if graph is None or other.found.graph != graph:
                continue
            if number != entry.version:
                entry.successor = other
                following[entry.version] = entry
            elif not other.found.settled:
                following[number] = entry
                self._warn(entry, f"{graph.name} is being replaced; serving from memory")
            return

    async def _update_config(self, model: Model, there: FoundModel) -> None:
        if there.config_stamp == model.config_stamp:
            return
        model.config_stamp, model.config_problem = there.config_stamp, ""
        try:
            model.config = await asyncio.to_thread(read_config, there.config) if there.config else ModelConfig()
        except ArtifactError as error:  # what was said before holds
            model.config_problem = error.message
            log.error("model.toml ignored", extra={"model": model.name, "reason": error.message})
        limit = model.config.cache_bytes
        if limit != (model.cache.limit if model.cache else 0):
            model.cache = ResponseCache(limit) if limit else None
            for entry in model.versions:
                for served in entry.loaded.values():
                    served.keep_answers(model.cache, self._telemetry)
                    self._residency.announce(served)  # its queue is another one now

    @staticmethod
    def _warn(entry: ModelVersion, warning: str) -> None:
        if entry.warning != warning:
            entry.warning = warning
            if warning:
                log.warning("model warning", extra={"model": entry.name, "version": entry.version, "reason": warning})

    async def settle(self, model: Model, following: list[ModelVersion]) -> None:
        """Makes `following` the versions of `model`: checks and warms what is new first, then swaps in one step."""
        for entry in following:
            entry.cache = model.cache
            if not entry.checked:
                await self._check(entry)
        while newest := model.newest(following):  # each turn loads it, or finds it broken
            if newest.warmed:  # once: what was evicted since comes back when it is used
                break
            newest.warmed = True
            if not model.versions and not self._residency.has_room(newest):
                log.warning("not loaded at start", extra={"model": model.name, "version": newest.version})
                break
            try:
                newest.withdrawn = ""
                await self._residency.open(newest, newest.auto, in_use=False)
                break
            except ArtifactError as error:
                self._residency.fail(newest, error.message)
        for entry in following:
            if entry.successor is not None and entry.successor.failure:
                self._warn(entry, f"serving from memory, since its file was replaced: {entry.successor.failure}")
        following = [entry for entry in following if not entry.superseded]
        kept = set(following)
        for entry in model.versions:
            if entry not in kept:
                self._residency.retire(entry)
        model.versions = following
        for entry in following:
            reason = "" if entry.failure else model.refusal(entry, following)
            if reason:
                self._residency.withdraw(entry, reason)
            else:
                entry.withdrawn = ""
            if model.config_problem and not entry.warning:
                entry.notice = model.config_problem
            elif not model.config_problem:
                entry.notice = ""
            for served in entry.loaded.values():
                self._residency.announce(served)  # again: a version that it replaces has taken its gauges along
        if following:
            self._table.models[model.name] = model
        else:
            self._table.models.pop(model.name, None)

    async def _check(self, entry: ModelVersion) -> None:
        entry.checked = True
        if not entry.found.settled:
            entry.failure = COPYING
            return
        try:
            await asyncio.to_thread(entry.check, self._service, self._trusted)
            if entry.plain is not None:
                names = {"model": entry.name, "version": entry.version}
                log.warning("model without a manifest", extra={**names, "reason": entry.plain.notice})
        except UsagiError as error:
            self._residency.fail(entry, error.message)
        for variant, reason in entry.broken.items():
            names = {"model": entry.name, "version": entry.version, "variant": variant}
            log.error("variant failed", extra={**names, "reason": reason})
