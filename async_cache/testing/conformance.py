"""The suite that admits a backend: what `Backend` promises, one test for each promise.

    class TestMine(BackendSuite):
        async def make(self, tmp_path):
            return MyBackend(tmp_path)

The other methods are optional; the tests that need them are skipped without them. Needs `async-kv-cache[testing]`.
"""

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import pytest_asyncio

from async_cache.l2.backend import Backend, LoadOutcome
from async_cache.prompt.keys import ObjectKey

T = TypeVar("T")

LOADED, GONE, CORRUPT, FAILED = LoadOutcome
MIB = 2**20
SIZES = [1, 511, 4095, 4096, 4097, 65_537, MIB, 5 * MIB + 13]
LONG = 6 * MIB + 1  # longer than what is copied in one step
CANCEL_AFTER_STEPS = [0, 1, 2, 3, 4, 5, 8, 13, 21, 34, 89, 233]
CANARY = 0xA5


class BackendSuite:
    """The tests that every backend passes: name a subclass `Test...`, and say there how to make the backend."""

    pytestmark = pytest.mark.asyncio

    async def make(self, tmp_path: Path) -> Backend:
        """An empty backend that is not opened yet; the suite opens and closes it."""
        raise NotImplementedError

    async def capacity_backend(self, tmp_path: Path, capacity_bytes: int) -> Backend:
        """The same, with a bound. What it adds to an object (a header, padding) must be less than 1/16 of a MiB."""
        pytest.skip("no bounded backend")

    async def damage(self, backend: Backend, key: ObjectKey, bit: int) -> None:
        """Flip one bit of the bytes that are stored for an object."""
        pytest.skip("no way to damage an object")

    async def make_unreadable(self, backend: Backend, key: ObjectKey) -> None:
        """Let what is stored for an object be impossible to read from now on, until it is stored anew."""
        pytest.skip("no way to make an object unreadable")

    @pytest_asyncio.fixture
    async def backend(self, tmp_path: Path) -> AsyncIterator[Backend]:
        """An open backend."""
        backend = await self.make(tmp_path)
        await backend.open()
        yield backend
        await backend.close()

    @pytest_asyncio.fixture
    async def full(self, tmp_path: Path) -> AsyncIterator[Backend]:
        """An open backend with room for the objects 0 to 3 of a MiB, which are there, and for no more."""
        backend = await self.capacity_backend(tmp_path, 4 * MIB + MIB // 2)
        await backend.open()
        assert await put(backend, range(4), MIB) == [True] * 4
        yield backend
        await backend.close()

    # What is stored is loaded.

    @pytest.mark.parametrize("size_bytes", SIZES)
    async def test_what_was_stored_is_loaded(self, backend: Backend, size_bytes: int) -> None:
        assert await put(backend, [1], size_bytes) == [True]
        assert await get(backend, [1], size_bytes) == [content(1, size_bytes)]

    async def test_objects_of_one_chunk_are_told_apart_by_rank_and_group(self, backend: Backend) -> None:
        keys = [key(1, rank, group) for rank in (0, 1, 7, 255) for group in (0, 1, 15)]
        blobs = [content(n, 1000 + n) for n in range(len(keys))]
        assert all(await backend.store(keys, views(blobs)))
        buffers = [bytearray(len(blob)) for blob in blobs]
        assert await backend.load(keys, views(buffers)) == [LOADED] * len(keys)
        assert buffers == blobs

    async def test_storing_what_is_there_is_true_and_changes_nothing(self, backend: Backend) -> None:
        assert await put(backend, [1, 1], 5000) == [True, True]
        before = backend.usage()
        assert await put(backend, [1], 5000) == [True]
        assert backend.usage() == before
        assert before.objects == 1
        assert await get(backend, [1], 5000) == [content(1, 5000)]

    async def test_a_call_about_nothing_does_nothing(self, backend: Backend) -> None:
        assert await backend.lookup([]) == []
        assert await backend.load([], []) == []
        assert await backend.store([], []) == []
        assert await backend.delete([]) == 0
        backend.unpin([])
        assert backend.lookup_nowait([], [(0, 0)]) in ([], None)

    async def test_an_answer_at_once_is_right(self, backend: Backend) -> None:
        await put(backend, [1, 2], 5000)
        (one, two, three), objects = ([key(n).chunk_hash for n in (1, 2, 3)], [key(1)[1:]])
        here = backend.lookup_nowait([one, two], objects)
        if here is None:
            pytest.skip("it never answers at once")
        assert here == [True, True]
        assert backend.lookup_nowait([one, three], objects) in ([True, False], None)
        absent = [(key(1).rank, key(1).group + 1), *objects]
        assert backend.lookup_nowait([one], absent) is None  # some of them only

    async def test_what_was_found_at_once_is_not_evicted(self, full: Backend) -> None:
        if full.lookup_nowait([key(n).chunk_hash for n in range(4)], [key(0)[1:]]) is None:
            pytest.skip("it never answers at once")
        assert await put(full, [4], MIB) == [False]
        full.unpin([key(n) for n in range(4)])
        assert await put(full, [4], MIB) == [True]

    async def test_keys_and_buffers_of_unequal_number_are_refused(self, backend: Backend) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 (its words are the backend's)
            await backend.store([key(1), key(2)], [memoryview(b"x")])
        with pytest.raises(ValueError):  # noqa: PT011
            await backend.load([key(1)], [])
        assert backend.usage().objects == 0

    async def test_a_load_fills_its_buffers_and_nothing_beside_them(self, backend: Backend) -> None:
        sizes = [1, 4095, 4096, 100_001]
        keys = [key(n) for n in range(len(sizes))]
        blobs = [content(n, size) for n, size in enumerate(sizes)]
        assert all(await backend.store(keys, views(blobs)))
        memory = bytearray([CANARY]) * (sum(sizes) + 64 * (len(sizes) + 1))
        expected, buffers = bytearray(memory), []
        begin = 64
        for blob in blobs:
            buffers.append(memoryview(memory)[begin : begin + len(blob)])
            expected[begin : begin + len(blob)] = blob
            begin += len(blob) + 64
        assert await backend.load(keys, buffers) == [LOADED] * len(keys)
        assert memory == expected

    # Objects of a size that nobody says: what a codec asks of the backend that it wraps.

    async def test_a_longer_buffer_gets_the_object_and_its_size(self, backend: Backend) -> None:
        sizes = [1, 4095, 4096, 100_001]
        keys = [key(n) for n in range(len(sizes))]
        assert all(await backend.store(keys, views([content(n, size) for n, size in enumerate(sizes)])))
        for longer in (0, 1, 64, 65, 5000):
            buffers = [bytearray(size + longer) for size in sizes]
            assert await load_sized(backend, keys, buffers) == sizes
            assert [bytes(buffer[:size]) for buffer, size in zip(buffers, sizes, strict=True)] == [
                content(n, size) for n, size in enumerate(sizes)
            ]

    async def test_a_longer_buffer_is_told_what_is_missing_and_damaged(self, backend: Backend) -> None:
        await put(backend, [1, 2], 5000)
        buffers = [bytearray(6000) for _ in range(3)]
        assert await load_sized(backend, [key(1), key(9), key(2)], buffers) == [5000, GONE, 5000]
        await self.damage(backend, key(1), 20_003)
        assert await load_sized(backend, [key(1), key(2)], buffers[:2]) == [CORRUPT, 5000]
        assert bytes(buffers[1][:5000]) == content(2, 5000)
        assert await find(backend, [1, 2]) == [False, True]

    async def test_an_object_that_is_longer_than_its_buffer_is_corrupt(self, backend: Backend) -> None:
        await put(backend, [1, 2], 5000)
        memory = bytearray([CANARY]) * 10_000
        buffers = [memoryview(memory)[1000:5999], memoryview(memory)[6000:6000]]
        assert await load_sized(backend, [key(1), key(2)], buffers) == [CORRUPT, CORRUPT]
        assert memory.count(CANARY, 0, 1000) == 1000 and memory.count(CANARY, 5999) == 4001
        assert await put(backend, [1], 5000) == [True]
        assert await get(backend, [1], 5000) == [content(1, 5000)]

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

    # What is not there, or not any more.

    async def test_an_absent_object_is_a_miss_and_its_neighbours_are_not(self, backend: Backend) -> None:
        await put(backend, [1, 3], 5000)
        assert await find(backend, [1, 2, 3]) == [True, False, True]
        assert await get(backend, [1, 2, 3], 5000) == [content(1, 5000), GONE, content(3, 5000)]

    async def test_what_was_deleted_since_its_lookup_is_gone(self, backend: Backend) -> None:
        await put(backend, [1, 2], 5000)
        keys = [key(1), key(2)]
        assert await backend.lookup(keys) == [True, True]
        assert await backend.delete([key(1)]) == 1
        assert await get(backend, [1, 2], 5000) == [GONE, content(2, 5000)]
        backend.unpin(keys)

    async def test_delete_counts_what_was_there(self, backend: Backend) -> None:
        await put(backend, [1, 2], 5000)
        assert await backend.delete([key(1), key(9), key(2), key(2)]) == 2
        assert await backend.delete([key(1)]) == 0
        assert await find(backend, [1, 2]) == [False, False]

    async def test_what_was_deleted_can_be_stored_again(self, backend: Backend) -> None:
        await put(backend, [1], 5000)
        await backend.delete([key(1)])
        assert await put(backend, [1], 5000) == [True]
        assert await get(backend, [1], 5000) == [content(1, 5000)]

    @pytest.mark.parametrize("bit", [0, 20_003, 5000 * 8 - 1])
    async def test_a_corrupt_object_is_removed_and_can_be_stored_again(self, backend: Backend, bit: int) -> None:
        await put(backend, [1, 2], 5000)
        await self.damage(backend, key(1), bit)
        assert await get(backend, [1, 2], 5000) == [CORRUPT, content(2, 5000)]
        assert await find(backend, [1]) == [False]
        assert await get(backend, [1], 5000) == [GONE]
        assert await put(backend, [1], 5000) == [True]
        assert await get(backend, [1], 5000) == [content(1, 5000)]

    async def test_an_unreadable_object_fails_alone_and_can_be_stored_again(self, backend: Backend) -> None:
        await put(backend, range(3), 5000)
        await self.make_unreadable(backend, key(1))
        assert await get(backend, range(3), 5000) == [content(0, 5000), FAILED, content(2, 5000)]
        assert await put(backend, range(3), 5000) == [True, True, True]
        assert await get(backend, range(3), 5000) == [content(n, 5000) for n in range(3)]

    async def test_a_prefix_in_use_takes_no_pins_with_it(self, full: Backend) -> None:
        hashes = [key(n).chunk_hash for n in (0, 1, 9)]
        full.pin_prefix(hashes)
        full.pin_prefix(hashes)
        full.unpin_prefix(hashes)
        full.unpin_prefix(hashes)
        assert await nothing_is_pinned(full)

    # Listing.

    async def test_keys_lists_every_object_with_its_size(self, backend: Backend) -> None:
        expected = {key(n, rank): 1000 * (n + 1) + rank for n in range(5) for rank in range(2)}
        blobs = [content(n, size) for n, size in enumerate(expected.values())]
        assert all(await backend.store(list(expected), views(blobs)))
        listed = [item async for item in backend.keys()]
        assert len(listed) == len(expected)
        assert dict(listed) == expected

    async def test_usage_adds_up(self, backend: Backend) -> None:
        empty = backend.usage()
        assert empty.objects == 0
        await put(backend, range(5), 5000)
        usage = backend.usage()
        assert usage.objects == 5
        assert usage.used_bytes - empty.used_bytes >= 5 * 5000
        await backend.delete([key(n) for n in range(5)])
        assert backend.usage() == empty

    # A bound, and the pins that hold against it.

    async def test_the_bound_holds(self, full: Backend) -> None:
        for n in range(4, 16):
            assert await put(full, [n], MIB) == [True]
            assert await find(full, [n]) == [True]
            usage = full.usage()
            assert usage.capacity_bytes is not None
            assert usage.used_bytes <= usage.capacity_bytes

    async def test_what_can_never_fit_is_not_stored(self, full: Backend) -> None:
        assert await put(full, [9], 5 * MIB) == [False]
        assert await find(full, [9]) == [False]

    async def test_pinned_objects_stay_until_they_are_unpinned(self, full: Backend) -> None:
        keys = [key(n) for n in range(4)]
        assert await full.lookup(keys) == [True] * 4
        assert await put(full, [4], MIB) == [False]
        assert await get(full, range(4), MIB) == [content(n, MIB) for n in range(4)]
        full.unpin(keys[1:2])
        assert await put(full, [4], MIB) == [True]
        assert await get(full, range(4), MIB) == [content(0, MIB), GONE, content(2, MIB), content(3, MIB)]
        full.unpin(keys[:1] + keys[2:])

    async def test_an_object_found_twice_is_unpinned_twice(self, full: Backend) -> None:
        keys = [key(n) for n in range(4)]
        assert await full.lookup(keys + keys) == [True] * 8
        full.unpin(keys)
        assert await put(full, [4], MIB) == [False]
        full.unpin(keys)
        assert await nothing_is_pinned(full)

    async def test_a_miss_pins_nothing(self, full: Backend) -> None:
        assert await full.lookup([key(9)]) == [False]
        assert await put(full, [9], 4 * MIB) == [True]
        assert await nothing_is_pinned(full)

    async def test_a_cancelled_lookup_pins_nothing(self, full: Backend) -> None:
        keys = [key(n) for n in range(4)]
        for steps in CANCEL_AFTER_STEPS:
            if await cancelled_after(steps, full.lookup(keys)) is not None:
                full.unpin(keys)
        assert await find(full, range(4)) == [True] * 4
        assert await nothing_is_pinned(full)

    async def test_delete_removes_what_is_pinned(self, full: Backend) -> None:
        keys = [key(n) for n in range(4)]
        assert await full.lookup(keys) == [True] * 4
        assert await full.delete(keys) == 4
        assert await find(full, range(4)) == [False] * 4
        full.unpin(keys)
        assert await nothing_is_pinned(full)

    async def test_a_pin_that_outlived_its_object_is_not_taken_off_the_next_one(self, full: Backend) -> None:
        keys = [key(n) for n in range(4)]
        assert await full.lookup(keys) == [True] * 4
        await full.delete(keys)
        assert await put(full, range(4), MIB) == [True] * 4
        assert await full.lookup(keys) == [True] * 4
        full.unpin(keys)
        assert await put(full, [4], MIB) == [False]
        full.unpin(keys)
        assert await nothing_is_pinned(full)

    # Cancelling, and many at once.

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


def key(n: int, rank: int = 0, group: int = 0) -> ObjectKey:
    """The key of an object of chunk number `n`."""
    return ObjectKey(hashlib.blake2b(n.to_bytes(8, "little"), digest_size=32).digest(), rank, group)


def content(n: int, size_bytes: int) -> bytes:
    """The bytes of object number `n`: the same for each call, like no other."""
    return random.Random(n).randbytes(size_bytes)


def views(blobs: Sequence[bytes | bytearray]) -> list[memoryview]:
    """The blobs as buffers."""
    return [memoryview(blob) for blob in blobs]


async def put(backend: Backend, numbers: Sequence[int], size_bytes: int) -> list[bool]:
    """Store objects of one size in one call."""
    return await backend.store([key(n) for n in numbers], views([content(n, size_bytes) for n in numbers]))


async def get(backend: Backend, numbers: Sequence[int], size_bytes: int) -> list[bytes | LoadOutcome]:
    """Load objects of one size in one call: for each its bytes, or why there are none."""
    buffers = [bytearray(size_bytes) for _ in numbers]
    outcomes = await backend.load([key(n) for n in numbers], views(buffers))
    return [bytes(buffer) if outcome is LOADED else outcome for buffer, outcome in zip(buffers, outcomes, strict=True)]


async def load_sized(
    backend: Backend, keys: Sequence[ObjectKey], buffers: Sequence[bytearray | memoryview]
) -> list[int | LoadOutcome]:
    """Load into buffers that may be longer than the objects; the test is skipped where the backend need not do that."""
    if type(backend).load_sized is Backend.load_sized:
        pytest.skip("it loads only what it is told the size of")
    return await backend.load_sized(keys, [memoryview(buffer) for buffer in buffers])


async def find(backend: Backend, numbers: Sequence[int]) -> list[bool]:
    """For each object, whether it is there; it is not pinned then."""
    keys = [key(n) for n in numbers]
    found = await backend.lookup(keys)
    backend.unpin([k for k, present in zip(keys, found, strict=True) if present])
    return found


async def nothing_is_pinned(full: Backend) -> bool:
    """Whether an object that needs the room of all others gets it."""
    return await put(full, [1000], 4 * MIB) == [True]


async def cancelled_after(steps: int, call: Coroutine[Any, Any, T]) -> T | None:
    """Cancel a call when the loop has turned so often; return its result if it was done before, else None."""
    task = asyncio.ensure_future(call)
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return None


async def holds_the_loop(call: Coroutine[Any, Any, Any]) -> bool:
    """Whether the loop stood still for 50 ms while a call ran, or a quarter of its work was done in one go.

    The work is the CPU time of this thread, which a busy machine does not lengthen; 5 ms in one go are no matter.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(call)
    gaps, work = [], []
    while not task.done():
        begin, worked = loop.time(), time.thread_time()
        await asyncio.sleep(0.001)
        gaps.append(loop.time() - begin)
        work.append(time.thread_time() - worked)
    await task
    return max(gaps) > 0.05 or max(work) > max(0.005, sum(work) / 4)
