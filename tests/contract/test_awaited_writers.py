"""A lookup that waits for chunks that a writer has announced: one engine stores, another one waits."""

import asyncio

import pytest

from async_cache import CacheClosedError, CacheConfig, ChunkState, Shortfall, UnknownRequestError
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import GatedBackend

from .support import (
    PAGE,
    TWO_RANKS,
    assert_nothing_held,
    fill,
    make_cache,
    make_prompt,
    open_cache,
    read_back,
    seed,
    settle,
    verify,
    write,
)

PROMPT = make_prompt(4)
LONGER = make_prompt(6)


async def commit(writer, prompt, count, rank=0, seconds=1.0):
    """Commit so many chunks, one a second."""
    for chunk in writer.chunks[:count]:
        await asyncio.sleep(seconds)
        write(chunk, prompt, rank)
        chunk.commit()


async def test_a_lookup_waits_until_what_is_announced_is_committed():
    async with open_cache() as cache:
        began = asyncio.get_running_loop().time()
        async with cache.store(PROMPT) as writer:
            storing = asyncio.create_task(commit(writer, PROMPT, 4))
            prefetch = cache.prefetch(LONGER, request_id="a", wait_for_writers_seconds=60)
            impatient = cache.prefetch(PROMPT, request_id="b")
            assert (await impatient.lookup_done).chunks == 0
            assert (await prefetch.lookup_done).chunks == 4
            assert asyncio.get_running_loop().time() - began == pytest.approx(4, abs=0.1)
            await storing
        async with cache.read("a") as lease:
            assert verify(lease, PROMPT) == [0, 1, 2, 3]
        await cache.end_request("b")
        await assert_nothing_held(cache)


async def test_it_waits_no_longer_than_it_was_told():
    async with open_cache() as cache:
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with cache.store(PROMPT) as writer:
            storing = asyncio.create_task(commit(writer, PROMPT, 4))
            hits = await cache.prefetch(PROMPT, request_id="a", wait_for_writers_seconds=2.5).lookup_done
            assert loop.time() - began == pytest.approx(2.5, abs=0.1)
            assert (hits.chunks, hits.shortfall, hits.missed.state) == (2, None, ChunkState.WRITING)
            await cache.end_request("a")
            await storing
        await assert_nothing_held(cache)


@pytest.mark.parametrize("how", ["close", "expire"])
async def test_what_a_writer_gives_up_is_not_waited_for(how):
    async with open_cache(reservation_ttl_seconds=5.0) as cache:
        writer = await cache.store(PROMPT)
        await commit(writer, PROMPT, 2)
        prefetch = cache.prefetch(PROMPT, request_id="a", wait_for_writers_seconds=600)
        await asyncio.sleep(1)
        if how == "close":
            writer.close()
            await writer.settled()
        assert (await asyncio.wait_for(prefetch.lookup_done, 10)).chunks == 2
        await cache.end_request("a")
        writer.close()
        await settle()
        await assert_nothing_held(cache)


async def test_all_ranks_are_waited_for():
    prompt = make_prompt(3, layout=TWO_RANKS)
    async with open_cache() as cache, cache.store(prompt, rank=0) as first, cache.store(prompt, rank=1) as second:
        storing = [
            asyncio.create_task(commit(first, prompt, 3, 0, 1.0)),
            asyncio.create_task(commit(second, prompt, 3, 1, 2.0)),
        ]
        prefetch = cache.prefetch(prompt, request_id="a", wait_for_writers_seconds=60)
        assert (await prefetch.lookup_done).chunks == 3
        await asyncio.gather(*storing)
        await cache.end_request("a")
        assert await read_back(cache, prompt) == 3


async def test_nobody_waits_where_nothing_is_announced():
    async with open_cache() as cache:
        await fill(cache, make_prompt(2))
        async with cache.store(make_prompt(4, 2)):  # another prompt
            prefetch = cache.prefetch(PROMPT, request_id="a", wait_for_writers_seconds=600)
            assert (await asyncio.wait_for(prefetch.lookup_done, 1)).chunks == 2
            await cache.end_request("a")


async def test_what_is_committed_meanwhile_is_found_beside_what_storage_has():
    gate = GatedBackend(MemoryBackend(), "load")
    await seed(gate, make_prompt(2))
    async with open_cache(gate) as cache, cache.store(PROMPT, start_chunk=2) as writer:
        storing = asyncio.create_task(commit(writer, PROMPT, 2))
        prefetch = cache.prefetch(PROMPT, request_id="a", wait_for_writers_seconds=60)
        hits = await prefetch.lookup_done
        assert (hits.l1_chunks, hits.l2_chunks) == (2, 2)
        gate.release()
        assert (await prefetch.load_done).chunks == 4
        await storing
        async with cache.read("a") as lease:
            assert verify(lease, PROMPT) == [0, 1, 2, 3]
        await assert_nothing_held(cache)


async def test_a_deadline_ends_the_wait_too():
    async with open_cache() as cache, cache.store(PROMPT):
        prefetch = cache.prefetch(PROMPT, request_id="a", deadline_seconds=1, wait_for_writers_seconds=60)
        hits = await asyncio.wait_for(prefetch.lookup_done, 2)
        assert (hits.chunks, hits.shortfall) == (0, Shortfall.DEADLINE)
        await cache.end_request("a")


@pytest.mark.parametrize("how", ["cancel", "end"])
async def test_a_request_that_ends_while_it_waits_holds_nothing(how):
    async with open_cache() as cache:
        async with cache.store(PROMPT):
            prefetch = cache.prefetch(PROMPT, request_id="a", wait_for_writers_seconds=600)
            waiting = asyncio.ensure_future(cache.query_lookup_hits("a"))
            await asyncio.sleep(1)
            if how == "cancel":
                prefetch.cancel()
                assert (await waiting).shortfall is Shortfall.CANCELLED
            else:
                await cache.end_request("a")
                with pytest.raises(UnknownRequestError):
                    await waiting
            assert (await prefetch.load_done).chunks == 0
        await cache.end_request("a")
        await settle()
        await assert_nothing_held(cache)


async def test_closing_ends_the_wait():
    async with make_cache(CacheConfig(l1_bytes=64 * PAGE, l2=[]), []) as cache:
        writer = await cache.store(PROMPT)
        prefetch = cache.prefetch(PROMPT, request_id="a", wait_for_writers_seconds=600)
        waiting = prefetch.lookup_done
        await asyncio.sleep(1)
        await cache.close()
        with pytest.raises(CacheClosedError):
            await waiting
        writer.close()


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "1"])
async def test_a_wait_that_cannot_be_is_refused(wrong):
    async with open_cache() as cache:
        with pytest.raises((ValueError, TypeError), match="wait_for_writers_seconds"):
            cache.prefetch(PROMPT, wait_for_writers_seconds=wrong)
