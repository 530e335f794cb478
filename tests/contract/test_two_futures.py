"""The two futures of a prefetch: the count first, then the bytes; each caller waits for itself alone."""

import asyncio

import pytest

from async_cache import CacheClosedError, LoadResult, LookupHits
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import GatedBackend, ThrottledBackend

from .support import (
    CHUNK_TOKENS,
    OBJECT_BYTES,
    PAGE,
    Recorder,
    assert_nothing_held,
    fill,
    fill_l2,
    make_prompt,
    open_cache,
    outcomes,
    read_back,
    seed,
    settle,
    verify,
)


async def test_the_count_is_known_before_the_bytes_are_in_memory():
    gate = GatedBackend(MemoryBackend())
    prompt = make_prompt(5)
    await seed(gate, prompt)
    async with open_cache(gate) as cache:
        gate.hold("load")
        prefetch = cache.prefetch(prompt)
        hits = await prefetch.lookup_done
        assert (hits.chunks, hits.l1_chunks, hits.l2_chunks, hits.found_chunks) == (5, 0, 5, 5)
        assert not prefetch.load_done.done()
        gate.release("load")
        result = await prefetch.load_done
        assert (result.chunks, result.l2_chunks, result.shortfall) == (5, 5, None)


async def test_prefetch_returns_at_once_and_asks_nothing_before_the_loop_turns():
    recorder = Recorder(MemoryBackend())
    async with open_cache(recorder) as cache:
        prefetch = cache.prefetch(make_prompt(3))
        assert not prefetch.lookup_done.done()
        assert recorder.calls["lookup"] == 0
        await prefetch.load_done


async def test_both_are_futures_of_asyncio():
    async with open_cache() as cache:
        prefetch = cache.prefetch(make_prompt(1))
        assert asyncio.isfuture(prefetch.lookup_done)
        assert asyncio.isfuture(prefetch.load_done)
        hits, result = await asyncio.gather(prefetch.lookup_done, prefetch.load_done)
        assert isinstance(hits, LookupHits)
        assert isinstance(result, LoadResult)


async def test_each_access_gives_the_caller_a_future_of_its_own():
    gate = GatedBackend(MemoryBackend())
    prompt = make_prompt(2)
    async with open_cache(gate) as cache:
        await fill_l2(cache, prompt)
        gate.hold("lookup", "load")
        prefetch = cache.prefetch(prompt)
        first, second = prefetch.load_done, prefetch.load_done
        early, late = prefetch.lookup_done, prefetch.lookup_done
        assert first is not second
        assert early is not late
        first.cancel()
        early.cancel()
        await settle()
        assert not second.cancelled()
        gate.release("lookup", "load")
        assert (await late).chunks == 2
        assert (await second).chunks == 2
        assert (await prefetch.load_done).chunks == 2


async def test_a_future_that_is_asked_for_after_the_end_has_its_value():
    async with open_cache() as cache:
        prompt = make_prompt(2)
        await fill(cache, prompt)
        prefetch = cache.prefetch(prompt)
        await prefetch.load_done
        await settle()
        assert (await prefetch.lookup_done).chunks == 2
        assert (await prefetch.load_done).chunks == 2


@pytest.mark.parametrize("what", ["lookup_done", "load_done", "query_lookup_hits", "query_status", "read"])
async def test_when_the_wait_is_cancelled_only_that_wait_ends(what):
    gate = GatedBackend(MemoryBackend())
    recorder = Recorder(gate)
    prompt = make_prompt(2)
    await seed(recorder, prompt)
    async with open_cache(recorder, lookup_timeout_seconds=100) as cache:
        gate.hold("lookup", "load")
        prefetch = cache.prefetch(prompt, request_id="a")

        async def wait():
            if what.endswith("done"):
                await getattr(prefetch, what)
            elif what == "read":
                await cache.read("a")
            else:
                await getattr(cache, what)("a")

        shared = what not in ("query_status", "read")
        others = [asyncio.ensure_future(wait()) for _ in range(2 if shared else 0)]
        task = asyncio.ensure_future(wait())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.release("lookup", "load")
        await asyncio.gather(*others)
        assert (await prefetch.lookup_done).chunks == 2
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1]
            assert (await cache.query_status("a")).chunks == 2
        await assert_nothing_held(cache, recorder)


async def test_a_cancelled_task_that_prefetched_leaves_the_prefetch_running():
    gate = GatedBackend(MemoryBackend())
    prompt = make_prompt(2)
    await seed(gate, prompt)
    async with open_cache(gate) as cache:
        gate.hold("load")

        async def scheduler():
            await cache.prefetch(prompt, request_id="a").load_done

        task = asyncio.ensure_future(scheduler())
        await gate.reached("load")
        task.cancel()
        await outcomes(task)
        gate.release("load")
        assert (await cache.query_status("a")).chunks == 2


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3]])
async def test_fewer_tokens_than_a_chunk_resolve_both_with_0(tokens):
    recorder = Recorder(MemoryBackend())
    async with open_cache(recorder) as cache:
        prefetch = cache.prefetch(make_prompt(1).layout.prompt(tokens), request_id="a")
        hits, result = await prefetch.lookup_done, await prefetch.load_done
        assert (hits.chunks, hits.tokens, hits.found_chunks, hits.shortfall) == (0, 0, 0, None)
        assert (result.chunks, result.tokens, result.shortfall) == (0, 0, None)
        assert (await cache.query_status("a")).chunks == 0
        await assert_nothing_held(cache, recorder)


async def test_nothing_cached_resolves_both_with_0():
    recorder = Recorder(MemoryBackend())
    async with open_cache(recorder) as cache:
        prefetch = cache.prefetch(make_prompt(3), request_id="a")
        hits, result = await prefetch.lookup_done, await prefetch.load_done
        assert (hits.request_id, hits.chunks, hits.found_chunks, hits.shortfall) == ("a", 0, 0, None)
        assert (result.request_id, result.chunks, result.shortfall) == ("a", 0, None)
        await cache.end_request("a")
        await assert_nothing_held(cache, recorder)


async def test_everything_in_l1_resolves_both_without_touching_l2_however_dead_it_is():
    gate = GatedBackend(MemoryBackend())
    recorder = Recorder(gate)
    prompt = make_prompt(4)
    async with open_cache(recorder) as cache:
        await fill(cache, prompt)
        await cache.flush()
        gate.hold("lookup", "load")
        recorder.calls.clear()
        started = asyncio.get_running_loop().time()
        prefetch = cache.prefetch(prompt)
        hits, result = await prefetch.lookup_done, await prefetch.load_done
        assert (hits.chunks, hits.l1_chunks, hits.l2_chunks, hits.load_bytes) == (4, 4, 0, 0)
        assert (result.chunks, result.l1_chunks, result.l2_chunks) == (4, 4, 0)
        assert asyncio.get_running_loop().time() == started
        assert recorder.calls.total() == 0
        gate.release("lookup", "load")


async def test_counts_are_whole_chunks_and_their_sum_is_right():
    prompt = make_prompt(6)
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, prompt)
        await read_back(cache, make_prompt(2))
        prefetch = cache.prefetch(prompt, request_id="a")
        for counts in (await prefetch.lookup_done, await prefetch.load_done):
            assert counts.request_id == "a"
            assert counts.start_chunk == 0
            assert (counts.l1_chunks, counts.l2_chunks, counts.chunks) == (2, 4, 6)
            assert counts.tokens == 6 * CHUNK_TOKENS
        assert (await prefetch.lookup_done).load_bytes == 4 * OBJECT_BYTES


async def test_a_chunk_on_its_way_from_l2_already_counts_as_l2():
    gate = GatedBackend(MemoryBackend())
    prompt = make_prompt(3)
    await seed(gate, prompt)
    async with open_cache(gate) as cache:
        gate.hold("load")
        first = cache.prefetch(prompt)
        await gate.reached("load")
        second = cache.prefetch(prompt)
        hits = await second.lookup_done
        assert (hits.chunks, hits.l1_chunks, hits.l2_chunks) == (3, 0, 3)
        gate.release("load")
        result = await second.load_done
        assert (result.chunks, result.l1_chunks, result.l2_chunks) == (3, 0, 3)
        await first.load_done


async def test_what_the_lookup_counts_is_leased_or_has_its_room_reserved():
    gate = GatedBackend(MemoryBackend())
    recorder = Recorder(gate)
    prompt = make_prompt(6)
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        await read_back(cache, make_prompt(2))
        gate.hold("load")
        await cache.prefetch(prompt, request_id="a").lookup_done
        stats = await cache.stats()
        assert stats.leased_bytes >= 2 * OBJECT_BYTES
        assert stats.reserved_bytes >= 4 * OBJECT_BYTES
        assert len(recorder.pinned) == 4
        gate.release("load")
        await cache.query_status("a")
        assert (await cache.stats()).reserved_bytes == 0
        assert recorder.pinned == {}


async def test_eviction_never_lowers_a_promise():
    gate = GatedBackend(MemoryBackend())
    prompt = make_prompt(5)
    await seed(gate, prompt)
    async with open_cache(gate, pages=9) as cache:
        gate.hold("load")
        prefetch = cache.prefetch(prompt, request_id="a")
        hits = await prefetch.lookup_done
        assert hits.chunks == 5
        for number in range(10, 20):
            await fill(cache, make_prompt(8, number))
        gate.release("load")
        assert (await prefetch.load_done).chunks == 5
        for number in range(20, 30):
            await fill(cache, make_prompt(8, number))
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1, 2, 3, 4]


async def test_the_load_time_is_expected_from_the_throughput_measured():
    backend = ThrottledBackend(MemoryBackend(), latency_seconds=0.5, bytes_per_second=64)
    await seed(backend, make_prompt(8, 1))
    await seed(backend, make_prompt(8, 2))
    async with open_cache(backend) as cache:
        first = cache.prefetch(make_prompt(8, 1))
        assert (await first.lookup_done).expected_load_seconds is None
        assert (await first.load_done).seconds >= 2
        second = cache.prefetch(make_prompt(8, 2))
        hits = await second.lookup_done
        started = asyncio.get_running_loop().time()
        await second.load_done
        taken = asyncio.get_running_loop().time() - started
        assert hits.expected_load_seconds == pytest.approx(taken, rel=0.6)


async def test_no_load_is_expected_sooner_than_the_fastest_call_of_late():
    backend = ThrottledBackend(MemoryBackend(), latency_seconds=0.5)
    for number in range(20):
        await seed(backend, make_prompt(8, number))
    async with open_cache(backend, pages=512) as cache:
        at_once = [cache.prefetch(make_prompt(8, number)) for number in range(16)]
        for prefetch in at_once:
            await prefetch.load_done
        for number in range(16, 20):
            hits = await cache.prefetch(make_prompt(8, number)).lookup_done
            assert hits.expected_load_seconds == pytest.approx(0.5, rel=0.2)
            await settle()


async def test_the_load_time_counts_what_is_queued_before_it():
    gate = GatedBackend(ThrottledBackend(MemoryBackend(), latency_seconds=0.0, bytes_per_second=64))
    for number in (1, 2, 3):
        await seed(gate, make_prompt(8, number))
    async with open_cache(gate) as cache:
        await read_back(cache, make_prompt(8, 1))
        gate.hold("load")
        alone = await cache.prefetch(make_prompt(8, 2)).lookup_done
        behind = await cache.prefetch(make_prompt(8, 3)).lookup_done
        assert behind.expected_load_seconds > alone.expected_load_seconds > 0
        gate.release("load")
        await settle()


async def test_the_seconds_of_a_result_run_from_the_prefetch_to_the_end_of_the_load():
    gate = GatedBackend(MemoryBackend())
    await seed(gate, make_prompt(1))
    async with open_cache(gate) as cache:
        gate.hold("load")
        prefetch = cache.prefetch(make_prompt(1))
        await gate.reached("load")
        await asyncio.sleep(7)
        gate.release("load")
        assert (await prefetch.load_done).seconds == pytest.approx(7, abs=0.1)


async def test_the_futures_raise_only_when_the_cache_closes():
    gate = GatedBackend(MemoryBackend())
    await seed(gate, make_prompt(1))
    async with open_cache(gate) as cache:
        gate.hold("load")
        prefetch = cache.prefetch(make_prompt(1))
        await gate.reached("load")
        waiting = prefetch.load_done
    with pytest.raises(CacheClosedError):
        await waiting


@pytest.mark.memory
async def test_the_arena_is_one_fixed_piece_of_memory():
    async with open_cache(pages=16) as cache:
        arena = memoryview(cache.memory)
        assert arena.nbytes <= 16 * PAGE
        await fill(cache, make_prompt(4))
        assert memoryview(cache.memory).nbytes == arena.nbytes
        arena.release()


@pytest.mark.real_time
async def test_a_long_prompt_is_prefetched_without_holding_the_loop():
    layout = make_prompt(1).layout
    prompt = layout.prompt(range(400_000))
    async with open_cache(pages=8) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        assert not prompt.hashed
        assert (await prefetch.lookup_done).chunks == 0
        async with cache.store(prompt) as writer:
            assert len(writer) >= 1
        assert (await cache.query_status("a")).chunks == 0
