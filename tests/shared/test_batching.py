"""The batcher against its rules: greedy, ordered, bounded, and what is dead never runs."""

import asyncio
import threading
import time

import numpy as np
import pytest

from shared.errors import DeadlinePassed, Overloaded
from shared.serving.batching import Batcher, BatchLimits, BatchObserver, ComputePool


class DoublingSession:
    """y = 2 x; every run waits for `gate`, and its batch size is kept."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.batches = []

    def run(self, feeds):
        self.batches.append(feeds["x"].shape[0])
        assert self.gate.wait(10)
        return {"y": feeds["x"] * 2}


class Notes(BatchObserver):
    def __init__(self):
        self.drops = []
        self.refused = 0

    def dropped(self, reason):
        self.drops.append(reason)

    def rejected(self, reason):
        self.refused += 1


class Bench:
    """A batcher with everything that a test wants to see."""

    def __init__(self, max_batch=4, queue_size=8, workers=1):
        self.session = DoublingSession()
        self.notes = Notes()
        self.pool = ComputePool(workers)
        self.batcher = Batcher(self.session, self.pool, BatchLimits(max_batch, queue_size), self.notes)

    async def call(self, value, rows=1, deadline=float("inf")):
        with self.batcher.admit():
            return await self.batcher.submit({"x": np.full((rows, 2), value, np.float32)}, deadline)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_every_caller_gets_its_own_rows():
    async def main():
        bench = Bench()
        results = await asyncio.gather(*(bench.call(value, rows=1 + value % 3) for value in range(7)))
        for value, result in enumerate(results):
            np.testing.assert_array_equal(result.outputs["y"], np.full((1 + value % 3, 2), 2 * value, np.float32))
        assert sum(bench.session.batches) == sum(1 + value % 3 for value in range(7))
        assert max(bench.session.batches) <= 4

    run(main())


def test_lonely_call_runs_at_once_and_waiting_calls_run_together():
    async def main():
        bench = Bench(max_batch=4)
        bench.session.gate.clear()
        first = asyncio.create_task(bench.call(1))
        await until(lambda: bench.session.batches == [1])
        rest = [asyncio.create_task(bench.call(value)) for value in range(6)]
        await until(lambda: bench.batcher.depth == 6)
        bench.session.gate.set()
        results = await asyncio.gather(first, *rest)
        assert bench.session.batches == [1, 4, 2]
        assert [result.batch_size for result in results] == [1, 4, 4, 4, 4, 2, 2]
        assert results[1].queue_seconds > 0

    run(main())


def test_different_shapes_never_share_a_batch():
    async def main():
        bench = Bench()

        async def wide(value):
            with bench.batcher.admit():
                return await bench.batcher.submit({"x": np.full((1, 3), value, np.float32)})

        bench.session.gate.clear()
        first = asyncio.create_task(bench.call(0))
        await until(lambda: bench.session.batches == [1])
        rest = [asyncio.create_task(call) for call in (bench.call(1), bench.call(2), wide(3), bench.call(4))]
        await until(lambda: bench.batcher.depth == 4)
        bench.session.gate.set()
        await asyncio.gather(first, *rest)
        assert bench.session.batches == [1, 2, 1, 1]

    run(main())


def test_request_larger_than_the_batch_runs_alone():
    async def main():
        bench = Bench(max_batch=4)
        result = await bench.call(3, rows=9)
        assert bench.session.batches == [9]
        assert result.outputs["y"].shape == (9, 2)

    run(main())


def test_capacity_is_exact_and_places_come_back():
    async def main():
        bench = Bench(max_batch=4, queue_size=8)
        bench.session.gate.clear()
        calls = [asyncio.create_task(bench.call(value)) for value in range(20)]
        await until(lambda: sum(task.done() for task in calls) == 8)
        refused = [task for task in calls if task.done()]
        assert all(isinstance(task.exception(), Overloaded) for task in refused)
        assert all(task.exception().retry_after > 0 for task in refused)
        assert bench.notes.refused == 8
        bench.session.gate.set()
        done = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(not isinstance(result, Exception) for result in done) == 12  # 8 in the queue and one batch of 4
        assert sum(bench.session.batches) == 12
        await asyncio.gather(*(bench.call(value) for value in range(12)))  # all places are free again

    run(main())


def test_cancelled_and_expired_items_never_run():
    async def main():
        bench = Bench(max_batch=1)
        bench.session.gate.clear()
        first = asyncio.create_task(bench.call(0))
        await until(lambda: bench.session.batches == [1])
        cancelled = asyncio.create_task(bench.call(1))
        expired = asyncio.create_task(bench.call(2, deadline=time.monotonic() + 0.02))
        last = asyncio.create_task(bench.call(3))
        await until(lambda: bench.batcher.depth == 3)
        cancelled.cancel()
        await asyncio.sleep(0.05)
        bench.session.gate.set()
        await asyncio.gather(first, last)
        with pytest.raises(DeadlinePassed):
            await expired
        assert cancelled.cancelled()
        assert bench.session.batches == [1, 1]  # first and last
        assert sorted(bench.notes.drops) == ["cancelled", "deadline"]

    run(main())


def test_a_failing_graph_answers_everyone_and_the_next_batch_runs():
    async def main():
        bench = Bench()
        good = bench.session.run

        def fail(feeds):
            raise RuntimeError("no such kernel")

        bench.session.run = fail
        results = await asyncio.gather(*(bench.call(value) for value in range(3)), return_exceptions=True)
        assert [str(result) for result in results] == ["no such kernel"] * 3
        bench.session.run = good
        assert (await bench.call(5)).outputs["y"][0, 0] == 10

    run(main())


def test_models_take_turns():
    async def main():
        bench = Bench(max_batch=1)
        other_session = DoublingSession()
        other = Batcher(other_session, bench.pool, BatchLimits(1, 8))
        order = []
        for session, name in ((bench.session, "a"), (other_session, "b")):
            inner = session.run
            session.run = lambda feeds, inner=inner, name=name: order.append(name) or inner(feeds)
        bench.session.gate.clear()
        calls = [asyncio.create_task(bench.call(0))]
        await until(lambda: order == ["a"])
        calls += [asyncio.create_task(bench.call(value)) for value in range(3)]

        async def call_other():
            with other.admit():
                return await other.submit({"x": np.zeros((1, 2), np.float32)})

        calls += [asyncio.create_task(call_other()) for _ in range(3)]
        await until(lambda: bench.batcher.depth == 3 and other.depth == 3)
        bench.session.gate.set()
        await asyncio.gather(*calls)
        assert order == ["a", "a", "b", "a", "b", "a", "b"]

    run(main())


def test_two_workers_run_two_batches_at_once():
    async def main():
        bench = Bench(max_batch=1, workers=2)
        bench.session.gate.clear()
        calls = [asyncio.create_task(bench.call(value)) for value in range(3)]
        await until(lambda: len(bench.session.batches) == 2)
        assert bench.batcher.depth == 1
        bench.session.gate.set()
        await asyncio.gather(*calls)

    run(main())


class ComputingSession(DoublingSession):
    """One that says that it only computes; keeps which threads ran it."""

    only_computes = True

    def __init__(self):
        super().__init__()
        self.threads, self.busy = [], 0.0

    def run(self, feeds):
        self.threads.append(threading.current_thread())
        end = time.thread_time() + self.busy
        while time.thread_time() < end:
            pass
        return super().run(feeds)


def test_what_is_quick_runs_without_a_thread_until_it_is_not():
    async def main():
        bench = Bench(workers=2)
        loop, session = threading.current_thread(), ComputingSession()
        bench.batcher._session = session
        assert (await bench.call(1)).outputs["y"].tolist() == [[2, 2]]
        assert session.threads[-1] is not loop, "nothing is known of it yet"
        while session.threads[-1] is not loop:
            await bench.call(1)
        session.busy = 0.01
        while session.threads[-1] is loop:
            await bench.call(1)
        assert session.threads.count(loop) < 10, "a slow one soon goes back to the threads"
        session.busy = 0.0
        while session.threads[-1] is not loop:
            await bench.call(1)
        with bench.batcher.admit():
            large = await bench.batcher.submit({"x": np.ones((1, 100_000), np.float32)})
        assert large.outputs["y"].shape == (1, 100_000)
        assert session.threads[-1] is not loop, "large inputs are never known to be quick"
        bench.pool.close()

    run(main())


def test_what_may_wait_never_runs_on_the_loop():
    async def main():
        bench = Bench()
        for _ in range(100):
            await bench.call(1)
        bench.session.gate.clear()
        waiting = asyncio.create_task(bench.call(1))
        await until(lambda: len(bench.session.batches) == 101)
        bench.session.gate.set()
        await waiting
        bench.pool.close()

    run(main())
