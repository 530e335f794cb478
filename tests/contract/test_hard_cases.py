"""What a review found broken once: each stays mended."""

import asyncio

import pytest

from async_cache import AsyncCache, CacheClosedError, CacheConfig, ObjectGroup, Shortfall
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import FailingBackend, GatedBackend
from async_cache.testing.backends import WrappedBackend

from .support import (
    PAGE,
    TWO_RANKS,
    Scripted,
    assert_nothing_held,
    fill,
    fill_l2,
    make_layout,
    make_prompt,
    object_keys,
    open_cache,
    read_back,
    seed,
    verify,
)


def embedded(*backends):
    return AsyncCache(CacheConfig(l1_bytes=64 * PAGE, l2=[]), backends=backends)


class Odd(WrappedBackend):
    """Answers one verb with nothing, or raises before it returns an awaitable."""

    verb = ""
    raising = False

    def lookup(self, keys):
        return self._odd() if self.verb == "lookup" else super().lookup(keys)

    def load(self, keys, buffers):
        return self._odd() if self.verb == "load" else super().load(keys, buffers)

    def _odd(self):
        if self.raising:
            raise ValueError("odd")
        return asyncio.sleep(0)


@pytest.mark.parametrize("raising", [False, True])
@pytest.mark.parametrize("verb", ["lookup", "load"])
async def test_an_answer_that_makes_no_sense_is_a_failure_and_the_next_holder_is_tried(verb, raising):
    first, second = MemoryBackend("first"), MemoryBackend("second")
    odd = Odd(first)
    prompt = make_prompt(3)
    async with open_cache(odd, second, load_inflight_bytes=1) as cache:
        await fill_l2(cache, prompt)
        odd.verb, odd.raising = verb, raising
        assert await read_back(cache, prompt) == 3
        odd.verb = ""
        await cache.clear(tier="l1")
        assert await read_back(cache, prompt) == 3
        await assert_nothing_held(cache)
    assert (first.pins, second.pins) == (0, 0)


async def test_a_backend_that_answered_is_unpinned_when_another_one_breaks():
    first, odd = MemoryBackend("first"), Odd(MemoryBackend("odd"))
    async with open_cache(first, odd) as cache:
        await fill_l2(cache, make_prompt(1))
        odd.verb = "lookup"
        hits = await cache.prefetch(make_prompt(2), request_id="a").lookup_done
        assert (hits.chunks, hits.shortfall) == (1, Shortfall.BACKEND_ERROR)
        await cache.end_request("a")
        await asyncio.sleep(10)
    assert first.pins == 0


async def test_who_joins_a_load_that_has_timed_out_leaves_no_room_behind():
    first, second = GatedBackend(MemoryBackend("first")), GatedBackend(MemoryBackend("second"))
    prompt = make_prompt(1, layout=TWO_RANKS)
    async with open_cache(first, second, load_timeout_seconds=1, lookup_timeout_seconds=1) as cache:
        await fill_l2(cache, prompt)
        first.hold("load")
        cache.prefetch(prompt, request_id="a", ranks=[0])
        await first.reached("load", 1)
        second.hold("lookup")
        await asyncio.sleep(1.05)  # it timed out, and asks the second
        cache.prefetch(prompt, request_id="b", ranks=[1])
        for request_id in "ab":
            await cache.query_lookup_hits(request_id)
            await cache.query_status(request_id)
            await cache.end_request(request_id)
        first.release()
        second.release()
        await asyncio.sleep(10)
        await assert_nothing_held(cache)


@pytest.mark.embedded
async def test_a_shorter_prefix_of_a_window_still_has_what_only_it_needs():
    window = make_layout(ObjectGroup((2 * PAGE,), "uint8", window_chunks=2))
    long, short = make_prompt(4, layout=window), make_prompt(2, layout=window)
    backend = MemoryBackend()
    await seed(backend, long)
    async with open_cache(backend, pages=12) as cache:
        await fill(cache, short)
        writers = [await cache.store(make_prompt(1, number)) for number in range(10, 18)]
        for writer in writers:
            if writer[0].offset // PAGE in (5, 7, 9, 10):  # room for one block of two pages, and two of one
                writer.close()
        await cache.prefetch(short, request_id="other").load_done
        prefetch = cache.prefetch(long)
        async with asyncio.timeout(100):
            hits, result = await prefetch.lookup_done, await prefetch.load_done
        assert (hits.chunks, hits.shortfall) == (3, Shortfall.MEMORY)
        assert result.chunks == 3


async def test_what_is_stored_while_its_old_copy_is_deleted_is_written_again():
    memory = MemoryBackend()
    backend = GatedBackend(memory, "delete")
    prompt = make_prompt(1)
    async with open_cache(backend) as cache:
        await fill(cache, prompt)
        await cache.flush()
        deleting = asyncio.create_task(cache.delete(prompt))
        await backend.reached("delete")
        await fill(cache, prompt)
        await cache.flush()
        deleting.cancel()  # which does not stop it half way
        await asyncio.sleep(1)
        backend.release()
        await asyncio.sleep(10)
        await cache.flush()
        assert memory.usage().objects == 1
        assert await read_back(cache, prompt) == 1


async def test_a_commit_completes_a_chunk_that_somebody_reads():
    layout = make_layout(ObjectGroup((8,), "uint8"), ObjectGroup((8,), "uint8", window_chunks=1))
    long, short = make_prompt(3, layout=layout), make_prompt(2, layout=layout)
    memory = MemoryBackend()
    async with open_cache(memory) as cache:
        await fill_l2(cache, long)
        await cache.prefetch(long, request_id="a").load_done
        await memory.delete([key async for key, _ in memory.keys() if key.group == 1])
        assert (await cache.lookup(short)).chunks == 0
        await fill(cache, short)
        assert await read_back(cache, short) == 2
        await cache.flush()
        assert sum([key.group == 1 async for key, _ in memory.keys()]) == 2


@pytest.mark.parametrize("answer", [LoadOutcome.FAILED, LoadOutcome.LOADED])
async def test_a_commit_of_what_a_load_is_just_filling_is_kept(answer):
    layout = make_layout(ObjectGroup((8,), "uint8"), ObjectGroup((8,), "uint8", window_chunks=1))
    long, short = make_prompt(3, layout=layout), make_prompt(2, layout=layout)
    memory = MemoryBackend()
    scripted = Scripted(memory)
    backend = GatedBackend(scripted)
    async with open_cache(backend) as cache:
        await fill_l2(cache, long)
        await cache.prefetch(long, request_id="long").load_done
        scripted.load_answers = dict.fromkeys(object_keys(short, groups=[1]), answer)
        backend.hold("load")
        loading = cache.prefetch(short, request_id="short")
        assert (await loading.lookup_done).chunks == 2
        await backend.reached("load")
        await fill(cache, short)
        stored = scripted.stored.copy()
        assert (await cache.flush()).pending == 1
        backend.release()
        result = await loading.load_done
        assert result.chunks == 2
        async with cache.read("short") as lease:
            assert verify(lease, short) == [0, 1]
        await cache.end_request("long")
        assert (await cache.flush()).pending == 0
        await cache.clear(tier="l1")
        scripted.load_answers = {}
        assert await read_back(cache, short) == 2
        await assert_nothing_held(cache)
        assert (scripted.stored != stored) == (answer is LoadOutcome.FAILED)


async def test_what_is_committed_while_l1_is_cleared_is_not_lost():
    memory = MemoryBackend()
    prompt = make_prompt(1500, layout=TWO_RANKS)
    async with open_cache(memory, pages=4096) as cache:
        await fill(cache, prompt, ranks=[0])
        await cache.flush()
        async with cache.store(prompt, rank=1, start_chunk=1499) as writer:
            clearing = asyncio.create_task(cache.clear(tier="l1"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            writer[0].commit()
        await clearing
        await cache.flush()
        assert [key.rank async for key, _ in memory.keys()].count(1) == 1


@pytest.mark.parametrize(("failing", "counts"), [(1, (1, 0)), (2, (0, 1))])
async def test_a_chunk_is_dropped_when_no_backend_has_it_and_counted_once(failing, counts):
    backends = [MemoryBackend("a"), MemoryBackend("b")]
    backends[:failing] = [FailingBackend(backend, "store", times=None) for backend in backends[:failing]]
    async with open_cache(*backends) as cache:
        await fill(cache, make_prompt(1))
        flushed = await cache.flush()
        assert (flushed.written, flushed.dropped) == counts
        assert (await cache.stats()).writebacks_dropped == counts[1]


async def test_clear_ends_while_an_engine_goes_on_writing():
    class Slow(WrappedBackend):
        async def before(self, verb, keys, buffers):
            await asyncio.sleep(0.05 if verb == "store" else 0)

    async with open_cache(Slow(MemoryBackend())) as cache:

        async def write():
            for number in range(2000):
                await fill(cache, make_prompt(1, number))
                await asyncio.sleep(0.01)

        writing = asyncio.create_task(write())
        await asyncio.sleep(1)
        async with asyncio.timeout(5):
            await cache.clear(tier="all")
        writing.cancel()


@pytest.mark.embedded
async def test_a_close_that_is_cancelled_goes_on_and_a_second_one_waits_for_it():
    backend = GatedBackend(MemoryBackend(), "store")
    cache = await embedded(backend).open()
    await fill(cache, make_prompt(1))
    flushing = asyncio.create_task(cache.flush())
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await cache.close()
    await cache.close()
    assert (await flushing).pending == 1
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.embedded
async def test_no_writer_opens_while_the_cache_closes():
    cache = await embedded(GatedBackend(MemoryBackend(), "store")).open()
    await fill(cache, make_prompt(1))
    writer = cache.store(make_prompt(1, 2))
    closing = asyncio.create_task(cache.close())
    await asyncio.sleep(0.1)
    with pytest.raises(CacheClosedError):
        await writer
    await closing


@pytest.mark.embedded
async def test_an_entered_read_outlives_the_cache():
    cache = await embedded().open()
    prompt = make_prompt(1)
    await fill(cache, prompt)
    lease = await cache.read(cache.prefetch(prompt).request_id)
    await cache.close()
    assert len(lease[0].views[0]) == 16
    lease.release()


@pytest.mark.parametrize("turns", range(12))
async def test_what_joins_a_load_at_the_moment_it_settles_is_loaded_and_leaks_nothing(turns):
    layout = make_layout(ObjectGroup((16,), "uint8"), ObjectGroup((8,), "uint8", window_chunks=1))
    memory = MemoryBackend()
    gate = GatedBackend(memory)
    long, short = make_prompt(3, layout=layout), make_prompt(2, layout=layout)
    async with open_cache(gate) as cache:
        await fill_l2(cache, long)
        gate.hold("load")
        await cache.prefetch(long, request_id="a").lookup_done
        await gate.reached("load", 1)
        gate.hold("lookup")
        prefetch = cache.prefetch(short, request_id="b")
        await gate.reached("lookup", 3)
        gate.release("load")
        for _ in range(turns):
            await asyncio.sleep(0)
        gate.release("lookup")
        hits, result = await prefetch.lookup_done, await prefetch.load_done
        assert hits.chunks == result.chunks == 2
        for request_id in "ab":
            await cache.end_request(request_id)
        await asyncio.sleep(10)
        await assert_nothing_held(cache)
        await cache.clear(tier="all")
        assert (memory.pins, (await cache.stats()).l1_used_bytes) == (0, 0)


async def test_room_for_a_tail_is_not_taken_from_its_own_head():
    async with open_cache(pages=32) as cache:
        await fill(cache, make_prompt(10))
        async with cache.store(make_prompt(40)) as writer:
            assert (len(writer), writer.shortfall) == (22, Shortfall.MEMORY)
            for chunk in writer:
                chunk.commit()
        assert (await cache.lookup(make_prompt(40))).chunks == 32


@pytest.mark.embedded
async def test_a_removal_that_close_gives_up_says_that_the_cache_was_closed():
    backend = GatedBackend(MemoryBackend(), "delete")
    cache = await embedded(backend).open()
    await fill(cache, make_prompt(1))
    await cache.flush()
    deleting = asyncio.create_task(cache.delete(make_prompt(1)))
    await backend.reached("delete")
    await cache.close()
    with pytest.raises(CacheClosedError):
        await deleting


@pytest.mark.embedded
async def test_a_deleted_chunk_is_gone_from_memory_in_the_very_step_of_the_call():
    async with open_cache(GatedBackend(MemoryBackend(), "delete")) as cache:
        await fill_l2(cache, make_prompt(1))
        assert await read_back(cache, make_prompt(1)) == 1
        removal = cache.delete(make_prompt(1))
        removal.send(None)  # the first step, and no turn of the loop
        assert (await cache.stats()).l1_chunks == 0
        assert (await cache.lookup(make_prompt(1))).chunks == 0
        removal.close()
