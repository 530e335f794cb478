"""A backend may fail in any call, in any way: what is served is right, what is not says why, and nothing is held.

One call of a backend, the nth of its verb, goes wrong: it raises, answers nonsense, hangs until the timeout, or hangs
beyond it while it still uses its buffers. Then all is well again, and everything is served.
"""

import asyncio
import gc
from contextlib import suppress
from itertools import product
from typing import NamedTuple

import pytest
from contract.support import (
    LAYOUT,
    PAGE,
    SMALL,
    TWO_RANKS,
    assert_nothing_held,
    count_hits,
    fill,
    make_layout,
    make_prompt,
    object_keys,
    open_cache,
    read_back,
    seed,
    settle,
    verify,
)
from soak import SOAK_SECONDS, rounds

from async_cache import AsyncCache, BackendError, CacheClosedError, CacheConfig, ObjectGroup, Shortfall
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import FailingBackend, WrappedBackend
from async_cache.testing.virtual import run_virtual

NTH = range(1, rounds(quick=2, long=5))
STUBBORN_SECONDS = 50  # longer than any timeout
WINDOWS = make_layout(SMALL, ObjectGroup((8,), "uint8", window_chunks=2), world_size=2)


def layouts(*quick):
    return [LAYOUT, TWO_RANKS, WINDOWS] if SOAK_SECONDS else quick


class Faulty(WrappedBackend):
    """Calls of one verb go wrong: those whose number, from 1 on, is in `which`."""

    def __init__(self, name, verb="", fault=None, which=()):
        super().__init__(MemoryBackend(name))
        self.verb, self.fault, self.which = verb, fault, which

    def goes_wrong(self, verb):
        self.calls[verb] += 1
        return verb == self.verb and self.calls[verb] in self.which

    async def _call(self, verb, *arguments):
        call = getattr(self.inner, verb)
        return await (self.fault(call, *arguments) if self.goes_wrong(verb) else call(*arguments))

    async def open(self):
        await self._call("open")

    async def lookup(self, keys):
        return await self._call("lookup", keys)

    async def load(self, keys, buffers):
        return await self._call("load", keys, buffers)

    async def store(self, keys, buffers):
        return await self._call("store", keys, buffers)

    async def delete(self, keys):
        return await self._call("delete", keys)

    async def close(self):
        await self._call("close")

    # These do not wait.

    def lookup_nowait(self, chunk_hashes, objects):
        if self.verb != "lookup_nowait":
            return None
        wrong = self.goes_wrong("lookup_nowait")
        return self.fault(chunk_hashes) if wrong else self.inner.lookup_nowait(chunk_hashes, objects)

    def unpin(self, keys):
        self.inner.unpin(keys)
        if self.goes_wrong("unpin"):
            self.fault(keys)

    def usage(self):
        return self.fault(()) if self.goes_wrong("usage") else self.inner.usage()

    def keys(self):
        return self.fault(self.inner.keys()) if self.goes_wrong("keys") else self.inner.keys()


# Faults: what is done in place of a call.


def scribble(buffers):
    """What a failed load leaves behind; the buffers of a store are not to be written to."""
    for buffer in buffers:
        if not buffer.readonly:
            buffer[:] = b"\xaa" * len(buffer)


def raising(error):
    async def fault(call, keys=(), buffers=()):
        scribble(buffers)
        await asyncio.sleep(0)
        raise error("injected")

    return fault


def answering(answer):
    async def fault(call, keys=(), buffers=()):
        scribble(buffers)
        return answer(len(keys))

    return fault


async def too_few(call, keys, *buffers):
    return await call(keys[:-1], *(each[:-1] for each in buffers))


async def too_many(call, keys, *buffers):
    answers = await call(keys, *buffers)
    return answers + answers[-1:]


async def hang(call, keys=(), buffers=()):
    scribble(buffers)
    await asyncio.sleep(1e6)


async def stubborn(call, keys=(), buffers=()):
    """A thread on a dead disk: no cancel ends it, and its buffers are its own until it has ended."""
    ended = asyncio.Event()
    asyncio.get_running_loop().call_later(STUBBORN_SECONDS, ended.set)
    while not ended.is_set():
        with suppress(asyncio.CancelledError):
            await ended.wait()
    scribble(buffers)
    raise OSError("injected")


class Fault(NamedTuple):
    act: object
    reason: Shortfall = Shortfall.BACKEND_ERROR  # what a load says that fell short by it


FAULTS = {
    "backend error": Fault(raising(BackendError)),
    "os error": Fault(raising(OSError)),
    "any exception": Fault(raising(ZeroDivisionError)),
    "cancelled": Fault(raising(asyncio.CancelledError)),
    "none": Fault(answering(lambda n: None)),
    "a number": Fault(answering(lambda n: 7)),
    "a text": Fault(answering(lambda n: "?" * n)),
    "a mapping": Fault(answering(lambda n: dict.fromkeys(range(n), LoadOutcome.LOADED))),
    "too few": Fault(too_few),
    "too many": Fault(too_many),
    "hang": Fault(hang, Shortfall.DEADLINE),
    "stubborn": Fault(stubborn, Shortfall.DEADLINE),
}
STORE_FAULTS = FAULTS | {"refused": Fault(answering(lambda n: [False] * n))}
LOAD_FAULTS = FAULTS | {
    "no outcomes": Fault(answering(lambda n: [True] * n)),
    "gone": Fault(answering(lambda n: [LoadOutcome.GONE] * n), Shortfall.GONE),
    "corrupt": Fault(answering(lambda n: [LoadOutcome.CORRUPT] * n), Shortfall.CORRUPT),
    "failed": Fault(answering(lambda n: [LoadOutcome.FAILED] * n)),
}


# A prompt of six chunks: the first two are in L1, the others in L2.

HEAD, ALL = 2, 6
PLACES = {  # what each of the backends holds, and how many chunks can be had where the first, or the last, fails
    "one": ([range(ALL)], [HEAD]),
    "both": ([range(ALL), range(ALL)], [ALL, ALL]),
    "halves": ([range(4), range(4, ALL)], [HEAD, 4]),
}


async def prefetch_through(layout, held, faulty, verb, fault, nth, served):
    """One prompt after another; of the nth, so many chunks are served, of the others all."""
    prompts = [make_prompt(ALL, number, layout) for number in range(1, 1 + max(NTH) + 1)]
    backends = [Faulty(str(n)) for n in range(len(held))]
    for prompt in prompts:
        for backend, chunks in zip(backends, held, strict=True):
            await seed(backend.inner, prompt, chunks=chunks)
    async with open_cache(*backends, pages=256, load_inflight_bytes=1) as cache:  # one call at a time
        for prompt in prompts:
            await fill(cache, prompt, chunks=range(HEAD))
        await cache.flush()
        bad = backends[faulty]
        before = bad.calls[verb]
        bad.verb, bad.fault, bad.which = verb, fault.act, (before + nth,)
        for number, prompt in enumerate(prompts, 1):
            short = number == nth
            prefetch = cache.prefetch(prompt, request_id="a")
            hits, result = await prefetch.lookup_done, await prefetch.load_done
            assert result.chunks == (served if short else ALL)
            assert hits.chunks == (served if short and verb == "lookup" else ALL)
            reason = fault.reason if short and served < ALL else None
            assert result.shortfall is (reason if verb == "load" else None)
            assert hits.shortfall is (Shortfall.BACKEND_ERROR if reason and verb == "lookup" else None)
            for rank in range(layout.world_size):
                async with cache.read("a", rank=rank) as lease:
                    assert verify(lease, prompt, rank) == list(range(result.chunks))
            await settle()
            stats = await cache.stats()
            stuck = fault.act is stubborn and verb == "load" and bad.calls[verb] == before + nth == before + number
            assert (stats.quarantined_bytes > 0) == stuck
            assert (stats.requests, stats.leases, stats.reserved_bytes) == (0, 0, 0)
            if short:
                await asyncio.sleep(STUBBORN_SECONDS + 50)
        assert bad.calls[verb] >= before + nth or faulty > 0  # a second holder need not be asked
        await serves_everything(cache, prompts, backends)


async def serves_everything(cache, prompts, backends):
    await assert_nothing_held(cache)
    for prompt in prompts:
        await cache.clear(tier="l1")
        assert await read_back(cache, prompt) == len(prompt)
    await assert_nothing_held(cache)
    assert [backend.inner.pins for backend in backends] == [0] * len(backends)
    for backend in backends:
        backend.inner.check_integrity()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", LOAD_FAULTS)
def test_the_nth_load_fails(name, place):
    held, serves = PLACES[place]
    for nth in NTH:
        for layout in layouts(TWO_RANKS, WINDOWS):
            for faulty, served in enumerate(serves):
                if layout is WINDOWS and served < ALL:
                    served = HEAD  # the windows of what lies between were not loaded
                run_virtual(prefetch_through(layout, held, faulty, "load", LOAD_FAULTS[name], nth, served))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FAULTS)
def test_the_nth_lookup_fails(name, place):
    held, serves = PLACES[place]
    for nth in NTH:
        for layout in layouts(WINDOWS):
            for faulty, served in enumerate(serves):
                run_virtual(prefetch_through(layout, held, faulty, "lookup", FAULTS[name], nth, served))


@pytest.mark.parametrize("holders", [1, 2])
def test_one_object_of_many_fails_alone(holders):
    """What lies before it is served, or all where another backend has it; the breaker counts nothing."""
    prompt, other = make_prompt(ALL, 1, TWO_RANKS), make_prompt(ALL, 2, TWO_RANKS)
    bad = object_keys(prompt, chunks=[HEAD], ranks=[1])
    inners = [MemoryBackend(str(n)) for n in range(holders)]

    async def scene():
        for inner in inners:
            await seed(inner, prompt)
            await seed(inner, other)
        failing = FailingBackend(inners[0], "load", times=None, keys=bad)
        async with open_cache(failing, *inners[1:], pages=256, breaker_failures=1, breaker_reset_seconds=600) as cache:
            for _ in range(5):
                result = await cache.prefetch(prompt, request_id="a").load_done
                served = HEAD if holders == 1 else ALL
                assert (result.chunks, result.shortfall) == (served, Shortfall.BACKEND_ERROR if served < ALL else None)
                for rank in (0, 1):
                    async with cache.read("a", rank=rank) as lease:
                        assert verify(lease, prompt, rank) == list(range(served))
                assert await read_back(cache, other) == ALL
                await cache.clear(tier="l1")
            await assert_nothing_held(cache)
            assert [inner.pins for inner in inners] == [0] * holders

    run_virtual(scene())


# Write-back.


async def write_back_through(layout, backends, faulty, verb, fault, which):
    """Two prompts are stored. What was written is in a backend, the rest was dropped, and all is served again."""
    prompts = [make_prompt(ALL, number, layout) for number in (1, 2)]
    bad = backends[faulty]
    bad.verb, bad.fault, bad.which = verb, fault.act, which
    async with open_cache(*backends, pages=256) as cache:
        for prompt in prompts:
            await fill(cache, prompt)
            flushed = await cache.flush()
            assert flushed.pending == 0 and flushed.written + flushed.dropped == ALL
            if len(which) == 1 or len(backends) > 1:
                assert flushed.dropped == 0
            elif fault.act not in (too_few, too_many):
                assert flushed.dropped == ALL
            held = [await count_held(backend, prompt) for backend in backends]
            assert max(held) == flushed.written
        bad.which = ()
        await asyncio.sleep(STUBBORN_SECONDS + 50)
        await assert_nothing_held(cache)
        await cache.clear(tier="all")
        for prompt in prompts:
            await fill(cache, prompt)
        await cache.flush()
        assert [await count_held(backend, prompt) for backend in backends for prompt in prompts] == [ALL] * 2 * len(
            backends
        )
        await serves_everything(cache, prompts, backends)


async def count_held(backend, prompt):
    """The chunks of a prompt of which a backend has every object."""
    held = {key async for key, _ in backend.inner.keys()}
    return sum(held.issuperset(object_keys(prompt, chunks=[index])) for index in range(len(prompt)))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("verb", "name"), [*product(["lookup"], FAULTS), *product(["store"], STORE_FAULTS)])
def test_the_nth_call_of_write_back_fails_or_all_do(verb, name, count):
    for which in [*((nth,) for nth in NTH), range(1, 1000)]:
        for layout in layouts(TWO_RANKS):
            backends = [Faulty(str(n)) for n in range(count)]
            run_virtual(write_back_through(layout, backends, count - 1, verb, STORE_FAULTS[name], which))


# Removal.


async def remove_through(layout, backends, faulty, verb, fault, remove):
    """A removal that fails in one backend says so, and is done in the other; the next one is done in both."""
    prompt = make_prompt(ALL, layout=layout)
    for backend in backends:
        await seed(backend.inner, prompt)
    bad = backends[faulty]
    bad.verb, bad.fault, bad.which = verb, fault, (1,)
    async with open_cache(*backends) as cache:
        await fill(cache, prompt, chunks=range(HEAD))
        await cache.flush()
        bad.calls.clear()
        began = asyncio.get_running_loop().time()
        with pytest.raises(BackendError):
            await remove(cache, prompt)
        assert asyncio.get_running_loop().time() - began <= 31
        assert [backend.usage().objects for backend in backends if backend is not bad] == [0] * (len(backends) - 1)
        await asyncio.sleep(STUBBORN_SECONDS + 50)
        await remove(cache, prompt)
        assert await count_hits(cache, prompt) == 0
        assert [backend.usage().objects for backend in backends] == [0] * len(backends)
        await fill(cache, prompt)
        await cache.flush()
        await serves_everything(cache, [prompt], backends)


def delete(cache, prompt):
    return cache.delete(prompt)


def clear(cache, prompt):
    return cache.clear(tier="all")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("verb", "name"),
    [*product(["lookup"], FAULTS), *product(["delete"], sorted(FAULTS.keys() - {"a number", "too few", "too many"}))],
)
def test_a_delete_fails_in_one_backend(verb, name, count):
    for layout in layouts(WINDOWS):
        for faulty in range(count):
            backends = [Faulty(str(n)) for n in range(count)]
            run_virtual(remove_through(layout, backends, faulty, verb, FAULTS[name].act, delete))


async def broken_off(keys):
    async for item in keys:
        yield item
        raise OSError("injected")


async def cancelled_itself(keys):
    async for item in keys:
        yield item
        raise asyncio.CancelledError("injected")


async def silent(keys):
    async for item in keys:
        yield item
        await hang(None)


async def stuck(keys):
    async for item in keys:
        yield item
        await stubborn(None)


async def nonsense(keys):
    async for _ in keys:
        yield 7


def no_keys(keys):
    return None


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("fault", [broken_off, cancelled_itself, silent, stuck, nonsense, no_keys])
def test_a_clear_fails_where_a_backend_can_not_list_its_keys(fault, count):
    for faulty in range(count):
        run_virtual(remove_through(LAYOUT, [Faulty(str(n)) for n in range(count)], faulty, "keys", fault, clear))


# What does not wait.


def raises(error):
    def fault(keys):
        raise error("injected")

    return fault


SYNC_ERRORS = [OSError, ZeroDivisionError, asyncio.CancelledError]


async def serve_through(layout, verb, fault):
    """All is served, whatever goes wrong beside it."""
    prompts = [make_prompt(ALL, number, layout) for number in (1, 2)]
    backend = Faulty("memory", verb, fault, range(1, 1000))
    async with open_cache(backend) as cache:
        for prompt in prompts:
            await fill(cache, prompt)
        assert (await cache.flush()).dropped == 0
        await serves_everything(cache, prompts, [backend])
        assert backend.calls[verb] > 0


@pytest.mark.parametrize("error", SYNC_ERRORS)
@pytest.mark.parametrize("verb", ["unpin", "usage", "lookup_nowait"])
def test_a_call_that_does_not_wait_raises(verb, error):
    for layout in layouts(WINDOWS):
        run_virtual(serve_through(layout, verb, raises(error)))


NONSENSE = {
    "a number": lambda n: 7,
    "a text": lambda n: "?" * n,
    "too few": lambda n: [True] * (n - 1),
    "too many": lambda n: [True] * (n + 1),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_an_answer_at_once_is_nonsense(name):
    for layout in layouts(WINDOWS):
        run_virtual(serve_through(layout, "lookup_nowait", lambda keys: NONSENSE[name](len(keys))))


# Opening and closing.


async def open_through(fault):
    failing_close = FAULTS["os error"].act
    backends = [Faulty("first", "close", failing_close, (1,)), Faulty("second", "open", fault, (1,)), Faulty("third")]
    loop = asyncio.get_running_loop()
    noise = []
    loop.set_exception_handler(lambda loop, context: noise.append(context))
    cache = AsyncCache(CacheConfig(l1_bytes=64 * PAGE, l2=[]), backends=backends)
    with pytest.raises(BaseException):  # noqa: B017, PT011 (it is the backend's)
        await cache.open()
    assert loop.time() <= 36
    assert [backend.calls["close"] for backend in backends] == [1, 1, 0]
    await asyncio.sleep(STUBBORN_SECONDS)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    gc.collect()
    assert noise == []


async def close_through(fault):
    backends = [Faulty("first", "close", fault, (1,)), Faulty("second")]
    prompt = make_prompt(ALL)
    await seed(backends[1].inner, prompt)
    loop = asyncio.get_running_loop()
    async with open_cache(*backends) as cache:
        await fill(cache, prompt, chunks=range(HEAD))
        prefetch = cache.prefetch(prompt)
        began = loop.time()
    assert loop.time() - began <= 11
    with pytest.raises(CacheClosedError):
        await prefetch.load_done
    assert [backend.calls["close"] for backend in backends] == [1, 1]
    await asyncio.sleep(STUBBORN_SECONDS)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("through", [open_through, close_through])
@pytest.mark.parametrize("name", ["backend error", "os error", "any exception", "cancelled", "hang", "stubborn"])
def test_a_backend_can_not_be_opened_or_closed(name, through):
    run_virtual(through(FAULTS[name].act))


# Two ranks of a chunk, each from its own backend.


async def share_memory(nonsense):
    prompt, other = make_prompt(ALL, layout=TWO_RANKS), make_prompt(ALL, 2, TWO_RANKS)
    sound, bad = Faulty("slow", "load", stubborn, (1,)), Faulty("bad", "load", nonsense, (1,))
    for rank, backend in enumerate((sound, bad)):
        await seed(backend.inner, prompt, ranks=[rank])
    async with open_cache(sound, bad, pages=2 * ALL) as cache:
        result = await cache.prefetch(prompt, request_id="a").load_done
        assert (result.chunks, result.shortfall) == (0, Shortfall.BACKEND_ERROR)
        await cache.end_request("a")
        await fill(cache, other)  # gets what memory there is
        stored = await count_hits(cache, other)
        await asyncio.sleep(STUBBORN_SECONDS)
        assert await read_back(cache, other) == stored
        await cache.flush()
        await assert_nothing_held(cache)


def test_nonsense_from_one_backend_frees_no_memory_that_another_still_writes_to():
    run_virtual(share_memory(answering(lambda n: [[]] * n)))
