"""Write-back: what is committed gets to L2, bounded, once, and never at the cost of L1's room."""

import asyncio

import pytest

from async_cache import FlushResult, ObjectGroup
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import FailingBackend, GatedBackend

from .support import (
    PAGE,
    TWO_RANKS,
    Recorder,
    Scripted,
    advance,
    assert_nothing_held,
    count_hits,
    fill,
    make_layout,
    make_prompt,
    object_keys,
    open_cache,
    read_back,
    seed,
    settle,
)

PAGES = make_layout(ObjectGroup((PAGE,), "uint8"))


async def test_after_a_flush_what_was_committed_is_in_l2():
    recorder = Recorder(MemoryBackend())
    prompt = make_prompt(5, layout=TWO_RANKS)
    async with open_cache(recorder) as cache:
        await fill(cache, prompt)
        flushed = await cache.flush()
        assert isinstance(flushed, FlushResult)
        assert (flushed.pending, flushed.dropped) == (0, 0)
        assert set(recorder.stored) == set(object_keys(prompt))
        assert recorder.usage().objects == 10
        assert (await cache.stats()).writebacks_pending == 0
        await assert_nothing_held(cache, recorder)


async def test_another_cache_reads_what_was_flushed():
    backend = MemoryBackend()
    prompt = make_prompt(5, layout=TWO_RANKS)
    async with open_cache(backend) as cache:
        await fill(cache, prompt)
        await cache.flush()
    async with open_cache(backend) as cache:
        assert await read_back(cache, prompt) == 5


async def test_a_flush_counts_chunks_and_not_objects():
    gate = GatedBackend(MemoryBackend())
    async with open_cache(gate) as cache:
        gate.hold("store", "lookup")
        await fill(cache, make_prompt(4, layout=TWO_RANKS))
        stats = await cache.stats()
        assert stats.writebacks_pending == 4
        wait = asyncio.ensure_future(cache.flush())
        await settle()
        gate.release("store", "lookup")
        assert await wait == FlushResult(written=4, pending=0, dropped=0)


async def test_what_is_committed_is_written_back_without_being_asked_for():
    recorder = Recorder(MemoryBackend())
    async with open_cache(recorder) as cache:
        await fill(cache, make_prompt(3))
        await advance(10)
        assert recorder.usage().objects == 3
        recorder.calls.clear()
        flushed = await cache.flush()
        assert (flushed.pending, flushed.dropped) == (0, 0)
        assert recorder.calls["store"] == 0


async def test_a_flush_that_reaches_its_deadline_says_how_much_is_not_in_l2():
    gate = GatedBackend(MemoryBackend())
    async with open_cache(gate) as cache:
        gate.hold("store")
        await fill(cache, make_prompt(4))
        flushed = await cache.flush(deadline_seconds=3)
        assert asyncio.get_running_loop().time() == pytest.approx(3, abs=0.1)
        assert flushed == FlushResult(written=0, pending=4, dropped=0)
        assert (await cache.stats()).writebacks_pending == 4
        gate.release("store")
        flushed = await cache.flush()
        assert (flushed.pending, flushed.dropped) == (0, 0)
        assert gate.usage().objects == 4


async def test_a_flush_of_nothing_is_done_at_once():
    async with open_cache(MemoryBackend()) as cache:
        assert await cache.flush() == FlushResult(written=0, pending=0, dropped=0)
    async with open_cache() as cache:
        await fill(cache, make_prompt(2))
        assert (await cache.flush()).pending == 0


async def test_what_was_loaded_is_not_written_back():
    recorder = Recorder(MemoryBackend())
    await seed(recorder, make_prompt(4))
    recorder.stored.clear()
    async with open_cache(recorder) as cache:
        assert await read_back(cache, make_prompt(4)) == 4
        await cache.flush()
        await advance(10)
        assert not recorder.stored


async def test_what_l2_has_already_is_not_written_back():
    recorder = Recorder(MemoryBackend())
    await seed(recorder, make_prompt(4), chunks=[0, 1, 2])
    recorder.stored.clear()
    async with open_cache(recorder) as cache:
        await fill(cache, make_prompt(4))
        flushed = await cache.flush()
        assert (flushed.pending, flushed.dropped) == (0, 0)
        assert set(recorder.stored) == set(object_keys(make_prompt(4), [3]))
        await assert_nothing_held(cache, recorder)


async def test_chunks_that_wait_may_be_evicted_unwritten_and_are_counted():
    gate = GatedBackend(MemoryBackend())
    async with open_cache(gate, pages=16) as cache:
        gate.hold("store")
        await fill(cache, make_prompt(12, 1, PAGES))
        await settle()
        async with cache.store(make_prompt(12, 2, PAGES)) as writer:
            room = len(writer)
            for chunk in writer:
                chunk.commit()
        assert room >= 16 - 1 - 4
        assert (await cache.stats()).writebacks_dropped >= 12 + room - 16
        gate.release("store")
        await cache.flush()
        stats = await cache.stats()
        assert stats.writebacks_pending == 0
        assert gate.usage().objects == 12 + room - stats.writebacks_dropped
        await assert_nothing_held(cache)


async def test_a_chunk_of_which_one_rank_was_written_and_the_other_evicted_is_dropped():
    first, second, third = (make_prompt(1, number, TWO_RANKS) for number in range(3))
    gate = GatedBackend(MemoryBackend(), "store")
    async with open_cache(gate, pages=4) as cache:
        await fill(cache, first, ranks=[0])
        await gate.reached("store")
        await fill(cache, second)
        await fill(cache, first, ranks=[1])
        gate.release("store")
        gate.hold("store")
        await gate.reached("store", 2)  # the first rank is written, and the other one waits
        await fill(cache, third, ranks=[0])
        gate.release("store")
        assert await cache.flush() == FlushResult(written=2, pending=0, dropped=1)
        assert await count_hits(cache, first) == 0


async def test_a_flush_counts_what_was_dropped_while_it_waited():
    gate = GatedBackend(MemoryBackend())
    async with open_cache(gate, pages=16) as cache:
        gate.hold("store")
        await fill(cache, make_prompt(12, 1, PAGES))
        wait = asyncio.ensure_future(cache.flush())
        await settle()
        await fill(cache, make_prompt(12, 2, PAGES))
        dropped = (await cache.stats()).writebacks_dropped
        assert dropped > 0
        gate.release("store")
        assert await wait == FlushResult(written=12 - dropped, pending=0, dropped=dropped)


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
async def test_writes_in_flight_hold_at_most_their_share_of_l1(share):
    gate = GatedBackend(MemoryBackend())
    recorder = Recorder(gate)
    async with open_cache(recorder, pages=32, writeback_share=share) as cache:
        gate.hold("store")
        for number in (1, 2, 3):
            await fill(cache, make_prompt(8, number, PAGES))
        await settle()
        stats = await cache.stats()
        assert 0 < recorder.most_storing_bytes <= share * 32 * PAGE
        assert stats.leased_bytes <= share * 32 * PAGE
        gate.release("store")
        flushed = await cache.flush()
        assert (flushed.pending, flushed.dropped) == (0, 0)
        assert recorder.usage().objects == 24
        assert recorder.most_storing_bytes <= share * 32 * PAGE


async def test_a_chunk_that_is_being_written_is_not_evicted_under_the_write():
    gate = GatedBackend(MemoryBackend())
    prompt = make_prompt(3, 1, PAGES)
    async with open_cache(gate, pages=16) as cache:
        gate.hold("store")
        await fill(cache, prompt)
        await gate.reached("store")
        for number in range(2, 8):
            await fill(cache, make_prompt(16, number, PAGES))
        gate.release("store")
        await cache.flush()
        await cache.clear(tier="l1")
        found = 0
        for number in range(1, 8):
            found += await read_back(cache, make_prompt(16 if number > 1 else 3, number, PAGES))
        assert found > 0


async def test_a_store_that_fails_is_tried_again():
    backend = FailingBackend(MemoryBackend(), "store", times=1)
    async with open_cache(backend) as cache:
        await fill(cache, make_prompt(3))
        flushed = await cache.flush()
        assert (flushed.pending, flushed.dropped) == (0, 0)
        assert backend.usage().objects == 3


@pytest.mark.parametrize("answer", [False, OSError("full")], ids=["refused", "raises"])
async def test_what_l2_does_not_take_is_dropped_and_counted_and_stays_in_l1(answer):
    backend = Scripted(MemoryBackend())
    backend.store_answer = answer
    async with open_cache(backend) as cache:
        await fill(cache, make_prompt(3))
        flushed = await cache.flush(deadline_seconds=3600)
        assert flushed == FlushResult(written=0, pending=0, dropped=3)
        assert (await cache.stats()).writebacks_dropped == 3
        assert await read_back(cache, make_prompt(3)) == 3
        await assert_nothing_held(cache, backend)


@pytest.mark.embedded
async def test_a_backend_that_can_never_take_an_object_says_so_once(caplog):
    backend = MemoryBackend("small", capacity_bytes=1)
    async with open_cache(backend) as cache:
        for number in range(2):
            await fill(cache, make_prompt(3, number))
            assert (await cache.flush(deadline_seconds=3600)).refused == 3
    said = [record.getMessage() for record in caplog.records if record.name == "async_cache.write.queue"]
    size_bytes = make_prompt(3).layout.block_bytes[0]
    assert said == [f"backend small stores no chunk of {size_bytes} bytes: its capacity is 1"]


async def test_what_was_dropped_is_written_when_it_is_stored_again():
    backend = Scripted(MemoryBackend())
    backend.store_answer = False
    async with open_cache(backend) as cache:
        await fill(cache, make_prompt(3))
        assert await cache.flush() == FlushResult(written=0, pending=0, dropped=3)
        backend.store_answer = True
        await fill(cache, make_prompt(3))  # all of it is in L1
        assert await cache.flush() == FlushResult(written=3, pending=0, dropped=0)
        await fill(cache, make_prompt(3))
        assert await cache.flush() == FlushResult(written=0, pending=0, dropped=0)
        await cache.clear("l1")
        assert await read_back(cache, make_prompt(3)) == 3
        await assert_nothing_held(cache, backend)


@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_store_that_never_ends_holds_up_neither_a_flush_nor_a_load(stubborn):
    gate = GatedBackend(MemoryBackend(), stubborn=stubborn)
    await seed(gate, make_prompt(4, 2))
    async with open_cache(gate, store_timeout_seconds=5) as cache:
        gate.hold("store")
        await fill(cache, make_prompt(3))
        await settle()
        assert await read_back(cache, make_prompt(4, 2)) == 4
        flushed = await cache.flush()
        assert (flushed.written, flushed.pending + flushed.dropped) == (0, 3)
        assert asyncio.get_running_loop().time() < 3600
        gate.release("store")
        await settle()


async def test_what_is_written_later_does_not_hold_up_a_flush():
    gate = GatedBackend(MemoryBackend())
    async with open_cache(gate) as cache:
        await fill(cache, make_prompt(3))
        wait = asyncio.ensure_future(cache.flush())
        await settle()
        gate.hold("store")
        await fill(cache, make_prompt(3, 2))
        await settle()
        assert wait.done()
        assert (await wait).pending == 0
        gate.release("store")


async def test_hits_are_counted_while_a_chunk_is_written_back():
    gate = GatedBackend(MemoryBackend())
    async with open_cache(gate) as cache:
        gate.hold("store")
        await fill(cache, make_prompt(3))
        await gate.reached("store")
        assert await count_hits(cache, make_prompt(3)) == 3
        assert await read_back(cache, make_prompt(3)) == 3
        gate.release("store")
