"""Who may control a server: callers whose key has the role admin; where no keys are set, those on the same machine.

The gateway has looked at the key before, and hands it on for these methods alone. The server looks again, so that
reaching its port is not enough: another container on its network, or a gateway without keys, cannot control it.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from shared.api_keys import KeyFile, bearer_of, find_key
from shared.errors import ConfigurationError, PermissionRefused, Unauthenticated
from shared.roles import ADMIN, NEEDS_ADMIN

Handler = Any  # grpc.RpcMethodHandler has no usable type


class AdminGate:
    """What stands before the administrative methods (shared/roles.py).

    Args:
        keys_file: file of the API keys; empty for none. It is read at each call: these are few, and a key that was
            revoked must not work once more.
        required: a missing file lets nobody in.
    """

    def __init__(self, keys_file: str = "", *, required: bool = False) -> None:
        self._file = KeyFile(Path(keys_file)) if keys_file else None
        self._required = required

    def require(self, context: Any) -> None:
        """Lets a caller pass or not.

        Raises:
            Unauthenticated: keys are set, and the caller has none of them.
            PermissionRefused: the key has another role; or none are set, and the caller is on another machine.
        """
        if not (self._required or (self._file is not None and self._file.exists())):
            if not is_loopback(context.peer()):
                raise PermissionRefused(NEEDS_ADMIN)
            return
        sent = [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]
        key = find_key(self._keys(), bearer_of(sent[0])) if len(sent) == 1 else None
        if key is None:
            raise Unauthenticated("this method needs an API key that is known here, as `authorization: Bearer KEY`")
        if key.role != ADMIN:
            raise PermissionRefused(NEEDS_ADMIN)

    def _keys(self) -> Any:
        if self._file is None:
            return ()
        try:
            return self._file.load()
        except ConfigurationError as error:
            raise PermissionRefused(f"nobody can be told to be an admin: {error.message}") from error

    def guard(self, handler: Handler) -> Handler:
        """The unary handler behind the gate."""
        behaviour = handler.unary_unary

        async def call(request: Any, context: Any) -> Any:
            self.require(context)
            return await behaviour(request, context)

        return grpc.unary_unary_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)


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
