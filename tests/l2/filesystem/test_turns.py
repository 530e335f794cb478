"""What calls about very many objects do in one turn of the loop is bounded, together: counted, and not timed."""

import asyncio
import gc
import sys
from asyncio.base_events import BaseEventLoop
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from contract.support import fill_l2, make_layout, make_prompt, open_cache
from faults.disk import places

from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem import FileSystemBackend
from async_cache.l2.filesystem.directory import Directory
from async_cache.l2.filesystem.format import RECORD_BYTES
from async_cache.l2.filesystem.room import SLICE
from async_cache.read.batches import Batches
from async_cache.testing.conformance import key

FEW, MANY = 1024, 4096
SOME = 512
BATCH = 64  # chunks


@contextmanager
def most_calls():
    """The most calls in a turn of the loop, in a list of one."""
    most, calls, turn = [0], 0, BaseEventLoop._run_once

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    def counted(loop):
        nonlocal calls
        calls = 0
        turn(loop)
        most[0] = max(most[0], calls)

    gc.collect()
    gc.disable()  # what it frees may call
    try:
        with patch.object(BaseEventLoop, "_run_once", counted):
            sys.setprofile(count)
            try:
                yield most
            finally:
                sys.setprofile(None)
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Has so many objects."""
    directory = tmp_path_factory.mktemp("turns") / "kv"

    async def fill():
        backend = FileSystemBackend(directory)
        await backend.open()
        for begin in range(0, MANY, 256):
            keys = [key(number) for number in range(begin, begin + 256)]
            assert all(await backend.store(keys, [memoryview(b"x")] * 256))
        await backend.close()

    asyncio.run(fill())
    return directory


def damage(directory):
    for place in places(directory).values():
        place.write(b"y")


async def loaded(directory, objects, at_once, first=0):
    """What came of objects that are loaded by one call, or by several at once, and the most calls in a turn."""
    backend = FileSystemBackend(directory)
    await backend.open()
    async for _ in backend.keys():  # which waits for recovery
        pass
    calls = [
        ([key(first + number) for number in range(begin, begin + at_once)], [memoryview(bytearray(1))] * at_once)
        for begin in range(0, objects, at_once)
    ]
    with most_calls() as most:
        outcomes = await asyncio.gather(*(backend.load(*call) for call in calls))
    await backend.close()
    return Counter(outcome for each in outcomes for outcome in each), most[0]


@pytest.mark.parametrize("at_once", [SOME, None], ids=["many calls", "one call"])
@pytest.mark.parametrize(
    ("first", "outcome"),
    [(0, LoadOutcome.LOADED), (10**6, LoadOutcome.GONE), (0, LoadOutcome.CORRUPT)],
    ids=["there", "not there", "damaged"],
)
def test_loads_of_very_many_objects_share_the_turns_of_the_loop(directory, tmp_path, at_once, first, outcome):
    most = {}
    for objects in (FEW, MANY):
        copy = tmp_path / str(objects)
        copy.mkdir()
        for file in directory.iterdir():
            if file.is_file():
                (copy / file.name).write_bytes(file.read_bytes())
        if outcome is LoadOutcome.CORRUPT:
            damage(copy)
        came, most[objects] = asyncio.run(loaded(copy, objects, at_once or objects, first))
        assert came == {outcome: objects}
    assert most[MANY] < 1.5 * most[FEW] + 1000


async def test_batches_of_a_prefetch_begin_in_turns(tmp_path, monkeypatch):
    for name in ("_BATCH_CHUNKS", "_BATCH_OBJECTS"):
        monkeypatch.setattr(f"async_cache.read.batches.{name}", BATCH)
    monkeypatch.setattr("async_cache.read.batches._FEW_OBJECTS", 1)
    turns, turn = Counter(), 0
    run_once, objects = BaseEventLoop._run_once, Batches._objects

    def counted(loop):
        nonlocal turn
        turn += 1
        run_once(loop)

    def prepared(*arguments):
        turns[turn] += 1
        return objects(*arguments)

    prompt = make_prompt(16 * BATCH, 1, make_layout())
    async with open_cache(FileSystemBackend(tmp_path), pages=32 * BATCH) as cache:
        await fill_l2(cache, prompt)
        with patch.object(BaseEventLoop, "_run_once", counted), patch.object(Batches, "_objects", prepared):
            assert (await cache.prefetch(prompt).load_done).chunks == len(prompt)
    assert sum(turns.values()) == 16 and max(turns.values()) <= 2


async def test_an_index_is_written_anew_a_slice_of_objects_at_a_time_also_of_one_chunk(tmp_path):
    appended, append = [], Directory.append

    def told(directory, records):
        appended.append(len(records) // RECORD_BYTES)
        append(directory, records)

    keys = [key(0, group=group) for group in range(2 * SLICE + 1)]
    backend = FileSystemBackend(tmp_path)
    await backend.open()
    assert all(await backend.store(keys, [memoryview(b"x")] * len(keys)))
    with patch.object(Directory, "append", told):
        await backend.close()
    assert sum(appended) == len(keys) and max(appended) == SLICE
    await backend.open()
    assert all(await backend.lookup(keys))
    await backend.close()
