"""A call that outlasts its timeout owns its memory: nothing else gets it, and nothing else is written to it later."""

import asyncio

from async_cache import AsyncCache, CacheConfig, Shortfall
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import GatedBackend

from .support import PAGE, TWO_RANKS, assert_nothing_held, fill, make_prompt, read_back, seed, verify


async def test_a_load_that_waited_behind_others_is_not_started_into_room_that_was_given_back():
    slow, busy = GatedBackend(MemoryBackend("slow"), stubborn=True), GatedBackend(MemoryBackend("busy"))
    first, second, split = (make_prompt(1, number, TWO_RANKS) for number in (1, 2, 3))
    for prompt in (first, second):
        await seed(busy, prompt)
    await seed(slow, split, ranks=[0])
    await seed(busy, split, ranks=[1])
    config = CacheConfig(l1_bytes=8 * PAGE, load_inflight_bytes=1, load_timeout_seconds=30, prefetch_share=1)
    async with AsyncCache(config, backends=[slow, busy]) as cache:
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
