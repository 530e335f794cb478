"""Notes beside the objects: they count, they are bounded, and what was begun of them does not stay."""

import asyncio
import os

import pytest
from contract.support import make_prompt
from faults.local_store.story import SLACK_BYTES, disk_bytes

from async_cache.errors import BackendError
from async_cache.l2.filesystem import FileSystemBackend
from async_cache.testing.conformance import content, get, put

PAGE = 4096
CAPACITY_BYTES = 2**20
OBJECTS = range(60)
SIZE_BYTES = 5 * PAGE  # of each: fifty fit


@pytest.fixture
async def start(tmp_path):
    """Makes opened backends on the directory; closed, and checked, at the end."""
    started = []

    async def start():
        backend = FileSystemBackend(tmp_path / "kv", capacity_bytes=CAPACITY_BYTES)
        await backend.open()
        started.append(backend)
        return backend

    yield start
    for backend in started:
        backend.check_integrity()
        await backend.close()


async def fill(backend):
    for number in OBJECTS:
        assert await put(backend, [number], SIZE_BYTES) == [True]


async def quiet(backend):
    """Once what was given up is gone from the disk."""
    await backend._log.following.recovery(None)
    await backend._threads.recorded()


async def test_notes_count_in_the_capacity_and_older_objects_make_room_for_them(start, tmp_path):
    backend = await start()
    await fill(backend)
    before = backend.usage().used_bytes
    for number in range(20):
        await backend.keep_note(f"note{number}", bytes(PAGE))
    await quiet(backend)
    assert disk_bytes(tmp_path / "kv") <= CAPACITY_BYTES
    assert backend.usage().used_bytes <= before - 15 * PAGE
    for number in range(20):
        await backend.keep_note(f"note{number}", None)
    await fill(backend)
    assert backend.usage().used_bytes >= before - SIZE_BYTES  # the index has grown meanwhile
    assert await get(backend, [OBJECTS[-1]], SIZE_BYTES) == [content(OBJECTS[-1], SIZE_BYTES)]


async def test_notes_of_before_and_of_others_count(start, tmp_path):
    first, second = await start(), await start()
    for number in range(20):
        await first.keep_note(f"note{number}", bytes(PAGE))
    second._log.following._adopted_at = -1000.0  # it is time to look for what others have done
    await second._log.following.recovery(None)
    await second._log.following.look()
    await fill(second)
    await quiet(second)
    assert disk_bytes(tmp_path / "kv") <= CAPACITY_BYTES
    for backend in (first, second):
        await backend.close()
    third = await start()
    await fill(third)
    await quiet(third)
    assert disk_bytes(tmp_path / "kv") <= CAPACITY_BYTES
    assert len(await third.notes()) == 20


async def test_a_note_for_which_there_is_no_room_is_refused_and_the_one_before_it_stays(start):
    backend = await start()
    await fill(backend)
    before = backend.usage()
    await backend.keep_note("a", b"before")
    with pytest.raises(BackendError, match="no room"):
        await backend.keep_note("a", bytes(CAPACITY_BYTES // 4))
    assert await backend.note("a") == b"before" and await backend.notes() == {"a": b"before"}
    assert backend.usage().used_bytes >= before.used_bytes - SIZE_BYTES
    assert await backend.note("b") is None
    await backend.keep_note("a", None)
    await backend.keep_note("a", None)
    assert await backend.note("a") is None


async def test_what_the_dead_have_begun_does_not_stay_and_what_the_living_have_does(start, tmp_path):
    living = await start()
    await living.keep_note("a", b"a")
    begun = f"tmp.{living._log.directory.writer:016x}"
    for folder in (".notes", ".origins"):
        (tmp_path / "kv" / folder).mkdir(exist_ok=True)
        for name in (begun, f"tmp.{1:016x}", "tmp.else", "f"):
            (tmp_path / "kv" / folder / name).write_bytes(bytes(100))
    other = await start()
    await quiet(other)
    await other._log.work.idle()
    for folder in (".notes", ".origins"):
        there = set(os.listdir(tmp_path / "kv" / folder))
        assert begun in there and f"tmp.{1:016x}" not in there
        assert {"tmp.else", "f"} <= there  # nobody knows what they are


async def test_a_note_is_kept_where_the_path_is(start, tmp_path):
    backend = await start()
    await backend.keep_note("a", b"a")
    os.rename(tmp_path / "kv", tmp_path / "elsewhere")
    await backend.keep_note("b", b"b")
    assert await backend.notes() == {"b": b"b"}
    assert (tmp_path / "kv" / ".notes" / "b").read_bytes() == b"b"


@pytest.mark.parametrize("what", ["a file", "a directory of directories"])
async def test_where_there_can_be_no_notes_there_are_objects(start, tmp_path, what):
    backend = await start()
    assert await put(backend, [1], SIZE_BYTES) == [True]
    await backend.close()
    if what == "a file":
        (tmp_path / "kv" / ".notes").write_bytes(b"")
    else:
        (tmp_path / "kv" / ".notes" / "a").mkdir(parents=True)
    backend = await start()
    with pytest.raises(BackendError):
        await backend.keep_note("a", b"a")
    assert await put(backend, [2], SIZE_BYTES) == [True]
    assert await get(backend, [1, 2], SIZE_BYTES) == [content(number, SIZE_BYTES) for number in (1, 2)]


async def test_many_notes_at_once_are_all_kept(start, tmp_path):
    first, second = await start(), await start()
    names = [hash_.hex() for hash_ in make_prompt(50).chunk_hashes]
    await asyncio.gather(
        *(backend.keep_note(name, name.encode()) for backend in (first, second) for name in names[:30])
    )
    assert await second.notes() == {name: name.encode() for name in names[:30]}
    assert disk_bytes(tmp_path / "kv" / ".notes") <= SLACK_BYTES
