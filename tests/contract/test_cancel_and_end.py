"""A prefetch that is cancelled or ended: at once for those who wait, later for the memory that I/O still owns."""

import asyncio

import pytest

from async_cache import Shortfall, UnknownRequestError
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import GatedBackend

from .support import (
    OBJECT_BYTES,
    Recorder,
    assert_nothing_held,
    fill,
    make_prompt,
    open_cache,
    outcomes,
    read_back,
    seed,
    settle,
    verify,
)


async def gated(prompt, verb, *, stubborn=False):
    gate = GatedBackend(MemoryBackend(), stubborn=stubborn)
    recorder = Recorder(gate)
    await seed(recorder, prompt)
    gate.hold(verb)
    return gate, recorder


@pytest.mark.parametrize("how", ["cancel", "end"])
async def test_during_the_lookup_both_futures_resolve_at_once_with_0_chunks_and_cancelled(how):
    prompt = make_prompt(4)
    gate, recorder = await gated(prompt, "lookup")
    async with open_cache(recorder) as cache:
        await fill(cache, prompt, chunks=[0])
        prefetch = cache.prefetch(prompt, request_id="a")
        await gate.reached("lookup")
        assert (await cache.stats()).requests == 1
        early, late = prefetch.lookup_done, prefetch.load_done
        if how == "cancel":
            assert prefetch.cancel() is None
        else:
            await cache.end_request("a")
        hits, result = await early, await late
        assert asyncio.get_running_loop().time() == 0
        assert (hits.chunks, hits.shortfall) == (0, Shortfall.CANCELLED)
        assert (result.chunks, result.shortfall) == (0, Shortfall.CANCELLED)
        stats = await cache.stats()
        assert (stats.leases, stats.leased_bytes, stats.reserved_bytes) == (0, 0, 0)
        await cache.end_request("a")
        gate.release("lookup")
        await settle()
        await assert_nothing_held(cache, recorder)


@pytest.mark.parametrize("how", ["cancel", "end"])
async def test_during_the_load_the_hits_stay_and_the_result_is_0_chunks_and_cancelled(how):
    prompt = make_prompt(4)
    gate, recorder = await gated(prompt, "load")
    async with open_cache(recorder) as cache:
        await fill(cache, prompt, chunks=[0])
        prefetch = cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        late = prefetch.load_done
        if how == "cancel":
            prefetch.cancel()
        else:
            await cache.end_request("a")
        result = await late
        assert asyncio.get_running_loop().time() == 0
        assert (result.chunks, result.l1_chunks, result.l2_chunks) == (0, 0, 0)
        assert result.shortfall is Shortfall.CANCELLED
        assert (await prefetch.lookup_done).chunks == 4
        stats = await cache.stats()
        assert (stats.leases, stats.leased_bytes) == (0, 0)
        await cache.end_request("a")
        await settle()
        await assert_nothing_held(cache, recorder)
        gate.release("load")


@pytest.mark.parametrize("how", ["cancel", "end"])
async def test_leases_and_pins_are_given_back_at_once_and_the_memory_when_the_io_has_ended(how):
    prompt = make_prompt(4)
    gate, recorder = await gated(prompt, "load", stubborn=True)
    async with open_cache(recorder) as cache:
        await fill(cache, prompt, chunks=[0])
        prefetch = cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        if how == "cancel":
            prefetch.cancel()
            assert (await cache.query_status("a")).shortfall is Shortfall.CANCELLED
        else:
            await cache.end_request("a")
        assert recorder.pinned == {}
        stats = await cache.stats()
        assert (stats.requests, stats.leases, stats.leased_bytes) == (0, 0, 0)
        assert stats.reserved_bytes + stats.quarantined_bytes >= 3 * OBJECT_BYTES
        await asyncio.sleep(5)
        stats = await cache.stats()
        assert stats.reserved_bytes + stats.quarantined_bytes >= 3 * OBJECT_BYTES
        gate.release("load")
        await settle()
        await assert_nothing_held(cache, recorder)


async def test_memory_that_io_still_owns_is_not_used_again():
    prompt = make_prompt(6)
    gate, recorder = await gated(prompt, "load", stubborn=True)
    async with open_cache(recorder, pages=12) as cache:
        cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        await cache.end_request("a")
        others = [make_prompt(12, number) for number in (2, 3)]
        for other in others:
            await fill(cache, other)
        counts = [(await cache.lookup(other)).chunks for other in others]
        assert max(counts) <= 6
        gate.release("load")
        await settle()
        for other, count in zip(others, counts, strict=True):
            if count:
                assert await read_back(cache, other) == count
        await assert_nothing_held(cache, recorder)


async def test_a_dead_disk_holds_up_nothing_else():
    prompt, other = make_prompt(4), make_prompt(4, 2)
    gate, recorder = await gated(prompt, "load", stubborn=True)
    sound = MemoryBackend(name="sound")
    await seed(sound, other)
    async with open_cache(recorder, sound) as cache:
        cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        await cache.end_request("a")
        assert await read_back(cache, other) == 4
        await fill(cache, make_prompt(3, 3))
        assert await read_back(cache, make_prompt(3, 3)) == 3
        gate.release("load")
        await settle()


async def test_after_a_cancel_the_id_is_known_until_it_is_claimed():
    prompt = make_prompt(4)
    gate, recorder = await gated(prompt, "load")
    async with open_cache(recorder) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        prefetch.cancel()
        assert (await cache.query_lookup_hits("a")).chunks == 4
        assert cache.prefetch(prompt, request_id="a") is prefetch
        assert (await cache.query_status("a")).shortfall is Shortfall.CANCELLED
        for query in (cache.query_lookup_hits, cache.query_status):
            with pytest.raises(UnknownRequestError):
                await query("a")
        await settle()
        await assert_nothing_held(cache, recorder)


async def test_after_a_cancel_the_id_is_known_until_it_is_swept():
    prompt = make_prompt(4)
    gate, recorder = await gated(prompt, "load")
    async with open_cache(recorder, result_ttl_seconds=20) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        prefetch.cancel()
        await asyncio.sleep(19)
        assert (await cache.query_lookup_hits("a")).chunks == 4
        await asyncio.sleep(2)
        with pytest.raises(UnknownRequestError):
            await cache.query_lookup_hits("a")
        await assert_nothing_held(cache, recorder)


async def test_who_waits_for_the_status_of_a_cancelled_prefetch_gets_its_result():
    prompt = make_prompt(4)
    gate, recorder = await gated(prompt, "load")
    async with open_cache(recorder) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        waits = [asyncio.ensure_future(cache.query_status("a")) for _ in range(3)]
        await gate.reached("load")
        prefetch.cancel()
        got = await outcomes(*waits)
        results = [each for each in got if not isinstance(each, BaseException)]
        assert [(result.chunks, result.shortfall) for result in results] == [(0, Shortfall.CANCELLED)]
        assert sum(isinstance(each, UnknownRequestError) for each in got) == 2


async def test_who_waits_in_a_query_when_the_request_is_ended_gets_an_error():
    prompt = make_prompt(4)
    gate, recorder = await gated(prompt, "lookup")
    async with open_cache(recorder) as cache:
        cache.prefetch(prompt, request_id="a")
        waits = [asyncio.ensure_future(cache.query_status("a")) for _ in range(2)]
        waits += [asyncio.ensure_future(cache.query_lookup_hits("a")) for _ in range(2)]
        await gate.reached("lookup")
        await cache.end_request("a")
        got = await outcomes(*waits)
        assert [type(each) for each in got] == [UnknownRequestError] * 4
        assert asyncio.get_running_loop().time() < 0.5
        gate.release("lookup")


async def test_who_waits_for_an_ended_request_is_not_given_the_next_one_of_that_id():
    prompt, other = make_prompt(4), make_prompt(2, 2)
    gate, recorder = await gated(prompt, "load")
    async with open_cache(recorder) as cache:
        await fill(cache, other)
        cache.prefetch(prompt, request_id="a")
        wait = asyncio.ensure_future(cache.query_status("a"))
        await gate.reached("load")
        await cache.end_request("a")
        cache.prefetch(other, request_id="a")
        assert isinstance((await outcomes(wait))[0], UnknownRequestError)
        assert (await cache.query_status("a")).chunks == 2
        gate.release("load")


async def test_cancelling_what_has_loaded_changes_nothing():
    prompt = make_prompt(4)
    async with open_cache() as cache:
        await fill(cache, prompt)
        prefetch = cache.prefetch(prompt, request_id="a")
        result = await prefetch.load_done
        prefetch.cancel()
        await settle()
        assert await prefetch.load_done == result
        async with cache.read("a") as lease:
            prefetch.cancel()
            assert verify(lease, prompt) == [0, 1, 2, 3]
        assert result.chunks == 4
        await assert_nothing_held(cache)


async def test_a_prefetch_that_is_cancelled_before_the_loop_turned_holds_nothing():
    prompt = make_prompt(4)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        prefetch.cancel()
        prefetch.cancel()
        hits, result = await prefetch.lookup_done, await prefetch.load_done
        assert (hits.chunks, hits.shortfall) == (0, Shortfall.CANCELLED)
        assert (result.chunks, result.shortfall) == (0, Shortfall.CANCELLED)
        assert (await cache.query_status("a")).shortfall is Shortfall.CANCELLED
        await settle()
        await assert_nothing_held(cache, recorder)


@pytest.mark.parametrize("turns", range(12))
@pytest.mark.parametrize("how", ["cancel", "end"])
async def test_a_prefetch_can_be_stopped_at_every_step_and_holds_nothing(how, turns):
    prompt = make_prompt(4)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        await fill(cache, prompt, chunks=[0])
        prefetch = cache.prefetch(prompt, request_id="a")
        for _ in range(turns):
            await asyncio.sleep(0)
        if how == "cancel":
            prefetch.cancel()
        else:
            await cache.end_request("a")
        result = await prefetch.load_done
        assert result.chunks in (0, 4)
        await settle()
        await cache.end_request("a")
        await assert_nothing_held(cache, recorder)
        assert await read_back(cache, prompt) == 4


async def test_a_cancel_touches_no_other_request():
    prompt, other = make_prompt(4), make_prompt(4, 2)
    gate, recorder = await gated(prompt, "load")
    await seed(recorder.inner.inner, other)
    async with open_cache(recorder) as cache:
        prefetch = cache.prefetch(prompt)
        second = cache.prefetch(other)
        await second.lookup_done
        prefetch.cancel()
        await settle()
        assert not second.load_done.done()
        gate.release("load")
        assert (await second.load_done).chunks == 4
