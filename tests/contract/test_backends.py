"""Backends come and go while the cache is open, and requests that are under way end as they would have."""

import asyncio
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from async_cache import BackendState, CacheClosedError, CacheConfig, ConfigError
from async_cache.errors import BackendError
from async_cache.l2 import Backend, LoadOutcome, Placement, Placing
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.keys import ObjectKey
from async_cache.testing import FailingBackend, GatedBackend
from async_cache.write.admission import Admission

from .support import (
    Recorder,
    Scripted,
    assert_nothing_held,
    count_hits,
    fill,
    fill_l2,
    make_cache,
    make_prompt,
    object_keys,
    open_cache,
    outcomes,
    read_back,
    seed,
    settle,
)


async def states(cache: Any) -> dict[str, BackendState]:
    return {each.name: each.state for each in await cache.backends()}


async def keys_of(backend: Backend) -> set[ObjectKey]:
    return {key async for key, _ in backend.keys()}


# Add.


async def test_a_backend_that_is_added_is_written_to_and_found_in() -> None:
    async with open_cache(MemoryBackend("near")) as cache:
        await fill(cache, make_prompt(3))
        await cache.flush()
        await cache.add_backend("memory://added?admit=1")
        await fill(cache, make_prompt(3, number=2))
        assert (await cache.flush()).written == 3
        usage = (await cache.stats()).backends
        assert (usage["near"].objects, usage["added"].objects) == (6, 3)
        await cache.remove_backend("near")
        await cache.clear("l1")
        assert [await count_hits(cache, make_prompt(3, number=number)) for number in (1, 2)] == [0, 3]
        assert await read_back(cache, make_prompt(3, number=2)) == 3


async def test_a_cache_without_storage_gets_some() -> None:
    async with open_cache() as cache:
        assert await cache.backends() == []
        await cache.add_backend("memory://added")
        await fill_l2(cache, make_prompt(3))
        assert await read_back(cache, make_prompt(3)) == 3


@pytest.mark.embedded
async def test_what_an_added_backend_has_is_found() -> None:
    added = MemoryBackend("added")
    await seed(added, make_prompt(3))
    async with open_cache(MemoryBackend("near")) as cache:
        assert await count_hits(cache, make_prompt(3)) == 0
        await cache.add_backend(added)
        assert await read_back(cache, make_prompt(3)) == 3


@pytest.mark.parametrize(
    ("position", "order"),
    [(None, ["a", "b", "new"]), (0, ["new", "a", "b"]), (1, ["a", "new", "b"]), (2, ["a", "b", "new"])],
)
async def test_a_backend_is_added_where_it_is_wanted(position: int | None, order: list[str]) -> None:
    async with open_cache(MemoryBackend("a"), MemoryBackend("b")) as cache:
        await cache.add_backend("memory://new", position=position)
        assert [each.name for each in await cache.backends()] == order


@pytest.mark.parametrize(
    ("url", "position", "error", "why"),
    [
        ("memory://near", None, ConfigError, "there is a backend 'near' already"),
        ("nothing://x", None, ConfigError, "unknown scheme 'nothing'"),
        ("memory://x?write=some", None, ConfigError, "'some' is not all or first or skip_if_present or none"),
        ("memory://x?admit=0", None, ConfigError, "'0' is not a number from 1 to 15"),
        ("fs:///proc/self/none", None, BackendError, "/proc/self/none"),
        ("memory://x", 2, ValueError, "position must be from 0 to 1, not 2"),
    ],
)
async def test_a_backend_that_cannot_be_added_changes_nothing(
    url: str, position: int | None, error: type[Exception], why: str
) -> None:
    async with open_cache(MemoryBackend("near")) as cache:
        before = await cache.backends()
        with pytest.raises(error, match=why):
            await cache.add_backend(url, position=position)
        assert await cache.backends() == before


@pytest.mark.embedded
async def test_a_backend_that_does_not_open_is_closed_and_its_name_is_free() -> None:
    class Broken(Recorder):
        async def open(self) -> None:
            await super().open()
            raise BackendError("injected")

    class Silent(Recorder):
        async def open(self) -> None:
            await asyncio.sleep(1e6)

    async with open_cache(load_timeout_seconds=3) as cache:
        broken, silent = Broken(MemoryBackend("new")), Silent(MemoryBackend("new"))
        with pytest.raises(BackendError, match="injected"):
            await cache.add_backend(broken)
        with pytest.raises(BackendError, match="new was not open within 3"):
            await cache.add_backend(silent)
        assert (broken.calls["close"], silent.calls["close"]) == (1, 1)
        await cache.add_backend(MemoryBackend("new"))
        with pytest.raises(TypeError, match="a backend must be a URL or a Backend, not int"):
            await cache.add_backend(5)


@pytest.mark.embedded
async def test_of_two_that_are_added_at_once_with_one_name_one_is_refused() -> None:
    class Slow(Recorder):
        async def open(self) -> None:
            await asyncio.sleep(1)
            await super().open()

    async with open_cache() as cache:
        results = await outcomes(*(cache.add_backend(Slow(MemoryBackend("new"))) for _ in range(2)))
        assert results[0] is None and isinstance(results[1], ConfigError)
        assert [each.name for each in await cache.backends()] == ["new"]


@pytest.mark.embedded
async def test_a_backend_is_added_before_the_one_that_was_at_its_position_when_it_was_asked_for() -> None:
    opened = asyncio.Event()

    class Slow(MemoryBackend):
        async def open(self) -> None:
            await opened.wait()

    async with open_cache(*map(MemoryBackend, "abcd")) as cache:
        adding = asyncio.create_task(cache.add_backend(Slow("slow"), position=2))
        await settle()
        await cache.add_backend(MemoryBackend("first"), position=0)
        await cache.remove_backend("c")
        opened.set()
        await adding
        assert list(await states(cache)) == ["first", "a", "b", "slow", "d"]


# Remove.


async def test_a_backend_that_is_removed_is_asked_no_more_and_closed() -> None:
    near, far = Recorder(MemoryBackend("near")), Recorder(MemoryBackend("far"))
    async with open_cache(near, far) as cache:
        await fill_l2(cache, make_prompt(3))
        await cache.remove_backend("near")
        asked = near.calls["lookup"]
        assert near.calls["close"] == 1 and near.pinned == {}
        assert await read_back(cache, make_prompt(3)) == 3
        await fill_l2(cache, make_prompt(3, number=2))
        assert near.calls["lookup"] == asked
        assert list((await cache.stats()).backends) == ["far"]
        await assert_nothing_held(cache, near, far)


async def test_a_name_that_there_is_not_is_told_with_those_that_there_are() -> None:
    async with open_cache(MemoryBackend("near"), MemoryBackend("far")) as cache:
        for verb in (cache.remove_backend, cache.drain_backend):
            with pytest.raises(ConfigError, match="there is no backend 'nothing': there is near, far"):
                await verb("nothing")


async def test_what_loads_from_a_backend_that_is_removed_ends_as_it_would_have() -> None:
    gate = GatedBackend(MemoryBackend("near"))
    prompts = [make_prompt(2, number=number) for number in range(100)]
    async with open_cache(gate, pages=512, load_inflight_bytes=64) as cache:
        await fill_l2(cache, *prompts)
        gate.hold("load")
        prefetches = [cache.prefetch(prompt, request_id=f"r{n}") for n, prompt in enumerate(prompts)]
        for prefetch in prefetches:
            assert (await prefetch.lookup_done).l2_chunks == 2
        removing = asyncio.create_task(cache.remove_backend("near"))
        await settle()
        assert await states(cache) == {"near": BackendState.LEAVING}
        assert (await cache.lookup(prompts[0])).chunks == 2, "it is on its way to L1"
        assert await count_hits(cache, make_prompt(2, number=200)) == 0
        with pytest.raises(ConfigError, match="already"):
            await cache.add_backend("memory://near")
        gate.release()
        for prefetch in prefetches:
            result = await prefetch.load_done
            assert (result.chunks, result.shortfall) == (2, None)
        await removing
        assert await states(cache) == {}
        for prefetch in prefetches:
            await cache.end_request(prefetch.request_id)
        await assert_nothing_held(cache)


async def test_a_lookup_that_is_out_while_its_backend_is_removed_is_answered_and_its_load_too() -> None:
    gate = GatedBackend(MemoryBackend("near"))
    async with open_cache(gate) as cache:
        await fill_l2(cache, make_prompt(2))
        gate.hold("lookup", "load")
        prefetch = cache.prefetch(make_prompt(2))
        await gate.reached("lookup", gate.calls["lookup"] + (gate.calls["lookup"] == 0))
        await settle()
        removing = asyncio.create_task(cache.remove_backend("near"))
        await settle()
        gate.release("lookup")
        assert (await prefetch.lookup_done).chunks == 2
        await settle()
        assert not removing.done()
        gate.release("load")
        assert (await prefetch.load_done).chunks == 2
        await removing
        await cache.end_request(prefetch.request_id)


async def test_what_waits_for_a_backend_that_is_removed_is_dropped_only_if_no_other_has_it() -> None:
    gate, other = GatedBackend(MemoryBackend("near"), "store"), MemoryBackend("far")
    async with open_cache(gate, other) as cache:
        await fill(cache, make_prompt(2))
        await settle()
        await fill(cache, make_prompt(3, number=2))
        removing = asyncio.create_task(cache.remove_backend("near"))
        await settle()
        gate.release()
        await removing
        flushed = await cache.flush()
        assert (flushed.written, flushed.pending, flushed.dropped) == (5, 0, 0)
    gate = GatedBackend(MemoryBackend("near"), "store")
    async with open_cache(gate) as cache:
        await fill(cache, make_prompt(2))
        await settle()
        await fill(cache, make_prompt(3, number=2))
        removing = asyncio.create_task(cache.remove_backend("near"))
        await settle()
        assert (await cache.stats()).writebacks_pending == 2, "what is being written ends as it would have"
        gate.release()
        await removing
        flushed = await cache.flush()
        assert (flushed.written, flushed.pending, flushed.dropped) == (2, 0, 3)
        assert (await cache.clear("l1")).chunks == 5


async def test_a_dead_backend_can_be_removed() -> None:
    dead = GatedBackend(MemoryBackend("dead"))
    async with open_cache(dead, MemoryBackend("far"), load_timeout_seconds=2, store_timeout_seconds=2) as cache:
        await fill_l2(cache, make_prompt(2))
        dead.hold()
        await fill(cache, make_prompt(2, number=2))
        prefetch = cache.prefetch(make_prompt(2))
        await settle()
        before = asyncio.get_running_loop().time()
        await cache.remove_backend("dead")
        assert asyncio.get_running_loop().time() - before < 15
        assert (await prefetch.load_done).chunks == 2, "the other one has it"
        await cache.end_request(prefetch.request_id)
        assert (await cache.flush()).dropped == 0
        dead.release()


@pytest.mark.embedded
async def test_a_backend_that_does_not_close_is_removed_in_its_time_and_its_name_is_free() -> None:
    class Stuck(MemoryBackend):
        async def close(self) -> None:
            await asyncio.sleep(1e6)

    async with open_cache(Stuck("near"), close_timeout_seconds=3) as cache:
        began = asyncio.get_running_loop().time()
        removing = asyncio.create_task(cache.remove_backend("near"))
        await settle()
        with pytest.raises(ConfigError, match="there is a backend 'near' already"):
            await cache.add_backend(MemoryBackend("near"))
        await removing
        assert asyncio.get_running_loop().time() - began == pytest.approx(3)
        await cache.add_backend(MemoryBackend("near"))


@pytest.mark.embedded
async def test_a_removal_goes_on_though_its_caller_is_cancelled_and_may_be_waited_for_again() -> None:
    near = Recorder(GatedBackend(MemoryBackend("near")))
    async with open_cache(near) as cache:
        await fill_l2(cache, make_prompt(2))
        near.inner.hold("load")  # type: ignore[attr-defined]
        prefetch = cache.prefetch(make_prompt(2))
        first = asyncio.create_task(cache.remove_backend("near"))
        await settle()
        first.cancel()
        again = asyncio.create_task(cache.remove_backend("near"))
        await settle()
        near.inner.release()  # type: ignore[attr-defined]
        await again
        assert near.calls["close"] == 1
        await cache.end_request(prefetch.request_id)


@pytest.mark.embedded
async def test_who_waits_for_a_removal_is_told_that_the_cache_closed() -> None:
    near = GatedBackend(MemoryBackend("near"))
    async with make_cache(CacheConfig(l1_bytes=2**20, l2=[], load_timeout_seconds=1000), [near]) as cache:
        await fill_l2(cache, make_prompt(2))
        near.hold("load", "lookup")
        looking = asyncio.create_task(cache.delete(make_prompt(2)))
        await settle()
        waits = [asyncio.create_task(cache.remove_backend("near")), asyncio.create_task(cache.drain_backend("near"))]
        await settle()
        closing = asyncio.create_task(cache.close())
        results = await outcomes(*waits, looking)
        assert [type(result) for result in results] == [CacheClosedError, ConfigError, CacheClosedError]
        await closing


@pytest.mark.embedded
async def test_what_is_stored_by_a_backend_that_leaves_goes_to_the_one_that_stands_in_for_it() -> None:
    near, far = GatedBackend(MemoryBackend("near")), MemoryBackend("far")
    far.placement = Placement(write=Placing.FIRST)
    async with open_cache(near, far) as cache:
        near.hold("store")
        await fill(cache, make_prompt(3))
        await near.reached("store")
        removing = asyncio.create_task(cache.remove_backend("near"))
        await settle()
        near.release()
        await removing
        assert (await cache.flush()).pending == 0
        assert await keys_of(far) == set(object_keys(make_prompt(3)))


@pytest.mark.embedded
async def test_what_was_loaded_from_a_backend_that_leaves_is_not_promoted_and_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    near, far = MemoryBackend("near"), GatedBackend(MemoryBackend("far"))
    near.placement = Placement(promote=True)
    await seed(far.inner, make_prompt(3))
    async with open_cache(near, far) as cache:
        far.hold("load")
        prefetch = cache.prefetch(make_prompt(3))
        await far.reached("load")
        removing = asyncio.create_task(cache.remove_backend("far"))
        await settle()
        far.release()
        await removing
        assert (await prefetch.load_done).chunks == 3
        await cache.flush()
        assert near.usage().objects == 0
        assert "failed" not in caplog.text
        await cache.end_request(prefetch.request_id)
        await assert_nothing_held(cache)


# Drain.


async def test_a_drained_backend_loses_nothing_that_another_does_not_have() -> None:
    near, far = MemoryBackend("near"), MemoryBackend("far")
    only_near, both = make_prompt(300), make_prompt(5, number=2)
    await seed(near, only_near)
    await seed(near, both)
    await seed(far, both)
    async with open_cache(near, far, pages=512) as cache:
        status = await cache.drain_backend("near")
        assert status.state is BackendState.DRAINED
        copied = status.copied
        assert (copied.found, copied.copied, copied.present, copied.failed) == (305, 300, 5, 0)
        assert copied.copied_bytes == 300 * 16
        assert await keys_of(near) <= await keys_of(far)
        assert (await cache.lookup(only_near)).chunks == 300, "it is used until it is removed"
        assert (await cache.drain_backend("near")).state is BackendState.DRAINED
        await cache.remove_backend("near")
        assert await read_back(cache, only_near) == 300
        await assert_nothing_held(cache)


async def test_nothing_new_is_written_to_a_backend_that_is_drained() -> None:
    near, far = Recorder(MemoryBackend("near")), MemoryBackend("far")
    far.placement = Placement(write=Placing.FIRST)
    async with open_cache(near, far) as cache:
        await cache.drain_backend("near")
        await fill(cache, make_prompt(3))
        flushed = await cache.flush()
        assert (flushed.written, flushed.dropped) == (3, 0)
        assert near.calls["store"] == 0 and far.usage().objects == 3


@pytest.mark.parametrize(
    ("writes", "given"),
    [
        ([Placing.ALL, Placing.ALL], [2, 2]),
        ([Placing.NONE, Placing.FIRST], [0, 2]),
        ([Placing.SKIP_IF_PRESENT, Placing.ALL], [0, 2]),
        ([Placing.FIRST, Placing.FIRST], [2, 0]),
        ([Placing.SKIP_IF_PRESENT, Placing.SKIP_IF_PRESENT], [2, 0]),
    ],
)
async def test_what_is_drained_goes_to_those_that_would_be_given_it(writes: list[Placing], given: list[int]) -> None:
    near, *others = MemoryBackend("near"), MemoryBackend("a"), MemoryBackend("b")
    for other, write in zip(others, writes, strict=True):
        other.placement = Placement(write=write)
    await seed(near, make_prompt(2))
    async with open_cache(near, *others) as cache:
        assert (await cache.drain_backend("near")).state is BackendState.DRAINED
        assert [other.usage().objects for other in others] == given


async def test_where_no_other_takes_it_a_backend_is_not_drained_and_says_how_much_is_left() -> None:
    near, far = MemoryBackend("near"), MemoryBackend("far")
    far.placement = Placement(write=Placing.NONE)
    await seed(near, make_prompt(4))
    await seed(far, make_prompt(2))
    async with open_cache(near, far) as cache:
        status = await cache.drain_backend("near")
        assert (status.state, status.copied.present, status.copied.failed) == (BackendState.DRAINING, 2, 2)
        await cache.add_backend("memory://new")
        status = await cache.drain_backend("near")
        assert (status.state, status.copied.present, status.copied.copied) == (BackendState.DRAINED, 2, 2)


async def test_what_is_held_only_by_two_that_are_drained_is_copied_too() -> None:
    a, b, c = (MemoryBackend(name) for name in "abc")
    for backend in (a, b):
        await seed(backend, make_prompt(3))
    async with open_cache(a, b, c) as cache:
        results = await outcomes(cache.drain_backend("a"), cache.drain_backend("b"))
        assert [result.state for result in results] == [BackendState.DRAINED] * 2
        assert await keys_of(c) == set(object_keys(make_prompt(3)))


async def test_what_is_damaged_or_gone_is_counted_and_the_rest_is_copied() -> None:
    near, far = Scripted(MemoryBackend("near")), MemoryBackend("far")
    prompt = make_prompt(4)
    await seed(near.inner, prompt)
    near.load_answers = {
        object_keys(prompt)[0]: LoadOutcome.CORRUPT,
        object_keys(prompt)[1]: LoadOutcome.GONE,
        object_keys(prompt)[2]: LoadOutcome.FAILED,
    }
    async with open_cache(near, far) as cache:
        status = await cache.drain_backend("near")
        copied = status.copied
        assert (copied.copied, copied.corrupt, copied.gone, copied.failed) == (1, 1, 1, 1)
        assert status.state is BackendState.DRAINING
        near.load_answers = {}
        assert (await cache.drain_backend("near")).state is BackendState.DRAINED
        assert await keys_of(far) == set(object_keys(prompt))
        await assert_nothing_held(cache, near)


async def test_a_backend_that_dies_while_it_is_drained_fails_the_drain_and_keeps_what_was_copied() -> None:
    near = FailingBackend(MemoryBackend("near"), "load", nth=2, times=None)
    far = MemoryBackend("far")
    await seed(near.inner, make_prompt(1000))
    async with open_cache(near, far, breaker_failures=1) as cache:
        with pytest.raises(BackendError, match="near is left alone after failures"):
            await cache.drain_backend("near")
        assert await states(cache) == {"near": BackendState.DRAINING, "far": BackendState.ACTIVE}
        assert 0 < far.usage().objects < 1000
        await cache.remove_backend("near")
        await assert_nothing_held(cache)


async def test_a_backend_that_is_copied_to_and_dies_fails_the_drain() -> None:
    near, far = MemoryBackend("near"), FailingBackend(MemoryBackend("far"), "store", times=None)
    await seed(near, make_prompt(1000))
    async with open_cache(near, far, breaker_failures=1) as cache:
        with pytest.raises(BackendError, match="far cannot be written to"):
            await cache.drain_backend("near")
        assert await count_hits(cache, make_prompt(1000)) == 1000
        await assert_nothing_held(cache)


async def test_a_silent_backend_ends_its_drain_in_time() -> None:
    near, far = GatedBackend(MemoryBackend("near")), MemoryBackend("far")
    await seed(near.inner, make_prompt(10))
    async with open_cache(near, far, load_timeout_seconds=2, breaker_failures=1) as cache:
        near.hold("load")
        with pytest.raises(BackendError, match="near"):
            await cache.drain_backend("near")
        near.release()


async def test_a_drain_goes_on_beyond_the_deadline_of_who_waits() -> None:
    near, far = GatedBackend(MemoryBackend("near")), MemoryBackend("far")
    await seed(near.inner, make_prompt(10))
    async with open_cache(near, far) as cache:
        near.hold("load")
        status = await cache.drain_backend("near", deadline_seconds=0.5)
        assert (status.state, status.copied.found, status.copied.copied) == (BackendState.DRAINING, 10, 0)
        near.release()
        assert (await cache.drain_backend("near")).copied.copied == 10
        for seconds in (-1, float("nan")):
            with pytest.raises(ValueError, match="deadline_seconds"):
                await cache.drain_backend("near", deadline_seconds=seconds)


async def test_a_backend_may_be_removed_while_it_is_drained() -> None:
    near, far = GatedBackend(MemoryBackend("near")), MemoryBackend("far")
    await seed(near.inner, make_prompt(10))
    async with open_cache(near, far) as cache:
        near.hold("load")
        draining = asyncio.create_task(cache.drain_backend("near"))
        await settle()
        removing = asyncio.create_task(cache.remove_backend("near"))
        assert isinstance((await outcomes(draining))[0], BackendError)
        near.release()
        await removing
        assert await states(cache) == {"far": BackendState.ACTIVE}
        await assert_nothing_held(cache)


@pytest.mark.embedded
async def test_a_backend_can_be_removed_after_a_drain_that_asked_it_was_given_up() -> None:
    near, far, silent = MemoryBackend("near"), MemoryBackend("far"), GatedBackend(MemoryBackend("silent"))
    for backend in (near, far):
        await seed(backend, make_prompt(10))
    async with open_cache(near, far, silent) as cache:
        silent.hold("lookup")
        draining = asyncio.create_task(cache.drain_backend("near"))
        await silent.reached("lookup")
        await settle()
        removing = asyncio.create_task(cache.remove_backend("near"))
        assert isinstance((await outcomes(draining))[0], BackendError)
        await removing
        silent.release()
        async with asyncio.timeout(10):
            await cache.remove_backend("far")
        await assert_nothing_held(cache)


@pytest.mark.embedded
@pytest.mark.parametrize("verb", ["drain_backend", "remove_backend"])
async def test_what_is_drained_is_not_written_to_a_backend_that_leaves_before_its_turn(verb: str) -> None:
    class Full(MemoryBackend):
        async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
            return [False] * len(keys)

    near, mid, far = MemoryBackend("near"), GatedBackend(Full("mid")), Recorder(MemoryBackend("far"))
    far.placement = Placement(write=Placing.FIRST)
    await seed(near, make_prompt(3))
    async with open_cache(near, mid, far) as cache:
        mid.hold("store")
        draining = asyncio.create_task(cache.drain_backend("near"))
        await mid.reached("store")
        await getattr(cache, verb)("far")
        mid.release()
        assert (await draining).copied.failed == 3, "mid has no room"
        assert far.calls["store"] == 0


@pytest.mark.embedded
async def test_a_backend_that_is_removed_as_its_drain_begins_is_leaving() -> None:
    near = GatedBackend(MemoryBackend("near"))
    async with open_cache(near, MemoryBackend("far")) as cache:
        await fill_l2(cache, make_prompt(2))
        near.hold("load")
        prefetch = cache.prefetch(make_prompt(2))
        waits = [asyncio.create_task(cache.drain_backend("near")), asyncio.create_task(cache.remove_backend("near"))]
        await settle()
        assert (await states(cache))["near"] is BackendState.LEAVING
        with pytest.raises(ConfigError, match="being removed"):
            await cache.drain_backend("near")
        near.release()
        assert [type(result) for result in await outcomes(*waits)] == [BackendError, type(None)]
        await cache.end_request(prefetch.request_id)


async def test_what_is_copied_to_a_backend_that_leaves_is_copied_once_more() -> None:
    near, leaving, staying = MemoryBackend("near"), GatedBackend(MemoryBackend("leaving")), MemoryBackend("staying")
    staying.placement = Placement(write=Placing.FIRST)
    await seed(near, make_prompt(10))
    async with open_cache(near, leaving, staying) as cache:
        leaving.hold("store")
        draining = asyncio.create_task(cache.drain_backend("near"))
        await leaving.reached("store")
        removing = asyncio.create_task(cache.remove_backend("leaving"))
        await settle()
        leaving.release()
        assert (await draining).state is BackendState.DRAINED
        await removing
        assert await keys_of(staying) == set(object_keys(make_prompt(10)))


class LoadsThenWaits(GatedBackend):
    """Has loaded when it waits at the gate: what is deleted meanwhile is in the buffers."""

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        outcomes = await self.inner.load(keys, buffers)
        await self._begin("load", keys, buffers)
        return outcomes


@pytest.mark.parametrize("verb", ["load", "store"])
@pytest.mark.parametrize("how", ["delete", "clear"])
async def test_what_is_deleted_while_it_is_drained_does_not_come_back(verb: Any, how: str) -> None:
    near, far = LoadsThenWaits(MemoryBackend("near")), GatedBackend(MemoryBackend("far"))
    prompt = make_prompt(5)
    await seed(near.inner, prompt)
    async with open_cache(near, far) as cache:
        which = near if verb == "load" else far
        which.hold(verb)
        draining = asyncio.create_task(cache.drain_backend("near"))
        await which.reached(verb)
        deleting = asyncio.create_task(cache.delete(prompt) if how == "delete" else cache.clear("all"))
        await settle()
        if verb == "load":
            await deleting  # it waits for no load
            assert await count_hits(cache, prompt) == 0
            which.release()
        else:
            assert not deleting.done(), "what is being stored is to be deleted after that"
            which.release()
            await deleting
        await draining
        assert await keys_of(far) == set()
        assert await count_hits(cache, prompt) == 0


@pytest.mark.embedded
@pytest.mark.parametrize("how", ["delete", "clear"])
async def test_what_is_deleted_is_deleted_from_a_backend_that_is_added_meanwhile(how: str) -> None:
    near, added = GatedBackend(MemoryBackend("near")), MemoryBackend("added")
    prompt = make_prompt(5)
    await seed(near.inner, prompt)
    await seed(added, prompt)
    async with open_cache(near) as cache:
        near.hold("delete")
        deleting = asyncio.create_task(cache.delete(prompt) if how == "delete" else cache.clear("all"))
        await near.reached("delete")
        await cache.add_backend(added)
        assert await count_hits(cache, prompt) == 0
        near.release()
        assert (await deleting).chunks == 5
        assert await count_hits(cache, prompt) == 0
        assert await keys_of(added) == set()


@pytest.mark.embedded
@pytest.mark.parametrize("how", ["delete", "clear"])
async def test_what_is_deleted_while_a_backend_leaves_is_not_found_when_it_is_added_again(how: str) -> None:
    memory = MemoryBackend("near")
    gate = GatedBackend(memory, "load")
    prompt = make_prompt(5)
    await seed(memory, prompt)
    async with open_cache(gate) as cache:
        prefetch = cache.prefetch(prompt, request_id="r")
        await prefetch.lookup_done
        removing = asyncio.create_task(cache.remove_backend("near"))
        await settle()
        deleting = asyncio.create_task(cache.delete(prompt) if how == "delete" else cache.clear("all"))
        await settle()
        gate.release()
        await deleting
        await prefetch.load_done
        await cache.end_request("r")
        await removing
        await cache.add_backend(memory)
        assert await count_hits(cache, prompt) == 0
        await assert_nothing_held(cache)


@pytest.mark.embedded
async def test_a_deletion_does_not_fail_with_a_backend_that_leaves() -> None:
    failing, far = FailingBackend(MemoryBackend("near"), "delete", times=None), MemoryBackend("far")
    gate = GatedBackend(failing, "load")
    prompt = make_prompt(5)
    await seed(failing.inner, prompt)
    await seed(far, prompt)
    async with open_cache(gate, far) as cache:
        prefetch = cache.prefetch(prompt, request_id="r")
        await prefetch.lookup_done
        removing = asyncio.create_task(cache.remove_backend("near"))
        await settle()
        assert (await cache.delete(prompt)).chunks == 5
        gate.release()
        await prefetch.load_done
        await cache.end_request("r")
        await removing
        assert await keys_of(far) == set()


@pytest.mark.embedded
async def test_what_another_backend_cannot_read_is_copied_to_it() -> None:
    near, far = Scripted(MemoryBackend("near")), Scripted(MemoryBackend("far"))
    prompt = make_prompt(3)
    for each in (near, far):
        await seed(each.inner, prompt)
    far.load_answers = dict.fromkeys(object_keys(prompt)[-1:], LoadOutcome.FAILED)
    async with open_cache(far, near) as cache:
        assert await read_back(cache, prompt) == 3
        assert (await cache.drain_backend("near")).copied.copied == 1
        assert list(far.stored) == object_keys(prompt)[-1:]


@pytest.mark.embedded
async def test_a_removal_waits_for_what_is_copied_to_the_backend() -> None:
    near, far = MemoryBackend("near"), Recorder(GatedBackend(MemoryBackend("far")))
    await seed(near, make_prompt(3))
    async with open_cache(near, far) as cache:
        far.inner.hold("store")  # type: ignore[attr-defined]
        draining = asyncio.create_task(cache.drain_backend("near"))
        await far.inner.reached("store")  # type: ignore[attr-defined]
        removing = asyncio.create_task(cache.remove_backend("far"))
        await settle()
        assert far.calls["close"] == 0
        far.inner.release()  # type: ignore[attr-defined]
        await removing
        assert far.calls["close"] == 1 and len(far.stored) == 3
        assert (await draining).state is BackendState.DRAINING, "nobody else has it"


@pytest.mark.embedded
async def test_of_a_backend_that_was_removed_nothing_is_left() -> None:
    counting_before = {each for each in gc.get_objects() if type(each) is Admission}
    async with open_cache(MemoryBackend("stays")) as cache:
        guards = []
        for number in range(5):
            near = MemoryBackend("near")
            near.placement = Placement(promote=True, admit=2)
            far = MemoryBackend("far")
            await seed(far, make_prompt(3, number=number))
            await cache.add_backend(near, position=0)
            await cache.add_backend(far)
            guards += map(weakref.ref, cache.core.guards)
            assert await read_back(cache, make_prompt(3, number=number)) == 3
            await fill(cache, make_prompt(3, number=10 + number))
            await cache.flush()
            for name in ("near", "far"):
                await cache.drain_backend(name)
                await cache.remove_backend(name)
        await settle()
        gc.collect()
        assert {guard for ref in guards if (guard := ref()) is not None} == set(cache.core.guards)
        counting = {each for each in gc.get_objects() if type(each) is Admission}
        assert counting <= counting_before, "nobody asks what is counted"
        assert (await cache.stats()).l1_chunks


async def test_requests_go_on_while_backends_come_and_go() -> None:
    prompts = [make_prompt(4, number=number) for number in range(20)]
    async with open_cache(MemoryBackend("first"), pages=64) as cache:
        await fill_l2(cache, *prompts[:8])

        async def ask(numbers: Sequence[int]) -> int:
            served = 0
            for number in numbers:
                served += await read_back(cache, prompts[number])
                await asyncio.sleep(0.01)
                await cache.clear("l1")
            return served

        asking = [asyncio.create_task(ask(range(8))) for _ in range(3)]
        for turn in range(5):
            old, new = ("first", "memory://second") if turn % 2 == 0 else ("second", "memory://first")
            await cache.add_backend(new, position=0)
            assert (await cache.drain_backend(old)).state is BackendState.DRAINED
            await cache.remove_backend(old)
        assert await asyncio.gather(*asking) == [32, 32, 32], "every request found all that was stored"
        assert list(await states(cache)) == ["second"]
        await assert_nothing_held(cache)
