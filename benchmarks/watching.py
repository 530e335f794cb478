"""What it costs to be watched; prints JSON.

`request_us`: what counting adds to a request of an embedded cache, with and without in turns, medians.
`served`: requests of a client a second and their 99th percentile, of a server that counts, remembers what left and
tells events, beside one that does nothing of that.
`scrape`: `/metrics` of 100 tenants and CHUNKS chunks: how long it takes, and for how long the loop is held meanwhile.
"""

import asyncio
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, connect
from async_cache.metrics import Watch, exposition
from async_cache.server.access import tenant_of

TURNS = int(os.environ.get("TURNS", "30"))
REQUESTS = int(os.environ.get("REQUESTS", "2000"))
CHUNKS = int(os.environ.get("CHUNKS", "1000000"))
LAYOUT = ModelLayout("bench", (ObjectGroup((64,), "uint8"),), chunk_tokens=4)
UNWATCHED = Path(__file__).parent / "unwatched_server.py"
now = time.perf_counter


def prompt(number, chunks):
    return LAYOUT.prompt([number * 7919 % 2**30] + list(range(chunks * 4 - 1)))


async def fill(cache, prompt):
    async with cache.store(prompt) as writer:
        for chunk in writer:
            chunk.commit()


async def embedded(chunks):
    """Seconds of a request, without and with a watch, in turns."""
    async with AsyncCache(CacheConfig(l1_bytes=2**24, l2=[])) as cache:
        asked = prompt(1, chunks)
        await fill(cache, asked)
        plain, watched = [], []
        for turn in range(2 * TURNS):
            watch = Watch(cache.core, tenant_of)
            if turn % 2:
                watch.open()
            began = now()
            for number in range(REQUESTS):
                prefetch = cache.prefetch(asked, request_id=f"acme\0engine\0{number}")
                await prefetch.load_done
                await cache.end_request(prefetch.request_id)
                await asyncio.sleep(0)
            (watched if turn % 2 else plain).append((now() - began) / REQUESTS)
            await watch.close()
        return {
            "chunks": chunks,
            "plain_us": statistics.median(plain) * 1e6,
            "added_us": statistics.median(w - p for w, p in zip(watched, plain, strict=True)) * 1e6,
        }


@asynccontextmanager
async def serving(directory, *program, **settings):
    url = f"unix://{directory}/{program[-1][-12:].replace('/', '')}.sock"
    environment = os.environ | {"ASYNC_CACHE_SERVER_HTTP": "127.0.0.1:0"} | settings
    command = [sys.executable, *program, "serve", "--listen", url, "--l1-bytes", "64MiB", "--l2", "memory://"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)  # noqa: ASYNC220
    try:
        async with connect(url, connect_timeout_seconds=30) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


async def turn(client, asked, ids, beside=8):
    """Requests a second, and the 99th percentile of one, with several at a time."""
    seconds = []

    async def go():
        for _ in range(REQUESTS // beside):
            began = now()
            prefetch = client.prefetch(asked, request_id=f"r{next(ids)}")
            await prefetch.load_done
            await client.end_request(prefetch.request_id)
            seconds.append(now() - began)

    began = now()
    await asyncio.gather(*(go() for _ in range(beside)))
    return len(seconds) / (now() - began), sorted(seconds)[int(len(seconds) * 0.99)]


async def served(chunks=64):
    asked, ids = prompt(1, chunks), itertools.count()
    with tempfile.TemporaryDirectory() as directory:
        async with (
            serving(directory, "-m", "async_cache") as watched,
            serving(directory, str(UNWATCHED), ASYNC_CACHE_EXPLAIN_CHUNKS="1") as plain,
            watched.events(),  # of which there are some with each chunk that is stored
        ):
            for client in (watched, plain):
                await fill(client, asked)
                await turn(client, asked, ids)
            rows = []
            for number in range(TURNS):
                pair = {}
                for name in ("watched", "plain") if number % 2 else ("plain", "watched"):
                    pair[name] = await turn(watched if name == "watched" else plain, asked, ids)
                rows.append(pair)
    ratio = [statistics.median(row["watched"][i] / row["plain"][i] for row in rows) for i in (0, 1)]
    return {
        "chunks": chunks,
        "plain_per_second": statistics.median(row["plain"][0] for row in rows),
        "watched_to_plain_per_second": ratio[0],
        "plain_p99_us": statistics.median(row["plain"][1] for row in rows) * 1e6,
        "watched_to_plain_p99": ratio[1],
    }


async def scrape():
    """How long a scrape takes, and the longest that the loop was held meanwhile."""
    held = 0.0

    async def look():
        nonlocal held
        while True:
            began = now()
            await asyncio.sleep(0)
            held = max(held, now() - began)

    async with AsyncCache(CacheConfig(l1_bytes=(CHUNKS + 64) * 4096, l2=["memory://"])) as cache:
        watch = Watch(cache.core, tenant_of)
        watch.open()
        for number in range(0, CHUNKS, 10_000):
            await fill(cache, prompt(number, min(10_000, CHUNKS - number)))
        for tenant in range(100):
            for _ in range(3):
                await cache.prefetch(prompt(0, 16), request_id=f"tenant {tenant}\0\0{_}").load_done
        await cache.flush()
        rows = []
        for _ in range(20):
            held = 0.0
            looking = asyncio.create_task(look())
            await asyncio.sleep(0)
            began = now()
            text = await exposition(watch)
            rows.append((now() - began, held))
            looking.cancel()
        chunks = len(cache.core.l1.index)
        await watch.close()
    return {
        "chunks": chunks,
        "bytes": len(text),
        "scrape_ms": statistics.median(seconds for seconds, _ in rows) * 1e3,
        "held_ms": statistics.median(held for _, held in rows) * 1e3,
    }


async def main():
    wanted = sys.argv[1:] or ["request_us", "served", "scrape"]
    told = {}
    if "request_us" in wanted:
        told["request_us"] = [await embedded(chunks) for chunks in (16, 256)]
    if "served" in wanted:
        told["served"] = await served()
    if "scrape" in wanted:
        told["scrape"] = await scrape()
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    uvloop.run(main())
