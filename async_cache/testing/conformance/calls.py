"""Calls that are cancelled, that run at the same time, and what they leave to the loop."""

import asyncio

import pytest

from async_cache.l2.backend import Backend
from async_cache.testing.conformance.made import Made
from async_cache.testing.conformance.objects import (
    CANARY,
    CANCEL_AFTER_STEPS,
    GONE,
    LOADED,
    LONG,
    MIB,
    cancelled_after,
    content,
    get,
    holds_the_loop,
    key,
    load_sized,
    put,
    views,
)


class Calls(Made):
    """Tests of calls, whatever they are about."""

    async def test_a_cancelled_store_stores_each_object_whole_or_not_at_all(self, backend: Backend) -> None:
        expected = [content(n, LONG) for n in range(3)]
        for steps in CANCEL_AFTER_STEPS:
            blobs = [bytearray(blob) for blob in expected]
            await cancelled_after(steps, backend.store([key(n) for n in range(3)], views(blobs)))
            for blob in blobs:
                blob[:] = bytes(LONG)  # the call is over: it must not look at this any more
            found = await get(backend, range(3), LONG)
            for n in range(3):
                assert found[n] in (expected[n], GONE), f"object {n}, cancelled after {steps} steps"
            await backend.delete([key(n) for n in range(3)])

    async def test_a_cancelled_load_leaves_its_buffers_alone(self, backend: Backend) -> None:
        expected = [content(n, LONG) for n in range(3)]
        assert await put(backend, range(3), LONG) == [True] * 3
        for steps in CANCEL_AFTER_STEPS:
            buffers = [bytearray(LONG) for _ in range(3)]
            await cancelled_after(steps, backend.load([key(n) for n in range(3)], views(buffers)))
            for buffer in buffers:
                buffer[:] = bytes([CANARY]) * LONG
            # The same work again, to its end: what was left behind has had its time to do harm.
            assert await get(backend, range(3), LONG) == expected
            assert all(buffer.count(CANARY) == LONG for buffer in buffers), f"cancelled after {steps} steps"

    async def test_what_is_said_to_be_loaded_is_and_stays_as_it_is(self, backend: Backend) -> None:
        sizes = [LONG, 1000, 70_001, 1000, LONG]
        assert await backend.store([key(n) for n in range(5)], views([content(n, sizes[n]) for n in range(5)]))
        there = [0, 1, 2, 4]
        await backend.delete([key(3)])
        buffers = [bytearray(size) for size in sizes]
        told: list[int] = []

        def loaded(n: int) -> None:  # in whatever thread
            if buffers[n] == content(n, sizes[n]):
                told.append(n)
            buffers[n][:] = bytes([CANARY]) * sizes[n]

        outcomes = await backend.load_each([key(n) for n in range(5)], views(buffers), loaded)
        assert outcomes == [LOADED, LOADED, LOADED, GONE, LOADED]
        if type(backend).load_each is not Backend.load_each:
            assert sorted(told) == there
            assert all(buffers[n].count(CANARY) == sizes[n] for n in there)

    async def test_fifty_tasks_at_once_do_not_disturb_each_other(self, backend: Backend) -> None:
        async def work(n: int) -> None:
            mine = range(n, n + 3)  # which two neighbours use as well
            for size_bytes in (1000, 70_001):
                keys = [key(i, size_bytes % 7) for i in mine]
                blobs = [content(i, size_bytes) for i in mine]
                assert await backend.store(keys, views(blobs)) == [True] * 3
                assert await backend.lookup(keys) == [True] * 3
                buffers = [bytearray(size_bytes) for _ in mine]
                assert await backend.load(keys, views(buffers)) == [LOADED] * 3
                assert buffers == blobs
                backend.unpin(keys)

        await asyncio.gather(*map(work, range(50)))
        assert backend.usage().objects == 2 * 52

    async def test_the_loop_is_never_held(self, backend: Backend) -> None:
        keys = [key(n) for n in range(8)]
        blobs = [content(n, 8 * MIB) for n in range(8)]
        buffers = [bytearray(8 * MIB) for _ in range(8)]
        for _ in range(5):  # a busy machine spoils a round, a backend that holds the loop spoils all
            held = await holds_the_loop(backend.store(keys, views(blobs)))
            held |= await holds_the_loop(backend.load(keys, views(buffers)))
            assert buffers == blobs
            if not held:
                return
            await backend.delete(keys)
        pytest.fail("a store or a load of 64 MiB held the loop")

    async def test_close_may_be_called_again(self, backend: Backend) -> None:
        await put(backend, [1], 5000)
        await backend.close()
        await backend.close()

    async def test_a_cancelled_load_leaves_its_longer_buffers_alone(self, backend: Backend) -> None:
        assert await put(backend, range(3), LONG) == [True] * 3
        await load_sized(backend, [], [])
        for steps in CANCEL_AFTER_STEPS:
            buffers = [bytearray(LONG + 1000) for _ in range(3)]
            await cancelled_after(steps, backend.load_sized([key(n) for n in range(3)], views(buffers)))
            for buffer in buffers:
                buffer[:] = bytes([CANARY]) * len(buffer)
            assert await get(backend, range(3), LONG) == [content(n, LONG) for n in range(3)]
            assert all(buffer.count(CANARY) == len(buffer) for buffer in buffers), f"cancelled after {steps} steps"
