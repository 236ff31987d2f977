"""The part of Envoy's configuration that changes while it runs: routes, and the clusters that carry copies of calls.

Envoy watches two files, which are replaced whole. A change holds for the next call; running calls keep their route, and
no connection is closed.
"""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from services.gateway.canaries import Canary, CanaryFile, NotStored, replace_file
from services.gateway.canary_routes import shadow_cluster, shadowed_services, with_canaries
from shared.services_table import ServicesTable

log = logging.getLogger(__name__)

FOLLOW_SECONDS = 0.5
ROUTES, CLUSTERS = "routes.json", "clusters.json"

Json = dict[str, Any]


class LiveRoutes:
    """Keeps Envoy's routes in step with the canaries.

    Args:
        folder: for the two files that Envoy watches.
        canaries: what the canaries are; whoever changes it, its change is seen within FOLLOW_SECONDS.
        table: the services.
    """

    def __init__(self, folder: Path, canaries: CanaryFile, table: ServicesTable) -> None:
        self._folder, self._file, self._table = folder, canaries, table
        self._routes: Json = {}
        self._clusters: dict[str, Json] = {}
        self._seen: tuple[int, int] | None = None
        self._version = 0

    def take_over(self, bootstrap: Json) -> Json:
        """The bootstrap with its routes moved to the files, which are written now."""
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        resources = bootstrap["static_resources"]
        self._clusters = {cluster["name"]: cluster for cluster in resources["clusters"]}
        for listener in resources["listeners"]:
            manager = listener["filter_chains"][0]["filters"][0]["typed_config"]  # with TLS, of both chains
            if manager["route_config"].get("name") != "calls":
                continue
            self._routes = manager.pop("route_config")
            manager["rds"] = {"route_config_name": "calls", "config_source": self._watched(ROUTES)}
        self.refresh()
        return {**bootstrap, "dynamic_resources": {"cds_config": self._watched(CLUSTERS)}}

    def refresh(self) -> None:
        """Writes the files anew if the canaries changed; a file that cannot be read changes nothing."""
        signature = self._file.signature()
        if signature == self._seen:
            return
        first, self._seen = self._seen is None, signature
        try:
            canaries = self._file.load()
        except NotStored as error:
            log.error("canaries not read", extra={"reason": error.message})
            if not first:
                return
            canaries = ()
        self._write(canaries)
        if canaries or not first:
            log.info("canaries", extra={"models": [canary.model for canary in canaries], "version": self._version})

    def _write(self, canaries: tuple[Canary, ...]) -> None:
        self._version += 1
        shadowed = [self._clusters[name] for name in sorted(shadowed_services(canaries)) if name in self._clusters]
        routes = with_canaries(self._routes, self._table, canaries)
        # clusters first, so that a route finds what it names
        self._replace(CLUSTERS, "cluster.v3.Cluster", [shadow_cluster(cluster) for cluster in shadowed])
        self._replace(ROUTES, "route.v3.RouteConfiguration", [routes])

    def _replace(self, name: str, kind: str, resources: list[Json]) -> None:
        typed = [{"@type": f"type.googleapis.com/envoy.config.{kind}", **resource} for resource in resources]
        content = {"version_info": str(self._version), "resources": typed}
        replace_file(self._folder / name, json.dumps(content))

    def _watched(self, name: str) -> Json:
        source = {"path": str(self._folder / name), "watched_directory": {"path": str(self._folder)}}
        return {"path_config_source": source, "resource_api_version": "V3"}

    async def follow(self) -> None:
        """Refreshes for ever."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                self.refresh()
            except OSError:
                log.exception("routes not written")
