"""Grafana's dashboard, committed as `deploy/observability/grafana/dashboards/overview.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

WINDOW = "1m"
OWN_FAULTS = "UNKNOWN|INTERNAL|UNAVAILABLE|DATA_LOSS|DEADLINE_EXCEEDED"
COLUMNS, WIDTH, HEIGHT = 2, 12, 8


@dataclass(frozen=True)
class Panel:
    """A graph over time: its title, its unit in Grafana's names, and for each line's legend the PromQL."""

    title: str
    unit: str
    queries: dict[str, str]
    stacked: bool = False


def _rate(metric: str, by: str, labels: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{labels}[{WINDOW}]))"


def _quantile(share: float, histogram: str, by: str) -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({histogram}_bucket[{WINDOW}])))"


def _mean(histogram: str, by: str) -> str:
    return f"{_rate(f'{histogram}_sum', by)} / {_rate(f'{histogram}_count', by)}"


def _error_ratio() -> str:
    calls = _rate("usagi_requests_total", "service")
    faults = _rate("usagi_requests_total", "service", f'{{code=~"{OWN_FAULTS}"}}')
    return f"({faults} or {calls} * 0) / {calls}"


_MODEL = "model, variant"
_LEGEND = "{{model}} {{variant}}"

PANELS = (
    Panel("calls", "reqps", {"{{method}} {{code}}": _rate("usagi_requests_total", "method, code")}),
    Panel("failures through our fault", "percentunit", {"{{service}}": _error_ratio()}),
    Panel(
        "latency of calls",
        "s",
        {
            f"p{share * 100:.0f} {{{{method}}}}": _quantile(share, "usagi_request_duration_seconds", "method")
            for share in (0.5, 0.95, 0.99)
        },
    ),
    Panel(
        "stages, mean",
        "s",
        {f"{_LEGEND} {{{{stage}}}}": _mean("usagi_stage_duration_seconds", f"{_MODEL}, stage")},
        True,
    ),
    Panel(
        "latency of inferences", "s", {f"p95 {_LEGEND}": _quantile(0.95, "usagi_inference_duration_seconds", _MODEL)}
    ),
    Panel("batch size, mean", "short", {_LEGEND: _mean("usagi_batch_size", _MODEL)}),
    Panel("batches, p95", "s", {_LEGEND: _quantile(0.95, "usagi_batch_duration_seconds", _MODEL)}),
    Panel(
        "queue depth",
        "short",
        {_LEGEND: f"sum by ({_MODEL}) (usagi_queue_depth)", "in work": "sum(usagi_inflight_requests)"},
    ),
    Panel(
        "refused and dropped",
        "reqps",
        {
            "refused {{reason}}": f"{_rate('usagi_rejected_total', 'reason')} or vector(0)",
            "dropped {{reason}}": f"{_rate('usagi_dropped_total', 'reason')} or vector(0)",
        },
    ),
    Panel(
        "traffic",
        "Bps",
        {
            "in {{method}}": _rate("usagi_request_bytes_sum", "method"),
            "out {{method}}": _rate("usagi_response_bytes_sum", "method"),
        },
    ),
    Panel(
        "models in memory", "bytes", {f"weights {_LEGEND}": f"sum by ({_MODEL}) (usagi_model_bytes * usagi_model_info)"}
    ),
    Panel(
        "loading",
        "s",
        {
            _LEGEND: f"max by ({_MODEL}) (usagi_model_load_seconds)",
            "failed loads {{service}}": "sum by (service) (usagi_model_load_failures_total)",
        },
    ),
    Panel("memory of processes", "bytes", {"{{job}} {{instance}}": "process_resident_memory_bytes"}),
    Panel("CPU of processes", "short", {"{{job}} {{instance}}": f"rate(process_cpu_seconds_total[{WINDOW}])"}),
    Panel(
        "gateway: calls by upstream",
        "reqps",
        {"{{envoy_cluster_name}}": _rate("envoy_cluster_upstream_rq_total", "envoy_cluster_name")},
    ),
    Panel(
        "gateway: latency of upstreams, p95",
        "ms",
        {"{{envoy_cluster_name}}": _quantile(0.95, "envoy_cluster_upstream_rq_time", "envoy_cluster_name")},
    ),
    Panel(
        "gateway: answers by HTTP status",
        "reqps",
        {
            "{{envoy_response_code_class}}xx": _rate(
                "envoy_http_downstream_rq_xx", "envoy_response_code_class", '{envoy_http_conn_manager_prefix="public"}'
            )
        },
    ),
    Panel(
        "gateway: healthy replicas",
        "short",
        {"{{envoy_cluster_name}}": "sum by (envoy_cluster_name) (envoy_cluster_membership_healthy)"},
    ),
    Panel("targets", "short", {"{{job}} {{instance}}": "up"}),
)


def dashboard() -> str:
    """The dashboard as Grafana provisions it."""
    model: dict[str, Any] = {
        "uid": "usagi-overview",
        "title": "Usagi",
        "schemaVersion": 39,
        "editable": False,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }
    return json.dumps(model, indent=1) + "\n"


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    datasource = {"type": "prometheus", "uid": "prometheus"}
    stacking = {"mode": "normal" if panel.stacked else "none"}
    fill = {"fillOpacity": 20 if panel.stacked else 0, "stacking": stacking}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": datasource,
        "gridPos": {"h": HEIGHT, "w": WIDTH, "x": number % COLUMNS * WIDTH, "y": number // COLUMNS * HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": fill}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": datasource, "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }
