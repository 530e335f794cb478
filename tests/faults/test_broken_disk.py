"""A disk that fails, is slow, lies or never answers shortens what it was asked for, and harms nothing else.

What a read that never returns may write to is quarantined, shown, and given back when it returns; neither `close` nor
the exit of the process waits for it.
"""

import asyncio
import random
import sys
import time
from contextlib import suppress

import pytest
from contract.support import (
    PAGE,
    assert_nothing_held,
    count_hits,
    fill,
    fill_l2,
    make_prompt,
    open_cache,
    outcomes,
    read_back,
    seed,
    verify,
)
from soak import rounds

from async_cache import AsyncCache, AsyncCacheError, BackendError, CacheConfig, ObjectKey, Shortfall
from async_cache.l2.filesystem.backend import FileSystemBackend

from .disk import CHUNK_PAGES, LAYOUT, held_by_process, listing, place_of, process, rests, say

try:
    from .broken_disk import STUCK_SECONDS, BrokenDisk
except OSError as error:
    pytest.skip(f"no FUSE here: {error}", allow_module_level=True)

CHUNKS = 4
ROOM = CHUNKS * CHUNK_PAGES * PAGE
PROMPT, OTHER, THIRD = (make_prompt(CHUNKS, number, LAYOUT) for number in (1, 2, 3))
SECONDS = 3  # for what is well, on a machine that has others to serve; what is stuck takes longer
SHORT = {"lookup_timeout_seconds": SECONDS, "load_timeout_seconds": SECONDS, "store_timeout_seconds": SECONDS}
SHORT |= {"breaker_reset_seconds": 0.02, "close_timeout_seconds": 1}


@pytest.fixture(scope="module")
def mounted(tmp_path_factory):
    with BrokenDisk(tmp_path_factory.mktemp("disk")).mounted() as disk:
        yield disk


@pytest.fixture
def disk(mounted):
    mounted.start_anew()
    return mounted


async def no_quarantine(cache):
    """Wait until no memory is set aside."""
    async with asyncio.timeout(60):
        while (await cache.stats()).quarantined_bytes:  # noqa: ASYNC110 (it is shown, not announced)
            await asyncio.sleep(0.01)


# Reads.


@pytest.mark.parametrize(
    ("fault", "shortfall", "left"),
    [
        ("eio", Shortfall.BACKEND_ERROR, CHUNKS),
        ("stuck", Shortfall.DEADLINE, CHUNKS),
        ("early end", Shortfall.CORRUPT, 0),
        ("bit", Shortfall.CORRUPT, 0),
        ("short", None, CHUNKS),
        ("slow", None, CHUNKS),
    ],
)
async def test_a_read_that_fails_shortens_and_says_why(disk, fault, shortfall, left):
    """What could not be read is there still when the disk has healed; what was read wrong is not."""
    backend = FileSystemBackend(disk.path)
    async with open_cache(backend, **SHORT) as cache:
        await fill_l2(cache, PROMPT)
        with disk.broken("read", fault):
            prefetch = cache.prefetch(PROMPT, request_id="a")
            assert (await prefetch.lookup_done).chunks == CHUNKS
            result = await prefetch.load_done
        assert (result.chunks, result.shortfall) == (0 if shortfall else CHUNKS, shortfall)
        async with cache.read("a") as lease:
            assert verify(lease, PROMPT) == list(range(result.chunks))
        await no_quarantine(cache)
        await assert_nothing_held(cache)
        assert backend.pins == 0
        await cache.clear("l1")
        assert await read_back(cache, PROMPT) == left
        await fill_l2(cache, PROMPT)
        assert await read_back(cache, PROMPT) == CHUNKS


@pytest.mark.parametrize("fault", ["eio", "stuck", "early end", "bit"])
async def test_what_another_backend_has_is_served_from_there(disk, tmp_path, fault):
    async with open_cache(FileSystemBackend(disk.path), FileSystemBackend(tmp_path / "well"), **SHORT) as cache:
        await fill_l2(cache, PROMPT)
        with disk.broken("read", fault):
            assert await read_back(cache, PROMPT) == CHUNKS
        await no_quarantine(cache)
        await assert_nothing_held(cache)


# One object of many, and one call in twenty.


async def test_a_bad_sector_is_lost_alone_and_the_next_store_replaces_it(disk):
    """The head is served, nobody else notices, and the breaker stays closed, however often it is asked for."""
    prompts = [PROMPT, OTHER, THIRD]
    key = ObjectKey(PROMPT.chunk_hashes[2], 0, 1)
    backend = FileSystemBackend(disk.path, segment_bytes=1)  # the sectors of a file are those of an object
    async with open_cache(backend, breaker_failures=2, breaker_reset_seconds=600) as cache:
        await fill_l2(cache, *prompts)
        bad = place_of(disk.source, key).path
        with disk.broken("bad", bad.name):
            result = await cache.prefetch(PROMPT, request_id="a").load_done
            assert (result.chunks, result.shortfall) == (2, Shortfall.BACKEND_ERROR)
            await cache.end_request("a")
            for number in range(4):
                assert [await read_back(cache, prompt) for prompt in prompts] == [2, CHUNKS, CHUNKS]
                if number % 2:
                    await cache.clear("l1")
        await fill_l2(cache, PROMPT)
        assert place_of(disk.source, key).path != bad
        assert [await read_back(cache, prompt) for prompt in prompts] == [CHUNKS] * 3
        await assert_nothing_held(cache)


async def test_with_one_call_in_twenty_failing_four_in_five_hits_remain(disk):
    """Default timeouts and breaker; an engine that computes, and stores, what it does not get."""
    prompts = [make_prompt(8, number, LAYOUT) for number in range(20)]
    asked = hits = 0
    async with open_cache(FileSystemBackend(disk.path), pages=32 * CHUNK_PAGES) as cache:
        for prompt in prompts:
            await fill_l2(cache, prompt)
        with disk.broken("any", "sometimes eio"):
            for number in range(rounds(100, 2000)):
                prompt = prompts[number * 7 % len(prompts)]
                asked += len(prompt)
                hits += await read_back(cache, prompt)
                await fill(cache, prompt)
                await cache.flush()
                await cache.clear("l1")
        await assert_nothing_held(cache)
    assert hits >= 0.8 * asked, f"{hits} of {asked}"


# Every call.


FAULTS = ["eio", "slow", "stuck"]
LIES = ["short", "early end", "bit"]
VERBS = ["getattr", "create", "open", "read", "write", "truncate", "fsync", "fsyncdir", "rename", "unlink"]


@pytest.mark.parametrize("verb", VERBS)
async def test_any_call_may_fail_be_slow_or_stuck(disk, verb):
    """While the disk is broken and after: right bytes, typed results; in the end all is as if nothing had been."""
    rng = random.Random(verb)
    prompts = [PROMPT, OTHER, THIRD, make_prompt(CHUNKS + 2, 1, LAYOUT)]  # of the last, the first is a part
    faults = FAULTS + LIES * (verb == "read")
    held = set()
    for number in range(rounds(2, 18)):
        backend = FileSystemBackend(disk.path, durability="fsync", direct=rng.random() < 0.5)
        async with open_cache(backend, **SHORT) as cache:
            await fill_l2(cache, PROMPT, OTHER)
            with disk.broken(verb, faults[number % len(faults)]):
                for _ in range(6):
                    prompt = rng.choice(prompts)
                    match rng.randrange(4):
                        case 0:
                            await fill(cache, prompt)
                            assert (await cache.flush()).pending == 0
                        case 1:
                            assert await read_back(cache, prompt) <= len(prompt)
                        case 2:
                            with suppress(BackendError):
                                await cache.delete(prompt)
                                assert await count_hits(cache, prompt) == 0
                        case 3:
                            await cache.clear("l1")
            await no_quarantine(cache)
            await asyncio.sleep(2 * SHORT["breaker_reset_seconds"])
            await fill_l2(cache, *prompts)
            for prompt in prompts:
                assert await read_back(cache, prompt) == len(prompt)
            await assert_nothing_held(cache)
            await cache.clear("all")
            assert await listing(backend) == {}
            assert backend.pins == 0
        async with open_cache(FileSystemBackend(disk.path)):
            pass
        assert rests(disk.source) == []
        held.add(held_by_process())
    assert len(held) == 1


async def test_a_disk_that_dies_is_a_fault_like_any_other(tmp_path):
    with BrokenDisk(tmp_path).mounted() as disk:
        disk.start_anew()
        async with open_cache(FileSystemBackend(disk.path), **SHORT) as cache:
            await fill_l2(cache, PROMPT)
            await fill_l2(cache, OTHER)
            disk.dies()
            result = await cache.prefetch(PROMPT, request_id="a").load_done
            assert (result.chunks, result.shortfall) == (0, Shortfall.BACKEND_ERROR)
            await cache.end_request("a")
            await fill(cache, THIRD)
            assert (await cache.flush()).dropped == CHUNKS
            assert await read_back(cache, THIRD) == CHUNKS  # from L1
            with pytest.raises(BackendError):
                await cache.delete(OTHER)
            await assert_nothing_held(cache)


# What never returns.


async def test_a_stuck_read_harms_nobody_and_its_memory_is_given_back_when_it_ends(disk, tmp_path):
    """L1, the other backend and stores go on; what comes late reaches no memory in use."""
    broken, well = FileSystemBackend(disk.path), FileSystemBackend(tmp_path / "well")
    await seed(broken, PROMPT)
    await seed(well, THIRD)
    held = {OTHER: "second", THIRD: "third"}
    async with open_cache(broken, well, pages=3 * ROOM // PAGE, **SHORT) as cache:
        await fill(cache, OTHER)
        assert len(await listing(broken)) == CHUNKS * len(LAYOUT.groups)
        with disk.broken("read", "stuck"):
            stuck = cache.prefetch(PROMPT, request_id="stuck")
            assert (await stuck.lookup_done).chunks == CHUNKS
            assert cache.prefetch(OTHER, request_id="other").load_done.done()
            async with cache.read("other") as lease:
                assert verify(lease, OTHER) == list(range(CHUNKS))
            assert await read_back(cache, THIRD) == CHUNKS
            assert not stuck.load_done.done()
            result = await stuck.load_done
            assert (result.chunks, result.shortfall) == (0, Shortfall.DEADLINE)
            await cache.end_request("stuck")
            for prompt, request_id in held.items():  # L1 has no room for anything else
                await fill(cache, prompt)
                cache.prefetch(prompt, request_id=request_id)
            stats = await cache.stats()
            assert (stats.quarantined_bytes, stats.leased_bytes) == (ROOM, 2 * ROOM)
            async with cache.store(PROMPT) as writer:
                assert (list(writer), writer.shortfall) == ([], Shortfall.MEMORY)
            assert (await cache.flush()).dropped == 0
        await no_quarantine(cache)
        for prompt, request_id in held.items():
            async with cache.read(request_id) as lease:
                assert verify(lease, prompt) == list(range(CHUNKS))
        assert await read_back(cache, PROMPT) == CHUNKS
        await assert_nothing_held(cache)
    assert broken.pins == well.pins == 0


@pytest.mark.parametrize(
    ("verb", "close_timeout_seconds"),
    [("getattr", 0.3), ("read", 0.3), ("write", 0.3), ("unlink", 0.3), ("read", 2.2)],
)
async def test_close_ends_while_a_call_is_stuck(disk, verb, close_timeout_seconds):
    settings = SHORT | {"load_timeout_seconds": 30, "close_timeout_seconds": close_timeout_seconds}
    config = CacheConfig(l1_bytes=4 * ROOM, l2=[f"fs://{disk.path}"], **settings)
    async with AsyncCache(config) as cache:
        await fill_l2(cache, PROMPT, OTHER)
        await fill(cache, THIRD)
        with disk.broken(verb, "stuck"):
            prefetch = cache.prefetch(PROMPT)
            calls = [asyncio.ensure_future(call) for call in (prefetch.load_done, cache.flush(), cache.delete(OTHER))]
            await asyncio.sleep(0.1)
            began = time.monotonic()
            await cache.close()
            assert time.monotonic() - began < STUCK_SECONDS / 2
            for outcome in await outcomes(*calls):
                assert not isinstance(outcome, Exception) or isinstance(outcome, AsyncCacheError)
            assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_cache_does_not_wait_for_a_stuck_disk_to_open(disk):
    with disk.broken("getattr", "stuck"), pytest.raises(BackendError, match="was not open"):
        await AsyncCache(CacheConfig(l1_bytes=ROOM, l2=[f"fs://{disk.path}"], **SHORT)).open()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def load_from_a_dead_disk(directory):
    """A program: what it stored, it loads again when it is told to."""
    async with open_cache(FileSystemBackend(directory), **SHORT) as cache:
        await fill_l2(cache, PROMPT)
        say("stored")
        await asyncio.to_thread(sys.stdin.readline)
        say((await cache.prefetch(PROMPT).load_done).shortfall)
    say("closed")


def test_a_process_exits_while_its_disk_answers_nothing(disk):
    with process(__spec__.name, disk.path) as child:
        assert child.stdout.readline() == "stored\n"
        with disk.stopped():
            child.stdin.write("\n")
            assert child.stdout.readline() == f"{Shortfall.DEADLINE}\n"
            assert child.stdout.readline() == "closed\n"
            assert child.wait(60) == 0


if __name__ == "__main__":
    asyncio.run(load_from_a_dead_disk(*sys.argv[1:]))
