"""A full disk takes what is new in the place of what is old; what it has is loaded, and nothing is left half.

The disk is a small tmpfs, which runs out of bytes, or of files.
"""

import os
import random
import subprocess
from contextlib import contextmanager, suppress

import pytest
from contract.support import assert_nothing_held, fill, fill_l2, make_prompt, open_cache, read_back
from soak import rounds

from async_cache import BackendError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.testing.conformance import content, find, get, put

from .disk import CHUNK_PAGES, LAYOUT, listing, rests

CHUNKS = 6
PROMPTS = [make_prompt(CHUNKS, number, LAYOUT) for number in range(20)]
LIMITS = {"bytes": "size=600k", "files": "size=100m,nr_inodes=150"}


@pytest.fixture
def disk(tmp_path, request):
    """A directory with little room."""
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", LIMITS[request.param], "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mount.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


every_limit = pytest.mark.parametrize("disk", LIMITS, indirect=True)


@contextmanager
def less_room(disk, rng):
    """Somebody else's files take a part of the room for a while: more than a prompt needs."""
    ballast = [disk / f"ballast{number}" for number in range(rng.randrange(20, 90))]
    for path in ballast:
        path.write_bytes(bytes(rng.randint(1, 4096)))
    yield
    for path in ballast:
        path.unlink()


@every_limit
async def test_a_full_disk_goes_on_with_what_is_new_and_serves_what_it_kept(disk):
    """Below its capacity, too, the cache makes room for what comes: the oldest leaves."""
    rng = random.Random(0)
    for _ in range(rounds(4, 50)):
        backend = FileSystemBackend(disk / "kv", durability=rng.choice(("none", "fsync")), direct=rng.random() < 0.5)
        async with open_cache(backend, pages=2 * CHUNKS * CHUNK_PAGES, breaker_reset_seconds=0.01) as cache:
            with less_room(disk, rng):
                for prompt in PROMPTS:
                    await fill(cache, prompt)
                    flushed = await cache.flush()
                    assert (flushed.written, flushed.pending, flushed.dropped) == (CHUNKS, 0, 0)
                    await cache.clear("l1")
                    assert await read_back(cache, prompt) == CHUNKS
                    assert rests(disk / "kv") == []
                kept = [await read_back(cache, prompt) for prompt in PROMPTS]
                assert kept == sorted(kept) and kept[-1] == CHUNKS
            if os.statvfs(disk).f_blocks * os.statvfs(disk).f_frsize < 2**20:
                assert kept[0] < CHUNKS
            assert (await cache.delete(PROMPTS[-1])).chunks == CHUNKS
            await fill_l2(cache, *PROMPTS[:1])
            assert await read_back(cache, PROMPTS[0]) == CHUNKS
            await assert_nothing_held(cache)
            await cache.clear("all")
            assert backend.usage().objects == backend.pins == 0
        assert os.listdir(disk / "kv") == ["FORMAT"]


@pytest.mark.parametrize("disk", ["bytes"], indirect=True)
async def test_a_full_disk_takes_what_can_be_made_room_for(disk):
    backend = FileSystemBackend(disk / "kv", capacity_bytes=2**20)  # more than it gets
    await backend.open()
    numbers = range(200)
    stored = await put(backend, numbers, 5000)  # which make no room for one another
    assert 0 < sum(stored) < len(numbers)
    assert await find(backend, numbers) == stored
    expected = [content(number, 5000) if there else LoadOutcome.GONE for number, there in enumerate(stored)]
    assert await get(backend, numbers, 5000) == expected
    for number in range(200, 200 + rounds(10, 100)):
        assert await put(backend, [number, number + 1], 5000) == [True, True]
        assert await get(backend, [number, number + 1], 5000) == [content(number, 5000), content(number + 1, 5000)]
    pinned = list(await listing(backend))
    assert all(await backend.lookup(pinned))
    with pytest.raises(BackendError, match="No space left"):
        await put(backend, [1000, 1001], 5000)
    backend.unpin(pinned)
    assert rests(disk / "kv") == []
    assert await put(backend, [1000, 1001], 5000) == [True, True]
    backend.check_integrity()
    await backend.close()


@pytest.mark.parametrize("disk", ["files"], indirect=True)
async def test_a_disk_that_takes_no_more_files_takes_what_goes_into_those_that_are_there(disk):
    backend = FileSystemBackend(disk / "kv")
    await backend.open()
    with suppress(OSError):
        for number in range(200):
            (disk / str(number)).touch()
    with pytest.raises(BackendError, match="No space left"):
        await put(backend, [1], 5000)
    (disk / "0").unlink()
    assert await put(backend, range(100), 5000) == [True] * 100
    assert await get(backend, [1, 99], 5000) == [content(1, 5000), content(99, 5000)]
    backend.check_integrity()
    await backend.close()


@pytest.mark.parametrize("disk", ["files"], indirect=True)
async def test_a_directory_that_can_not_be_made_is_a_typed_error(disk):
    with suppress(OSError):
        for number in range(200):
            (disk / str(number)).touch()
    with pytest.raises(BackendError, match="cannot be opened"):
        await FileSystemBackend(disk / "kv").open()
    for number in range(3):  # of a directory, of what says whose it is, and of an index
        (disk / str(number)).unlink()
    async with open_cache(FileSystemBackend(disk / "kv"), breaker_reset_seconds=0.01) as cache:
        await fill(cache, PROMPTS[0])
        assert (await cache.flush()).dropped == CHUNKS
