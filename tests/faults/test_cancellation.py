"""Whatever is cancelled, at whichever step of the loop: it ends, it leaves nothing behind, and the cache works on.

A loop that counts its callbacks strikes after the nth. Each test raises n until the work is done before the blow
falls, so every await is hit, at each instant from its suspension to its resumption. The blow cancels the task that
works (once, or again at every step until it ends), cancels its prefetch, ends its request, or closes the cache.
"""

import asyncio
import gc
import os
import threading
import time
from array import array
from functools import partial
from itertools import count, product
from zlib import crc32

import pytest
from contract.support import (
    PAGE,
    SMALL,
    assert_nothing_held,
    make_layout,
    object_keys,
    open_cache,
    pattern,
    read_back,
    seed,
    verify,
    write,
)
from soak import rounds

from async_cache import (
    AsyncCache,
    CacheClosedError,
    CacheConfig,
    ObjectGroup,
    SegmentPrefetch,
    Shortfall,
    UnknownRequestError,
    WriterClosedError,
)
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import GatedBackend, ThrottledBackend, WrappedBackend

from .striking import RealLoop, VirtualLoop, strike

STRIDE = rounds(quick=61, long=1)  # of the steps, one in so many; each test begins with another one
CHUNKS = 4
GROUPS = (SMALL, ObjectGroup((8,), "uint8", window_chunks=2))
SHORT = make_layout(*GROUPS, world_size=2)
LONG = make_layout(*GROUPS, world_size=2, chunk_tokens=10_000)  # so many tokens are hashed in a thread


# Where: backends that hold the prompt, all of it or its halves.


async def memory():
    backend = MemoryBackend()  # which answers a lookup at once
    await seed(backend, make_prompt(1, SHORT))
    return [backend]


async def throttled():
    backend = ThrottledBackend(MemoryBackend(), latency_seconds=0.01)
    await seed(backend, make_prompt(1, SHORT))
    return [backend]


async def halves():
    first = ThrottledBackend(MemoryBackend("first"), latency_seconds=0.01)
    second = ThrottledBackend(MemoryBackend("second"), latency_seconds=0.02)
    await seed(first, make_prompt(1, SHORT), chunks=(0, 1))
    await seed(second, make_prompt(1, SHORT), chunks=(2, 3))
    return [first, second]


class NeverLoads(WrappedBackend):
    async def load(self, keys, buffers):
        raise OSError("injected")


async def failing():
    first = NeverLoads(MemoryBackend("first"))
    second = ThrottledBackend(MemoryBackend("second"), latency_seconds=0.01)
    for backend in (first, second):
        await seed(backend, make_prompt(1, SHORT))
    return [first, second]


class DeadDisk(GatedBackend):
    """A load that is cancelled writes to its buffers until it ends."""

    async def load(self, keys, buffers):
        try:
            return await super().load(keys, buffers)
        except asyncio.CancelledError:
            for buffer in buffers:
                buffer[:] = bytes(len(buffer))
            raise


async def stubborn():
    backend = DeadDisk(MemoryBackend(), stubborn=True)
    await seed(backend, make_prompt(1, SHORT))
    backend.hold("load", "store")
    asyncio.get_running_loop().call_later(0.05, backend.release)
    return [backend]


# What is under way.


async def wait_for_both(cache, prompt):
    prefetch = cache.prefetch(prompt, request_id="a")
    await prefetch.lookup_done
    await prefetch.load_done


async def query(cache, prompt):
    cache.prefetch(prompt, request_id="a")
    await cache.query_lookup_hits("a")
    await cache.query_status("a")


async def read(cache, prompt):
    cache.prefetch(prompt, request_id="a")
    for rank in range(2):
        async with cache.read("a", rank=rank) as lease:
            await asyncio.sleep(0)
            verify(lease, prompt, rank)


async def stream(cache, prompt):
    prefetch = cache.prefetch(prompt, request_id="a")
    for rank in range(2):
        async with cache.stream("a", rank=rank) as chunks:
            came = [chunk async for chunk in chunks]
            assert len(came) == CHUNKS or chunks.result.shortfall is Shortfall.CANCELLED
            assert chunks.result == await prefetch.load_done
            verify(chunks, prompt, rank)


def make_parts(layout):
    """Prompts that the backends have, all of them or a part."""
    return [make_prompt(1, layout, chunks) for chunks in (2, CHUNKS, 3)]


async def read_parts(cache, prompt):
    parts = make_parts(prompt.layout)
    prefetch = cache.prefetch_segments(parts, request_id="a")
    await prefetch.lookup_done
    for rank in range(2):
        async with cache.read("a", rank=rank) as lease:
            await asyncio.sleep(0)
            for chunk in lease:
                if chunk.views[1] is not None:
                    assert bytes(chunk.views[1]) == pattern(parts[chunk.part], chunk.index, rank, 1)


async def look_up_parts(cache, prompt):
    await cache.lookup_segments(make_parts(prompt.layout))


async def look_up(cache, prompt):
    await cache.lookup(prompt)


async def look_further(cache, prompt):
    longer = make_prompt(1, prompt.layout, chunks=CHUNKS + 1)  # which makes a disk search
    await cache.prefetch(longer, request_id="a").load_done


async def store(cache, prompt, chunks=range(CHUNKS)):
    for rank in range(2):
        async with cache.store(prompt, rank=rank) as writer:
            for chunk in writer:
                if chunk.index in chunks:
                    write(chunk, prompt, rank)
                    await asyncio.sleep(0)
                    chunk.commit()


async def store_and_flush(cache, prompt):
    await store(cache, make_prompt(2, prompt.layout))
    await cache.flush()


async def delete(cache, prompt):
    await cache.delete(prompt)


async def clear_l1(cache, prompt):
    await cache.clear(tier="l1")


async def clear_all(cache, prompt):
    await cache.clear(tier="all")


PREFETCHING = {
    wait_for_both: "a",
    query: "ab",
    read: "ba",
    stream: "ab",
    read_parts: "ab",
}  # alone, or with another one after or before it
OTHERS = [look_up, look_up_parts, look_further, store_and_flush, delete, clear_l1, clear_all]


def make_prompt(number, layout, chunks=CHUNKS):
    begin = number * 1_000_000
    return layout.prompt(array("i", range(begin, begin + chunks * layout.chunk_tokens)))


# The blow. Each is called between two steps of the loop.


def cancel_task(cache, task, prefetch):
    task.cancel()


def cancel_task_again_and_again(cache, task, prefetch):
    if task.cancel():
        again = partial(cancel_task_again_and_again, cache, task, prefetch)
        asyncio.get_running_loop().strike_after(1, again)


def cancel_prefetch(cache, task, prefetch):
    prefetch.cancel()


def end_request(cache, task, prefetch):
    with pytest.raises(StopIteration):
        cache.end_request("a").send(None)


CANCEL_TASK = [cancel_task, cancel_task_again_and_again]
CANCEL_REQUEST = [cancel_prefetch, end_request]


# The trial.


async def trial(backends, layout, work, blow, steps):
    """Whether the blow fell before the work was done."""
    prompt = make_prompt(1, layout)
    async with open_cache(*backends) as cache:
        await store(cache, make_prompt(1, layout), chunks=(0,))
        await cache.flush()
        tasks, stored = asyncio.all_tasks(), sum(backend.usage().objects for backend in backends)
        prefetch, bystander = None, None
        if work in PREFETCHING:
            prefetches = {request_id: begin(cache, work, prompt, request_id) for request_id in PREFETCHING[work]}
            prefetch, bystander = prefetches["a"], prefetches.get("b")
        task, struck = await strike(work(cache, prompt), steps, lambda task: blow(cache, task, prefetch))
        if blow in CANCEL_TASK:
            assert task.cancelled() == struck
        elif task.exception() is not None:
            assert isinstance(task.exception(), UnknownRequestError) and struck and blow is end_request
        if prefetch is not None:
            await store(cache, make_prompt(3, layout))  # while calls may still write to the memory of their loads
            await outlast(cache, prompt, prefetch, bystander, blow, struck)
        await cache.end_request("a")
        await until_quiet(cache, backends, tasks)
        if prefetch is not None:
            assert await read_back(cache, make_prompt(3, layout)) == CHUNKS
        if work in (delete, clear_all):  # done, or not begun: never a part of it
            assert sum(backend.usage().objects for backend in backends) in (0, stored)
        await works_on(cache, prompt)
        await until_quiet(cache, backends, tasks)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    return struck


def begin(cache, work, prompt, request_id):
    if work is read_parts and request_id == "a":
        return cache.prefetch_segments(make_parts(prompt.layout), request_id=request_id)
    return cache.prefetch(prompt, request_id=request_id)


async def outlast(cache, prompt, prefetch, bystander, blow, struck):
    """The one that was struck has all or nothing, the one beside it has all."""
    result = await prefetch.load_done
    chunks = sum(map(len, make_parts(prompt.layout))) if isinstance(prefetch, SegmentPrefetch) else CHUNKS
    if struck and blow in CANCEL_REQUEST:
        assert (result.chunks, result.shortfall) in [(chunks, None), (0, Shortfall.CANCELLED)]
    else:
        assert (result.chunks, result.shortfall) == (chunks, None)
    if bystander is not None:
        assert (await bystander.load_done).chunks == CHUNKS
        for rank in range(2):
            async with cache.read("b", rank=rank) as lease:
                assert len(verify(lease, prompt, rank)) == CHUNKS


async def until_quiet(cache, backends, tasks):
    """Soon nothing is held, and nothing runs that did not run before."""
    for _ in range(60_000):
        if asyncio.all_tasks() <= tasks and not any(map(pins, backends)) and not (await cache.stats()).reserved_bytes:
            break
        await asyncio.sleep(0.001)
    assert asyncio.all_tasks() <= tasks
    assert [pins(backend) for backend in backends] == [0] * len(backends)
    await assert_nothing_held(cache)


async def works_on(cache, prompt):
    """What is stored is found again, in L1 and in L2."""
    await store(cache, prompt)
    assert await read_back(cache, prompt) == CHUNKS
    flushed = await cache.flush()
    assert (flushed.pending, flushed.dropped) == (0, 0)
    await cache.clear(tier="l1")
    assert await read_back(cache, prompt) == CHUNKS


def pins(backend):
    return backend.pins if hasattr(backend, "pins") else backend.inner.pins


async def trial_of_close(backends, layout, work, steps):
    """The same where the cache closes: whoever waits is told so, and nothing is left."""
    cache = await new_cache(backends).open()
    await store(cache, make_prompt(1, layout), chunks=(0,))
    await store(cache, make_prompt(2, layout), chunks=(0,))
    closing = []
    task, struck = await strike(
        work(cache, make_prompt(1, layout)), steps, lambda task: closing.append(asyncio.ensure_future(cache.close()))
    )
    if task.exception() is not None:
        assert isinstance(task.exception(), (CacheClosedError, WriterClosedError)) and struck
    await asyncio.wait(closing or [asyncio.ensure_future(cache.close())], timeout=60)
    await over(cache, backends)
    return struck


async def trial_of_open(backends, steps):
    """An open that is cancelled leaves nothing open."""
    cache = new_cache(backends)
    task, struck = await strike(cache.open(), steps, asyncio.Task.cancel)
    assert task.cancelled() == struck
    await cache.close()
    await over(cache, backends)
    return struck


async def trial_of_cancelled_close(backends, layout, blow, steps):
    """A close that is cancelled goes on, and a second one waits for its end."""
    cache = await new_cache(backends).open()
    await store(cache, make_prompt(1, layout), chunks=(0,))
    prefetch = cache.prefetch(make_prompt(1, layout), request_id="a")
    waiting = asyncio.ensure_future(cache.query_status("a"))
    writer = await cache.store(make_prompt(2, layout))
    task, struck = await strike(cache.close(), steps, lambda task: blow(cache, task, prefetch))
    assert task.cancelled() == struck
    await cache.close()
    assert isinstance(waiting.exception(), CacheClosedError)
    writer.close()
    await over(cache, backends)
    return struck


def new_cache(backends):
    return AsyncCache(CacheConfig(l1_bytes=64 * PAGE, l2=[]), backends=backends)


async def trial_of_disk(backend, verb, steps):
    """A call of the backend itself: once it has ended, it touches no buffer and holds no pin."""
    keys = object_keys(make_prompt(1, SHORT), groups=[0])
    new = object_keys(make_prompt(2, SHORT), groups=[0])
    bodies = [memoryview(bytearray([n]) * 2**20) for n in range(len(keys))]
    buffers = [memoryview(bytearray(2**20)) for _ in keys]
    work = {
        "lookup": lambda: backend.lookup(keys + new),
        "load": lambda: backend.load(keys, buffers),
        "store": lambda: backend.store(new, bodies),
        "delete": lambda: backend.delete(keys),
    }
    await backend.open()
    assert all(await backend.store(keys, bodies))
    await backend.delete(new)
    task, struck = await strike(work[verb](), steps, asyncio.Task.cancel)
    assert task.cancelled() == struck
    for buffer in buffers:
        buffer[:] = b"\xaa" * len(buffer)
    if verb == "lookup" and not struck:
        backend.unpin(keys)
    assert backend.pins == 0
    assert await backend.store(keys + new, bodies + bodies) == [True] * 2 * len(keys)
    assert all(buffer == b"\xaa" * len(buffer) for buffer in buffers)
    assert await backend.load(keys + new, buffers + [memoryview(bytearray(2**20)) for _ in new]) == [
        LoadOutcome.LOADED
    ] * 2 * len(keys)
    assert buffers == bodies
    backend.check_integrity()
    await backend.close()
    return struck


async def over(cache, backends):
    """Nothing runs, and nothing is pinned, once it is closed."""
    with pytest.raises(CacheClosedError):
        cache.check_integrity()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert [pins(backend) for backend in backends] == [0] * len(backends)


@pytest.fixture
def strike_at_every_step(request):
    """Runs trials, each on a loop of its own, until a blow comes too late; none leaves a thread or a file behind."""
    first = 1 + crc32(request.node.name.encode()) % STRIDE

    def run(loop, trial):
        threads, files = threads_and_files()
        for steps in count(first, STRIDE):
            with asyncio.Runner(loop_factory=loop) as runner:
                struck = runner.run(trial(steps))
            for _ in range(60_000):
                left = threads_and_files()
                if left[0] <= threads and left[1] <= files:
                    break
                gc.collect()  # the traceback of an error may still look at L1,
                time.sleep(0.001)  # and a thread that has done its work may not have ended
            assert left[0] <= threads and left[1] <= files
            if not struck:
                break

    return run


def threads_and_files():
    return set(threading.enumerate()), len(os.listdir("/proc/self/fd"))


PLACES = [memory, throttled, halves, failing, stubborn]
pytestmark = pytest.mark.filterwarnings("ignore::async_solipsism.ResolutionWarning")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("work", "blow"), [*product(PREFETCHING, CANCEL_TASK + CANCEL_REQUEST), *product(OTHERS, CANCEL_TASK)]
)
def test_a_call_that_is_cancelled_at_any_step_leaves_nothing_behind(strike_at_every_step, place, work, blow):
    async def attempt(steps):
        return await trial(await place(), SHORT, work, blow, steps)

    strike_at_every_step(VirtualLoop, attempt)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("work", [*PREFETCHING, *OTHERS])
def test_a_close_at_any_step_of_a_call(strike_at_every_step, place, work):
    async def attempt(steps):
        return await trial_of_close(await place(), SHORT, work, steps)

    strike_at_every_step(VirtualLoop, attempt)


@pytest.mark.parametrize("place", PLACES)
def test_an_open_that_is_cancelled_at_any_step(strike_at_every_step, place):
    async def attempt(steps):
        return await trial_of_open(await place(), steps)

    strike_at_every_step(VirtualLoop, attempt)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("blow", CANCEL_TASK)
def test_a_close_that_is_cancelled_at_any_step(strike_at_every_step, place, blow):
    async def attempt(steps):
        return await trial_of_cancelled_close(await place(), SHORT, blow, steps)

    strike_at_every_step(VirtualLoop, attempt)


# The same with threads and files, and prompts that are hashed in a thread.


@pytest.fixture
def disk(tmp_path):
    """Makes backends; the directory of the first has the prompt."""

    async def fill():
        async with open_cache(FileSystemBackend(tmp_path / "first", threads=1)) as cache:
            await store(cache, make_prompt(1, LONG))
            await cache.flush()

    with asyncio.Runner(loop_factory=RealLoop) as runner:
        runner.run(fill())
    return lambda name="first": FileSystemBackend(tmp_path / name, threads=1)


@pytest.mark.parametrize(
    ("work", "blow"), [*product(PREFETCHING, CANCEL_TASK + CANCEL_REQUEST), *product(OTHERS, CANCEL_TASK)]
)
def test_a_call_that_is_cancelled_at_any_step_on_a_disk(strike_at_every_step, disk, work, blow):
    strike_at_every_step(RealLoop, lambda steps: trial([disk()], LONG, work, blow, steps))


@pytest.mark.parametrize("work", [*PREFETCHING, *OTHERS])
def test_a_close_at_any_step_of_a_call_on_a_disk(strike_at_every_step, disk, work):
    strike_at_every_step(RealLoop, lambda steps: trial_of_close([disk()], LONG, work, steps))


def test_an_open_that_is_cancelled_at_any_step_on_a_disk(strike_at_every_step, disk):
    strike_at_every_step(RealLoop, lambda steps: trial_of_open([disk(), disk("second")], steps))


@pytest.mark.parametrize("blow", CANCEL_TASK)
def test_a_close_that_is_cancelled_at_any_step_on_a_disk(strike_at_every_step, disk, blow):
    strike_at_every_step(RealLoop, lambda steps: trial_of_cancelled_close([disk()], LONG, blow, steps))


@pytest.mark.parametrize("verb", ["lookup", "load", "store", "delete"])
def test_a_call_of_a_disk_that_is_cancelled_at_any_step(strike_at_every_step, disk, verb):
    strike_at_every_step(RealLoop, lambda steps: trial_of_disk(disk("third"), verb, steps))
