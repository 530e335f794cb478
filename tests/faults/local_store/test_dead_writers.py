"""What a great many dead writers left, and files that cannot be made, cut, cleared or removed."""

import asyncio
import ctypes
import errno
import fcntl
import gc
import os
import resource
import struct
import tracemalloc
from contextlib import contextmanager, suppress

import pytest
from soak import rounds
from xxhash import xxh3_64_intdigest

from async_cache import BackendError, ConfigError, ObjectKey
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem import FileSystemBackend, files, rewriting
from async_cache.l2.filesystem.format import (
    MARKER,
    MARKER_LINE,
    VERSION,
    Kind,
    header,
    index_name,
    parse_index,
    record,
    segment_name,
)
from async_cache.testing.conformance import content, key

from .story import found, load, size_of, store
from .test_odd_disks import opened

LOADED = LoadOutcome.LOADED
MOST_FILES = 900  # that a process may open beside those that it has
PAGE = 4096


def write_dead(directory, writers):
    """Each of these writers has stored one object, and is dead."""
    (directory / MARKER).write_bytes(MARKER_LINE % VERSION)
    for writer in writers:
        body = content(writer, size_of(writer))
        put = record(Kind.PUT, key(writer), (writer, 0, 0), len(body), xxh3_64_intdigest(body))
        (directory / index_name(writer, 0)).write_bytes(header(writer) + put)
        (directory / segment_name(writer, 0)).write_bytes(body)


def indexes(directory):
    return [path for path in directory.iterdir() if parse_index(path.name)]


@pytest.fixture
def few_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + MOST_FILES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_more_dead_writers_than_files_may_be_open(tmp_path, few_files):
    """All that they stored is there, and what comes next has files left to open."""
    writers = range(1, 2 * MOST_FILES)
    write_dead(tmp_path, writers)
    async with opened(tmp_path) as backend:
        async with asyncio.timeout(60):
            while len([1 async for _ in backend.keys()]) < len(writers):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert set((await load(backend, writers)).values()) == {LOADED}
        assert len(os.listdir("/proc/self/fd")) < MOST_FILES
    async with opened(tmp_path) as backend:
        assert len([1 async for _ in backend.keys()]) == len(writers)  # recovery has ended, however long that takes
        assert await found(backend, writers) == list(writers)
        assert set((await load(backend, writers)).values()) == {LOADED}


async def test_what_the_dead_have_left_is_taken_over_at_the_start(tmp_path):
    """Also where nothing is stored: the next start has less to do, however this one ends."""
    write_dead(tmp_path, range(1, 101))
    async with opened(tmp_path) as backend:
        assert [each async for each in backend.keys()]
        async with asyncio.timeout(60):
            while len(indexes(tmp_path)) > 40:  # noqa: ASYNC110 (there is nothing else to wait for)
                await asyncio.sleep(0.01)
        assert await found(backend, range(1, 101)) == list(range(1, 101))


async def test_an_index_of_the_dead_that_cannot_be_cut_costs_nothing_else(tmp_path, monkeypatch):
    write_dead(tmp_path, [1, 2])
    for writer in (1, 2):
        with (tmp_path / segment_name(writer, 0)).open("ab") as file:
            file.write(b"\1" * 2 * PAGE)
    ftruncate = os.ftruncate

    def refuse(fd, size_bytes):
        if os.readlink(f"/proc/self/fd/{fd}").endswith(index_name(1, 0)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        ftruncate(fd, size_bytes)

    monkeypatch.setattr(os, "ftruncate", refuse)
    async with opened(tmp_path) as backend:
        assert len([1 async for _ in backend.keys()]) == 2
        async with asyncio.timeout(60):
            while (tmp_path / segment_name(2, 0)).stat().st_size > PAGE:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert await load(backend, [1, 2]) == {1: LOADED, 2: LOADED}


# Files that cannot be made.


@contextmanager
def refused(monkeypatch, code):
    """Every lock is refused."""

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    control = fcntl.fcntl
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        patched.setattr(
            fcntl, "fcntl", lambda fd, what, *of: refuse() if what == fcntl.F_OFD_SETLK else control(fd, what, *of)
        )
        yield


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EAGAIN])
async def test_where_every_lock_is_refused_there_is_one_clear_error_and_no_heap_of_files(tmp_path, monkeypatch, code):
    with refused(monkeypatch, code):
        backend = FileSystemBackend(tmp_path)
        opening = asyncio.create_task(backend.open())
        await asyncio.wait([opening], timeout=60)
        assert opening.done()
        if opening.exception() is None:  # it does without locks
            assert await store(backend, [1]) == [True]
            await backend.close()
        else:
            assert isinstance(opening.exception(), (BackendError, ConfigError))
    assert len(os.listdir(tmp_path)) < 10


async def test_a_path_that_always_means_another_directory_is_an_error_and_no_heap_of_files(tmp_path, monkeypatch):
    async with opened(tmp_path) as backend:
        with monkeypatch.context() as patched:
            patched.setattr(os.path, "samestat", lambda one, other: False)
            with suppress(BackendError):
                async with asyncio.timeout(60):
                    await store(backend, [1])
        assert len(os.listdir(tmp_path)) < 30


@pytest.mark.parametrize("finished", [True, False])
async def test_an_index_that_could_not_be_begun_leaves_no_file(tmp_path, monkeypatch, finished):
    """Neither at the opening, nor when it is written anew: the next try is not refused because of it."""
    monkeypatch.setattr(rewriting, "SPARE_BYTES", -(2**40))
    flock, failing = fcntl.flock, []

    def fail(fd, how):
        if failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", fail)
    if finished:
        failing.append(True)
        for _ in range(5):
            with pytest.raises(BackendError):
                await FileSystemBackend(tmp_path).open()
        assert not indexes(tmp_path)
        failing.clear()
    async with opened(tmp_path) as backend:
        [before] = indexes(tmp_path)
        failing.append(True)
        assert all(await store(backend, [1]))
        await asyncio.sleep(0.1)
        assert len(os.listdir(tmp_path)) <= 4
        failing.clear()
        assert all(await store(backend, [2]))
        async with asyncio.timeout(60):
            while before.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.001)


# Files that cannot be cleared or removed.


async def test_a_segment_that_cannot_be_removed_costs_nobody_else_a_delete(tmp_path, monkeypatch):
    async with opened(tmp_path, segment_bytes=4 * PAGE) as backend:
        assert all(await store(backend, [2, 4]))  # four pages
        [stuck] = tmp_path.glob("*.seg")
        assert all(await store(backend, range(10, 30)))
        unlink = os.unlink

        def refuse(path, **where):
            if path == stuck.name:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
            unlink(path, **where)

        monkeypatch.setattr(os, "unlink", refuse)
        with suppress(BackendError):
            await backend.delete([key(2), key(4)])
        for number in range(10, 30):
            assert await backend.delete([key(number)]) == 1
        monkeypatch.undo()
        assert all(await store(backend, [5]))
        assert await backend.delete([key(5)]) == 1
    async with opened(tmp_path), asyncio.timeout(60):
        while stuck.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_what_could_not_be_cleared_is_cleared_later(tmp_path, monkeypatch, code):
    fallocate, failing = files._fallocate, []

    def fail(fd, mode, begin, size_bytes):
        if mode & 2 and failing:
            ctypes.set_errno(code)
            return -1
        return fallocate(fd, mode, begin, size_bytes)

    monkeypatch.setattr(files, "_fallocate", fail)
    async with opened(tmp_path) as backend:
        assert all(await store(backend, range(30)))
        failing.append(True)
        with pytest.raises(BackendError):
            await backend.delete([key(number) for number in range(10)])
        failing.clear()
        await backend.delete([key(10)])
        bodies = b"".join(path.read_bytes() for path in tmp_path.glob("*.seg"))
        assert not [
            number for number in range(10) if size_of(number) > 16 and content(number, size_of(number)) in bodies
        ]


@pytest.mark.parametrize("holes", [True, False])
async def test_segments_that_are_gone_take_no_memory(tmp_path, monkeypatch, holes):
    if not holes:
        monkeypatch.setattr(files, "_fallocate", lambda *_: ctypes.set_errno(errno.EOPNOTSUPP) or -1)

    async def churn(backend, numbers):
        for number in numbers:
            assert all(await backend.store([key(number)], [memoryview(bytes(60_000))]))
            if holes:
                assert await backend.delete([key(number)]) == 1

    async with opened(tmp_path, capacity_bytes=2**20) as backend:
        await churn(backend, range(200))
        gc.collect()
        tracemalloc.start()
        count = rounds(300, 10_000)
        await churn(backend, range(1000, 1000 + count))
        gc.collect()
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert grown / count < 100


# What is not what it should be.


async def test_an_index_of_a_newer_version_in_a_directory_without_its_marker_is_not_read(tmp_path):
    head = struct.pack("<8sIIQ56x", b"akvindex", VERSION + 1, 0, 7)
    (tmp_path / index_name(7, 0)).write_bytes(head + struct.pack("<Q", xxh3_64_intdigest(head)) + bytes(880))
    with pytest.raises(ConfigError, match="version"):
        await FileSystemBackend(tmp_path).open()
    assert [path.name for path in tmp_path.iterdir()] == [index_name(7, 0)]


@pytest.mark.parametrize(
    "odd",
    [
        ObjectKey(b"a" * 32, 2**32, 0),
        ObjectKey(b"a" * 32, 0, -1),
        ObjectKey(b"a" * 33, 0, 0),
        ObjectKey(b"a" * 16, 0, 0),
    ],
)
async def test_a_key_that_no_record_has_room_for_is_refused_and_holds_nothing_up(tmp_path, odd):
    async with opened(tmp_path) as backend:
        with pytest.raises((BackendError, ValueError)):
            await backend.store([odd, key(1)], [memoryview(b"x"), memoryview(b"y")])
        async with asyncio.timeout(60):
            assert await backend.delete([odd]) == 0
            assert all(await store(backend, [1]))
