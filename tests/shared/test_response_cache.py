"""The response cache and the batcher behind it: against a naive oracle, and with callers that leave."""

import asyncio
import collections
import random
import threading
import time
import tracemalloc

import numpy as np
import pytest

from shared.errors import DeadlinePassed
from shared.serving.batching import Batcher, BatchLimits, BatchObserver, ComputePool
from shared.serving.cached_batching import CachedBatcher
from shared.serving.response_cache import ENTRY_BYTES, ResponseCache, answer_of, digest_of


def test_digests_differ_with_everything_that_counts_and_with_nothing_else():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    unlike = [
        *({"x": x}, {"y": x}, {"x": x + 1}, {"x": x.reshape(3, 2)}, {"x": x.view(np.int32)}, {"x": x.astype("f8")}),
        *({"x": x, "y": x}, {"x": x[:1]}, {"x": x[:0]}, {"x": x[:0].T}, {"x": np.float32(1).reshape(())}),
        {"x": np.array([["ab", "c"]], object)},
        {"x": np.array([["a", "bc"]], object)},
        {"x": np.array([["", "abc"]], object)},
        {"x": np.array([["abc"]], object)},
    ]
    assert len({digest_of(feeds) for feeds in unlike}) == len(unlike)
    assert digest_of({"x": x, "y": x + 1}) == digest_of({"y": x + 1, "x": x})
    wide = np.zeros((2, 6), np.float32)
    wide[:, ::2] = x
    for layout in (np.asfortranarray(x), wide[:, ::2], x[::-1][::-1]):
        assert digest_of({"x": layout}) == digest_of({"x": x})


def test_the_least_recently_used_go_first():
    draws = random.Random(1)
    answers = [answer_of({"y": np.zeros(draws.randrange(0, 2000), np.uint8)}, 1) for _ in range(40)]
    evicted = [0, 0]
    cache = ResponseCache(20_000)
    sections = [cache.section(lambda n=n: evicted.__setitem__(n, evicted[n] + 1)) for n in (0, 1)]
    oracle, gone = collections.OrderedDict(), [0, 0]
    for step in range(5000):
        number, index = draws.randrange(2), draws.randrange(len(answers))
        key, digest = (number, index), str(index).encode()
        if step == 2500:
            sections[0].drop()
            sections[0].store(b"late", answers[0])
            assert sections[0].find(b"late") is None
            sections[0] = cache.section(lambda: evicted.__setitem__(0, evicted[0] + 1))
            for old in [old for old in oracle if old[0] == 0]:
                del oracle[old]
        found = sections[number].find(digest)
        assert (found is not None) == (key in oracle)
        if found is not None:
            assert found is answers[index]
            oracle.move_to_end(key)
            continue
        sections[number].store(digest, answers[index])
        while sum(answers[i].bytes for _, i in oracle) + answers[index].bytes > cache.limit:
            gone[oracle.popitem(last=False)[0][0]] += 1
        oracle[key] = None
        assert cache.bytes == sum(answers[i].bytes for _, i in oracle) <= cache.limit
        for n in (0, 1):
            assert sections[n].bytes == sum(answers[i].bytes for m, i in oracle if m == n)
    assert evicted == gone
    assert min(gone) > 100
    size = len(cache)
    sections[1].store(b"huge", answer_of({"y": np.zeros(30_000, np.uint8)}, 1))
    assert (sections[1].find(b"huge"), len(cache)) == (None, size), "what is larger than all there is evicts nothing"


def test_what_an_entry_takes_is_counted():
    tracemalloc.start()
    cache = ResponseCache(10**9)
    section = cache.section(lambda: None)
    before = tracemalloc.get_traced_memory()[0]
    for number in range(1000):
        feeds = {"x": np.full((1, 4), number, np.float32)}
        section.store(digest_of(feeds), answer_of({"y": np.zeros((1, 250), np.float32), "z": np.zeros(1)}, 1))
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert cache.bytes == 1000 * (ENTRY_BYTES + 1008)
    assert 0.75 * cache.bytes < grown <= cache.bytes


class Session:
    """y = 2x, or an error for negative numbers; runs while `gate` is open and counts."""

    def __init__(self):
        self.gate = threading.Event()
        self.gate.set()
        self.runs = []

    def run(self, feeds):
        self.runs.append(feeds["x"][:, 0].tolist())
        assert self.gate.wait(20)
        if (feeds["x"] < 0).any():
            raise ValueError("negative")
        return {"y": feeds["x"] * 2}


class Observer(BatchObserver):
    def __init__(self):
        self.counts = collections.Counter()

    def dropped(self, reason):
        self.counts[reason] += 1

    def cached(self, call, kind, batch_size, lookup_seconds, queue_seconds):
        self.counts[kind] += 1

    def missed(self, seconds):
        assert 0 < seconds < 1
        self.counts["miss"] += 1


class World:
    def __init__(self, max_batch=4, limit=10**6):
        self.session, self.observer, self.pool = Session(), Observer(), ComputePool(1)
        limits = BatchLimits(max_batch=max_batch, queue_size=1000)
        self.cache = ResponseCache(limit)
        plain = Batcher(self.session, self.pool, limits, self.observer)
        self.batcher = plain.renewed(CachedBatcher).keep_in(self.cache.section(self.observer.forgotten))

    async def ask(self, value, deadline=float("inf")):
        with self.batcher.admit():
            return await self.batcher.submit({"x": np.full((1, 2), value, np.float32)}, deadline)

    def idle(self):
        batcher = self.batcher
        return not (batcher._flights or batcher._flight_of or batcher._queue or batcher._admitted)

    async def blocked(self):
        """The only thread is busy with 100 until the gate opens."""
        self.session.gate.clear()
        task = asyncio.create_task(self.ask(100))
        while not self.session.runs:
            await asyncio.sleep(0.001)
        return task


def in_world(test, **options):
    async def main():
        world = World(**options)
        try:
            await test(world)
            assert world.idle()
        finally:
            world.session.gate.set()
            world.pool.close()

    asyncio.run(asyncio.wait_for(main(), 30))


async def tasks(*coroutines):
    made = [asyncio.create_task(coroutine) for coroutine in coroutines]
    await asyncio.sleep(0.01)
    return made


def test_what_was_answered_is_not_run_again():
    async def test(world):
        first = await world.ask(3)
        first.outputs["y"][:] = 0  # an answer belongs to who got it
        second = await world.ask(3)
        assert second.outputs["y"].tolist() == [[6, 6]]
        assert (first.cached, second.cached) == (False, True)
        assert (second.queue_seconds, second.infer_seconds, second.batch_size) == (0.0, 0.0, 1)
        with pytest.raises(ValueError, match="read-only"):
            second.outputs["y"][:] = 0
        assert world.session.runs == [[3.0]]
        assert world.observer.counts == {"hit": 1, "miss": 1}

    in_world(test)


def test_the_same_question_at_once_runs_once():
    async def test(world):
        blocker = await world.blocked()
        asking = await tasks(*(world.ask(value) for value in (1, 2, 1, 1, 2)))
        world.session.gate.set()
        results = await asyncio.gather(*asking)
        assert [result.outputs["y"][0, 0] for result in results] == [2, 4, 2, 2, 4]
        assert [result.cached for result in results] == [False, False, True, True, True]
        assert {result.batch_size for result in results} == {2}
        assert all(result.queue_seconds > 0 for result in results)
        assert world.session.runs == [[100], [1, 2]]
        assert world.observer.counts == {"miss": 3, "shared": 3}
        await blocker

    in_world(test)


@pytest.mark.parametrize("running", [False, True])
def test_a_leader_that_leaves_fails_nobody(running):
    async def test(world):
        blocker = None if running else await world.blocked()
        world.session.gate.clear()
        leader, follower, other = await tasks(world.ask(1), world.ask(1), world.ask(1))
        leader.cancel()
        await asyncio.sleep(0.01)
        world.session.gate.set()
        results = [await follower, await other]
        assert [result.outputs["y"][0, 0] for result in results] == [2, 2]
        assert [result.cached for result in results] == [False, True]
        assert leader.cancelled()
        assert world.observer.counts["cancelled"] == 0, "the run was not dropped"
        if blocker:
            await blocker

    in_world(test)


def test_when_all_left_nothing_runs_and_a_run_that_began_is_kept():
    async def test(world):
        blocker = await world.blocked()
        first, second = await tasks(world.ask(1), world.ask(1))
        first.cancel()
        second.cancel()
        await asyncio.sleep(0.01)
        assert world.observer.counts == {"cancelled": 1}
        blocker.cancel()
        await asyncio.sleep(0.01)
        world.session.gate.set()
        while not len(world.cache):
            await asyncio.sleep(0.001)
        assert world.session.runs == [[100]]
        assert (await world.ask(100)).cached

    in_world(test)


def test_each_has_its_own_deadline():
    async def test(world):
        blocker = await world.blocked()
        soon = time.monotonic() + 0.05
        early, patient, late, gone = await tasks(
            world.ask(1, soon), world.ask(1, time.monotonic() + 20), world.ask(2, soon), world.ask(2)
        )
        gone.cancel()
        await asyncio.sleep(0.06)
        world.session.gate.set()
        assert (await patient).outputs["y"][0, 0] == 2
        for task in (early, late):
            with pytest.raises(DeadlinePassed):
                await task
        assert world.observer.counts["deadline"] == 2
        assert world.session.runs == [[100], [1]]
        await blocker

    in_world(test)


def test_errors_are_for_all_who_wait_and_not_kept():
    async def test(world):
        blocker = await world.blocked()
        bad, again, good = await tasks(world.ask(-1), world.ask(-1), world.ask(1))
        world.session.gate.set()
        for task in (bad, again):
            with pytest.raises(ValueError, match="negative"):
                await task
        assert (await good).outputs["y"][0, 0] == 2, "its neighbour in the batch"
        runs = len(world.session.runs)
        with pytest.raises(ValueError, match="negative"):
            await world.ask(-1)
        assert len(world.session.runs) == runs + 1
        await blocker

    in_world(test)


def test_a_view_of_a_batch_does_not_keep_the_batch():
    async def test(world):
        blocker = await world.blocked()
        asking = await tasks(*(world.ask(value) for value in range(4)))
        world.session.gate.set()
        await asyncio.gather(blocker, *asking)
        for _, answer in world.cache._answers.values():
            assert answer.outputs["y"].base is None

    in_world(test)


def test_any_order_of_asking_and_leaving_gives_right_answers():
    draws = random.Random(7)

    async def caller(world):
        for _ in range(60):
            value = draws.choice([-1, 1, 2, 3, 4, 5, 6, 7])
            deadline = time.monotonic() + draws.choice([0.0, 0.002, 5, 5, 5])
            task = asyncio.create_task(world.ask(value, deadline))
            if draws.random() < 0.3:
                await asyncio.sleep(draws.random() * 0.002)
                task.cancel()
            try:
                result = await task
                assert result.outputs["y"].tolist() == [[2 * value, 2 * value]]
            except DeadlinePassed:
                assert time.monotonic() >= deadline
            except ValueError:
                assert value == -1
            except asyncio.CancelledError:
                pass

    async def test(world):
        await asyncio.gather(*(caller(world) for _ in range(20)))
        await asyncio.sleep(0.05)
        counts = world.observer.counts
        assert min(counts[kind] for kind in ("hit", "shared", "miss")) > 10, counts

    in_world(test, limit=4 * (ENTRY_BYTES + 8))
