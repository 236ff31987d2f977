"""Canaries as Envoy's routes.

A call names its model in its body, which Envoy does not read. So the gateway decides for all models of a service at
once: it draws one of the combinations of versions and names it in a header, from which the service takes the model that
the call means. Each model's shares come out exactly, and one draw is enough for all.

    flowers: 90% 1, 10% 2     colours: 50% 3, 50% 4
    0 ─────────────── 50 ─────────── 90 ──── 100
    flowers=1         flowers=1      flowers=2
    colours=3         colours=4      colours=4

Shadows are copies by Envoy's mirroring, over a cluster of their own, whose small limits keep them from crowding out
live calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from services.gateway.canaries import WHOLE, Canary
from services.gateway.descriptors import safe_unary_methods
from shared.services_table import Service, ServicesTable

VERSIONS_HEADER = "usagi-versions"
SHADOW_HEADER = "usagi-shadow"
STICKY_HEADER = "usagi-sticky"
"""Calls with the same value are answered by the same version as long as the shares stay."""
INFER = "/inference.GRPCInferenceService/ModelInfer"
MAX_COPIES = 64
OWN_HEADERS = (VERSIONS_HEADER, SHADOW_HEADER)
"""Set by the gateway alone: taken off what callers send."""

Json = dict[str, Any]


def with_canaries(routes: Json, table: ServicesTable, canaries: Sequence[Canary]) -> Json:
    """Envoy's route table with the canaries in it.

    Args:
        routes: the route table without any.
        table: the services.
        canaries: of whatever services; those that the table does not know are passed over.
    """
    hosts = [
        {**host, "routes": [new for route in host["routes"] for new in _with_canaries(route, table, canaries)]}
        for host in routes["virtual_hosts"]
    ]
    return {**routes, "virtual_hosts": hosts}


def _with_canaries(route: Json, table: ServicesTable, canaries: Sequence[Canary]) -> list[Json]:
    service = table.services.get(route["route"]["cluster"])
    own = [canary for canary in canaries if service is not None and canary.service == service.name]
    slices = combinations(own)
    if service is None or not slices:
        return [{**route, "request_headers_to_remove": list(OWN_HEADERS)}]
    action = {key: value for key, value in route["route"].items() if key != "cluster"} | _weighted(service.name, slices)
    plain = {**route, "route": action}
    policies = mirror_policies(service.name, own)
    if not policies:
        return [plain]
    mirrored = {**plain, "route": {**action, "request_mirror_policies": policies}}
    return [*({**mirrored, "match": match} for match in _copied_matches(route["match"], service)), plain]


def _weighted(service: str, slices: Iterable[tuple[int, str]]) -> Json:
    clusters = [
        {
            "name": service,
            "weight": share,
            # here and not at the route, whose removals Envoy does after these additions
            "request_headers_to_remove": [SHADOW_HEADER],
            "request_headers_to_add": [_header(VERSIONS_HEADER, value)],
        }
        for share, value in slices
    ]
    sticky = {"header": {"header_name": STICKY_HEADER}, "terminal": True}
    return {"weighted_clusters": {"clusters": clusters, "use_hash_policy": True}, "hash_policy": [sticky]}


def _copied_matches(match: Json, service: Service) -> list[Json]:
    """The calls of a route that may be copied: inference without side effects, one message each way."""
    prefix = match.get("prefix")
    if prefix == "/":
        paths = [INFER]
    else:
        paths = [path for path in safe_unary_methods(service.grpc_services) if prefix and path.startswith(prefix)]
    others = {key: value for key, value in match.items() if key != "prefix"}
    return [{**others, "path": path} for path in paths]


def combinations(canaries: Sequence[Canary]) -> list[tuple[int, str]]:
    """Slices of all calls: their share in 1/10,000, and what the header says in them; see the module's docstring."""
    if not canaries:
        return []
    ends = {canary.key: _ends(canary) for canary in canaries}
    borders = sorted({0, *(end for known in ends.values() for end, _ in known)})
    slices = []
    for start, end in itertools.pairwise(borders):
        chosen = [
            (canary, next(version for border, version in ends[canary.key] if start < border)) for canary in canaries
        ]
        slices.append((end - start, ",".join(_preference(canary, version) for canary, version in chosen)))
    return slices


def _ends(canary: Canary) -> list[tuple[int, str]]:
    """Where each version's slice ends, the stable one's first; empty slices are left out."""
    ends, end = [], 0
    for version, share in canary.shares().items():
        end += share
        if share:
            ends.append((end, version))
    return ends


def _preference(canary: Canary, version: str) -> str:
    """The version, and the stable one for the case that a replica cannot answer by it."""
    return f"{canary.model}={version}" if version == canary.stable else f"{canary.model}={version}/{canary.stable}"


def mirror_policies(service: str, canaries: Iterable[Canary]) -> list[Json]:
    """One copy for each shadowed version."""
    return [
        {
            "cluster": shadow_cluster_name(service),
            "runtime_fraction": {"default_value": {"numerator": share, "denominator": "TEN_THOUSAND"}},
            "disable_shadow_host_suffix_append": True,
            "request_headers_mutations": [
                {"remove": VERSIONS_HEADER},
                {"append": _header(SHADOW_HEADER, f"{canary.model}={version}")},
            ],
        }
        for canary in canaries
        for version, share in canary.shadows.items()
        if share
    ]


def shadow_cluster_name(service: str) -> str:
    """Name of the cluster that carries a service's copies."""
    return f"{service}-shadow"


def shadow_cluster(cluster: Json) -> Json:
    """A service's cluster once more for copies: no health checks, and few requests at once; more are not copied."""
    name = shadow_cluster_name(cluster["name"])
    limits = {"max_connections": 4, "max_pending_requests": MAX_COPIES, "max_requests": MAX_COPIES}
    return {
        **cluster,
        "name": name,
        "health_checks": [],
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {**cluster["load_assignment"], "cluster_name": name},
    }


def shadowed_services(canaries: Iterable[Canary]) -> set[str]:
    """Services that get copies."""
    return {canary.service for canary in canaries if any(canary.shadows.values())}


def _header(name: str, value: str) -> Json:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


assert WHOLE == 10_000, "the denominator above"
