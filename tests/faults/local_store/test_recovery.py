"""A store with a great many objects is opened: it knows them all soon, and answers meanwhile, the newest first.

Counted in steps of the loop and not in milliseconds: how many objects one of them takes in, and how many objects are
known when the first answers come. `benchmarks/index.py` has the seconds, of a million of them.
"""

import asyncio

import pytest
from soak import rounds

from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem import FileSystemBackend
from async_cache.prompt.keys import ObjectKey
from async_cache.testing.conformance import key

from .story import load, store

log = pytest.importorskip("async_cache.l2.filesystem.format")

OBJECTS = rounds(100_000, 1_000_000)
MOST_AT_ONCE = 1024  # objects, in one step of the loop
PAGES_OF_A_SEGMENT = 32_768
WRITER = 7
PUT = 1


def fill(directory):
    """What a writer left that died: an index file, and segments that are all holes."""
    (directory / "FORMAT").write_bytes(log.MARKER_LINE % log.VERSION)
    with (directory / log.index_name(WRITER, 0)).open("wb") as file:
        file.write(log.header(WRITER))
        for number in range(OBJECTS):
            place = (WRITER, *divmod(number, PAGES_OF_A_SEGMENT))
            file.write(log.record(PUT, (number.to_bytes(32, "big"), 0, 0), place, 100, number))
    for number in range(-(-OBJECTS // PAGES_OF_A_SEGMENT)):
        with (directory / log.segment_name(WRITER, number)).open("wb") as file:
            file.truncate(PAGES_OF_A_SEGMENT * log.PAGE_BYTES)


class Steps:
    """How many objects a backend knew at each step of the loop."""

    def __init__(self, backend):
        self._backend = backend
        self.known = [0]
        self._step()

    def _step(self):
        self.known.append(self._backend.usage().objects)
        self._next = asyncio.get_running_loop().call_soon(self._step)

    def end(self):
        self._next.cancel()

    @property
    def most_at_once(self):
        return max(after - before for before, after in zip(self.known, self.known[1:], strict=False))


async def test_recovery_takes_small_steps_and_the_newest_first(tmp_path, record_property):
    fill(tmp_path)
    backend = FileSystemBackend(tmp_path, capacity_bytes=None)
    await backend.open()
    steps = Steps(backend)
    newest = [number.to_bytes(32, "big") for number in range(OBJECTS - 200, OBJECTS)]
    while backend.lookup_nowait(newest, [(0, 0)]) != [True] * len(newest):  # noqa: ASYNC110 (steps are counted)
        await asyncio.sleep(0)
    at_newest = backend.usage().objects
    backend.unpin([ObjectKey(digest, 0, 0) for digest in newest])
    assert await store(backend, [1, 2, 3]) == [True] * 3
    assert set((await load(backend, [1, 2, 3])).values()) == {LoadOutcome.LOADED}
    assert await backend.delete([key(3)]) == 1
    known = sum([1 async for _ in backend.keys()])
    steps.end()
    record_property("known when the newest were found", at_newest)
    assert known == backend.usage().objects == OBJECTS + 2
    assert steps.most_at_once <= MOST_AT_ONCE
    assert at_newest < OBJECTS / 10
    await backend.close()
