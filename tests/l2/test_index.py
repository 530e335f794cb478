"""The index of a backend: what is there, what is pinned, and what the policy is told of both."""

import random
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from faults.disk import place_of

from async_cache.l2 import tables
from async_cache.l2.backend import Backend, LoadOutcome
from async_cache.l2.chunks import Chunk, placed_of
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.index import Index
from async_cache.l2.memory import MemoryBackend
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Origin
from async_cache.retention.policies import NAMES, make_policy
from async_cache.retention.quotas import Bounds, Quota
from async_cache.testing import flip_bit
from async_cache.testing.conformance import content, find, get, key, put, views
from async_cache.values import Removal


class MostRecentlyUsed:
    """A policy that is not the default, keeps its order outside of the items, and knows all that it was told."""

    def __init__(self) -> None:
        self.items: dict[bytes, Chunk] = {}
        self.told: list[tuple[bytes, Removal]] = []

    def enter(self, item: Chunk, parent: Chunk | None, kept: bool = False) -> None:
        self.use(item)

    def use(self, item: Chunk, before: Chunk | None = None) -> None:
        self.items.pop(item.chunk_hash, None)
        self.items[item.chunk_hash] = item

    def use_all(self, items: Iterable[Chunk]) -> None:
        for item in items:
            self.use(item)

    def suspend(self, item: Chunk) -> None:
        assert self.items.pop(item.chunk_hash) is item

    def resume(self, item: Chunk) -> None:
        assert item.chunk_hash not in self.items
        self.items[item.chunk_hash] = item

    def left(self, item: Chunk, removal: Removal) -> None:
        self.items.pop(item.chunk_hash, None)
        self.told.append((item.chunk_hash, removal))

    def learned(self) -> Iterator[bytes]:
        return iter(())

    def victims(self) -> Iterator[Chunk]:
        return iter(list(reversed(self.items.values())))


def hashes(*numbers: int) -> list[bytes]:
    return [key(n).chunk_hash for n in numbers]


def filled(count: int) -> tuple[Index, MostRecentlyUsed]:
    """An index of chunks of one object of 10 bytes."""
    policy = MostRecentlyUsed()
    index = Index(policy)
    for n in range(count):
        index.put(key(n), 10)
    return index, policy


def test_the_policy_says_who_leaves_and_is_told_why() -> None:
    index, policy = filled(4)
    index.touch(hashes(1))
    assert index.evict(15) == [key(1), key(3)]
    index.drop(key(0), Removal.DELETED)
    index.drop(key(9), Removal.DELETED)
    index.drop(key(2), Removal.DAMAGED)
    assert policy.told == [
        (key(1).chunk_hash, Removal.CAPACITY),
        (key(3).chunk_hash, Removal.CAPACITY),
        (key(0).chunk_hash, Removal.DELETED),
        (key(2).chunk_hash, Removal.DAMAGED),
    ]
    assert (index.objects, index.used_bytes) == (0, 0)


def test_what_is_there_is_told_without_a_pin_or_a_touch() -> None:
    index, policy = filled(3)
    order = list(policy.items)
    assert index.present_whole(hashes(2, 9, 0), [(0, 0)]) == [True, False, True]
    assert index.present_whole(hashes(0, 1), [(5, 5)]) == [False, False]
    assert index.present_whole(hashes(0), [(0, 0), (5, 5)]) is None, "with some of its objects"
    assert index.present_whole([], [(0, 0)]) == []
    assert not index.pins and list(policy.items) == order


def test_a_chunk_has_left_when_its_last_object_has() -> None:
    index, policy = filled(0)
    for group in range(3):
        index.put(key(1, group=group), 10)
    index.drop(key(1, group=0), Removal.DAMAGED)
    index.drop(key(1, group=2), Removal.DAMAGED)
    assert policy.told == []
    index.drop(key(1, group=1), Removal.LOST)
    assert policy.told == [(key(1).chunk_hash, Removal.LOST)]
    index.check_integrity()


def test_what_is_pinned_is_passed_over_and_nothing_leaves_if_that_is_not_enough() -> None:
    index, policy = filled(4)
    index.pin([key(3), key(1)])
    assert index.evict(21) is None
    assert policy.told == []
    assert index.evict(20) == [key(2), key(0)]
    index.unpin([key(1), key(3)])
    assert index.evict(1) == [key(3)]
    index.check_integrity()


def test_what_is_pinned_for_long_is_looked_at_once_and_leaves_first_when_it_is_let_go() -> None:
    for name in NAMES:
        index = Index(make_policy(name, lambda: 0.0))
        for n in range(40):
            index.put(key(n), 10)
        index.pin_prefix(hashes(0, 1, 2))
        for _ in range(20):
            assert len(index.evict(10) or ()) == 1
            index.check_integrity()
        assert all(index.present([key(0), key(1), key(2)]))
        index.unpin_chunks(hashes(0, 1, 2))
        index.check_integrity()
        if name in ("lru", "fifo", "arc"):
            assert index.evict(30) == [key(2), key(1), key(0)]
        assert index.evict(index.used_bytes) is not None
        assert (index.objects, index.used_bytes) == (0, 0)
        index.check_integrity()


def test_what_is_pinned_at_once_is_all_or_nothing() -> None:
    index, _ = filled(3)
    assert not index.pin_chunks(hashes(0, 9), ((0, 0),))
    assert not index.pin_chunks(hashes(0, 1), ((0, 0), (0, 1)))
    assert not index.pins
    assert index.pin_chunks(hashes(0, 1), ((0, 0),))
    assert index.pin_present([key(1), key(9), key(1)]) == [True, False, True]
    assert index.pins == dict(zip(hashes(0, 1), (1, 3), strict=True))


def test_the_tail_of_a_prefix_leaves_before_its_head_however_they_were_used() -> None:
    index = Index()
    for n in range(6):
        index.put(key(n), 10)
    index.pin_prefix(hashes(0, 1, 2, 9))
    assert index.evict(31) is None
    index.unpin_prefix(hashes(0, 1, 2, 9))
    assert not index.pins
    assert index.pin_chunks(hashes(3, 4), ((0, 0),))
    assert index.pin_present([key(5), key(5), key(9)]) == [True, True, False]
    index.pins.clear()
    assert index.evict(60) == [key(n) for n in (2, 1, 0, 4, 3, 5)]
    index.check_integrity()


def test_a_prefix_that_is_pinned_twice_is_unpinned_twice() -> None:
    index, _ = filled(1)
    index.pin_prefix(hashes(0, 0))
    index.pin_prefix(hashes(0))
    index.unpin_prefix(hashes(0, 0))
    assert index.evict(1) is None
    index.unpin_prefix(hashes(0))
    assert index.evict(1) == [key(0)]


def test_a_pin_outlives_its_chunk() -> None:
    index, _ = filled(1)
    assert index.pin_present([key(0)]) == [True]
    index.drop(key(0), Removal.DELETED)
    index.put(key(0), 10)
    assert index.pin_present([key(0)]) == [True]
    index.unpin([key(0)])
    assert index.evict(1) is None
    index.unpin([key(0), key(0)])
    assert index.evict(1) == [key(0)]


def test_what_is_put_as_the_oldest_leaves_first_and_changes_nothing_that_is_known() -> None:
    index = Index()
    for n in (1, 2):
        index.put(key(n), 10)
    for n in (3, 4):
        index.put_oldest(key(n), 10)
    index.put_oldest(key(1), 999)
    index.put_oldest(key(1, group=1), 5)
    index.check_integrity()
    assert index.used_bytes == 45
    assert index.evict(20) == [key(4), key(3)]
    assert index.evict(10) == [key(1), key(1, group=1)]


def test_all_leave_in_the_end_pinned_or_not() -> None:
    index, policy = filled(5)
    index.pin([key(1)])
    assert [index.clear(2) for _ in range(4)] == [True, True, True, False]
    assert len(policy.told) == 5
    assert {removal for _, removal in policy.told} == {Removal.LOST}
    assert (index.objects, index.used_bytes, index.chunk_hashes()) == (0, 0, [])


@pytest.mark.parametrize("alike", [0, 1, 3, tables.ALIKE_OBJECTS])
@pytest.mark.parametrize("seed", range(5))
def test_what_is_there_is_what_was_put_whatever_is_called(
    seed: int, alike: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ALIKE_OBJECTS", alike)
    monkeypatch.setattr(tables, "LEFT_ALIKE_OBJECTS", min(alike, 2))
    chance = random.Random(seed)
    index = Index()
    index.bound(Bounds([Quota("", None, 10**6)], lambda quota: 10**6))
    there: dict[ObjectKey, tuple[int, bytes]] = {}
    for number in range(400):
        which, placed = (
            key(chance.randrange(6), group=chance.randrange(5)),
            (chance.randrange(1, 20), number.to_bytes(4)),
        )
        match chance.choice(("put", "put", "oldest", "drop", "evict", "pin", "unpin", "asked")):
            case "put":
                index.put(which, *placed)
                there[which] = placed
            case "oldest":
                index.put_oldest(which, *placed)
                there.setdefault(which, placed)
            case "drop":
                index.drop(which, Removal.DELETED)
                there.pop(which, None)
            case "evict":
                for evicted in index.evict(chance.randrange(40)) or ():
                    del there[evicted]
            case "pin":
                index.pin_present([which])
            case "unpin":
                index.unpin([which])
            case "asked":
                index.asked([which.chunk_hash], 1, 1, Origin("", "model"))
        index.check_integrity()
        every = [key(n, group=group) for n in range(6) for group in range(5)]
        assert index.placed(every) == list(map(there.get, every))
        assert {
            ObjectKey(chunk.chunk_hash, *which): (size, place)
            for chunk in index.chunks()
            for which, size, place in placed_of(chunk)
        } == there


def test_a_chunk_of_many_objects_gets_and_loses_them_where_it_is() -> None:
    index = Index()
    chunk_hash, count = b"c" * 32, tables.ALIKE_OBJECTS + 1
    for group in range(count):
        index.put(ObjectKey(chunk_hash, 0, group), 10, bytes(8))
    chunk = index.get(chunk_hash)
    assert chunk is not None
    table = chunk.table
    for group in range(count, 4 * count):
        index.put(ObjectKey(chunk_hash, 0, group), 10, bytes(8))
    for group in range(4 * count - 1):
        index.drop(ObjectKey(chunk_hash, 0, group), Removal.DELETED)
    assert chunk.table is table, "to make another one takes as long as it has objects, for each of them"
    assert (index.objects, index.used_bytes) == (1, 10)
    index.drop(ObjectKey(chunk_hash, 0, 4 * count - 1), Removal.DELETED)
    assert (index.objects, index.used_bytes, index.get(chunk_hash)) == (0, 0, None)


# The backends that use it.


DIRECTORY_BYTES = 6 * 4096  # of the disk, beside what is stored; an object takes whole pages


def backends(folder: Path) -> list[tuple[Backend, MostRecentlyUsed]]:
    """One of each, with room for four objects of 100 bytes."""
    policies = MostRecentlyUsed(), MostRecentlyUsed()
    return [
        (MemoryBackend(capacity_bytes=400, policy=policies[0]), policies[0]),
        (FileSystemBackend(folder / "kv", capacity_bytes=4 * 4096 + DIRECTORY_BYTES, policy=policies[1]), policies[1]),
    ]


async def test_a_backend_asks_its_policy_and_tells_it_why_something_left(tmp_path: Path) -> None:
    for backend, policy in backends(tmp_path):
        await backend.open()
        await put(backend, range(4), 100)
        assert await find(backend, [0]) == [True]
        assert await put(backend, [4], 100) == [True]
        assert await find(backend, range(5)) == [False, True, True, True, True], "what was used last has left"
        await backend.delete([key(4)])
        if isinstance(backend, MemoryBackend):
            assert flip_bit(backend, key(3))
        else:
            place_of(tmp_path / "kv", key(3)).write(bytes(100))
        assert await get(backend, [3], 100) == [LoadOutcome.CORRUPT]
        assert policy.told == [
            (key(0).chunk_hash, Removal.CAPACITY),
            (key(4).chunk_hash, Removal.DELETED),
            (key(3).chunk_hash, Removal.DAMAGED),
        ]
        await backend.close()


async def test_what_somebody_else_removed_from_a_directory_is_lost(tmp_path: Path) -> None:
    policy = MostRecentlyUsed()
    backend = FileSystemBackend(tmp_path / "kv", policy=policy)
    await backend.open()
    await put(backend, range(2), 100)
    other = FileSystemBackend(tmp_path / "kv")
    await other.open()
    assert await other.delete([key(1)]) == 1
    assert await get(backend, [0, 1], 100) == [content(0, 100), LoadOutcome.GONE]
    assert policy.told == [(key(1).chunk_hash, Removal.LOST)]
    await other.close()
    await backend.close()


async def test_a_chunk_that_is_stored_makes_no_room_for_itself(tmp_path: Path) -> None:
    for backend, policy in backends(tmp_path):
        await backend.open()
        keys = [key(1, rank) for rank in range(5)]
        assert sum(await backend.store(keys, views([bytes(100)] * 5))) == 4
        assert policy.told == []
        await backend.close()


def bounded(folder: Path) -> list[MemoryBackend | FileSystemBackend]:
    """One of each, with room for twelve objects of 100 bytes."""
    return [
        MemoryBackend(capacity_bytes=1200),
        FileSystemBackend(folder / "kv", capacity_bytes=12 * 4096 + DIRECTORY_BYTES),
    ]


async def left_of(backend: Backend, count: int) -> int:
    """How long the prefix is that is there, of so many chunks; nothing behind it is."""
    found = await find(backend, range(count))
    assert found == sorted(found, reverse=True)
    return sum(found)


async def test_a_backend_evicts_the_tail_of_what_was_stored_or_looked_up_together(tmp_path: Path) -> None:
    for backend in bounded(tmp_path):
        await backend.open()
        await put(backend, range(8), 100)
        await put(backend, range(100, 106), 100)
        assert await left_of(backend, 8) == 6
        await put(backend, range(106, 114), 100)
        assert await left_of(backend, 8) == 4
        await backend.close()


async def test_a_backend_evicts_tails_first_where_some_of_what_was_looked_up_was_only_on_the_disk(
    tmp_path: Path,
) -> None:
    other = FileSystemBackend(tmp_path)
    backend = FileSystemBackend(tmp_path, capacity_bytes=12 * 4096 + DIRECTORY_BYTES + 4 * 4096)
    await backend.open()
    await other.open()
    await put(backend, range(4), 100)
    await put(other, range(4, 8), 100)
    assert await find(backend, range(8)) == [True] * 8
    await put(backend, range(100, 106), 100)
    assert await left_of(backend, 6) == 6
    await other.close()
    await backend.close()


async def test_a_store_makes_no_room_at_the_cost_of_what_it_stores(tmp_path: Path) -> None:
    for backend in bounded(tmp_path):
        await backend.open()
        assert await put(backend, range(16), 100) == [True] * 12 + [False] * 4
        assert await left_of(backend, 16) == 12
        await backend.close()


def test_what_chunks_share_is_bounded_however_many_objects_they_have() -> None:
    index = Index()
    keys = [ObjectKey(b"c" * 32, 0, group) for group in range(1030)]
    tracemalloc.start()
    try:
        for each in keys:
            index.put(each, 1)
        for each in keys:
            index.drop(each, Removal.DELETED)
        assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
    finally:
        tracemalloc.stop()
    index.check_integrity()
