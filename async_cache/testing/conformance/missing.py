"""What is absent, deleted, damaged or unreadable, and what a listing has."""

import pytest

from async_cache.l2.backend import Backend
from async_cache.testing.conformance.made import Made
from async_cache.testing.conformance.objects import (
    CORRUPT,
    FAILED,
    GONE,
    content,
    find,
    get,
    key,
    put,
    views,
)


class Missing(Made):
    """Tests of what is not there, or not any more."""

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
