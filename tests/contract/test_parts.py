"""What is very much is done in parts: what others do between two of them makes no promise untrue."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
from faults.small_steps import small_steps

from async_cache import Deleted, ObjectGroup, Shortfall
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import GatedBackend

from .support import PAGE, Recorder, assert_nothing_held, make_layout, make_prompt, open_cache, read_back, seed, settle

A, B = make_prompt(14, 1), make_prompt(14, 2)
PAGES = 20  # of L1: the share of loads is 15


async def gated(*prompts):
    backend = GatedBackend(MemoryBackend())
    for prompt in prompts:
        await seed(backend, prompt)
    return backend


@pytest.fixture
def released_in_parts() -> Iterator[None]:
    """Loads are called for one by one, and released one by one."""
    with (
        patch("async_cache.aio.backlog.FEW", 1),
        patch("async_cache.read.batches._BATCH_CHUNKS", 1),
        patch("async_cache.read.loads._RELEASED_AT_ONCE", 1),
    ):
        yield


async def test_two_that_are_decided_in_parts_have_the_share_of_loads_between_them():
    backend = await gated(A, B)
    with small_steps():
        async with open_cache(backend, pages=PAGES) as cache:
            backend.hold("load")
            prefetches = [cache.prefetch(prompt) for prompt in (A, B)]
            hits = [await prefetch.lookup_done for prefetch in prefetches]
            assert (await cache.stats()).reserved_bytes == 15 * PAGE
            assert sum(h.chunks for h in hits) == 15
            assert [(h.found_chunks, h.shortfall) for h in hits] == [(14, Shortfall.MEMORY)] * 2
            backend.release()
            for prefetch, promised in zip(prefetches, hits, strict=True):
                assert (await prefetch.load_done).chunks == promised.chunks
                await cache.end_request(prefetch.request_id)
            await assert_nothing_held(cache)


@pytest.mark.parametrize("windows", [(None, 2), (None, None)], ids=["window", "none"])
async def test_what_is_to_be_loaded_is_that_of_the_promise_where_it_became_shorter(windows):
    layout = make_layout(*(ObjectGroup((16,), "uint8", window_chunks=window) for window in windows))
    prompts = [make_prompt(14, number, layout) for number in (1, 2)]
    backend = await gated(*prompts)
    with small_steps():
        async with open_cache(backend, pages=PAGES) as cache:
            backend.hold("load")
            prefetches = [cache.prefetch(prompt) for prompt in prompts]
            for hits in [await prefetch.lookup_done for prefetch in prefetches]:
                assert 2 < hits.chunks == hits.l2_chunks < 14
                assert hits.load_bytes == 16 * (hits.chunks + (2 if windows[1] else hits.chunks))
            assert (await cache.stats()).shared_loads == 0
            backend.release()


async def test_what_a_cancelled_prefetch_gives_back_in_parts_is_there_for_the_next(released_in_parts):
    backend = await gated(A, B)
    async with open_cache(backend, pages=PAGES, load_inflight_bytes=1) as cache:
        backend.hold("load")
        first = cache.prefetch(A)
        assert (await first.lookup_done).chunks == 14
        first.cancel()
        backend.release()
        hits = await cache.prefetch(B, request_id="b").lookup_done
        assert (hits.chunks, hits.shortfall) == (14, None)
        assert await read_back(cache, B, request_id="b") == 14


async def test_what_a_cancelled_prefetch_gives_back_in_parts_is_there_for_a_writer(released_in_parts):
    backend = await gated(make_prompt(15, 1))
    async with open_cache(backend, pages=PAGES, load_inflight_bytes=1) as cache:
        backend.hold("load")
        first = cache.prefetch(make_prompt(15, 1))
        assert (await first.lookup_done).chunks == 15
        first.cancel()
        async with cache.store(B) as writer:
            assert (len(writer), writer.shortfall) == (14, None)


async def test_all_that_a_request_held_is_given_back_when_its_end_is_told(released_in_parts):
    backend = await gated(A)
    async with open_cache(backend, pages=PAGES, load_inflight_bytes=1) as cache:
        backend.hold("load")
        prefetch = cache.prefetch(A)
        assert (await prefetch.lookup_done).chunks == 14
        await cache.end_request(prefetch.request_id)
        assert (await cache.stats()).reserved_bytes <= PAGE  # of the call that is under way


async def test_a_cancelled_prefetch_begins_no_load_more_while_it_is_released_in_parts(released_in_parts):
    gate = await gated(A)
    backend = Recorder(gate)
    with patch("async_cache.read.batches._BATCH_CHUNKS", 7):
        async with open_cache(backend, pages=PAGES, load_inflight_bytes=1) as cache:
            gate.hold("load")
            first = cache.prefetch(A)
            assert (await first.lookup_done).chunks == 14
            await settle()
            assert backend.calls["load"] == 1
            first.cancel()
            await settle()
            assert backend.calls["load"] == 1
            gate.release()
            await cache.end_request(first.request_id)
            await settle()
            await assert_nothing_held(cache, backend)


@pytest.mark.parametrize(
    "remove",
    [lambda cache: cache.delete(A), lambda cache: cache.clear(tier="all"), lambda cache: cache.clear(tier="l1")],
    ids=["delete", "clear all", "clear l1"],
)
async def test_what_was_released_before_is_leased_no_more_though_it_is_given_back_in_parts(remove):
    backend = await gated(A)
    with small_steps():
        async with open_cache(backend, pages=PAGES) as cache:
            lease = await cache.read(cache.prefetch(A, request_id="a").request_id)
            assert len(lease) == 14
            lease.release()
            assert await remove(cache) == Deleted(14, leased=0)


async def test_what_is_still_read_is_leased_when_it_is_deleted_in_parts():
    backend = await gated(A)
    with small_steps():
        async with open_cache(backend, pages=PAGES) as cache:
            lease = await cache.read(cache.prefetch(A, request_id="a").request_id)
            assert await cache.delete(A) == Deleted(14, leased=14)
            assert (await cache.stats()).leases == 14
            lease.release()
            stats = await cache.stats()
            assert (stats.leases, stats.leased_bytes, stats.l1_used_bytes) == (0, 0, 0)


async def test_what_a_writer_looked_at_is_not_held_when_it_has_left():
    backend = await gated(A)
    with small_steps():
        async with open_cache(backend, pages=PAGES) as cache:
            assert await read_back(cache, A) == 14
            async with cache.store(A) as writer:
                assert len(writer) == 0
            await assert_nothing_held(cache)


async def test_what_a_count_pins_is_unpinned_before_it_is_told():
    backend = Recorder(await gated(A))
    with small_steps():
        async with open_cache(backend, pages=PAGES) as cache:
            assert (await cache.lookup(A)).chunks == 14
            await assert_nothing_held(cache, backend)
