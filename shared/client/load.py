"""What the locust users of all domains share: one connection a user, every call timed, checked and reported.

Imported by `services/<domain>/load.py` under locust only, after `grpc.experimental.gevent.init_gevent()`.
Retries are off, so that every refused call counts as an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from locust import User, constant_pacing

from shared.client.connection import (
    SERVICE_HEADER,
    CallFailed,
    channel_options,
    key_metadata,
    open_channel,
    to_call_failed,
)

DEADLINE_SECONDS = 10.0
PACING_SECONDS = float(os.environ.get("USAGI_LOAD_PACING_SECONDS", "0.1"))
"""Each user starts a call this long after it started its last one, however fast the answer came."""
_T = TypeVar("_T")


class WrongAnswer(Exception):
    """The call ended with OK but its answer is not right."""


class GrpcUser(User):  # type: ignore[misc]
    """A locust user with a connection of its own; subclasses set `service`.

    Without `use_local_subchannel_pool` all users of a process would share one TCP connection.
    """

    abstract = True
    service = ""
    wait_time = constant_pacing(PACING_SECONDS)

    def on_start(self) -> None:
        """Connects to locust's `--host`, written `host:port`."""
        target = (self.host or "").removeprefix("http://")
        options = dict(channel_options())
        options.update({"grpc.use_local_subchannel_pool": 1, "grpc.enable_retries": 0})
        self.target = target
        self.metadata = ((SERVICE_HEADER, self.service), *key_metadata())
        self.channel = open_channel(target, list(options.items()))

    def on_stop(self) -> None:
        """Ends the connection."""
        self.channel.close()

    def measure(
        self,
        name: str,
        method: Callable[..., _T],
        request: Any,
        check: Callable[[_T], None] | None = None,
        *,
        refused_as: str | None = None,
    ) -> None:
        """Makes one call and reports it to locust.

        Args:
            name: the row of the report; the domain comes before it.
            method: a unary method of a stub.
            request: its message.
            check: raises WrongAnswer when the answer is not right.
            refused_as: the ErrorInfo reason with which the server must refuse; then OK is the error.
        """
        started = time.perf_counter()
        size, problem = 0, None
        try:
            answer = method(request, timeout=DEADLINE_SECONDS, metadata=self.metadata)
            elapsed = time.perf_counter() - started
            size = answer.ByteSize()  # type: ignore[attr-defined]
            if refused_as is not None:
                raise WrongAnswer(f"OK, expected {refused_as}")
            if check is not None:
                check(answer)
        except grpc.RpcError as error:
            elapsed = time.perf_counter() - started
            failed = to_call_failed(error, self.target)
            problem = None if failed.reason == refused_as else _named(failed)
        except WrongAnswer as error:
            problem = error
        self.environment.events.request.fire(
            request_type="grpc",
            name=f"{self.service}/{name}",
            response_time=elapsed * 1000,
            response_length=size,
            exception=problem,
            context={},
        )


def _named(failed: CallFailed) -> Exception:
    """The error as locust's report shows it: errors of one kind in one row."""
    return RuntimeError(f"{failed.code} {failed.reason}: {failed.message[:120]}")
