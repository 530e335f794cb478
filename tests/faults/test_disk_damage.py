"""A file that is not what was stored is a miss, and the result says why; none of it is served; it can be stored anew.

Each kind of damage strikes files of the directory: bits, lengths, contents of other files, other kinds of files.
"""

import os
import random
import shutil
import socket
from contextlib import AsyncExitStack

import pytest
from contract.support import (
    CHUNK_TOKENS,
    assert_nothing_held,
    count_hits,
    fill,
    fill_l2,
    make_prompt,
    object_keys,
    open_cache,
    read_back,
    verify,
)
from soak import rounds

from async_cache import Shortfall
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.testing.conformance import content, find, get, key, put

from .disk import CHUNK_PAGES, LAYOUT, TRAILER_BYTES, path_of, rests

CHUNKS = 8
PROMPT = make_prompt(CHUNKS, layout=LAYOUT)


def flip(data, *bits):
    data = bytearray(data)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    return data


# Other bytes in the file: CORRUPT.


def flip_bits(data, rng):
    return flip(data, *rng.sample(range(8 * len(data)), rng.choice((1, 1, 2, 3, 64))))


def flip_in_trailer(data, rng):
    return flip(data, 8 * len(data) - 1 - rng.randrange(8 * TRAILER_BYTES))


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def cut_head(data, rng):
    return data[rng.randrange(1, len(data)) :]


def extend(data, rng):
    return data + rng.randbytes(rng.choice((1, TRAILER_BYTES, len(data))))


def extend_head(data, rng):
    return rng.randbytes(rng.choice((1, TRAILER_BYTES, len(data)))) + data


def empty(data, rng):
    return b""


def zero(data, rng):
    return bytes(len(data))


def zero_tail(data, rng):
    """As after a power failure: the length was written, the bytes were not."""
    kept = rng.randrange(len(data) - TRAILER_BYTES)
    return data[:kept] + bytes(len(data) - kept)


def noise(data, rng):
    return rng.randbytes(len(data))


CONTENTS = [flip_bits, flip_in_trailer, truncate, cut_head, extend, extend_head, empty, zero, zero_tail, noise]


# Something else in the place of the file: GONE.


def nothing(path):
    path.unlink()


def directory(path):
    path.unlink()
    path.mkdir()


def link_to_a_good_one(path):
    path.rename(path.with_name("good"))
    path.symlink_to("good")


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def unix_socket(path):
    path.unlink()
    short = f"/proc/self/fd/{os.open(path.parent, os.O_PATH)}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{short}/{path.name}")
    os.close(int(os.path.basename(short)))


PLACES = [nothing, directory, link_to_a_good_one, link_to_itself, pipe, unix_socket]


def damage(path, rng):
    """Do any damage to a file; why it can not be served then."""
    change = rng.choice(CONTENTS + PLACES)
    if change in PLACES:
        change(path)
        return LoadOutcome.GONE
    before = path.read_bytes()
    after = change(before, rng)
    path.write_bytes(after)
    assert after != before
    return LoadOutcome.CORRUPT


def swap(one, other):
    """Each gets the content of the other: both are CORRUPT."""
    one.rename(one.with_name("swapped"))
    other.rename(one)
    one.with_name("swapped").rename(other)


def make_room(folder):
    """Remove what no store would replace: directories, and the good file behind a link."""
    for path in folder.iterdir():
        if path.is_dir():
            path.rmdir()
    (folder / "good").unlink(missing_ok=True)


# The backend itself.


@pytest.fixture(params=[False, True], ids=["", "direct"])
async def backend(request, tmp_path):
    backend = FileSystemBackend(tmp_path / "kv", capacity_bytes=None, direct=request.param)
    await backend.open()
    yield backend
    backend.check_integrity()
    assert backend.pins == 0
    await backend.close()


async def check_each(backend, folder, size_bytes, changes):
    """Change one file after the other's fashion, each in a file of its own: none is served, all can be stored anew."""
    numbers = range(len(changes))
    assert all(await put(backend, numbers, size_bytes))
    for number, change in enumerate(changes):
        path = path_of(folder, key(number))
        path.write_bytes(change(path.read_bytes()))
    assert await get(backend, numbers, size_bytes) == [LoadOutcome.CORRUPT] * len(changes)
    assert os.listdir(folder) == []
    assert not any(await find(backend, numbers))
    assert all(await put(backend, numbers, size_bytes))
    assert await get(backend, numbers, size_bytes) == [content(number, size_bytes) for number in numbers]


@pytest.mark.parametrize("size_bytes", [1, 16])
async def test_every_bit_of_a_record(backend, tmp_path, size_bytes):
    bits = range(8 * (size_bytes + TRAILER_BYTES))
    await check_each(backend, tmp_path / "kv", size_bytes, [lambda data, bit=bit: flip(data, bit) for bit in bits])


async def test_every_length_of_a_record(backend, tmp_path):
    whole = 16 + TRAILER_BYTES
    changes = [lambda data, n=n: (data * 3)[:n] for n in range(3 * whole) if n != whole]
    changes += [lambda data, n=n: data[n:] for n in range(1, whole)]
    await check_each(backend, tmp_path / "kv", 16, changes)


@pytest.mark.parametrize("size_bytes", [4096, 70_001, 3 * 2**19])
async def test_any_damage_to_records(backend, tmp_path, size_bytes):
    """Each round, half of eight objects are damaged: the others are not touched by it."""
    rng, folder, numbers = random.Random(size_bytes), tmp_path / "kv", range(8)
    good = [content(number, size_bytes) for number in numbers]
    for _ in range(rounds(8, 300)):
        assert all(await put(backend, numbers, size_bytes))
        expected = dict(enumerate(good))
        hurt = rng.sample(numbers, 4)
        for number in hurt[:2]:
            expected[number] = damage(path_of(folder, key(number)), rng)
            if (folder / "good").exists():
                break  # there is one such name
        swap(path_of(folder, key(hurt[2])), path_of(folder, key(hurt[3])))
        expected |= dict.fromkeys(hurt[2:], LoadOutcome.CORRUPT)
        assert await get(backend, numbers, size_bytes) == list(expected.values())
        found = [not isinstance(outcome, LoadOutcome) for outcome in expected.values()]
        assert await find(backend, numbers) == found
        make_room(folder)
    assert all(await put(backend, numbers, size_bytes))
    assert await get(backend, numbers, size_bytes) == good
    assert rests(folder) == []


# Through the cache.


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_is_damaged_falls_short_and_is_stored_anew(tmp_path, restarted):
    """A cache that stays open promises what was damaged; one that starts anew may see that some of it is not there."""
    rng = random.Random(restarted)
    async with AsyncExitStack() as stack:

        async def start():
            backend = FileSystemBackend(tmp_path, capacity_bytes=None)
            return await stack.enter_async_context(open_cache(backend, pages=2 * CHUNKS * CHUNK_PAGES)), backend

        cache, backend = await start()
        for _ in range(rounds(40, 1500)):
            await fill_l2(cache, PROMPT)
            if restarted:
                await stack.aclose()
            hurt = {}
            for index in rng.sample(range(CHUNKS), rng.randint(1, 3)):
                (of,) = object_keys(PROMPT, [index], groups=[rng.randrange(2)])
                hurt[index] = Shortfall(damage(path_of(tmp_path, of), rng).value)
                if (tmp_path / "good").exists():
                    break
            if restarted:
                cache, backend = await start()
            start_chunk = 0
            for first in sorted(hurt):
                prefetch = cache.prefetch(PROMPT, skip_tokens=start_chunk * CHUNK_TOKENS)
                hits, result = await prefetch.lookup_done, await prefetch.load_done
                assert start_chunk or restarted or hits.chunks == CHUNKS
                assert result.chunks == first - start_chunk
                assert result.shortfall is (hurt[first] if hits.chunks > result.chunks else None)
                async with cache.read(prefetch.request_id) as lease:
                    assert verify(lease, PROMPT) == list(range(start_chunk, first))
                start_chunk = first + 1
            await assert_nothing_held(cache)
            assert await count_hits(cache, PROMPT) == min(hurt)
            assert backend.pins == 0
            make_room(tmp_path)
            await fill(cache, PROMPT)
            assert await read_back(cache, PROMPT) == CHUNKS
        await fill_l2(cache, PROMPT)
        assert await read_back(cache, PROMPT) == CHUNKS
        assert rests(tmp_path) == []


async def test_a_directory_in_the_place_of_an_object_is_left_alone(tmp_path):
    """It may be somebody's: its chunk can not be stored, which is counted, until it is gone."""
    backend = FileSystemBackend(tmp_path)
    async with open_cache(backend, breaker_reset_seconds=0.01) as cache:
        await fill_l2(cache, PROMPT)
        path = path_of(tmp_path, object_keys(PROMPT)[4])
        directory(path)
        (path / "file").touch()
        assert await read_back(cache, PROMPT) == 2
        await fill(cache, PROMPT)
        flushed = await cache.flush()
        assert (flushed.written, flushed.pending, flushed.dropped) == (0, 0, 1)
        assert await read_back(cache, PROMPT) == CHUNKS  # from L1
        shutil.rmtree(path)
        await cache.clear("l1")
        await fill_l2(cache, PROMPT)
        assert await read_back(cache, PROMPT) == CHUNKS


async def test_a_directory_that_is_removed_is_gone_and_can_not_be_stored_in(tmp_path):
    """The path may be made anew meanwhile: this cache has nothing to do with it."""
    folder = tmp_path / "kv"
    async with open_cache(FileSystemBackend(folder), breaker_reset_seconds=0.01) as cache:
        await fill_l2(cache, PROMPT)
        shutil.rmtree(folder)
        folder.mkdir()
        result = await cache.prefetch(PROMPT, request_id="a").load_done
        assert (result.chunks, result.shortfall) == (0, Shortfall.GONE)
        await cache.end_request("a")
        await fill(cache, PROMPT)
        assert (await cache.flush()).dropped == CHUNKS
        assert await read_back(cache, PROMPT) == CHUNKS  # from L1
        await assert_nothing_held(cache)
    assert os.listdir(folder) == []
