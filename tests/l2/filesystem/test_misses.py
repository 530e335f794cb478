"""What nobody has stored is known in the loop, also beside others: their index files say that they have no news."""

import asyncio
import math
import os

import pytest

from async_cache.l2.filesystem import FileSystemBackend, following, writers
from async_cache.testing.conformance import find, key, put

OTHERS = 3
BOTH = [key(0), key(100)]
HASHES, OBJECTS = [each.chunk_hash for each in BOTH], [BOTH[0][1:]]


@pytest.fixture(autouse=True)
def _no_time_passes(monkeypatch):
    for name in ("SEEN_SECONDS", "ADOPT_SECONDS"):
        monkeypatch.setattr(following, name, math.inf)


@pytest.fixture
async def start(tmp_path):
    started = []

    async def start():
        backend = FileSystemBackend(tmp_path / "kv")
        await backend.open()
        started.append(backend)
        return backend

    yield start
    for backend in started:
        await backend.close()


@pytest.fixture
async def beside_others(start):
    """A backend, others, each of which has stored something, and the directory has not changed for long."""
    backend, others = await start(), [await start() for _ in range(OTHERS)]
    for number, other in enumerate(others):
        await put(other, [number], 1000)
    os.utime(backend.path, (0, 0))
    await find(backend, [100])
    return backend, others


def answer(backend):
    """What it says at once of an object that is there, and of another one; None where it has to ask."""
    said = backend.lookup_nowait(HASHES, OBJECTS)
    backend.unpin(BOTH[:1] if said else [])
    return said


async def test_a_miss_beside_others_takes_a_status_of_each_and_no_thread(beside_others, monkeypatch):
    backend, _ = beside_others
    calls, fstat = [], os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: calls.append(fd) or fstat(fd))
    assert answer(backend) == [True, False]
    assert len(calls) == OTHERS + 1  # the directory
    assert backend.present_nowait(HASHES, OBJECTS) == [True, False]


async def test_what_another_has_stored_is_asked_for(beside_others):
    backend, others = beside_others
    await put(others[1], [100], 1000)
    assert answer(backend) is None
    assert await find(backend, [100]) == [True]
    assert answer(backend) == [True, True]


async def test_who_has_come_is_asked(beside_others, start):
    backend, _ = beside_others
    await put(await start(), [100], 1000)
    assert answer(backend) is None
    assert await find(backend, [100]) == [True]


async def test_what_was_read_and_is_not_known_yet_is_waited_for(beside_others, monkeypatch):
    backend, others = beside_others
    await put(others[1], [100], 1000)
    learn, reached, opened = following.Following._learn, asyncio.Event(), asyncio.Event()

    async def slow(*arguments, **options):
        reached.set()
        await opened.wait()
        await learn(*arguments, **options)

    monkeypatch.setattr(following.Following, "_learn", slow)
    finding = asyncio.create_task(find(backend, [100]))
    await reached.wait()
    assert not backend._log.directory.writers.has_news()
    assert answer(backend) is None
    opened.set()
    assert await finding == [True]


@pytest.mark.parametrize(("name", "value"), [("has_status_at_hand", lambda fd: False), ("MOST_ASKED", OTHERS - 1)])
async def test_where_a_status_may_take_long_a_thread_asks(monkeypatch, start, name, value):
    monkeypatch.setattr(writers, name, value)
    backend, others = await start(), [await start() for _ in range(OTHERS)]
    for other in others:
        await put(other, [0], 1000)
    os.utime(backend.path, (0, 0))
    assert await find(backend, [0, 100]) == [True, False]
    monkeypatch.setattr(os, "fstat", None)
    assert answer(backend) is None
    monkeypatch.undo()
