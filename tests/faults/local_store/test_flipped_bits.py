"""Bits of a closed store flip, blocks land in the wrong place: each object is right or a miss, and none is wrong.

A bit of a body costs this object, a bit of anything else at most one, unless it is in the head of a file. Where a body
lies is found by its bytes: whatever else there is was written by the store for itself.
"""

import asyncio
import random
from contextlib import asynccontextmanager

import pytest
from soak import rounds

from async_cache import ConfigError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem import FileSystemBackend
from async_cache.testing.conformance import content, key

from .story import found, load, size_of, store

OBJECTS = range(240)
DELETED = range(100, 130)
KEPT = [number for number in OBJECTS if number not in DELETED and size_of(number) > 16]
HEAD_BYTES = 128  # of a file: where it says what it is


@asynccontextmanager
async def opened(directory):
    backend = FileSystemBackend(directory, capacity_bytes=None)
    await backend.open()
    yield backend
    backend.check_integrity()
    assert backend.pins == 0
    await backend.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a store, by name."""
    directory = tmp_path_factory.mktemp("kv")
    asyncio.run(live(directory))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


async def live(directory):
    """Three lives, with objects that are deleted, and some of them stored anew."""
    for half in (OBJECTS[:120], OBJECTS[120:]):
        async with opened(directory) as backend:
            for begin in range(0, len(half), 8):
                assert all(await store(backend, half[begin : begin + 8]))
    async with opened(directory) as backend:
        await backend.delete([key(number) for number in [*DELETED, 0, 1, 2]])
        assert all(await store(backend, [0, 1, 2]))


@pytest.fixture(scope="module")
def bodies(files):
    """Where the body of each object lies: file, offset, length."""
    places = {}
    for number in KEPT:
        body = content(number, size_of(number))
        [places[number]] = [(name, at, len(body)) for name, data in files.items() if (at := data.rfind(body)) >= 0]
    return places


@pytest.fixture(scope="module")
def elsewhere(files, bodies):
    """The bytes that are no body of an object that is there: those in the head of a file, and all others."""
    taken = {name: bytearray(len(data)) for name, data in files.items()}
    for name, at, size in bodies.values():
        taken[name][at : at + size] = b"\1" * size
    free = [(name, at) for name, data in files.items() for at in range(len(data)) if data[at] and not taken[name][at]]
    return [place for place in free if place[1] < HEAD_BYTES], [place for place in free if place[1] >= HEAD_BYTES]


class Copies:
    """Copies of the files, each in a directory of its own."""

    def __init__(self, files, folder):
        self._files, self._folder = files, folder
        self._count = 0

    def damaged(self, *flips, moves=()):
        """A directory with these bytes flipped, given as (file, offset, bits), and these blocks moved."""
        data = {name: bytearray(before) for name, before in self._files.items()}
        for name, at, bits in flips:
            data[name][at] ^= bits
        for (name, at), (to, there), size in moves:
            data[to][there : there + size] = self._files[name][at : at + size]
        self._count += 1
        directory = self._folder / str(self._count)
        directory.mkdir()
        for name, changed in data.items():
            (directory / name).write_bytes(changed)
        return directory


@pytest.fixture
def copies(files, tmp_path):
    return Copies(files, tmp_path)


async def lost(backend):
    """The objects that are not served. Whatever is served is right."""
    there = await found(backend, OBJECTS)
    outcomes = await load(backend, there)
    return {number for number in KEPT if outcomes.get(number) is not LoadOutcome.LOADED}


async def is_good_again(backend, numbers):
    """What was lost is stored anew."""
    assert all(await store(backend, numbers))
    assert set((await load(backend, numbers)).values()) <= {LoadOutcome.LOADED}


def bit(rng):
    return 1 << rng.randrange(8)


async def test_a_bit_of_a_body_costs_its_object(copies, bodies):
    rng = random.Random(1)
    for _ in range(rounds(20, 210)):
        hurt = rng.sample(KEPT, 50)
        places = [bodies[number] for number in hurt]
        directory = copies.damaged(*((name, at + rng.randrange(size), bit(rng)) for name, at, size in places))
        async with opened(directory) as backend:
            assert await lost(backend) == set(hurt)
            await is_good_again(backend, hurt)
            assert await lost(backend) == set()


async def test_a_bit_of_a_body_of_an_open_store(copies, bodies):
    rng, directory = random.Random(2), copies.damaged()
    async with opened(directory) as backend:
        assert await lost(backend) == set()
        hurt = rng.sample(KEPT, 50)
        for number in hurt:
            name, at, size = bodies[number]
            with (directory / name).open("r+b") as file:
                file.seek(at + size - 1)
                file.write(bytes([content(number, size)[-1] ^ bit(rng)]))
        assert await lost(backend) == set(hurt)
        await is_good_again(backend, hurt)


async def test_a_bit_of_what_the_store_wrote_for_itself_costs_one_object(copies, elsewhere):
    rng = random.Random(3)
    _, others = elsewhere
    for _ in range(rounds(30, 1200)):
        flips = [(*place, bit(rng)) for place in rng.sample(others, 8)]
        async with opened(copies.damaged(*flips)) as backend:
            gone = await lost(backend)
            assert len(gone) <= len(flips)
            await is_good_again(backend, sorted(gone))


async def test_a_bit_in_the_head_of_a_file(copies, files, elsewhere):
    """It may cost what is in the file; that of the directory's marker has it refused. One at a time."""
    rng = random.Random(4)
    heads, _ = elsewhere
    for place in heads if rounds(0, 1) else rng.sample(heads, min(len(heads), 60)):
        directory = copies.damaged((*place, bit(rng)))
        try:
            async with opened(directory) as backend:
                await is_good_again(backend, sorted(await lost(backend)))
        except ConfigError:
            assert is_marker(files[place[0]])
            assert {path.name for path in directory.iterdir()} == files.keys()


def is_marker(data):
    """Whether a file tells what the directory is: one line."""
    return data.isascii() and data.endswith(b"\n")


async def test_a_block_in_the_wrong_place(copies, files, bodies):
    """A disk that writes one block over another, and one that swaps the bodies of two objects of one size."""
    rng = random.Random(5)
    names = [name for name, data in files.items() if data and not is_marker(data)]
    for number in range(rounds(30, 1000)):
        if number % 2:
            one, other = rng.sample([bodies[each] for each in KEPT if size_of(each) == 4096], 2)
            moves = [(one[:2], other[:2], 4096), (other[:2], one[:2], 4096)]
        else:
            size = rng.choice((64, 512, 4096))
            moves = [
                tuple((name, rng.randrange(0, len(files[name]), size)) for name in rng.choices(names, k=2)) + (size,)
            ]
        async with opened(copies.damaged(moves=moves)) as backend:
            gone = await lost(backend)
            assert number % 2 == 0 or len(gone) == 2
            await is_good_again(backend, sorted(gone))
