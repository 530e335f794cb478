"""Loads and lookups of the backend for object stores beside bare obstore: `python benchmarks/l2/object_store.py`.

Bare is the same requests for the same records, as many at a time, copied into the same buffers: without names made of
keys, without checksums, without a word about faults. Both run in turn, and each row has medians of rounds. The server
is moto's, in a process of its own, where every request may wait as long as on the way to a region nearby; the
directory is obstore's own store, warm in the page cache. Prints JSON.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from hashlib import blake2b
from pathlib import Path

import obstore
import uvloop
from obstore.store import LocalStore

from async_cache.l2.backend import LoadOutcome
from async_cache.l2.object_store.backend import LOOKUPS_TO_ONE_LOAD, ObjectStoreBackend
from async_cache.l2.object_store.location import CONCURRENCY
from async_cache.l2.record import TRAILER_BYTES
from async_cache.l2.urls.registry import from_url
from async_cache.prompt.keys import ObjectKey

MIB = 2**20
LOADS = [(64, MIB), (16, 8 * MIB)]
LOOKUPS = 256
DELAY_SECONDS = 0.02
ROUNDS = int(os.environ.get("ROUNDS", "15"))
SERVER = Path(__file__).parents[2] / "tests" / "l2" / "object_store" / "faulty_s3.py"


def keys_of(count, size_bytes):
    digests = [blake2b(f"{size_bytes} {number}".encode(), digest_size=32).digest() for number in range(count)]
    return [ObjectKey(digest, 0, 0) for digest in digests]


class Lag:
    """How long the loop was held at most while it is entered, in ms, as a task sees it that ticks."""

    async def __aenter__(self):
        self.ms = 0.0
        self._task = asyncio.create_task(self._tick())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_):
        self._task.cancel()

    async def _tick(self):
        while True:
            begin = time.perf_counter()
            await asyncio.sleep(0.001)
            self.ms = max(self.ms, (time.perf_counter() - begin) * 1e3 - 1)


async def bare_load(store, paths, buffers):
    slots = asyncio.Semaphore(CONCURRENCY)

    async def one(path, buffer):
        async with slots:
            data = await obstore.get_range_async(store, path, start=0, end=len(buffer) + TRAILER_BYTES)
            buffer[:] = memoryview(data)[: len(buffer)]

    await asyncio.gather(*map(one, paths, buffers))


async def bare_lookup(store, paths):
    slots = asyncio.Semaphore(LOOKUPS_TO_ONE_LOAD * CONCURRENCY)

    async def one(path):
        async with slots:
            try:
                return (await obstore.head_async(store, path))["size"]
            except FileNotFoundError:
                return None

    return await asyncio.gather(*map(one, paths))


async def compared(ours, bare, size_bytes=0):
    """A row of both, in turn: medians, and how long the loop was held at most in the median round."""
    seconds, lags = {ours: [], bare: []}, {ours: [], bare: []}
    for call in (ours, bare):
        await call()
    for number in range(ROUNDS):
        for call in (ours, bare) if number % 2 else (bare, ours):
            async with Lag() as lag:
                begin = time.perf_counter()
                await call()
                seconds[call].append(time.perf_counter() - begin)
            lags[call].append(lag.ms)
    row = {}
    for name, call in (("ours", ours), ("bare", bare)):
        median = statistics.median(seconds[call])
        row |= {f"{name}_ms": round(median * 1e3, 1), f"{name}_loop_held_ms": round(statistics.median(lags[call]), 1)}
        row |= {f"{name}_mib_per_s": round(size_bytes / MIB / median)} if size_bytes else {}
    ratios = [b / o for o, b in zip(seconds[ours], seconds[bare], strict=True)]
    return row | {
        "of_bare": round(statistics.median(seconds[bare]) / statistics.median(seconds[ours]), 2),
        "of_bare_by_round": round(statistics.median(ratios), 2),
    }


async def load_row(backend, store, count, size_bytes):
    keys = keys_of(count, size_bytes)
    bodies = [memoryview(os.urandom(size_bytes)) for _ in keys]
    assert all(await backend.store(keys, bodies))
    buffers = [memoryview(bytearray(size_bytes)) for _ in keys]
    paths = [backend._path(key) for key in keys]

    async def ours():
        assert await backend.load(keys, buffers) == [LoadOutcome.LOADED] * count

    async def bare():
        await bare_load(store, paths, buffers)

    row = await compared(ours, bare, count * size_bytes)
    assert buffers == bodies
    return {"what": f"load {count} x {size_bytes // MIB} MiB"} | row


async def lookup_row(backend, store, present):
    keys = keys_of(LOOKUPS, 1)
    assert all(await backend.store(keys[:present], [memoryview(b"x")] * present))
    paths = [backend._path(key) for key in keys]

    async def ours():
        assert sum(await backend.lookup(keys)) == present

    async def bare():
        assert sum(size is not None for size in await bare_lookup(store, paths)) == present

    return {"what": f"lookup {LOOKUPS} keys, {present} of them there"} | await compared(ours, bare)


async def measure(where, backend, store):
    await backend.open()
    rows = [await load_row(backend, store, *load) for load in LOADS]
    rows.append(await lookup_row(backend, store, LOOKUPS // 2))
    await backend.close()
    return [{"where": where} | row for row in rows]


def request(port, method, path, body=None):
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, method=method)).read()


def of_a_directory():
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        return uvloop.run(measure("directory", ObjectStoreBackend("directory", lambda _: store), store))


def of_a_server():
    os.environ |= {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}
    with subprocess.Popen((sys.executable, str(SERVER), "0"), stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(server.stdout.readline())
            request(port, "PUT", "/bucket")
            parameters = f"endpoint=http://127.0.0.1:{port}&allow_http=true&lookup_timeout=20"
            rows = []
            for where, delay in (("moto", 0), (f"moto, {DELAY_SECONDS * 1e3:.0f} ms away", DELAY_SECONDS)):
                request(port, "POST", "/__faults__", json.dumps([{"request": ".*", "delay": delay}]).encode())
                backend = from_url(f"s3://bucket/{len(rows)}?{parameters}")
                rows += uvloop.run(measure(where, backend, backend._connect(20)))
            return rows
        finally:
            server.kill()


if __name__ == "__main__":
    print(json.dumps(of_a_directory() + of_a_server(), indent=1))
