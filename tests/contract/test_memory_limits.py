"""When L1 is full: what is trimmed, what is evicted, and what never is."""

import asyncio

import pytest

from async_cache import ObjectGroup, Shortfall
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import GatedBackend

from .support import (
    CHUNK_TOKENS,
    PAGE,
    SMALL,
    Recorder,
    assert_nothing_held,
    count_hits,
    fill,
    make_layout,
    make_prompt,
    open_cache,
    read_back,
    seed,
    settle,
    verify,
    write,
)

PAGES = make_layout(ObjectGroup((PAGE,), "uint8"))  # an object fills its page: bytes and pages are the same count


def make_pages(chunks, number=1):
    return make_prompt(chunks, number, PAGES)


async def fill_all(cache, number=1):
    """Fill L1 with one prompt; the number of chunks that it took."""
    await fill(cache, make_pages(200, number))
    return await count_hits(cache, make_pages(200, number))


async def test_hits_are_trimmed_to_the_room_and_say_memory():
    prompt = make_pages(40)
    backend = MemoryBackend()
    await seed(backend, prompt)
    async with open_cache(backend, pages=17) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        hits = await prefetch.lookup_done
        assert 8 <= hits.chunks <= 0.75 * 17
        assert (hits.found_chunks, hits.shortfall) == (40, Shortfall.MEMORY)
        assert hits.tokens == hits.chunks * CHUNK_TOKENS
        assert asyncio.get_running_loop().time() == 0
        assert (await prefetch.load_done).chunks == hits.chunks
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == list(range(hits.chunks))
        await assert_nothing_held(cache)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
async def test_loads_in_flight_hold_at_most_their_share_of_l1(share):
    gate = GatedBackend(MemoryBackend())
    for number in (1, 2, 3, 4):
        await seed(gate, make_pages(6, number))
    async with open_cache(gate, pages=16, prefetch_share=share) as cache:
        gate.hold("load")
        promised = 0
        for number in (1, 2, 3, 4):
            hits = await cache.prefetch(make_pages(6, number)).lookup_done
            promised += hits.chunks
            assert hits.found_chunks == 6
            assert (hits.chunks < 6) == (hits.shortfall is Shortfall.MEMORY)
            assert (await cache.stats()).reserved_bytes <= share * 16 * PAGE
        assert share * 16 - 2 <= promised <= share * 16
        await fill(cache, make_pages(2, 9))
        assert await count_hits(cache, make_pages(2, 9)) == 2
        gate.release("load")
        await settle()


async def test_a_request_that_finds_no_room_is_told_at_once_and_nothing_waits():
    gate = GatedBackend(MemoryBackend())
    recorder = Recorder(gate)
    await seed(recorder, make_pages(20, 1))
    await seed(recorder, make_pages(2, 2))
    async with open_cache(recorder, pages=16) as cache:
        gate.hold("load")
        await cache.prefetch(make_pages(20, 1), request_id="a").lookup_done
        prefetch = cache.prefetch(make_pages(2, 2), request_id="b")
        hits, result = await prefetch.lookup_done, await prefetch.load_done
        assert asyncio.get_running_loop().time() == 0
        assert (hits.chunks, hits.found_chunks, hits.shortfall) == (0, 2, Shortfall.MEMORY)
        assert result.chunks == 0
        gate.release("load")
        await cache.query_status("a")
        await cache.end_request("a")
        assert await read_back(cache, make_pages(2, 2), request_id="c") == 2


async def test_what_may_go_is_evicted_for_a_load():
    prompt = make_pages(6, 2)
    backend = MemoryBackend()
    await seed(backend, prompt)
    async with open_cache(backend, pages=16) as cache:
        resident = await fill_all(cache)
        await cache.flush()
        assert await read_back(cache, prompt) == 6
        assert (await cache.stats()).l1_chunks == resident


async def test_what_is_leased_is_never_evicted():
    backend = MemoryBackend()
    await seed(backend, make_pages(4, 2))
    async with open_cache(backend, pages=16) as cache:
        resident = await fill_all(cache)
        held = cache.prefetch(make_pages(resident), request_id="held")
        assert (await held.load_done).chunks == resident
        hits = await cache.prefetch(make_pages(4, 2)).lookup_done
        assert (hits.chunks, hits.found_chunks, hits.shortfall) == (0, 4, Shortfall.MEMORY)
        async with cache.store(make_pages(3, 3)) as writer:
            assert len(writer) == 0
            assert writer.shortfall is Shortfall.MEMORY
        async with cache.read("held") as lease:
            assert len(verify(lease, make_pages(resident))) == resident


async def test_a_writer_gets_fewer_chunks_and_says_why_and_waits_for_nothing():
    async with open_cache(pages=16) as cache:
        async with cache.store(make_pages(100)) as writer:
            assert 14 <= len(writer) <= 16
            assert writer.shortfall is Shortfall.MEMORY
            assert [chunk.index for chunk in writer] == list(range(len(writer)))
        async with cache.store(make_pages(3)) as writer:
            assert (len(writer), writer.shortfall) == (3, None)
        assert asyncio.get_running_loop().time() == 0
        await assert_nothing_held(cache)


async def test_an_impossible_reservation_evicts_nothing():
    giant = make_layout(ObjectGroup((64 * PAGE,), "uint8"))
    backend = MemoryBackend()
    await seed(backend, make_prompt(2, layout=giant))
    async with open_cache(backend, pages=16) as cache:
        resident = await fill_all(cache)
        await cache.flush()
        async with cache.store(make_prompt(2, layout=giant)) as writer:
            assert len(writer) == 0
            assert writer.shortfall is Shortfall.MEMORY
        hits = await cache.prefetch(make_prompt(2, layout=giant)).lookup_done
        assert (hits.chunks, hits.found_chunks, hits.shortfall) == (0, 2, Shortfall.MEMORY)
        assert (await cache.stats()).l1_chunks == resident


async def test_a_reservation_that_leases_make_impossible_evicts_nothing():
    big = make_layout(ObjectGroup((8 * PAGE,), "uint8"))
    async with open_cache(pages=16) as cache:
        resident = await fill_all(cache)
        await cache.prefetch(make_pages(resident - 3)).load_done
        async with cache.store(make_prompt(1, layout=big)) as writer:
            assert (len(writer), writer.shortfall) == (0, Shortfall.MEMORY)
        assert (await cache.stats()).l1_chunks == resident
        assert await count_hits(cache, make_pages(resident)) == resident


async def test_the_tail_of_a_prefix_goes_before_its_head_and_only_as_much_as_is_needed():
    async with open_cache(pages=16) as cache:
        resident = await fill_all(cache)
        await fill(cache, make_pages(2, 2))
        await fill(cache, make_pages(3, 3))
        assert (await cache.stats()).l1_chunks == resident
        assert await count_hits(cache, make_pages(resident)) == resident - 5
        assert await count_hits(cache, make_pages(2, 2)) == 2
        assert await count_hits(cache, make_pages(3, 3)) == 3


async def test_the_prompt_that_was_used_last_is_evicted_last():
    async with open_cache(pages=16) as cache:
        await fill(cache, make_pages(4, 1))
        await fill(cache, make_pages(4, 2))
        await asyncio.sleep(1)
        assert await read_back(cache, make_pages(4, 1)) == 4
        await fill(cache, make_pages(10, 3))
        assert await count_hits(cache, make_pages(4, 1)) == 4
        assert await count_hits(cache, make_pages(4, 2)) < 4


async def test_a_request_that_can_not_have_both_its_head_and_its_tail_gets_the_head():
    prompt = make_pages(24)
    backend = MemoryBackend()
    await seed(backend, prompt)
    async with open_cache(backend, pages=16) as cache:
        async with cache.store(prompt, start_chunk=8) as writer:
            for chunk in writer:
                write(chunk, prompt)
                chunk.commit()
        await cache.flush()
        prefetch = cache.prefetch(prompt, request_id="a")
        hits = await prefetch.lookup_done
        assert hits.found_chunks == 24
        assert hits.shortfall is Shortfall.MEMORY
        assert hits.chunks >= 8
        assert (await prefetch.load_done).chunks == hits.chunks
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == list(range(hits.chunks))


async def test_a_trim_steps_down_to_a_length_that_windows_allow():
    layout = make_layout(ObjectGroup((PAGE,), "uint8"), ObjectGroup((64,), "uint8", window_chunks=1))
    prompt = make_prompt(20, layout=layout)
    backend = MemoryBackend()
    await seed(backend, prompt, groups=[0])
    await seed(backend, prompt, groups=[1], chunks=[3, 19])
    async with open_cache(backend, pages=24) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        hits = await prefetch.lookup_done
        assert (hits.chunks, hits.found_chunks, hits.shortfall) == (4, 20, Shortfall.MEMORY)
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1, 2, 3]
        await assert_nothing_held(cache)


async def test_the_ranks_of_a_chunk_leave_together():
    layout = make_layout(ObjectGroup((PAGE,), "uint8"), world_size=2)
    async with open_cache(pages=17) as cache:
        await fill(cache, make_prompt(7, layout=layout))
        before = await cache.stats()
        await fill(cache, make_prompt(3, 2, layout))
        left = await count_hits(cache, make_prompt(7, layout=layout))
        after = await cache.stats()
        assert before.l1_chunks == 7
        assert after.l1_chunks == left + 3
        assert after.l1_used_bytes <= before.l1_capacity_bytes


async def test_mixed_sizes_neither_leak_nor_collapse():
    layouts = [make_layout(ObjectGroup((size,), "uint8")) for size in (64, 3 * PAGE, PAGE + 1, 7 * PAGE)]
    async with open_cache(pages=64) as cache:
        idle = (await cache.stats()).l1_used_bytes
        for round_number in range(60):
            layout = layouts[round_number % len(layouts)]
            prompt = make_prompt(1 + round_number % 6, 10 + round_number, layout)
            await fill(cache, prompt)
            assert await read_back(cache, prompt) == len(prompt)
        await cache.clear(tier="all")
        assert (await cache.stats()).l1_used_bytes == idle
        await fill(cache, make_prompt(8, 999, layouts[3]))
        assert await count_hits(cache, make_prompt(8, 999, layouts[3])) == 8


async def test_memory_is_given_back_by_every_way_out():
    gate = GatedBackend(MemoryBackend())
    recorder = Recorder(gate)
    await seed(recorder, make_pages(6))
    async with open_cache(recorder, pages=9) as cache:
        for number in range(40):
            request_id = str(number)
            prefetch = cache.prefetch(make_pages(6), request_id=request_id)
            if number % 4 == 0:
                prefetch.cancel()
            elif number % 4 == 1:
                await prefetch.lookup_done
            elif number % 4 == 2:
                await prefetch.load_done
            else:
                assert (await cache.query_status(request_id)).chunks == 6
            await cache.end_request(request_id)
            await settle()
            await assert_nothing_held(cache, recorder)
            await fill(cache, make_prompt(8, 50 + number, make_layout(SMALL)))
