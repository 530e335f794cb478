"""Delete and clear: not found from that moment, and what is in flight is not resurrected."""

import asyncio
from contextlib import suppress
from itertools import count

import pytest

from async_cache import BackendError, CacheClosedError, Deleted, Shortfall
from async_cache.aio import backlog
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.keys import ObjectKey
from async_cache.testing.backends import GatedBackend, WrappedBackend
from async_cache.write import removal

from .support import (
    TWO_RANKS,
    Recorder,
    advance,
    assert_nothing_held,
    count_hits,
    fill,
    fill_l2,
    make_prompt,
    open_cache,
    read_back,
    seed,
    settle,
    verify,
)


class Endless(MemoryBackend):
    """Lists ever different objects, few of which it has, and takes its time."""

    async def keys(self):
        async for item in super().keys():
            yield item
        for number in count():
            if number % 256 == 0:
                await asyncio.sleep(10)
            yield ObjectKey(number.to_bytes(32, "big"), 0, 0), 16


async def test_to_clear_storage_whose_listing_does_not_end_ends_and_says_what_is_left():
    backend = Endless()
    async with open_cache(backend) as cache:
        await fill(cache, make_prompt(4))
        await cache.flush()
        with pytest.raises(
            BackendError, match=r"still lists objects after 3600 s: 4 objects were deleted, and .* left"
        ):
            await cache.clear("all")
        assert 3600 < asyncio.get_running_loop().time() < 3700
        assert backend.usage().objects == 0
        await fill(cache, make_prompt(2))
        assert await read_back(cache, make_prompt(2)) == 2


@pytest.mark.embedded
@pytest.mark.parametrize("turns", range(0, 40, 3))
@pytest.mark.parametrize("what", ["delete", "clear"])
async def test_a_removal_that_the_close_of_the_cache_cancels_leaves_no_tombstone(what, turns, monkeypatch):
    monkeypatch.setattr(removal, "_AT_ONCE", 1)
    monkeypatch.setattr(backlog, "FEW", 1)
    prompt = make_prompt(6)
    async with open_cache(MemoryBackend()) as cache:
        await fill(cache, prompt)
        core = cache.core
        removing = asyncio.create_task(cache.delete(prompt) if what == "delete" else cache.clear("all"))
        await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        await core.remover.close()
        assert not core.remover._tombstones
        with suppress(CacheClosedError):
            await removing


@pytest.mark.parametrize("where", ["l1", "l2", "both"])
async def test_a_deleted_prompt_is_found_nowhere(where):
    prompt = make_prompt(4, layout=TWO_RANKS)
    recorder = Recorder(MemoryBackend())
    async with open_cache(*([] if where == "l1" else [recorder])) as cache:
        idle = (await cache.stats()).l1_used_bytes
        await (fill_l2 if where == "l2" else fill)(cache, prompt)
        await cache.flush()
        assert await cache.delete(prompt) == Deleted(chunks=4, leased=0)
        assert await count_hits(cache, prompt) == 0
        assert recorder.usage().objects == 0
        assert (await cache.stats()).l1_used_bytes == idle
        assert await cache.delete(prompt) == Deleted(chunks=0, leased=0)
        await assert_nothing_held(cache, recorder)


async def test_a_delete_counts_every_chunk_once_wherever_it_lies():
    prompt = make_prompt(5)
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, make_prompt(3))
        await read_back(cache, make_prompt(2))
        await fill(cache, prompt)
        assert await cache.delete(prompt) == Deleted(chunks=5, leased=0)


async def test_a_delete_takes_the_chunks_of_the_prompt_and_no_others():
    async with open_cache(MemoryBackend()) as cache:
        await fill(cache, make_prompt(5))
        await fill(cache, make_prompt(5, 2))
        await fill(cache, make_prompt(5, salt="x"))
        await cache.flush()
        assert (await cache.delete(make_prompt(2))).chunks == 2
        await cache.clear(tier="l1")
        assert await count_hits(cache, make_prompt(5)) == 0
        assert await read_back(cache, make_prompt(5), skip_tokens=8) == 3
        assert await read_back(cache, make_prompt(5, 2)) == 5
        assert await read_back(cache, make_prompt(5, salt="x")) == 5


async def test_a_chunk_that_is_deleted_while_it_is_read_can_not_be_found_and_stays_readable():
    prompt = make_prompt(4)
    async with open_cache(MemoryBackend()) as cache:
        idle = (await cache.stats()).l1_used_bytes
        await fill(cache, prompt)
        await cache.flush()
        cache.prefetch(prompt, request_id="a")
        async with cache.read("a") as lease:
            assert await cache.delete(prompt) == Deleted(chunks=4, leased=4)
            assert await count_hits(cache, prompt) == 0
            assert (await cache.prefetch(prompt).load_done).chunks == 0
            for number in range(2, 12):
                await fill(cache, make_prompt(60, number))
            assert verify(lease, prompt) == [0, 1, 2, 3]
        await cache.flush()
        await cache.clear(tier="all")
        assert (await cache.stats()).l1_used_bytes == idle


async def test_a_request_that_holds_a_deleted_chunk_can_still_read_it():
    prompt = make_prompt(4)
    async with open_cache() as cache:
        await fill(cache, prompt)
        assert (await cache.prefetch(prompt, request_id="a").load_done).chunks == 4
        assert await cache.delete(prompt) == Deleted(chunks=4, leased=4)
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1, 2, 3]
        await assert_nothing_held(cache)
        assert (await cache.stats()).l1_chunks == 0


async def test_a_deleted_prompt_can_be_stored_again_while_the_old_one_is_read():
    prompt = make_prompt(3)
    async with open_cache(MemoryBackend()) as cache:
        await fill(cache, prompt, version=1)
        await cache.flush()
        cache.prefetch(prompt, request_id="old")
        async with cache.read("old") as old:
            await cache.delete(prompt)
            await fill(cache, prompt, version=2)
            cache.prefetch(prompt, request_id="new")
            async with cache.read("new") as new:
                assert verify(old, prompt, version=1) == [0, 1, 2]
                assert verify(new, prompt, version=2) == [0, 1, 2]
        await cache.flush()
        await cache.clear(tier="l1")
        cache.prefetch(prompt, request_id="l2")
        async with cache.read("l2") as stored:
            assert verify(stored, prompt, version=2) == [0, 1, 2]
        await assert_nothing_held(cache)


@pytest.mark.parametrize("how", ["delete", "clear"])
@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_chunk_that_is_deleted_while_it_is_loaded_is_not_resurrected(how, stubborn):
    prompt = make_prompt(4)
    gate = GatedBackend(MemoryBackend(), stubborn=stubborn)
    recorder = Recorder(gate)
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        gate.hold("load")
        prefetch = cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        deleted = await (cache.delete(prompt) if how == "delete" else cache.clear(tier="all"))
        assert deleted.chunks == 4
        assert await count_hits(cache, prompt) == 0
        assert (await cache.prefetch(prompt).lookup_done).chunks == 0
        gate.release("load")
        result = await prefetch.load_done
        assert result.chunks == 4 or result.shortfall is Shortfall.GONE
        async with cache.read("a") as lease:
            assert len(verify(lease, prompt)) == result.chunks
        await settle()
        assert await count_hits(cache, prompt) == 0
        assert recorder.usage().objects == 0
        assert (await cache.stats()).l1_chunks == 0
        assert recorder.pinned == {}


@pytest.mark.parametrize("how", ["delete", "clear"])
@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_chunk_that_is_deleted_while_it_is_written_back_is_not_resurrected(how, stubborn):
    prompt = make_prompt(4)
    gate = GatedBackend(MemoryBackend(), stubborn=stubborn)
    recorder = Recorder(gate)
    async with open_cache(recorder) as cache:
        gate.hold("store")
        await fill(cache, prompt)
        await gate.reached("store")
        wait = asyncio.ensure_future(cache.delete(prompt) if how == "delete" else cache.clear(tier="all"))
        await settle()
        assert await count_hits(cache, prompt) == 0
        gate.release("store")
        assert (await wait).chunks == 4
        await advance(100)
        assert await count_hits(cache, prompt) == 0
        assert recorder.usage().objects == 0
        assert (await cache.flush()).pending == 0
        await assert_nothing_held(cache, recorder)


async def test_a_chunk_that_is_deleted_before_it_is_written_back_never_is():
    prompt = make_prompt(4)
    recorder = Recorder(MemoryBackend())
    async with open_cache(recorder) as cache:
        await fill(cache, prompt)
        await cache.delete(prompt)
        await advance(100)
        assert recorder.usage().objects == 0
        assert await count_hits(cache, prompt) == 0


class UnstoppableBackend(WrappedBackend):
    """A store that is cancelled is carried to its end, as by a thread that waits for its disk."""

    async def store(self, keys, buffers):
        call = asyncio.ensure_future(super().store(keys, buffers))
        while not call.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait((call,))
        return call.result()


@pytest.mark.parametrize("how", ["delete", "clear"])
@pytest.mark.parametrize("ends", [True, False])
async def test_a_delete_is_not_undone_by_a_write_that_was_given_up(how, ends):
    prompt = make_prompt(4)
    gate = GatedBackend(MemoryBackend(), "store")
    async with open_cache(UnstoppableBackend(gate), store_timeout_seconds=20) as cache:
        await fill(cache, prompt)
        await advance(25)
        wait = asyncio.ensure_future(cache.delete(prompt) if how == "delete" else cache.clear("all"))
        await settle()
        if ends:
            gate.release("store")
            assert (await wait).chunks == 4
            await advance(100)
            assert await count_hits(cache, prompt) == gate.usage().objects == 0
        else:
            with pytest.raises(BackendError, match="does not end"):
                await wait
            gate.release("store")


class LateBackend(WrappedBackend):
    """What it says is in a lookup was there when it was asked."""

    late_seconds = 0.0

    async def lookup(self, keys):
        found = await super().lookup(keys)
        await asyncio.sleep(self.late_seconds)
        return found


async def test_a_deleted_chunk_is_not_found_in_a_load_that_an_older_lookup_began():
    prompt = make_prompt(2)
    late = LateBackend(GatedBackend(MemoryBackend()))
    await seed(late, prompt)
    async with open_cache(late) as cache:
        late.late_seconds = 0.5
        old = cache.prefetch(prompt)
        await settle()
        late.late_seconds = 0
        await cache.delete(prompt)
        late.inner.hold("load")
        await advance(1)
        assert (await cache.prefetch(prompt).lookup_done).chunks == 0
        assert (await old.lookup_done).chunks == 0


async def test_a_delete_reaches_all_backends():
    prompt = make_prompt(4)
    first, second = MemoryBackend(name="first"), MemoryBackend(name="second")
    await seed(first, prompt)
    await seed(second, prompt, chunks=[1, 2])
    async with open_cache(first, second) as cache:
        assert await cache.delete(prompt) == Deleted(chunks=4, leased=0)
        assert first.usage().objects == second.usage().objects == 0


async def test_clearing_l1_leaves_l2():
    prompt = make_prompt(4)
    async with open_cache(MemoryBackend()) as cache:
        idle = (await cache.stats()).l1_used_bytes
        await fill(cache, prompt)
        await cache.flush()
        assert await cache.clear(tier="l1") == Deleted(chunks=4, leased=0)
        assert (await cache.stats()).l1_used_bytes == idle
        hits = await cache.lookup(prompt)
        assert (hits.l1_chunks, hits.l2_chunks) == (0, 4)


async def test_clearing_l1_drops_nothing_that_is_not_written_back_yet():
    gate = GatedBackend(MemoryBackend())
    async with open_cache(gate) as cache:
        await fill(cache, make_prompt(2))
        await cache.flush()
        gate.hold("store")
        await fill(cache, make_prompt(3, 2))
        await settle()
        await cache.clear(tier="l1")
        assert (await cache.stats()).l1_chunks == 3
        gate.release("store")
        flushed = await cache.flush()
        assert (flushed.pending, flushed.dropped) == (0, 0)
        await cache.clear(tier="l1")
        assert await read_back(cache, make_prompt(3, 2)) == 3
        assert await read_back(cache, make_prompt(2)) == 2


@pytest.mark.parametrize("verb", ["lookup", "load"])
async def test_clearing_l1_takes_nothing_from_a_request_that_loads_the_rest_of_a_chunk(verb):
    prompt = make_prompt(2, layout=TWO_RANKS)
    gate = GatedBackend(MemoryBackend())
    await seed(gate, prompt)
    async with open_cache(gate) as cache:
        await cache.prefetch(prompt, request_id="half", ranks=[0]).load_done
        gate.hold(verb)
        whole = cache.prefetch(prompt)
        await gate.reached(verb, 2)
        await cache.clear(tier="l1")
        gate.release()
        assert (await whole.lookup_done).chunks == (await whole.load_done).chunks == 2


async def test_clearing_all_empties_both_tiers_and_counts_every_chunk_once():
    recorder = Recorder(MemoryBackend())
    async with open_cache(recorder) as cache:
        idle = (await cache.stats()).l1_used_bytes
        await fill_l2(cache, make_prompt(4))
        await fill(cache, make_prompt(3, 2))
        await cache.flush()
        assert await cache.clear(tier="all") == Deleted(chunks=7, leased=0)
        assert recorder.usage().objects == 0
        stats = await cache.stats()
        assert (stats.l1_used_bytes, stats.l1_chunks) == (idle, 0)
        await assert_nothing_held(cache, recorder)


@pytest.mark.parametrize("tier", ["l1", "all"])
async def test_what_is_leased_goes_when_it_is_released(tier):
    prompt = make_prompt(4)
    async with open_cache(MemoryBackend()) as cache:
        await fill(cache, prompt)
        await cache.flush()
        cache.prefetch(prompt, request_id="a")
        async with cache.read("a") as lease:
            assert await cache.clear(tier=tier) == Deleted(chunks=4, leased=4)
            assert verify(lease, prompt) == [0, 1, 2, 3]
        await assert_nothing_held(cache)
        assert (await cache.stats()).l1_chunks == 0
        assert await count_hits(cache, prompt) == (4 if tier == "l1" else 0)
