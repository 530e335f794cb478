"""Nothing blocks in the event loop, and nothing holds it for long.

`blockbuster` is around the busy life of a cache over files. In a process of its own, with 1,000,000 chunks in L1 and as
many objects in the file backend's index (50,000 quick), a task measures how late the loop is, and a thread sees what
holds it. The goal is that nothing holds it for more than 20 ms, in the CPU time of its thread on an idle machine. It is
missed where a collection of Python's garbage comes while a million chunks wait to be written (COLLECTION_MS). What a
step of the loop does is counted, too, in calls: as many for a prompt of 4,000 chunks as for one of 1,000.

`python -m faults.test_loop_lag 1000000`, in `tests`, prints what the test looks at.
"""

import asyncio
import gc
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import pytest
import uvloop
from blockbuster import BlockBusterFunction, blockbuster_ctx
from contract.support import (
    PAGE,
    TWO_RANKS,
    count_hits,
    fill_l2,
    make_layout,
    make_prompt,
    make_tokens,
    object_keys,
    open_cache,
    read_back,
)
from soak import rounds

from async_cache import AsyncCache, CacheConfig, ObjectGroup, Shortfall
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import WrappedBackend
from faults.small_steps import small_steps

from .disk import claim, damage_record, place_of

GOAL_MS = 20
INDEX_PAGES = 8  # of the directory, on the disk
COLLECTION_MS = rounds(20, 150)
REFERENCE_MS = 20  # what `reference_ms` takes on an idle machine

OWN_STEP = "renewals"  # 10,000, which the test makes at once, and not the cache

TICK_SECONDS = 0.001
CHUNKS_AT_ONCE = 4096
WIDE = make_prompt(CHUNKS_AT_ONCE, 1, make_layout(world_size=8))
REAL = make_prompt(512, 2)
POPULAR = [make_prompt(8, number) for number in range(10, 60)]
BLOCKING = (
    "os.open",
    "os.preadv",
    "os.pwritev",
    "os.pread",
    "os.pwrite",
    "os.fstat",
    "os.fsync",
    "os.fdatasync",
    "os.posix_fallocate",
    "fcntl.flock",
)  # it knows the rest


@contextmanager
def nothing_blocks():
    """Every call that may block raises, if it is made in a thread with a running loop."""
    with ExitStack() as stack:
        stack.enter_context(blockbuster_ctx())
        for name in BLOCKING:
            stack.callback(BlockBusterFunction(None, name).activate().deactivate)
        yield


PAGES = make_layout(ObjectGroup((PAGE,), "uint8"), chunk_tokens=4096)
LONG = PAGES.prompt(make_tokens(9 * 1024))  # 9 chunks, hashed in a thread
RANKS = make_prompt(12, 2, TWO_RANKS)
OTHERS = [make_prompt(20, number) for number in range(3, 6)]


async def busy(backend):
    """What a cache does on a good day; the directory is too small for all of it."""
    async with open_cache(backend) as cache:
        await fill_l2(cache, *OTHERS, LONG, RANKS)
        assert await read_back(cache, LONG) == len(LONG)
        assert await read_back(cache, OTHERS[0]) < len(OTHERS[0])
        cache.prefetch(RANKS).cancel()
        assert await read_back(cache, RANKS) == len(RANKS)
        assert (await cache.delete(RANKS)).chunks == len(RANKS)
        assert (await cache.clear(tier="all")).chunks
        await fill_l2(cache, LONG, RANKS)


async def bad_day(backend):
    """After a restart: one prompt is damaged, the other one has lost its tail."""
    async with open_cache(backend) as cache:
        assert await count_hits(cache, RANKS) == len(RANKS) - 1
        async for _ in backend.keys():  # recovery has ended
            pass
        damaged = cache.prefetch(LONG)
        assert (await damaged.lookup_done).chunks == len(LONG)
        assert (await damaged.load_done).shortfall is Shortfall.CORRUPT
        assert await read_back(cache, RANKS) == len(RANKS) - 1
        await fill_l2(cache, LONG)
        assert await read_back(cache, LONG) == len(LONG)


@pytest.mark.parametrize("options", [{}, {"durability": "fsync"}, {"direct": True}], ids=str)
def test_nothing_blocks_in_the_loop(tmp_path, caplog, options):
    def backend():
        return FileSystemBackend(tmp_path, capacity_bytes=(len(LONG) + 60 + INDEX_PAGES) * PAGE, **options)

    with nothing_blocks():
        asyncio.run(busy(backend()))
        place_of(tmp_path, object_keys(LONG)[4]).write(bytes(80))
        damage_record(tmp_path, object_keys(RANKS)[-1])
        asyncio.run(bad_day(backend()))
    assert "Blocking call" not in caplog.text  # raised, and taken for a failure of the disk


class Watch:
    """The longest time for which the loop was held in each phase, and by what."""

    def __init__(self):
        self.phases = {}
        self._begin("start")
        self._ticked = time.perf_counter()
        self._sampled = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(threading.get_ident(),))
        self._thread.start()
        self._ticking = asyncio.create_task(self._tick())

    def _begin(self, name):
        self._phase = self.phases[name] = {"cpu_ms": 0.0, "wall_ms": 0.0, "by": ""}

    async def phase(self, name):
        """What comes now is of this phase."""
        await asyncio.sleep(2 * TICK_SECONDS)
        self._begin(name)

    async def _tick(self):
        while True:
            self._ticked, cpu = time.perf_counter(), time.thread_time()
            self._sampled.clear()
            await asyncio.sleep(TICK_SECONDS)
            cpu_ms = round((time.thread_time() - cpu) * 1e3, 1)
            wall_ms = round((time.perf_counter() - self._ticked - TICK_SECONDS) * 1e3, 1)
            if cpu_ms > self._phase["cpu_ms"]:
                self._phase |= {"cpu_ms": cpu_ms, "by": dict(self._sampled.most_common(3))}
            self._phase["wall_ms"] = max(wall_ms, self._phase["wall_ms"])

    def _sample(self, loop_thread):
        while not self._stop.wait(2 * TICK_SECONDS):
            if time.perf_counter() - self._ticked > 3 * TICK_SECONDS:
                self._sampled[" < ".join(islice(names(sys._current_frames()[loop_thread]), 3))] += 1

    def close(self):
        self._ticking.cancel()
        self._stop.set()
        self._thread.join()


def names(frame):
    """The functions of the cache that are running, the innermost first."""
    while frame is not None:
        if frame.f_globals["__name__"].startswith("async_cache."):
            yield frame.f_code.co_qualname
        frame = frame.f_back


class Sink(WrappedBackend):
    """Says that it has stored, and has not, unless `real`: a million files are not what is measured."""

    real = False

    def lookup_nowait(self, *asked):
        return self.inner.lookup_nowait(*asked)

    async def store(self, keys, buffers):
        return await super().store(keys, buffers) if self.real else [True] * len(keys)


async def store(cache, prompt, ranks=(0,)):
    for rank in ranks:
        async with cache.store(prompt, rank=rank) as writer:
            for chunk in writer:
                chunk.commit()
                if chunk.index % 64 == 0:
                    await asyncio.sleep(0)


async def prefetch(cache, prompt):
    begun = cache.prefetch(prompt)
    hits = await begun.lookup_done
    assert hits.chunks == len(prompt)
    return begun


def reference_ms():
    """CPU time of a work that is always the same: on a busy machine, with its caches shared, it takes longer."""
    table = {number.to_bytes(32, "little"): [number] for number in range(50_000)}
    keys = random.Random(1).sample(list(table), len(table))
    begin = time.thread_time()
    for key in keys:
        assert table[key]
    return (time.thread_time() - begin) * 1e3


async def probe(chunks, directory):
    """Every phase of the life of a cache that is as large."""
    bulk = [make_prompt(CHUNKS_AT_ONCE, 1000 + number) for number in range(chunks // CHUNKS_AT_ONCE)]
    more = [make_prompt(CHUNKS_AT_ONCE, 2000 + number) for number in range(1 + len(bulk) // 8)]
    known = [make_prompt(CHUNKS_AT_ONCE, 3000 + number) for number in range(len(bulk) - 8)]
    claim(directory, [key for prompt in (WIDE, *known) for key in object_keys(prompt)])
    gc.collect()
    gc.freeze()  # a collection visits what the cache makes, and not what Python has imported
    sink = Sink(FileSystemBackend(directory))
    config = CacheConfig(l1_bytes=chunks * PAGE, l2=[], result_ttl_seconds=3, close_timeout_seconds=1)
    cache = AsyncCache(config, backends=[sink])
    watch = Watch()

    await watch.phase("open")
    await cache.open()
    await watch.phase("recovery")
    async for _ in sink.keys():  # which waits for its end
        pass
    await watch.phase("store of real objects")
    sink.real = True
    await store(cache, REAL)
    await cache.flush()
    sink.real = False

    await watch.phase("count in L2")
    assert (await cache.lookup(WIDE)).chunks == len(WIDE)
    await watch.phase("prefetch from L2, cancelled")
    (await prefetch(cache, WIDE)).cancel()

    await watch.phase("store")
    for prompt in bulk:
        await store(cache, prompt)
    await watch.phase("flush")
    await cache.flush()
    await watch.phase("collection")
    gc.collect()
    await watch.phase("eviction")
    for prompt in more:
        await store(cache, prompt)
    await watch.phase("load")
    assert (await (await prefetch(cache, REAL)).load_done).l2_chunks == len(REAL)

    await watch.phase("store of 8 ranks")
    await store(cache, WIDE, range(8))
    await watch.phase("prefetch in L1")
    request_id = (await prefetch(cache, WIDE)).request_id
    await watch.phase("read")
    async with cache.read(request_id) as lease:
        assert len(lease) == len(WIDE)
    del lease  # which keeps the memory
    await watch.phase("end of a request")
    await cache.end_request(request_id)
    await watch.phase("count in L1")
    assert (await cache.lookup(WIDE)).chunks == len(WIDE)
    await watch.phase("delete")
    await cache.delete(more[-1])

    await watch.phase("many results")
    for prompt in POPULAR:
        await store(cache, prompt)
    request_ids = []
    for _ in range(200):
        request_ids += [cache.prefetch(prompt).request_id for prompt in POPULAR]
        await asyncio.sleep(0)
    await watch.phase(OWN_STEP)
    for request_id in request_ids:  # in one step: they expire together
        await cache.renew(request_id)
    await watch.phase("sweep")
    await asyncio.sleep(3.5)
    assert (await cache.stats()).swept_results >= len(request_ids)
    await watch.phase("clear")
    await cache.clear(tier="l1")
    await watch.phase("store again")
    for prompt in bulk[::2]:
        await store(cache, prompt)
    await watch.phase("close")
    await cache.close()
    await watch.phase("end")
    watch.close()
    del watch.phases[OWN_STEP]
    return watch.phases | {"reference_ms": reference_ms()}


@pytest.mark.timeout(rounds(300, 3000))
def test_nothing_holds_the_loop_for_long():
    chunks, seconds = rounds(50_000, 1_000_000), rounds(50, 600)
    command = (sys.executable, "-m", __name__, str(chunks))
    too_long = None
    for _ in range(5):  # another process may spoil a round
        phases = json.loads(subprocess.check_output(command, cwd=Path(__file__).parents[1], timeout=seconds))
        slower = max(1, phases.pop("reference_ms") / REFERENCE_MS)
        limits = dict.fromkeys(phases, (GOAL_MS + COLLECTION_MS) * slower)
        held = {name: phase for name, phase in phases.items() if phase["cpu_ms"] > limits[name]}
        too_long = held if too_long is None else {name: held[name] for name in held.keys() & too_long}
        if not too_long:
            return
    pytest.fail(f"the loop was held: {too_long}")


class Steps:
    """Counts the calls that are made in each step of the loop, and keeps the most of each phase."""

    def __init__(self):
        self.most = Counter()
        self.phase = ""
        self._calls = 0

    def _count(self, frame, event, argument):
        self._calls += event in ("call", "c_call")

    @contextmanager
    def counted(self):
        run = asyncio.events.Handle._run

        def counted(handle):
            self._calls = 0
            run(handle)
            self.most[self.phase] = max(self.most[self.phase], self._calls)

        with patch.object(asyncio.events.Handle, "_run", counted):
            sys.setprofile(self._count)
            try:
                yield
            finally:
                sys.setprofile(None)

    async def begin(self, phase):
        await asyncio.sleep(0)
        self.phase = phase


async def life(steps, chunks):
    """What happens to a prompt of so many chunks and two ranks; what the test does itself takes a step for a chunk."""
    prompt, beside, absent = (make_prompt(chunks, number, TWO_RANKS) for number in (101, 102, 103))
    longer = make_prompt(2 * chunks, 101, TWO_RANKS)
    for each in (prompt, beside, absent, longer):
        each.hash()
    async with open_cache(MemoryBackend(), pages=3 * chunks) as cache:

        async def fill(prompt, ranks=(0, 1)):
            for rank in ranks:
                async with cache.store(prompt, rank=rank) as writer:
                    for number in range(len(writer)):
                        writer[number].commit()
                        await asyncio.sleep(0)
                    await steps.begin("a writer ends")
                await steps.begin("a writer begins")

        await steps.begin("a writer begins")
        await fill(prompt)
        await steps.begin("write-back")
        await cache.flush()
        await steps.begin("prefetch in L1")
        request_id = cache.prefetch(prompt).request_id
        assert (await cache.query_status(request_id)).l1_chunks == chunks
        await steps.begin("read")
        lease = await cache.read(request_id)
        await steps.begin("end of a read")
        lease.release()
        await cache.end_request(request_id)
        await steps.begin("end of what was skipped")
        skipping = cache.prefetch(prompt, skip_tokens=(chunks - 1) * prompt.layout.chunk_tokens)
        assert (await skipping.load_done).chunks == 1
        await cache.end_request(skipping.request_id)
        await steps.begin("count in L1")
        assert (await cache.lookup(prompt)).l1_chunks == chunks
        await steps.begin("clear")
        await cache.clear()
        await steps.begin("not cached")
        assert (await cache.prefetch(absent).load_done).chunks == (await cache.lookup(absent)).chunks == 0
        await steps.begin("count in L2")
        assert (await cache.lookup(prompt)).l2_chunks == chunks
        await steps.begin("cancelled")
        cancelled = cache.prefetch(prompt)
        assert (await cancelled.lookup_done).chunks == chunks
        cancelled.cancel()
        await cache.end_request(cancelled.request_id)
        await cache.clear()
        await steps.begin("others fill L1")
        await fill(beside)
        await cache.flush()
        await steps.begin("prefetch from L2, by eviction")
        evicting = cache.prefetch(prompt)
        assert (await evicting.load_done).l2_chunks == chunks
        await steps.begin("two at once")
        sharing = [cache.prefetch(prompt), cache.prefetch(prompt)]
        assert [(await each.load_done).chunks for each in sharing] == [chunks] * 2
        for each in (evicting, *sharing):
            await cache.end_request(each.request_id)
        await steps.begin("a writer that gives up")
        (await cache.store(absent)).close()
        await steps.begin("retain")
        assert (await cache.retain(prompt)).chunks == chunks
        await steps.begin("retain a longer one")
        assert (await cache.retain(longer)).chunks == chunks
        await steps.begin("retain no more")
        for each in (prompt, longer):
            assert (await cache.retain(each, ttl_seconds=0)).chunks == 0
        await steps.begin("explain")
        assert (await cache.explain(longer)).chunks == 2 * chunks
        await steps.begin("warm")
        assert (await cache.warm(longer)).chunks == chunks
        await steps.begin("stream")
        request_id = cache.prefetch(prompt).request_id
        async with cache.stream(request_id) as stream:
            async for _ in stream:
                await asyncio.sleep(0)
        await cache.end_request(request_id)
        await steps.begin("delete")
        assert (await cache.delete(prompt)).chunks == chunks
        await steps.begin("clear all")
        await cache.clear("all")
        await steps.begin("close")
    await steps.begin("end")


def calls_in_a_step(chunks):
    """By phase, the most calls in a step, where a step may work on 64 chunks."""
    steps = Steps()

    async def counted():
        gc.collect()
        gc.disable()  # what it frees may call
        try:
            with steps.counted():
                await life(steps, chunks)
        finally:
            gc.enable()

    with small_steps(64), ExitStack() as stack:
        for name in ("write.queue._BATCH_OBJECTS", "write.pending._PREFIX_CHUNKS", "read.batches._BATCH_CHUNKS"):
            stack.enter_context(patch(f"async_cache.{name}", 64))
        asyncio.run(counted())
    return steps.most


@pytest.mark.timeout(300)
def test_a_step_does_as_much_for_a_long_prompt_as_for_a_short_one():
    short, long = calls_in_a_step(1000), calls_in_a_step(4000)
    grown = {phase: (short[phase], calls) for phase, calls in long.items() if calls > 1.5 * short[phase] + 1000}
    assert not grown, "calls in a step, for 1,000 chunks and for 4,000"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sys.stdout.write(json.dumps(uvloop.run(probe(int(sys.argv[1]), Path(temporary)))))
