"""Two processes use one directory, too small for what they store: no wrong byte, no torn file, no error, only misses.

Each writes bytes of its own, so that a record that both had a part in would show.
"""

import asyncio
import json
import random
import sys
from collections import Counter
from contextlib import ExitStack, asynccontextmanager

from contract.support import assert_nothing_held, count_hits, fill, fill_l2, make_prompt, open_cache, pattern, settle
from soak import rounds

from async_cache import Shortfall
from async_cache.l2.filesystem.backend import FileSystemBackend

from .disk import CHUNK_PAGES, LAYOUT, PAGE_BYTES, allocated, listing, places, process, rests, say

CHUNKS = 6
PROMPTS = [make_prompt(CHUNKS, number, LAYOUT) for number in range(8)]
CHUNK_BYTES = sum(-(-group.size_bytes // PAGE_BYTES) for group in LAYOUT.groups) * PAGE_BYTES
CAPACITY_BYTES = len(PROMPTS) * CHUNKS * CHUNK_BYTES // 2
PROCESSES = 2


@asynccontextmanager
async def cache_on(directory):
    backend = FileSystemBackend(directory, capacity_bytes=CAPACITY_BYTES)
    async with open_cache(backend, pages=2 * CHUNKS * CHUNK_PAGES, prefetch_share=1) as cache:
        await listing(backend)
        yield cache
    assert backend.pins == 0


def check(lease, prompt):
    """Each object is whole, and of one process."""
    for chunk in lease:
        for group, view in enumerate(chunk.views):
            assert bytes(view) in [pattern(prompt, chunk.index, 0, group, version) for version in range(PROCESSES)]


async def read(cache, rng, told):
    """Prefetch, perhaps change one's mind, and check what came."""
    prompt = rng.choice(PROMPTS)
    prefetch = cache.prefetch(prompt)
    if rng.random() < 0.1:
        await asyncio.sleep(rng.uniform(0, 0.001))
        prefetch.cancel()
    promised, result = (await prefetch.lookup_done).chunks, await prefetch.load_done
    assert result.chunks == promised or (result.chunks < promised and result.shortfall)
    async with cache.read(prefetch.request_id) as lease:
        check(lease, prompt)
    told["chunks"] += result.l2_chunks
    told[result.shortfall or "whole"] += 1


async def write(cache, rng, version):
    await fill(cache, rng.choice(PROMPTS), version=version)
    if rng.random() < 0.5:
        await cache.flush()


async def remove(cache, rng):
    how = rng.random()
    if how < 0.6:
        await cache.clear("l1")
    elif how < 0.95:
        await cache.delete(rng.choice(PROMPTS))
    else:
        await cache.clear("all")


async def use(directory, version, seconds):
    """Do anything, several tasks at once, for so long; say how often what came of it."""
    rng, told = random.Random(version), Counter()
    end = asyncio.get_running_loop().time() + float(seconds)

    async def work(cache):
        while asyncio.get_running_loop().time() < end:
            match rng.randrange(3):
                case 0:
                    await read(cache, rng, told)
                case 1:
                    await write(cache, rng, int(version))
                case 2:
                    await remove(cache, rng)

    async with cache_on(directory) as cache:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(work(cache))
        await cache.flush()
        await settle()
        await assert_nothing_held(cache)
    say(json.dumps(told))


async def test_two_processes_store_load_delete_and_evict_the_same(tmp_path, record_property):
    seconds = rounds(3, 60)
    with ExitStack() as stack:
        children = [
            stack.enter_context(process(__spec__.name, tmp_path, version, seconds)) for version in range(PROCESSES)
        ]
        said = await asyncio.gather(*(asyncio.to_thread(child.communicate) for child in children))
        assert [child.returncode for child in children] == [0] * PROCESSES
    for out, _ in said:
        told = json.loads(out)
        assert told["chunks"] and told["whole"]
        assert told.keys() <= {"chunks", "whole", Shortfall.GONE, Shortfall.CANCELLED, Shortfall.MEMORY}
        record_property("came of it", told)
    async with cache_on(tmp_path) as cache:
        for prompt in PROMPTS:
            prefetch = cache.prefetch(prompt)
            assert (await prefetch.load_done).chunks == await count_hits(cache, prompt)
            async with cache.read(prefetch.request_id) as lease:
                check(lease, prompt)
        await fill_l2(cache, PROMPTS[0])  # the last thing that they did may have been to delete all
    assert rests(tmp_path) == []
    assert places(tmp_path)
    assert allocated(tmp_path) <= CAPACITY_BYTES


if __name__ == "__main__":
    asyncio.run(use(*sys.argv[1:]))
