"""What is stored is loaded, and lies nowhere else."""

import pytest

from async_cache.l2.backend import Backend
from async_cache.testing.conformance.made import Made
from async_cache.testing.conformance.objects import (
    CANARY,
    CORRUPT,
    GONE,
    LOADED,
    MIB,
    content,
    find,
    get,
    key,
    load_sized,
    put,
    views,
)

SIZES = [1, 511, 4095, 4096, 4097, 65_537, MIB, 5 * MIB + 13]


class Stored(Made):
    """Tests of what is there."""

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

    async def test_an_answer_after_hearing_of_others_is_right(self, backend: Backend) -> None:
        await put(backend, [1, 2], 5000)
        (one, two, three), objects = ([key(n).chunk_hash for n in (1, 2, 3)], [key(1)[1:]])
        lookup = await backend.lookup_later() if backend.follows else None
        if lookup is None:
            pytest.skip("it does not follow others")
        assert lookup([one, two, three], objects) == [True, True, False]
        backend.unpin([key(1), key(2)])
        absent = [(key(1).rank, key(1).group + 1), *objects]
        assert lookup([one], absent) is None  # some of them only
        await backend.delete([key(1)])
        assert lookup([one, two], objects) == [False, True]

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
