"""What the statistics say."""

from async_cache import BackendUsage, CacheStats, ObjectGroup
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import GatedBackend

from .support import (
    OBJECT_BYTES,
    PAGE,
    TWO_RANKS,
    Recorder,
    assert_nothing_held,
    fill,
    fill_l2,
    make_layout,
    make_prompt,
    open_cache,
    read_back,
    seed,
)

PAGES = make_layout(ObjectGroup((PAGE,), "uint8"))


async def test_an_idle_cache_holds_nothing():
    async with open_cache(MemoryBackend(capacity_bytes=5000), pages=16) as cache:
        stats = await cache.stats()
        assert isinstance(stats, CacheStats)
        assert 14 * PAGE <= stats.l1_capacity_bytes <= 16 * PAGE
        assert stats.l1_used_bytes <= PAGE
        assert (stats.l1_chunks, stats.loads, stats.shared_loads) == (0, 0, 0)
        assert (stats.writebacks_pending, stats.writebacks_dropped) == (0, 0)
        assert stats.backends == {"memory": BackendUsage(objects=0, used_bytes=0, capacity_bytes=5000)}
        await assert_nothing_held(cache)


async def test_leases_count_pairs_of_request_and_chunk_and_leased_bytes_count_memory_once():
    prompt = make_prompt(4, layout=PAGES)
    async with open_cache() as cache:
        await fill(cache, prompt)
        await fill(cache, make_prompt(2, 2, PAGES))
        for request_id in ("a", "b", "c"):
            await cache.prefetch(prompt, request_id=request_id).load_done
        await cache.prefetch(make_prompt(2, layout=PAGES), request_id="d").load_done
        stats = await cache.stats()
        assert stats.requests == 4
        assert stats.leases == 3 * 4 + 2
        assert stats.leased_bytes == 4 * PAGE
        assert stats.l1_chunks == 6
        for request_id in ("a", "b", "c"):
            await cache.end_request(request_id)
        stats = await cache.stats()
        assert (stats.requests, stats.leases, stats.leased_bytes) == (1, 2, 2 * PAGE)


async def test_a_chunk_counts_once_however_many_ranks_it_has():
    async with open_cache() as cache:
        await fill(cache, make_prompt(3, layout=TWO_RANKS))
        await cache.prefetch(make_prompt(3, layout=TWO_RANKS)).load_done
        stats = await cache.stats()
        assert (stats.l1_chunks, stats.leases) == (3, 3)


async def test_loads_count_objects():
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, make_prompt(3, layout=TWO_RANKS))
        await read_back(cache, make_prompt(3, layout=TWO_RANKS))
        stats = await cache.stats()
        assert (stats.loads, stats.shared_loads) == (6, 0)
        assert stats.backends["memory"].objects == 6
        assert stats.backends["memory"].used_bytes == 6 * OBJECT_BYTES


async def test_shared_loads_count_objects_that_were_not_read_again():
    prompt = make_prompt(3)
    gate = GatedBackend(MemoryBackend())
    await seed(gate, prompt)
    async with open_cache(gate) as cache:
        gate.hold("load")
        await cache.prefetch(prompt).lookup_done
        await gate.reached("load")
        await cache.prefetch(make_prompt(2), request_id="b").lookup_done
        gate.release("load")
        await cache.query_status("b")
        stats = await cache.stats()
        assert (stats.loads, stats.shared_loads) == (3, 2)


async def test_reserved_bytes_rise_and_fall_with_the_reservations():
    async with open_cache(pages=16) as cache:
        async with cache.store(make_prompt(4, layout=PAGES)) as writer:
            assert (await cache.stats()).reserved_bytes == 4 * PAGE
            for left in (3, 2, 1, 0):
                writer[3 - left].commit()
                assert (await cache.stats()).reserved_bytes == left * PAGE
        stats = await cache.stats()
        assert (stats.l1_chunks, stats.reserved_bytes) == (4, 0)
        assert 4 * PAGE <= stats.l1_used_bytes <= 5 * PAGE


async def test_pending_write_backs_are_counted_in_chunks():
    gate = GatedBackend(MemoryBackend())
    async with open_cache(gate) as cache:
        gate.hold("store")
        await fill(cache, make_prompt(3))
        assert (await cache.stats()).writebacks_pending == 3
        gate.release("store")
        await cache.flush()
        assert (await cache.stats()).writebacks_pending == 0


async def test_every_backend_is_shown_by_its_name():
    first, second = Recorder(MemoryBackend(name="first")), MemoryBackend(name="second", capacity_bytes=10**6)
    await seed(first, make_prompt(3))
    async with open_cache(first, second) as cache:
        assert (await cache.stats()).backends == {
            "first": BackendUsage(objects=3, used_bytes=3 * OBJECT_BYTES, capacity_bytes=None),
            "second": BackendUsage(objects=0, used_bytes=0, capacity_bytes=10**6),
        }


async def test_counters_say_nothing_of_the_past_of_a_backend():
    backend = MemoryBackend()
    async with open_cache(backend) as cache:
        await fill_l2(cache, make_prompt(3))
        await read_back(cache, make_prompt(3))
    async with open_cache(backend) as cache:
        stats = await cache.stats()
        assert (stats.loads, stats.swept_results, stats.writebacks_dropped) == (0, 0, 0)
