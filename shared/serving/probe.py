"""Health probe for containers: one gRPC Check over a bare socket. `python -I -S probe.py 127.0.0.1:50051 [service]`

Importing gRPC costs 0.1 CPU-seconds, and a probe runs every few seconds in every container. So this file needs neither
site-packages nor the rest of Usagi, and speaks just enough HTTP/2 (RFC 9113) for the one call: it sends everything at
once, with headers that use no compression state, and then looks for the reply's first message.

Exit codes: 0 SERVING, 1 another health, 2 no answer within a second.
"""

import socket
import struct
import sys
import time

SERVING_CODE, OTHER_CODE, UNREACHABLE_CODE = 0, 1, 2
TIMEOUT_SECONDS = 1.0

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
FRAME_HEADER_BYTES = 9
MESSAGE_PREFIX_BYTES = 5
SERVING_REPLY = b"\x08\x01"
"""grpc.health.v1.HealthCheckResponse with status = SERVING."""


def probe(host: str, port: int, service: str = "", timeout: float = TIMEOUT_SECONDS) -> int:
    """Asks for the health of `service` once.

    Args:
        host: name or address of the server.
        port: its gRPC port.
        service: full name of a gRPC service; empty asks for the server as a whole.
        timeout: seconds for everything.

    Returns:
        The exit code.
    """
    deadline = time.monotonic() + timeout
    try:
        with socket.create_connection((host, port), timeout=timeout) as connection:
            connection.sendall(request(f"{host}:{port}", service))
            return _answer(connection, deadline)
    except (OSError, EOFError):
        return UNREACHABLE_CODE


def request(authority: str, service: str) -> bytes:
    """The bytes of the whole call: preface, settings, headers and message of stream 1."""
    name = service.encode()
    message = b"\x0a" + bytes([len(name)]) + name if name else b""
    headers = b"".join(
        _literal(key, value)
        for key, value in (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/grpc.health.v1.Health/Check"),
            (":authority", authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        )
    )
    return (
        PREFACE
        + _frame(SETTINGS, 0, 0, b"")
        + _frame(HEADERS, END_HEADERS, 1, headers)
        + _frame(DATA, END_STREAM, 1, struct.pack(">BI", 0, len(message)) + message)
    )


def _literal(name: str, value: str) -> bytes:
    """HPACK's literal without indexing and without Huffman coding (RFC 7541, 6.2.2); lengths below 127."""
    return b"\x00" + b"".join(bytes([len(text)]) + text for text in (name.encode(), value.encode()))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _answer(connection: socket.socket, deadline: float) -> int:
    """Reads frames until the reply's message, or until its stream ends without one."""
    body = b""
    while True:
        header = _read(connection, FRAME_HEADER_BYTES, deadline)
        length = int.from_bytes(header[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", header[3:])
        payload = _read(connection, length, deadline)
        if kind == SETTINGS and not flags & ACK:
            connection.sendall(_frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            connection.sendall(_frame(PING, ACK, 0, payload))
        elif kind == GOAWAY or (kind == RST_STREAM and stream == 1):
            return UNREACHABLE_CODE
        elif kind == DATA and stream == 1:
            body += payload
            if len(body) >= MESSAGE_PREFIX_BYTES + len(SERVING_REPLY):
                return SERVING_CODE if body[MESSAGE_PREFIX_BYTES:] == SERVING_REPLY else OTHER_CODE
        if kind in (DATA, HEADERS) and stream == 1 and flags & END_STREAM:
            return OTHER_CODE  # an error without a message, such as NOT_FOUND for an unknown service


def _read(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def main() -> int:
    """Reads `host:port` and the service's name from the command line."""
    if len(sys.argv) not in (2, 3):
        print("usage: probe.py host:port [service]", file=sys.stderr)
        return UNREACHABLE_CODE
    host, _, port = sys.argv[1].rpartition(":")
    return probe(host.strip("[]"), int(port), "".join(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
