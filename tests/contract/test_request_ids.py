"""Request ids: the same prefetch, conflicts, and when an id is known."""

import asyncio

import pytest

from async_cache import RequestConflictError, UnknownRequestError
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import GatedBackend

from .support import (
    CHUNK_TOKENS,
    LAYOUT,
    TWO_RANKS,
    Recorder,
    assert_nothing_held,
    attempt,
    fill,
    make_prompt,
    make_tokens,
    open_cache,
    outcomes,
    read_back,
    seed,
    settle,
    verify,
)


async def both_are_unknown(cache, request_id):
    for query in (cache.query_lookup_hits, cache.query_status):
        with pytest.raises(UnknownRequestError):
            await query(request_id)


async def test_the_same_id_prompt_and_skip_gives_the_same_prefetch():
    recorder = Recorder(MemoryBackend())
    prompt = make_prompt(3)
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        first = cache.prefetch(prompt, request_id="a", skip_tokens=CHUNK_TOKENS)
        again = cache.prefetch(prompt, request_id="a", skip_tokens=CHUNK_TOKENS)
        assert again is first
        assert await again.lookup_done == await first.lookup_done
        await first.load_done
        equal = LAYOUT.prompt(make_tokens(3))
        assert cache.prefetch(equal, request_id="a", skip_tokens=CHUNK_TOKENS) is first
        assert (await cache.stats()).requests == 1
        assert set(recorder.looked_up.values()) == {1}
        await cache.query_status("a")


async def test_another_prompt_under_the_same_id_conflicts():
    async with open_cache() as cache:
        cache.prefetch(make_prompt(3), request_id="a")
        for prompt in (make_prompt(3, 2), make_prompt(2), make_prompt(3, salt="x"), make_prompt(3, adapter="x")):
            with pytest.raises(RequestConflictError):
                cache.prefetch(prompt, request_id="a")


async def test_another_skip_under_the_same_id_conflicts():
    async with open_cache() as cache:
        cache.prefetch(make_prompt(3), request_id="a")
        with pytest.raises(RequestConflictError):
            cache.prefetch(make_prompt(3), request_id="a", skip_tokens=CHUNK_TOKENS)


async def test_the_same_id_with_other_ranks_conflicts():
    prompt = make_prompt(2, layout=TWO_RANKS)
    async with open_cache() as cache:
        first = cache.prefetch(prompt, request_id="a", ranks=(0,))
        assert cache.prefetch(prompt, request_id="a", ranks=[0]) is first
        for ranks in (None, (1,), (0, 1)):
            with pytest.raises(RequestConflictError):
                cache.prefetch(prompt, request_id="a", ranks=ranks)


async def test_a_claimed_id_conflicts_while_the_request_lasts():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        await fill(cache, prompt)
        cache.prefetch(prompt, request_id="a")
        await cache.query_status("a")
        with pytest.raises(RequestConflictError):
            cache.prefetch(prompt, request_id="a")
        async with cache.read("a") as lease:
            assert len(lease) == 2
            with pytest.raises(RequestConflictError):
                cache.prefetch(prompt, request_id="a")
        assert await read_back(cache, prompt, request_id="a") == 2


async def test_after_end_request_the_id_is_free_at_once():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        await fill(cache, prompt)
        cache.prefetch(prompt, request_id="a")
        await cache.query_status("a")
        await cache.end_request("a")
        assert (await cache.prefetch(make_prompt(3), request_id="a").load_done).chunks == 2


async def test_after_end_request_the_id_is_free_though_its_io_still_runs():
    gate = GatedBackend(MemoryBackend(), stubborn=True)
    prompt, other = make_prompt(2), make_prompt(2, 2)
    await seed(gate, prompt)
    await seed(gate, other)
    async with open_cache(gate) as cache:
        gate.hold("load")
        cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        await cache.end_request("a")
        second = cache.prefetch(other, request_id="a")
        assert (await second.lookup_done).chunks == 2
        gate.release("load")
        assert (await cache.query_status("a")).chunks == 2
        async with cache.read("a") as lease:
            assert verify(lease, other) == [0, 1]
        await settle()
        await assert_nothing_held(cache)


async def test_a_claimed_request_that_holds_nothing_is_over_at_once():
    async with open_cache() as cache:
        cache.prefetch(make_prompt(2), request_id="a")
        assert (await cache.query_status("a")).chunks == 0
        assert (await cache.stats()).requests == 0
        cache.prefetch(make_prompt(3), request_id="a")
        with pytest.raises(RequestConflictError):
            cache.prefetch(make_prompt(2), request_id="a")


async def test_an_id_is_given_where_none_is_told():
    async with open_cache() as cache:
        prefetches = [cache.prefetch(make_prompt(1)) for _ in range(10)]
        ids = {prefetch.request_id for prefetch in prefetches}
        assert len(ids) == 10
        assert all(isinstance(request_id, str) for request_id in ids)
        for request_id in ids:
            assert (await cache.query_status(request_id)).request_id == request_id


async def test_an_unknown_id_is_an_error_and_never_0():
    async with open_cache() as cache:
        await both_are_unknown(cache, "nobody")
        with pytest.raises(UnknownRequestError):
            await attempt(lambda: cache.read("nobody"))
        with pytest.raises(UnknownRequestError):
            await cache.renew("nobody")


async def test_the_result_is_handed_out_once_and_then_both_queries_raise_together():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        await fill(cache, prompt)
        cache.prefetch(prompt, request_id="a")
        assert (await cache.query_status("a")).chunks == 2
        await both_are_unknown(cache, "a")


async def test_the_leases_stay_after_the_claim_until_they_are_read():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        await fill(cache, prompt)
        cache.prefetch(prompt, request_id="a")
        await cache.query_status("a")
        assert (await cache.stats()).leases == 2
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1]
        await assert_nothing_held(cache)


async def test_of_several_that_wait_for_the_status_one_gets_it_and_the_others_an_error_at_once():
    gate = GatedBackend(MemoryBackend())
    prompt = make_prompt(2)
    await seed(gate, prompt)
    async with open_cache(gate) as cache:
        gate.hold("load")
        cache.prefetch(prompt, request_id="a")
        waits = [asyncio.ensure_future(cache.query_status("a")) for _ in range(5)]
        await gate.reached("load")
        now = asyncio.get_running_loop().time()
        gate.release("load")
        got = await outcomes(*waits)
        assert asyncio.get_running_loop().time() == pytest.approx(now, abs=0.1)
        assert sorted(type(each).__name__ for each in got) == ["LoadResult"] + ["UnknownRequestError"] * 4
        await both_are_unknown(cache, "a")


async def test_the_hits_can_be_asked_by_any_number_of_callers_any_number_of_times():
    gate = GatedBackend(MemoryBackend())
    prompt = make_prompt(2)
    await seed(gate, prompt)
    async with open_cache(gate) as cache:
        gate.hold("lookup", "load")
        cache.prefetch(prompt, request_id="a")
        waits = [asyncio.ensure_future(cache.query_lookup_hits("a")) for _ in range(5)]
        await gate.reached("lookup")
        gate.release("lookup")
        assert [hits.chunks for hits in await asyncio.gather(*waits)] == [2] * 5
        for _ in range(3):
            assert (await cache.query_lookup_hits("a")).chunks == 2
        gate.release("load")
        assert (await cache.query_status("a")).chunks == 2


async def test_reading_claims_nothing():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        await fill(cache, prompt)
        cache.prefetch(prompt, request_id="a")
        async with cache.read("a") as lease:
            assert lease.result.chunks == 2
            assert (await cache.query_lookup_hits("a")).chunks == 2
            assert (await cache.query_status("a")).chunks == 2


async def test_awaiting_the_futures_claims_nothing():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        await fill(cache, prompt)
        prefetch = cache.prefetch(prompt, request_id="a")
        result = await prefetch.load_done
        assert await cache.query_status("a") == result


async def test_when_all_readers_have_left_the_request_is_over_and_its_record_goes():
    prompt = make_prompt(2)
    async with open_cache() as cache:
        await fill(cache, prompt)
        prefetch = cache.prefetch(prompt, request_id="a")
        async with cache.read("a"):
            pass
        await both_are_unknown(cache, "a")
        with pytest.raises(UnknownRequestError):
            await attempt(lambda: cache.read("a"))
        await assert_nothing_held(cache)
        assert (await prefetch.load_done).chunks == 2
        assert cache.prefetch(make_prompt(3), request_id="a") is not prefetch


async def test_end_request_is_idempotent_and_takes_any_id():
    async with open_cache() as cache:
        await cache.end_request("nobody")
        await fill(cache, make_prompt(2))
        await cache.prefetch(make_prompt(2), request_id="a").load_done
        await cache.end_request("a")
        await cache.end_request("a")
        await both_are_unknown(cache, "a")
        await assert_nothing_held(cache)


async def test_an_unknown_request_error_is_a_key_error_with_a_message():
    async with open_cache() as cache:
        with pytest.raises(KeyError, match="nobody"):
            await cache.query_status("nobody")


async def test_who_still_waits_for_an_ended_request_has_nothing_to_do_with_the_next_of_that_id():
    prompt = make_prompt(2)
    gate = GatedBackend(MemoryBackend())
    await seed(gate, prompt)
    async with open_cache(gate) as cache:
        gate.hold("load")
        cache.prefetch(prompt, request_id="a")
        old = asyncio.ensure_future(cache.query_status("a"))
        await gate.reached("load")
        await settle()
        await cache.end_request("a")
        cache.prefetch(prompt, request_id="a")
        new = asyncio.ensure_future(cache.query_status("a"))
        gate.release("load")
        assert (await new).chunks == 2
        with pytest.raises(UnknownRequestError):
            await old


async def test_however_many_results_come_at_once_each_waiter_gets_its_own():
    prompt = make_prompt(1)
    async with open_cache() as cache:
        await fill(cache, prompt)
        for number in range(2000):
            cache.prefetch(prompt, request_id=f"r{number}")
        results = await asyncio.gather(*(cache.query_status(f"r{number}") for number in range(2000)))
        assert [result.request_id for result in results] == [f"r{number}" for number in range(2000)]
        for number in range(2000):
            await cache.end_request(f"r{number}")
