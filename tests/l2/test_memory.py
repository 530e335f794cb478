"""The memory backend: the suite, and what it promises beyond the contract."""

import asyncio
import gc
import random
import sys
import weakref
from pathlib import Path

import pytest

from async_cache.l2.backend import Backend, Coming, LoadOutcome
from async_cache.l2.memory import STEP_BYTES, MemoryBackend
from async_cache.l2.urls.registry import from_url
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Origin
from async_cache.retention.policies import NAMES, make_policy
from async_cache.retention.quotas import Bounds, Quota
from async_cache.testing import flip_bit
from async_cache.testing.conformance import (
    CANCEL_AFTER_STEPS,
    BackendSuite,
    cancelled_after,
    content,
    find,
    get,
    key,
    put,
    views,
)
from async_cache.testing.virtual import run_virtual
from async_cache.values import BackendUsage


class TestConformance(BackendSuite):
    async def make(self, tmp_path: Path) -> Backend:
        return MemoryBackend()

    async def capacity_backend(self, tmp_path: Path, capacity_bytes: int) -> Backend:
        return MemoryBackend(capacity_bytes=capacity_bytes)

    async def damage(self, backend: Backend, key: ObjectKey, bit: int) -> None:
        assert isinstance(backend, MemoryBackend)
        assert flip_bit(backend, key, bit)


@pytest.mark.parametrize("use", ["lookup", "store"])
async def test_what_was_used_last_is_evicted_last(use: str) -> None:
    backend = MemoryBackend(capacity_bytes=400)
    for n in range(4):
        await put(backend, [n], 100)
    if use == "lookup":
        await find(backend, [0])
    else:
        await put(backend, [0], 100)
    await put(backend, [4, 5], 100)
    assert await find(backend, range(6)) == [True, False, False, True, True, True]


async def test_in_one_of_a_url_an_object_takes_as_much_as_is_known_of_it_however_little_it_has() -> None:
    backend = from_url("memory://?capacity=16KiB")
    for n in range(40):
        assert await put(backend, [n], 1) == [True]
    assert backend.usage() == BackendUsage(32, 16 * 1024, 16 * 1024)
    assert await find(backend, range(40)) == [False] * 8 + [True] * 32
    await put(backend, [40], 4096)
    assert backend.usage() == BackendUsage(25, 16 * 1024, 16 * 1024)
    assert await backend.delete([key(40), key(8)]) == 2
    assert backend.usage() == BackendUsage(23, 23 * 512, 16 * 1024)


async def test_the_ranks_of_a_chunk_leave_together() -> None:
    backend = MemoryBackend(capacity_bytes=400)
    await backend.store([key(0, 0), key(1, 0), key(0, 1)], views([bytes(100)] * 3))
    assert await put(backend, [2, 3], 100) == [True, True]
    assert await backend.lookup([key(0, 0), key(0, 1), key(1, 0)]) == [True, True, False]  # 0 was used last
    backend.unpin([key(0, 0), key(0, 1)])
    await put(backend, [4, 5, 6], 100)
    assert await backend.lookup([key(0, 0), key(0, 1)]) == [False, False]
    backend.check_integrity()


async def test_a_pin_on_one_rank_protects_its_chunk() -> None:
    backend = MemoryBackend(capacity_bytes=200)
    await backend.store([key(0, 0), key(0, 1)], views([bytes(100)] * 2))
    await backend.lookup([key(0, 1)])
    assert await put(backend, [1], 100) == [False]
    assert await find(backend, [0]) == [True]


async def test_a_chunk_makes_no_room_for_itself() -> None:
    backend = MemoryBackend(capacity_bytes=200)
    stored = await backend.store([key(0, rank) for rank in range(3)], views([bytes(100)] * 3))
    assert stored == [True, True, False]


async def test_what_does_not_fit_evicts_nothing() -> None:
    backend = MemoryBackend(capacity_bytes=400)
    await put(backend, range(4), 100)
    await backend.lookup([key(3)])
    assert await put(backend, [4], 301) == [False]
    assert await put(backend, [5], 401) == [False]
    assert await find(backend, range(4)) == [True] * 4


def test_contents_outlive_close_and_the_loop_but_pins_do_not() -> None:
    backend = MemoryBackend(capacity_bytes=STEP_BYTES)

    async def first() -> None:
        await backend.open()
        await asyncio.gather(*(put(backend, [n], 100) for n in range(3)))  # which contend for the lock
        await backend.lookup([key(0), key(1)])
        await backend.delete([key(1)])
        assert backend.pins == 2
        await backend.close()
        assert backend.pins == 0
        backend.check_integrity()

    async def second() -> None:
        await backend.open()
        found = await asyncio.gather(*(get(backend, [n], 100) for n in range(3)))
        assert found == [[content(0, 100)], [LoadOutcome.GONE], [content(2, 100)]]
        assert await put(backend, [9], STEP_BYTES) == [True]

    asyncio.run(first())
    asyncio.run(second())


async def test_an_object_of_another_length_than_its_buffer_is_corrupt() -> None:
    backend = MemoryBackend()
    await put(backend, [1, 2], 100)
    assert await get(backend, [1], 99) == [LoadOutcome.CORRUPT]
    assert await get(backend, [2], 101) == [LoadOutcome.CORRUPT]
    assert backend.usage().objects == 0


async def test_two_calls_that_store_one_object_store_it_once() -> None:
    backend = MemoryBackend()
    first, second = await asyncio.gather(put(backend, [1], 100), put(backend, [1], 100))
    assert first == second == [True]
    assert backend.usage().used_bytes == 100
    backend.check_integrity()


async def test_a_load_delivers_what_is_deleted_meanwhile() -> None:
    backend = MemoryBackend()
    size_bytes = 2 * STEP_BYTES
    await put(backend, [1], size_bytes)
    load = asyncio.ensure_future(get(backend, [1], size_bytes))
    await asyncio.sleep(0)  # its first step
    assert await backend.delete([key(1)]) == 1
    assert not load.done()
    assert await load == [content(1, size_bytes)]


async def test_many_calls_take_one_step_at_a_time() -> None:
    backend = MemoryBackend()
    size_bytes = STEP_BYTES // 4
    await backend.store([key(n) for n in range(8)], views([b"x" * size_bytes] * 8))
    buffers = [bytearray(size_bytes) for _ in range(8)]
    loads = asyncio.gather(*(backend.load([key(n)], views(buffers[n : n + 1])) for n in range(8)))
    filled = 0
    while not loads.done():
        await asyncio.sleep(0)
        before, filled = filled, sum(buffer[-1] == ord("x") for buffer in buffers)
        assert filled <= before + 1
    assert filled == 8


async def test_a_call_cancelled_anywhere_leaves_the_totals_right() -> None:
    backend = MemoryBackend(capacity_bytes=300)
    keys, blobs = [key(n) for n in range(5)], [bytes(100)] * 5
    for steps in CANCEL_AFTER_STEPS:
        for call in (backend.store(keys, views(blobs)), backend.delete(keys[:4])):
            await cancelled_after(steps, call)
            backend.check_integrity()
    assert await put(backend, [9], 300) == [True]


@pytest.mark.parametrize("seed", range(5))
async def test_the_totals_hold_whatever_is_called(seed: int) -> None:
    chance = random.Random(seed)
    backend = MemoryBackend(capacity_bytes=1000)
    pinned: list[ObjectKey] = []
    for _ in range(300):
        keys = [key(chance.randrange(5), chance.randrange(3)) for _ in range(chance.randrange(4))]
        match chance.choice(["store", "lookup", "unpin", "load", "delete", "damage"]):
            case "store":
                await backend.store(keys, views([content(k.rank, 100 + k.rank) for k in keys]))
            case "lookup":
                found = await backend.lookup(keys)
                pinned += [k for k, present in zip(keys, found, strict=True) if present]
            case "unpin":
                chance.shuffle(pinned)
                backend.unpin(pinned[:3])
                del pinned[:3]
            case "load":
                await backend.load(keys, views([bytearray(100 + k.rank) for k in keys]))
            case "delete":
                await backend.delete(keys)
            case "damage":
                flip_bit(backend, key(0))
        backend.check_integrity()
        assert backend.pins == len(pinned)


def test_it_works_under_virtual_time_and_takes_none() -> None:
    async def main() -> float:
        backend = MemoryBackend()
        size_bytes = 2 * STEP_BYTES + 1
        await backend.open()
        assert await put(backend, range(3), size_bytes) == [True] * 3
        assert await get(backend, range(3), size_bytes) == [content(n, size_bytes) for n in range(3)]
        assert {item async for item in backend.keys()} == {(key(n), size_bytes) for n in range(3)}
        assert await backend.delete([key(0)]) == 1
        await backend.close()
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 0


def test_a_capacity_that_holds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity_bytes"):
        MemoryBackend(capacity_bytes=0)


@pytest.mark.parametrize("policy", NAMES)
async def test_nothing_is_left_of_one_that_nobody_has_any_more(policy: str) -> None:
    """As of one that a server has removed: its records are unknown to the collector, and know each other."""
    backend = MemoryBackend(policy=make_policy(policy, asyncio.get_running_loop().time))
    backend.bound(Bounds([Quota("", None, l2_bytes=20_000)], lambda quota: quota.l2_bytes))
    hashes = [bytes([n]) * 32 for n in range(1, 100)]
    before = list(map(sys.getrefcount, hashes))
    backend.asked(hashes, 99, 1, Origin("", "m"))
    backend.coming([Coming(chunk_hash, None, Origin("", "m")) for chunk_hash in hashes])
    await backend.store([ObjectKey(chunk_hash, 0, 0) for chunk_hash in hashes], views([bytes(100)] * len(hashes)))
    await backend.close()
    del backend
    gc.collect()
    assert list(map(sys.getrefcount, hashes)) == before


async def test_one_that_nobody_has_any_more_goes_without_a_collection() -> None:
    gc.collect()
    gc.disable()
    try:
        backend = MemoryBackend()
        gone = weakref.ref(backend)
        await backend.open()
        await put(backend, range(3), 100)
        await backend.close()
        del backend
        assert gone() is None
    finally:
        gc.enable()
