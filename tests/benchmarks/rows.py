"""One measurement, its median over repeats, and the files it is kept in."""

from __future__ import annotations

import csv
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """A server, a model and a load, and what came out.

    Times in milliseconds, rates a second, CPU in seconds a second. `load` says in words how the load was made. `of_raw`
    is items per CPU-second as a share of the best raw batch of the same repeat. `stages` are mean milliseconds of a
    request by the server's own clock.
    """

    server: str
    model: str
    load: str
    inflight: int
    rate: float
    items_per_second: float
    items_per_cpu_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int = 0
    client_cpu: float = 0.0
    memory_mb: float = 0.0
    of_raw: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it one line of a table."""
        return (self.server, self.model, self.load)

    @property
    def cpu_us(self) -> float:
        """Microseconds of the server's CPU an item."""
        return 1e6 / self.items_per_cpu_second

    def named(self, **changes: Any) -> Row:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


def row(
    server: str, model: str, load: str, items: int, wall: float, used: float, times: np.ndarray, **more: Any
) -> Row:
    """A row from what was counted; `used` is the server's CPU in seconds, `times` seconds of each call."""
    p50, p95, p99 = (1000 * float(value) for value in np.percentile(times, [50, 95, 99])) if len(times) else (0, 0, 0)
    more = {"inflight": 0, "rate": 0.0, **more}
    return Row(
        server=server, model=model, load=load, items_per_second=items / wall,
        items_per_cpu_second=items / max(used, 1e-9), p50_ms=p50, p95_ms=p95, p99_ms=p99, **more,
    )  # fmt: skip


def with_shares(rows: Iterable[Row]) -> list[Row]:
    """The rows of one repeat, each with its share of the best raw batch of its model."""
    rows = list(rows)
    best: dict[str, float] = {}
    for one in rows:
        if one.server == "raw":
            best[one.model] = max(best.get(one.model, 0.0), one.items_per_cpu_second)
    return [one.named(of_raw=one.items_per_cpu_second / best[one.model]) if one.model in best else one for one in rows]


def medians(repeats: Iterable[Row]) -> list[Row]:
    """Column-wise medians, one row for each key, in the order of their first appearance."""
    grouped: dict[tuple[str, str, str], list[Row]] = {}
    for one in repeats:
        grouped.setdefault(one.key, []).append(one)
    return [_median(group) for group in grouped.values()]


def _median(group: list[Row]) -> Row:
    columns = [name for name, kind in Row.__annotations__.items() if kind in ("int", "float")]
    values: dict[str, Any] = {name: statistics.median(getattr(one, name) for one in group) for name in columns}
    values["errors"] = max(one.errors for one in group)  # an error never hides behind two good repeats
    stages = {
        name: statistics.median(one.stages[name] for one in group if name in one.stages) for name in group[0].stages
    }
    return group[0].named(**values, stages=stages)


@dataclass(frozen=True)
class Run:
    """A whole run: its medians, each repeat, and what it ran on."""

    rows: list[Row]
    repeats: list[Row]
    settings: dict[str, Any]

    def save(self, folder: Path, name: str = "bench") -> None:
        """Writes `<name>.json` with everything and `<name>.csv` with the medians."""
        folder.mkdir(parents=True, exist_ok=True)
        raw = {
            "settings": self.settings,
            "rows": [_rounded(one) for one in self.rows],
            "repeats": [_rounded(one) for one in self.repeats],
        }
        (folder / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            plain = [{key: value for key, value in _rounded(one).items() if key != "stages"} for one in self.rows]
            writer = csv.DictWriter(file, plain[0] if plain else ["server"])
            writer.writeheader()
            writer.writerows(plain)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Reads what `save` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls([Row(**one) for one in raw["rows"]], [Row(**one) for one in raw.get("repeats", [])], raw["settings"])


def _rounded(one: Row) -> dict[str, Any]:
    """Five digits, which is more than any measurement here has."""

    def digits(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: digits(inner) for key, inner in value.items()}
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return {name: digits(value) for name, value in dataclasses.asdict(one).items()}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import grpc
    import onnxruntime

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": names[0] if names else platform.processor(),
        "cores": len(names),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "grpcio": grpc.__version__,
    }
