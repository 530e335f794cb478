"""`AsyncCache` behind the interface that the peers are measured with: blocking calls, from any thread.

The loop runs in a thread of its own. `submit` hands a prefetch to it and returns; the result is seen through an event.
`inside` times prefetches in the loop itself, as an asynchronous scheduler sees them. Checksums are on; keys are hashed
off the clock, as the peers' are.
"""

import asyncio
import hashlib
import itertools
import os
import shutil
import tempfile
import threading
import time
from functools import cache

import uvloop

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, Prompt

DATA = os.environ.get("PEER_DATA") or os.path.join(tempfile.gettempdir(), "kv-peers")
STORE_BYTES = 256 * 2**20  # at a time


@cache
def layout(size):
    return ModelLayout("bench", (ObjectGroup((size,), "uint8"),), chunk_tokens=1)


class Handle:
    """One prefetch that was submitted."""

    __slots__ = ("done", "request_id", "result")

    def __init__(self, request_id):
        self.request_id = request_id
        self.done = threading.Event()
        self.result = None


class Request:
    """Keys, hashed: a prompt of one token a chunk, whose chunk hashes are those of the key ids."""

    def __init__(self, label, size, ids):
        self.hashes = [hashlib.sha256(f"{label}/{size}/{i}".encode()).digest() for i in ids]
        self.prompt = Prompt(layout(size), b"", len(self.hashes), "", "", None, self.hashes)
        self.handle = None


class Ours:
    """kind: "fs" (a directory), or "memory"."""

    def __init__(self, kind):
        self.kind, self.name = kind, f"ours:{kind}"
        self.ids = itertools.count()

    def open(self, l1_bytes, opts):
        self.base = f"{DATA}/ours-{os.getpid()}"
        url = f"fs://{self.base}?capacity=none" if self.kind == "fs" else "memory://"
        self.loop = uvloop.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.cache = AsyncCache(CacheConfig(l1_bytes=l1_bytes, l2=[url], writeback_share=1.0))
        self.call(self.cache.open())
        return {"l1_bytes": l1_bytes}

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def store(self, request):
        async with self.cache.store(request.prompt) as writer:
            assert len(writer) == len(request.hashes), writer.shortfall
            for chunk in writer:
                (view,) = chunk.views
                chunk_hash = request.hashes[chunk.index]
                view[:] = bytes((chunk_hash[0],)) * len(view)
                view[:32] = chunk_hash
                chunk.commit()
        flushed = await self.cache.flush()
        assert not flushed.pending, flushed
        assert not flushed.dropped, flushed

    def populate(self, size, n, label="l2"):
        step = max(1, STORE_BYTES // size)
        for begin in range(0, n, step):
            request = Request(label, size, range(begin, min(n, begin + step)))
            self.call(self.store(request))
            if label == "l2":
                self.loop.call_soon_threadsafe(self.forget, request.hashes)
        return {}

    def populate_l1(self, size, n):
        return self.populate(size, n, "l1")

    def forget(self, hashes):
        """Have them in L2 only, so that the next request of the same keys loads them again."""
        l1 = self.cache.core.l1
        for chunk_hash in hashes:
            entry = l1.index.get(chunk_hash)
            if entry is not None and not entry.leases:
                l1.remove([entry])

    # Timed.

    def make_request(self, label, size, ids):
        request = Request(label, size, ids)
        request.is_l2 = label == "l2"
        return request

    def submit(self, request, skip_l2=False):
        handle = request.handle = Handle(f"r{next(self.ids)}")
        self.loop.call_soon_threadsafe(self.start, request.prompt, handle)
        return handle

    def start(self, prompt, handle):
        load_done = self.cache.prefetch(prompt, request_id=handle.request_id).load_done

        def loaded(future):
            handle.result = future.result().chunks
            handle.done.set()

        if load_done.done():
            loaded(load_done)
        else:
            load_done.add_done_callback(loaded)

    def poll(self, handle):
        return handle.result

    def wait(self, handle, timeout):
        return handle.done.wait(timeout)

    def release(self, request, handle, hits=None):
        self.loop.call_soon_threadsafe(self.end, request, handle)

    def end(self, request, handle):
        task = self.loop.create_task(self.cache.end_request(handle.request_id))
        if request.is_l2:
            task.add_done_callback(lambda _: self.forget(request.hashes))

    def verify(self, request):
        return self.call(self.check(request, request.handle.request_id))

    async def check(self, request, request_id):
        async with self.cache.read(request_id) as lease:
            assert len(lease) == len(request.hashes)
            return all(bytes(chunk.views[0][:32]) == request.hashes[chunk.index] for chunk in lease)

    def inside(self, label, size, count, reps, total, offset=0):
        """Seconds from `prefetch` to both answers, for each repetition, of `count` objects of a stored `total`."""
        return self.call(self.repeat(label, size, count, range(offset, offset + reps), max(1, total - count + 1)))

    def look_up(self, size, count, reps):
        """Seconds from `prefetch` to the hits, of stored objects that are then not loaded."""
        return self.call(self.repeat_lookups(Request("l2", size, range(count)), reps))

    async def repeat_lookups(self, request, reps):
        known = []
        for _ in range(reps):
            began = time.perf_counter()
            prefetch = self.cache.prefetch(request.prompt)
            hits = await prefetch.lookup_done
            known.append(time.perf_counter() - began)
            assert hits.chunks == hits.l2_chunks == len(request.hashes), hits
            await self.cache.end_request(prefetch.request_id)
        return known

    async def repeat(self, label, size, count, turns, begins):
        known, loaded = [], []
        for turn in turns:
            begin = turn * count % begins
            request = Request(label, size, range(begin, begin + count))
            began = time.perf_counter()
            prefetch = self.cache.prefetch(request.prompt)
            hits = await prefetch.lookup_done
            known.append(time.perf_counter() - began)
            result = await prefetch.load_done
            loaded.append(time.perf_counter() - began)
            found = 0 if label == "miss" else len(request.hashes)
            assert hits.chunks == result.chunks == found, (hits, result)
            assert not found or await self.check(request, prefetch.request_id)
            await self.cache.end_request(prefetch.request_id)
            if label == "l2":
                self.forget(request.hashes)
        return {"known": known, "loaded": loaded}

    def inside_burst(self, c, size, K, nsets, offset):  # noqa: N803 (the names of the peers' worker)
        """Many prefetches at once, each awaited by a task in the loop; the figures that the peers' worker gives."""
        begins = [(offset + i) % nsets * K for i in range(c)]
        return self.call(self.gather([Request("l2", size, range(begin, begin + K)) for begin in begins]))

    async def gather(self, requests):
        seconds, short, before = [], 0, (await self.cache.stats()).loads

        async def one(request):
            nonlocal short
            began = time.perf_counter()
            prefetch = self.cache.prefetch(request.prompt)
            result = await prefetch.load_done
            seconds.append(time.perf_counter() - began)
            short += result.chunks != len(request.hashes)
            await self.cache.end_request(prefetch.request_id)

        began = time.perf_counter()
        await asyncio.gather(*map(one, requests))
        wall = time.perf_counter() - began
        loads = (await self.cache.stats()).loads - before
        for request in requests:
            self.forget(request.hashes)
        seconds.sort()
        n = len(seconds)
        return {
            "wall": wall,
            "n": n,
            "p50": seconds[n // 2],
            "p99": seconds[int(n * 0.99)],
            "short": short,
            "loads": loads,
        }

    def stats(self):
        stats = self.call(self.cache.stats())
        return {"loads": stats.loads, "shared_loads": stats.shared_loads, "leases": stats.leases}

    def close(self):
        self.call(self.cache.close())
        shutil.rmtree(self.base, ignore_errors=True)


def make(kind):
    return Ours(kind)
