"""Bidirectional streams: several requests of one stream in work at once, each answer sent when it is ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

_Request = TypeVar("_Request")
_Answer = TypeVar("_Answer")


async def answer_concurrently(
    requests: AsyncIterator[_Request], answer: Callable[[_Request], Awaitable[_Answer]], limit: int
) -> AsyncIterator[_Answer]:
    """Answers every request of a stream, in the order in which the answers become ready.

    No more than `limit` requests are read ahead of the answers that the caller has taken, so a caller that sends but
    does not read is held back by flow control instead of filling memory.

    Args:
        requests: the stream.
        answer: answers one request; what it raises ends the stream.
        limit: requests in work and answers not yet taken, together.
    """
    ready: asyncio.Queue[asyncio.Task[_Answer] | None] = asyncio.Queue()
    places = asyncio.Semaphore(limit)
    running: set[asyncio.Task[_Answer]] = set()

    async def work(request: _Request) -> _Answer:
        return await answer(request)

    async def read() -> None:
        async for request in requests:
            await places.acquire()
            task = asyncio.create_task(work(request))
            running.add(task)
            task.add_done_callback(running.discard)
            task.add_done_callback(ready.put_nowait)
        while running:
            await asyncio.wait(running)
        ready.put_nowait(None)

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda task: ready.put_nowait(None))  # also when reading fails
    try:
        while (task := await ready.get()) is not None:
            yield task.result()
            places.release()
        await reader
    finally:
        reader.cancel()
        for task in running:
            task.cancel()


async def answer_in_order(
    requests: AsyncIterator[_Request], answer: Callable[[_Request], Awaitable[_Answer]], limit: int
) -> AsyncIterator[_Answer]:
    """Answers every request of a stream, in the order of the requests; else as `answer_concurrently`."""
    tasks: asyncio.Queue[asyncio.Task[_Answer] | None] = asyncio.Queue()
    places = asyncio.Semaphore(limit)
    running: set[asyncio.Task[_Answer]] = set()

    async def work(request: _Request) -> _Answer:
        return await answer(request)

    async def read() -> None:
        try:
            async for request in requests:
                await places.acquire()
                task = asyncio.create_task(work(request))
                running.add(task)
                tasks.put_nowait(task)
        finally:
            tasks.put_nowait(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await tasks.get()) is not None:
            yield await task
            running.discard(task)
            places.release()
        await reader
    finally:
        reader.cancel()
        for task in running:
            task.cancel()
