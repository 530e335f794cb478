"""A full disk takes no more, and says so; what it has is loaded, nothing is left half, and with room made it stores.

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
from async_cache.testing.conformance import content, find, get, key, put

from .disk import CHUNK_PAGES, LAYOUT, rests

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
async def test_what_can_not_be_stored_is_dropped_and_what_is_there_is_served(disk):
    """Every other round room is made by a delete, and in the end by what others give back."""
    rng = random.Random(0)
    for number in range(rounds(4, 50)):
        backend = FileSystemBackend(disk, durability=rng.choice(("none", "fsync")), direct=rng.random() < 0.5)
        async with open_cache(backend, pages=2 * CHUNKS * CHUNK_PAGES, breaker_reset_seconds=0.01) as cache:
            stored = []
            with less_room(disk, rng):
                for prompt in PROMPTS:
                    await fill(cache, prompt)
                    flushed = await cache.flush()
                    assert (flushed.written + flushed.dropped, flushed.pending) == (CHUNKS, 0)
                    assert not any(name.startswith("tmp.") for name in rests(disk))
                    if flushed.dropped:
                        break
                    stored.append(prompt)
                await cache.clear("l1")
                assert await read_back(cache, prompt) < CHUNKS
                for each in stored:
                    assert await read_back(cache, each) == CHUNKS
                if number % 2:
                    assert (await cache.delete(stored.pop(0))).chunks == CHUNKS
                    await fill_l2(cache, prompt)
            await fill_l2(cache, prompt)
            for each in [*stored, prompt]:
                assert await read_back(cache, each) == CHUNKS
            await assert_nothing_held(cache)
            await cache.clear("all")
            assert backend.usage().objects == backend.pins == 0
        assert os.listdir(disk) == []


@every_limit
async def test_a_store_raises_or_says_what_it_did_not_store(disk):
    backend = FileSystemBackend(disk, capacity_bytes=2**20)  # more than it gets
    await backend.open()
    numbers = range(200)
    stored = await put(backend, numbers, 5000)
    assert 0 < sum(stored) < len(numbers)
    assert await find(backend, numbers) == stored
    expected = [content(number, 5000) if there else LoadOutcome.GONE for number, there in enumerate(stored)]
    assert await get(backend, numbers, 5000) == expected
    usage = backend.usage()
    for _ in range(rounds(10, 100)):
        with pytest.raises(BackendError, match="No space left"):
            await put(backend, [200, 201], 5000)
    assert backend.usage() == usage
    assert rests(disk) == []
    assert await backend.delete([key(0), key(1)]) == 2
    assert await put(backend, [200, 201], 5000) == [True, True]
    assert await get(backend, [2, 200, 201], 5000) == [content(number, 5000) for number in (2, 200, 201)]
    backend.check_integrity()
    await backend.close()


@pytest.mark.parametrize("disk", ["files"], indirect=True)
async def test_a_directory_that_can_not_be_made_is_a_typed_error(disk):
    with suppress(OSError):
        for number in range(200):
            (disk / str(number)).touch()
    with pytest.raises(BackendError, match="cannot be opened"):
        await FileSystemBackend(disk / "kv").open()
    (disk / "0").unlink()
    async with open_cache(FileSystemBackend(disk / "kv"), breaker_reset_seconds=0.01) as cache:
        await fill(cache, PROMPTS[0])
        assert (await cache.flush()).dropped == CHUNKS
