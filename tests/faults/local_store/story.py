"""A store's life in steps, and what must be true whichever system call was its last.

The bytes of an object follow from its number, so that a wrong byte shows wherever it comes from.
"""

import asyncio
import os
from collections.abc import Collection, Iterable, Sequence
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import Literal

from async_cache.errors import BackendError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem import FileSystemBackend, rewriting
from async_cache.testing.conformance import content, key

_SIZES = (1, 100, PAGESIZE, 5000, 3 * PAGESIZE, 20_001)
CAPACITY_BYTES = 64 * PAGESIZE
SLACK_BYTES = 32 * PAGESIZE  # of a directory, beside the bodies of its objects in whole pages
STORED = 16  # objects of one life

Durability = Literal["none", "fsync"]
Manner = Literal["calm", "restless", "without holes", "without locks"]
"""How a store lives: `restless` writes its index anew very often; the others are what its file system lacks."""

# What is done one after the other, or at once; and to which objects.
_STEPS: tuple[tuple[tuple[str, list[int]], ...], ...] = (
    (("store", [0, 1, 2, 3]),),
    (("store", [4, 5]), ("store", [6])),
    (("delete", [1, 4]),),
    (("store", [7, 8, 9]), ("load", [2, 3])),
    (("store", [1]),),
    (("delete", [8]), ("store", [10, 11])),
    (("store", [12, 13, 14, 15]),),
)


def size_of(number: int) -> int:
    return _SIZES[number % len(_SIZES)]


def pages_of(number: int) -> int:
    return -(-size_of(number) // PAGESIZE)


def _stored_in(step: Iterable[tuple[str, list[int]]]) -> set[int]:
    return {number for verb, numbers in step for number in numbers if verb == "store"}


def disk_bytes(directory: Path) -> int:
    """What the files of a directory take on the disk."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


class Life:
    """One life of a store: what it has done so far is seen by its tracer, and left when it is killed.

    Each object is ABSENT, STORING, STORED, DELETING or DELETED, in this order, and over again.
    """

    ABSENT, STORING, STORED, DELETING, DELETED = range(5)

    def __init__(self, number: int = 0, capacity_bytes: int = CAPACITY_BYTES, manner: Manner = "calm"):
        self.first = number * STORED  # of its objects
        self._capacity_bytes, self._manner = capacity_bytes, manner
        self._shared = mmap(-1, PAGESIZE)

    def so_far(self) -> bytes:
        """How far it is: the step that it is in, and the state of each object."""
        return self._shared[: 1 + STORED]

    @property
    def failed(self) -> set[int]:
        """The steps in which something failed."""
        return {step for step in range(len(_STEPS) + 1) if self._shared[1 + STORED + step]}

    @property
    def newest(self) -> set[int]:
        """The objects of the last step."""
        return {self.first + number for number in _stored_in(_STEPS[-1])}

    def must(self, so_far: bytes) -> set[int]:
        """The objects that are there: those whose store was told, and that nothing may have made room for since."""
        must: set[int] = set()
        room, seen = self._capacity_bytes // PAGESIZE // 2, set[int]()
        for step in reversed(_STEPS[: so_far[0]]):
            numbers = _stored_in(step)
            room -= sum(pages_of(self.first + number) for number in numbers - seen)
            seen |= numbers
            if room < 0:
                break
            must |= numbers
        return {self.first + number for number in must if so_far[1 + number] == self.STORED}

    def must_not(self, so_far: bytes) -> set[int]:
        """The objects whose deletion was told."""
        return {self.first + number for number in range(STORED) if so_far[1 + number] == self.DELETED}

    async def live(self, directory: Path, durability: Durability) -> None:
        """All steps, from the opening to the close. A call may fail: then nothing is told of its objects."""
        settings = {}
        if self._manner == "restless":
            settings["segment_bytes"] = 8 * PAGESIZE
            rewriting.SPARE_BYTES = -(2**40)  # in this process, which is of one life
        backend = FileSystemBackend(directory, capacity_bytes=self._capacity_bytes, durability=durability, **settings)
        try:
            await backend.open()
        except BackendError:
            self._note_failure()
            await backend.open()
        for count, step in enumerate(_STEPS, 1):
            self._shared[0] = count
            await asyncio.gather(*(self._do(backend, verb, numbers) for verb, numbers in step))
        await backend.close()

    async def _do(self, backend: FileSystemBackend, verb: str, numbers: Sequence[int]) -> None:
        objects = [self.first + number for number in numbers]
        try:
            match verb:
                case "load":
                    await load(backend, await found(backend, objects))
                case "delete":
                    self._note(numbers, self.DELETING)
                    await backend.delete(list(map(key, objects)))
                    self._note(numbers, self.DELETED)
                case "store":
                    self._note(numbers, self.STORING)
                    stored = await store(backend, objects)
                    self._note([number for number, there in zip(numbers, stored, strict=True) if there], self.STORED)
                    if not all(stored):
                        self._note_failure()
        except BackendError:
            self._note_failure()

    def _note_failure(self) -> None:
        self._shared[1 + STORED + self._shared[0]] = 1

    def _note(self, numbers: Collection[int], state: int) -> None:
        for number in numbers:
            self._shared[1 + number] = state


async def store(backend: FileSystemBackend, numbers: Sequence[int]) -> list[bool]:
    bodies = [memoryview(content(number, size_of(number))) for number in numbers]
    return await backend.store([key(number) for number in numbers], bodies)


async def load(backend: FileSystemBackend, numbers: Sequence[int]) -> dict[int, LoadOutcome]:
    """What becomes of each object; the bytes of what was loaded are right."""
    buffers = [bytearray(size_of(number)) for number in numbers]
    outcomes = await backend.load([key(number) for number in numbers], [memoryview(buffer) for buffer in buffers])
    for number, buffer, outcome in zip(numbers, buffers, outcomes, strict=True):
        assert outcome is not LoadOutcome.LOADED or buffer == content(number, size_of(number)), f"{number} is wrong"
    return dict(zip(numbers, outcomes, strict=True))


async def found(backend: FileSystemBackend, numbers: Sequence[int]) -> list[int]:
    """Which of them a lookup finds; they are not pinned then."""
    keys = [key(number) for number in numbers]
    present = await backend.lookup(keys)
    backend.unpin([each for each, there in zip(keys, present, strict=True) if there])
    return [number for number, there in zip(numbers, present, strict=True) if there]


async def check(
    directory: Path,
    numbers: Sequence[int],
    must: Collection[int],
    must_not: Collection[int],
    *,
    lost_writes: bool = False,
    capacity_bytes: int = CAPACITY_BYTES,
) -> None:
    """Open what a store left behind: it serves what must be there, nothing wrong, and is as good as new."""
    backend = FileSystemBackend(directory, capacity_bytes=capacity_bytes)
    await backend.open()
    listed = {each: size async for each, size in backend.keys()}
    there = await found(backend, numbers)
    outcomes = await load(backend, there) if there else {}
    loaded = {number for number, outcome in outcomes.items() if outcome is LoadOutcome.LOADED}
    assert set(must) <= loaded, f"lost: {sorted(set(must) - loaded)}, of which it says {outcomes}"
    assert not loaded & set(must_not), f"deleted, and there: {sorted(loaded & set(must_not))}"
    assert {each for each in listed if each in map(key, numbers)} <= set(map(key, there))
    assert lost_writes or len(loaded) == len(there), f"a kill tears nothing: {outcomes}"
    fresh = [10**6, 10**6 + 1, *numbers[:4]]
    assert all(await store(backend, fresh))
    assert set((await load(backend, fresh)).values()) == {LoadOutcome.LOADED}
    backend.check_integrity()
    await backend.delete([key(number) for number in [*fresh, *numbers]])
    assert await found(backend, [*fresh, *numbers]) == []
    assert backend.pins == 0
    await backend.close()
    assert disk_bytes(directory) <= SLACK_BYTES, f"left behind: {os.listdir(directory)}"
    await _is_empty(directory)


async def _is_empty(directory: Path) -> None:
    backend = FileSystemBackend(directory, capacity_bytes=CAPACITY_BYTES)
    await backend.open()
    assert [each async for each in backend.keys()] == []
    await backend.close()
