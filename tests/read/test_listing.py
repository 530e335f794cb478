"""Listing: what is in a tier, in pages, whatever is stored and removed meanwhile."""

import asyncio
import random

import pytest
from contract.support import TWO_RANKS, fill, make_prompt, seed, settle

from async_cache import AsyncCache, BackendError, CacheConfig, ConfigError, ObjectKey
from async_cache.l2.memory import MemoryBackend
from async_cache.values import ListedChunk


def opened(*backends, l1_bytes=2**20):
    return AsyncCache(CacheConfig(l1_bytes=l1_bytes), backends)


async def pages(cache, backend, limit):
    """All pages of a backend, one after the other."""
    listing, found = cache.core.listing, []
    while page := await listing.stored(backend, found[-1].chunk_hash if found else b"", limit):
        assert len(page) <= limit
        found += page
    return found


async def test_a_backend_is_listed_with_what_it_keeps_of_each_chunk():
    here, only_there = make_prompt(2, 1, TWO_RANKS, salt="red"), make_prompt(3, 2, TWO_RANKS)
    backend = MemoryBackend("near")
    await seed(backend, only_there)
    await seed(backend, make_prompt(1, 3, TWO_RANKS), ranks=[1])
    async with opened(MemoryBackend("other"), backend) as cache:
        await fill(cache, here, ranks=[0, 1])
        await cache.flush()
        found = await pages(cache, "near", 4)
    half = make_prompt(1, 3, TWO_RANKS).chunk_hashes[0]
    wanted = [ListedChunk(h, "model", "red", 32, 0, 0) for h in here.chunk_hashes]
    wanted += [ListedChunk(h, "", "", 32, 0, 0) for h in only_there.chunk_hashes] + [
        ListedChunk(half, "", "", 16, 0, 0)
    ]
    assert found == sorted(wanted, key=lambda chunk: chunk.chunk_hash)


@pytest.mark.parametrize("limit", [1, 7, 1000])
async def test_pages_are_all_there_is_whatever_the_order_of_the_backend(limit):
    """The objects of a chunk may be listed far from each other."""
    count = 20 if limit == 1 else 6000
    keys = [ObjectKey(number.to_bytes(32, "big"), rank, 0) for number in range(count) for rank in (0, 1)]
    random.Random(limit).shuffle(keys)
    backend = MemoryBackend("near")
    await backend.open()
    await backend.store(keys, [memoryview(bytes(10 + key.rank)) for key in keys])
    async with opened(backend) as cache:
        if limit == 7:
            found = await cache.core.listing.stored("near", (17).to_bytes(32, "big"), limit)
            assert [int.from_bytes(chunk.chunk_hash, "big") for chunk in found] == list(range(18, 25))
        else:
            found = await pages(cache, "near", limit)
            assert [int.from_bytes(chunk.chunk_hash, "big") for chunk in found] == list(range(count))
        assert {chunk.room_bytes for chunk in found} == {21}


class Listed(MemoryBackend):
    """A backend that waits at a gate before it lists its last object, and breaks off there if it is told to."""

    def __init__(self, *, breaks=False):
        super().__init__("near")
        self.gate, self.begun, self.ended, self.breaks = asyncio.Event(), 0, 0, breaks

    async def keys(self):
        self.begun += 1
        try:
            inner = super().keys()
            objects = [pair async for pair in inner]
            for pair in objects[:-1]:
                yield pair
            await self.gate.wait()
            if self.breaks:
                raise OSError("the directory is gone")
            yield objects[-1]
        finally:
            self.ended += 1


async def test_what_cannot_be_listed_is_told():
    backend = Listed(breaks=True)
    backend.gate.set()
    async with opened(backend) as cache:
        await fill(cache, make_prompt(2))
        await cache.flush()
        with pytest.raises(BackendError, match="near failed: the directory is gone"):
            await cache.core.listing.stored("near", b"", 10)
        with pytest.raises(ConfigError, match="there is no backend 'far': there is near"):
            await cache.core.listing.stored("far", b"", 10)
        await cache.remove_backend("near")


async def test_a_backend_stays_until_it_is_listed_and_who_gives_up_keeps_nothing():
    backend = Listed()
    async with opened(backend) as cache:
        await fill(cache, make_prompt(2))
        await cache.flush()
        listing = [asyncio.create_task(cache.core.listing.stored("near", b"", 10)) for _ in range(2)]
        await settle()
        assert backend.begun == 2
        removing = asyncio.create_task(cache.remove_backend("near"))
        listing[0].cancel()
        await asyncio.wait(listing[:1])
        assert listing[0].cancelled() and not removing.done() and not listing[1].done()
        backend.gate.set()
        assert [chunk.chunk_hash for chunk in await listing[1]] == sorted(make_prompt(2).chunk_hashes)
        await removing
        assert backend.ended == backend.begun == 3  # what leaves with it is told
        cache.check_integrity()


async def test_of_many_lists_that_are_asked_for_at_once_a_few_have_each_turn_of_the_loop():
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[])) as cache:
        await fill(cache, make_prompt(8))
        listing, turns = cache.core.listing, 0
        asked = [listing.chunks(lambda salt: True, None, None, b"", 10) for _ in range(20)]
        asked += [listing.roots(lambda salt: True) for _ in range(20)]
        lists = [asyncio.create_task(one) for one in asked]
        while not all(one.done() for one in lists):
            await asyncio.sleep(0)
            turns += 1
        assert turns >= len(lists) / 2
        assert [len(one.result()) for one in lists] == [8] * 20 + [1] * 20
