"""The service, measured from a client in another process; prints JSON. The peer's figures come from its `e_server.py`.

Same shapes as there: chunks of 256 tokens and 256 KiB, prompts of 16, 128 and 512 chunks, a directory as L2 whose files
are in the page cache.
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

import psutil
import torch
import uvloop

from async_cache import BlockingClient, ModelLayout, ObjectGroup, connect

CHUNK_TOKENS, CHUNK_BYTES = 256, 256 * 2**10
LAYOUT = ModelLayout("bench", (ObjectGroup((CHUNK_BYTES,), "uint8"),), chunk_tokens=CHUNK_TOKENS)
BIG = ModelLayout("bench", (ObjectGroup((2**20,), "uint8"),), chunk_tokens=CHUNK_TOKENS)
COUNTS = (16, 128, 512)
STUCK = Path(__file__).parent / "stuck_server.py"
now = time.perf_counter
ids = itertools.count()


def tokens(seed, chunks):
    return [(i * 7919 + seed * 104729) % 127999 for i in range(chunks * CHUNK_TOKENS)]


def quantiles(seconds):
    ordered = sorted(seconds)
    return {"p50_us": statistics.median(ordered) * 1e6, "p99_us": ordered[int(len(ordered) * 0.99)] * 1e6}


@asynccontextmanager
async def serving(directory, *arguments):
    """A server process, and the seconds until it could be connected to."""
    url = f"unix://{directory}/bench.sock"
    began = now()
    command = [sys.executable, *(arguments or ("-m", "async_cache", "serve")), "--listen", url]
    if not arguments:
        command += ["--l2", f"fs://{directory}/kv?capacity=none"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
    try:
        async with connect(url, connect_timeout_seconds=30) as client:
            yield client, url, process, now() - began
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


async def ping(client, count=4000):
    for _ in range(50):
        await client.ping()
    return quantiles([await client.ping() for _ in range(count)])


async def pings_beside_waits(client, waits=100, turns=8):
    """A ping alone, and while others wait for a backend that is stuck, in turns."""
    alone, beside = [], []
    for turn in range(turns):
        alone.append(await ping(client, 500))
        names = [f"stuck-{turn}-{n}" for n in range(waits)]
        for n, name in enumerate(names):
            prompt = LAYOUT.prompt(tokens(turn * waits + n, 1))
            assert (await client.prefetch(prompt, request_id=name).lookup_done).chunks == 1
        waiting = [asyncio.ensure_future(client.query_status(name)) for name in names]
        beside.append(await ping(client, 500))
        assert not any(wait.done() for wait in waiting)
        for name, wait in zip(names, waiting, strict=True):
            wait.cancel()
            await client.end_request(name)
    return {
        name: {figure: statistics.median(some[figure] for some in turns) for figure in turns[0]}
        for name, turns in (("ping_idle", alone), ("ping_waiting", beside))
    }


async def store(client, prompt):
    async with client.store(prompt) as writer:
        for chunk in writer:
            chunk.tensors()[0].fill_(chunk.index % 251)
            chunk.commit()
            await asyncio.sleep(0)


async def hits(client, prompt, reps):
    """Seconds from `prefetch` to the hit count; and to the bytes in memory."""
    known, loaded = [], []
    for rep in range(reps + 3):
        request_id = f"r{next(ids)}"
        began = now()
        prefetch = client.prefetch(prompt, request_id=request_id)
        found = await prefetch.lookup_done
        known.append(now() - began)
        result = await prefetch.load_done
        loaded.append(now() - began)
        assert found.chunks == result.chunks == len(prompt)
        if found.l2_chunks:
            await client.end_request(request_id)
            await client.clear("l1")
            assert found.l2_chunks == len(prompt)
        else:
            await client.end_request(request_id)
        if rep == 2:
            known, loaded = [], []
    return {"chunks": len(prompt), **quantiles(known), "loaded_p50_us": statistics.median(loaded) * 1e6}


async def whole_requests(client, prompt, depth, total=4000):
    """Prefetch, both answers, read, end."""
    left = iter(range(total))

    async def worker():
        for _ in left:
            prefetch = client.prefetch(prompt)
            assert (await prefetch.lookup_done).chunks == len(prompt)
            await prefetch.load_done
            async with client.read(prefetch.request_id) as lease:
                assert len(lease) == len(prompt)
            await client.end_request(prefetch.request_id)

    began = now()
    await asyncio.gather(*(worker() for _ in range(depth)))
    return {"depth": depth, "req_per_s": total / (now() - began)}


async def connections(url, process, prompt, count=1000):
    """Many clients, each with one prefetch; the time of each until it has its count."""
    before = psutil.Process(process.pid).memory_info().rss
    clients = [connect(url, connect_timeout_seconds=30) for _ in range(count)]
    await asyncio.gather(*(client.open() for client in clients))
    seconds = []

    async def one(client):
        began = now()
        prefetch = client.prefetch(prompt)
        assert (await prefetch.lookup_done).chunks == len(prompt)
        await prefetch.load_done
        seconds.append(now() - began)

    await asyncio.gather(*map(one, clients))
    bytes_each = (psutil.Process(process.pid).memory_info().rss - before) / count
    await asyncio.gather(*(client.close() for client in clients))
    assert len(seconds) == count
    return {"connections": count, **quantiles(seconds), "kib_each": bytes_each / 1024}


def storing(url, chunks=64, turns=9):
    """To store 64 chunks of 1 MiB, until all can be found; the same when they are written already; to copy as much."""
    source = torch.randint(256, (chunks, 2**20), dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = {"memcpy": [], "store": [], "commit": []}
    with BlockingClient(url) as client:
        for turn in range(turns + 2):
            began = now()
            target.copy_(source)
            seconds["memcpy"].append(now() - began)
            for what in ("store", "commit"):
                prompt = BIG.prompt(tokens(1000 + 2 * turn + (what == "store"), chunks))
                began = now()
                with client.store(prompt) as writer:
                    assert len(writer) == chunks
                    for row, chunk in zip(source, writer, strict=True):
                        chunk.tensors()[0].copy_(row)
                        if what == "store":
                            chunk.commit()
                    if what == "commit":  # the bytes are in place, as a GPU would have put them there
                        began = now()
                        for chunk in writer:
                            chunk.commit()
                    found = client.lookup(prompt).chunks  # behind the last commit
                seconds[what].append(now() - began)
                assert found == chunks
                client.flush()
                client.delete(prompt)
    medians = {what: statistics.median(some[2:]) for what, some in seconds.items()}
    return {
        **{f"{what}_ms": median * 1e3 for what, median in medians.items()},
        "store_of_memcpy": medians["memcpy"] / medians["store"],
        "commit_of_memcpy": medians["memcpy"] / medians["commit"],
    }


async def main():
    rows = {}
    with tempfile.TemporaryDirectory(prefix="kv-bench-") as directory:
        async with serving(directory) as (client, url, process, ready):
            beyond_l1 = psutil.Process(process.pid).memory_info().rss - (await client.stats()).l1_capacity_bytes
            rows["idle"] = {"ready_s": ready, "rss_mib_beyond_l1": beyond_l1 / 2**20}
            rows["ping"] = await ping(client)
            prompts = {count: LAYOUT.prompt(tokens(count, count)) for count in COUNTS}
            for prompt in prompts.values():
                await store(client, prompt)
            await client.flush()
            rows["l1"] = [await hits(client, prompts[n], 300 if n <= 32 else 60) for n in COUNTS]
            rows["whole"] = [await whole_requests(client, prompts[16], depth) for depth in (8, 64)]
            rows["connections"] = await connections(url, process, prompts[16])
            await client.clear("l1")
            rows["l2"] = [await hits(client, prompts[n], 100 if n <= 32 else 20) for n in COUNTS]
            rows["storing"] = await asyncio.to_thread(storing, url)
        async with serving(directory, STUCK) as (client, *_):
            rows |= await pings_beside_waits(client)
    print(json.dumps(rows))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    uvloop.run(main())
