"""When the hits are known and when the bytes are in memory, timed inside the loop: `python benchmarks/hits.py [MiB]`.

Objects lie in a directory and in the page cache, none in L1; checksums are on, prompts are hashed off the clock.
Prints medians in microseconds as JSON, one row for each number of objects.
"""

import json
import statistics
import sys
import tempfile
import time

import uvloop

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup

COUNTS = (16, 64, 256)
ROUNDS = 24


async def store(cache, prompt):
    async with cache.store(prompt) as writer:
        for chunk in writer:
            (view,) = chunk.views
            view[:] = bytes((chunk.index % 251,)) * len(view)
            chunk.commit()
    flushed = await cache.flush()
    assert (flushed.pending, flushed.dropped) == (0, 0), flushed


async def prefetch(cache, prompt):
    """Microseconds until the hits are known, and until the bytes are there; the content is verified."""
    began = time.perf_counter()
    request = cache.prefetch(prompt)
    hits = await request.lookup_done
    known = time.perf_counter()
    result = await request.load_done
    loaded = time.perf_counter()
    assert hits.chunks == result.chunks == len(prompt)
    async with cache.read(request.request_id) as lease:
        assert all(chunk.views[0][-1] == chunk.index % 251 for chunk in lease)
    return (known - began) * 1e6, (loaded - began) * 1e6


async def main(size):
    layout = ModelLayout("hits", (ObjectGroup((size,), "uint8"),), chunk_tokens=1)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        config = CacheConfig(l1_bytes=2 * max(COUNTS) * size + 2**20, l2=[f"fs://{directory}"], writeback_share=1.0)
        async with AsyncCache(config) as cache:
            for count in COUNTS:
                prompt = layout.prompt([count] * count)
                await store(cache, prompt)
                cold, warm = [], []
                for _ in range(ROUNDS):
                    await cache.clear(tier="l1")
                    cold.append(await prefetch(cache, prompt))
                    warm.append(await prefetch(cache, prompt))
                known, loaded = (statistics.median(column) for column in zip(*cold, strict=True))
                resident = statistics.median(loaded for _, loaded in warm)
                rows.append({"objects": count, "known_us": known, "loaded_us": loaded, "resident_us": resident})
    print(json.dumps(rows))


if __name__ == "__main__":
    uvloop.run(main(int(float(sys.argv[1]) * 2**20) if len(sys.argv) > 1 else 2**20))
