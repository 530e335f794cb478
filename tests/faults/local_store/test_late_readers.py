"""A reader who is late finds zeros where an object was, and tells that it is gone: it was given up, and is not corrupt.

Files cannot have holes here: zeros are then all that a reader sees.
"""

import asyncio
import ctypes
import errno
import threading
from contextlib import AsyncExitStack

import pytest
from xxhash import xxh3_64_intdigest

from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem import files, rewriting, sweep, writers
from async_cache.l2.filesystem.directory import Directory
from async_cache.l2.filesystem.format import (
    MARKER,
    MARKER_LINE,
    VERSION,
    Kind,
    header,
    index_name,
    record,
    segment_name,
)
from async_cache.l2.filesystem.work import Threads
from async_cache.testing.conformance import content, key
from async_cache.values import Removal

from .story import SLACK_BYTES, disk_bytes, found, load, pages_of, store
from .test_followers import OTHER, generations, living, store_and_write_anew, until
from .test_odd_disks import opened

LOADED, GONE = LoadOutcome.LOADED, LoadOutcome.GONE
PAGE = 4096
RANKS = range(3)


@pytest.fixture(autouse=True)
def without_holes(monkeypatch):
    monkeypatch.setattr(files, "_fallocate", lambda *_: ctypes.set_errno(errno.EOPNOTSUPP) or -1)


@pytest.fixture
def slow_listings(monkeypatch):
    """A directory of which a listing takes so long that it is not done again for the next look."""
    monkeypatch.setattr(writers, "_LONG_SECONDS", -1)
    monkeypatch.setattr(writers, "_LONG_FACTOR", 10**9)


def of_rank(rank):
    """An object of a chunk that all ranks have: their bodies are in one segment."""
    return key(0)._replace(rank=rank)


async def store_of(backend, *ranks):
    bodies = [memoryview(content(rank, PAGE)) for rank in ranks]
    assert all(await backend.store([of_rank(rank) for rank in ranks], bodies))


async def find_all(backend):
    keys = [of_rank(rank) for rank in RANKS]
    assert all(await backend.lookup(keys))
    backend.unpin(keys)


async def load_of(backend):
    buffers = [memoryview(bytearray(PAGE)) for _ in RANKS]
    return await backend.load([of_rank(rank) for rank in RANKS], buffers)


async def test_what_no_index_tells_of_any_more_is_gone(tmp_path, monkeypatch):
    """The generation with its DROP was missed, and the next one has neither of the two."""
    async with opened(tmp_path) as one:
        [writer] = generations(tmp_path)
        await store_of(one, *RANKS)
        async with opened(tmp_path) as late:
            await find_all(late)
            monkeypatch.setattr(rewriting, "SPARE_BYTES", -(2**40))  # each store has the index written anew
            await store_and_write_anew(one, [100], tmp_path, writer)
            assert await one.delete([of_rank(1)]) == 1
            await store_and_write_anew(one, [101], tmp_path, writer)
            assert await load_of(late) == [LOADED, GONE, LOADED]


async def test_who_deleted_it_was_not_known_when_the_directory_was_listed_last(tmp_path, slow_listings):
    async with opened(tmp_path) as one, opened(tmp_path) as late:
        await store_of(one, *RANKS)
        await find_all(late)
        async with opened(tmp_path) as newcomer:
            assert await newcomer.delete([of_rank(1)]) == 1
            assert await load_of(late) == [LOADED, GONE, LOADED]


async def test_what_is_stored_and_deleted_again_while_it_is_looked_for(tmp_path, monkeypatch):
    async with opened(tmp_path) as one, opened(tmp_path) as late:
        await store_of(one, *RANKS)
        await find_all(late)
        assert await one.delete([of_rank(1)]) == 1
        await store_of(one, 1, 3)
        look, again = late._log.following.look, [of_rank(1)]

        async def heard_and_deleted(**how):
            await look(**how)
            if again:
                assert await one.delete([again.pop()]) == 1

        monkeypatch.setattr(late._log.following, "look", heard_and_deleted)
        assert await load_of(late) == [LOADED, GONE, LOADED]


async def test_what_is_given_up_during_a_sweep_is_recorded_before_it_is_cleared(tmp_path, monkeypatch):
    """A dead writer left a gap in its segment, and what lies beside it is made room of meanwhile."""
    bodies = {page: content(rank, PAGE) for rank, page in zip(RANKS, (0, 2, 3), strict=True)}
    (tmp_path / MARKER).write_bytes(MARKER_LINE % VERSION)
    (tmp_path / segment_name(OTHER, 0)).write_bytes(b"".join(bodies.get(page, b"x" * PAGE) for page in range(4)))
    puts = [
        record(Kind.PUT, of_rank(rank), (OTHER, 0, page), PAGE, xxh3_64_intdigest(body))
        for rank, (page, body) in enumerate(bodies.items())
    ]
    index = tmp_path / index_name(OTHER, 0)
    index.write_bytes(header(OTHER) + b"".join(puts))
    dropping, listed, cleared = threading.Event(), threading.Event(), asyncio.Event()
    drop, clear_away, clear_gaps, recorded = Directory.drop, sweep._clear_away, sweep._clear_gaps, Threads.recorded
    loop = asyncio.get_running_loop()

    def dropped_late(*arguments):
        assert dropping.wait(100)
        drop(*arguments)

    def away_late(*arguments):
        assert listed.wait(100)
        return clear_away(*arguments)

    def gaps(*arguments):
        clear_gaps(*arguments)
        loop.call_soon_threadsafe(cleared.set)

    async def waiting(threads):
        dropping.set()
        await recorded(threads)

    async with AsyncExitStack() as stack:
        with living(index):
            late = await stack.enter_async_context(opened(tmp_path))
            await find_all(late)
        monkeypatch.setattr(Directory, "drop", dropped_late)
        monkeypatch.setattr(sweep, "_clear_away", away_late)
        monkeypatch.setattr(sweep, "_clear_gaps", gaps)
        heir = await stack.enter_async_context(opened(tmp_path))
        await until(lambda: heir.usage().objects == len(RANKS))
        monkeypatch.setattr(Threads, "recorded", waiting)
        listed.set()
        heir._log.room.clear(heir._log.catalog.give_up([of_rank(1)], Removal.CAPACITY))
        await cleared.wait()
        assert await load_of(late) == [LOADED, GONE, LOADED]
        dropping.set()


async def test_what_others_give_up_leaves_the_disk_though_its_writer_does_nothing(tmp_path):
    """Each chunk has a segment of its own, which only its writer removes."""
    objects = range(300)
    capacity_bytes = sum(map(pages_of, objects)) * PAGE
    async with opened(tmp_path, capacity_bytes=capacity_bytes) as idle:
        assert all(await store(idle, objects[:280]))
        async with opened(tmp_path, capacity_bytes=capacity_bytes) as busy:
            assert await found(busy, objects[:1]) == [0]
            for begin in range(1000, 1600, 10):
                assert all(await store(busy, range(begin, begin + 10)))
                assert disk_bytes(tmp_path) <= capacity_bytes + SLACK_BYTES
            assert set((await load(idle, await found(idle, [0, 1]))).values()) <= {GONE}
    assert disk_bytes(tmp_path) <= capacity_bytes + SLACK_BYTES
