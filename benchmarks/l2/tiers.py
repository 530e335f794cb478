"""What more backends cost a request that needs none of them: `python benchmarks/l2/tiers.py [chunks]`.

A prompt is in L1 in full, and is prefetched again and again: with one backend that is well, with a second one that is
dead (each of its calls hangs), and with that one `promote=true&admit=2` as well. The caches take turns, so that all see
the same machine. Prints, as JSON, the median and the 99th percentile of `load_done`, in microseconds, one row for each
cache: of each tenth of the time, and of these the median.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from contextlib import AsyncExitStack

import uvloop

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup
from async_cache.l2 import Placement
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import GatedBackend

LAYOUT = ModelLayout("model", (ObjectGroup((4096,), "uint8"),), chunk_tokens=16)
ROUNDS = int(os.environ.get("ROUNDS", "800"))
IN_A_ROUND = 25
TENTHS = 10


def dead(placement):
    backend = GatedBackend(MemoryBackend("dead"))
    backend.placement = placement
    backend.hold()
    return backend


async def measure(chunks):
    prompt = LAYOUT.prompt(range(16 * chunks))
    prompt.hash()
    kinds = {
        "one backend": [MemoryBackend("near")],
        "a dead one behind it": [MemoryBackend("near"), dead(Placement())],
        "promote=true&admit=2": [MemoryBackend("near"), dead(Placement(promote=True, admit=2))],
    }
    seconds = {kind: [] for kind in kinds}
    async with AsyncExitStack() as stack:
        caches = {}
        for kind, backends in kinds.items():
            config = CacheConfig(l1_bytes=(chunks + 8) * 2 * 4096, l2=[], close_timeout_seconds=0.5)
            caches[kind] = cache = await stack.enter_async_context(AsyncCache(config, backends))
            async with cache.store(prompt) as writer:
                for chunk in writer:
                    chunk.commit()
        await asyncio.sleep(0.2)
        for _ in range(ROUNDS):
            for kind, cache in caches.items():
                for _ in range(IN_A_ROUND):
                    began = time.perf_counter()
                    prefetch = cache.prefetch(prompt)
                    result = await prefetch.load_done
                    seconds[kind].append(time.perf_counter() - began)
                    assert result.l1_chunks == chunks
                    await cache.end_request(prefetch.request_id)
                    await asyncio.sleep(0)
    return [{"cache": kind, "chunks": chunks, **summary(times)} for kind, times in seconds.items()]


def summary(times):
    size = len(times) // TENTHS
    tenths = [sorted(times[begin : begin + size]) for begin in range(0, size * TENTHS, size)]
    at = {"median_us": size // 2, "p99_us": size * 99 // 100}
    return {name: round(statistics.median(tenth[place] for tenth in tenths) * 1e6, 1) for name, place in at.items()}


if __name__ == "__main__":
    print(json.dumps(uvloop.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 64))))
