"""What nobody comes back for is swept, not before its time and not after."""

import pytest

from async_cache import UnknownRequestError
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import GatedBackend

from . import support
from .support import (
    PAGE,
    TWO_RANKS,
    Recorder,
    advance,
    assert_nothing_held,
    attempt,
    fill,
    make_layout,
    make_prompt,
    open_cache,
    seed,
    settle,
    verify,
)


async def is_known(cache, request_id):
    try:
        await cache.query_lookup_hits(request_id)
    except UnknownRequestError:
        return False
    return True


async def test_a_result_that_nobody_claims_or_reads_is_swept_after_its_ttl():
    prompt = make_prompt(3)
    async with open_cache() as cache:
        await fill(cache, prompt)
        prefetch = cache.prefetch(prompt, request_id="a")
        await prefetch.load_done
        await advance(59)
        assert await is_known(cache, "a")
        assert (await cache.stats()).leases == 3
        await advance(2)
        with pytest.raises(UnknownRequestError):
            await cache.query_status("a")
        with pytest.raises(UnknownRequestError):
            await attempt(lambda: cache.read("a"))
        assert not await is_known(cache, "a")
        stats = await cache.stats()
        assert (stats.swept_results, stats.swept_leases, stats.swept_reservations) == (1, 0, 0)
        await assert_nothing_held(cache)
        assert (await prefetch.load_done).chunks == 3


async def test_a_request_without_any_hit_is_swept_too():
    async with open_cache(MemoryBackend()) as cache:
        cache.prefetch(make_prompt(3), request_id="a")
        await advance(59)
        assert await is_known(cache, "a")
        await advance(2)
        assert not await is_known(cache, "a")
        assert (await cache.stats()).swept_results == 1
        await assert_nothing_held(cache)


async def test_the_ttl_of_a_result_runs_from_its_load():
    prompt = make_prompt(3)
    gate = GatedBackend(MemoryBackend())
    await seed(gate, prompt)
    async with open_cache(gate, load_timeout_seconds=1000, result_ttl_seconds=10) as cache:
        gate.hold("load")
        cache.prefetch(prompt, request_id="a")
        await advance(500)
        assert await is_known(cache, "a")
        gate.release("load")
        await advance(9)
        assert await is_known(cache, "a")
        await advance(2)
        assert not await is_known(cache, "a")


async def test_a_claimed_request_that_nobody_reads_is_swept_after_the_ttl_of_its_leases():
    prompt = make_prompt(3)
    async with open_cache() as cache:
        await fill(cache, prompt)
        cache.prefetch(prompt, request_id="a")
        await advance(50)
        await cache.query_status("a")
        await advance(299)
        assert (await cache.stats()).leases == 3
        await advance(2)
        stats = await cache.stats()
        assert (stats.swept_results, stats.swept_leases) == (0, 1)
        with pytest.raises(UnknownRequestError):
            await attempt(lambda: cache.read("a"))
        await assert_nothing_held(cache)
        cache.prefetch(make_prompt(2), request_id="a")


async def test_a_request_that_not_all_have_read_is_swept_after_the_ttl_of_its_leases():
    prompt = make_prompt(3, layout=TWO_RANKS)
    async with open_cache(result_ttl_seconds=10, lease_ttl_seconds=100) as cache:
        await fill(cache, prompt)
        cache.prefetch(prompt, request_id="a")
        async with cache.read("a", rank=0) as lease:
            assert verify(lease, prompt, 0) == [0, 1, 2]
        await advance(99)
        assert (await cache.stats()).leases == 3
        await advance(2)
        assert (await cache.stats()).swept_leases == 1
        with pytest.raises(UnknownRequestError):
            await attempt(lambda: cache.read("a", rank=1))
        await assert_nothing_held(cache)


async def test_a_read_that_was_entered_keeps_its_memory_until_it_leaves():
    layout = make_layout(world_size=2)
    prompt = make_prompt(3, layout=layout)
    async with open_cache(pages=16, lease_ttl_seconds=100) as cache:
        await fill(cache, prompt)
        cache.prefetch(prompt, request_id="a")
        async with cache.read("a", rank=1) as lease:
            await advance(200)
            assert not await is_known(cache, "a")
            stats = await cache.stats()
            assert stats.swept_leases == 1
            ended = support.kind == "bound"  # what such a tenant does not leave is taken back
            assert (stats.leased_bytes > 0) == (not ended)
            for number in range(2, 10):
                await fill(cache, make_prompt(7, number, layout))
            assert verify(lease, prompt, 1) == [0, 1, 2]
        await assert_nothing_held(cache)


async def test_a_renewed_result_lives_on():
    prompt = make_prompt(3)
    async with open_cache(result_ttl_seconds=10) as cache:
        await fill(cache, prompt)
        await cache.prefetch(prompt, request_id="a").load_done
        for _ in range(20):
            await advance(9)
            await cache.renew("a")
        assert await is_known(cache, "a")
        await advance(11)
        assert not await is_known(cache, "a")
        assert (await cache.stats()).swept_results == 1


async def test_renewed_leases_live_on():
    prompt = make_prompt(3)
    async with open_cache(lease_ttl_seconds=10) as cache:
        await fill(cache, prompt)
        cache.prefetch(prompt, request_id="a")
        await cache.query_status("a")
        for _ in range(20):
            await advance(9)
            await cache.renew("a")
        assert (await cache.stats()).leases == 3
        await advance(11)
        assert (await cache.stats()).swept_leases == 1
        await assert_nothing_held(cache)


async def test_a_swept_ended_or_unknown_request_can_not_be_renewed():
    async with open_cache(result_ttl_seconds=10) as cache:
        await fill(cache, make_prompt(1))
        await cache.prefetch(make_prompt(1), request_id="swept").load_done
        await advance(11)
        await cache.prefetch(make_prompt(1), request_id="ended").load_done
        await cache.end_request("ended")
        for request_id in ("swept", "ended", "nobody"):
            with pytest.raises(UnknownRequestError):
                await cache.renew(request_id)


async def test_a_request_that_is_read_in_time_is_never_counted_as_swept():
    prompt = make_prompt(3)
    async with open_cache() as cache:
        await fill(cache, prompt)
        cache.prefetch(prompt, request_id="a")
        await cache.query_status("a")
        async with cache.read("a"):
            pass
        await advance(1000)
        stats = await cache.stats()
        assert (stats.swept_results, stats.swept_leases, stats.swept_reservations) == (0, 0, 0)


async def test_a_claimed_request_that_holds_nothing_is_not_swept():
    async with open_cache() as cache:
        cache.prefetch(make_prompt(3), request_id="a")
        await cache.query_status("a")
        await advance(1000)
        stats = await cache.stats()
        assert (stats.swept_results, stats.swept_leases) == (0, 0)


async def test_a_new_request_under_a_swept_id_has_its_own_time():
    prompt = make_prompt(3)
    async with open_cache(result_ttl_seconds=10) as cache:
        await fill(cache, prompt)
        for _ in range(3):
            cache.prefetch(prompt, request_id="a")
            await advance(5)
            await cache.end_request("a")
        cache.prefetch(prompt, request_id="a")
        await advance(9)
        assert await is_known(cache, "a")
        await advance(2)
        assert not await is_known(cache, "a")
        assert (await cache.stats()).swept_results == 1


async def test_a_thousand_abandoned_requests_leave_nothing_behind():
    prompt = make_prompt(8)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        for number in range(1000):
            cache.prefetch(prompt, request_id=f"{number}")
            await advance(0.1)
        await advance(24 * 3600)
        assert (await cache.stats()).swept_results == 1000
        await assert_nothing_held(cache, recorder)


async def test_requests_are_swept_each_at_its_own_time():
    prompt = make_prompt(2)
    async with open_cache(result_ttl_seconds=60) as cache:
        await fill(cache, prompt)
        for number in range(10):
            cache.prefetch(prompt, request_id=f"{number}")
            await advance(5)
        for left in range(9, -1, -1):
            await advance(5 if left < 9 else 12)
            stats = await cache.stats()
            assert stats.requests + stats.swept_results == 10
        await advance(20)
        assert (await cache.stats()).swept_results == 10
        await assert_nothing_held(cache)


async def test_an_abandoned_writer_gives_its_room_back():
    async with open_cache(pages=16, reservation_ttl_seconds=100) as cache:
        for number in range(2, 12):
            await cache.store(make_prompt(14, number))
            await advance(101)
        await settle()
        stats = await cache.stats()
        assert stats.swept_reservations == 10
        await assert_nothing_held(cache)
        assert stats.l1_used_bytes <= PAGE
