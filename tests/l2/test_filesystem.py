import asyncio
import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from mmap import PAGESIZE, mmap
from pathlib import Path

import pytest

from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem import backend as filesystem
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.filesystem.directory import BLOCK_BYTES, RecordDirectory
from async_cache.l2.index import Index
from async_cache.l2.record import TRAILER, file_name, parse_name
from async_cache.prompt.keys import ObjectKey
from async_cache.testing.conformance import BackendSuite, content, find, get, key, put, views

LOADED, GONE, CORRUPT, FAILED = LoadOutcome
MIB = 2**20
LONG = 3 * BLOCK_BYTES + 5


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
        assert self._opened.wait(30)
        return self._real(*args, **kwargs)

    async def reached(self):
        assert await asyncio.to_thread(self._entered.wait, 30)

    def open(self):
        self._opened.set()


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


def names(directory):
    return sorted(os.listdir(directory))


def damage(directory, of, change):
    path = directory / file_name(of)
    path.write_bytes(change(path.read_bytes()))


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
        bad, real = (Path(backend.path) / file_name(key)).stat().st_ino, os.preadv

        def preadv(fd, *arguments):
            if os.fstat(fd).st_ino == bad:
                raise OSError(errno.EIO, "bad sector")
            return real(fd, *arguments)

        self.monkeypatch.setattr(os, "preadv", preadv)


class TestDirectConformance(TestConformance):
    async def make(self, tmp_path):
        return FileSystemBackend(tmp_path / "kv", direct=True, durability="fsync", threads=3)


# The format.


async def test_a_record_is_its_body_and_a_trailer(start, directory):
    backend = await start()
    await backend.store([ObjectKey(bytes(range(32)), 3, 7)], [memoryview(b"abc")])
    (name,) = names(directory)
    assert name == bytes(range(32)).hex() + ".3.7.kv"
    assert (directory / name).read_bytes().hex() == (
        "616263" + "616b767265630100" + bytes(range(32)).hex() + "0300000007000000" + "0300000000000000"
        "50392f89945faf78"  # XXH3-64 of "abc": 78af5f94892f3950
    )


@pytest.mark.parametrize(
    "name",
    ["", "a.0.0.kv", "0" * 64 + ".0.kv", "0" * 64 + ".00.0.kv", "0" * 64 + ".0.0.kv.tmp", "A" * 64 + ".0.0.kv",
     "0" * 64 + ".\u0660.0.kv", "0" * 64 + ".-1.0.kv", "0" * 64 + ".4294967296.0.kv",
     "0" * 64 + ".0.9999999999.kv", "0" * 64 + ".0.0.kv\n", "0" * 62 + ".0.0.kv"],
)  # fmt: skip
def test_other_names_are_foreign(name):
    assert parse_name(name) is None
    assert parse_name(file_name(key(1, 2, 3))) == key(1, 2, 3)


# Recovery.


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


async def test_a_lookup_does_not_wait_for_recovery(start, monkeypatch):
    await put(await start(), range(3), 1000)
    gate = Gate(monkeypatch, "scandir")
    second = await start()
    await gate.reached()
    assert await find(second, [0, 1, 9]) == [True, True, False]
    assert await get(second, [2], 1000) == [content(2, 1000)]
    gate.open()
    assert len(await listing(second)) == 3


async def test_what_is_deleted_while_recovery_runs_is_not_resurrected(start, monkeypatch):
    await put(await start(), range(3), 1000)
    scanned, merge = asyncio.Event(), asyncio.Event()

    async def take(*args, **kwargs):
        scanned.set()
        await merge.wait()
        return await real(*args, **kwargs)

    real = filesystem._take
    monkeypatch.setattr(filesystem, "_take", take)
    second = await start()
    await scanned.wait()
    assert await second.delete([key(1)]) == 1
    merge.set()
    assert set(await listing(second)) == {key(0), key(2)}
    assert second.usage().objects == 2


async def test_what_a_load_misses_while_recovery_runs_is_not_resurrected(start, directory, monkeypatch):
    await put(await start(), range(3), 1000)
    scanned, merge = asyncio.Event(), asyncio.Event()
    real = filesystem._take

    async def take(*args, **kwargs):
        scanned.set()
        await merge.wait()
        return await real(*args, **kwargs)

    monkeypatch.setattr(filesystem, "_take", take)
    second = await start()
    await scanned.wait()
    damage(directory, key(0), flipped(5))
    os.unlink(directory / file_name(key(1)))
    assert await get(second, range(3), 1000) == [CORRUPT, GONE, content(2, 1000)]
    merge.set()
    assert set(await listing(second)) == {key(2)}


async def test_a_load_that_came_too_early_does_not_belie_the_store(start, monkeypatch):
    backend = await start()
    gate = Gate(monkeypatch, "pwritev")
    storing = asyncio.create_task(put(backend, [1], 1000))
    await gate.reached()
    assert await get(backend, [1], 1000) == [GONE]
    gate.open()
    assert await storing == [True]
    assert backend.usage().objects == 1


async def test_recovery_evicts_the_oldest_above_the_capacity(start, directory):
    first = await start()
    await put(first, range(10), 1000)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    for age, n in enumerate(order):
        os.utime(directory / file_name(key(n)), ns=(0, 10**18 - age))
    second = await start(capacity_bytes=4000)
    assert set(await listing(second)) == {key(n) for n in order[:4]}
    assert await put(second, [100], 1000) == [True]
    assert set(await listing(second)) == {key(n) for n in order[:3] + [100]}
    assert await second.delete([]) == 0  # after all that was removed
    assert names(directory) == sorted(file_name(k) for k in await listing(second))


async def test_a_scan_that_fails_is_logged_and_all_else_works(start, monkeypatch, caplog):
    await put(await start(), [1], 1000)

    def scandir(_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "scandir", scandir)
    second = await start()
    assert await listing(second) == {}
    assert "recovery failed" in caplog.text
    assert await find(second, [1]) == [True]
    assert await put(second, [2], 1000) == [True]


async def test_foreign_things_are_skipped_and_left_alone(start, directory, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(1000))
    directory.mkdir()
    (directory / "README").write_text("hello")
    (directory / file_name(key(1))).symlink_to(outside)
    (directory / file_name(key(2))).mkdir()
    (directory / file_name(key(3))).write_bytes(b"short")
    os.mkfifo(directory / file_name(key(4)))
    (directory / "tmp.link").symlink_to(outside)
    (directory / "tmp.dir").mkdir()
    before = names(directory)
    backend = await start()
    assert await listing(backend) == {}
    assert await find(backend, range(1, 5)) == [False] * 4
    assert await get(backend, [1, 2, 4], 900) == [GONE, GONE, GONE]
    assert names(directory) == before
    assert await put(backend, [1, 2, 3, 4], 900) == [True, False, True, True]
    assert await get(backend, [1, 3, 4], 900) == [content(n, 900) for n in (1, 3, 4)]
    assert outside.read_bytes() == bytes(1000)


# Damage.


def flipped(index):
    return lambda data: data[:index] + bytes([data[index] ^ 1]) + data[index:][1:]


@pytest.mark.parametrize("size_bytes", [1000, BLOCK_BYTES, LONG])
@pytest.mark.parametrize(
    "change",
    [lambda b: b"", lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b[: -TRAILER.size], lambda b: b + b"\0",
     lambda b: b + b, lambda b: b[1:], lambda b: bytes(len(b)), flipped(0), flipped(999)]
    + [flipped(-TRAILER.size + offset) for offset in (0, 7, 8, 40, 44, 48, 56, 62)],
)  # fmt: skip
async def test_a_file_that_is_not_the_record_is_corrupt_and_removed(start, directory, size_bytes, change):
    backend = await start()
    await put(backend, [1, 2], size_bytes)
    damage(directory, key(1), change)
    assert await get(backend, [1, 2], size_bytes) == [CORRUPT, content(2, size_bytes)]
    assert names(directory) == [file_name(key(2))]
    assert backend.usage().objects == 1


async def test_a_record_of_another_object_is_corrupt(start, directory):
    backend = await start()
    keys = [key(1), key(2), key(1, 1), key(1, 0, 1)]
    await backend.store(keys, views([content(1, 5000)] * 4))
    for other in keys[1:]:
        os.replace(directory / file_name(other), directory / file_name(key(1)))
        assert await get(backend, [1], 5000) == [CORRUPT]


async def test_an_object_of_another_size_is_corrupt(start):
    backend = await start()
    for size_bytes in (4999, 5001, 5000 + TRAILER.size):
        await put(backend, [1], 5000)
        assert await get(backend, [1], size_bytes) == [CORRUPT]


@pytest.mark.parametrize(("read", "outcome"), [(1, content(1, 5000)), (2, CORRUPT)])
async def test_a_good_record_that_replaced_a_corrupt_one_is_kept(start, directory, monkeypatch, read, outcome):
    backend = await start()
    await put(backend, [1], 5000)
    path = directory / file_name(key(1))
    good = path.read_bytes()
    damage(directory, key(1), flipped(3))
    real, reads = os.preadv, []

    def preadv(*args):
        count = real(*args)
        reads.append(count)
        if len(reads) == read:  # a small object is read once more before it is called corrupt
            path.with_name("new").write_bytes(good)
            os.replace(path.with_name("new"), path)
        return count

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        assert await get(backend, [1], 5000) == [outcome]
    assert await find(backend, [1]) == [True]
    assert await get(backend, [1], 5000) == [content(1, 5000)]


# Faults of the disk.


class BadSectors:
    """Calls of `os` fail that are about the records of some objects."""

    def __init__(self, monkeypatch):
        self._monkeypatch = monkeypatch

    def at(self, call, numbers, code=errno.EIO, times=None):
        """From now on this call fails where it is about one of these objects; so often, or for ever."""
        real, bad, left = getattr(os, call), {file_name(key(n)) for n in numbers}, [times]

        def failing(*args, **kwargs):
            if bad.intersection(args) and not (call == "open" and args[1] & os.O_CREAT) and left[0] != 0:
                left[0] = left[0] and left[0] - 1
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        self._monkeypatch.setattr(os, call, failing)

    def healed(self):
        self._monkeypatch.undo()


@pytest.fixture
def bad_sectors(monkeypatch):
    return BadSectors(monkeypatch)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
async def test_what_cannot_be_read_is_lost_alone_and_the_next_store_replaces_it(start, directory, bad_sectors, code):
    backend = await start()
    await put(backend, range(3), 1000)
    bad_sectors.at("open", [1], code)
    assert await get(backend, range(3), 1000) == [content(0, 1000), FAILED, content(2, 1000)]
    assert await find(backend, range(3)) == [True, False, True]
    assert (directory / file_name(key(1))).exists()
    bad_sectors.healed()
    before = (directory / file_name(key(1))).stat().st_ino
    assert await find(backend, [1]) == [False]
    assert await put(backend, [1], 1000) == [True]
    assert (directory / file_name(key(1))).stat().st_ino != before
    assert await get(backend, range(3), 1000) == [content(n, 1000) for n in range(3)]


@pytest.mark.parametrize("call", ["open", "close"])
async def test_a_fault_of_the_moment_costs_nothing(start, monkeypatch, bad_sectors, call):
    backend = await start()
    await put(backend, range(3), 1000)
    if call == "open":
        bad_sectors.at("open", [1], errno.ESTALE, times=2)
    else:
        real = os.close

        def close(fd):
            real(fd)
            raise OSError(errno.EIO, "no")

        monkeypatch.setattr(os, "close", close)
    assert await get(backend, range(3), 1000) == [content(n, 1000) for n in range(3)]


async def test_where_nothing_can_be_read_the_disk_is_blamed_first_and_then_the_objects(start, bad_sectors):
    backend = await start()
    await put(backend, range(3), 1000)
    bad_sectors.at("open", [1, 2])
    for numbers in ([1], [2]):
        with pytest.raises(BackendError, match="Input/output error") as caught:
            await get(backend, numbers, 1000)
        assert caught.value.__cause__.errno == errno.EIO
    assert await find(backend, [1, 2]) == [True, True]  # the disk may heal
    bad_sectors.healed()
    assert await get(backend, [2], 1000) == [content(2, 1000)]
    bad_sectors.at("open", [1, 2])
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
    before = (directory / file_name(key(1))).stat().st_ino
    bad_sectors.at("open", [1], times=3)
    with pytest.raises(BackendError):
        await get(backend, [1], 1000)
    assert await put(backend, [1], 1000) == [True]
    assert (directory / file_name(key(1))).stat().st_ino != before
    assert backend.usage().used_bytes == 1000


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
async def test_what_is_corrupt_and_cannot_be_removed_is_a_miss_and_can_be_replaced(start, directory, bad_sectors, code):
    backend = await start()
    await put(backend, range(2), 1000)
    damage(directory, key(1), flipped(3))
    bad_sectors.at("unlink", [1], code)
    assert await get(backend, [0, 1], 1000) == [content(0, 1000), CORRUPT]
    assert await find(backend, [0, 1]) == [True, False]
    assert await put(backend, [1], 1000) == [True]
    assert await get(backend, [0, 1], 1000) == [content(0, 1000), content(1, 1000)]


async def test_what_cannot_be_read_is_not_found_by_recovery_either(start, directory, bad_sectors, monkeypatch):
    backend = await start()
    await put(backend, range(2), 1000)
    await backend.close()
    gate = Gate(monkeypatch, "scandir")
    backend = await start()
    await gate.reached()
    bad_sectors.at("open", [1])
    assert await get(backend, [0, 1], 1000) == [content(0, 1000), FAILED]
    gate.open()
    assert [found async for found, _ in backend.keys()] == [key(0)]


async def test_a_name_that_cannot_be_looked_at_is_a_miss_alone(start, bad_sectors):
    backend = await start()
    await put(backend, range(2), 1000)
    await backend.close()
    again = await start()
    await asyncio.wait([again._recovery])
    again._index.clear(2)
    bad_sectors.at("stat", [1])
    assert await find(again, range(3)) == [True, False, False]
    assert await put(again, [1], 1000) == [True]  # what cannot be looked at is replaced
    assert await get(again, [0, 1], 1000) == [content(0, 1000), content(1, 1000)]


async def test_a_name_that_cannot_be_taken_is_a_fault_of_its_object_alone(start, directory):
    backend = await start()
    for n in (1, 2):
        (directory / file_name(key(n)) / "something").mkdir(parents=True)
    assert await put(backend, range(3), 1000) == [True, False, False]
    assert await put(backend, [1], 1000) == [False]
    assert await find(backend, range(3)) == [True, False, False]
    assert not [name for name in names(directory) if name.startswith("tmp")]


async def test_recovery_knows_the_head_of_a_prefix_from_its_tail(start, directory):
    backend = await start()
    await put(backend, range(40), 100)
    await backend.close()
    again = await start(capacity_bytes=4000)
    await asyncio.wait([again._recovery])
    await put(again, range(100, 120), 100)
    assert await find(again, range(40)) == [True] * 20 + [False] * 20


async def test_a_full_disk_fails_one_object_and_leaves_no_rest(start, directory, monkeypatch):
    backend = await start()
    real, failing = os.pwritev, [1, 2]

    def pwritev(fd, buffers, offset):
        if failing and offset:
            failing.pop()
            raise OSError(errno.ENOSPC, "disk full")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    assert await put(backend, [1], 1000) == [True]
    assert await put(backend, [2, 1], LONG) == [False, True]
    with pytest.raises(BackendError, match="disk full"):
        await put(backend, [3], LONG)
    assert names(directory) == [file_name(key(1))]
    assert await find(backend, [1, 2, 3]) == [True, False, False]
    assert backend.usage().used_bytes == 1000
    assert await put(backend, [2, 3], LONG) == [True, True]


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

    def stat(*_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(RecordDirectory, "_stat", stat)
    assert await find(backend, [1, 2]) == [True, False]  # what is known is said all the same
    with pytest.raises(BackendError):
        await backend.lookup([key(2), key(3)])
    assert backend.pins == 0


async def test_fsync_comes_before_the_rename_and_once_for_the_directory_after(start, monkeypatch):
    backend = await start(durability="fsync")
    events = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(fd):
        events.append("directory" if fd == backend._directory._fd else "file")
        fsync(fd)

    def recorded_rename(*args, **kwargs):
        events.append("rename")
        rename(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    assert await put(backend, [1, 2], 1000) == [True, True]
    assert events == ["file", "rename", "file", "rename", "directory"]


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
    backend = await start(capacity_bytes=10 * LONG)
    await put(backend, [0], LONG)
    gate = Gate(monkeypatch, "pwritev")
    task = asyncio.create_task(put(backend, [1, 2], LONG))
    await gate.reached()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names(directory) == [file_name(key(0))]
    assert backend.usage().objects == 1
    assert backend.pins == 0
    backend.check_integrity()
    assert await put(backend, range(1, 10), LONG) == [True] * 9  # all the room is there again


async def test_what_a_cancelled_store_has_written_is_counted(start, monkeypatch):
    backend = await start()
    rename, renamed, proceed = os.rename, threading.Event(), threading.Event()

    def held(*args, **kwargs):
        rename(*args, **kwargs)
        renamed.set()
        assert proceed.wait(30)

    monkeypatch.setattr(os, "rename", held)
    task = asyncio.create_task(put(backend, [1, 2], 1000))
    assert await asyncio.to_thread(renamed.wait, 30)
    task.cancel()
    await asyncio.sleep(0)
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.usage().objects == 1
    assert await find(backend, [1, 2]) == [True, False]


async def test_a_cancelled_lookup_ends_at_once_and_pins_nothing(start, monkeypatch):
    backend = await start()
    await put(backend, [1], 1000)
    await listing(backend)
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


# Room.


async def test_all_objects_of_a_chunk_are_evicted_together(start, directory):
    backend = await start(capacity_bytes=4000)
    keys = [key(n, rank) for n in range(2) for rank in range(2)]
    assert all(await backend.store(keys, views([content(0, 1000)] * 4)))
    await find(backend, [0])
    assert await put(backend, [2], 1000) == [True]
    assert set(await listing(backend)) == {key(0), key(0, 1), key(2)}
    assert backend.usage().used_bytes == 3000


async def test_a_store_does_not_evict_the_chunk_that_it_completes(start):
    backend = await start(capacity_bytes=2000)
    await put(backend, [0], 1000)
    await put(backend, [1], 1000)
    assert await backend.store([key(0, 1)], views([content(0, 1000)])) == [True]
    assert set(await listing(backend)) == {key(0), key(0, 1)}
    assert await backend.store([key(0, 2)], views([content(0, 1000)])) == [False]


async def test_bytes_in_flight_count(start, monkeypatch):
    backend = await start(capacity_bytes=4000)
    gate = Gate(monkeypatch, "pwritev")
    first = asyncio.create_task(put(backend, [1], 3000))
    await gate.reached()
    assert await put(backend, [2], 2000) == [False]
    assert backend.usage().used_bytes == 0
    gate.open()
    assert await first == [True]
    assert await put(backend, [2], 2000) == [True]
    assert set(await listing(backend)) == {key(2)}


async def test_if_not_all_fit_those_that_fit_are_stored(start):
    backend = await start(capacity_bytes=4000)
    await put(backend, [0], 2000)
    assert await backend.lookup([key(0)]) == [True]
    assert await put(backend, [1, 2, 3], 1000) == [True, True, False]
    backend.unpin([key(0)])


@pytest.mark.parametrize("how", ["deleted", "evicted"])
async def test_what_leaves_is_not_found_before_its_file_is_gone(start, directory, monkeypatch, how):
    backend = await start(capacity_bytes=4000)
    await put(backend, [1], 1000)
    gate = Gate(monkeypatch, "pwritev")
    tasks = [asyncio.create_task(put(backend, [2], 1000))]
    await gate.reached()  # all changes wait
    leave = backend.delete([key(1)]) if how == "deleted" else put(backend, [3], 3000)
    tasks.append(asyncio.create_task(leave))
    await asyncio.sleep(0)
    assert file_name(key(1)) in names(directory)
    assert await find(backend, [1]) == [False]
    tasks.append(asyncio.create_task(put(backend, [1], 500)))
    gate.open()
    await asyncio.gather(*tasks)


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
    assert names(directory) == [file_name(key(2))]
    assert await put(backend, [1], 1000) == [True]


def test_a_million_chunks_fit_in_memory():
    chunks = 10**6 // 64  # the hash table is as full as with a million
    keys = [ObjectKey(n.to_bytes(32, "little"), rank, 0) for n in range(chunks) for rank in range(2)]
    index = Index()
    gc.collect()
    tracemalloc.start()
    for k in keys:
        index.put(k, 65536)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / chunks < 100
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
    stuck = "os.pwritev = lambda *_: (print('writing', flush=True), sys.stdin.read())\nawait put(backend, [1], 1000)"
    with process(directory, stuck) as child:
        assert await next_line(child) == b"writing\n"
        assert await listing(await start()) == {}
        (left,) = names(directory)
        assert left.startswith("tmp.")
        child.send_signal(signal.SIGKILL)
    assert await listing(await start()) == {}
    assert names(directory) == []


async def test_a_file_that_was_taken_for_a_rest_before_its_lock_is_written_anew(start, directory, monkeypatch):
    backend = await start()
    await listing(backend)
    real, taken = fcntl.flock, []

    def flock(fd, how):
        if not taken:
            taken.extend(names(directory))
            os.unlink(directory / taken[0])
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert await put(backend, [1], 1000) == [True]
    assert names(directory) == [file_name(key(1))]
    assert taken[0].startswith("tmp.")


async def test_without_locks_in_the_file_system_nothing_is_stored_nor_left(start, directory, monkeypatch):
    backend = await start()

    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(BackendError, match="no locks"):
        await put(backend, [1], 1000)
    assert names(directory) == []


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
    assert len(names(directory)) == 54


async def test_what_another_process_stored_is_found_and_pinned(start, directory):
    backend, other = await start(capacity_bytes=2000), await start()
    await listing(backend)
    await put(other, [1], 1000)
    assert await backend.lookup([key(1), key(2)]) == [True, False]
    assert backend.usage().used_bytes == 1000
    assert await put(backend, [2], 1500) == [False]
    backend.unpin([key(1)])
    assert await put(backend, [2], 1500) == [True]
    assert await get(other, [1, 2], 1500) == [GONE, content(2, 1500)]
    assert other.usage().used_bytes == 0


async def test_what_is_on_the_disk_is_not_written_again(start, directory, monkeypatch):
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
        "todo = iter([(0, key(1), memoryview(bytearray(1000)))])\n"
        "stuck = backend._loads.submit(backend._directory.load, todo, [None], Event())\n"
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
    assert backend.usage().used_bytes == sum((await listing(backend)).values())


@pytest.mark.parametrize("count", [1, 64, 65, 400])
async def test_direct_objects_of_whole_pages_go_past_the_page_cache(start, directory, modes, count):
    backend = await start(direct=True)
    await round_trip(backend, key(1), pages(count), pages(count))
    assert set(modes) == {True}
    assert (directory / file_name(key(1))).stat().st_size == count * PAGESIZE + TRAILER.size
    damage(directory, key(1), lambda b: b + b"\0")
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
    assert (directory / file_name(key(1))).stat().st_mode & 0o777 == 0o600


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
    await backend._loads.ended(5)
    backend._directory.close()


async def test_close_ends_a_recovery_that_is_under_way(start, monkeypatch):
    await put(await start(), range(3), 1000)
    gate = Gate(monkeypatch, "scandir")
    monkeypatch.setattr(filesystem, "CLOSE_SECONDS", 0.01)
    backend = await start()
    await gate.reached()
    await backend.close()
    gate.open()
    assert await listing(backend) == {}


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
    assert time.monotonic() - began < 10
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
    _, pending = await asyncio.wait([task], timeout=1)
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
    for _ in range(1000):
        if len(os.listdir("/proc/self/fd")) == before:
            break
        await asyncio.sleep(0.001)
    assert len(os.listdir("/proc/self/fd")) == before
