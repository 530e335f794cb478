"""Advice: from which chunk on computing is expected to be faster than loading."""

import asyncio
from typing import Any

from contract.support import OBJECT_BYTES, fill, fill_l2, make_prompt, open_cache

from async_cache.advice import MOST_QUEUED_SECONDS, Adviser
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import ThrottledBackend
from async_cache.testing.virtual import run_virtual


def advise(*asked: Any, rate: int = 100) -> int | None:
    return Adviser(rate, lambda: 0.0).recompute_from(*asked)


def test_it_is_all_that_would_have_to_be_loaded_or_nothing() -> None:
    assert advise(2, [3, 5], 8, 100, 6.0) == 5
    assert advise(2, [3, 5], 8, 100, 5.0) is None
    assert advise(0, [], 8, 100, 9.0) is None
    assert advise(0, [0], 8, 100, None) is None
    assert advise(0, [0], 8, 100, 9.0, rate=0) is None


def test_what_is_to_be_computed_already_speaks_for_loading_until_it_should_be_done() -> None:
    now = [50.0]
    adviser = Adviser(100, lambda: now[0])
    assert adviser.recompute_from(0, [0], 8, 100, 9.0) == 0  # 8 seconds
    assert adviser.recompute_from(0, [0], 8, 100, 15.0) is None  # 16
    now[0] += 4
    assert adviser.recompute_from(0, [], 2, 100, None, 300) is None  # 3 more of what is nowhere
    assert adviser.recompute_from(0, [0], 8, 100, 14.9) is None  # 15
    assert adviser.recompute_from(0, [0], 8, 100, 15.1) == 0
    now[0] += 1000
    assert adviser.recompute_from(0, [0], 8, 100, 8.1) == 0
    adviser.recompute_from(0, [], 0, 100, None, 10**12)
    now[0] += MOST_QUEUED_SECONDS
    assert adviser.recompute_from(0, [0], 8, 100, 8.1) == 0


def test_a_lookup_says_so_by_what_was_measured_and_what_is_queued() -> None:
    async def run() -> None:
        backend = ThrottledBackend(MemoryBackend(), bytes_per_second=16 * OBJECT_BYTES)  # 16 chunks a second
        async with open_cache(backend, pages=256, prefill_tokens_per_second=4 * 7) as cache:  # 7 chunks a second
            for number in range(3):
                await fill_l2(cache, make_prompt(32, number))
            first = cache.prefetch(make_prompt(32, 0))
            assert (await first.lookup_done).recompute_from is None  # nothing was measured
            await first.load_done
            second = cache.prefetch(make_prompt(32, 1))
            assert (await second.lookup_done).recompute_from is None  # 2 seconds, and 4.6 to compute it
            third = cache.prefetch(make_prompt(32, 2))
            assert (await third.lookup_done).recompute_from is None  # 4 with what is queued
            for prefetch in (first, second, third):
                await cache.end_request(prefetch.request_id)
        async with open_cache(backend, pages=256, prefill_tokens_per_second=4 * 64) as cache:
            await fill(cache, make_prompt(8, 1))
            warm = cache.prefetch(make_prompt(32, 0))
            await warm.load_done
            prefetch = cache.prefetch(make_prompt(32, 1))
            assert (await prefetch.lookup_done).recompute_from == 8  # what is in memory needs no load
            assert (await prefetch.load_done).chunks == 32  # it is advice, and no more

    run_virtual(run())


def test_what_the_parts_of_a_request_have_to_be_computed_of_queues_before_what_comes_next() -> None:
    async def run() -> None:
        backend = ThrottledBackend(MemoryBackend(), bytes_per_second=16 * OBJECT_BYTES)  # 16 chunks a second
        async with open_cache(backend, pages=256, prefill_tokens_per_second=4 * 20) as cache:  # 20 chunks a second
            for number in range(3):
                await fill_l2(cache, make_prompt(32, number))
            await cache.prefetch(make_prompt(32, 0)).load_done
            alone = cache.prefetch(make_prompt(32, 1))
            assert (await alone.lookup_done).recompute_from == 0  # 2 seconds, and 1.6 to compute it
            await alone.load_done
            await asyncio.sleep(60)
            parts = cache.prefetch_segments([make_prompt(8, 7), make_prompt(12, 8)])
            await parts.lookup_done  # 20 chunks that nobody has: a second
            behind = cache.prefetch(make_prompt(32, 2))
            assert (await behind.lookup_done).recompute_from is None  # 2 seconds, and 2.6 to compute it

    run_virtual(run())
