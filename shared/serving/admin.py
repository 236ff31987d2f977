"""Who may control a server: without keys, only callers on the same machine."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import unquote

from shared.errors import PermissionRefused


def require_admin(context: Any) -> None:
    """Refuses callers that are not on the loopback interface.

    The gateway lets admin methods through from its own machine only, and in containers it is itself no loopback caller.

    Raises:
        PermissionRefused: the caller comes from elsewhere.
    """
    if not is_loopback(context.peer()):
        raise PermissionRefused(
            "this method needs the admin role; no keys are set, so it is open to callers on the same machine only"
        )


def is_loopback(peer: str) -> bool:
    """Whether a gRPC peer string (`ipv4:127.0.0.1:5`, `ipv6:%5B::1%5D:5`) is this machine.

    A Unix socket (`unix:`) is not: the native front forwards some calls over one, whoever made them.
    """
    _, _, address = unquote(peer).partition(":")
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
