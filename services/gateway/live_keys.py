"""Keys as they change while Envoy runs: it watches one file for each of the three filters, which are replaced whole.

A key counts, or ends, with the next call; running calls finish. Once there were keys, a lost or broken file changes
nothing: the last known ones hold until the gateway starts anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from services.gateway.admission import ADMISSION, ADMITTED, RATES, Keys, admission_filters
from services.gateway.canaries import replace_file
from services.gateway.config import GatewayConfig
from shared.api_keys import ApiKey, KeyFile, digest
from shared.errors import ConfigurationError
from shared.roles import INFER

log = logging.getLogger(__name__)

FOLLOW_SECONDS = 0.5
CATALOG_NAME = "(catalog)"
"""Of the key with which the catalog asks through Envoy: no name that the file can hold."""
TYPES = {
    ADMISSION: ["lua.v3.Lua", "rbac.v3.RBAC"],
    ADMITTED: ["rbac.v3.RBAC"],
    RATES: ["local_ratelimit.v3.LocalRateLimit"],
}

Json = dict[str, Any]


class LiveKeys:
    """Keeps Envoy's admission filters in step with the file of the keys.

    Args:
        folder: for the files that Envoy watches.
        config: of the gateway.
        catalog_secret: the catalog's key, which is made at each start and has the role infer.

    Raises:
        ConfigurationError: there is a file of keys, and it is wrong.
    """

    def __init__(self, folder: Path, config: GatewayConfig, catalog_secret: str) -> None:
        self._folder, self._origins = folder, config.cors_origins
        self._file = KeyFile(Path(config.keys_file)) if config.keys_file else None
        self._required = config.keys_required
        self._catalog = ApiKey(CATALOG_NAME, INFER, digest(catalog_secret))
        self._seen = self._signature()
        self._keys = self._first()
        self._version = 0

    @property
    def keys(self) -> Keys:
        """All keys, the catalog's too; None if none are set."""
        return self._keys

    def _signature(self) -> tuple[int, int, int] | None:
        return self._file.signature() if self._file else None

    def _first(self) -> Keys:
        if self._file is not None and self._file.exists():
            return (*self._file.load(), self._catalog)
        if not self._required:
            return None
        log.warning("keys are required and there are none: nobody comes in", extra={"file": self._path()})
        return (self._catalog,)

    def _path(self) -> str:
        return str(self._file.path) if self._file else ""

    def take_over(self, bootstrap: Json) -> Json:
        """The bootstrap with these filters moved to the files, which are written now."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for listener in bootstrap["static_resources"]["listeners"]:
            manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
            manager["http_filters"] = [
                self._discovered(entry["name"]) if entry["name"] in TYPES else entry
                for entry in manager["http_filters"]
            ]
        self._write()
        return bootstrap

    def _discovered(self, name: str) -> Json:
        source = {"path": str(self._folder / f"{name}.json"), "watched_directory": {"path": str(self._folder)}}
        return {
            "name": name,
            "config_discovery": {
                "config_source": {"path_config_source": source, "resource_api_version": "V3"},
                "type_urls": [f"type.googleapis.com/envoy.extensions.filters.http.{kind}" for kind in TYPES[name]],
            },
        }

    def refresh(self) -> None:
        """Writes the filters anew if the keys changed; a file that is lost or wrong changes nothing."""
        signature = self._signature()
        if signature == self._seen or self._file is None:
            return
        self._seen = signature
        try:
            keys = self._file.load()
        except ConfigurationError as error:
            log.error("keys not read, the last ones hold", extra={"reason": error.message})
            if self._keys is not None:
                return
            keys = ()  # there should be keys now, so nobody comes in without one
        self._keys = (*keys, self._catalog)
        self._write()
        log.info("keys", extra={"keys": [key.name for key in keys], "version": self._version})

    def _write(self) -> None:
        self._version += 1
        for entry in admission_filters(self._keys, self._origins):
            resource = {"@type": "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig", **entry}
            content = {"version_info": str(self._version), "resources": [resource]}
            replace_file(self._folder / f"{entry['name']}.json", json.dumps(content))

    async def follow(self) -> None:
        """Refreshes for ever."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                self.refresh()
            except OSError:
                log.exception("keys not written")
