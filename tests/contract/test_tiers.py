"""Several backends, fastest first: what each is given, what is promoted, what is admitted, and over to the next."""

import asyncio
from collections.abc import Callable

import pytest

from async_cache import Prompt, Shortfall
from async_cache.errors import BackendError
from async_cache.l2 import Backend, Limits, LoadOutcome, Placement, Placing
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import FailingBackend, GatedBackend

from .support import (
    TWO_RANKS,
    Recorder,
    Scripted,
    assert_nothing_held,
    fill,
    fill_l2,
    make_prompt,
    object_keys,
    open_cache,
    read_back,
    seed,
    settle,
)

ALL, FIRST, SKIP, NONE = Placing


def placed(backend: Backend, write: Placing = ALL, *, promote: bool = False, admit: int = 1) -> Backend:
    backend.placement = Placement(write=write, promote=promote, admit=admit)
    return backend


def memory(name: str, write: Placing = ALL, *, promote: bool = False, admit: int = 1) -> MemoryBackend:
    backend = MemoryBackend(name)
    placed(backend, write, promote=promote, admit=admit)
    return backend


def counts(*backends: Backend) -> list[int]:
    return [backend.usage().objects for backend in backends]


# What is committed.


@pytest.mark.parametrize(
    ("writes", "stored"),
    [
        ([ALL, ALL], [3, 3]),
        ([ALL, FIRST], [3, 0]),
        ([FIRST, ALL], [3, 3]),
        ([FIRST, FIRST], [3, 0]),
        ([ALL, SKIP], [3, 0]),
        ([SKIP, ALL], [0, 3]),
        ([SKIP, SKIP], [3, 0]),
        ([SKIP, FIRST], [0, 3]),
        ([NONE, FIRST], [0, 3]),
        ([NONE, SKIP], [0, 3]),
        ([NONE, ALL, FIRST, SKIP], [0, 3, 0, 0]),
    ],
)
async def test_what_is_committed_goes_to_those_that_their_urls_name(writes: list[Placing], stored: list[int]) -> None:
    backends = [memory(str(number), write) for number, write in enumerate(writes)]
    async with open_cache(*backends) as cache:
        await fill(cache, make_prompt(3))
        flushed = await cache.flush()
        assert (flushed.written, flushed.pending, flushed.dropped) == (3, 0, 0)
        assert counts(*backends) == stored
        await assert_nothing_held(cache)


@pytest.mark.parametrize("write", [FIRST, SKIP])
async def test_the_next_backend_stands_in_for_one_that_takes_nothing(write: Placing) -> None:
    refusing = placed(FailingBackend(MemoryBackend("near"), "store", times=None))
    behind, last = memory("behind", write), memory("last", FIRST)
    async with open_cache(refusing, behind, last, breaker_reset_seconds=1) as cache:
        await fill(cache, make_prompt(3))
        flushed = await cache.flush()
        assert (flushed.written, flushed.pending, flushed.dropped) == (3, 0, 0)
        there = counts(behind, last)
        assert there == ([3, 0] if write is FIRST else [0, 3])
        await cache.clear("l1")
        assert await read_back(cache, make_prompt(3)) == 3


async def test_first_stands_in_for_those_before_it_though_one_behind_has_stored() -> None:
    refusing = placed(FailingBackend(MemoryBackend("near"), "store", times=None))
    middle, last = memory("middle", FIRST), memory("last")
    async with open_cache(refusing, middle, last, breaker_reset_seconds=1) as cache:
        await fill(cache, make_prompt(2))
        await cache.flush()
        assert counts(middle, last) == [2, 2]


async def test_what_another_backend_holds_is_not_written_to_one_that_skips_it() -> None:
    elsewhere, skipping = memory("elsewhere", NONE), memory("skipping", SKIP)
    prompt = make_prompt(4)
    await seed(elsewhere, prompt, chunks=[0, 2])
    async with open_cache(skipping, elsewhere) as cache:
        await fill(cache, prompt)
        flushed = await cache.flush()
        assert (flushed.written, flushed.pending, flushed.dropped) == (4, 0, 0)
        keys = {key async for key, _ in skipping.keys()}
        assert keys == set(object_keys(prompt, chunks=[1, 3]))
        await cache.clear("l1")
        assert await read_back(cache, prompt) == 4


async def test_what_no_backend_is_given_is_neither_pending_nor_dropped_and_may_leave_memory() -> None:
    only_read = memory("only_read", NONE)
    async with open_cache(only_read, pages=4) as cache:
        await fill(cache, make_prompt(4))
        stats = await cache.stats()
        assert (stats.writebacks_pending, stats.writebacks_dropped) == (0, 0)
        await fill(cache, make_prompt(4, number=2))
        flushed = await cache.flush()
        assert (flushed.written, flushed.pending, flushed.dropped) == (0, 0, 0)
        assert (await cache.stats()).l1_chunks == 4
        assert (await cache.clear("l1")).chunks == 4


async def test_what_waits_for_its_turn_is_pending_and_dropped_where_it_has_to_leave() -> None:
    gate = GatedBackend(MemoryBackend("near"), "store")
    behind = memory("behind", FIRST)
    async with open_cache(gate, behind, pages=4) as cache:
        await fill(cache, make_prompt(2))
        await settle()
        assert (await cache.stats()).writebacks_pending == 2
        assert (await cache.clear("l1")).chunks == 0, "it is not written yet"
        gate.release()
        assert (await cache.flush()).written == 2
        assert counts(behind) == [0]


async def test_what_is_deleted_takes_no_turn() -> None:
    gate = GatedBackend(FailingBackend(MemoryBackend("near"), "store", times=None), "store")
    behind = memory("behind", FIRST)
    prompt = make_prompt(2)
    async with open_cache(gate, behind, breaker_reset_seconds=1) as cache:
        await fill(cache, prompt)
        await settle()
        deleting = asyncio.create_task(cache.delete(prompt))
        await settle()
        gate.release()
        await deleting
        await cache.flush()
        await asyncio.sleep(60)
        assert counts(behind) == [0]
        stats = await cache.stats()
        assert (stats.writebacks_pending, stats.writebacks_dropped) == (0, 0)


async def test_each_rank_of_a_chunk_has_its_turn() -> None:
    refusing = placed(FailingBackend(MemoryBackend("near"), "store", times=5))
    behind = memory("behind", FIRST)
    prompt = make_prompt(1, layout=TWO_RANKS)
    async with open_cache(refusing, behind, breaker_reset_seconds=1) as cache:
        await fill(cache, prompt, ranks=[0])
        await cache.flush()
        assert counts(refusing, behind) == [0, 1]
        await fill(cache, prompt, ranks=[1])
        await cache.flush()
        await cache.clear("l1")
        assert await read_back(cache, prompt) == 1


# What is found low.


async def test_what_was_found_low_and_loaded_is_promoted() -> None:
    fast, slow = memory("fast", NONE, promote=True), memory("slow")
    prompt = make_prompt(3)
    await seed(slow, prompt)
    async with open_cache(fast, slow) as cache:
        assert await read_back(cache, prompt) == 3
        await _until(lambda: counts(fast) == [3])
        stats = await cache.stats()
        assert (stats.writebacks_pending, stats.writebacks_dropped) == (0, 0)
        status = {each.name: each for each in await cache.backends()}
        assert (status["fast"].promoted, status["fast"].unpromoted, status["slow"].promoted) == (3, 0, 0)
        flushed = await cache.flush()
        assert (flushed.written, flushed.dropped) == (0, 0), "nobody has committed anything"
        await cache.clear("l1")
        assert await read_back(cache, prompt) == 3
        await assert_nothing_held(cache)


async def test_what_comes_from_the_faster_backend_is_not_promoted_to_it_again() -> None:
    fast, slow = Recorder(memory("fast")), memory("slow", promote=True)
    placed(fast, promote=True)
    async with open_cache(fast, slow) as cache:
        await fill_l2(cache, make_prompt(3))
        stored = fast.calls["store"]
        lookups = fast.calls["lookup"]
        assert await read_back(cache, make_prompt(3)) == 3
        await settle()
        assert (fast.calls["store"], fast.calls["lookup"]) == (stored, lookups + 1)
        assert [each.promoted + each.unpromoted for each in await cache.backends()] == [0, 0]


async def test_a_promotion_delays_no_load_and_is_dropped_where_too_much_waits() -> None:
    fast = GatedBackend(MemoryBackend("fast"), "store")
    placed(fast, NONE, promote=True)
    slow = memory("slow")
    prompts = [make_prompt(8, number=number) for number in range(1, 5)]
    for prompt in prompts:
        await seed(slow, prompt)
    async with open_cache(fast, slow, pages=64) as cache:  # a quarter of it, for two: 8 pages
        for prompt in prompts:
            assert await read_back(cache, prompt) == 8
        (status,) = [each for each in await cache.backends() if each.name == "fast"]
        assert (status.pending, status.unpromoted) == (8, 24)
        assert (await cache.clear("l1")).chunks == 32, "what is promoted is not needed here"
        fast.release()
        await settle()
        stats = await cache.stats()
        assert (stats.writebacks_pending, stats.writebacks_dropped, stats.l1_used_bytes) == (0, 0, 0)


async def test_what_is_evicted_before_it_was_promoted_is_no_loss() -> None:
    fast = GatedBackend(MemoryBackend("fast"), "lookup")
    placed(fast, NONE, promote=True)
    slow = memory("slow")
    await seed(slow, make_prompt(2))
    await seed(slow, make_prompt(4, number=2))
    async with open_cache(fast, slow, pages=4, writeback_share=1.0, lookup_timeout_seconds=0.1) as cache:
        assert await read_back(cache, make_prompt(2)) == 2
        assert await read_back(cache, make_prompt(4, number=2)) >= 2
        await asyncio.sleep(60)
        stats = await cache.stats()
        assert (stats.writebacks_pending, stats.writebacks_dropped) == (0, 0)
        fast.release()


async def test_a_deleted_chunk_is_not_promoted() -> None:
    fast = GatedBackend(MemoryBackend("fast"), "lookup")
    placed(fast, NONE, promote=True)
    slow = memory("slow")
    prompt = make_prompt(2)
    await seed(slow, prompt)
    async with open_cache(fast, slow) as cache:
        prefetch = cache.prefetch(prompt)
        await asyncio.sleep(2)  # the fast one is silent
        assert (await prefetch.load_done).chunks == 2
        await cache.end_request(prefetch.request_id)
        fast.release()
        await cache.delete(prompt)
        await asyncio.sleep(60)
        assert counts(fast, slow) == [0, 0]


# What is asked for often enough.


async def test_a_slow_backend_is_written_only_what_was_asked_for_often_enough() -> None:
    slow = memory("slow", admit=2)
    once, twice = make_prompt(3), make_prompt(3, number=2)
    async with open_cache(slow) as cache:
        for prompt in (once, twice):
            assert await read_back(cache, prompt) == 0
            await fill(cache, prompt)
        flushed = await cache.flush()
        assert (flushed.written, flushed.pending, flushed.dropped) == (0, 0, 0)
        assert counts(slow) == [0]
        assert await read_back(cache, twice) == 3
        await settle()
        assert (await cache.flush()).written == 3
        assert {key async for key, _ in slow.keys()} == set(object_keys(twice))


async def test_what_was_asked_for_often_before_it_is_stored_is_written_at_once() -> None:
    slow = memory("slow", admit=3)
    prompt = make_prompt(2)
    async with open_cache(slow) as cache:
        for _ in range(3):
            assert await read_back(cache, prompt) == 0
        await settle()
        await fill(cache, prompt)
        assert (await cache.flush()).written == 2


async def test_what_is_not_admitted_goes_to_one_that_stands_in() -> None:
    slow, behind = memory("slow", admit=2), memory("behind", FIRST)
    async with open_cache(slow, behind) as cache:
        await fill(cache, make_prompt(2))
        assert (await cache.flush()).written == 2
        assert counts(slow, behind) == [0, 2]


async def test_what_was_loaded_and_is_asked_for_again_is_admitted_behind() -> None:
    fast, slow = memory("fast"), memory("slow", admit=2)
    prompt = make_prompt(2)
    async with open_cache(fast, slow) as cache:
        await fill_l2(cache, prompt)
        assert await read_back(cache, prompt) == 2
        await cache.clear("l1")
        await settle()
        assert counts(fast, slow) == [2, 0]
        assert await read_back(cache, prompt) == 2
        await settle()
        await cache.flush()
        assert counts(fast, slow) == [2, 2]
        assert (await cache.stats()).writebacks_dropped == 0


# Over to the next.


@pytest.mark.parametrize(
    "answer", [LoadOutcome.GONE, LoadOutcome.CORRUPT, LoadOutcome.FAILED, BackendError("injected")]
)
async def test_whatever_comes_of_a_load_the_next_holder_is_asked(answer: LoadOutcome | Exception) -> None:
    fast, slow = Scripted(MemoryBackend("fast")), Recorder(MemoryBackend("slow"))
    prompt = make_prompt(3)
    async with open_cache(fast, slow) as cache:
        await fill_l2(cache, prompt)
        fast.load_answers = dict.fromkeys(object_keys(prompt, chunks=[1]), answer)
        assert await read_back(cache, prompt) == 3
        assert slow.calls["load"] == 1
        await assert_nothing_held(cache, fast, slow)


async def test_a_load_that_outlasts_its_time_is_made_anew_from_the_next_holder() -> None:
    fast, slow = GatedBackend(MemoryBackend("fast")), Recorder(MemoryBackend("slow"))
    fast.limits = Limits(load_timeout_seconds=2)
    prompt = make_prompt(3)
    async with open_cache(fast, slow) as cache:
        await fill_l2(cache, prompt)
        fast.hold("load")
        assert await read_back(cache, prompt) == 3
        assert slow.calls["load"] == 1
        fast.release()
        await settle()
        await assert_nothing_held(cache, slow)


async def test_where_the_breaker_is_open_the_next_holder_is_asked_at_once() -> None:
    fast, slow = Scripted(MemoryBackend("fast")), Recorder(MemoryBackend("slow"))
    prompt = make_prompt(3)
    async with open_cache(fast, slow, breaker_failures=1) as cache:
        await fill_l2(cache, prompt)
        fast.lookup_error = BackendError("injected")
        assert await read_back(cache, prompt) == 3
        asked = fast.calls["lookup"]
        await cache.clear("l1")
        assert await read_back(cache, prompt) == 3
        assert (fast.calls["lookup"], slow.calls["load"]) == (asked, 2)
        assert [each.breaker for each in await cache.backends()] == ["open", "closed"]


async def test_a_breaker_that_opens_between_lookup_and_load_is_no_shortfall() -> None:
    fast, slow = Scripted(MemoryBackend("fast")), Recorder(MemoryBackend("slow"))
    prompts = [make_prompt(2, number=number) for number in (1, 2)]
    async with open_cache(fast, slow, breaker_failures=1, load_inflight_bytes=1) as cache:
        await fill_l2(cache, *prompts)
        fast.load_answers = dict.fromkeys(object_keys(prompts[0]), BackendError("injected"))
        both = [cache.prefetch(prompt) for prompt in prompts]  # the second waits until the first has failed
        for prefetch in both:
            result = await prefetch.load_done
            assert (result.chunks, result.shortfall) == (2, None)
            await cache.end_request(prefetch.request_id)
        await assert_nothing_held(cache, fast, slow)


async def test_what_nobody_can_load_falls_short_and_says_why() -> None:
    fast, slow = Scripted(MemoryBackend("fast")), Scripted(MemoryBackend("slow"))
    prompt = make_prompt(3)
    async with open_cache(fast, slow) as cache:
        await fill_l2(cache, prompt)
        for backend in (fast, slow):
            backend.load_answers = dict.fromkeys(object_keys(prompt, chunks=[1]), LoadOutcome.GONE)
        prefetch = cache.prefetch(prompt)
        result = await prefetch.load_done
        assert (result.chunks, result.shortfall) == (1, Shortfall.GONE)
        await cache.end_request(prefetch.request_id)


# What L1 has.


@pytest.mark.parametrize("write", [ALL, SKIP, NONE])
async def test_a_request_that_l1_has_in_full_waits_for_no_dead_backend(write: Placing) -> None:
    near, dead = memory("near"), GatedBackend(MemoryBackend("dead"))
    placed(dead, write, promote=True, admit=2)
    prompt = make_prompt(8)
    async with open_cache(near, dead) as cache:
        await fill(cache, prompt)
        dead.hold()
        asked = dead.calls["lookup"]
        before = asyncio.get_running_loop().time()
        for _ in range(50):
            prefetch = cache.prefetch(prompt)
            assert (await prefetch.load_done).l1_chunks == 8
            await cache.end_request(prefetch.request_id)
        assert asyncio.get_running_loop().time() - before < 0.1
        assert dead.calls["lookup"] - asked <= 1, "it is asked by write-back, and by nobody who waits"
        dead.release()


async def test_a_backend_that_others_change_answers_nothing_from_memory() -> None:
    class Shared(MemoryBackend):
        shared = True

        asked_at_once = 0

        def lookup_nowait(self, *_: object) -> list[bool] | None:
            self.asked_at_once += 1
            return [True, True]

    backend = Shared()
    prompt = make_prompt(2)
    async with open_cache(backend) as cache:
        await fill_l2(cache, prompt)
        await backend.delete(object_keys(prompt))  # by another host
        assert (await cache.lookup(prompt)).chunks == 0
        await seed_again(backend, prompt)
        assert await read_back(cache, prompt) == 2
        assert backend.asked_at_once == 0


async def seed_again(backend: MemoryBackend, prompt: Prompt) -> None:
    """As `seed`, while the backend is open."""
    other = MemoryBackend()
    await seed(other, prompt)
    async for key, size in other.keys():
        buffer = memoryview(bytearray(size))
        await other.load([key], [buffer])
        await backend.store([key], [buffer])


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to that")
