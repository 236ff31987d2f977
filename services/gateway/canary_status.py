"""How the versions of a canary do: calls, errors and latency, from the metrics of the services that ran them.

The counts are those since each service started, of the calls that a canary routed; with a period, those of the period.
Quantiles are interpolated within the histogram's buckets, as Prometheus does. Standard library only, like the gateway.
"""

from __future__ import annotations

import math
import re
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from services.gateway.canaries import STEPS, Canary
from services.gateway.config import GatewayConfig
from shared.errors import InvalidInput
from shared.services_table import ServicesTable

METRIC = "usagi_version_duration_seconds"
LIVE, SHADOW = "live", "shadow"
SCRAPE_SECONDS = 2.0
_SAMPLE = re.compile(METRIC + r"_(bucket|count)\{(.*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
Key = tuple[str, str, str]
"""Model, version, live or shadow."""


@dataclass
class Figures:
    """Calls by gRPC code, and how many took at most so many seconds."""

    codes: Counter[str] = field(default_factory=Counter)
    within: Counter[float] = field(default_factory=Counter)

    @property
    def calls(self) -> int:
        """All of them."""
        return sum(self.codes.values())

    @property
    def errors(self) -> int:
        """Those that did not end with OK."""
        return self.calls - self.codes["OK"]

    def quantile(self, share: float) -> float:
        """Seconds that this share of the calls took at most; NaN without calls, infinite beyond the last bucket."""
        total = self.within[math.inf]
        if total <= 0:
            return math.nan
        rank, below, lower = share * total, 0, 0.0
        for bound in sorted(self.within):
            count = self.within[bound]
            if count >= rank:
                if math.isinf(bound):
                    return math.inf
                return lower + (bound - lower) * (rank - below) / (count - below)
            below, lower = count, bound
        return math.inf

    def add(self, other: Figures) -> None:
        """Another replica's calls too."""
        self.codes.update(other.codes)
        self.within.update(other.within)

    def since(self, before: Figures) -> Figures:
        """What came after; a service that started anew since counts from its start."""
        if self.calls < before.calls:
            return self
        codes, within = Counter(self.codes), Counter(self.within)
        codes.subtract(before.codes)
        within.subtract(before.within)
        return Figures(codes, within)


Table = dict[Key, Figures]


def parse(text: str) -> Table:
    """The figures in a service's /metrics."""
    table: Table = {}
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if match is None:
            continue
        labels = dict(_LABEL.findall(match[2]))
        figures = table.setdefault((labels["model"], labels["version"], labels["traffic"]), Figures())
        if match[1] == "count":
            figures.codes[labels["code"]] += round(float(match[3]))
        else:
            figures.within[float(labels["le"].replace("+Inf", "inf"))] += round(float(match[3]))
    return table


def addresses(config: GatewayConfig, table: ServicesTable, named: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Host and port of each service's metrics; `named` holds `service=host:port` of those that are elsewhere.

    Raises:
        InvalidInput: one that cannot be read.
    """
    local = config.upstreams == "local"
    found = {
        name: (config.addresses[name].host, service.local_metrics_port if local else service.metrics_port)
        for name, service in table.services.items()
    }
    for text in named:
        name, _, address = text.partition("=")
        host, _, port = address.rpartition(":")
        if name not in found or not host or not port.isdigit():
            raise InvalidInput("--metrics", f"is {text!r}, expected service=host:port")
        found[name] = (host, int(port))
    return found


def scrape(host: str, port: int) -> Table:
    """The figures of all replicas behind a name; raises OSError if none answers."""
    found: Table = {}
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for address in sorted({str(info[4][0]) for info in infos}):
        shown = f"[{address}]" if ":" in address else address
        with urllib.request.urlopen(f"http://{shown}:{port}/metrics", timeout=SCRAPE_SECONDS) as answer:
            for key, figures in parse(answer.read().decode()).items():
                found.setdefault(key, Figures()).add(figures)
    return found


def status_lines(
    canaries: Iterable[Canary], places: Mapping[str, tuple[str, int]], seconds: float = 0.0
) -> Iterable[str]:
    """A table for each canary; a service that does not tell is said, and fails nothing.

    Args:
        canaries: what is set.
        places: host and port of each service's metrics.
        seconds: how long to look; 0 for all since the services started.
    """
    canaries = list(canaries)
    services = sorted({canary.service for canary in canaries})
    found, problems = _scrape_all(services, places)
    if seconds and canaries:
        before = found
        time.sleep(seconds)
        found, problems = _scrape_all(services, places)
        for service, table in found.items():
            earlier = before.get(service, {})
            found[service] = {key: figures.since(earlier.get(key, Figures())) for key, figures in table.items()}
    for canary in canaries:
        yield f"{canary.service}/{canary.model}"
        yield f"  {'version':<12}{'share':>8}{'calls':>10}{'errors':>8}{'p50 ms':>9}{'p95 ms':>9}"
        rows = [(version, share, LIVE) for version, share in canary.shares().items()]
        rows += [(version, share, SHADOW) for version, share in canary.shadows.items()]
        for version, share, traffic in rows:
            figures = found.get(canary.service, {}).get((canary.model, version, traffic), Figures())
            name = version if traffic == LIVE else f"{version} shadow"
            yield (
                f"  {name:<12}{f'{share / STEPS:g}%':>8}{figures.calls:>10}{figures.errors:>8}"
                f"{_ms(figures.quantile(0.5)):>9}{_ms(figures.quantile(0.95)):>9}"
            )
        if canary.service in problems:
            yield f"  no figures: {problems[canary.service]}"


def _scrape_all(
    services: Iterable[str], places: Mapping[str, tuple[str, int]]
) -> tuple[dict[str, Table], dict[str, str]]:
    found, problems = {}, {}
    for service in services:
        if service not in places:
            problems[service] = f"services.toml has no {service}"
            continue
        host, port = places[service]
        try:
            found[service] = scrape(host, port)
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            problems[service] = f"{host}:{port}: {reason}"
    return found, problems


def _ms(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    return ">10000" if math.isinf(seconds) else f"{1000 * seconds:.1f}"
