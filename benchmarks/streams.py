"""Chunks while they arrive: 256 x 1 MiB from L2 into a second buffer that takes as long to fill as the load.

    python benchmarks/streams.py [CHUNKS]

From a directory (its pages are in the page cache), and from storage of 1 GiB/s that a backend of `testing` makes of
memory; embedded, and over a Unix socket. Medians of interleaved rounds, in milliseconds:

load_ms        from `prefetch` to `load_done`
load_copy_ms   the copy begins when all is loaded
stream_ms      each chunk is copied as it comes; `of_longer` is that by the longer of load and copy
..._cpu_ms     what the process, and its server, took of the processors for these
first_ms       the first chunk of the stream, and `of_alone` that by the load of a prompt of this chunk only
"""

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, Prompt, ServerConfig, connect
from async_cache.client.client import CacheClient
from async_cache.l2 import Backend
from async_cache.l2.filesystem import FileSystemBackend
from async_cache.l2.memory import MemoryBackend
from async_cache.server import Server
from async_cache.testing.backends import ThrottledBackend

CHUNKS, CHUNK_BYTES, ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 256, 2**20, 7
LAYOUT = ModelLayout("model", (ObjectGroup((CHUNK_BYTES,), "uint8"),), chunk_tokens=16)
PROMPT = LAYOUT.prompt(range(16 * CHUNKS))
ALONE = LAYOUT.prompt(range(16))
Cache = AsyncCache | CacheClient


class Target:
    """A second buffer that is filled one chunk after the other, each in so much time, by an engine of its own."""

    def __init__(self, seconds: float):
        self._buffer = memoryview(bytearray(CHUNKS * CHUNK_BYTES))
        self._seconds = seconds / CHUNKS
        self._free_at = 0.0

    def fill(self, number: int, view: memoryview) -> None:
        """Begin to fill the place of a chunk, behind what was begun before."""
        self._free_at = max(self._free_at, time.perf_counter()) + self._seconds
        self._buffer[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES] = view

    async def filled(self) -> None:
        """Wait until all of it has been filled that was begun."""
        await asyncio.sleep(self._free_at - time.perf_counter())


async def load(cache: Cache, prompt: Prompt, copy_seconds: float = 0.0) -> float:
    """How long it takes to load a prompt, and then to copy it if that takes any time."""
    target = Target(copy_seconds)
    began = time.perf_counter()
    prefetch = cache.prefetch(prompt)
    assert (await prefetch.load_done).chunks == len(prompt)
    if copy_seconds:
        async with cache.read(prefetch.request_id) as lease:
            for chunk in lease:
                target.fill(chunk.index, chunk.views[0])
            await target.filled()
    took = time.perf_counter() - began
    await cache.end_request(prefetch.request_id)
    return took


async def stream(cache: Cache, copy_seconds: float) -> tuple[float, float]:
    """How long it takes to copy each chunk as it comes, and until the first one is there."""
    target, first = Target(copy_seconds), 0.0
    began = time.perf_counter()
    prefetch = cache.prefetch(PROMPT)
    async with cache.stream(prefetch.request_id) as chunks:
        async for chunk in chunks:
            first = first or time.perf_counter() - began
            target.fill(chunk.index, chunk.views[0])
        await target.filled()
        assert chunks.result.chunks == CHUNKS
    return time.perf_counter() - began, first


async def measure(cache: Cache) -> dict[str, float]:
    """The medians of some rounds, each of which does everything once."""
    async with cache.store(PROMPT) as writer:
        for chunk in writer:
            chunk.views[0][:] = bytes([chunk.index % 256]) * CHUNK_BYTES
            chunk.commit()
    await cache.flush()
    rounds = []
    for number in range(ROUNDS + 1):
        await cache.clear()
        loaded = await load(cache, PROMPT)
        await cache.clear()
        alone = await load(cache, ALONE)
        await cache.clear()
        cpu = time.process_time()
        both = await load(cache, PROMPT, loaded)
        both_cpu = time.process_time() - cpu
        await cache.clear()
        cpu = time.process_time()
        streamed, first = await stream(cache, loaded)
        stream_cpu = time.process_time() - cpu
        if number:  # the first one warms up
            rounds.append((loaded, both, both_cpu, streamed, stream_cpu, first, streamed / loaded, first / alone))
    *seconds, of_longer, of_alone = [statistics.median(column) for column in zip(*rounds, strict=True)]
    names = "load_ms", "load_copy_ms", "load_copy_cpu_ms", "stream_ms", "stream_cpu_ms", "first_ms"
    milliseconds = {name: round(value * 1000, 2) for name, value in zip(names, seconds, strict=True)}
    return milliseconds | {"of_longer": round(of_longer, 3), "of_alone": round(of_alone, 3)}


@asynccontextmanager
async def opened(backend: Backend, socket: Path | None) -> AsyncIterator[Cache]:
    """A cache over a backend, or a client of a server of it at a socket."""
    config = CacheConfig(l1_bytes=2 * CHUNKS * CHUNK_BYTES, l2=())
    async with AsyncCache(config, [backend]) as cache:
        if socket is None:
            yield cache
            return
        async with Server(cache, ServerConfig(listen=(f"unix://{socket}",))), connect(f"unix://{socket}") as client:
            yield client


async def main(directory: Path) -> list[dict[str, object]]:
    """A row for each backend and kind of cache."""
    rows: list[dict[str, object]] = []
    for name, make in (
        ("directory", lambda: FileSystemBackend(directory / "kv", capacity_bytes=None)),
        ("1 GiB/s", lambda: ThrottledBackend(MemoryBackend(), latency_seconds=0.001, bytes_per_second=2**30)),
    ):
        for kind, socket in (("embedded", None), ("served", directory / "socket")):
            async with opened(make(), socket) as cache:
                rows.append({"from": name, "cache": kind} | await measure(cache))
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="streams") as temporary:
        print(json.dumps(asyncio.run(main(Path(temporary))), indent=1))
