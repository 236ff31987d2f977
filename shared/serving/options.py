"""gRPC's options of every grpcio server of ours, and why each is set."""

from __future__ import annotations

from typing import Any

CONNECTION_AGE_MS = 5 * 60_000
"""After this, a caller that holds one connection opens another, so that new replicas get their share."""


def channel_options(max_message_bytes: int, *, connections_age: bool = True) -> list[tuple[str, Any]]:
    """gRPC's options of every grpcio server of ours.

    Args:
        max_message_bytes: limit of a request and of an answer.
        connections_age: whether connections end after CONNECTION_AGE_MS. Not behind a front of ours, which gains
            nothing by another connection and may lose the calls that it just sends.
    """
    age = [("grpc.max_connection_age_ms", CONNECTION_AGE_MS), ("grpc.max_connection_age_grace_ms", 60_000)]
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),  # two servers on one port would share it silently
        # gRPC remembers in HPACK's table that it could not read a header, and then refuses every call of that
        # connection that refers to the entry; the gateway's connection carries the calls of all callers
        ("grpc.http2.hpack_table_size.decoder", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        *(age if connections_age else ()),
    ]
