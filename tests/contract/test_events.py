"""Events: what is stored and removed, in order, after the step that they tell of."""

import asyncio
import gc

import pytest

from async_cache import CacheClosedError, Removal, Removed, Skipped, Stored
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import flip_bit

from .support import (
    LAYOUT,
    TWO_RANKS,
    advance,
    count_hits,
    fill,
    fill_l2,
    make_layout,
    make_prompt,
    make_tokens,
    object_keys,
    open_cache,
    read_back,
    seed,
    settle,
)

CHUNK_TOKENS = 4


async def told(cache, events):
    """What has been told of all that was done before."""
    await settle()
    return events.take(1_000_000)


def stored(prompt, index, tier="l1", backend=None, parent=True):
    before = prompt.chunk_hashes[index - 1] if index and parent else None
    return Stored(prompt.chunk_hashes[index], before, CHUNK_TOKENS, tier, backend)


async def test_a_commit_is_told_with_its_parent_and_then_its_write_back():
    prompt = make_prompt(2)
    async with open_cache(MemoryBackend("disk")) as cache:
        events = cache.events()
        await fill(cache, prompt)
        await cache.flush()
        assert await told(cache, events) == [
            stored(prompt, 0),
            stored(prompt, 1),
            stored(prompt, 0, "l2", "disk"),
            stored(prompt, 1, "l2", "disk"),
        ]


async def test_a_chunk_is_stored_once_all_its_ranks_are():
    prompt = make_prompt(1, layout=TWO_RANKS)
    async with open_cache(MemoryBackend()) as cache:
        events = cache.events()
        await fill(cache, prompt, ranks=[0])
        await cache.flush()
        assert await told(cache, events) == []
        await fill(cache, prompt, ranks=[1])
        await cache.flush()
        assert await told(cache, events) == [stored(prompt, 0), stored(prompt, 0, "l2", "memory")]


async def test_a_backend_may_have_the_other_ranks_already():
    prompt = make_prompt(1, layout=TWO_RANKS)
    backend = MemoryBackend()
    await seed(backend, prompt, ranks=[1])
    async with open_cache(backend) as cache:
        events = cache.events()
        await fill(cache, prompt, ranks=[0])
        await cache.flush()
        assert await told(cache, events) == [stored(prompt, 0, "l2", "memory")]


async def test_what_is_loaded_is_stored_in_memory_with_its_parent():
    prompt = make_prompt(2)
    backend = MemoryBackend()
    await seed(backend, prompt)
    async with open_cache(backend) as cache:
        events = cache.events()
        assert await read_back(cache, prompt) == 2
        assert await told(cache, events) == [stored(prompt, 0), stored(prompt, 1)]


async def test_what_a_backend_has_already_is_not_stored_again():
    prompt = make_prompt(1)
    backend = MemoryBackend()
    await seed(backend, prompt)
    async with open_cache(backend) as cache:
        events = cache.events()
        await fill(cache, prompt)
        await cache.flush()
        assert await told(cache, events) == [stored(prompt, 0)]


async def test_what_makes_room_is_removed_for_capacity():
    first, second = make_prompt(2), make_prompt(2, 2)
    async with open_cache(pages=3) as cache:
        await fill(cache, first)
        events = cache.events()
        await fill(cache, second)
        assert await told(cache, events) == [
            Removed(first.chunk_hashes[1], "l1", None, Removal.CAPACITY),
            stored(second, 0),
            stored(second, 1),
        ]


async def test_what_a_backend_evicts_is_removed_from_it_once_whatever_its_ranks():
    first, second = (make_prompt(1, n, layout=TWO_RANKS) for n in (1, 2))
    async with open_cache(MemoryBackend("small", capacity_bytes=32)) as cache:
        await fill_l2(cache, first)
        events = cache.events()
        await fill(cache, second)
        await cache.flush()
        assert await told(cache, events) == [
            stored(second, 0),
            Removed(first.chunk_hashes[0], "l2", "small", Removal.CAPACITY),
            stored(second, 0, "l2", "small"),
        ]


async def test_what_is_deleted_is_removed_from_each_tier_once():
    prompt = make_prompt(2, layout=TWO_RANKS)
    async with open_cache(MemoryBackend()) as cache:
        await fill(cache, prompt)
        await cache.flush()
        events = cache.events()
        await cache.delete(prompt)
        assert await told(cache, events) == [
            Removed(chunk_hash, tier, backend, Removal.DELETED)
            for tier, backend in (("l1", None), ("l2", "memory"))
            for chunk_hash in prompt.chunk_hashes
        ]


async def test_what_is_damaged_is_removed_and_may_be_stored_again():
    prompt = make_prompt(1, layout=TWO_RANKS)
    backend = MemoryBackend()
    await seed(backend, prompt)
    flip_bit(backend, object_keys(prompt)[1])
    async with open_cache(backend) as cache:
        events = cache.events()
        assert await read_back(cache, prompt) == 0
        assert await told(cache, events) == [Removed(prompt.chunk_hashes[0], "l2", "memory", Removal.DAMAGED)]
        await fill(cache, prompt)
        await cache.flush()
        assert await told(cache, events) == [stored(prompt, 0), stored(prompt, 0, "l2", "memory")]
        await cache.delete(prompt)
        assert [type(event) for event in await told(cache, events)] == [Removed, Removed]


async def test_what_leaves_with_a_backend_is_lost_there_once_whatever_its_ranks():
    prompt = make_prompt(2, layout=TWO_RANKS)
    async with open_cache(MemoryBackend("near"), MemoryBackend("far")) as cache:
        await fill_l2(cache, prompt)
        events = cache.events()
        await cache.remove_backend("near")
        lost = [Removed(chunk_hash, "l2", "near", Removal.LOST) for chunk_hash in prompt.chunk_hashes]
        assert by_hash(await told(cache, events)) == by_hash(lost)
        assert await count_hits(cache, prompt) == 2  # by the other one
        await cache.remove_backend("far")
        assert {event.backend for event in await told(cache, events)} == {"far"}
        (span,) = (await cache.explain(prompt)).spans
        assert (span.removal, span.backend) == (Removal.LOST, "far")


async def test_a_backend_that_comes_back_may_lose_what_it_has_again():
    prompt = make_prompt(1)
    backend = MemoryBackend("near")
    async with open_cache(backend) as cache:
        core = core_of(cache)
        await fill_l2(cache, prompt)
        events = cache.events()
        for _ in range(2):
            await cache.remove_backend("near")
            assert await told(cache, events) == [Removed(prompt.chunk_hashes[0], "l2", "near", Removal.LOST)]
            await core.backends.add(backend)
            assert await count_hits(cache, prompt) == 1


async def test_a_backend_that_cannot_list_leaves_without_a_word():
    class Silent(MemoryBackend):
        async def keys(self):
            await asyncio.get_running_loop().create_future()
            yield

    prompt = make_prompt(1)
    async with open_cache(Silent("near")) as cache:
        await fill_l2(cache, prompt)
        events = cache.events()
        began = asyncio.get_running_loop().time()
        await cache.remove_backend("near")
        assert asyncio.get_running_loop().time() - began < 12
        assert await told(cache, events) == []


@pytest.mark.parametrize("layout", [LAYOUT, TWO_RANKS], ids=["one object", "two ranks"])
@pytest.mark.parametrize("here", [True, False], ids=["in memory", "elsewhere"])
async def test_what_is_drained_is_stored_where_it_goes_and_then_leaves(here, layout):
    """A chunk of which L1 knows nothing comes without its parent, and is told to those only who hear of all salts."""
    prompt = make_prompt(3, layout=layout)
    async with open_cache(MemoryBackend("near")) as cache:
        await fill(cache, prompt)
        await cache.flush()
        if not here:
            await cache.clear("l1")
        await cache.add_backend("memory://far")
        events, of_a_tenant = cache.events(), core_of(cache).events.stream(100, [prompt.salt])
        await cache.drain_backend("near")
        wanted = by_hash([stored(prompt, n, "l2", "far", parent=here) for n in range(3)])
        assert by_hash(await told(cache, events)) == wanted
        assert by_hash(await told(cache, of_a_tenant)) == (wanted if here else [])
        await cache.remove_backend("near")
        assert {(event.backend, event.removal) for event in await told(cache, events)} == {("near", Removal.LOST)}


async def test_a_chunk_whose_objects_are_copied_side_by_side_is_stored_once():
    """Some chunks have objects in two of the slices that a backend lists."""
    prompt = make_prompt(1000, layout=make_layout(world_size=3))
    async with open_cache(MemoryBackend("near"), pages=4000) as cache:
        await fill_l2(cache, prompt)
        await cache.add_backend("memory://far")
        events = cache.events()
        await cache.drain_backend("near")
        assert by_hash(await told(cache, events)) == by_hash(
            [stored(prompt, n, "l2", "far", parent=False) for n in range(1000)]
        )


async def test_what_is_drained_in_part_is_not_stored():
    """The backend has one rank of two: whatever else has the other, where that is copied to is not whole."""
    prompt = make_prompt(1, layout=TWO_RANKS)
    near = MemoryBackend("near")
    await seed(near, prompt, ranks=[0])
    async with open_cache(near) as cache:
        await fill(cache, make_prompt(1, 2, TWO_RANKS), ranks=[0])  # so that the layout is known
        await cache.flush()
        await cache.clear("l1")
        await cache.add_backend("memory://far")
        events = cache.events()
        await cache.drain_backend("near")
        assert await told(cache, events) == []


async def test_what_expires_is_removed_when_it_does_and_not_before():
    prompt, renewed, deleted = make_prompt(2), make_prompt(1, 2), make_prompt(1, 3)
    backend = MemoryBackend("far")
    backend.ttl_seconds = 60.0  # as a Valkey with `ttl=60`
    async with open_cache(backend) as cache:
        events = cache.events()
        await fill_l2(cache, prompt)
        await fill_l2(cache, renewed)
        await fill_l2(cache, deleted)
        await advance(30)
        await cache.delete(deleted)
        await cache.delete(renewed)
        await fill_l2(cache, renewed)
        await told(cache, events)
        await advance(29)
        assert await told(cache, events) == []
        await advance(2)
        expired = [Removed(chunk_hash, "l2", "far", Removal.EXPIRED) for chunk_hash in prompt.chunk_hashes]
        assert by_hash(await told(cache, events)) == by_hash(expired)
        await advance(40)
        assert await told(cache, events) == [Removed(renewed.chunk_hashes[0], "l2", "far", Removal.EXPIRED)]


def by_hash(events):
    """A backend lists what it has in any order."""
    return sorted(events, key=lambda event: event.chunk_hash)


async def test_events_are_those_after_the_call():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        await fill(cache, prompt, chunks=[0])
        events = cache.events()
        await fill(cache, prompt)
        assert await anext(events) == stored(prompt, 1)


async def test_every_reader_is_told_everything():
    prompt = make_prompt(3)
    async with open_cache() as cache:
        streams = [cache.events() for _ in range(3)]
        await fill(cache, prompt)
        for events in streams:
            assert [await anext(events) for _ in range(3)] == [stored(prompt, n) for n in range(3)]


async def test_a_reader_that_is_too_slow_sees_how_many_it_missed_where_it_did():
    prompt = make_prompt(8)
    async with open_cache() as cache:
        events, other = cache.events(capacity=3), cache.events()
        await fill(cache, prompt, chunks=range(6))
        assert await told(cache, events) == [stored(prompt, 0), stored(prompt, 1), stored(prompt, 2), Skipped(3)]
        await fill(cache, prompt)
        assert await told(cache, events) == [stored(prompt, 6), stored(prompt, 7)]
        assert len(await told(cache, other)) == 8


async def test_a_wait_that_is_cancelled_loses_nothing():
    prompt = make_prompt(1)
    async with open_cache() as cache:
        events = cache.events()
        waiting = asyncio.create_task(anext(events))
        await settle()
        waiting.cancel()
        await asyncio.wait([waiting])
        await fill(cache, prompt)
        assert await anext(events) == stored(prompt, 0)


async def test_closing_ends_it_for_who_waits_and_leaves_nothing():
    async with open_cache() as cache:
        core = core_of(cache)
        events = cache.events()
        waiting = asyncio.create_task(anext(events, None))
        await settle()
        assert core.observers.committed
        await events.aclose()
        await events.aclose()
        assert await waiting is None
        assert [event async for event in events] == []
        await settle()
        assert not (core.observers.committed or core.observers.left or core.observers.stored)


async def test_a_stream_that_nobody_has_any_more_leaves_nothing():
    prompt = make_prompt(1)
    async with open_cache() as cache:
        core = core_of(cache)

        async def read():
            async for event in cache.events():
                return event
            raise AssertionError("it ended")

        reading = asyncio.create_task(read())
        await settle()
        await fill(cache, prompt)
        assert await reading == stored(prompt, 0)
        waiting = asyncio.create_task(read())
        await settle()
        waiting.cancel()
        await asyncio.wait([waiting])
        del waiting, reading
        gc.collect()
        await fill(cache, make_prompt(1, 2))
        await settle()
        assert not core.observers.committed
        if core is not getattr(cache, "core", None):
            assert not [call for call in cache._links.current.calls.values() if type(call).__name__ == "EventsCall"]


def core_of(cache):
    """The core behind a cache of any kind."""
    return cache._cache.core if hasattr(cache, "_cache") else cache.core


async def test_the_end_of_the_cache_ends_the_stream_behind_what_was_told():
    prompt = make_prompt(1)
    async with open_cache() as cache:
        events = cache.events()
        await fill(cache, prompt)
        await settle()
        waiting = asyncio.create_task(collect(events))
    seen, error = await waiting
    assert seen == [stored(prompt, 0)] and isinstance(error, CacheClosedError)
    with pytest.raises(CacheClosedError):
        await anext(events)
    with pytest.raises(CacheClosedError):
        cache.events()


async def collect(events):
    seen = []
    try:
        async for event in events:
            seen.append(event)
    except Exception as error:
        return seen, error


@pytest.mark.parametrize("capacity", [0, -1, 2**32, 1.5, True, "1"])
async def test_a_capacity_that_cannot_be_is_refused(capacity):
    async with open_cache() as cache:
        with pytest.raises((TypeError, ValueError)):
            cache.events(capacity)


async def test_who_explains_and_who_listens_agree():
    """What the events say was removed last is what the explanation says."""
    prompt, other = make_prompt(3), make_prompt(3, 2)
    async with open_cache(MemoryBackend("small", capacity_bytes=64), pages=4) as cache:
        events = cache.events()
        for stored_prompt in (prompt, other, prompt, other):
            await fill(cache, stored_prompt)
            await cache.flush()
        there, gone = {}, {}
        for event in await told(cache, events):
            tiers = there.setdefault(event.chunk_hash, set())
            if isinstance(event, Stored):
                tiers.add(event.tier)
            else:
                tiers.discard(event.tier)
                gone[event.chunk_hash] = event
        for one in (prompt, other):
            for span in (await cache.explain(one)).spans:
                for index in range(span.start_chunk, span.start_chunk + span.chunks):
                    chunk_hash = one.chunk_hashes[index]
                    if tiers := there[chunk_hash]:
                        assert span.state.value == min(tiers)
                    else:
                        assert (span.removal, span.backend) == (gone[chunk_hash].removal, gone[chunk_hash].backend)


async def test_an_engines_digests_have_parents_too():
    prompt = LAYOUT.prompt_from_digests([bytes([n]) * 16 for n in range(2)])
    async with open_cache() as cache:
        events = cache.events()
        await fill(cache, prompt)
        assert await told(cache, events) == [stored(prompt, 0), stored(prompt, 1)]


async def test_a_chunk_that_a_shorter_prompt_stored_has_the_same_parent():
    tokens = make_tokens(2)
    async with open_cache() as cache:
        await fill(cache, LAYOUT.prompt(tokens[:4]))
        events = cache.events()
        prompt = LAYOUT.prompt(tokens)
        await fill(cache, prompt)
        assert await told(cache, events) == [stored(prompt, 1)]
