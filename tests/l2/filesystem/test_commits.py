"""Stores that wait at the same time are recorded together. A fault is that of those whose objects it was alone."""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from async_cache.errors import BackendError
from async_cache.l2.filesystem import FileSystemBackend
from async_cache.l2.filesystem.format import RECORD_BYTES
from async_cache.l2.filesystem.journal import Journal
from async_cache.testing.conformance import content, find, get, put

PAGE = 4096
FIRST = 1000
SECONDS = 60  # against a hang, and no more


class Syncs:
    """Syncs of files: they may be held, and those of some files fail."""

    def __init__(self, monkeypatch):
        self.failing, self.failing_names = set(), False
        self.held, self.opened = threading.Event(), threading.Event()
        self.opened.set()
        self._fdatasync, self._fsync = os.fdatasync, os.fsync
        monkeypatch.setattr(os, "fdatasync", self._sync)
        monkeypatch.setattr(os, "fsync", self._sync_names)

    def _sync(self, fd):
        self.held.set()
        assert self.opened.wait(SECONDS)
        if Path(os.readlink(f"/proc/self/fd/{fd}")).name in self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fdatasync(fd)

    def _sync_names(self, fd):
        if self.failing_names:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(fd)


@pytest.fixture
def syncs(monkeypatch):
    return Syncs(monkeypatch)


@pytest.fixture
async def backend(tmp_path):
    """One that syncs what it stores, in files of a page or two: calls of `together` have one each."""
    backend = FileSystemBackend(tmp_path / "kv", durability="fsync", segment_bytes=2 * PAGE)
    await backend.open()
    yield backend
    backend.check_integrity()
    await backend.close()


async def together(backend, syncs, *calls):
    """Store these objects by a call each while the sync of a first one is held: they are recorded together.

    Returns the tasks, and of each of these calls the files.
    """
    waiting = backend._log.directory.waiting
    syncs.opened.clear()
    syncs.held.clear()
    tasks = [asyncio.create_task(put(backend, [FIRST], 2 * PAGE))]
    assert await asyncio.to_thread(syncs.held.wait, SECONDS)
    for number, numbers in enumerate(calls, 1):  # one after the other: each begins a file
        tasks.append(asyncio.create_task(put(backend, numbers, 2 * PAGE)))
        while len(waiting) < number:  # noqa: ASYNC110 (nothing tells of it)
            await asyncio.sleep(0)
    return tasks, [list(commit.records) for commit in waiting]


async def told(tasks):
    """What each store was told; False where the backend raised an error of its own."""
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, list | BackendError) for outcome in outcomes), outcomes
    return [outcome if isinstance(outcome, list) else False for outcome in outcomes]


async def is_there_again(backend, tmp_path, numbers):
    """What is there of objects after a restart, and right."""
    await backend.close()
    other = FileSystemBackend(tmp_path / "kv")
    await other.open()
    found = await find(other, numbers)
    there = [number for number, is_there in zip(numbers, found, strict=True) if is_there]
    assert await get(other, there, 2 * PAGE) == [content(number, 2 * PAGE) for number in there]
    other.check_integrity()
    await other.close()
    return found


@pytest.mark.parametrize("error", [MemoryError("no room"), ValueError("a bug"), OSError(errno.EIO, "a bad sector")])
async def test_what_could_not_be_recorded_is_an_error_for_all_that_waited(backend, syncs, monkeypatch, tmp_path, error):
    tasks, _ = await together(backend, syncs, [0], [1], [2])
    append = Journal.append

    def fail(journal, data):
        if len(data) == 3 * RECORD_BYTES:
            raise error
        append(journal, data)

    monkeypatch.setattr(Journal, "append", fail)
    syncs.opened.set()
    assert await told(tasks) == [[True], False, False, False]
    assert await find(backend, [FIRST, 0, 1, 2]) == [True, False, False, False]
    monkeypatch.undo()
    assert await put(backend, [1], 2 * PAGE) == [True]
    assert await is_there_again(backend, tmp_path, [FIRST, 0, 1, 2]) == [True, False, True, False]


async def test_a_file_that_cannot_be_synced_costs_those_in_it_and_nobody_else(backend, syncs, tmp_path):
    tasks, files = await together(backend, syncs, [0], [1], [2])
    syncs.failing.update(files[1])
    syncs.opened.set()
    assert await told(tasks) == [[True], [True], False, [True]]
    assert await put(backend, [1], 2 * PAGE) == [True]  # in another file
    assert await is_there_again(backend, tmp_path, [FIRST, 0, 1, 2]) == [True] * 4


async def test_a_file_that_cannot_be_synced_costs_those_of_a_call_that_are_in_it(backend, syncs, tmp_path):
    tasks, files = await together(backend, syncs, [0, 1, 2, 3], [4])
    assert len(files[0]) == 4
    syncs.failing.add(files[0][1])  # the last object of a call is recorded first
    syncs.opened.set()
    assert await told(tasks) == [[True], [True, True, False, True], [True]]
    assert await is_there_again(backend, tmp_path, range(5)) == [True, True, False, True, True]


async def test_names_that_cannot_be_synced_cost_those_of_new_files_and_nobody_else(tmp_path, syncs):
    backend = FileSystemBackend(tmp_path / "kv", durability="fsync", segment_bytes=8 * PAGE)
    await backend.open()
    assert await put(backend, [900], 2 * PAGE) == [True]
    tasks, files = await together(backend, syncs, [0], [1], [2])
    assert files[0] == files[1] != files[2]  # the fourth and the fifth object do not lie in one
    syncs.failing_names = True
    syncs.opened.set()
    assert await told(tasks) == [[True], [True], [True], False]
    syncs.failing_names = False
    assert await put(backend, [2], 2 * PAGE) == [True]
    backend.check_integrity()
    assert await is_there_again(backend, tmp_path, [900, FIRST, 0, 1, 2]) == [True] * 5
