import asyncio
import ctypes
import errno
import fcntl
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from contextlib import suppress
from mmap import PAGESIZE, mmap
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from contract.support import fill, make_prompt
from faults.disk import allocated, place_of, places
from xxhash import xxh3_64_intdigest

from async_cache import AsyncCache, CacheConfig
from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Coming, LoadOutcome
from async_cache.l2.filesystem import backend as filesystem
from async_cache.l2.filesystem import files, following, journal, rewriting, runs
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.filesystem.format import (
    BLOCK_BYTES,
    MARKER,
    MARKER_LINE,
    RECORD_BYTES,
    VERSION,
    Kind,
    header,
    index_name,
    record,
    records,
    segment_name,
)
from async_cache.l2.filesystem.journal import Journal
from async_cache.l2.filesystem.segments import Segment
from async_cache.l2.index import Index
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Origin
from async_cache.retention.quotas import Bounds, Quota
from async_cache.testing.conformance import BackendSuite, content, find, get, key, put, views

LOADED, GONE, CORRUPT, FAILED = LoadOutcome
MIB = 2**20
LONG = 3 * BLOCK_BYTES + 5
ROOM = -(-LONG // 4096) * 4096
INDEX_BYTES = 6 * 4096  # on the disk, of the index of one process, with a page to spare, and of FORMAT


class Gate:
    """Holds the worker threads that call a function of `os` until it is opened."""

    def __init__(self, monkeypatch, name):
        self.calls = 0
        self._entered, self._opened = threading.Event(), threading.Event()
        self._real = getattr(os, name)
        monkeypatch.setattr(os, name, self._call)

    def _call(self, *args, **kwargs):
        self.calls += 1
        self._entered.set()
        assert self._opened.wait(100)
        return self._real(*args, **kwargs)

    async def reached(self):
        assert await asyncio.to_thread(self._entered.wait, 30)

    def open(self):
        self._opened.set()

    def shut(self):
        self._opened.clear()
        self._entered.clear()


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "kv"


@pytest.fixture
async def start(directory):
    """Makes opened backends on the directory; closed, and checked, at the end."""
    started = []

    async def start(**settings):
        backend = FileSystemBackend(directory, **settings)
        await backend.open()
        started.append(backend)
        return backend

    yield start
    for backend in started:
        backend.check_integrity()
        await backend.close()


def places_of(index):
    """The objects of which an index file says that they were there."""
    return {ObjectKey(each[8], each[1], each[2]) for each in records(index.read_bytes()[RECORD_BYTES:])}


def names(directory):
    return sorted(os.listdir(directory))


def damage(directory, of, change):
    place = place_of(directory, of)
    place.write(change(place.read()))


def flipped(index):
    return lambda data: data[:index] + bytes([data[index] ^ 1]) + data[index:][1:]


async def listing(backend):
    return {k: size async for k, size in backend.keys()}


class TestConformance(BackendSuite):
    async def make(self, tmp_path):
        return FileSystemBackend(tmp_path / "kv")

    async def capacity_backend(self, tmp_path, capacity_bytes):
        return FileSystemBackend(tmp_path / "kv", capacity_bytes=capacity_bytes)

    async def damage(self, backend, key, bit):
        byte, bit = divmod(bit, 8)
        damage(Path(backend.path), key, lambda b: b[:byte] + bytes([b[byte] ^ 1 << bit]) + b[byte + 1 :])

    @pytest.fixture(autouse=True)
    def _patching(self, monkeypatch):
        self.monkeypatch = monkeypatch

    async def make_unreadable(self, backend, key):
        BadSectors(self.monkeypatch, Path(backend.path)).at([key])


class TestDirectConformance(TestConformance):
    async def make(self, tmp_path):
        return FileSystemBackend(tmp_path / "kv", direct=True, durability="fsync", threads=3)


class TestConformanceOfSmallSegments(TestConformance):
    async def make(self, tmp_path):
        return FileSystemBackend(tmp_path / "kv", segment_bytes=10_000)


class TestConformanceWithoutHoles(TestConformance):
    async def make(self, tmp_path):
        self.monkeypatch.setattr(files, "_fallocate", lambda *_: ctypes.set_errno(errno.EOPNOTSUPP) or -1)
        return FileSystemBackend(tmp_path / "kv")


# Recovery.


async def test_one_that_nobody_has_any_more_goes_without_a_collection(directory):
    gc.collect()
    gc.disable()
    try:
        backend = FileSystemBackend(directory)
        await backend.open()
        await put(backend, range(3), 100)
        gone = [weakref.ref(part) for part in (backend, backend._index, backend._log, backend._log.directory)]
        await backend.close()
        del backend
        assert [part() for part in gone] == [None] * len(gone)
    finally:
        gc.enable()


async def test_what_was_stored_is_there_after_a_restart(start):
    first = await start()
    keys = [key(n, rank) for n in range(50) for rank in range(2)]
    assert all(await first.store(keys, views([content(n, 1000 + n) for n in range(100)])))
    await first.close()
    second = await start()
    assert await listing(second) == {k: 1000 + n for n, k in enumerate(keys)}
    assert second.usage().objects == 100
    assert second.usage().used_bytes == sum(range(1000, 1100))
    second.check_integrity()


@pytest.fixture
def slow_recovery(monkeypatch):
    """Recovery does not read on until the gate is opened."""
    gate = Gate(monkeypatch, "getpid")

    def backward(journal):
        os.getpid()
        yield from real(journal)

    real = Journal.backward
    monkeypatch.setattr(Journal, "backward", backward)
    monkeypatch.setattr(following, "RECOVERY_SECONDS", 0.001)
    return gate


async def test_a_lookup_waits_for_recovery_a_little_and_says_what_it_knows(start, slow_recovery):
    slow_recovery.open()
    first = await start()
    await put(first, range(3), 1000)
    await first.close()
    slow_recovery.shut()
    second = await start()
    await slow_recovery.reached()
    assert second.lookup_nowait([key(0).chunk_hash], [key(0)[1:]]) is None
    assert await find(second, [0, 9]) == [False, False]
    assert await put(second, [5], 1000) == [True]
    assert await find(second, [5]) == [True]
    slow_recovery.open()
    assert set(await listing(second)) == {key(n) for n in (0, 1, 2, 5)}
    assert second.lookup_nowait([key(n).chunk_hash for n in (0, 9, 5)], [key(0)[1:]]) in ([True, False, True], None)


async def put_of(backend, salt, numbers):
    """Store objects of 4,000 bytes of a salt."""
    backend.coming([Coming(key(n).chunk_hash, None, Origin(salt, "m", "", "")) for n in numbers])
    return await put(backend, numbers, 4000)


async def test_quotas_and_the_capacity_hold_for_what_is_stored_while_recovery_is_under_way(
    start, directory, slow_recovery
):
    slow_recovery.open()
    first = await start()
    await put_of(first, "a", range(8))
    await put_of(first, "b", range(8, 10))
    await first.close()
    slow_recovery.shut()
    capacity_bytes = 12 * 4096 + INDEX_BYTES + 2 * 4096  # of what tells of two salts
    second = await start(capacity_bytes=capacity_bytes)
    second.bound(Bounds([Quota(None, None, l2_bytes=6 * 4000)], lambda quota: quota.l2_bytes))
    await slow_recovery.reached()
    assert await put_of(second, "a", range(20, 24)) == [True] * 4  # of the eight before, nothing is known yet
    assert await put_of(second, "b", [24]) == [True]
    slow_recovery.open()
    there = await listing(second)
    assert {key(n) for n in (8, 9, 20, 21, 22, 23, 24)} <= set(there)  # who has more than his part gives way
    await second.delete([])  # after all that was given up
    assert allocated(directory) <= capacity_bytes
    second.check_integrity()
    assert await put_of(second, "a", [25]) == [True]
    there = await listing(second)
    assert sum(key(n) in there for n in (*range(8), 20, 21, 22, 23, 25)) == 6  # the excess is lost with the next store
    assert all(key(n) in there for n in (8, 9, 24))
    second.check_integrity()


async def test_a_delete_waits_for_recovery(start, slow_recovery):
    slow_recovery.open()
    first = await start()
    await put(first, range(3), 1000)
    await first.close()
    slow_recovery.shut()
    second = await start()
    await slow_recovery.reached()
    deleting = asyncio.create_task(second.delete([key(1)]))
    await asyncio.sleep(0.01)
    assert not deleting.done()
    slow_recovery.open()
    assert await deleting == 1
    assert set(await listing(second)) == {key(0), key(2)}
    assert second.usage().objects == 2


async def test_what_was_damaged_before_the_start_is_found_out_by_its_load(start, directory):
    first = await start()
    await put(first, range(3), 1000)
    await first.close()
    damage(directory, key(0), flipped(5))
    second = await start()
    assert await get(second, range(3), 1000) == [CORRUPT, content(1, 1000), content(2, 1000)]
    assert set(await listing(second)) == {key(1), key(2)}
    await second.close()
    assert set(await listing(await start())) == {key(1), key(2)}


async def test_a_load_that_came_too_early_does_not_belie_the_store(start, monkeypatch):
    backend = await start()
    gate = Gate(monkeypatch, "pwritev")
    storing = asyncio.create_task(put(backend, [1], 1000))
    await gate.reached()
    assert await get(backend, [1], 1000) == [GONE]
    gate.open()
    assert await storing == [True]
    assert backend.usage().objects == 1


async def test_a_directory_that_is_larger_than_its_new_capacity_shrinks_at_the_start(start, directory):
    first = await start()
    await put(first, range(100), 5000)
    await find(first, range(50, 60))
    await first.close()
    assert allocated(directory) > 100 * 8192
    second = await start(capacity_bytes=30 * 8192)
    assert set(await listing(second)) > {key(n) for n in range(50, 60)}
    assert await second.delete([]) == 0  # after all that was given up
    assert allocated(directory) <= 30 * 8192


@pytest.mark.parametrize("killed", [False, True])
async def test_the_order_of_use_survives_a_restart(start, directory, killed):
    first = await start()
    for n in range(10):
        await put(first, [n], 1000)
    if killed:
        shutil.copytree(directory, directory.with_name("copy"))  # what a kill leaves: nothing was put in order
        await first.close()
        shutil.rmtree(directory)
        directory.with_name("copy").rename(directory)
        order = list(range(10))
    else:
        await find(first, [3, 1, 4])
        await first.close()
        order = [0, 2, 5, 6, 7, 8, 9, 4, 1, 3]
    second = await start(capacity_bytes=11 * 4096 + INDEX_BYTES)
    assert len(await listing(second)) == 10
    await second.delete([])
    for n in range(100, 105):
        await put(second, [n], 1000)
    left = {k for k in await listing(second) if k in {key(n) for n in range(10)}}
    assert left == {key(n) for n in order[-len(left) :]}
    assert 0 < len(left) < 10


async def test_an_index_that_cannot_be_read_is_logged_and_all_else_works(start, directory, monkeypatch, caplog):
    first = await start()
    await put(first, [1], 1000)
    await first.close()
    real = os.pread

    def pread(fd, size, offset):
        if offset > 0:
            raise OSError(errno.EIO, "no")
        return real(fd, size, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", pread)
        second = await start()
        assert await listing(second) == {}
        assert "cannot be read" in caplog.text
        assert await put(second, [2], 1000) == [True]
        assert await get(second, [2], 1000) == [content(2, 1000)]
        await second.close()
    assert set(await listing(await start())) == {key(1), key(2)}  # what was not read was not written anew without it


async def test_an_index_with_a_bad_sector_costs_nobody_else_anything(start, directory, tmp_path, monkeypatch, caplog):
    for number, writing in enumerate([await start(), await start()]):
        await put(writing, [number], 1000)
    left = shutil.copytree(directory, tmp_path / "left")  # of two that died
    (bad,) = [path for path in left.glob("*.idx") if key(1) in places_of(path)]
    real = os.pread

    def pread(fd, size, offset):
        if offset and os.readlink(f"/proc/self/fd/{fd}") == str(bad):
            raise OSError(errno.EIO, "a bad sector")
        return real(fd, size, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", pread)
        backend = FileSystemBackend(left)
        await backend.open()
        assert set(await listing(backend)) == {key(0)}
        assert await find(backend, range(3)) == [True, False, False]
        assert await put(backend, [2], 1000) == [True]
        await backend.close()
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 1
    backend = FileSystemBackend(left)
    await backend.open()
    assert set(await listing(backend)) == {key(n) for n in range(3)}
    assert await get(backend, range(3), 1000) == [content(n, 1000) for n in range(3)]
    await backend.close()


async def test_foreign_things_are_skipped_and_left_alone(start, directory, tmp_path):
    first = await start()
    await put(first, [1], 1000)
    await first.close()
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(1000))
    (directory / "README").write_text("hello")
    (directory / "tmp.something").write_bytes(b"x")
    (directory / segment_name(7, 0)).symlink_to(outside)
    (directory / index_name(7, 0)).symlink_to(outside)
    (directory / index_name(8, 0)).mkdir()
    os.mkfifo(directory / index_name(9, 0))
    (directory / f"{key(1).chunk_hash.hex()}.0.0.kv").write_bytes(b"of an older version")
    before = set(names(directory)) - {path.name for path in directory.glob("*.idx") if path.is_file()}
    second = await start()
    assert set(await listing(second)) == {key(1)}
    assert await put(second, [2], 1000) == [True]
    await second.close()
    assert before - set(names(directory)) <= {segment_name(7, 0)}  # set aside: no index tells of it
    assert outside.read_bytes() == bytes(1000)


# What directory it is.


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a" * 64 + ".0.0.kv", b"x", "version 1"),
        ("FORMAT", b"async_cache log of segments, version 3\n", "version 3"),
        ("FORMAT", b"something else", "not that of a store"),
        ("holiday.jpg", b"x", "holiday.jpg"),
    ],
)
async def test_a_directory_of_something_else_is_refused_and_left_alone(directory, name, data, says):
    directory.mkdir()
    (directory / name).write_bytes(data)
    backend = FileSystemBackend(directory)
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        await backend.open()
    assert says in str(caught.value)
    await backend.close()
    assert names(directory) == [name]
    assert (directory / name).read_bytes() == data


@pytest.mark.parametrize("name", ["lost+found", ".snapshot"])
async def test_what_file_systems_put_into_an_empty_directory_is_no_matter(start, directory, name):
    (directory / name).mkdir(parents=True)
    assert await put(await start(), [1], 1000) == [True]


async def test_a_store_that_is_emptied_leaves_its_name_alone(start, directory):
    backend = await start()
    await put(backend, range(10), 1000)
    assert await backend.delete([key(n) for n in range(10)]) == 10
    assert [name for name in names(directory) if name.endswith(".seg")] == []
    await backend.close()
    assert names(directory) == ["FORMAT"]


# Damage.


@pytest.mark.parametrize("size_bytes", [1000, BLOCK_BYTES, LONG])
@pytest.mark.parametrize(
    "change",
    [lambda b: bytes(len(b)), lambda b: b[1:] + b[:1], flipped(0), flipped(999), flipped(-1), lambda b: b[500:]],
)
async def test_a_body_that_is_not_the_one_is_corrupt_and_removed(start, directory, size_bytes, change):
    backend = await start()
    await put(backend, [1, 2], size_bytes)
    damage(directory, key(1), change)
    assert await get(backend, [1, 2], size_bytes) == [CORRUPT, content(2, size_bytes)]
    assert await backend.delete([]) == 0
    assert set(places(directory)) == {key(2)}
    assert backend.usage().objects == 1


async def test_the_body_of_another_object_is_corrupt(start, directory):
    backend = await start()
    keys = [key(1), key(2), key(1, 1), key(1, 0, 1)]
    for other in range(1, 4):
        await backend.store(keys, views([content(n, 5000) for n in range(4)]))
        place_of(directory, key(1)).write(place_of(directory, keys[other]).read())
        assert await get(backend, [1], 5000) == [CORRUPT]


async def test_an_object_of_another_size_is_corrupt(start):
    backend = await start()
    for size_bytes in (4999, 5001, 8192):
        await put(backend, [1], 5000)
        assert await get(backend, [1], size_bytes) == [CORRUPT]


# Faults of the disk.


class BadSectors:
    """Reads of `os` fail where some objects lie."""

    def __init__(self, monkeypatch, directory):
        self._monkeypatch, self._directory, self._real = monkeypatch, directory, os.preadv

    def at(self, keys, code=errno.EIO, times=None):
        """From now on reads fail of what these objects have; so often, or for ever."""
        bad = list(map(places(self._directory).get, keys))
        left = [times]

        def preadv(fd, parts, offset, flags=0):
            end = offset + sum(map(len, parts))
            for place in bad:
                here = os.readlink(f"/proc/self/fd/{fd}") == str(place.path)
                if here and offset < place.offset + place.size_bytes and place.offset < end and left[0] != 0:
                    left[0] = left[0] and left[0] - 1
                    raise OSError(code, os.strerror(code))
            return self._real(fd, parts, offset, flags)

        self._monkeypatch.setattr(os, "preadv", preadv)

    def healed(self):
        self._monkeypatch.setattr(os, "preadv", self._real)


@pytest.fixture
def bad_sectors(monkeypatch, directory):
    return BadSectors(monkeypatch, directory)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
async def test_what_cannot_be_read_is_lost_alone_and_the_next_store_replaces_it(start, directory, bad_sectors, code):
    backend = await start()
    await put(backend, range(3), 1000)
    bad_sectors.at([key(1)], code)
    assert await get(backend, range(3), 1000) == [content(0, 1000), FAILED, content(2, 1000)]
    assert await find(backend, range(3)) == [True, False, True]
    bad_sectors.healed()
    assert await find(backend, [1]) == [False]
    assert await put(backend, [1], 1000) == [True]
    assert await get(backend, range(3), 1000) == [content(n, 1000) for n in range(3)]


@pytest.mark.parametrize("call", ["preadv", "close"])
async def test_a_fault_of_the_moment_costs_nothing(start, monkeypatch, bad_sectors, call):
    backend = await start()
    await put(backend, range(3), 1000)
    if call == "preadv":
        bad_sectors.at([key(1)], errno.ESTALE, times=3)
    else:
        real = os.close

        def close(fd):
            real(fd)
            raise OSError(errno.EIO, "no")

        monkeypatch.setattr(os, "close", close)
        for name in names(backend.path):
            backend._log.directory.files.forget(name)
    assert await get(backend, range(3), 1000) == [content(n, 1000) for n in range(3)]


async def test_where_nothing_can_be_read_the_disk_is_blamed_first_and_then_the_objects(start, bad_sectors):
    backend = await start()
    await put(backend, range(3), 1000)
    bad_sectors.at([key(1), key(2)])
    for numbers in ([1], [2]):
        with pytest.raises(BackendError, match="Input/output error") as caught:
            await get(backend, numbers, 1000)
        assert caught.value.__cause__.errno == errno.EIO
    assert await find(backend, [1, 2]) == [True, True]  # the disk may heal
    bad_sectors.healed()
    assert await get(backend, [2], 1000) == [content(2, 1000)]
    bad_sectors.at([key(1), key(2)])
    assert await get(backend, [1], 1000) == [FAILED]
    with pytest.raises(BackendError):
        await get(backend, [2], 1000)
    assert await find(backend, range(3)) == [True, False, True]
    assert await put(backend, range(3), 1000) == [True] * 3
    bad_sectors.healed()
    assert await get(backend, range(3), 1000) == [content(n, 1000) for n in range(3)]


async def test_an_object_that_made_a_load_fail_is_replaced_by_the_next_store(start, directory, bad_sectors):
    backend = await start()
    await put(backend, [1], 1000)
    before = place_of(directory, key(1))
    bad_sectors.at([key(1)], times=4)
    with pytest.raises(BackendError):
        await get(backend, [1], 1000)
    assert await put(backend, [1], 1000) == [True]
    assert place_of(directory, key(1)) != before
    assert backend.usage().used_bytes == 1000


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
async def test_what_is_corrupt_and_cannot_be_removed_is_a_miss_and_can_be_replaced(start, directory, monkeypatch, code):
    backend = await start()
    await put(backend, range(2), 1000)
    damage(directory, key(1), flipped(3))

    def pwrite(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        assert await get(backend, [0, 1], 1000) == [content(0, 1000), CORRUPT]
        assert await find(backend, [0, 1]) == [True, False]
        await backend.delete([])
    assert await put(backend, [1], 1000) == [True]
    assert await get(backend, [0, 1], 1000) == [content(0, 1000), content(1, 1000)]


async def test_recovery_knows_the_head_of_a_prefix_from_its_tail(start):
    backend = await start()
    await put(backend, range(40), 100)
    await backend.close()
    again = await start(capacity_bytes=40 * 4096 + INDEX_BYTES)
    await again._log.following.recovered.wait()
    await put(again, range(100, 120), 100)
    found = await find(again, range(40))
    assert found == sorted(found, reverse=True)
    assert 15 <= sum(found) <= 24


async def test_a_full_disk_fails_one_object_and_leaves_no_rest(start, directory, monkeypatch):
    backend = await start()
    real = os.pwritev
    full = list(range(100))

    def pwritev(fd, buffers, offset):
        if full and sum(map(len, buffers)) > MIB:
            full.pop()
            raise OSError(errno.EDQUOT, "disk full")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    assert await put(backend, [1], 1000) == [True]
    assert await backend.lookup([key(1)]) == [True]
    with pytest.raises(BackendError, match="disk full"):
        await put(backend, [3], LONG)
    assert set(places(directory)) == {key(1)}
    assert await find(backend, [1, 3]) == [True, False]
    assert backend.usage().used_bytes == 1000
    full.clear()
    assert await put(backend, [2, 3], LONG) == [True, True]
    backend.unpin([key(1)])


@pytest.mark.parametrize("call", ["pwritev", "pwrite"])
async def test_a_full_disk_takes_what_is_new_for_what_is_old(start, directory, monkeypatch, call):
    """Bodies, and the records of an index, find no room until something has left."""
    backend = await start()
    await put(backend, range(5), 5000)
    real, punch, full = getattr(os, call), files._fallocate, [True]

    def write(fd, *arguments):
        if full:
            raise OSError(errno.ENOSPC, "disk full")
        return real(fd, *arguments)

    def fallocate(fd, mode, *arguments):
        if mode & 2:
            full.clear()
        return punch(fd, mode, *arguments)

    monkeypatch.setattr(files, "_fallocate", fallocate)
    monkeypatch.setattr(os, call, write)
    assert await put(backend, [5], 5000) == [True]
    assert await get(backend, [5], 5000) == [content(5, 5000)]


@pytest.mark.parametrize("direct", [False, True])
async def test_short_reads_and_writes_are_continued(start, monkeypatch, direct):
    backend = await start(direct=direct)
    read, write = os.preadv, os.pwritev
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:60_000]], offset))
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, offset: write(fd, [buffers[0][:60_000]], offset))
    for size_bytes in (1, 1000, 60_000, 65_536, LONG, MIB):
        assert await put(backend, [size_bytes], size_bytes) == [True]
        assert await get(backend, [size_bytes], size_bytes) == [content(size_bytes, size_bytes)]


async def test_a_lookup_that_fails_raises_and_pins_nothing(start, monkeypatch):
    backend = await start()
    await put(backend, [1], 1000)
    await listing(backend)
    monkeypatch.setattr(following, "SEEN_SECONDS", -1)

    def fstat(*_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "fstat", fstat)
    assert await find(backend, [1, 2]) == [True, False]  # what is known is said all the same
    with pytest.raises(BackendError):
        await backend.lookup([key(2), key(3)])
    assert backend.pins == 0
    monkeypatch.undo()


async def test_bodies_survive_before_the_records_that_tell_of_them(start, monkeypatch):
    backend = await start(durability="fsync")
    events = []
    real = {name: getattr(os, name) for name in ("pwritev", "pwrite", "fdatasync", "fsync")}

    def recorded(name, real):
        def call(fd, *arguments):
            events.append(f"{name} {os.readlink(f'/proc/self/fd/{fd}').rpartition('.')[2]}")
            return real(fd, *arguments)

        return call

    for name, call in real.items():
        monkeypatch.setattr(os, name, recorded(name, call))
    assert await put(backend, [1, 2], 1000) == [True, True]
    (of_directory,) = [event for event in events if event.startswith("fsync ")]
    assert events == ["pwritev seg", "fdatasync seg", of_directory, "pwrite idx", "fdatasync idx"]
    events.clear()
    assert await put(backend, [3, 4], 1000) == [True, True]
    assert events == ["pwritev seg", "fdatasync seg", "pwrite idx", "fdatasync idx"]


async def test_stores_that_wait_together_are_flushed_together(start, monkeypatch):
    backend = await start(durability="fsync")
    await put(backend, [99], 1000)
    gate = Gate(monkeypatch, "fdatasync")
    first = asyncio.create_task(put(backend, [0], 1000))
    await gate.reached()  # while it is flushed, the others are written
    tasks = [asyncio.create_task(put(backend, [n], 1000)) for n in range(1, 20)]
    while len(backend._log.directory.waiting) < 19:  # noqa: ASYNC110 (nothing tells of it)
        await asyncio.sleep(0)
    gate.open()
    assert await asyncio.gather(first, *tasks) == [[True]] * 20
    assert gate.calls == 4  # and not forty: of bodies and of records, for the first and for all others
    assert await get(backend, range(20), 1000) == [content(n, 1000) for n in range(20)]


async def test_many_objects_are_written_and_read_by_few_calls(start, monkeypatch):
    backend = await start(threads=1)
    calls = []
    for name in ("pwritev", "preadv", "pwrite", "pread", "open", "close", "fstat", "stat", "rename", "unlink", "utime"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    written, read = [], []
    for _ in range(3):  # on a busy machine, what the store does every second comes between
        calls.clear()
        assert all(await put(backend, range(64), 65_536))
        written.append(len(calls))
        calls.clear()
        assert await get(backend, range(64), 65_536) == [content(n, 65_536) for n in range(64)]
        read.append(len(calls))
        await backend.delete([key(n) for n in range(64)])
    assert min(written) <= 64 * 8 // 10
    assert min(read) <= 8


async def test_what_was_found_is_announced_until_its_promise_is_given_up(start, monkeypatch):
    backend = await start()
    await put(backend, range(6), 5000)
    announced = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, begin, size_bytes, how: announced.append((begin, size_bytes)))
    monkeypatch.setattr(runs, "_is_cached", lambda fd, offset: False)
    assert await backend.lookup([key(n) for n in range(4)]) == [True] * 4
    backend.unpin([key(1)])
    assert await get(backend, [0], 5000) == [content(0, 5000)]
    while not announced:  # noqa: ASYNC110 (nobody tells of it)
        await asyncio.sleep(0.001)
    await backend._log.work.idle()
    assert announced == [(2 * 8192, 8192 + 5000)]  # and neither what is loaded, nor what nobody waits for
    assert backend.lookup_nowait([key(5).chunk_hash], [(0, 0)]) == [True]
    await backend._log.work.idle()
    while len(announced) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert announced[1:] == [(5 * 8192, 5000)]


@pytest.mark.parametrize("size_bytes", [65_536, LONG])
async def test_what_is_left_of_a_load_is_announced_where_a_disk_has_it(start, monkeypatch, size_bytes):
    """Bodies that take several system calls, too."""
    backend = await start(threads=1)
    await put(backend, range(0, 24, 2), size_bytes)
    await put(backend, range(1, 24, 2), size_bytes)
    announced = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, begin, length, how: announced.append(length))
    monkeypatch.setattr(runs, "_is_cached", lambda fd, offset: False)
    preadv, clock = os.preadv, [0.0]

    def taking(seconds):
        def read(*arguments):
            clock[0] += seconds
            return preadv(*arguments)

        return read

    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    for seconds, is_announced in ((0.0002, False), (0.005, True)):
        monkeypatch.setattr(os, "preadv", taking(seconds))
        assert await get(backend, range(24), size_bytes) == [content(n, size_bytes) for n in range(24)]
        assert bool(announced) is is_announced


async def test_what_the_page_cache_has_is_not_announced(start, monkeypatch):
    backend = await start()
    await put(backend, range(200), 5000)
    announced, probed = [], []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: announced.append(arguments))
    monkeypatch.setattr(runs, "_is_cached", lambda fd, offset: probed.append(offset) or True)
    apart = [key(n) for n in range(0, 200, 2)]
    assert await backend.lookup(apart) == [True] * 100
    while not probed:  # noqa: ASYNC110 (nobody tells of it)
        await asyncio.sleep(0.001)
    await backend._log.work.idle()
    assert len(probed) <= 5
    assert announced == []
    backend.unpin(apart)


# Cancelling.


async def test_a_cancelled_load_ends_when_no_thread_touches_its_buffers(start, monkeypatch):
    backend = await start(threads=2)
    await put(backend, range(6), LONG)
    gate = Gate(monkeypatch, "preadv")
    task = asyncio.create_task(get(backend, range(6), LONG))
    await gate.reached()
    for _ in range(5):
        task.cancel()
        await asyncio.wait([task], timeout=0)
        await asyncio.sleep(0)
        assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert gate.calls <= 2  # one block in each thread, and nothing more
    assert await get(backend, range(6), LONG) == [content(n, LONG) for n in range(6)]  # half read is not corrupt


async def test_a_cancelled_call_that_has_not_begun_ends_at_once(start, monkeypatch):
    backend = await start(threads=1)
    await put(backend, [1, 2], 1000)
    gate = Gate(monkeypatch, "preadv")
    stuck = asyncio.create_task(get(backend, [1], 1000))
    await gate.reached()
    buffer = bytearray(1000)
    queued = asyncio.create_task(backend.load([key(2)], views([buffer])))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    gate.open()
    assert await stuck == [content(1, 1000)]
    assert await get(backend, [1], 1000) == [content(1, 1000)]
    assert buffer == bytes(1000)


async def test_a_cancelled_store_waits_and_leaves_whole_objects_only(start, directory, monkeypatch):
    backend = await start(capacity_bytes=10 * 9 * MIB + INDEX_BYTES)
    await put(backend, [0], 9 * MIB)
    gate = Gate(monkeypatch, "pwritev")
    task = asyncio.create_task(put(backend, [1, 2], 9 * MIB))
    await gate.reached()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await backend.delete([]) == 0  # after what was cleared
    assert set(places(directory)) == {key(0)}
    assert allocated(directory) <= 9 * MIB + INDEX_BYTES
    assert backend.usage().objects == 1
    assert backend.pins == 0
    backend.check_integrity()
    assert await put(backend, range(1, 10), 9 * MIB) == [True] * 9  # all the room is there again


async def test_what_a_cancelled_store_has_written_is_counted(start, monkeypatch):
    backend = await start()
    write, written, proceed = os.pwritev, threading.Event(), threading.Event()

    def held(*args):
        count = write(*args)
        written.set()
        assert proceed.wait(100)
        return count

    monkeypatch.setattr(os, "pwritev", held)
    task = asyncio.create_task(put(backend, [1, 2], 1000))
    assert await asyncio.to_thread(written.wait, 30)
    task.cancel()
    await asyncio.sleep(0)
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await put(backend, [3], 1000) == [True]  # behind what the cancelled one had under way
    assert backend.usage().objects == 3
    assert await get(backend, [1, 2], 1000) == [content(1, 1000), content(2, 1000)]


async def test_a_cancelled_lookup_ends_at_once_and_pins_nothing(start, monkeypatch):
    backend = await start()
    await put(backend, [1], 1000)
    await listing(backend)
    monkeypatch.setattr(following, "SEEN_SECONDS", -1)
    gate = Gate(monkeypatch, "stat")
    task = asyncio.create_task(backend.lookup([key(1), key(2)]))
    await gate.reached()
    assert backend.pins == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.pins == 0
    gate.open()


async def test_loads_do_not_queue_behind_stores(start, monkeypatch):
    backend = await start()
    await put(backend, [1], 1000)
    gate = Gate(monkeypatch, "pwritev")
    task = asyncio.create_task(put(backend, [2], 1000))
    await gate.reached()
    assert await get(backend, [1], 1000) == [content(1, 1000)]
    assert await find(backend, [1, 9]) == [True, False]
    gate.open()
    assert await task == [True]


async def test_a_delete_does_not_wait_for_a_long_store(start, directory, monkeypatch):
    backend = await start()
    await put(backend, [1, 2], 1000)
    gate = Gate(monkeypatch, "pwritev")
    long = asyncio.create_task(put(backend, [3], LONG))
    await gate.reached()
    assert await backend.delete([key(1)]) == 1
    assert set(places(directory)) == {key(2)}
    assert not long.done()
    gate.open()
    assert await long == [True]


async def test_what_several_store_at_once_is_written_once(start, monkeypatch):
    backend = await start()
    gate = Gate(monkeypatch, "pwritev")
    tasks = [asyncio.create_task(put(backend, [1, 2], 1000)) for _ in range(5)]
    await gate.reached()
    tasks.append(asyncio.create_task(put(backend, [2, 3], 1000)))
    while len(backend._log.storing._writes) < 2:  # noqa: ASYNC110 (nobody tells of it)
        await asyncio.sleep(0.001)
    gate.open()
    assert await asyncio.gather(*tasks) == [[True, True]] * 6
    assert gate.calls == 2
    backend.check_integrity()


async def test_who_waits_for_the_store_of_another_stores_itself_when_that_fails(start, monkeypatch):
    backend = await start()
    gate = Gate(monkeypatch, "pwritev")
    real = os.pwritev

    def pwritev(*args):
        count = real(*args)
        if gate.calls <= 2:  # together with others, and alone
            raise OSError(errno.EIO, "no")
        return count

    monkeypatch.setattr(os, "pwritev", pwritev)
    first, second = (asyncio.create_task(put(backend, [1], 1000)) for _ in range(2))
    await gate.reached()
    gate.open()
    with pytest.raises(BackendError):
        await first
    assert await second == [True]
    assert await get(backend, [1], 1000) == [content(1, 1000)]


async def test_a_load_reads_the_body_that_was_kept_of_two(start, monkeypatch):
    """The one that it was told of is given up while it reads."""
    backend = await start()
    await put(backend, [1, 2], 1000)
    gate = Gate(monkeypatch, "preadv")
    loading = asyncio.create_task(get(backend, [1, 2], 1000))
    await gate.reached()
    assert await backend.delete([key(1)]) == 1
    assert await put(backend, [1], 1000) == [True]
    gate.open()
    assert await loading == [content(1, 1000), content(2, 1000)]


async def test_a_segment_that_cannot_be_opened_is_set_aside_with_one_line(start, directory, monkeypatch, caplog):
    backend = await start(segment_bytes=4096 * 10)
    await put(backend, range(30), 1000)
    stuck = place_of(directory, key(0)).path
    real = files.open_file

    def refuse(where, name, flags=os.O_RDWR):
        if name.startswith(stuck.name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return real(where, name, flags)

    monkeypatch.setattr(files, "open_file", refuse)
    backend._log.directory.files.forget(stuck.name)
    for number in range(2):
        with pytest.raises(BackendError):
            await get(backend, [number], 1000)
    assert await find(backend, range(30)) == [False] * 10 + [True] * 20
    assert len([record for record in caplog.records if "set aside" in record.message]) == 1
    assert await get(backend, range(10, 30), 1000) == [content(n, 1000) for n in range(10, 30)]
    assert await put(backend, [0], 1000) == [True]
    monkeypatch.undo()
    await backend.close()
    there = [0, *range(10, 30)]
    assert await get(await start(), there, 1000) == [content(n, 1000) for n in there]
    assert stuck.with_name(f"{stuck.name}.bad").stat().st_blocks


# Room.


async def test_all_objects_of_a_chunk_are_evicted_together(start, directory):
    backend = await start(capacity_bytes=4 * 4096 + INDEX_BYTES)
    keys = [key(n, rank) for n in range(2) for rank in range(2)]
    assert all(await backend.store(keys, views([content(0, 4096)] * 4)))
    await find(backend, [0])
    assert await put(backend, [2], 4096) == [True]
    assert set(await listing(backend)) == {key(0), key(0, 1), key(2)}
    assert backend.usage().used_bytes == 3 * 4096


async def test_a_store_does_not_evict_the_chunk_that_it_completes(start):
    backend = await start(capacity_bytes=2 * 4096 + INDEX_BYTES)
    await put(backend, [0], 4096)
    await put(backend, [1], 4096)
    assert await backend.store([key(0, 1)], views([content(0, 4096)])) == [True]
    assert set(await listing(backend)) == {key(0), key(0, 1)}
    assert await backend.store([key(0, 2)], views([content(0, 4096)])) == [False]


async def test_a_directory_of_the_least_size_stores_a_page_of_a_cache_and_a_smaller_one_is_refused(directory):
    config = CacheConfig(l1_bytes=2**20, l2=[f"fs://{directory}?capacity={filesystem.LEAST_CAPACITY_BYTES}"])
    async with AsyncCache(config) as cache:
        await fill(cache, make_prompt(1))
        assert (await cache.flush()).written == 1
    with pytest.raises(ConfigError, match=f"at least {filesystem.LEAST_CAPACITY_BYTES}"):
        FileSystemBackend(directory, capacity_bytes=filesystem.LEAST_CAPACITY_BYTES - 1)


async def test_bytes_in_flight_count(start, monkeypatch):
    backend = await start(capacity_bytes=4 * 4096 + INDEX_BYTES)
    gate = Gate(monkeypatch, "pwritev")
    first = asyncio.create_task(put(backend, [1], 3 * 4096))
    await gate.reached()
    assert await put(backend, [2], 2 * 4096) == [False]
    assert backend.usage().used_bytes == 0
    gate.open()
    assert await first == [True]
    assert await put(backend, [2], 2 * 4096) == [True]
    assert set(await listing(backend)) == {key(2)}


async def test_if_not_all_fit_those_that_fit_are_stored(start):
    backend = await start(capacity_bytes=4 * 4096 + INDEX_BYTES)
    await put(backend, [0], 2 * 4096)
    assert await backend.lookup([key(0)]) == [True]
    assert await put(backend, [1, 2, 3], 4096) == [True, True, False]
    backend.unpin([key(0)])


async def test_the_bound_is_for_what_the_disk_has(start, directory):
    """Bodies in whole pages, and indexes, however many objects come and go."""
    backend = await start(capacity_bytes=MIB)
    for n in range(0, 2000, 100):
        assert await put(backend, range(n, n + 100), 1) == [True] * 100
        await backend.delete([key(n + 5)])
        assert allocated(directory) <= MIB
    assert backend.usage().objects > 100


async def test_an_index_does_not_grow_without_end(start, directory):
    backend = await start()
    await put(backend, range(1000, 1010), 100)
    for _ in range(40):
        assert all(await put(backend, range(100), 100))
        assert await backend.delete([key(n) for n in range(100)]) == 100
    await backend._log.work.idle()
    assert sum(path.stat().st_size for path in directory.glob("*.idx")) < 3 * rewriting.SPARE_BYTES
    assert await get(backend, range(1000, 1010), 100) == [content(n, 100) for n in range(1000, 1010)]
    await backend.close()
    assert set(await listing(await start())) == {key(n) for n in range(1000, 1010)}


async def test_where_files_have_no_holes_the_bound_holds_all_the_same(start, directory, monkeypatch):
    monkeypatch.setattr(files, "_fallocate", lambda *_: ctypes.set_errno(errno.EOPNOTSUPP) or -1)
    backend = await start(capacity_bytes=MIB)
    for n in range(100):
        keys = [key(n, rank) for rank in range(3)]
        assert await backend.store(keys, views([content(n, 10_000)] * 3)) == [True] * 3
        await find(backend, [0])
        assert allocated(directory) <= MIB
    assert await get(backend, [0, 99], 10_000) == [content(0, 10_000), content(99, 10_000)]
    assert len(list(directory.glob("*.seg"))) > 20


@pytest.mark.parametrize("holes", [True, False])
async def test_what_is_deleted_is_gone_from_the_disk(start, directory, monkeypatch, holes):
    if not holes:
        monkeypatch.setattr(files, "_fallocate", lambda *_: ctypes.set_errno(errno.EOPNOTSUPP) or -1)
    backend = await start()
    await put(backend, range(3), 5000)
    place = place_of(directory, key(1))
    assert await backend.delete([key(1)]) == 1
    assert place.read() == bytes(5000) if holes else not place.path.exists()
    assert allocated(directory) < 3 * 8192 + INDEX_BYTES
    assert await get(backend, range(3), 5000) == [content(0, 5000), GONE, content(2, 5000)]


@pytest.mark.parametrize("how", ["deleted", "evicted"])
async def test_what_leaves_is_not_found_before_its_file_is_gone(start, directory, monkeypatch, how):
    backend = await start(capacity_bytes=4 * 4096 + INDEX_BYTES)
    await put(backend, [1], 1000)
    gate = Gate(monkeypatch, "pwrite")
    tasks = [asyncio.create_task(put(backend, [2], 1000))]
    await gate.reached()  # all changes wait
    leave = backend.delete([key(1)]) if how == "deleted" else put(backend, [3], 12_000)
    tasks.append(asyncio.create_task(leave))
    while backend._index.present([key(1)]) == [True]:  # noqa: ASYNC110 (nobody tells of it)
        await asyncio.sleep(0.001)
    assert key(1) in places(directory)
    assert await find(backend, [1]) == [False]
    tasks.append(asyncio.create_task(put(backend, [1], 500)))
    gate.open()
    await asyncio.gather(*tasks)


async def test_what_was_deleted_while_that_could_not_be_recorded_is_so_in_the_end(start, directory, monkeypatch):
    backend = await start()
    await put(backend, range(4), 5000)
    real = Journal.append

    def fail(*_):
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(Journal, "append", fail)
    for some in ([0], [1, 2, 3]):  # with the last one, the segment is empty
        with suppress(BackendError):
            await backend.delete([key(n) for n in some])
    assert await find(backend, range(4)) == [False] * 4
    monkeypatch.setattr(Journal, "append", real)
    await put(backend, [9], 5000)
    await backend.close()
    assert len(list(directory.glob("*.seg"))) == 1
    backend = await start()
    assert await find(backend, [*range(4), 9]) == [False] * 4 + [True]


async def test_a_file_that_cannot_be_removed_is_not_kept_open_by_who_tells_of_it(start, directory, monkeypatch, caplog):
    backend = await start()
    await put(backend, range(2), 5000)

    def truncate(*_):
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(os, "truncate", truncate)
    with suppress(BackendError):
        await backend.delete([key(0), key(1)])
    await backend.close()
    assert "injected" in caplog.text
    opened = [file.path for file in psutil.Process().open_files()]
    assert not [path for path in opened if path.startswith(str(directory))], "a record of a log has the error"


async def test_a_delete_wins_over_the_store_that_is_under_way(start, directory, monkeypatch):
    backend = await start()
    gate = Gate(monkeypatch, "pwritev")
    storing = asyncio.create_task(put(backend, [1, 2], 1000))
    await gate.reached()
    deleting = asyncio.create_task(backend.delete([key(1)]))
    await asyncio.sleep(0)
    gate.open()
    assert await storing == [False, True]
    await deleting
    assert set(places(directory)) == {key(2)}
    assert await put(backend, [1], 1000) == [True]


async def test_index_files_take_a_hundredth_of_what_the_bodies_take(start, directory, monkeypatch):
    """Also where all that is stored makes room for what comes; while they are written anew, they are there twice."""
    monkeypatch.setattr(rewriting, "SPARE_BYTES", 2000)
    size, each, at_most = 16_384, 64, 16 * 2**20
    backend = await start(capacity_bytes=at_most)
    for begin in range(0, 5 * at_most // size, each):
        assert all(await put(backend, range(begin, begin + each), size))
        await backend._log.work.idle()
        index_bytes = sum(path.stat().st_size for path in directory.glob("*.idx"))
        assert index_bytes < backend.usage().used_bytes / 100 + 2000
    assert backend.usage().used_bytes > at_most * 0.98


def test_a_million_chunks_fit_in_memory():
    chunks = 10**6 // 64  # the hash table is as full as with a million
    index, segment = Index(unit_bytes=4096), Segment(0, "", 0, 0)
    gc.collect()
    tracemalloc.start()
    for n in range(chunks):
        index.put(ObjectKey(n.to_bytes(32, "little"), 0, 0), 65536, segment.place(n, 2**63 + n))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / chunks < 185  # with its hash; the allocator rounds that up by another 15
    index.check_integrity()


# Several processes.

PROCESS = """
import asyncio, os, sys
from threading import Event
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.testing.conformance import content, get, key, put

async def main():
    backend = FileSystemBackend(sys.argv[1])
    await backend.open()
    {body}
    await backend.close()

asyncio.run(main())
"""


def process(directory, body):
    source = PROCESS.format(body=body.replace("\n", "\n    "))
    return subprocess.Popen([sys.executable, "-c", source, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def next_line(child):
    return asyncio.to_thread(child.stdout.readline)


async def test_the_rest_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(start, directory):
    stuck = (
        "real = os.pwritev\n"
        "os.pwritev = lambda *a: (real(*a), print('writing', flush=True), sys.stdin.read())\n"
        "await put(backend, [1], 100_000)"
    )
    with process(directory, stuck) as child:
        assert await next_line(child) == b"writing\n"
        backend = await start()
        assert await listing(backend) == {}
        assert allocated(directory) > 100_000
        child.send_signal(signal.SIGKILL)
    await backend.close()
    assert await listing(await start()) == {}
    assert allocated(directory) < 100_000


async def test_who_lives_answers_for_what_the_dead_have_left(start, directory, monkeypatch):
    monkeypatch.setattr(following, "ADOPT_SECONDS", 0)
    backend = await start()
    await put(backend, range(3), 1000)
    with process(
        directory, "await put(backend, range(10), 1000)\nprint('stored', flush=True)\nsys.stdin.read()"
    ) as child:
        assert await next_line(child) == b"stored\n"
        assert set(await listing(backend)) == {key(n) for n in range(10)}
        child.send_signal(signal.SIGKILL)
    await backend.lookup([key(99)])
    await backend._log.work.idle()
    await backend.close()
    assert len(list(directory.glob("*.idx"))) == 1
    again = await start()
    assert await get(again, range(10), 1000) == [content(n, 1000) for n in range(10)]


async def test_an_index_that_was_taken_for_a_dead_ones_before_its_lock_is_made_anew(start, directory, monkeypatch):
    real, taken = fcntl.flock, []

    def flock(fd, how):
        name = os.readlink(f"/proc/self/fd/{fd}")
        if name.endswith(".idx") and len(taken) < 2:
            taken.append(os.open(name, os.O_RDWR))
            real(taken[-1], how)
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    backend = await start()
    assert await put(backend, [1], 1000) == [True]
    assert len(taken) == 2
    assert len(list(directory.glob("*.idx"))) == 1
    for fd in taken:
        os.close(fd)
    await backend.close()
    assert set(await listing(await start())) == {key(1)}


@pytest.mark.parametrize("locks", ["of descriptions", "none"])
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
async def test_a_file_system_without_flock_stores_all_the_same(start, directory, monkeypatch, caplog, locks, code):
    def refuse(*_):
        raise OSError(code, "no locks")

    real = fcntl.fcntl
    monkeypatch.setattr(fcntl, "flock", refuse)
    if locks == "none":
        monkeypatch.setattr(
            fcntl, "fcntl", lambda fd, what, *a: refuse() if what == fcntl.F_OFD_SETLK else real(fd, what, *a)
        )
    first, second = await start(), await start()
    assert await put(first, range(3), 1000) == [True] * 3
    assert await put(second, range(2, 6), 1000) == [True] * 4
    assert await get(first, range(6), 1000) == [content(n, 1000) for n in range(6)]
    assert ("has no locks" in caplog.text) == (locks == "none")
    await first.close()
    await second.close()
    assert len(await listing(await start())) == 6


async def test_two_processes_write_the_same_objects_and_read_each_others(start, directory):
    body = (
        "print(sum([sum(await put(backend, [n, n + 1], 70_000)) for n in range(50)]), flush=True)\n"
        "sys.stdin.readline()\n"
        "print(await get(backend, range(100, 103), 5000) == [content(n, 5000) for n in range(100, 103)], flush=True)"
    )
    backend = await start()
    with process(directory, body) as child:
        for n in reversed(range(50)):
            assert await put(backend, [n, n + 1], 70_000) == [True, True]
        assert await next_line(child) == b"100\n"
        assert await put(backend, range(100, 103), 5000) == [True] * 3
        child.stdin.write(b"\n")
        child.stdin.flush()
        assert await next_line(child) == b"True\n"
    assert child.returncode == 0
    assert await get(backend, range(51), 70_000) == [content(n, 70_000) for n in range(51)]
    assert len(await listing(backend)) == 54
    await backend.close()
    assert len(await listing(await start())) == 54
    assert allocated(directory) <= 51 * 18 * 4096 + 3 * 8192 + 2 * INDEX_BYTES  # none is there twice


async def test_what_another_process_stored_is_found_and_pinned(start):
    backend, other = await start(capacity_bytes=6 * 4096 + 16_384 + INDEX_BYTES), await start()
    await listing(backend)
    await put(other, [1], 1000)
    assert await backend.lookup([key(1), key(2)]) == [True, False]
    assert backend.usage().used_bytes == 1000
    assert await put(backend, [2], 6 * 4096) == [False]
    assert await backend.delete([key(1)]) == 1
    assert await get(other, [1, 2], 1000) == [GONE, GONE]
    assert other.usage().used_bytes == 0
    backend.unpin([key(1)])


async def test_a_miss_asks_once_for_each_other_writer(start, monkeypatch):
    monkeypatch.setattr(following, "ADOPT_SECONDS", 3600)  # a look that adopts asks more
    backend, others = await start(), [await start() for _ in range(3)]
    for n, other in enumerate(others):
        await put(other, range(10 * n, 10 * n + 10), 1000)
    os.utime(backend.path, (0, 0))  # it has not changed for long
    assert await find(backend, range(40)) == [True] * 30 + [False] * 10
    calls = []
    for name in ("fstat", "stat", "open", "listdir", "pread"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    assert await find(backend, range(100, 400)) == [False] * 300
    assert calls.count("fstat") + calls.count("stat") <= len(others) + 3  # and the directory, and its path
    assert set(calls) <= {"fstat", "stat"}


async def test_who_is_alone_says_at_once_what_is_not_there(start, monkeypatch):
    backend = await start()
    await put(backend, range(3), 1000)
    await find(backend, [5])
    hashes, objects = [key(n).chunk_hash for n in (0, 1, 2, 9)], [key(0)[1:]]
    monkeypatch.setattr(following, "SEEN_SECONDS", 60)
    assert backend.lookup_nowait(hashes, objects) == [True, True, True, False]
    assert backend.pins == 3
    backend.unpin([key(n) for n in range(3)])
    assert backend.lookup_nowait(hashes, [(0, 0), (1, 0)]) is None  # some of a chunk only
    other = await start()
    await backend.lookup([key(77)])
    assert backend.lookup_nowait(hashes, objects) is None  # who is not alone asks
    assert backend.pins == 0
    await put(other, [9], 1000)
    assert await find(backend, [9]) == [True]


async def test_what_was_stored_twice_is_given_up_once(start, directory, monkeypatch):
    one, other = await start(), await start()
    await asyncio.gather(*(each._log.following.recovered.wait() for each in (one, other)))
    both = await asyncio.gather(put(one, range(20), 5000), put(other, range(20), 5000))
    assert both == [[True] * 20] * 2
    for backend in (one, other, one, other):
        await backend.lookup([key(99)])
        await backend.delete([])
    for backend in (one, other):
        assert await get(backend, range(20), 5000) == [content(n, 5000) for n in range(20)]
    assert allocated(directory) <= 20 * 8192 + 2 * INDEX_BYTES


async def test_what_is_there_is_not_written_again(start, monkeypatch):
    backend, other = await start(), await start()
    await listing(backend)
    await put(other, [1], 1000)
    monkeypatch.delattr(os, "pwritev")
    assert await put(backend, [1], 1000) == [True]
    assert backend.usage().used_bytes == 1000


async def test_a_stuck_disk_does_not_keep_the_process_from_its_end(directory):
    stuck = (
        "await put(backend, [1], 1000)\n"
        "os.preadv = lambda *_: print('stuck', flush=True) or sys.stdin.read()\n"
        "stuck = asyncio.ensure_future(get(backend, [1], 1000))\n"
        "await asyncio.sleep(0)\n"
        "sys.modules[FileSystemBackend.__module__].CLOSE_SECONDS = 0.01"
    )
    with process(directory, stuck) as child:
        assert await next_line(child) == b"stuck\n"
        assert await asyncio.to_thread(child.wait, 30) == 0


# O_DIRECT.


@pytest.fixture
def modes(monkeypatch):
    """Of each read and write, whether it went past the page cache."""
    modes = []

    def recorded(real):
        def call(fd, buffers, offset):
            count = real(fd, buffers, offset)
            modes.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
            return count

        return call

    monkeypatch.setattr(os, "preadv", recorded(os.preadv))
    monkeypatch.setattr(os, "pwritev", recorded(os.pwritev))
    return modes


def pages(count):
    return memoryview(mmap(-1, count * PAGESIZE))


async def round_trip(backend, of, source, target):
    source[:] = content(1, len(source))
    assert await backend.store([of], [source]) == [True]
    assert await backend.load([of], [target]) == [LOADED]
    assert source == target


@pytest.mark.parametrize("count", [1, 64, 65, 400])
async def test_direct_objects_of_whole_pages_go_past_the_page_cache(start, directory, modes, count):
    backend = await start(direct=True)
    await round_trip(backend, key(1), pages(count), pages(count))
    assert set(modes) == {True}
    damage(directory, key(1), flipped(-1))
    assert await backend.load([key(1)], [pages(count)]) == [CORRUPT]


async def test_direct_is_for_whole_pages(start, modes):
    backend = await start(direct=True)
    await round_trip(backend, key(1), pages(2)[:5000], pages(2)[:5000])
    assert set(modes) == {False}
    await round_trip(backend, key(2), pages(3)[1:-4095], pages(3)[1:-4095])  # the kernel refuses the memory
    await round_trip(backend, key(3), pages(2), pages(2))
    assert modes[-1]


async def test_without_direct_in_the_file_system_the_page_cache_is_used(start, modes, monkeypatch, caplog):
    backend = await start(direct=True)
    real, refused = fcntl.fcntl, []

    def refuse(fd, command, *flags):
        if command == fcntl.F_SETFL and flags == (os.O_DIRECT,):
            refused.append(fd)
            raise OSError(errno.EINVAL, "no")
        return real(fd, command, *flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    await round_trip(backend, key(1), pages(2), pages(2))
    await round_trip(backend, key(2), pages(2), pages(2))
    assert set(modes) == {False}
    assert len(refused) == 1
    assert "O_DIRECT" in caplog.text


# Opening and closing.


async def test_the_directory_is_made_for_its_owner_only(start, directory):
    backend = await start()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert backend.name == f"fs://{directory}"
    await put(backend, [1], 10)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


@pytest.mark.parametrize("place", ["file", "file/below", "dangling"])
async def test_a_path_that_is_no_directory_is_refused(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    backend = FileSystemBackend(tmp_path / place)
    with pytest.raises(ConfigError, match="cannot be used"):
        await backend.open()
    await backend.close()


async def test_a_directory_that_can_not_be_written_is_refused(directory, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may do all
    with pytest.raises(ConfigError, match="Permission denied"):
        await FileSystemBackend(directory).open()


async def test_a_disk_that_fails_at_the_start_is_a_backend_error(directory, monkeypatch):
    def makedirs(*_, **__):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "mkdir", makedirs)
    with pytest.raises(BackendError):
        await FileSystemBackend(directory).open()


@pytest.mark.parametrize("settings", [{"threads": 0}, {"capacity_bytes": 0}, {"durability": "maybe"}])
def test_settings_that_can_not_be_used_are_refused(settings):
    with pytest.raises(ConfigError):
        FileSystemBackend("/nowhere", **settings)


async def test_close_lets_go_of_threads_and_files(directory):
    gc.collect()
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    backend = FileSystemBackend(directory)
    await backend.open()
    await put(backend, [1], 1000)
    started = set(threading.enumerate()) - threads
    assert started
    await backend.close()
    await backend.close()
    for thread in started:  # has said that it ends, and does
        await asyncio.to_thread(thread.join, 30)
        assert not thread.is_alive()
    assert len(os.listdir("/proc/self/fd")) == files


async def test_close_does_not_wait_for_a_dead_disk_nor_take_its_files(start, monkeypatch):
    monkeypatch.setattr(filesystem, "CLOSE_SECONDS", 0.01)
    backend = await start()
    await put(backend, [1, 2], 1000)
    gate = Gate(monkeypatch, "preadv")
    task = asyncio.create_task(get(backend, [1, 2], 1000))
    await gate.reached()
    await backend.close()
    with pytest.raises(BackendError):
        await task
    gate.open()  # the thread finds its file where it was, and ends
    await backend._threads.loads.ended(5)


async def test_close_ends_a_recovery_that_is_under_way(start, slow_recovery, monkeypatch):
    slow_recovery.open()
    first = await start()
    await put(first, range(3), 1000)
    await first.close()
    slow_recovery.shut()
    monkeypatch.setattr(filesystem, "CLOSE_SECONDS", 0.01)
    backend = await start()
    await slow_recovery.reached()
    await backend.close()
    slow_recovery.open()
    await backend._threads.scans.ended(5)
    backend._log.directory.release()
    assert len(await listing(await start())) == 3  # what was not read was not written anew without it


async def test_a_cancelled_call_leaves_no_reference_to_its_buffers(start, monkeypatch):
    backend = await start(threads=1)
    await put(backend, [1], 1000)
    gate = Gate(monkeypatch, "preadv")
    running = asyncio.create_task(get(backend, [1], 1000))
    await gate.reached()
    memory = mmap(-1, PAGESIZE)
    with memoryview(memory) as view:
        queued = asyncio.create_task(backend.load([key(1)], [view]))
        await asyncio.sleep(0)
        queued.cancel()
        await asyncio.wait([queued])
    del queued
    gate.open()
    await running
    await get(backend, [1], 1000)  # the thread is past the call
    memory.close()


async def test_a_load_leaves_no_reference_to_its_buffers(start):
    backend = await start()
    await put(backend, [1], 1000)
    memory = mmap(-1, PAGESIZE)
    view = memoryview(memory)
    assert await backend.load([key(1), key(2)], [view[:1000], view[1000:]]) == [LOADED, GONE]
    view.release()
    memory.close()  # raises BufferError if a thread or an exception still has a view


def test_a_thread_that_is_stuck_for_ever_keeps_neither_close_nor_the_loop(directory, monkeypatch):
    gate = Gate(monkeypatch, "preadv")

    async def main():
        backend = FileSystemBackend(directory)
        await backend.open()
        await put(backend, [1], 1000)
        task = asyncio.create_task(backend.load([key(1)], [memoryview(bytearray(1000))]))
        await gate.reached()
        task.cancel()
        await backend.close()
        with pytest.raises(BackendError):
            await task

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 60
    gate.open()


async def test_a_close_that_is_cancelled_gives_a_stuck_thread_up_too(directory, monkeypatch):
    gate = Gate(monkeypatch, "preadv")
    backend = FileSystemBackend(directory)
    await backend.open()
    await put(backend, [1], 1000)
    task = asyncio.create_task(backend.load([key(1)], [memoryview(bytearray(1000))]))
    await gate.reached()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await backend.close()
    task.cancel()
    _, pending = await asyncio.wait([task], timeout=60)
    gate.open()
    assert not pending


async def test_an_open_that_is_cancelled_leaves_no_file_open(directory, monkeypatch):
    gate = Gate(monkeypatch, "access")  # the directory is open by then
    before = len(os.listdir("/proc/self/fd"))
    opening = asyncio.create_task(FileSystemBackend(directory).open())
    await gate.reached()
    opening.cancel()
    await asyncio.wait([opening])
    gate.open()
    for _ in range(60_000):
        if len(os.listdir("/proc/self/fd")) <= before:
            break
        await asyncio.sleep(0.001)
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_what_was_deleted_stays_so_when_who_deleted_it_has_written_its_index_anew(start, directory, tmp_path):
    """Its owner, who has heard of it but never said so, is killed then."""
    owner, other = await start(), await start()
    await put(owner, range(4), 5000)
    await put(other, [9], 5000)
    assert await other.delete([key(n) for n in range(4)]) == 4
    assert await find(owner, [77]) == [False]  # it hears of it
    assert await find(owner, [0]) == [False]
    await owner.delete([])  # waits for the segment to be removed
    await other.close()
    shutil.copytree(directory, tmp_path / "killed")
    after = FileSystemBackend(tmp_path / "killed")
    await after.open()
    assert await find(after, [0, 1, 2, 3, 9]) == [False] * 4 + [True]
    await after.close()


@pytest.mark.parametrize("first", [1, 2])
async def test_what_was_given_up_is_not_chosen_when_it_was_stored_anew(start, directory, first):
    """In whatever order the index files of dead writers are read: one has the old body, another says that it left."""
    second = 3 - first
    directory.mkdir()
    (directory / MARKER).write_bytes(MARKER_LINE % VERSION)
    old, new = (
        record(kind, key(0), (writer, 0, 0), 100, xxh3_64_intdigest(content(0, 100)))
        for kind, writer in ((Kind.PUT, first), (Kind.PUT, second))
    )
    drop = record(Kind.DROP, key(0), (first, 0, 0), 100, xxh3_64_intdigest(content(0, 100)))
    (directory / index_name(first, 0)).write_bytes(header(first) + old)
    (directory / index_name(second, 0)).write_bytes(header(second) + drop + new)
    (directory / segment_name(first, 0)).touch()
    (directory / segment_name(second, 0)).write_bytes(content(0, 100))
    for _ in range(2):
        backend = await start()
        assert await get(backend, [0], 100) == [content(0, 100)]
        await backend.close()


@pytest.fixture
def no_locks(monkeypatch):
    monkeypatch.setattr(journal, "lock", lambda fd: None)


@pytest.mark.usefixtures("no_locks")
async def test_without_locks_who_has_closed_is_followed_up_at_once(start, directory, monkeypatch):
    monkeypatch.setattr(filesystem, "CLOSE_SECONDS", 60)  # all of it is put in order, on a busy machine too
    for number in range(4):
        backend = await start()
        assert await put(backend, [number], 5000) == [True]
        assert await find(backend, range(number + 1)) == [True] * (number + 1)
        assert len([each async for each in backend.keys()]) == number + 1  # recovery has ended
        await backend.close()
    assert len(list(directory.glob("*.idx"))) == 1
    backend = await start()
    assert await backend.delete([key(number) for number in range(4)]) == 4
    await backend.close()
    assert [path.name for path in directory.iterdir()] == [MARKER]


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("is_dead", [True, False])
async def test_without_locks_who_does_not_touch_its_index_is_dead(start, directory, tmp_path, is_dead):
    killed = await start()
    await put(killed, range(4), 5000)
    elsewhere = tmp_path / "killed"
    shutil.copytree(directory, elsewhere)
    if is_dead:
        [index] = elsewhere.glob("*.idx")
        os.utime(index, (0, 0))
    for found in (True, False):
        after = FileSystemBackend(elsewhere)
        await after.open()
        assert await find(after, range(4)) == [found] * 3 + [True]
        await after.delete([key(n) for n in range(3)])
        assert await find(after, range(4)) == [False] * 3 + [True]
        await after.close()
    assert len(list(elsewhere.glob("*.idx"))) == (1 if is_dead else 2)


@pytest.mark.usefixtures("no_locks")
async def test_without_locks_who_lives_touches_its_index(start, directory, monkeypatch):
    monkeypatch.setattr(following, "BEAT_SECONDS", 0.001)
    await start()
    [index] = directory.glob("*.idx")
    os.utime(index, (0, 0))
    while index.stat().st_mtime == 0:  # noqa: ASYNC110 (a file has no event)
        await asyncio.sleep(0.001)
