"""gRPC's options of every grpcio server of ours, and why each is set."""

from __future__ import annotations

from typing import Any


def channel_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    """gRPC's options of every grpcio server of ours."""
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.so_reuseport", 0),  # two servers on one port would share it silently
        # gRPC remembers in HPACK's table that it could not read a header, and then refuses every call of that
        # connection that refers to the entry; the gateway's connection carries the calls of all callers
        ("grpc.http2.hpack_table_size.decoder", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.max_connection_age_ms", 5 * 60_000),  # so that new replicas get their share
        ("grpc.max_connection_age_grace_ms", 60_000),
    ]
