"""Prefetches that nobody comes back for leave nothing behind once their TTL has passed: no record, lease, pin or task.

They hit L1, need loads, miss, lack memory, run into a deadline or are cancelled, and nobody claims or reads any. In
virtual time pass a million of them (20,000 quick); on uvloop, over files, a hundred thousand (5,000 quick), which leave
the memory as it was.
"""

import asyncio
import gc
import os
import random
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import uvloop
from contract.support import PAGE, assert_nothing_held, fill_l2, make_prompt, open_cache, read_back
from soak import rounds

from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import ThrottledBackend
from async_cache.testing.virtual import run_virtual

AT_ONCE = 50
TTL_SECONDS = 0.2
TOLERATED_BLOCKS = 1000  # of Python's memory: a fifth of one for each prefetch, a hundredth in the long part
TOLERATED_BYTES = 4 * 2**20
STORED = [make_prompt(1 + number % 8, number) for number in range(400)]
LONGER = [make_prompt(len(prompt) + 2, number) for number, prompt in enumerate(STORED[:50])]
MISSING = [make_prompt(4, number) for number in range(1000, 1050)]
PROMPTS = STORED + LONGER + MISSING


async def abandon(cache, count, rng):
    """Prefetch, and forget; what became of every 10th, whose futures are looked at and whose result stays unclaimed."""
    loop = asyncio.get_running_loop()
    seen = []
    for number in range(count):
        deadline = rng.uniform(0, 0.03) if rng.random() < 0.1 else None
        prefetch = cache.prefetch(rng.choice(PROMPTS), deadline_seconds=deadline)
        if rng.random() < 0.1:
            prefetch.cancel()
        elif rng.random() < 0.2:
            loop.call_later(rng.uniform(0, 0.03), prefetch.cancel)
        if number % 10 == 0:
            seen.append(prefetch)
        if number % AT_ONCE == 0:
            await asyncio.sleep(rng.uniform(0, 0.03))
    return Counter([await what_became(prefetch) for prefetch in seen])


async def what_became(prefetch):
    hits, result = await prefetch.lookup_done, await prefetch.load_done
    if shortfall := result.shortfall or hits.shortfall:
        return shortfall.value
    return "loaded" if result.l2_chunks else "resident" if result.chunks else "missing"


async def assert_swept(cache, backend, count):
    """All of so many prefetches were swept, and nothing is left of them."""
    await asyncio.sleep(2 * TTL_SECONDS)
    async with asyncio.timeout(60):
        while (await cache.stats()).swept_results < count:  # noqa: ASYNC110 (on a busy machine, it is late)
            await asyncio.sleep(TTL_SECONDS)
    await assert_nothing_held(cache)
    assert (await cache.stats()).swept_results == count
    assert backend.pins == 0


@pytest.mark.parametrize("latency_seconds", [0, 0.01], ids=["near", "far"])
def test_nothing_is_left_of_a_million_prefetches_after_their_ttl(latency_seconds):
    count = rounds(10_000, 500_000)

    async def main():
        memory = MemoryBackend()
        backend = ThrottledBackend(memory, latency_seconds=latency_seconds) if latency_seconds else memory
        async with open_cache(backend, pages=1024, result_ttl_seconds=TTL_SECONDS) as cache:
            await fill_l2(cache, *STORED)
            tasks = asyncio.all_tasks()
            seen = await abandon(cache, count, random.Random(1))
            await assert_swept(cache, memory, count)
            assert asyncio.all_tasks() == tasks
            assert await read_back(cache, STORED[7]) == len(STORED[7])
        return seen

    assert run_virtual(main()).keys() >= {"resident", "loaded", "missing", "memory", "cancelled"}


def held():
    """What this process holds: Python's blocks of memory, resident bytes; and tasks, threads and open files."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    counts = len(asyncio.all_tasks()), threading.active_count(), len(os.listdir("/proc/self/fd"))
    return sys.getallocatedblocks(), resident, counts


def test_memory_is_flat_over_a_hundred_thousand_prefetches_on_uvloop(tmp_path):
    warm_up, count = 2_000, rounds(5_000, 100_000)

    async def main():
        backend = FileSystemBackend(tmp_path)
        async with open_cache(backend, pages=256, result_ttl_seconds=TTL_SECONDS) as cache:
            await fill_l2(cache, *STORED)
            rng = random.Random(1)
            await abandon(cache, warm_up, rng)
            await assert_swept(cache, backend, warm_up)
            await cache.clear(tier="l1")
            blocks_before, bytes_before, counts_before = held()
            seen = await abandon(cache, count, rng)
            await assert_swept(cache, backend, warm_up + count)
            await cache.clear(tier="l1")
            blocks_after, bytes_after, counts_after = held()
        assert blocks_after - blocks_before < TOLERATED_BLOCKS
        assert bytes_after - bytes_before < TOLERATED_BYTES
        assert counts_after == counts_before
        assert seen.keys() >= {"resident", "loaded", "missing", "memory", "cancelled"}

    uvloop.run(main())
