"""A fault shortens, it does not raise; and the result says why."""

import asyncio

import pytest

from async_cache import BackendError, ObjectGroup, Shortfall
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import BitFlipBackend, FailingBackend, GatedBackend

from .support import (
    PAGE,
    SMALL,
    TWO_RANKS,
    Recorder,
    Scripted,
    assert_nothing_held,
    count_hits,
    fill,
    fill_l2,
    make_layout,
    make_prompt,
    object_keys,
    open_cache,
    read_back,
    seed,
    settle,
    verify,
)


def now():
    return asyncio.get_running_loop().time()


class LateAnswer(Recorder):
    """Finds and pins at once, but answers only when told, also if it is cancelled."""

    def __init__(self, inner):
        super().__init__(inner)
        self.answer = asyncio.Event()

    async def lookup(self, keys):
        found = await super().lookup(keys)
        while not self.answer.is_set():
            try:
                await self.answer.wait()
            except asyncio.CancelledError:
                continue
        return found


async def scripted(prompt, name="memory", **answers):
    backend = Scripted(MemoryBackend(name=name))
    await seed(backend, prompt)
    return backend


def answer(backend, prompt, index, what):
    for key in object_keys(prompt, [index]):
        backend.load_answers[key] = what


@pytest.mark.parametrize(
    ("what", "shortfall"), [(LoadOutcome.GONE, Shortfall.GONE), (LoadOutcome.CORRUPT, Shortfall.CORRUPT)]
)
async def test_a_chunk_that_does_not_load_ends_the_prefix(what, shortfall):
    prompt = make_prompt(5)
    backend = await scripted(prompt)
    answer(backend, prompt, 2, what)
    async with open_cache(backend) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        assert (await prefetch.lookup_done).chunks == 5
        result = await prefetch.load_done
        assert (result.chunks, result.l1_chunks + result.l2_chunks, result.shortfall) == (2, 2, shortfall)
        async with cache.read("a") as lease:
            assert lease.result == result
            assert verify(lease, prompt) == [0, 1]
        await assert_nothing_held(cache, backend)


async def test_what_a_shortened_result_does_not_count_is_neither_leased_nor_reserved():
    prompt = make_prompt(6)
    backend = await scripted(prompt)
    answer(backend, prompt, 3, LoadOutcome.GONE)
    async with open_cache(backend) as cache:
        await read_back(cache, make_prompt(1))
        await fill(cache, prompt, chunks=[5])
        prefetch = cache.prefetch(prompt)
        result = await prefetch.load_done
        assert (result.chunks, result.l1_chunks, result.l2_chunks) == (3, 1, 2)
        stats = await cache.stats()
        assert (stats.leases, stats.reserved_bytes) == (3, 0)
        assert backend.pinned == {}


@pytest.mark.parametrize(
    ("first", "second"), [(LoadOutcome.GONE, LoadOutcome.CORRUPT), (LoadOutcome.CORRUPT, LoadOutcome.GONE)]
)
async def test_the_reason_told_is_that_of_the_first_missing_chunk(first, second):
    prompt = make_prompt(5)
    backend = await scripted(prompt)
    answer(backend, prompt, 1, first)
    answer(backend, prompt, 3, second)
    async with open_cache(backend) as cache:
        result = await cache.prefetch(prompt).load_done
        assert (result.chunks, result.shortfall) == (1, Shortfall(first.value))


@pytest.mark.parametrize(
    "error",
    [
        BackendError("x"),
        OSError("x"),
        RuntimeError("x"),
        ValueError("x"),
        KeyError("x"),
        TimeoutError("x"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_any_exception_of_a_load_is_a_backend_error(error):
    prompt = make_prompt(4)
    backend = FailingBackend(MemoryBackend(), "load", times=None, error=error)
    recorder = Recorder(backend)
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        await fill(cache, prompt, chunks=[0])
        prefetch = cache.prefetch(prompt, request_id="a")
        assert (await prefetch.lookup_done).chunks == 4
        result = await prefetch.load_done
        assert (result.chunks, result.shortfall) == (1, Shortfall.BACKEND_ERROR)
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0]
        await assert_nothing_held(cache, recorder)


@pytest.mark.parametrize(
    "error", [BackendError("x"), OSError("x"), RuntimeError("x"), ZeroDivisionError()], ids=lambda e: type(e).__name__
)
async def test_what_only_a_backend_whose_lookup_raises_could_have_is_a_miss(error):
    prompt = make_prompt(4)
    broken = FailingBackend(MemoryBackend(name="broken"), "lookup", times=None, error=error)
    sound = Recorder(MemoryBackend(name="sound"))
    await seed(broken, prompt)
    await seed(sound, prompt, chunks=[0, 1])
    async with open_cache(broken, sound) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        hits = await prefetch.lookup_done
        assert (hits.chunks, hits.shortfall) == (2, Shortfall.BACKEND_ERROR)
        assert (await prefetch.load_done).chunks == 2
        await cache.end_request("a")
        await assert_nothing_held(cache, sound)


async def test_a_lookup_that_raises_costs_nothing_where_another_backend_has_all():
    prompt = make_prompt(4)
    broken = FailingBackend(MemoryBackend(name="broken"), "lookup", times=None)
    sound = MemoryBackend(name="sound")
    await seed(sound, prompt)
    async with open_cache(broken, sound) as cache:
        hits = await cache.prefetch(prompt).lookup_done
        assert (hits.chunks, hits.found_chunks, hits.shortfall) == (4, 4, None)


async def test_a_silent_backend_is_left_behind_after_its_lookup_timeout():
    prompt = make_prompt(4)
    silent = GatedBackend(MemoryBackend(name="silent"))
    sound = MemoryBackend(name="sound")
    await seed(silent, prompt)
    await seed(sound, prompt, chunks=[0, 1])
    silent.hold("lookup")
    async with open_cache(silent, sound, lookup_timeout_seconds=3) as cache:
        prefetch = cache.prefetch(prompt)
        hits = await prefetch.lookup_done
        assert now() == pytest.approx(3, abs=0.1)
        assert (hits.chunks, hits.shortfall) == (2, Shortfall.BACKEND_ERROR)
        assert (await prefetch.load_done).chunks == 2
        silent.release("lookup")
        await settle()


async def test_the_pins_of_a_late_answer_are_given_back():
    prompt = make_prompt(4)
    late = LateAnswer(MemoryBackend(name="late"))
    sound = Recorder(MemoryBackend(name="sound"))
    await seed(late, prompt)
    await seed(sound, prompt, chunks=[0, 1])
    async with open_cache(late, sound) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        assert (await prefetch.lookup_done).chunks == 2
        assert len(late.pinned) > 0
        assert (await prefetch.load_done).chunks == 2
        late.answer.set()
        await settle()
        assert late.pinned == {}
        await cache.end_request("a")
        await assert_nothing_held(cache, late, sound)


@pytest.mark.parametrize("how", ["cancel", "end", "deadline"])
async def test_the_pins_of_an_answer_after_the_end_of_its_request_are_given_back(how):
    prompt = make_prompt(4)
    late = LateAnswer(MemoryBackend())
    await seed(late, prompt)
    async with open_cache(late, lookup_timeout_seconds=100) as cache:
        prefetch = cache.prefetch(prompt, request_id="a", deadline_seconds=2 if how == "deadline" else None)
        await settle()
        if how == "cancel":
            prefetch.cancel()
        elif how == "end":
            await cache.end_request("a")
        assert (await prefetch.load_done).chunks == 0
        late.answer.set()
        await settle()
        await cache.end_request("a")
        await assert_nothing_held(cache, late)


@pytest.mark.parametrize("what", [LoadOutcome.GONE, LoadOutcome.CORRUPT, OSError("x")], ids=str)
async def test_a_failed_load_tries_the_next_holder(what):
    prompt = make_prompt(4)
    first, second = await scripted(prompt, "first"), await scripted(prompt, "second")
    answer(first, prompt, 1, what)
    async with open_cache(first, second) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        result = await prefetch.load_done
        assert (result.chunks, result.shortfall) == (4, None)
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1, 2, 3]
        assert object_keys(prompt, [1])[0] in second.loaded
        await assert_nothing_held(cache, first, second)


async def test_where_all_holders_fail_the_result_falls_short():
    prompt = make_prompt(4)
    first, second = await scripted(prompt, "first"), await scripted(prompt, "second")
    answer(first, prompt, 1, LoadOutcome.CORRUPT)
    answer(second, prompt, 1, LoadOutcome.CORRUPT)
    async with open_cache(first, second) as cache:
        result = await cache.prefetch(prompt, request_id="a").load_done
        assert (result.chunks, result.shortfall) == (1, Shortfall.CORRUPT)
        await cache.end_request("a")
        await assert_nothing_held(cache, first, second)


async def test_an_object_that_vanished_after_the_lookup_is_gone():
    prompt = make_prompt(4)
    memory = MemoryBackend()
    gate = GatedBackend(memory)
    await seed(gate, prompt)
    async with open_cache(gate) as cache:
        gate.hold("load")
        prefetch = cache.prefetch(prompt)
        assert (await prefetch.lookup_done).chunks == 4
        await memory.delete(object_keys(prompt, [2]))
        gate.release("load")
        result = await prefetch.load_done
        assert (result.chunks, result.shortfall) == (2, Shortfall.GONE)


async def test_a_corrupt_object_is_a_miss_and_removed_and_can_be_stored_again():
    prompt = make_prompt(3)
    memory = MemoryBackend()
    await seed(memory, prompt)
    async with open_cache(BitFlipBackend(memory)) as cache:
        result = await cache.prefetch(prompt, request_id="a").load_done
        assert (result.chunks, result.shortfall) == (0, Shortfall.CORRUPT)
        await cache.end_request("a")
        assert await count_hits(cache, prompt) == 0
        await fill_l2(cache, prompt)
        assert await read_back(cache, prompt) == 3


async def test_a_deadline_during_the_lookup_gives_0_chunks():
    prompt = make_prompt(4)
    gate = GatedBackend(MemoryBackend())
    recorder = Recorder(gate)
    await seed(recorder, prompt)
    async with open_cache(recorder, lookup_timeout_seconds=100) as cache:
        await fill(cache, prompt, chunks=[0, 1])
        gate.hold("lookup")
        prefetch = cache.prefetch(prompt, request_id="a", deadline_seconds=5)
        hits, result = await prefetch.lookup_done, await prefetch.load_done
        assert now() == pytest.approx(5, abs=0.1)
        assert (hits.chunks, hits.shortfall) == (0, Shortfall.DEADLINE)
        assert (result.chunks, result.shortfall) == (0, Shortfall.DEADLINE)
        assert (await cache.query_status("a")).shortfall is Shortfall.DEADLINE
        gate.release("lookup")
        await settle()
        await assert_nothing_held(cache, recorder)


async def test_the_deadline_runs_from_the_call_of_prefetch():
    prompt = make_prompt(4)
    gate = GatedBackend(MemoryBackend())
    await seed(gate, prompt)
    async with open_cache(gate, lookup_timeout_seconds=100) as cache:
        gate.hold("lookup", "load")
        prefetch = cache.prefetch(prompt, deadline_seconds=5)
        await asyncio.sleep(4)
        gate.release("lookup")
        assert (await prefetch.lookup_done).chunks == 4
        result = await prefetch.load_done
        assert now() == pytest.approx(5, abs=0.1)
        assert result.shortfall is Shortfall.DEADLINE


async def test_a_deadline_during_the_load_leaves_what_is_in_memory():
    prompt = make_prompt(5)
    gate = GatedBackend(MemoryBackend())
    recorder = Recorder(gate)
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        assert await read_back(cache, make_prompt(2)) == 2
        gate.hold("load")
        prefetch = cache.prefetch(prompt, request_id="a", deadline_seconds=5)
        assert (await prefetch.lookup_done).chunks == 5
        result = await prefetch.load_done
        assert now() == pytest.approx(5, abs=0.1)
        assert (result.chunks, result.shortfall) == (2, Shortfall.DEADLINE)
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1]
        gate.release("load")
        await settle()
        await assert_nothing_held(cache, recorder)


async def test_a_deadline_after_the_load_changes_nothing():
    prompt = make_prompt(3)
    async with open_cache() as cache:
        await fill(cache, prompt)
        prefetch = cache.prefetch(prompt, request_id="a", deadline_seconds=5)
        await asyncio.sleep(10)
        assert (await prefetch.load_done).chunks == 3
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1, 2]


async def test_a_load_that_outlasts_its_timeout_tries_the_next_holder():
    prompt = make_prompt(3)
    slow, sound = GatedBackend(MemoryBackend(name="slow")), Recorder(MemoryBackend(name="sound"))
    await seed(slow, prompt)
    await seed(sound, prompt)
    async with open_cache(slow, sound, load_timeout_seconds=20) as cache:
        slow.hold("load")
        prefetch = cache.prefetch(prompt, request_id="a")
        result = await prefetch.load_done
        assert now() == pytest.approx(20, abs=0.1)
        assert (result.chunks, result.shortfall) == (3, None)
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1, 2]
        slow.release("load")
        await settle()
        await assert_nothing_held(cache, sound)


@pytest.mark.parametrize("stubborn", [False, True])
async def test_a_load_that_outlasts_its_timeout_everywhere_says_deadline(stubborn):
    prompt = make_prompt(3)
    gate = GatedBackend(MemoryBackend(), stubborn=stubborn)
    recorder = Recorder(gate)
    await seed(recorder, prompt)
    async with open_cache(recorder, load_timeout_seconds=20) as cache:
        gate.hold("load")
        result = await cache.prefetch(prompt, request_id="a").load_done
        assert now() == pytest.approx(20, abs=0.1)
        assert (result.chunks, result.shortfall) == (0, Shortfall.DEADLINE)
        assert (await cache.query_status("a")).shortfall is Shortfall.DEADLINE
        stats = await cache.stats()
        assert stats.reserved_bytes + stats.quarantined_bytes > 0 if stubborn else stats.reserved_bytes == 0
        gate.release("load")
        await settle()
        await assert_nothing_held(cache, recorder)


async def test_the_load_timeout_runs_from_the_start_of_its_io():
    first, second = make_prompt(1), make_prompt(1, 2)
    gate = GatedBackend(MemoryBackend())
    await seed(gate, first)
    await seed(gate, second)
    async with open_cache(gate, load_timeout_seconds=30, load_inflight_bytes=16) as cache:
        gate.hold("load")
        cache.prefetch(first, request_id="a")
        await gate.reached("load")
        behind = cache.prefetch(second, request_id="b")
        await behind.lookup_done
        await asyncio.sleep(20)
        gate.release("load")
        gate.hold("load")
        assert (await cache.query_status("a")).chunks == 1
        await asyncio.sleep(20)
        assert not behind.load_done.done()
        assert (await behind.load_done).shortfall is Shortfall.DEADLINE
        assert now() == pytest.approx(50, abs=0.1)


async def test_a_shortfall_steps_down_to_a_length_that_windows_allow():
    layout = make_layout(SMALL, ObjectGroup((8,), "uint8", window_chunks=1))
    prompt = make_prompt(6, layout=layout)
    backend = Scripted(MemoryBackend())
    await seed(backend, prompt, groups=[0])
    await seed(backend, prompt, groups=[1], chunks=[2, 5])
    answer(backend, prompt, 4, LoadOutcome.GONE)
    async with open_cache(backend) as cache:
        assert await read_back(cache, make_prompt(3, layout=layout)) == 3
        prefetch = cache.prefetch(prompt, request_id="a")
        assert (await prefetch.lookup_done).chunks == 6
        result = await prefetch.load_done
        assert (result.chunks, result.l1_chunks, result.shortfall) == (3, 3, Shortfall.GONE)
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [0, 1, 2]
            assert lease[2].views[1] is not None
        await assert_nothing_held(cache, backend)


async def test_a_shortened_result_never_counts_more_than_was_promised():
    layout = make_layout(ObjectGroup((PAGE,), "uint8"))
    prompt = make_prompt(30, layout=layout)
    backend = MemoryBackend()
    await seed(backend, prompt)
    async with open_cache(backend, pages=12) as cache:
        prefetch = cache.prefetch(prompt)
        hits = await prefetch.lookup_done
        result = await prefetch.load_done
        assert 0 < result.chunks == hits.chunks < 12


async def test_a_request_keeps_what_it_holds_of_a_chunk_where_what_came_in_its_place_has_less():
    prompt, gate = make_prompt(2, 1, TWO_RANKS), GatedBackend(MemoryBackend())
    await seed(gate, prompt)
    async with open_cache(gate, pages=16) as cache:
        await fill(cache, prompt, ranks=[0])
        await cache.flush()
        gate.hold("load")
        prefetch = cache.prefetch(prompt)
        await gate.reached("load")
        await fill(cache, prompt, ranks=[1])  # completes what the request holds
        await cache.flush()
        assert (await cache.clear("l1")).leased == 2
        await fill(cache, prompt, ranks=[1])
        gate.release("load")
        result = await prefetch.load_done
        assert (result.chunks, result.shortfall) == (2, None)
        for rank in (0, 1):
            async with cache.read(prefetch.request_id, rank=rank) as lease:
                assert verify(lease, prompt, rank) == [0, 1]
        await assert_nothing_held(cache)


async def test_an_object_of_one_rank_that_cannot_be_read_is_the_loss_of_that_rank_alone():
    prompt, other = (make_prompt(4, number, TWO_RANKS) for number in (1, 2))
    backend = FailingBackend(MemoryBackend(), "load", times=None, keys=object_keys(prompt, chunks=[2], ranks=[1]))

    async def load(prompt, *ranks):
        prefetch = cache.prefetch(prompt, ranks=ranks)
        result = await prefetch.load_done
        for rank in ranks:
            async with cache.read(prefetch.request_id, rank=rank) as lease:
                assert verify(lease, prompt, rank) == list(range(result.chunks))
        await cache.end_request(prefetch.request_id)
        return result.chunks, result.shortfall

    async with open_cache(backend) as cache:
        await fill_l2(cache, prompt, other)
        for number in range(10):
            assert await load(prompt, 0) == (4, None)
            assert await load(prompt, 1) == (2, Shortfall.BACKEND_ERROR)
            assert await load(prompt, 0, 1) == (2, Shortfall.BACKEND_ERROR)
            if number == 4:
                await cache.clear("l1")
        assert await load(other, 0, 1) == (4, None)
        await assert_nothing_held(cache)
