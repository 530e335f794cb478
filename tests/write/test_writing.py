"""Writers and L1: rooms are freed in the loop's thread, whoever drops the last view of them, and expiry is told."""

import asyncio
import gc
import sys
import threading
from collections.abc import Iterable

import pytest

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, WriterClosedError
from async_cache.l1.entry import Reservation
from async_cache.l1.store import L1Store
from async_cache.memory.extents import Extents
from async_cache.testing.virtual import run_virtual

PAGE = 4096
LAYOUT = ModelLayout("model", (ObjectGroup((16,), "uint8"),), chunk_tokens=4)
PROMPT = LAYOUT.prompt(range(12))


def make_cache(pages: int = 16, **settings: float) -> AsyncCache:
    return AsyncCache(CacheConfig(l1_bytes=pages * PAGE, l2=[], **settings))


@pytest.fixture
def freeing_threads(monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The threads that gave rooms back to L1, in order."""
    threads: list[threading.Thread] = []
    discard = L1Store.discard

    def watched(self: L1Store, reservations: Iterable[Reservation]) -> None:
        rooms = list(reservations)
        if rooms:
            threads.append(threading.current_thread())
        discard(self, rooms)

    monkeypatch.setattr(L1Store, "discard", watched)
    return threads


async def test_a_room_whose_last_view_goes_in_another_thread_is_freed_in_the_loops_thread(
    freeing_threads: list[threading.Thread],
) -> None:
    async with make_cache() as cache:
        async with cache.store(PROMPT) as writer:
            seen = [writer[0].views[0][:], writer[1].views[0][:]]
        assert (await cache.stats()).quarantined_bytes == 2 * PAGE
        freeing_threads.clear()
        await asyncio.to_thread(seen.clear)
        for _ in range(3):
            await asyncio.sleep(0)
        assert freeing_threads == [threading.main_thread()] * 2  # without anybody asking for it
        cache.check_integrity()
        assert (await cache.stats()).l1_used_bytes == 0


async def test_a_garbage_collection_within_a_change_of_l1_does_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    collecting = False
    allocate, free = Extents.allocate, Extents.free

    def collect_first(self: Extents, size_bytes: int, count: int) -> list[int]:
        nonlocal collecting
        collecting = True
        gc.collect()
        collecting = False
        return allocate(self, size_bytes, count)

    def free_alone(self: Extents, begin: int, size_bytes: int) -> None:
        assert not collecting
        free(self, begin, size_bytes)

    failures: list[object] = []
    monkeypatch.setattr(Extents, "allocate", collect_first)
    monkeypatch.setattr(Extents, "free", free_alone)
    monkeypatch.setattr(sys, "unraisablehook", lambda failure: failures.append(failure.exc_value))
    monkeypatch.setattr(sys, "excepthook", lambda *failure: failures.append(failure[1]))
    async with make_cache() as cache:
        async with cache.store(PROMPT) as writer:
            cycle: list[object] = [writer[0].views[0][:]]
            cycle.append(cycle)
        gc.disable()
        try:
            del cycle
            assert (await cache.stats()).quarantined_bytes == PAGE
            async with cache.store(LAYOUT.prompt(range(100, 104))):
                assert (await cache.stats()).quarantined_bytes == 0
        finally:
            gc.enable()
    assert failures == []


async def test_a_room_that_nobody_sees_any_more_is_there_for_the_next_writer() -> None:
    async with make_cache(pages=3) as cache:
        async with cache.store(PROMPT) as writer:
            view = writer[0].views[0][:]
        async with cache.store(PROMPT) as writer:
            assert len(writer) == 2
        del view
        async with cache.store(PROMPT) as writer:
            assert len(writer) == 3


def test_a_view_may_outlive_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda failure: failures.append(failure.exc_value))
    monkeypatch.setattr(sys, "excepthook", lambda *failure: failures.append(failure[1]))

    async def leave_a_view() -> memoryview:
        async with make_cache() as cache, cache.store(PROMPT) as writer:
            view = writer[0].views[0]
            assert view is not None
            return view[:]

    view = asyncio.run(leave_a_view())
    view[:] = bytes(16)
    del view
    assert failures == []


def test_who_opened_a_writer_is_told_that_it_expired_and_not_that_it_was_closed() -> None:
    async def scene() -> None:
        told: list[str] = []
        async with make_cache(reservation_ttl_seconds=50) as cache:
            writing = cache.core.writing
            closed = await writing.writer(PROMPT, 0, 0, lambda: told.append("closed"))
            closed.close()
            idle = await writing.writer(PROMPT, 0, 0, lambda: told.append("idle"))
            await asyncio.sleep(51)
            assert (told, writing.swept) == (["idle"], 1)
            with pytest.raises(WriterClosedError):
                idle[0].commit()
            left = await writing.writer(PROMPT, 0, 0, lambda: told.append("left"))
        assert told == ["idle", "left"]
        assert not left.is_open
        assert writing.swept == 1

    run_virtual(scene())


async def test_a_writer_that_was_closed_is_no_garbage() -> None:
    async with make_cache() as cache:
        gc.collect()
        gc.disable()
        try:
            before = {id(found) for found in gc.get_objects()}
            async with cache.store(PROMPT) as writer:
                writer[0].views[0][:] = bytes(16)
                writer[0].commit()
            del writer
            left = [found for found in gc.get_objects() if id(found) not in before and "Writ" in type(found).__name__]
            assert left == []
        finally:
            gc.enable()


async def test_what_is_stored_belongs_to_the_salt_of_its_prompt() -> None:
    async with make_cache() as cache:
        prompt = LAYOUT.prompt(range(4), salt="tenant")
        async with cache.store(prompt) as writer:
            writer[0].commit()
        entry = cache.core.l1.find(prompt.chunk_hashes[0])
        assert entry is not None
        assert entry.owner == "tenant"


async def test_a_room_that_was_seen_is_free_in_the_step_that_closes_its_writer() -> None:
    async with make_cache() as cache:
        writer = await cache.store(PROMPT)
        for chunk in writer:
            assert chunk.views
        writer.close()
        assert (cache.core.l1.used_bytes, cache.core.l1.quarantined_bytes) == (0, 0)
