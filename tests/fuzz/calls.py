"""One call of the attack: what is sent, how, and what came back. A call is a file too, so that it can be sent again."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import http.client
import json
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf import json_format
from google.rpc import code_pb2, error_details_pb2, status_pb2

from tests.fuzz.messages import mutated, request_bytes, valid
from tests.fuzz.methods import Method

GRPC, WEB, JSON = "grpc", "grpc-web", "json"
PATIENCE = 30.0
"""Deadline of most calls, in seconds: nothing here takes long, so whoever reaches it hangs."""
COMPRESSIONS = {"gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate}
THREADS = 16
DETAILS = "grpc-status-details-bin"
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0)]
"""Of the client: nothing that hides what the server does; the limit of metadata is the one that every client has."""


@dataclass(frozen=True)
class Call:
    """What is sent. `messages` has one entry, or any number for a stream; of JSON it is the body."""

    index: int
    method: str
    way: str
    done: str
    messages: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    timeout: float = PATIENCE
    compression: str = ""

    def save(self, path: Path, **about: object) -> None:
        """Writes the call, and what is known about it, as JSON."""
        entry = {**dataclasses.asdict(self), **about}
        entry["messages"] = [base64.b64encode(message).decode() for message in self.messages]
        entry["metadata"] = [
            [key, value if isinstance(value, str) else {"base64": base64.b64encode(value).decode()}]
            for key, value in self.metadata
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entry, indent=1))

    @classmethod
    def load(cls, path: Path) -> tuple[Call, dict[str, Any]]:
        """Reads what `save` wrote: the call, and what was known about it."""
        about = json.loads(path.read_text())
        fields = {field.name: about.pop(field.name) for field in dataclasses.fields(cls)}
        fields["messages"] = tuple(base64.b64decode(message) for message in fields["messages"])
        fields["metadata"] = tuple(
            (key, value if isinstance(value, str) else base64.b64decode(value["base64"]))
            for key, value in fields["metadata"]
        )
        return cls(**fields), about


@dataclass(frozen=True)
class Outcome:
    """What came back: the name of the gRPC code, the rich status if there is one, and the messages of the answer."""

    code: str
    message: str = ""
    status: status_pb2.Status | None = None
    answers: tuple[bytes, ...] = ()

    @property
    def reason(self) -> str:
        """ErrorInfo.reason; empty without one."""
        info = error_details_pb2.ErrorInfo()
        for detail in self.status.details if self.status else ():
            if detail.Unpack(info):
                return info.reason
        return ""


Metadata = tuple[tuple[str, str | bytes], ...]


def make_call(method: Method, index: int, seed: int, way: str, metadata: Metadata = ()) -> Call:
    """Call number `index` of the attack `seed`, the same for ever; `metadata` goes with it in any case."""
    rng = random.Random(f"{seed}/{index}")
    if way == JSON:
        done, body = _json_body(method, rng)
        return Call(index, method.path, way, done, (body,), metadata)
    count = rng.choice((0, 1, 1, 2, 5)) if method.client_streaming and way == GRPC else 1
    made = [request_bytes(method.request, rng) for _ in range(count)]
    timeout = PATIENCE
    if method.path.endswith("/Watch"):  # it never ends by itself
        timeout = 0.1
    elif rng.random() < 0.03:
        timeout = rng.choice((0.001, 0.005, 0.02))
    return Call(
        index,
        method.path,
        way,
        ", ".join(dict.fromkeys(done for done, _ in made)) or "nothing sent",
        tuple(message for _, message in made),
        metadata + (_metadata(rng) if rng.random() < 0.15 else ()),
        timeout,
        rng.choice(("gzip", "deflate")) if rng.random() < 0.02 and way == GRPC else "",
    )


def _metadata(rng: random.Random) -> Metadata:
    choices: tuple[Metadata, ...] = (
        (("x-request-id", "r" * rng.choice((1, 129, 3_000))),),
        (("x-request-id", '"; DROP'), ("x-request-id", "twice")),
        (("traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"),),
        (("traceparent", f"00-{rng.randbytes(16).hex()}-{rng.randbytes(8).hex()}-01"), ("tracestate", "x=" * 200)),
        (("traceparent", "zz-nothing"),),
        (("noise-bin", rng.randbytes(rng.choice((0, 1, 1_000)))),),
        (("traceparent-bin", rng.randbytes(20)), ("x-request-id-bin", rng.randbytes(20))),
        tuple((f"many-{number}", "x") for number in range(60)),
        (("usagi-versions", rng.choice(("colours=2/1", "colours=", "=,=,/", "colours=" + "9" * 500))),),
        (("triton_grpc_error", "true"),),
        (("accept-encoding", "gzip"), ("user-agent", "\x7e" * 100)),
    )
    return rng.choice(choices)


def _json_body(method: Method, rng: random.Random) -> tuple[str, bytes]:
    if rng.random() < 0.1:
        return "random bytes", rng.randbytes(rng.randrange(200))
    message = valid(method.request, rng)
    if rng.random() < 0.6:
        message = mutated(message, rng)
    text = json_format.MessageToJson(message, indent=None)
    if rng.random() < 0.6:
        return "JSON", text.encode()
    place = rng.randrange(len(text) + 1)
    wedge = rng.choice(('"', "{", "}", "[" * 200, ",", "null", "\\", "1e999", "-", "\ud83d", '{"a":' * 300, "\0", ":"))
    return "damaged JSON", (text[:place] + wedge + text[place + rng.randrange(3) :]).encode(errors="surrogatepass")


# Sending


class Sender:
    """Sends calls to one address.

    Args:
        target: a server's or the gateway's `host:port`.
        methods: all methods by path, which say who streams.
    """

    def __init__(self, target: str, methods: dict[str, Method]) -> None:
        self._target, self._methods = target, methods
        self._channel = grpc.aio.insecure_channel(target, options=OPTIONS)
        self._threads = ThreadPoolExecutor(THREADS)
        self._blocking_channel = grpc.insecure_channel(target, options=OPTIONS)

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()
        self._threads.shutdown()
        self._blocking_channel.close()

    async def send(self, call: Call) -> Outcome:
        """Sends a call and waits for its answer; never raises for what the server does."""
        method = self._methods[call.method]
        blocking = {JSON: self._send_json, WEB: self._send_web}.get(call.way)
        if blocking is None and not (method.client_streaming or method.server_streaming):
            return await self._send_unary(call)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, blocking or self._send_stream, call)

    async def _send_unary(self, call: Call) -> Outcome:
        try:
            answer = await self._channel.unary_unary(call.method)(call.messages[0], **_arguments(call))
        except grpc.aio.AioRpcError as error:
            return _refused(error)
        return Outcome("OK", answers=(answer,))

    def _send_stream(self, call: Call) -> Outcome:
        """By a blocking client: grpc.aio's own calls it an internal error when a stream ends while it still writes."""
        method = self._methods[call.method]
        request = iter(call.messages) if method.client_streaming else call.messages[0]
        channel = self._blocking_channel
        begin = channel.stream_stream if method.client_streaming else channel.unary_stream
        if not method.server_streaming:
            begin = channel.stream_unary
        answers: list[bytes] = []
        try:
            answered = begin(call.method)(request, **_arguments(call))
            for answer in answered if method.server_streaming else [answered]:
                answers.append(answer)
        except grpc.RpcError as error:
            return _refused(error, tuple(answers))
        return Outcome("OK", answers=tuple(answers))

    def _send_json(self, call: Call) -> Outcome:
        code, _, body = self._http(call, call.messages[0], {"content-type": "application/json"})
        if code == 200:
            return Outcome("OK", answers=(body,))
        status = status_pb2.Status()
        with contextlib.suppress(json_format.ParseError, UnicodeDecodeError):
            json_format.Parse(body.decode(), status)
        name = code_pb2.Code.Name(status.code) if status.code else f"HTTP_{code}"
        return Outcome(name, status.message or body[:200].decode(errors="replace"), status)

    def _send_web(self, call: Call) -> Outcome:
        message = call.messages[0]
        frame = struct.pack(">BI", 0, len(message)) + message
        headers = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
        if call.timeout < PATIENCE:
            headers["grpc-timeout"] = f"{int(call.timeout * 1000)}m"
        code, trailers, body = self._http(call, frame, headers)
        answers = []
        while len(body) >= 5:
            flags, length = struct.unpack(">BI", body[:5])
            if flags & 0x80:
                lines = body[5 : 5 + length].decode(errors="replace").split("\r\n")
                trailers.update(line.split(":", 1) for line in lines if ":" in line)  # type: ignore[arg-type]
            else:
                answers.append(body[5 : 5 + length])
            body = body[5 + length :]
        if "grpc-status" not in trailers:
            return Outcome(f"HTTP_{code}", "no grpc-status")
        details = trailers.get(DETAILS, "")
        status = _status(base64.b64decode(details + "=" * (-len(details) % 4))) if details else None
        name = code_pb2.Code.Name(int(trailers["grpc-status"]))
        return Outcome(name, trailers.get("grpc-message", ""), status, tuple(answers))

    def _http(self, call: Call, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        host, port = self._target.rsplit(":", 1)
        connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
        headers.update({key: value for key, value in call.metadata if isinstance(value, str)})
        try:
            connection.request("POST", call.method, body, headers)
            response = connection.getresponse()
            return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()
        except (OSError, http.client.HTTPException) as error:
            return 0, {}, repr(error).encode()
        finally:
            connection.close()


def _arguments(call: Call) -> dict[str, Any]:
    return {"timeout": call.timeout, "metadata": call.metadata, "compression": COMPRESSIONS.get(call.compression)}


def _refused(error: Any, answers: tuple[bytes, ...] = ()) -> Outcome:
    status = _status(dict(error.trailing_metadata() or ()).get(DETAILS))
    return Outcome(error.code().name, error.details() or "", status, answers)


def _status(details: Any) -> status_pb2.Status | None:
    if not details:
        return None
    try:
        return status_pb2.Status.FromString(details)
    except Exception:
        return None


def fingerprint(text: str) -> str:
    """Short, and the same for the same text."""
    return f"{zlib.crc32(text.encode()):08x}"
