"""Lower priority for the copies of calls: a copy begins only when no live call waits, and few run at once.

A copy that has begun is not interrupted, so a live call waits for at most one run of the shadowed graph.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shared.serving.batching import ComputePool
from shared.serving.traffic import ShadowDropped

MAX_WAITING = 32
MAX_WAIT_SECONDS = 5.0


class ShadowGate:
    """Lets copies in while the pool is idle: at most half as many at once as there are threads, at least one.

    Args:
        pool: the threads.
    """

    def __init__(self, pool: ComputePool) -> None:
        self._pool = pool
        self._turns = asyncio.Semaphore(max(1, pool.workers // 2))
        self._waiting = 0

    async def enter(self) -> Callable[[], None]:
        """Waits for its turn and for an idle thread.

        Returns:
            What the copy calls at its end.

        Raises:
            ShadowDropped: too many copies wait, or this one waited too long.
        """
        if self._waiting >= MAX_WAITING:
            raise ShadowDropped(f"{MAX_WAITING} copies of calls wait already")
        self._waiting += 1
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await self._turns.acquire()
                try:
                    await self._pool.wait_idle()
                except BaseException:
                    self._turns.release()
                    raise
        except TimeoutError as error:
            raise ShadowDropped(f"live calls came first for {MAX_WAIT_SECONDS:.0f} s") from error
        finally:
            self._waiting -= 1
        return self._turns.release
