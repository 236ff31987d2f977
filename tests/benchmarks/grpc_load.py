"""The grpc.aio load generator: one process, started by generators.py; prints one line of JSON.

In the open loop a call's time counts from the moment at which it was due, so a server that falls behind shows it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import uvloop

from tests.benchmarks.calls import Call

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Generator:
    """Sends one call `count` times and keeps the times."""

    def __init__(self, call: Call, count: int, inflight: int) -> None:
        self._call, self._left, self._inflight = call, count, inflight
        self._metadata = tuple(call.headers.items())
        self.latencies: list[float] = []
        self.failed = self.reply_bytes = 0

    async def closed(self, channel: grpc.aio.Channel) -> None:
        """`inflight` callers, each with one call after the other."""
        stub = channel.unary_unary(self._call.path)
        await asyncio.gather(*(self._caller(stub) for _ in range(self._inflight)))

    async def _caller(self, stub: grpc.aio.UnaryUnaryMultiCallable) -> None:
        while self._left > 0:
            self._left -= 1
            await self._one(stub, time.perf_counter())

    async def _one(self, stub: grpc.aio.UnaryUnaryMultiCallable, began: float) -> None:
        try:
            reply = await stub(self._call.body, metadata=self._metadata)
        except grpc.aio.AioRpcError:
            self.failed += 1
        else:
            self.latencies.append(time.perf_counter() - began)
            self.reply_bytes += len(reply)

    async def open(self, channel: grpc.aio.Channel, rate: float) -> None:
        """One call every 1 / rate seconds, whatever the server does; beyond `inflight` they wait, and that counts."""
        stub, places = channel.unary_unary(self._call.path), asyncio.Semaphore(self._inflight)
        start, tasks = time.perf_counter(), []

        async def one(due: float) -> None:
            async with places:
                await self._one(stub, due)

        for number in range(self._left):
            due = start + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)

    async def stream(self, channel: grpc.aio.Channel) -> None:
        """`inflight` messages of one bidirectional stream at a time, answered in order."""
        places, sent = asyncio.Semaphore(self._inflight), []

        async def messages() -> AsyncIterator[bytes]:
            while self._left > 0:
                self._left -= 1
                await places.acquire()
                sent.append(time.perf_counter())
                yield self._call.body

        stub = channel.stream_stream(self._call.path)
        async for reply in stub(messages(), metadata=self._metadata):
            self.latencies.append(time.perf_counter() - sent[len(self.latencies)])
            self.reply_bytes += len(reply)
            places.release()


async def main(options: argparse.Namespace) -> None:
    """Runs and reports."""
    call = Call.load(options.call)
    generator = Generator(call, options.count, options.inflight)
    async with grpc.aio.insecure_channel(call.target, options=OPTIONS) as channel:
        await channel.channel_ready()
        cpu, start = time.process_time(), time.perf_counter()
        if options.stream:
            await generator.stream(channel)
        elif options.rate:
            await generator.open(channel, options.rate)
        else:
            await generator.closed(channel)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    succeeded = len(generator.latencies)
    answer = {"succeeded": succeeded, "failed": generator.failed, "seconds": seconds, "cpu_seconds": cpu}
    answer["reply_bytes"] = generator.reply_bytes / max(1, succeeded)
    print(json.dumps({**answer, "latencies": generator.latencies}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("call", type=Path)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--inflight", type=int, required=True)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--stream", action="store_true")
    uvloop.run(main(parser.parse_args()))
