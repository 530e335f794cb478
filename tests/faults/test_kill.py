"""A process that stores is killed at any moment: afterwards nothing torn is served, and what was flushed is there.

What it was writing is removed, and takes no room.
"""

import asyncio
import random
import shutil
import sys
import time

import pytest
from contract.support import PAGE, fill, make_layout, make_prompt, open_cache, read_back
from soak import rounds

from async_cache import ObjectGroup
from async_cache.l2.filesystem.backend import FileSystemBackend

from .disk import PAGE_BYTES, allocated, listing, places, process, rests, say

LAYOUT = make_layout(ObjectGroup((1000,), "uint8"), ObjectGroup((2 * 2**20 + 1,), "uint8"))
SIZES = {group.size_bytes for group in LAYOUT.groups}
CHUNKS = 3
PAGES = 8 * CHUNKS * LAYOUT.objects.room_bytes[0] // PAGE


def prompt_of(number):
    return make_prompt(CHUNKS, number, LAYOUT)


def cache_on(directory, durability):
    return open_cache(FileSystemBackend(directory, durability=durability), pages=PAGES)


async def store_for_ever(directory, durability):
    """Store one prompt after the other; say its number when it is flushed."""
    async with cache_on(directory, durability) as cache:
        for number in range(10**6):
            await fill(cache, prompt_of(number))
            flushed = await cache.flush()
            assert (flushed.written, flushed.pending, flushed.dropped) == (CHUNKS, 0, 0)
            say(number)


def unpublished(directory):
    """The bytes in segments behind the last object that an index tells of."""
    written = {path: path.stat().st_size for path in directory.glob("*.seg")}
    known = places(directory).values()
    ends = {path: max((p.offset + p.size_bytes for p in known if p.path == path), default=0) for path in written}
    return sum(max(0, written[path] - -(-end // PAGE_BYTES) * PAGE_BYTES) for path, end in ends.items())


def store_until_killed(rng, directory, durability, *, writing):
    """The prompts that were flushed before the kill, which comes at a random moment, or as a body is being written."""
    with process(__spec__.name, directory, durability) as child:
        first = child.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        while writing and not unpublished(directory):
            assert child.poll() is None
        child.kill()
        return [int(line) for line in [first, *child.stdout] if line.endswith("\n")]


@pytest.mark.parametrize("durability", ["none", "fsync"])
async def test_a_kill_while_it_stores(tmp_path, durability, record_property):
    rng = random.Random(durability)
    cut_off = 0
    for number in range(rounds(4, 50)):
        directory = tmp_path / str(number)
        directory.mkdir()
        flushed = store_until_killed(rng, directory, durability, writing=number % 2)
        cut_off += unpublished(directory) > 0
        assert {place.size_bytes for place in places(directory).values()} == SIZES
        async with cache_on(directory, durability) as cache:
            for each in flushed:
                assert await read_back(cache, prompt_of(each)) == CHUNKS
            assert await read_back(cache, prompt_of(len(flushed))) <= CHUNKS
            assert await read_back(cache, prompt_of(len(flushed) + 1)) == 0
            await fill(cache, prompt_of(len(flushed)))
            assert (await cache.flush()).dropped == 0
        backend = FileSystemBackend(directory)
        await backend.open()
        assert len(await listing(backend)) == 2 * CHUNKS * (len(flushed) + 1)
        assert (rests(directory), unpublished(directory)) == ([], 0)
        await backend.close()
        needed = sum(-(-place.size_bytes // PAGE_BYTES) for place in places(directory).values()) * PAGE_BYTES
        assert allocated(directory) <= needed + 16 * PAGE_BYTES  # index files, and what the file system keeps
        shutil.rmtree(directory)
    assert cut_off >= number // 4
    record_property("bodies that were cut off", cut_off)


if __name__ == "__main__":
    asyncio.run(store_for_ever(*sys.argv[1:]))
