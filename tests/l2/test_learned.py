"""What a policy has learned outlives the restart of a directory."""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from async_cache.l2.chunks import Chunk
from async_cache.l2.filesystem.backend import LEARNED, FileSystemBackend
from async_cache.l2.filesystem.files import OpenFile
from async_cache.l2.filesystem.notes import Notes
from async_cache.prompt.origin import Origin
from async_cache.retention.policy import EvictionPolicy
from async_cache.retention.prefix import PrefixPolicy
from async_cache.retention.tinylfu import TinyLFU
from async_cache.testing.conformance import key, put

ORIGIN = Origin("", "model", "", "")


class Clock:
    """Time that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def opened(path: Path, policy: EvictionPolicy[Chunk]) -> FileSystemBackend:
    backend = FileSystemBackend(path, policy=policy)
    await backend.open()
    return backend


@contextmanager
def notes_of(path: Path) -> Iterator[Notes]:
    """The notes of a store that is closed."""
    directory = OpenFile(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
    yield Notes(directory.fd, 0)


def ask(backend: FileSystemBackend, clock: Clock, numbers: list[int]) -> None:
    clock.now += 1.0
    for number in numbers:
        backend.asked([key(number).chunk_hash], 4, 4, ORIGIN)


async def test_what_was_learned_of_a_directory_is_known_after_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    policy: PrefixPolicy[Chunk] = PrefixPolicy(clock)
    first = await opened(tmp_path / "kv", policy)
    await put(first, range(20), 100)
    for turn in range(100):  # these four are asked for again and again, the others were once
        ask(first, clock, [turn % 4])
    hot = {key(number).chunk_hash for number in range(4)}
    known = len(policy), policy.lessons
    await first.close()
    after: PrefixPolicy[Chunk] = PrefixPolicy(clock)
    second = await opened(tmp_path / "kv", after)
    assert len([item async for item in second.keys()]) == 20
    assert (len(after), after.lessons) == known
    assert {chunk.chunk_hash for chunk in list(after.victims())[-4:]} == hot
    after.check_integrity()
    await second.close()


@pytest.mark.parametrize("damage", ["flipped", "cut", "another policy's", "empty"])
async def test_what_was_learned_and_cannot_be_read_is_learned_anew(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    path = tmp_path / "kv"
    first = await opened(path, TinyLFU() if damage == "another policy's" else PrefixPolicy(clock))
    await put(first, range(4), 100)
    ask(first, clock, [0, 1])
    await first.close()
    with notes_of(path) as notes:
        note = notes.read(LEARNED)
        assert note
        if damage == "flipped":
            notes.write(LEARNED, note[:100] + bytes([note[100] ^ 1]) + note[101:])
        elif damage in ("cut", "empty"):
            notes.write(LEARNED, note[:50] if damage == "cut" else b"")
    policy: PrefixPolicy[Chunk] = PrefixPolicy(clock)
    second = await opened(path, policy)
    assert len([item async for item in second.keys()]) == 4 and "cannot be read" in caplog.text
    assert not policy.lessons and len(policy) == 4
    await second.close()


async def test_a_directory_whose_policy_learns_nothing_has_no_note_of_it(tmp_path: Path) -> None:
    backend = FileSystemBackend(tmp_path / "kv")
    await backend.open()
    await put(backend, range(4), 100)
    await backend.close()
    with notes_of(tmp_path / "kv") as notes:
        assert notes.read(LEARNED) is None


async def test_an_open_that_is_given_up_while_it_reads_what_was_learned_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, may_go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait(notes: Notes, name: str) -> None:
        loop.call_soon_threadsafe(read.set)
        may_go_on.wait()

    monkeypatch.setattr(Notes, "read", wait)
    backend = FileSystemBackend(tmp_path / "kv")
    opening = asyncio.create_task(backend.open())
    await read.wait()
    opening.cancel()
    await asyncio.wait([opening])
    await backend.close()
    may_go_on.set()
    assert await backend._threads.ended(10)
