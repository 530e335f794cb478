"""What is not what was stored is a miss, and the result says why; none of it is served; it can be stored anew.

Each kind of damage strikes files of the directory: bodies and records, bits, lengths, the bytes of other objects, other
kinds of files. Where a whole file is struck, each object has one of its own.
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
from async_cache.l2.filesystem.format import RECORD_BYTES
from async_cache.testing.conformance import content, find, get, key, put

from .disk import CHUNK_PAGES, LAYOUT, place_of, places, rests

CHUNKS = 8
PROMPT = make_prompt(CHUNKS, layout=LAYOUT)


def flip(data, *bits):
    data = bytearray(data)
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
    return data


# Other bytes in the place of an object: CORRUPT.


def flip_bits(data, rng):
    return flip(data, *rng.sample(range(8 * len(data)), rng.choice((1, 1, 2, 3, 64))))


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def cut_head(data, rng):
    return data[rng.randrange(1, len(data)) :]


def extend_head(data, rng):
    return rng.randbytes(rng.choice((1, 64, len(data)))) + data


def empty(data, rng):
    return b""


def zero(data, rng):
    return bytes(len(data))


def zero_tail(data, rng):
    """As after a power failure: the length was written, the bytes were not."""
    kept = rng.randrange(len(data))
    return data[:kept] + bytes(len(data) - kept)


def noise(data, rng):
    return rng.randbytes(len(data))


CONTENTS = [flip_bits, truncate, cut_head, extend_head, empty, zero, zero_tail, noise]


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


def damage(place, rng):
    """Do any damage to an object that has a file of its own; why it can not be served then."""
    assert place.offset == 0
    change = rng.choice(CONTENTS + PLACES)
    if change in PLACES:
        change(place.path)
        return LoadOutcome.GONE
    before = place.read()
    after = change(before, rng)
    place.path.write_bytes(after)
    assert after[: len(before)] != before
    return LoadOutcome.CORRUPT if after else LoadOutcome.GONE  # as what is being removed


def swap(one, other):
    """Each gets the bytes of the other: both are CORRUPT."""
    assert one.size_bytes == other.size_bytes
    first = one.read()
    one.write(other.read())
    other.write(first)


def let_go(backend):
    """Have files opened anew: one that is open is served whatever became of its name, which is no harm."""
    files = backend._log.directory.files
    for name, _ in list(files._files):
        files.forget(name)


def make_room(folder):
    """Remove what is no file, and the good file behind a link: the cache leaves them alone."""
    for path in folder.iterdir():
        if path.name == ".origins":
            continue
        if path.is_dir():
            path.rmdir()
        elif path.is_symlink() or not (path.is_file() or not path.exists()):
            path.unlink()
    (folder / "good").unlink(missing_ok=True)


# The backend itself.


@pytest.fixture(params=[False, True], ids=["", "direct"])
async def backend(request, tmp_path):
    """Each object has a file of its own."""
    backend = FileSystemBackend(tmp_path / "kv", capacity_bytes=None, direct=request.param, segment_bytes=1)
    await backend.open()
    yield backend
    backend.check_integrity()
    assert backend.pins == 0
    await backend.close()


async def check_each(backend, folder, size_bytes, changes):
    """Change one body after the other's fashion: none is served, all can be stored anew."""
    numbers = range(len(changes))
    assert all(await put(backend, numbers, size_bytes))
    where = places(folder)
    for number, change in enumerate(changes):
        place = where[key(number)]
        place.path.write_bytes(change(place.read()))
    assert await get(backend, numbers, size_bytes) == [LoadOutcome.CORRUPT] * len(changes)
    assert not any(await find(backend, numbers))
    assert await backend.delete([key(0)]) == 0  # after all that was removed
    assert (rests(folder), places(folder)) == ([], {})
    assert all(await put(backend, numbers, size_bytes))
    assert await get(backend, numbers, size_bytes) == [content(number, size_bytes) for number in numbers]


@pytest.mark.parametrize("size_bytes", [1, 16, 80])
async def test_every_bit_of_a_body(backend, tmp_path, size_bytes):
    changes = [lambda data, bit=bit: flip(data, bit) for bit in range(8 * size_bytes)]
    await check_each(backend, tmp_path / "kv", size_bytes, changes)


async def test_every_length_of_a_body(backend, tmp_path):
    changes = [lambda data, n=n: data[:n] for n in range(1, 80)]
    changes += [lambda data, n=n: data[n:] for n in range(1, 80)]
    await check_each(backend, tmp_path / "kv", 80, changes)


@pytest.mark.parametrize("size_bytes", [4096, 70_001, 3 * 2**19])
async def test_any_damage_to_bodies(backend, tmp_path, size_bytes):
    """Each round, half of eight objects are damaged: the others are not touched by it."""
    rng, folder, numbers = random.Random(size_bytes), tmp_path / "kv", range(8)
    good = [content(number, size_bytes) for number in numbers]
    for _ in range(rounds(8, 300)):
        assert all(await put(backend, numbers, size_bytes))
        where = places(folder)
        expected = dict(enumerate(good))
        hurt = rng.sample(numbers, 4)
        for number in hurt[:2]:
            expected[number] = damage(where[key(number)], rng)
            if (folder / "good").exists():
                break  # there is one such name
        swap(where[key(hurt[2])], where[key(hurt[3])])
        let_go(backend)
        expected |= dict.fromkeys(hurt[2:], LoadOutcome.CORRUPT)
        assert await get(backend, numbers, size_bytes) == list(expected.values())
        found = [not isinstance(outcome, LoadOutcome) for outcome in expected.values()]
        assert await find(backend, numbers) == found
        make_room(folder)
    assert all(await put(backend, numbers, size_bytes))
    assert await get(backend, numbers, size_bytes) == good
    assert rests(folder) == []


@pytest.mark.parametrize("size_bytes", [4096, 5000, 70_001, 2**19, 3 * 2**19])
async def test_bits_of_bodies_that_lie_side_by_side(tmp_path, size_bytes):
    """What is damaged costs itself, and not what is read together with it."""
    rng, folder, numbers = random.Random(size_bytes), tmp_path / "kv", range(12)
    backend = FileSystemBackend(folder)
    await backend.open()
    for _ in range(rounds(20, 2000)):
        assert all(await put(backend, numbers, size_bytes))
        where = places(folder)
        assert len({place.path for place in where.values()}) <= 2
        hurt = rng.sample(numbers, rng.randint(1, 4))
        for number in hurt:
            place = where[key(number)]
            place.write(flip_bits(place.read(), rng))
        told = await get(backend, numbers, size_bytes)
        assert told == [LoadOutcome.CORRUPT if n in hurt else content(n, size_bytes) for n in numbers]
    await backend.close()


async def test_every_bit_of_an_index(tmp_path):
    """A record that was damaged is no record: its object is a miss after a restart, its neighbours are not."""
    folder, numbers = tmp_path / "kv", range(3)
    backend = FileSystemBackend(folder)
    await backend.open()
    assert all(await put(backend, numbers, 5000))
    await backend.close()
    (index,) = folder.glob("*.idx")
    whole = index.read_bytes()
    assert len(whole) == 4 * RECORD_BYTES
    for bit in range(0, 8 * len(whole), rounds(41, 1)):
        shutil.copytree(folder, tmp_path / "copy")
        (tmp_path / "copy" / index.name).write_bytes(flip(whole, bit))
        backend = FileSystemBackend(tmp_path / "copy")
        await backend.open()
        lost = bit // 8 // RECORD_BYTES - 1  # the first is the header, without which records are as good
        told = await get(backend, numbers, 5000)
        assert sum(outcome is LoadOutcome.GONE for outcome in told) == (lost >= 0)
        assert [outcome for outcome in told if isinstance(outcome, bytes)] == [
            content(n, 5000) for n, outcome in zip(numbers, told, strict=True) if isinstance(outcome, bytes)
        ]
        assert all(await put(backend, numbers, 5000))
        assert await get(backend, numbers, 5000) == [content(n, 5000) for n in numbers]
        backend.check_integrity()
        await backend.close()
        shutil.rmtree(tmp_path / "copy")


# Through the cache.


@pytest.mark.parametrize("restarted", [False, True])
async def test_what_is_damaged_falls_short_and_is_stored_anew(tmp_path, restarted):
    """A cache that stays open promises what was damaged; one that starts anew may see that some of it is not there."""
    rng = random.Random(restarted)
    async with AsyncExitStack() as stack:

        async def start():
            backend = FileSystemBackend(tmp_path, capacity_bytes=None, segment_bytes=1)
            return await stack.enter_async_context(open_cache(backend, pages=2 * CHUNKS * CHUNK_PAGES)), backend

        cache, backend = await start()
        for _ in range(rounds(40, 1500)):
            await fill_l2(cache, PROMPT)
            if restarted:
                await stack.aclose()
            hurt = {}
            for index in rng.sample(range(CHUNKS), rng.randint(1, 3)):
                (of,) = object_keys(PROMPT, [index], groups=[rng.randrange(2)])
                hurt[index] = Shortfall(damage(place_of(tmp_path, of), rng).value)
                if (tmp_path / "good").exists():
                    break
            if restarted:
                cache, backend = await start()
            let_go(backend)
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


async def test_a_directory_in_the_place_of_a_segment_is_left_alone(tmp_path):
    """It may be somebody's: what was there is gone, and is stored elsewhere."""
    backend = FileSystemBackend(tmp_path, segment_bytes=1)
    async with open_cache(backend, breaker_reset_seconds=0.01) as cache:
        await fill_l2(cache, PROMPT)
        path = place_of(tmp_path, object_keys(PROMPT)[4]).path
        directory(path)
        let_go(backend)
        (path / "file").touch()
        assert await read_back(cache, PROMPT) == 2
        await fill_l2(cache, PROMPT)
        assert await read_back(cache, PROMPT) == CHUNKS
        await cache.delete(PROMPT)
    assert (path / "file").exists()


@pytest.mark.parametrize("what", ["removed", "replaced", "made anew"])
async def test_a_directory_that_has_gone_is_opened_anew(tmp_path, what, caplog):
    """What it had is gone but for what is open; with the next store, or miss, the cache goes on in what is there."""
    folder, others = tmp_path / "kv", [make_prompt(CHUNKS, number, LAYOUT) for number in (2, 3)]
    async with open_cache(FileSystemBackend(folder), breaker_reset_seconds=0.01) as cache:
        await fill_l2(cache, PROMPT)
        if what == "replaced":
            folder.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(folder)
        if what != "removed":
            folder.mkdir()
        assert await read_back(cache, PROMPT) <= CHUNKS
        await cache.clear("l1")
        await fill_l2(cache, *others)
        assert len(places(folder)) == 2 * CHUNKS * CHUNK_PAGES
        assert [await read_back(cache, prompt) for prompt in [PROMPT, *others]] == [0, CHUNKS, CHUNKS]
        await assert_nothing_held(cache)
    assert caplog.text.count("opened anew") == 1
    async with open_cache(FileSystemBackend(folder)) as cache:
        assert [await read_back(cache, prompt) for prompt in [PROMPT, *others]] == [0, CHUNKS, CHUNKS]


async def test_a_directory_that_comes_back_is_found_again(tmp_path):
    """As that of a file system that was unmounted and is mounted again."""
    folder, others = tmp_path / "kv", [make_prompt(CHUNKS, number, LAYOUT) for number in (2, 3)]
    async with open_cache(FileSystemBackend(folder), breaker_reset_seconds=0.01) as cache:
        await fill_l2(cache, PROMPT)
        folder.rename(tmp_path / "elsewhere")
        await fill_l2(cache, others[0])
        folder.rename(tmp_path / "between")
        (tmp_path / "elsewhere").rename(folder)
        await fill_l2(cache, others[1])
        assert [await read_back(cache, prompt) for prompt in [PROMPT, *others]] == [CHUNKS, 0, CHUNKS]
