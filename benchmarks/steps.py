"""What a load from a directory costs the loop, step by step: `python benchmarks/steps.py [BYTES] [CHUNKS ...]`; JSON.

Microseconds of the loop thread's own processor time, medians over many prefetches of chunks that are in the page cache
and not in L1: what the threads take that read, and the waiting for them, is not in it. So it is nearly the same on a
machine that does other things. `us` is the step, `at` the sum until its end.
"""

import inspect
import json
import statistics
import sys
import tempfile
import time

import uvloop

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup
from async_cache.l2.filesystem import loading
from async_cache.l2.guard import Guard
from async_cache.read.batches import Batches
from async_cache.read.loads import Loader
from async_cache.read.prefetch import PrefetchController

ENDS = {  # where a step ends: what is called then, or returns
    "queued: a record for each chunk, a batch": (Loader, "_begin_added", "returns"),
    "keys and memory of each object": (Guard, "begin_load", "is called"),
    "the call begins: breaker, task": (loading.Loading, "load", "is called"),
    "places, runs, threads woken": (loading, "settle", "is called"),
    "back from the threads": (loading, "settle", "returns"),
    "outcome counted, breaker, unpinned": (Batches, "_end", "returns"),
    "committed to L1": (Loader, "_deliver", "is called"),
    "leased to the request, result": (PrefetchController, "_say_result", "returns"),
}
now = time.thread_time
marks = []


def mark(owner, name, when, step):
    """Note the time of a call, or of its return."""
    function = getattr(owner, name)

    def called(*arguments, **options):
        if when == "is called":
            marks.append((step, now()))
        result = function(*arguments, **options)
        if when == "returns" and not inspect.iscoroutine(result):
            marks.append((step, now()))
        return returned(result) if when == "returns" and inspect.iscoroutine(result) else result

    async def returned(coroutine):
        result = await coroutine
        marks.append((step, now()))
        return result

    setattr(owner, name, called)


async def steps(chunks, size_bytes, turns=300):
    layout = ModelLayout("bench", (ObjectGroup((size_bytes,), "uint8"),), chunk_tokens=1)
    prompt = layout.prompt(range(chunks))
    with tempfile.TemporaryDirectory(prefix="kv-steps-") as directory:
        url = f"fs://{directory}/kv?capacity=none"
        async with AsyncCache(CacheConfig(l1_bytes=4 * chunks * size_bytes, l2=[url], writeback_share=1.0)) as cache:
            async with cache.store(prompt) as writer:
                for chunk in writer:
                    chunk.commit()
            await cache.flush()
            rows = []
            for _ in range(turns):
                await cache.clear("l1")
                marks.clear()
                marks.append(("", now()))
                prefetch = cache.prefetch(prompt)
                hits = await prefetch.lookup_done
                marks.append(("promised: found, pinned, room reserved", now()))
                assert (await prefetch.load_done).chunks == hits.l2_chunks == chunks
                marks.append(("the caller goes on", now()))
                await cache.end_request(prefetch.request_id)
                rows.append(list(marks))
    names = statistics.mode(tuple(name for name, _ in row) for row in rows)
    rows = [[at for _, at in row] for row in rows if tuple(name for name, _ in row) == names]
    told = []
    for number, name in enumerate(names[1:], 1):
        step, at = (statistics.median(row[number] - row[since] for row in rows) * 1e6 for since in (number - 1, 0))
        told.append({"chunks": chunks, "step": name, "us": round(step, 1), "at": round(at, 1)})
    return told


def main(size_bytes="65536", *counts):
    for step, (owner, name, when) in ENDS.items():
        mark(owner, name, when, step)
    told = [uvloop.run(steps(int(chunks), int(size_bytes))) for chunks in counts or ("16", "256")]
    print(json.dumps([row for rows in told for row in rows], indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
