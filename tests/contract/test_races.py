"""What happens at the same moment, in every order; and calls that fail, each of them in turn."""

import asyncio
import random
from contextlib import suppress

import pytest

from async_cache import AsyncCacheError, BackendError, ObjectGroup, Shortfall, UnknownRequestError, WriterClosedError
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import FailingBackend, GatedBackend, ThrottledBackend

from .support import (
    PAGE,
    SMALL,
    TWO_RANKS,
    Recorder,
    assert_nothing_held,
    count_hits,
    fill,
    make_layout,
    make_prompt,
    open_cache,
    outcomes,
    pattern,
    read_back,
    seed,
    settle,
    verify,
    write,
)

TURNS = range(16)


async def turn(times):
    for _ in range(times):
        await asyncio.sleep(0)


async def loading(prompt):
    gate = GatedBackend(MemoryBackend())
    await seed(gate, prompt)
    gate.hold("load")
    return gate


@pytest.mark.parametrize("turns", TURNS)
async def test_a_result_is_not_lost_when_the_one_who_waits_is_cancelled_as_it_comes(turns):
    prompt = make_prompt(2)
    gate = await loading(prompt)
    async with open_cache(gate) as cache:
        cache.prefetch(prompt, request_id="a")
        first = asyncio.ensure_future(cache.query_status("a"))
        second = asyncio.ensure_future(cache.query_status("a"))
        await gate.reached("load")
        await settle()
        gate.release("load")
        await turn(turns)
        first.cancel()
        got = await outcomes(first, second)
        assert sum(not isinstance(each, BaseException) for each in got) == 1
        with pytest.raises(UnknownRequestError):
            await cache.query_status("a")


@pytest.mark.parametrize("turns", TURNS)
async def test_a_read_is_not_lost_when_the_one_who_waits_is_cancelled_as_it_comes(turns):
    prompt = make_prompt(2)
    gate = await loading(prompt)
    async with open_cache(gate) as cache:
        cache.prefetch(prompt, request_id="a")

        async def read():
            return await cache.read("a")

        task = asyncio.ensure_future(read())
        await gate.reached("load")
        await settle()
        gate.release("load")
        await turn(turns)
        task.cancel()
        (lease,) = await outcomes(task)
        if isinstance(lease, asyncio.CancelledError):
            lease = await cache.read("a")
        assert verify(lease, prompt) == [0, 1]
        lease.release()
        await assert_nothing_held(cache)


@pytest.mark.parametrize("turns", TURNS)
async def test_a_deadline_as_the_load_ends_gives_one_answer_and_leaks_nothing(turns):
    prompt = make_prompt(3)
    recorder = Recorder(ThrottledBackend(MemoryBackend(), latency_seconds=1))
    await seed(recorder, prompt)
    async with open_cache(recorder, lookup_timeout_seconds=10) as cache:
        await asyncio.sleep(0)
        prefetch = cache.prefetch(prompt, request_id="a", deadline_seconds=2 + turns * 1e-9)
        result = await prefetch.load_done
        assert (result.chunks == 3) == (result.shortfall is None)
        async with cache.read("a") as lease:
            assert len(verify(lease, prompt)) == result.chunks
        await settle()
        await assert_nothing_held(cache, recorder)


async def test_the_prefetch_of_an_ended_request_can_not_cancel_the_next_of_that_id():
    prompt = make_prompt(2)
    gate = await loading(prompt)
    async with open_cache(gate) as cache:
        old = cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        await cache.end_request("a")
        new = cache.prefetch(prompt, request_id="a")
        await new.lookup_done
        old.cancel()
        await settle()
        gate.release("load")
        assert (await new.load_done).chunks == 2
        assert (await old.load_done).shortfall is Shortfall.CANCELLED


async def test_the_read_of_an_ended_request_can_not_release_the_next_of_that_id():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        await fill(cache, prompt)
        cache.prefetch(prompt, request_id="a")
        old = await cache.read("a")
        await cache.end_request("a")
        cache.prefetch(prompt, request_id="a")
        new = await cache.read("a")
        old.release()
        assert (await cache.stats()).leases == 2
        assert (await cache.query_lookup_hits("a")).chunks == 2
        assert verify(new, prompt) == [0, 1]
        new.release()
        await assert_nothing_held(cache)


async def test_a_writer_may_commit_what_is_being_loaded():
    prompt = make_prompt(3)
    gate = await loading(prompt)
    async with open_cache(gate) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        async with cache.store(prompt) as writer:
            for chunk in writer:
                write(chunk, prompt)
                chunk.commit()
        assert await read_back(cache, prompt, request_id="b") == 3 or not prefetch.load_done.done()
        gate.release("load")
        assert (await prefetch.load_done).chunks == 3
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1, 2]
        await cache.flush()
        await assert_nothing_held(cache)
        assert (await cache.stats()).l1_chunks == 3


async def test_a_load_may_bring_what_is_being_written():
    prompt = make_prompt(3)
    gate = await loading(prompt)
    async with open_cache(gate) as cache:
        async with cache.store(prompt) as writer:
            gate.release("load")
            assert await read_back(cache, prompt) == 3
            for chunk in writer:
                write(chunk, prompt, version=5)
                chunk.commit()
        cache.prefetch(prompt, request_id="a")
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1, 2]
        await cache.flush()
        await assert_nothing_held(cache)


async def test_the_pins_of_a_late_answer_to_a_count_are_given_back():
    prompt = make_prompt(3)
    recorder = Recorder(ThrottledBackend(MemoryBackend(), latency_seconds=5))
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        hits = await cache.lookup(prompt)
        assert (hits.chunks, hits.shortfall) == (0, Shortfall.BACKEND_ERROR)
        await asyncio.sleep(10)
        await assert_nothing_held(cache, recorder)


@pytest.mark.parametrize("turns", TURNS)
async def test_a_count_that_is_cancelled_holds_nothing(turns):
    prompt = make_prompt(3)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        task = asyncio.ensure_future(cache.lookup(prompt))
        await turn(turns)
        task.cancel()
        await outcomes(task)
        await settle()
        await assert_nothing_held(cache, recorder)


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("how", ["delete", "clear"])
async def test_a_delete_at_every_step_of_a_prefetch_leaves_nothing_to_find(how, turns):
    prompt = make_prompt(3)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        await turn(turns)
        await (cache.delete(prompt) if how == "delete" else cache.clear(tier="all"))
        assert await count_hits(cache, prompt) == 0
        hits, result = await prefetch.lookup_done, await prefetch.load_done
        assert result.chunks <= hits.chunks
        assert (result.chunks < hits.chunks) == (result.shortfall is Shortfall.GONE)
        async with cache.read("a") as lease:
            assert len(verify(lease, prompt)) == result.chunks
        await settle()
        assert await count_hits(cache, prompt) == 0
        assert recorder.usage().objects == 0
        await assert_nothing_held(cache, recorder)


@pytest.mark.parametrize("turns", TURNS)
async def test_a_delete_at_every_step_of_a_write_back_leaves_nothing_to_find(turns):
    prompt = make_prompt(3)
    recorder = Recorder(MemoryBackend())
    async with open_cache(recorder) as cache:
        await fill(cache, prompt)
        await turn(turns)
        await cache.delete(prompt)
        assert await count_hits(cache, prompt) == 0
        await asyncio.sleep(100)
        assert await count_hits(cache, prompt) == 0
        assert recorder.usage().objects == 0
        await assert_nothing_held(cache, recorder)


@pytest.mark.parametrize("verb", ["lookup", "load", "store", "delete"])
@pytest.mark.parametrize("nth", range(1, 6))
async def test_each_call_of_a_backend_may_fail_and_nothing_is_held_or_wrong(verb, nth):
    first, second = make_prompt(6, layout=TWO_RANKS), make_prompt(4, 2, TWO_RANKS)
    recorder = Recorder(FailingBackend(MemoryBackend(), verb, nth, error=OSError("injected")))
    async with open_cache(recorder, pages=12) as cache:
        for _ in range(3):
            for prompt in (first, second):
                await fill(cache, prompt)
                await cache.flush()
                await cache.clear(tier="l1")
                await read_back(cache, prompt)
                await cache.clear(tier="l1")
                await read_back(cache, prompt, skip_tokens=8)
            await outcomes(cache.delete(first))
        await assert_nothing_held(cache, recorder)


async def test_a_delete_that_a_backend_fails_raises_or_is_done_and_the_cache_goes_on():
    prompt = make_prompt(3)
    backend = FailingBackend(MemoryBackend(), "delete", error=OSError("injected"))
    async with open_cache(backend) as cache:
        await fill(cache, prompt)
        await cache.flush()
        (got,) = await outcomes(cache.delete(prompt))
        assert not isinstance(got, BaseException) or isinstance(got, AsyncCacheError)
        await cache.delete(prompt)
        assert await count_hits(cache, prompt) == 0
        await assert_nothing_held(cache)


async def test_what_two_flushes_wait_for_is_in_l2_for_both():
    gate = GatedBackend(MemoryBackend())
    async with open_cache(gate) as cache:
        gate.hold("store")
        await fill(cache, make_prompt(3))
        waits = [asyncio.ensure_future(cache.flush()) for _ in range(2)]
        await settle()
        assert not any(wait.done() for wait in waits)
        gate.release("store")
        assert [flushed.pending for flushed in await asyncio.gather(*waits)] == [0, 0]
        assert gate.usage().objects == 3


LAYOUTS = [
    make_layout(),
    make_layout(world_size=2),
    make_layout(SMALL, ObjectGroup((8,), "uint8", window_chunks=2), model="windows"),
    make_layout(ObjectGroup((2 * PAGE + 5,), "uint8"), readers_per_rank=2, model="large"),
]


class Engine:
    """Does what engines do, at random, and checks every byte that it is given."""

    def __init__(self, cache, generator):
        self.cache, self.random, self.steps = cache, generator, 0

    def prompt(self):
        layout = self.random.choice(LAYOUTS)
        return make_prompt(self.random.randrange(1, 9), self.random.randrange(1, 4), layout)

    async def live(self, name):
        for number in range(40):
            acts = [self.store, self.read, self.read, self.read, self.leave, self.delete, self.clear, self.keep]
            act = self.random.choice(acts)
            await act(self.prompt(), f"{name}-{number}")
            await asyncio.sleep(self.random.choice([0, 0.1, 1]))
            self.cache.check_integrity()
            self.steps += 1

    async def store(self, prompt, request_id):
        for rank in range(prompt.layout.world_size):
            async with self.cache.store(prompt, rank=rank) as writer:
                with suppress(WriterClosedError):  # swept while it took its time
                    for chunk in writer:
                        write(chunk, prompt, rank)
                        if self.random.random() < 0.1:
                            await asyncio.sleep(self.random.choice([0, 3, 30]))
                        if self.random.random() < 0.9:
                            chunk.commit()

    async def read(self, prompt, request_id):
        skip = self.random.choice([0, 0, 4])
        prefetch = self.cache.prefetch(
            prompt, request_id=request_id, skip_tokens=skip, deadline_seconds=self.random.choice([None, 0.5, 5])
        )
        hits = await prefetch.lookup_done
        result = await prefetch.load_done
        assert result.chunks <= hits.chunks <= hits.found_chunks
        for rank in range(prompt.layout.world_size):
            for reader in range(prompt.layout.readers_per_rank):
                try:
                    async with self.cache.read(request_id, rank=rank, reader=reader) as lease:
                        await asyncio.sleep(self.random.choice([0, 0.1, 40]))
                        assert verify(lease, prompt, rank) == [result.start_chunk + i for i in range(result.chunks)]
                except UnknownRequestError:
                    return  # swept while another rank took its time

    async def leave(self, prompt, request_id):
        prefetch = self.cache.prefetch(prompt, request_id=request_id)
        await asyncio.sleep(self.random.choice([0, 0, 0.5, 2]))
        way = self.random.choice(["cancel", "end", "claim", "forget", "wait"])
        if way == "cancel":
            prefetch.cancel()
        elif way == "end":
            await self.cache.end_request(request_id)
        elif way == "claim":
            await self.cache.query_status(request_id)
        elif way == "wait":
            await outcomes(asyncio.wait_for(self.cache.query_status(request_id), 0.3))

    async def delete(self, prompt, request_id):
        if self.random.random() < 0.3:
            with suppress(BackendError):  # what a backend was not able to delete is told
                await self.cache.delete(prompt)

    async def keep(self, prompt, request_id):
        match self.random.randrange(4):
            case 0 | 1:
                kept = await self.cache.retain(prompt, ttl_seconds=self.random.choice([0, 1, 50]))
                assert kept.chunks == len(prompt) or kept.clipped is not None or not kept.expires_in_seconds
            case 2:
                assert (await self.cache.warm(prompt, deadline_seconds=1)).chunks <= len(prompt)
            case 3:
                await self.cache.hint(prompt, output_tokens=3, returns=self.random.choice([None, True, False]))

    async def clear(self, prompt, request_id):
        if self.random.random() < 0.1:
            with suppress(BackendError):
                await self.cache.clear(tier=self.random.choice(["l1", "all"]))


class Moody(Recorder):
    """Fails, dawdles and sleeps at random."""

    def __init__(self, inner, generator):
        super().__init__(inner)
        self.random = generator
        self.content = False

    async def lookup(self, keys):
        await self.mood(0.02, [0, 0, 0, 0.1, 1.5])
        return await super().lookup(keys)

    async def delete(self, keys):
        await self.mood(0.02, [0, 0.1, 1.5])
        return await super().delete(keys)

    async def load(self, keys, buffers):
        await self.mood(0.05, [0, 0.1, 0.5, 1, 20])
        return await super().load(keys, buffers)

    async def store(self, keys, buffers):
        await self.mood(0.05, [0, 0.1, 0.5, 20])
        return await super().store(keys, buffers)

    async def mood(self, failures, delays):
        if self.content:
            return
        await asyncio.sleep(self.random.choice(delays))
        if self.random.random() < failures:
            raise OSError("bad mood")


@pytest.mark.parametrize("number", range(12))
async def test_engines_that_do_as_they_like_read_right_bytes_and_leave_nothing_behind(number):
    generator = random.Random(number)
    backends = [Moody(MemoryBackend(name=name), generator) for name in ("first", "second")]
    settings = {
        "load_timeout_seconds": 10,
        "store_timeout_seconds": 10,
        "result_ttl_seconds": 5,
        "lease_ttl_seconds": 30,
        "reservation_ttl_seconds": 20,
        "policy": ("lru", "prefix")[number % 2],
    }
    async with open_cache(*backends, pages=48, **settings) as cache:
        idle = (await cache.stats()).l1_used_bytes
        engines = [Engine(cache, generator) for _ in range(6)]
        await asyncio.gather(*(engine.live(f"{name}") for name, engine in enumerate(engines)))
        await asyncio.sleep(1000)
        await cache.flush()
        assert await cache.retained() == []
        await assert_nothing_held(cache, *backends)
        assert sum(engine.steps for engine in engines) == 240
        for backend in backends:
            backend.content = True
        await asyncio.sleep(100)
        await cache.clear(tier="all")
        assert (await cache.stats()).l1_used_bytes == idle
        await fill(cache, make_prompt(20, 77))
        assert await read_back(cache, make_prompt(20, 77)) == 20


async def test_the_patterns_of_these_tests_differ():
    prompt = make_prompt(2, layout=TWO_RANKS)
    patterns = {pattern(prompt, index, rank, 0, version) for index in (0, 1) for rank in (0, 1) for version in (0, 1)}
    assert len(patterns) == 8
