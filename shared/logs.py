"""Logging, configured once at the entry point: JSON lines while serving, a human line elsewhere."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Request id of the call that the current task answers; every log line of that task carries it."""

trace_id: contextvars.ContextVar[str] = contextvars.ContextVar("trace_id", default="")
"""W3C trace id of that call, 32 hex digits: the caller's, or this process's own; empty without a trace."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line; `extra` becomes fields of their own."""

    def __init__(self, **constant: str) -> None:
        super().__init__()
        self._constant = constant

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        entry: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._constant,
        }
        if request_id.get():
            entry["request_id"] = request_id.get()
        if trace_id.get():
            entry["trace_id"] = trace_id.get()
        entry.update({key: value for key, value in vars(record).items() if key not in _STANDARD})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure_json(level: str, **constant: str) -> None:
    """Sends all logs to stderr as JSON lines.

    Args:
        level: lowest level that is shown.
        constant: fields of every line, such as `service="vision"`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(**constant))
    logging.basicConfig(level=level, handlers=[handler], force=True)
