"""A bound, and the pins that hold against it."""

import pytest

from async_cache.l2.backend import Backend
from async_cache.testing.conformance.made import Made
from async_cache.testing.conformance.objects import (
    CANCEL_AFTER_STEPS,
    GONE,
    MIB,
    cancelled_after,
    content,
    find,
    get,
    key,
    nothing_is_pinned,
    put,
)


class Bounds(Made):
    """Tests of a backend that is full."""

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

    async def test_what_was_found_at_once_is_not_evicted(self, full: Backend) -> None:
        if full.lookup_nowait([key(n).chunk_hash for n in range(4)], [key(0)[1:]]) is None:
            pytest.skip("it never answers at once")
        assert await put(full, [4], MIB) == [False]
        full.unpin([key(n) for n in range(4)])
        assert await put(full, [4], MIB) == [True]

    async def test_a_prefix_in_use_takes_no_pins_with_it(self, full: Backend) -> None:
        hashes = [key(n).chunk_hash for n in (0, 1, 9)]
        full.pin_prefix(hashes)
        full.pin_prefix(hashes)
        full.unpin_prefix(hashes)
        full.unpin_prefix(hashes)
        assert await nothing_is_pinned(full)
