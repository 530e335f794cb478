"""The deciding step of a prefetch: whatever raises in it, or calls back after it, nothing stays held."""

import asyncio
import gc
import logging
from asyncio.base_events import BaseEventLoop
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import patch

import pytest
from faults.small_steps import small_steps

from async_cache import AsyncCache, BackendError, CacheConfig, ModelLayout, ObjectGroup, ObjectKey, Shortfall
from async_cache.l1.store import L1Store
from async_cache.l1.uses import Uses
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.memory import MemoryBackend
from async_cache.observe import Observer, Observers
from async_cache.prompt import coverage
from async_cache.prompt.layout import Prompt
from async_cache.read.batches import Batch
from async_cache.read.decision import Decider, _join
from async_cache.read.load import ChunkLoad
from async_cache.read.loads import Loader
from async_cache.read.lookup import Found
from async_cache.read.plan import Plan, Planner
from async_cache.read.prefetch import PrefetchController
from async_cache.read.search import Search
from async_cache.testing.backends import GatedBackend, WrappedBackend

# Two objects a chunk, so that a chunk can be in L1 in part; a window, so that a part is not needed.
LAYOUT = ModelLayout(
    "toy", (ObjectGroup((8,), "uint8"), ObjectGroup((8,), "uint8", window_chunks=2)), chunk_tokens=4, world_size=2
)
PROMPT = LAYOUT.prompt(range(16))

STEPS: list[tuple[Any, str]] = [
    (Planner, "plan"),
    (Planner, "_fits"),
    (Planner, "_reserve_within"),
    (L1Store, "reserve"),
    (Uses, "lease"),
    (coverage, "lengths"),
    (coverage, "needed"),
    (Found, "masks"),
    (Found, "sources"),
    (Found, "take"),
    (Loader, "expected_seconds"),
    (Loader, "add"),
    (Loader, "begin_soon"),
    (Planner, "reserve"),
    (Search, "ask"),
    (Decider, "_missing"),
    (Decider, "_promised"),
    (PrefetchController, "_say_hits"),
]


@asynccontextmanager
async def stored(memory: MemoryBackend, *, wrapped: bool) -> AsyncIterator[AsyncCache]:
    """A cache with PROMPT in L2, and rank 0 of its first two chunks in L1.

    A wrapped backend is asked in a task; a bare one answers within the step of the call.
    """
    backend = WrappedBackend(memory) if wrapped else memory
    async with AsyncCache(CacheConfig(l1_bytes=2**20), [backend]) as cache:
        for rank in (0, 1):
            await fill(cache, rank)
        await cache.flush()
        await cache.clear("l1")
        async with cache.store(PROMPT) as writer:
            for chunk in writer.chunks[:2]:
                write(chunk, 0)
        await cache.flush()
        yield cache
        cache.check_integrity()


def write(chunk: Any, rank: int) -> None:
    for group, view in enumerate(chunk.views):
        view[:] = bytes([16 * chunk.index + 2 * rank + group]) * len(view)
    chunk.commit()


async def fill(cache: AsyncCache, rank: int) -> None:
    async with cache.store(PROMPT, rank=rank) as writer:
        for chunk in writer:
            write(chunk, rank)


async def nothing_is_held(cache: AsyncCache, memory: MemoryBackend) -> bool:
    stats = await cache.stats()
    held = (stats.requests, stats.leases, stats.leased_bytes, stats.reserved_bytes, stats.quarantined_bytes)
    return not any(held) and not memory.pins


@pytest.mark.parametrize("wrapped", [False, True], ids=["in the call", "in a task"])
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[f"{getattr(o, '__name__', o)}.{n}" for o, n in STEPS])
async def test_whatever_raises_in_the_deciding_step_nothing_stays_held(
    owner: Any, name: str, wrapped: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = MemoryBackend()
    async with stored(memory, wrapped=wrapped) as cache:
        real, calls = getattr(owner, name), 0

        def fails_once(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise RuntimeError("a bug")
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, fails_once)
        with caplog.at_level(logging.CRITICAL + 1):
            prefetch = cache.prefetch(PROMPT, request_id="r")
            hits, result = await asyncio.wait_for(asyncio.gather(prefetch.lookup_done, prefetch.load_done), 60)
        assert calls, "the step was not taken"
        assert (result.chunks, result.shortfall) == (0, Shortfall.BACKEND_ERROR)
        assert hits.shortfall is Shortfall.BACKEND_ERROR or hits.chunks  # it may have been said already
        assert (await cache.query_status("r")) == result
        assert await nothing_is_held(cache, memory)
        monkeypatch.undo()
        again = cache.prefetch(PROMPT, request_id="r")
        assert (await again.load_done).chunks == 4
        for rank in (0, 1):
            async with cache.read("r", rank=rank) as lease:
                for chunk in lease:
                    for group, view in enumerate(chunk.views):
                        assert view is None or set(view) == {16 * chunk.index + 2 * rank + group}


@pytest.mark.parametrize("wrapped", [False, True], ids=["in the call", "in a task"])
async def test_who_is_told_of_the_hits_may_cancel_and_end_the_request(wrapped: bool) -> None:
    memory = MemoryBackend()
    async with stored(memory, wrapped=wrapped) as cache:
        prefetch = cache.prefetch(PROMPT)

        def cancel(_: object) -> None:
            prefetch.cancel()
            cache.core.requests.end(prefetch.request_id)

        prefetch.promised.hits.tell(cancel)
        assert (await prefetch.lookup_done).chunks == 4
        assert (await prefetch.load_done).shortfall is Shortfall.CANCELLED
        async with asyncio.timeout(60):
            while not await nothing_is_held(cache, memory):  # noqa: ASYNC110 (it is asked each turn)
                await asyncio.sleep(0)


class Recorder(Observer):
    """Notes every event, and does something in each."""

    def __init__(self, cache: AsyncCache, act: Any = None) -> None:
        self.cache, self.act = cache, act
        self.events: list[tuple[str, Any]] = []

    def note(self, event: str, what: Any) -> None:
        self.events.append((event, what))
        if self.act is not None:
            self.act()

    def promised(self, prefetch: Any, hits: Any) -> None:
        self.note("promised", hits.request_id)

    def loaded(self, prefetch: Any, result: Any) -> None:
        self.note("loaded", result.request_id)

    def over(self, prefetch: Any) -> None:
        self.note("over", prefetch.request_id)

    def committed(self, chunk: Any) -> None:
        self.note("committed", chunk.chunk_hash)

    def evicted(self, chunk: Any, removal: Any) -> None:
        self.note("evicted", (chunk.chunk_hash, removal))

    def removed(self, chunk: Any, removal: Any) -> None:
        self.note("removed", (chunk.chunk_hash, removal))


def fail() -> None:
    raise RuntimeError("an observer's bug")


async def test_any_number_of_observers_are_told_in_order_whatever_one_of_them_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = MemoryBackend()
    async with stored(memory, wrapped=True) as cache:
        await asyncio.sleep(0)
        first, broken = Recorder(cache), Recorder(cache, fail)
        ends = Recorder(cache, lambda: cache.core.requests.end("r"))
        last = Recorder(cache)
        for observer in (first, broken, ends, last):
            cache.core.observers.add(observer)
        with caplog.at_level(logging.CRITICAL + 1):
            prefetch = cache.prefetch(PROMPT, request_id="r")
            assert (await prefetch.lookup_done).chunks == 4
            async with asyncio.timeout(60):
                while "over" not in [event for event, _ in last.events]:  # noqa: ASYNC110 (nobody tells of it)
                    await asyncio.sleep(0)
        assert [event for event, _ in first.events if event != "committed"] == ["promised", "loaded", "over"]
        assert first.events == broken.events == ends.events == last.events
        assert await nothing_is_held(cache, memory)

        cache.core.observers.discard(last)
        await cache.delete(PROMPT)
        await asyncio.sleep(0)
        assert {event for event, _ in first.events} >= {"removed"}
        assert "removed" not in {event for event, _ in last.events}


async def test_an_eviction_is_told_with_its_reason_and_a_deletion_with_its_own() -> None:
    layout = ModelLayout("toy", (ObjectGroup((4096,), "uint8"),), chunk_tokens=4)
    async with AsyncCache(CacheConfig(l1_bytes=2 * 4096, l2=[])) as cache:
        recorder = Recorder(cache)
        cache.core.observers.add(recorder)
        old, new = (layout.prompt(range(n, n + 4), salt="tenant") for n in (0, 100))
        for prompt in (old, new, layout.prompt(range(200, 204))):
            async with cache.store(prompt) as writer:
                for chunk in writer:
                    chunk.commit()
        await cache.delete(new)
        await asyncio.sleep(0)
        assert recorder.events == [
            ("committed", old.chunk_hashes[0]),
            ("committed", new.chunk_hashes[0]),
            ("evicted", (old.chunk_hashes[0], "capacity")),
            ("committed", layout.prompt(range(200, 204)).chunk_hashes[0]),
            ("removed", (new.chunk_hashes[0], "deleted")),
        ]


async def test_an_entry_has_its_owner_however_it_came() -> None:
    memory = MemoryBackend()
    prompt = LAYOUT.prompt(range(16), salt="tenant")
    async with AsyncCache(CacheConfig(l1_bytes=2**20), [memory]) as cache:
        for rank in (0, 1):
            async with cache.store(prompt, rank=rank) as writer:
                for chunk in writer:
                    chunk.commit()
        assert {entry.owner for entry in cache.core.l1.index.values()} == {"tenant"}
        await cache.flush()
        await cache.clear("l1")
        assert (await cache.prefetch(prompt).load_done).l2_chunks == 4
        assert {entry.owner for entry in cache.core.l1.index.values()} == {"tenant"}


def test_nobody_is_told_of_what_nobody_overrides() -> None:
    observers = Observers()
    observers.add(Observer())
    assert not any(vars(observers).values())


async def test_a_hash_that_somebody_made_up_gets_no_room_beside_that_of_another_layout() -> None:
    big = ModelLayout("m", (ObjectGroup((6000,), "uint8"),), chunk_tokens=4)
    small = ModelLayout("m", (ObjectGroup((16,), "uint8"),), chunk_tokens=4)
    real = big.prompt(range(4))
    forged = Prompt(small, real.root, 4, "", "", None, list(real.chunk_hashes))
    memory = MemoryBackend()
    await memory.store(big.objects.keys([(real.chunk_hashes[0], 1)]), [memoryview(bytearray(b"\xee" * 6000))])
    backend = GatedBackend(memory)
    async with AsyncCache(CacheConfig(l1_bytes=2**16, lookup_timeout_seconds=60), [backend]) as cache:
        backend.hold("lookup", "load")
        first, second = cache.prefetch(real), cache.prefetch(forged)
        await asyncio.sleep(0)
        backend.release("lookup")
        assert (await first.lookup_done).chunks == 1
        assert (await second.lookup_done).chunks == 0
        cache.check_integrity()
        backend.release()
        assert ((await first.load_done).chunks, (await second.load_done).chunks) == (1, 0)
        assert bytes(cache.memory).count(b"\xee") == 6000
        for prefetch in (first, second):
            await cache.end_request(prefetch.request_id)
        assert await nothing_is_held(cache, memory)


async def test_what_is_promised_of_very_many_chunks_is_decided_in_turns_of_the_loop() -> None:
    layout = ModelLayout("toy", (ObjectGroup((8,), "uint8"),), chunk_tokens=1)
    prompt = layout.prompt(range(8))
    turns: dict[str, int] = {}
    turn = 0
    run_once = BaseEventLoop._run_once

    def next_turn(loop: BaseEventLoop) -> None:
        nonlocal turn
        turn += 1
        run_once(loop)

    def noted(owner: Any, name: str) -> Any:
        real = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            turns.setdefault(name, turn)
            return real(*arguments)

        return patch.object(owner, name, call)

    async with AsyncCache(CacheConfig(l1_bytes=2**20), [MemoryBackend()]) as cache:
        async with cache.store(prompt) as writer:
            for chunk in writer:
                chunk.commit()
        await cache.flush()
        for at_once in (9, 7):
            await cache.clear("l1")
            turns.clear()
            with (
                patch("async_cache.read.plan._PLANNED_AT_ONCE", at_once),
                patch("async_cache.read.decision._CAUGHT_UP_AT_ONCE", at_once),
                patch.object(BaseEventLoop, "_run_once", next_turn),
                noted(Plan, "__init__"),
                noted(Plan, "promise"),
                noted(Planner, "_fits"),
                noted(Planner, "reserve"),
                noted(Decider, "_promised"),
            ):
                prefetch = cache.prefetch(prompt)
                assert (await prefetch.load_done).chunks == 8
            assert list(turns) == ["__init__", "promise", "_fits", "reserve", "_promised"]
            assert len(set(turns.values())) == (1 if at_once == 9 else 5)
            await cache.end_request(prefetch.request_id)


async def test_a_share_that_is_taken_again_before_its_release_in_parts_has_come_to_it_is_kept() -> None:
    """As where a window comes to need a chunk that a longer promise did not."""
    layout = ModelLayout("toy", (ObjectGroup((8,), "uint8"),), chunk_tokens=4)
    prompt = layout.prompt(range(16))
    memory = MemoryBackend()
    await memory.store(layout.objects.keys([(h, 1) for h in prompt.chunk_hashes]), [memoryview(bytes(8))] * 4)
    gate = GatedBackend(memory)
    gate.hold("load")
    with small_steps():
        async with AsyncCache(CacheConfig(l1_bytes=2**20), [gate]) as cache:
            prefetches = [cache.prefetch(prompt) for _ in range(2)]
            for prefetch in prefetches:
                assert (await prefetch.lookup_done).chunks == 4
            loader, request = cache.core.loader, cache.core.requests.find(prefetches[0].request_id)
            assert request is not None
            request.loads -= {1, 2, 3}
            loader.release(request, prompt.chunk_hashes[1:])
            for number in (1, 2, 3):
                _join(request, number, loader.in_flight()[prompt.chunk_hashes[number]])
            await asyncio.sleep(0.01)
            cache.check_integrity()
            gate.release()
            async with asyncio.timeout(60):
                assert [(await prefetch.load_done).chunks for prefetch in prefetches] == [4, 4]


def loads_and_batches() -> list[ChunkLoad | Batch]:
    return [each for each in gc.get_objects() if type(each) in (ChunkLoad, Batch)]  # asks nothing of what others made


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_load_that_came_to_nothing_leaves_nothing_to_the_collector(how: str) -> None:
    """What a call raised keeps its frames, and they keep the loads: a server collects such cycles but rarely."""

    class Broken(MemoryBackend):
        async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
            raise BackendError("broken")

    gate = GatedBackend(MemoryBackend() if how == "cancelled" else Broken())
    async with AsyncCache(CacheConfig(l1_bytes=2**20), [gate]) as cache:
        for rank in (0, 1):
            await fill(cache, rank)
        await cache.flush()
        await cache.clear("l1")
        gc.collect()
        gc.disable()
        before = loads_and_batches()  # of other tests
        try:
            gate.hold("load")
            prefetch = cache.prefetch(PROMPT)
            await gate.reached("load")
            if how == "cancelled":
                prefetch.cancel()
            else:
                gate.release("load")
                assert (await prefetch.load_done).shortfall is Shortfall.BACKEND_ERROR
            await cache.end_request(prefetch.request_id)
            del prefetch
            for _ in range(10):
                await asyncio.sleep(0)
            assert [each for each in loads_and_batches() if not any(each is other for other in before)] == []
        finally:
            gc.enable()
