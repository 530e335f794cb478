"""A call that outlasts its timeout owns its memory: nothing else gets it, and nothing else is written to it later."""

import asyncio

from async_cache import CacheConfig, ObjectGroup, Shortfall
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import GatedBackend

from .support import (
    PAGE,
    SMALL,
    TWO_RANKS,
    assert_nothing_held,
    fill,
    make_cache,
    make_layout,
    make_prompt,
    read_back,
    seed,
    verify,
)


async def test_a_load_that_waited_behind_others_is_not_started_into_room_that_was_given_back():
    slow, busy = GatedBackend(MemoryBackend("slow"), stubborn=True), GatedBackend(MemoryBackend("busy"))
    first, second, split = (make_prompt(1, number, TWO_RANKS) for number in (1, 2, 3))
    for prompt in (first, second):
        await seed(busy, prompt)
    await seed(slow, split, ranks=[0])
    await seed(busy, split, ranks=[1])
    config = CacheConfig(l1_bytes=8 * PAGE, load_inflight_bytes=1, load_timeout_seconds=30, prefetch_share=1)
    async with make_cache(config, [slow, busy]) as cache:
        slow.hold("load")
        busy.hold("load")
        for prompt, request_id in ((first, "first"), (second, "second")):
            await cache.prefetch(prompt, request_id=request_id).lookup_done
        await busy.reached("load", 1)
        await asyncio.sleep(20)
        prefetch = cache.prefetch(split, request_id="split")
        assert (await prefetch.lookup_done).chunks == 1  # one rank waits at the gate, the other in the queue
        await slow.reached("load", 1)
        await asyncio.sleep(5)
        busy.release("load")
        busy.hold("load")
        await busy.reached("load", 2)  # the second: the split one is still queued behind it
        result = await prefetch.load_done
        assert (result.chunks, result.shortfall) == (0, Shortfall.DEADLINE)
        assert (await cache.stats()).quarantined_bytes == 2 * PAGE
        await cache.end_request("split")

        slow.release("load")  # the stuck call ends, its room is given back, and given out again
        await asyncio.sleep(0.01)
        assert (await cache.stats()).quarantined_bytes == 0
        other = make_prompt(2, 4, TWO_RANKS)
        await fill(cache, other)
        async with cache.read(cache.prefetch(other, request_id="other").request_id) as lease:
            busy.release("load")
            for request_id in ("first", "second"):
                assert (await cache.query_status(request_id)).chunks == 1
            await asyncio.sleep(1)
            assert busy.calls["load"] == 2
            assert verify(lease, other) == [0, 1]
        for request_id in ("first", "second", "other"):
            await cache.end_request(request_id)
        assert await read_back(cache, other) == 2
        await assert_nothing_held(cache)


async def test_the_room_of_a_dropped_load_is_free_though_a_batch_that_never_took_it_runs_on():
    slow, busy = GatedBackend(MemoryBackend("slow"), stubborn=True), GatedBackend(MemoryBackend("busy"))
    first, split = make_prompt(1, 1, TWO_RANKS), make_prompt(2, 2, TWO_RANKS)
    await seed(busy, first)
    await seed(slow, split, ranks=[0])
    await seed(busy, split, ranks=[1])
    config = CacheConfig(l1_bytes=8 * PAGE, load_inflight_bytes=1, prefetch_share=1)
    async with make_cache(config, [slow, busy]) as cache:
        slow.hold("load")
        busy.hold("load")
        await cache.prefetch(first, request_id="first").lookup_done
        assert (await cache.prefetch(split, request_id="split").lookup_done).chunks == 2
        await slow.reached("load", 1)
        deletion = asyncio.ensure_future(cache.delete(make_prompt(1, 2, TWO_RANKS)))  # of two chunks the first
        await asyncio.sleep(0)
        busy.release("load")
        busy.hold("load")
        await busy.reached("load", 2)  # the batch of the second chunk alone
        slow.release("load")
        await asyncio.sleep(0.01)
        assert (await cache.stats()).reserved_bytes == 2 * PAGE  # of the second chunk
        busy.release("load")
        await deletion
        for request_id in ("first", "split"):
            await cache.end_request(request_id)
        await asyncio.sleep(0.01)
        await assert_nothing_held(cache)


async def test_what_an_abandoned_call_may_still_write_to_is_not_loaded_anew():
    layout = make_layout(SMALL, ObjectGroup((8,), "float32", window_chunks=1))
    long, short = make_prompt(3, 1, layout), make_prompt(2, 1, layout)
    gate = GatedBackend(MemoryBackend(), stubborn=True)
    await seed(gate, long)
    async with make_cache(CacheConfig(l1_bytes=8 * PAGE, prefetch_share=1), [gate]) as cache:
        assert await read_back(cache, long) == 3  # without what only a shorter prefix needs
        gate.hold("load")
        given_up = cache.prefetch(short)
        assert (await given_up.lookup_done).chunks == 2
        await gate.reached("load", 2)
        given_up.cancel()
        hits = await cache.prefetch(short, request_id="again").lookup_done
        assert (hits.chunks, hits.found_chunks, hits.shortfall) == (1, 2, Shortfall.MEMORY)
        gate.release("load")
        for request_id in ("again", given_up.request_id):
            await cache.end_request(request_id)
        await asyncio.sleep(0.01)
        assert await read_back(cache, short) == 2
        await assert_nothing_held(cache)
