"""The error tree, each class with its gRPC code; raised where detected, mapped to a rich status once.

    UsagiError
    ├── InvalidInput            INVALID_ARGUMENT     the caller's message is wrong; names the field
    ├── ModelNotFound           NOT_FOUND            no such model, version or variant; lists what there is
    ├── ModelUnavailable        FAILED_PRECONDITION  it exists, but is corrupt or unloaded
    ├── ProviderUnavailable     FAILED_PRECONDITION  the execution provider asked for does not run the graph
    ├── Overloaded              RESOURCE_EXHAUSTED   the queue is full; says when to come back
    │   └── ModelMemoryFull     RESOURCE_EXHAUSTED   every model in memory is in use, so no other can be loaded now
    ├── MessageTooLarge         RESOURCE_EXHAUSTED   a request or an answer over the limit of one message
    ├── DeadlinePassed          DEADLINE_EXCEEDED    too late before the work began
    ├── Unauthenticated         UNAUTHENTICATED      needs an API key
    ├── PermissionRefused       PERMISSION_DENIED    needs the admin role
    ├── NotSupported            UNIMPLEMENTED        known to the protocol, not to this server
    ├── Unreachable             UNAVAILABLE          draining, or a dependency is down
    └── ConfigurationError      (never crosses gRPC) the environment or a file is wrong; the process ends with it

The tree knows gRPC's codes by name only, so that training and tools can raise these errors too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

DOMAIN = "usagi.dev"
"""Suffix of the `domain` in google.rpc.ErrorInfo; a service prepends its own name."""


class UsagiError(Exception):
    """Base of every error that Usagi raises on purpose.

    Args:
        message: what is wrong, what was expected, what to do.
        metadata: the values that vary, by name, so that programs need not parse the message.
    """

    code = "INTERNAL"
    """Name of the gRPC status code."""
    reason = "INTERNAL"
    """google.rpc.ErrorInfo.reason: UPPER_SNAKE_CASE, stable, for programs."""

    def __init__(self, message: str, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})


class InvalidInput(UsagiError):
    """The caller's message is wrong. `field` is its path in the request, such as `image` or `inputs[0]`."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_INPUT"

    def __init__(self, field: str, description: str, *, reason: str | None = None) -> None:
        super().__init__(f"{field}: {description}", metadata={"field": field})
        self.field = field
        self.description = description
        if reason is not None:
            self.reason = reason


class ModelNotFound(UsagiError):
    """No such model, version or variant. `field` is the request's field that named it."""

    code = "NOT_FOUND"
    reason = "MODEL_NOT_FOUND"

    def __init__(self, field: str, name: str, known: list[str]) -> None:
        listing = ", ".join(known) if known else "none"
        super().__init__(
            f"{field} `{name}` does not exist here; known: {listing}",
            metadata={"field": field, "name": name, "known": ",".join(known)[:512]},
        )
        self.field = field
        self.name = name
        self.reason = {"version": "VERSION_NOT_FOUND", "variant": "VARIANT_NOT_FOUND"}.get(field, self.reason)


class ModelUnavailable(UsagiError):
    """The model exists but cannot answer: corrupt, or unloaded."""

    code = "FAILED_PRECONDITION"
    reason = "MODEL_UNAVAILABLE"


class ProviderUnavailable(UsagiError):
    """A graph would run on another processor than the configuration allows."""

    code = "FAILED_PRECONDITION"
    reason = "PROVIDER_UNAVAILABLE"


class Overloaded(UsagiError):
    """The bounded queue is full. `retry_after` is the suggested delay in seconds."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"

    def __init__(self, message: str, *, retry_after: float, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message, metadata=metadata)
        self.retry_after = retry_after


class ModelMemoryFull(Overloaded):
    """The memory for models is taken by models in use."""

    reason = "MODEL_MEMORY_FULL"


class MessageTooLarge(UsagiError):
    """A message of `size` bytes where `limit` are allowed."""

    code = "RESOURCE_EXHAUSTED"
    reason = "MESSAGE_TOO_LARGE"

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            f"a message of {size} bytes, expected at most {limit}; send less at once, or raise USAGI_MAX_MESSAGE_BYTES",
            metadata={"size": str(size), "limit": str(limit)},
        )


class DeadlinePassed(UsagiError):
    """The caller's deadline passed before the work began, so it was dropped."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_PASSED"


class Unauthenticated(UsagiError):
    """The call needs an API key, and the caller sent none that is known."""

    code = "UNAUTHENTICATED"
    reason = "KEY_UNKNOWN"


class PermissionRefused(UsagiError):
    """The method needs a role that the caller does not have."""

    code = "PERMISSION_DENIED"
    reason = "ADMIN_ONLY"


class NotSupported(UsagiError):
    """The protocol knows this, this server does not."""

    code = "UNIMPLEMENTED"
    reason = "NOT_SUPPORTED"


class Unreachable(UsagiError):
    """The server drains, or something it needs is down."""

    code = "UNAVAILABLE"
    reason = "UNREACHABLE"


class ConfigurationError(UsagiError):
    """The environment or a file that the process needs is wrong; raised at start, before any call."""

    code = "FAILED_PRECONDITION"
    reason = "CONFIGURATION"


def code_of(error: BaseException) -> str:
    """Name of the gRPC code with which an error ends a call."""
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return "CANCELLED"
    return error.code if isinstance(error, UsagiError) else "INTERNAL"
