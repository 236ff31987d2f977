"""Continuous batching with a step whose answers depend on a row's whole history, so that any mix-up of rows shows."""

import asyncio
import gc
import random
import types
import weakref
import zlib

import numpy as np
import pytest

from services.nlp.serving import decoding as module
from services.nlp.serving.decoding import CAPACITY_STEP, Cache, Decoding, DecodingBatch, DecodingLoop, DecodingLoops
from services.nlp.serving.search import BeamSearch, SearchSettings
from services.nlp.tokenizers.special import BOS, EOS
from shared.artifacts import TensorSpec
from shared.errors import DeadlinePassed
from shared.serving.batching import BatchResult

V = 12
INPUTS = [
    TensorSpec("token", "int64", (-1,)),
    TensorSpec("position", "int64", (-1,)),
    TensorSpec("source_length", "int64", (-1,)),
    TensorSpec("keys_0", "float32", (-1, 1, -1, 2)),
    TensorSpec("values_0", "float32", (-1, 1, -1, 1)),
    TensorSpec("cross_keys_0", "float32", (-1, 1, -1, 1)),
    TensorSpec("cross_values_0", "float32", (-1, 1, -1, 2)),
    TensorSpec("state", "float32", (-1, 2)),
]


def folded(tokens):
    """What a recurrent decoder might remember of the tokens read."""
    state = 0
    for token in tokens:
        state = (31 * state + int(token)) % 1009
    return state


def fake_step(feeds):
    """The cached keys are the tokens read and their positions, the values the number of the source, the state both: so
    every step can check that each row's cache is its own, and derives its answer from all of it."""
    rows, S = len(feeds["token"]), feeds["cross_keys_0"].shape[2]
    assert all(len(array) == rows for array in feeds.values())
    log_probabilities = np.empty((rows, V), np.float32)
    attention = np.full((rows, 1, 2, S), 1e9, np.float32)
    own = np.empty((rows, 1, 2), np.float32)
    states = np.empty((rows, 2), np.float32)
    sources = np.empty((rows, 1, 1), np.float32)
    for row in range(rows):
        token, position, length = (int(feeds[name][row]) for name in ("token", "position", "source_length"))
        source = feeds["cross_keys_0"][row, 0, :length, 0].tolist()
        history = feeds["keys_0"][row, 0, :position]
        assert source[0] > 0
        assert feeds["cross_values_0"][row, 0, :length, 0].tolist() == source
        assert (feeds["values_0"][row, 0, :position] == source[0]).all()
        assert history[:, 1].tolist() == list(range(position))
        assert history[:1, 0].tolist() == [BOS][:position]
        assert feeds["state"][row].tolist() == [source[0], folded(history[:, 0])]
        read = [*history[:, 0].astype(int).tolist(), token]
        rng = np.random.default_rng(zlib.crc32(repr((source, read)).encode()))
        logits = 2 * rng.normal(size=V)
        logits[EOS] += 0.3 * position - 1
        log_probabilities[row] = logits - np.log(np.exp(logits).sum())
        attention[row, ..., :length] = rng.dirichlet(np.ones(length), size=(1, 2))
        own[row, 0], sources[row], states[row] = (token, position), source[0], (source[0], folded(read))
    return {
        "log_probabilities": log_probabilities,
        "attention": attention,
        "new_keys_0": own,
        "new_values_0": sources,
        "new_state": states,
    }


class FakeServed:
    """What a DecodingLoop knows of a served graph."""

    def __init__(self, max_batch=8, before=lambda count: None):
        variant = types.SimpleNamespace(max_batch=max_batch)
        self.manifest = types.SimpleNamespace(inputs=INPUTS, variants={"fp16": variant})
        self.variant = "fp16"
        self.batcher = FakeBatcher(before)

    @property
    def rows(self):
        return self.batcher.rows

    @property
    def sources(self):
        return self.batcher.sources


class FakeBatcher:
    """Runs the step; remembers the rows and the sources of each run."""

    def __init__(self, before):
        self.before = before
        self.rows = []
        self.sources = []

    async def submit(self, feeds, deadline=float("inf")):
        await asyncio.sleep(0)
        self.rows.append(len(feeds["token"]))
        self.sources.append(set(feeds["cross_keys_0"][:, 0, 0, 0].astype(int).tolist()))
        self.before(len(self.rows))
        outputs = fake_step(feeds)
        await asyncio.sleep(0)
        return BatchResult(outputs, len(feeds["token"]), 0.0, 0.25)


def decoding(number, length=5, padding=0, attention=True, deadline=float("inf"), **settings):
    values = np.full((1, 1, length + padding, 2), np.nan, np.float32)  # the encoder's padding is to be hidden
    values[0, 0, :length, 0] = number + np.arange(length) / 16
    values[0, 0, :length, 1] = 0
    cross = {"cross_keys_0": values[..., :1], "cross_values_0": values, "state": np.array([[number, 0]], np.float32)}
    search = BeamSearch(SearchSettings(**settings), keeps_attention=attention)
    return Decoding(search, cross, length, deadline=deadline)


def outcome(one):
    return [
        (found.tokens, found.finished, found.log_probability, found.score, np.array(found.attention).tolist())
        for found in one.search.best(100)
    ]


def alone(**wishes):
    one = decoding(**wishes)
    batch = DecodingBatch(INPUTS)
    batch.add(one)
    while batch.running:
        batch.settle(fake_step(batch.feeds()))
    return outcome(one)


def wishes_of(number):
    rng = random.Random(number)
    return {
        "number": number,
        "length": rng.randint(1, 30),
        "padding": rng.randint(0, 3),
        "attention": rng.random() < 0.5,
        "beam": rng.choice((1, 1, 2, 3, 4, 8)),
        "max_tokens": rng.choice((1, 2, 7, 20, 40)),
    }


class TestCache:
    @pytest.mark.parametrize("seed", range(6))
    def test_random_joins_leaves_and_reorderings(self, seed):
        """Against lists: what each row has read, and of which source."""
        rng = random.Random(seed)
        cache, rows = Cache(INPUTS), []  # (source, tokens read)
        for step in range(120):
            while rng.random() < 0.4 and len(rows) < 30:
                source = 1000 * seed + step + 1
                one = decoding(source, rng.choice((1, 4, 25)))
                cache.add(one)
                rows.append((source, one.source_length, [BOS]))
            if not rows:
                continue
            feeds = cache.feeds()
            assert [feeds["token"].tolist(), feeds["position"].tolist(), feeds["source_length"].tolist()] == [
                [read[-1] for _, _, read in rows],
                [len(read) - 1 for _, _, read in rows],
                [length for _, length, _ in rows],
            ]
            cache.append(fake_step(feeds))  # checks the cached keys and values
            kept = [at for at in range(len(rows)) if rng.random() < 0.9]
            parents = [rng.choice(kept) for _ in range(rng.randint(0, 2 * len(kept)))][:40] if kept else []
            if rng.random() < 0.3:
                parents = kept
            tokens = [rng.randint(4, V - 1) for _ in parents]
            cache.select(parents, tokens)
            rows = [
                (rows[parent][0], rows[parent][1], [*rows[parent][2], token])
                for parent, token in zip(parents, tokens, strict=True)
            ]

    def test_it_grows_and_shrinks(self):
        cache = Cache(INPUTS)
        cache.add(decoding(1, length=3))
        assert {cache.feeds()[name].shape[2] for name in ("keys_0", "cross_keys_0")} == {CAPACITY_STEP}
        cache.add(decoding(2, length=100))
        assert cache.feeds()["cross_keys_0"].shape[2] == 104
        for _ in range(50):
            cache.append(fake_step(cache.feeds()))
            cache.select([0, 1], [5, 6])
        assert cache.feeds()["keys_0"].shape[2] == 56
        cache.append(fake_step(cache.feeds()))
        cache.select([0], [5])  # the long source is gone, the long history is not
        assert (cache.feeds()["cross_keys_0"].shape[2], cache.feeds()["keys_0"].shape[2]) == (8, 56)
        cache.add(decoding(3, length=2))
        cache.append(fake_step(cache.feeds()))
        cache.select([1, 1], [5, 6])  # now it is, too
        assert cache.feeds()["keys_0"].shape[2] == CAPACITY_STEP
        fake_step(cache.feeds())

    def test_feeds_are_views(self):
        cache = Cache(INPUTS)
        cache.add(decoding(1))
        assert all(array.base is not None for array in cache.feeds().values())

    def test_a_child_does_not_share_its_parents_memory(self):
        cache = Cache(INPUTS)
        cache.add(decoding(1))
        cache.append(fake_step(cache.feeds()))
        cache.select([0, 0, 0], [7, 8, 9])
        cache.append(fake_step(cache.feeds()))
        assert cache.feeds()["keys_0"][:, 0, 1, 0].tolist() == [7, 8, 9]
        cache.select([2, 1, 0], [4, 4, 4])
        assert cache.feeds()["keys_0"][:, 0, 1, 0].tolist() == [9, 8, 7]
        cache.select([1, 0], [4, 4])
        assert cache.feeds()["keys_0"][:, 0, 1, 0].tolist() == [8, 9]


class TestLoop:
    @pytest.mark.parametrize("max_batch", [1, 8, 64])
    def test_many_together_are_as_each_alone(self, max_batch):
        every = [wishes_of(number) for number in range(1, 31)]

        async def main():
            served = FakeServed(max_batch)
            loop = DecodingLoop(served)

            async def one(wishes):
                for _ in range(random.Random(wishes["number"]).randint(0, 40)):
                    await asyncio.sleep(0)  # joins somewhere in the middle
                made = decoding(**wishes)
                await loop.run(made)
                assert made.over
                assert made.steps >= 1
                assert made.infer_seconds == 0.25 * made.steps
                assert made.batch_size >= 1
                return outcome(made)

            found = await asyncio.gather(*map(one, every))
            assert loop._task is None
            return served, found

        served, found = asyncio.run(main())
        for wishes, one in zip(every, found, strict=True):
            assert one == alone(**wishes)
        assert max(served.rows) <= max(max_batch, 8)  # one of beam 8 runs alone if the graph takes fewer
        if max_batch == 64:
            assert max(map(len, served.sources)) > 3  # they did run together

    def test_rows_reserved_are_never_exceeded_and_order_is_kept(self):
        async def main():
            served = FakeServed(8)
            loop = DecodingLoop(served)
            tasks = [
                asyncio.create_task(loop.run(decoding(number, beam=beam, max_tokens=12)))
                for number, beam in ((1, 8), (2, 8), (3, 1), (4, 16), (5, 1))
            ]
            await asyncio.gather(*tasks)
            return served

        served = asyncio.run(main())
        first = {
            number: next(at for at, sources in enumerate(served.sources) if number in sources) for number in range(1, 6)
        }
        assert [first[number] for number in range(1, 6)] == sorted(first.values())
        assert all(sources in ({1}, {2}, {3}, {4}, {5}, {3, 5}) for sources in served.sources)

    def test_an_idle_loop_keeps_nothing_and_starts_again(self):
        async def main():
            loop = DecodingLoop(FakeServed())
            for number in (1, 2):
                one = decoding(number, length=200, max_tokens=40)
                await loop.run(one)
                await asyncio.sleep(0)
                assert outcome(one) == alone(number=number, length=200, max_tokens=40)
                assert loop._task is None
                assert (len(loop._waiting), len(loop._futures), loop._batch.running) == (0, 0, [])
                assert sum(array.nbytes for array in loop._batch._cache._arrays.values()) < 1000

        asyncio.run(main())

    def test_who_cancels_leaves_and_others_stay(self):
        every = [wishes_of(number) | {"max_tokens": 40} for number in range(1, 17)]

        async def main():
            served = FakeServed(24)
            loop = DecodingLoop(served)
            made = [decoding(**wishes) for wishes in every]
            tasks = [asyncio.create_task(loop.run(one)) for one in made]
            for _ in range(9):
                await asyncio.sleep(0)
            cancelled = set()
            for number in range(0, 16, 2):  # some are running, some still wait
                cancelled.add(number)
                tasks[number].cancel()
                await asyncio.sleep(0)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)
            assert loop._task is None
            assert not loop._futures
            gone = {at + 1 for at, result in enumerate(results) if isinstance(result, asyncio.CancelledError)}
            return made, results, gone, served

        made, results, gone, served = asyncio.run(main())
        assert len(gone) >= 6  # one or two may have been done before
        for wishes, one, result in zip(every, made, results, strict=True):
            if wishes["number"] not in gone:
                assert result is None
                assert outcome(one) == alone(**wishes)
        assert not any(gone & sources for sources in served.sources[20:])

    def test_everybody_cancels(self):
        async def main():
            served = FakeServed()
            loop = DecodingLoop(served)
            tasks = [asyncio.create_task(loop.run(decoding(number, max_tokens=40))) for number in range(1, 6)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for _ in range(6):
                await asyncio.sleep(0)
            assert loop._task is None
            assert len(served.rows) <= 2
            one = decoding(9, max_tokens=5)
            await loop.run(one)
            assert outcome(one) == alone(number=9, max_tokens=5)

        asyncio.run(main())

    def test_a_passed_deadline_ends_a_decoding_in_the_middle(self, monkeypatch):
        clock = types.SimpleNamespace(now=100.0)
        monkeypatch.setattr(
            module, "time", types.SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
        )

        def tick(count):
            clock.now += 1

        async def main():
            served = FakeServed(16, before=tick)
            loop = DecodingLoop(served)
            endless = {"length": 4, "max_tokens": 40, "beam": 2}
            made = [
                decoding(1, deadline=104.5, **endless),
                decoding(2, **endless),
                decoding(3, deadline=99.0, **endless),
                decoding(4, deadline=1e9, **endless),
            ]
            results = await asyncio.gather(*map(loop.run, made), return_exceptions=True)
            assert [type(result) for result in results] == [DeadlinePassed, type(None), DeadlinePassed, type(None)]
            assert outcome(made[1]) == alone(number=2, **endless)
            assert outcome(made[3]) == alone(number=4, **endless)
            assert [number for number in (1, 3) if any(number in sources for sources in served.sources)] == [1]
            assert sum(1 in sources for sources in served.sources) == 5  # 101 to 105
            assert loop._task is None

        asyncio.run(main())

    def test_who_waits_expires_too(self, monkeypatch):
        clock = types.SimpleNamespace(now=0.0)
        monkeypatch.setattr(
            module, "time", types.SimpleNamespace(monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
        )

        def tick(count):
            clock.now += 1

        async def main():
            served = FakeServed(4, before=tick)
            loop = DecodingLoop(served)
            running, waiting = decoding(1, beam=4, max_tokens=30), decoding(2, beam=4, deadline=2.5)
            tasks = [asyncio.create_task(loop.run(one)) for one in (running, waiting)]
            with pytest.raises(DeadlinePassed):
                await tasks[1]
            assert not tasks[0].done()
            assert waiting.steps == 0
            await tasks[0]
            assert outcome(running) == alone(number=1, beam=4, max_tokens=30)

        asyncio.run(main())

    def test_a_failing_step_reaches_all_and_the_next_request_works(self):
        def fail(count):
            if count == 3:
                raise RuntimeError("the graph broke")

        async def main():
            served = FakeServed(4, before=fail)
            loop = DecodingLoop(served)
            made = [decoding(number, beam=4, max_tokens=40) for number in range(1, 6)]  # one runs, four wait
            results = await asyncio.gather(*map(loop.run, made), return_exceptions=True)
            assert [str(result) for result in results] == ["the graph broke"] * 5
            assert loop._task is None
            one = decoding(7, beam=3, max_tokens=9)
            await loop.run(one)
            assert outcome(one) == alone(number=7, beam=3, max_tokens=9)
            assert max(map(len, served.sources)) == 1  # the failed ones did not come back

        asyncio.run(main())

    def test_a_request_that_comes_while_the_step_fails(self):
        """It waits when the step fails, so it is told too, and does not wait for ever."""

        def fail(count):
            if count == 2:
                raise RuntimeError("the graph broke")

        async def main():
            loop = DecodingLoop(FakeServed(1, before=fail))
            first = asyncio.create_task(loop.run(decoding(1, beam=1, max_tokens=40)))
            while loop._task is None:
                await asyncio.sleep(0)
            late = asyncio.create_task(loop.run(decoding(2, beam=1)))
            results = await asyncio.wait_for(asyncio.gather(first, late, return_exceptions=True), 5)
            assert all(isinstance(result, RuntimeError) for result in results)

        asyncio.run(main())


class TestLoops:
    def test_one_loop_for_each_served_graph_and_gone_with_it(self):
        async def main():
            loops, served, other = DecodingLoops(), FakeServed(), FakeServed()
            assert loops.of(served) is loops.of(served)
            assert loops.of(served) is not loops.of(other)
            await loops.of(served).run(decoding(1))
            watched = weakref.ref(loops.of(other))
            del other
            gc.collect()
            assert watched() is None

        asyncio.run(main())
