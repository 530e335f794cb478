"""Looking a prompt up from its head on: what is found is what the whole prompt would give, in time that follows it."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from unittest.mock import patch

import pytest
from contract.support import LAYOUT, fill, fill_l2, make_layout, make_prompt, open_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt.test_coverage import layouts, serves

from async_cache import AsyncCache, BackendError, CacheConfig, LookupHits, ModelLayout, ObjectGroup, Shortfall
from async_cache.aio.slices import turn
from async_cache.l2.backend import LookupNowait
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.keys import ObjectKey
from async_cache.read import hits, search
from async_cache.read.search import Search
from async_cache.testing.backends import WrappedBackend

CHUNKS = 9


@st.composite
def contents(draw: st.DrawFn) -> tuple[ModelLayout, list[int], list[int], int]:
    """A layout; by chunk, the objects in L1 and in L2; and how many chunks the engine has itself."""
    layout = draw(layouts())
    full = layout.objects.full_mask
    mask = st.just(0) | st.just(full) | st.integers(0, full).map(lambda bits: bits & full)
    masks = st.lists(mask, min_size=CHUNKS, max_size=CHUNKS)
    return layout, draw(masks), draw(masks), draw(st.integers(0, CHUNKS))


def one_part(self: Search) -> Iterator[tuple[int, int]]:
    """The whole prompt at once, as if nothing ended it."""
    yield 0, len(self.asked.hashes)


class Follower(MemoryBackend):
    """It answers at once when it has heard of what others stored, and not before."""

    follows = True

    def __init__(self, hears: Callable[[], Awaitable[object]] = turn):
        super().__init__()
        self.asked = 0  # keys that were asked for one by one
        self._hears = hears

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        return None

    present_nowait = lookup_nowait

    async def lookup_later(self) -> LookupNowait | None:
        return super().lookup_nowait if await self._hears() is not False else None

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        self.asked += len(keys)
        return await super().lookup(keys)


async def hits_of(
    layout: ModelLayout, l1: Sequence[int], l2: Sequence[int], start: int, *, way: str
) -> list[LookupHits]:
    """What a lookup and a prefetch say of a cache with these objects."""
    memory = Follower() if way == "later" else MemoryBackend()
    prompt = layout.prompt(range(CHUNKS * layout.chunk_tokens))
    backend = WrappedBackend(memory) if way == "asked" else memory
    async with AsyncCache(CacheConfig(l1_bytes=2**20, l2=[]), [backend]) as cache:
        for digest, mask in zip(prompt.chunk_hashes, l2, strict=True):
            keys = [ObjectKey(digest, *which) for which in layout.objects.members[mask]]
            await memory.store(keys, [memoryview(b"x")] * len(keys))
        store = cache.core.l1
        for digest, mask in zip(prompt.chunk_hashes, l1, strict=True):
            for rank in layout.objects.ranks[mask]:
                (room,) = store.reserve(layout, [(digest, rank)])
                store.commit(room, mask & layout.objects.rank_masks[rank])
        counted = await cache.lookup(prompt)
        prefetch = cache.prefetch(prompt, request_id="r", skip_tokens=start * layout.chunk_tokens)
        promised = await prefetch.lookup_done
        assert (await prefetch.load_done).chunks == promised.chunks
        cache.check_integrity()
        await cache.end_request("r")
        assert memory.pins == 0 and (await cache.stats()).leases == 0
        return [counted, promised]


@pytest.mark.parametrize("way", ["at once", "later", "asked"])
@settings(max_examples=150, deadline=None)
@given(contents(), st.integers(1, 4))
def test_what_is_found_is_what_the_whole_prompt_gives(
    way: str, case: tuple[ModelLayout, list[int], list[int], int], second: int
) -> None:
    layout, l1, l2, start = case
    with patch.object(search, "_FEW_CHUNKS", 0), patch.object(search, "_SECOND_CHUNKS", second):
        told = asyncio.run(hits_of(layout, l1, l2, start, way=way))
    with patch.object(Search, "parts", one_part):
        assert told == asyncio.run(hits_of(layout, l1, l2, start, way=way))
    exists = [here | there for here, there in zip(l1, l2, strict=True)]
    for said, found in zip(told, (exists, exists[start:]), strict=True):
        longest = max(n for n in range(len(found) + 1) if serves(layout, found, n))
        assert said.found_chunks == said.chunks == longest


@pytest.mark.parametrize("seed", range(20))
async def test_a_count_that_is_at_hand_is_what_a_prefetch_is_promised(seed: int) -> None:
    chance, layout = random.Random(seed), make_layout(ObjectGroup((1,), "uint8"))
    full = layout.objects.full_mask
    l1, l2 = ([full * (chance.random() < part) for _ in range(CHUNKS)] for part in (0.4, 0.9))
    with patch.object(hits, "_FIRST", 2), patch.object(hits, "_AT_ONCE", 3), patch.object(hits, "_TOUCHED_AT_ONCE", 2):
        counted, promised = await hits_of(layout, l1, l2, 0, way="at once")
    told = [(it.chunks, it.l1_chunks, it.l2_chunks, it.found_chunks, it.load_bytes) for it in (counted, promised)]
    assert told[0] == told[1]
    assert (counted.missed is None) == (counted.chunks == CHUNKS)


class Asked(MemoryBackend):
    """Counts the chunks that it is asked for, at once and otherwise."""

    at_once = otherwise = calls = 0

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        self.at_once += len(chunk_hashes)
        return super().lookup_nowait(chunk_hashes, objects)

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        self.calls += 1
        self.otherwise += len({key.chunk_hash for key in keys})
        return await super().lookup(keys)


class Counted(dict):  # type: ignore[type-arg]
    """An index of L1 that counts how often it is looked into."""

    finds = 0

    def get(self, *key: object) -> object:
        self.finds += 1
        return super().get(*key)


async def asked_for(cached: int, count: int, *, in_l1: bool) -> tuple[int, int]:
    """How many chunks L2 and L1 are asked for, where so many of a prompt are cached."""
    backend = Asked()
    prompt = make_prompt(count)
    async with open_cache(backend, pages=4096 + 64) as cache:
        if cached:
            await (fill if in_l1 else fill_l2)(cache, make_prompt(cached))
        backend.at_once = backend.otherwise = 0
        l1 = cache.core.l1
        index = Counted(l1.index)
        l1.find = index.get
        prefetch = cache.prefetch(prompt)
        assert (await prefetch.lookup_done).chunks == (await cache.lookup(prompt)).chunks == cached
        assert backend.otherwise == 0
        await prefetch.load_done
        return backend.at_once, index.finds


@pytest.mark.parametrize("count", [16, 64, 256, 4096])
@pytest.mark.parametrize("in_l1", [False, True], ids=["in L2", "in L1"])
@pytest.mark.parametrize("cached", [0, 1, 2, 12])
async def test_what_is_asked_follows_what_is_found(cached: int, count: int, in_l1: bool) -> None:
    in_l2, looked = await asked_for(cached, count, in_l1=in_l1)
    bound = min(count, 32 if count <= 32 or cached == 0 else 256)
    assert in_l2 <= 2 * bound  # a prefetch and a lookup
    assert looked <= 3 * bound + 1 + cached


async def test_a_long_prompt_is_asked_in_parts_that_grow() -> None:
    in_l2, _ = await asked_for(300, 4096, in_l1=False)
    assert in_l2 <= 300 + 2 * 8 * 300
    in_l2, _ = await asked_for(3000, 4096, in_l1=False)
    assert in_l2 <= 2 * 4096


async def test_a_backend_that_has_to_be_asked_is_asked_once_for_all() -> None:
    backend = Asked()
    async with open_cache(WrappedBackend(backend)) as cache:
        assert (await cache.lookup(make_prompt(4096))).chunks == 0
        assert (await cache.prefetch(make_prompt(4096)).lookup_done).chunks == 0
    assert (backend.calls, backend.otherwise, backend.at_once) == (2, 2 * 4096, 0)


async def test_the_tail_of_a_window_is_found_behind_a_gap() -> None:
    layout = make_layout(ObjectGroup((16,), "uint8", window_chunks=2))
    prompt = make_prompt(600, layout=layout)
    async with open_cache(MemoryBackend(), pages=2048) as cache:
        await fill(cache, prompt, chunks=(598, 599))
        assert (await cache.lookup(prompt)).chunks == 600
        await cache.flush()
        await cache.clear()
        assert (await cache.lookup(prompt)).l2_chunks == 2
        assert (await cache.prefetch(prompt).load_done).chunks == 600


async def test_the_tail_leaves_l2_before_the_head_however_many_parts_it_was_asked_in() -> None:
    prompt = make_prompt(600)
    memory = MemoryBackend()
    async with open_cache(memory, pages=2048) as cache:
        await fill_l2(cache, make_prompt(3, 2), prompt)
        await cache.prefetch(prompt).load_done
        await cache.lookup(make_prompt(3, 2))
        assert [chunk.chunk_hash for chunk in memory._index._policy.victims()] == [
            *reversed(prompt.chunk_hashes),
            *reversed(LAYOUT.prompt(list(range(200_000, 200_012))).chunk_hashes),
        ]


async def test_what_has_heard_of_others_is_not_asked_for_each_chunk_of_a_miss() -> None:
    backend = Follower()
    async with open_cache(backend) as cache:
        stored, absent = make_prompt(3), make_prompt(3000, 2)
        await fill_l2(cache, stored)
        backend.asked = 0  # by the store
        for prompt, chunks in ((absent, 0), (stored, 3), (absent, 0)):
            assert (await cache.lookup(prompt)).chunks == chunks
            prefetch = cache.prefetch(prompt, request_id="r")
            assert (await prefetch.load_done).chunks == chunks
            await cache.end_request("r")
        assert backend.asked == 0
        assert backend.pins == 0


async def test_where_it_cannot_answer_later_either_it_is_asked() -> None:
    async def in_vain() -> bool:
        return False

    backend = Follower(in_vain)
    async with open_cache(backend) as cache:
        await fill_l2(cache, make_prompt(3))
        backend.asked = 0  # by the store
        assert (await cache.lookup(make_prompt(5))).chunks == 3
        assert backend.asked == 5
        assert backend.pins == 0


async def test_where_it_fails_to_hear_of_others_what_it_might_have_is_not_there() -> None:
    async def broken() -> None:
        raise BackendError("broken")

    backend = Follower(broken)
    async with open_cache(backend) as cache:
        await fill_l2(cache, make_prompt(3))
        backend.asked = 0  # by the store
        prefetch = cache.prefetch(make_prompt(3), request_id="r")
        hits = await prefetch.lookup_done
        assert (hits.chunks, hits.shortfall) == (0, Shortfall.BACKEND_ERROR)
        assert backend.asked == backend.pins == 0


async def test_what_is_deleted_while_it_hears_of_others_is_not_found() -> None:
    hearing, heard = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        hearing.set()
        await heard.wait()

    backend = Follower(wait)
    async with open_cache(backend) as cache:
        prompt = make_prompt(3)
        await fill_l2(cache, prompt)
        counting, prefetch = asyncio.create_task(cache.lookup(prompt)), cache.prefetch(prompt, request_id="r")
        await hearing.wait()
        deleting = asyncio.create_task(cache.delete(prompt))
        await asyncio.sleep(0)
        heard.set()
        assert (await prefetch.load_done).chunks == (await counting).chunks == 0
        assert (await deleting).chunks == 3
        assert backend.pins == 0
