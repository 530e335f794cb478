"""What a process believes of the objects of others when these write their index anew, die, or are elsewhere.

Two stores in one process stand for two processes, since a lock is one of an open file, and not of a process. Where all
depends on the moment, files that a test makes stand for another process.
"""

import asyncio
import errno
import fcntl
import os
import threading
from contextlib import contextmanager

import pytest
from xxhash import xxh3_64_intdigest

from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem import FileSystemBackend, journal, rewriting, sweep, writers
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
from async_cache.l2.filesystem.work import WRITERS
from async_cache.l2.filesystem.writers import Writers
from async_cache.testing.conformance import content, key

from .story import found, load, size_of, store
from .test_odd_disks import opened

LOADED = LoadOutcome.LOADED
OTHER = 7  # a writer that a test plays


@pytest.fixture
def restless(monkeypatch):
    """Each store has the index written anew."""
    monkeypatch.setattr(rewriting, "SPARE_BYTES", -(2**40))


def generations(directory):
    """The youngest index file of each writer."""
    return dict(sorted(parsed for path in directory.iterdir() if (parsed := parse_index(path.name))))


async def until(condition):
    """Wait for what a task does in the background."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (there is nothing else to wait for)
            await asyncio.sleep(0.001)


async def store_and_write_anew(backend, numbers, directory, writer):
    before = generations(directory)[writer]
    assert all(await store(backend, numbers))
    await until(lambda: generations(directory).get(writer, 0) > before)


@pytest.mark.parametrize("missed", [1, 2, 3])
async def test_what_was_deleted_in_a_generation_that_was_missed_is_not_there(tmp_path, restless, missed):
    async with opened(tmp_path) as one:
        [writer] = generations(tmp_path)
        await store_and_write_anew(one, range(10), tmp_path, writer)
        async with opened(tmp_path) as other:
            assert await found(other, range(10)) == list(range(10))
            for number in range(missed):
                await one.delete([key(number)])
                await store_and_write_anew(one, [100 + number], tmp_path, writer)
            assert await found(other, [999]) == []  # it looks
            assert await found(other, range(10)) == list(range(missed, 10))
            assert await other.delete([key(0)]) == 0
            assert all(await store(other, [0]))
            assert await found(one, [0]) == [0]
            assert await load(one, [0]) == {0: LOADED}


# Another process, of which only the files are there.


def put(number, segment=0, page=0, kind=Kind.PUT):
    """A record of an object that the other process has at this place."""
    body = content(number, size_of(number))
    return record(kind, key(number), (OTHER, segment, page), len(body), xxh3_64_intdigest(body))


def write_other(directory, numbers):
    """The other process has stored these objects, each in a segment of its own."""
    (directory / MARKER).write_bytes(MARKER_LINE % VERSION)
    for segment, number in enumerate(numbers):
        (directory / segment_name(OTHER, segment)).write_bytes(content(number, size_of(number)))
    records = [put(number, segment) for segment, number in enumerate(numbers)]
    (directory / index_name(OTHER, 0)).write_bytes(header(OTHER) + b"".join(records))


@contextmanager
def living(path):
    """Whoever writes this index file lives."""
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@pytest.fixture
def at_a_listing(monkeypatch):
    """Have something happen right after a listing of the directory, once."""

    def arrange(happens):
        happening, real = [happens], Writers.names

        def names(self):
            listed = real(self)
            if happening:
                happening.pop()()
            return listed

        monkeypatch.setattr(Writers, "names", names)

    return arrange


def written_anew(directory):
    """The other process writes its index anew."""
    os.rename(directory / index_name(OTHER, 0), directory / index_name(OTHER, 1))


async def test_what_was_recorded_just_before_its_writer_was_found_to_be_dead_is_there(tmp_path, monkeypatch):
    """It comes between the opening of the index and its lock."""
    write_other(tmp_path, [3, 5])
    path = tmp_path / index_name(OTHER, 0)
    whole, is_left = path.read_bytes(), journal.is_left
    path.write_bytes(whole[:-88])

    def last_words(fd, now_ns):
        if os.path.samestat(os.fstat(fd), path.stat()):
            path.write_bytes(whole)
        return is_left(fd, now_ns)

    monkeypatch.setattr(journal, "is_left", last_words)
    for _ in range(2):
        async with opened(tmp_path) as backend:
            assert {each async for each, _ in backend.keys()} == {key(3), key(5)}
            assert await found(backend, [3, 5]) == [3, 5]
            assert await load(backend, [3, 5]) == {3: LOADED, 5: LOADED}


async def test_an_index_that_is_written_anew_between_a_listing_and_its_opening(tmp_path, at_a_listing):
    async with opened(tmp_path) as backend:
        assert await found(backend, [3]) == []
        write_other(tmp_path, [3])
        with living(tmp_path / index_name(OTHER, 0)):
            at_a_listing(lambda: written_anew(tmp_path))
            assert await found(backend, [3]) == [3]


async def test_what_was_deleted_stays_so_though_an_index_was_written_anew_meanwhile(tmp_path, at_a_listing):
    write_other(tmp_path, [3])
    with living(tmp_path / index_name(OTHER, 0)):
        async with opened(tmp_path) as backend:
            assert await backend.delete([key(3)]) == 1
            at_a_listing(lambda: written_anew(tmp_path))
        async with opened(tmp_path) as backend:
            assert await found(backend, [3]) == []


@pytest.mark.parametrize("known", [[3], [3, 4]])
async def test_a_segment_whose_writer_was_adopted_by_another_meanwhile_is_left_alone(tmp_path, monkeypatch, known):
    """What was stored in it last is told by the index of whoever has adopted it, and has not been heard of here."""
    write_other(tmp_path, [3, 4])
    path, adopter = tmp_path / index_name(OTHER, 0), tmp_path / index_name(8, 0)
    forgotten = put(4, 1, page=9) + put(4, 1, page=9, kind=Kind.DROP)
    path.write_bytes(header(OTHER) + put(3) + forgotten * (4 in known))
    list_directory = sweep._list
    with living(path), adopter.open("w+b") as file:
        os.rename(adopter, adopter.with_suffix(".later"))
        fcntl.flock(file, fcntl.LOCK_EX)

        def adopted_and_listed(*arguments):
            if path.exists():
                file.write(header(8) + put(3) + put(4, 1) + forgotten)
                file.flush()
                os.rename(adopter.with_suffix(".later"), adopter)
                path.unlink()
            return list_directory(*arguments)

        monkeypatch.setattr(sweep, "_list", adopted_and_listed)
        async with opened(tmp_path) as backend:
            await until(lambda: not path.exists())
            assert await found(backend, [3, 4]) == [3, 4]
            assert await load(backend, [3, 4]) == {3: LOADED, 4: LOADED}
        async with opened(tmp_path) as backend:
            assert await found(backend, [3, 4]) == [3, 4]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE])
async def test_where_an_index_cannot_be_opened_nothing_is_taken_for_unknown(tmp_path, monkeypatch, code):
    """It may tell of any segment: that of a writer whom its own has adopted."""
    write_other(tmp_path, [3])
    (tmp_path / index_name(OTHER, 0)).unlink()
    adopter = tmp_path / index_name(8, 0)
    adopter.write_bytes(header(8) + put(3))
    opening = os.open

    def refuse(path, *arguments, **where):
        if path == adopter.name:
            raise OSError(code, os.strerror(code))
        return opening(path, *arguments, **where)

    with living(adopter):
        with monkeypatch.context() as patched:
            patched.setattr(os, "open", refuse)
            async with opened(tmp_path) as backend:
                assert await found(backend, [3]) == []
        async with opened(tmp_path) as backend:
            assert await found(backend, [3]) == [3]
            assert await load(backend, [3]) == {3: LOADED}


async def test_a_stale_handle_of_an_index_costs_nothing(tmp_path, monkeypatch):
    """As one has it over a network when a server was started anew: the file is there, and is opened again."""
    async with opened(tmp_path) as one, opened(tmp_path) as other:
        assert all(await store(one, range(10)))
        assert await found(other, range(10)) == list(range(10))
        assert all(await store(one, [10]))
        pread, stale = os.pread, [None]

        def read(fd, *arguments):
            if stale and os.readlink(f"/proc/self/fd/{fd}").endswith(".idx"):
                stale.pop()
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return pread(fd, *arguments)

        monkeypatch.setattr(os, "pread", read)
        assert await found(other, [10]) == [10]
        assert not stale
        assert await found(other, range(10)) == list(range(10))
        assert set((await load(other, range(11))).values()) == {LOADED}


class Gate:
    """Holds the threads that call a function of `os` until it is opened."""

    def __init__(self, monkeypatch, name):
        self._reached, self._opened = threading.Event(), threading.Event()
        real = getattr(os, name)

        def call(*arguments):
            self._reached.set()
            assert self._opened.wait(100)
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    async def reached(self):
        assert await asyncio.to_thread(self._reached.wait, 30)

    def open(self):
        self._opened.set()


async def test_a_look_at_a_directory_that_was_left_teaches_nothing(tmp_path, monkeypatch):
    directory, elsewhere = tmp_path / "kv", tmp_path / "elsewhere"
    many = range(2000, 2400)
    async with opened(directory) as one, opened(directory) as other:
        with monkeypatch.context() as patched:
            writing = Gate(patched, "pwritev")
            numbers = range(1, WRITERS + 2)  # the last one waits for the others
            stores = [asyncio.create_task(store(one, [number])) for number in numbers]
            await writing.reached()
            await until(lambda: one._log.storing.objects == len(numbers))
        assert all(await store(other, many))
        with monkeypatch.context() as patched:
            reading = Gate(patched, "pread")
            look = asyncio.create_task(found(one, [9999]))
            await reading.reached()
            directory.rename(elsewhere)
            directory.mkdir()
            writing.open()
            await asyncio.wait(stores, return_when=asyncio.FIRST_COMPLETED)
            await until(lambda: len(os.listdir(directory)) >= 2)
            reading.open()
        await asyncio.wait([look, *stores])
        assert all(await store(one, [9]))
        assert one.usage().objects <= len(numbers) + 1
        assert await found(one, many) == []


async def test_a_close_in_the_middle_of_looks_leaves_all_in_order(tmp_path, monkeypatch, caplog):
    async with opened(tmp_path) as other:
        one = FileSystemBackend(tmp_path)
        await one.open()
        assert all(await store(one, range(3)))
        assert all(await store(other, [10]))
        with monkeypatch.context() as patched:
            reading = Gate(patched, "pread")
            looks = [asyncio.create_task(found(one, [8]))]
            await reading.reached()
            looks.append(asyncio.create_task(found(one, [9])))  # it waits for the first
            await asyncio.sleep(0)
            looks.append(asyncio.create_task(one.close()))
            await asyncio.sleep(0)
            reading.open()
            await asyncio.wait(looks)
        assert "cannot be" not in caplog.text


@pytest.mark.parametrize("stored", [[], [1]])
async def test_what_tells_of_nothing_that_anybody_believes_is_not_carried_on(tmp_path, stored):
    """A dead writer had deleted what others had stored, and their index files are gone since."""
    (tmp_path / MARKER).write_bytes(MARKER_LINE % VERSION)
    (tmp_path / index_name(8, 0)).write_bytes(header(8) + b"".join([put(3, n, kind=Kind.DROP) for n in range(500)]))
    async with opened(tmp_path) as backend:
        assert await found(backend, [3]) == []
        assert all(await store(backend, stored))
    indexes = [path for path in tmp_path.iterdir() if parse_index(path.name)]
    assert [path.stat().st_size // 88 for path in indexes] == ([2] if stored else [])


async def test_what_was_dropped_stays_so_while_an_index_cannot_be_opened(tmp_path, restless, monkeypatch):
    """Its writer has written it anew, and had not heard of it."""
    write_other(tmp_path, [1, 2])
    young = tmp_path / index_name(OTHER, 1)
    open_file, is_refused = os.open, True

    def refuse(path, *arguments, **options):
        if path == young.name and is_refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_file(path, *arguments, **options)

    with living(tmp_path / index_name(OTHER, 0)):
        async with opened(tmp_path) as one:
            assert await found(one, [1, 2]) == [1, 2]
            [writer] = generations(tmp_path).keys() - {OTHER}
            assert await one.delete([key(1)]) == 1
            (tmp_path / index_name(OTHER, 0)).rename(young)
            monkeypatch.setattr(os, "open", refuse)
            await store_and_write_anew(one, [100], tmp_path, writer)
            await store_and_write_anew(one, [101], tmp_path, writer)
            is_refused = False
            young.touch()
            os.utime(tmp_path)
            assert await found(one, [1, 2]) == [2]
            async with opened(tmp_path) as other:
                assert await found(other, [1, 2]) == [2]


async def test_what_a_newcomer_stored_is_deleted_where_a_listing_is_not_done_again_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "_LONG_SECONDS", -1)
    monkeypatch.setattr(writers, "_LONG_FACTOR", 10**9)
    async with opened(tmp_path), opened(tmp_path) as one:
        assert await found(one, [1]) == []
        async with opened(tmp_path) as newcomer:
            assert all(await store(newcomer, [1, 2]))
            assert await one.delete([key(1)]) == 1
            assert await load(newcomer, [1, 2]) == {1: LoadOutcome.GONE, 2: LOADED}
