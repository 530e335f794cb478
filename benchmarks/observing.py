"""What explanations and events cost; prints JSON.

`request_us`: a request of resident chunks, of an embedded cache that nobody listens to, beside one that is heard,
in turns; and one that finds only half, beside one that finds all that it asks for: what `missed` adds.
`stored_us`: a chunk that is stored where another one has to leave, with a ledger and events, and without.
`explain_ms`: explanations of 4,096 chunks, and for how long the loop is held meanwhile. Least of the turns.
"""

import asyncio
import gc
import json
import os
import statistics
import sys
import time

import uvloop

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup
from async_cache.l2.memory import MemoryBackend
from async_cache.ledger.table import Table

TURNS = int(os.environ.get("TURNS", "30"))
REQUESTS = int(os.environ.get("REQUESTS", "1000"))
CHUNKS = int(os.environ.get("CHUNKS", "4096"))
LAYOUT = ModelLayout("bench", (ObjectGroup((64,), "uint8"),), chunk_tokens=4)
PAGE = 4096
now = time.perf_counter


def prompt(number, chunks):
    return LAYOUT.prompt([number * 7919 % 2**30] + list(range(chunks * 4 - 1)))


async def fill(cache, prompt):
    async with cache.store(prompt) as writer:
        for chunk in writer:
            chunk.commit()


async def requests(cache, asked):
    began = now()
    for number in range(REQUESTS):
        prefetch = cache.prefetch(asked, request_id=f"r{number}")
        await prefetch.load_done
        await cache.end_request(prefetch.request_id)
        await asyncio.sleep(0)
    return (now() - began) / REQUESTS * 1e6


async def request_us():
    """Medians: with nobody who listens, what a listener adds, and what an explained miss does."""
    async with AsyncCache(CacheConfig(l1_bytes=2**24, l2=[])) as cache:
        whole = prompt(1, 16)
        await fill(cache, whole)
        half = LAYOUT.prompt([7919] + list(range(16 * 4 - 1)) + [1] * 64)  # 16 chunks are there, and 16 are not
        rows = []
        for turn in range(TURNS):
            row = {}
            for name in ("plain", "heard", "missed") if turn % 2 else ("missed", "heard", "plain"):
                events = cache.events() if name == "heard" else None
                row[name] = await requests(cache, half if name == "missed" else whole)
                if events is not None:
                    await events.aclose()
            misses, hashes = cache.core.misses, half.chunk_hashes
            began = now()
            for _ in range(REQUESTS):
                misses.missed(hashes, 16, failed=False)
            row["of_it"] = (now() - began) / REQUESTS * 1e6
            rows.append(row)
        plain = statistics.median(row["plain"] for row in rows)
        return {
            "plain": plain,
            "heard_to_plain": statistics.median(row["heard"] / row["plain"] for row in rows),
            "missed": statistics.median(row["of_it"] for row in rows),
        }


async def stored_us():
    """What a chunk takes that is stored where another one leaves: plain, with the ledger, and with a listener too."""
    chunks = 256
    rows = []
    caches = {name: AsyncCache(CacheConfig(l1_bytes=chunks * PAGE, l2=[])) for name in ("plain", "ledger", "heard")}
    for cache in caches.values():
        await cache.open()
    caches["plain"].core.ledger._table = Table(0)
    events = caches["heard"].events(capacity=1)
    for turn in range(TURNS):
        row = {}
        for name in caches if turn % 2 else reversed(caches):
            asked = prompt(turn + 1, chunks)
            began = now()
            await fill(caches[name], asked)
            await asyncio.sleep(0)
            row[name] = (now() - began) / chunks * 1e6
        rows.append(row)
    await events.aclose()
    for cache in caches.values():
        await cache.close()
    return {
        "plain": statistics.median(row["plain"] for row in rows),
        "ledger_adds": statistics.median(row["ledger"] - row["plain"] for row in rows),
        "heard_adds": statistics.median(row["heard"] - row["plain"] for row in rows),
    }


async def explain_ms():
    async with AsyncCache(CacheConfig(l1_bytes=(CHUNKS + 4) * PAGE, l2=[]), backends=[MemoryBackend()]) as cache:
        asked = prompt(1, CHUNKS)
        told = {"unknown": await explained(cache, asked)}
        await fill(cache, asked)
        told["l1"] = await explained(cache, asked)
        await cache.flush()
        await cache.clear("l1")
        told["l2"] = await explained(cache, asked)
        await cache.delete(asked)
        told["removed"] = await explained(cache, asked)
        return told


async def explained(cache, asked):
    steps = []

    async def look():
        while True:
            began = now()
            await asyncio.sleep(0)
            steps.append(now() - began)

    rows = []
    gc.collect()
    for _ in range(TURNS):
        steps.clear()
        began = now()
        await cache.explain(asked)
        seconds = now() - began
        looking = asyncio.create_task(look())
        await asyncio.sleep(0)
        await cache.explain(asked)
        looking.cancel()
        await asyncio.sleep(0)
        rows.append((seconds, max(steps)))
    return {"ms": min(seconds for seconds, _ in rows) * 1e3, "held_ms": min(held for _, held in rows) * 1e3}


async def main():
    wanted = sys.argv[1:] or ["request_us", "stored_us", "explain_ms"]
    print(json.dumps({name: await globals()[name]() for name in wanted}, indent=1))


if __name__ == "__main__":
    uvloop.run(main())
