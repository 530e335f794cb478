"""Closing: nobody waits for ever, nothing is left."""

import asyncio

import pytest

from async_cache import AsyncCache, CacheClosedError, CacheConfig, WriterClosedError
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import GatedBackend

from .support import (
    PAGE,
    Recorder,
    Scripted,
    attempt,
    fill,
    make_layout,
    make_prompt,
    open_cache,
    outcomes,
    seed,
    settle,
)

PROMPT = make_prompt(2)
CALLS = {
    "prefetch": lambda cache: cache.prefetch(PROMPT),
    "lookup": lambda cache: cache.lookup(PROMPT),
    "query_lookup_hits": lambda cache: cache.query_lookup_hits("a"),
    "query_status": lambda cache: cache.query_status("a"),
    "read": lambda cache: cache.read("a"),
    "store": lambda cache: cache.store(PROMPT),
    "renew": lambda cache: cache.renew("a"),
    "flush": lambda cache: cache.flush(),
    "delete": lambda cache: cache.delete(PROMPT),
    "clear": lambda cache: cache.clear(tier="all"),
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_before_the_cache_is_open_raises(name):
    cache = AsyncCache(CacheConfig(l1_bytes=16 * PAGE, l2=[]), backends=[])
    with pytest.raises(CacheClosedError):
        await attempt(lambda: CALLS[name](cache))


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_after_the_cache_was_closed_raises(name):
    async with open_cache(MemoryBackend()) as cache:
        await fill(cache, PROMPT)
        await cache.prefetch(PROMPT, request_id="a").load_done
    with pytest.raises(CacheClosedError):
        await attempt(lambda: CALLS[name](cache))


@pytest.mark.parametrize("verb", ["lookup", "load"])
async def test_who_waits_when_the_cache_closes_gets_an_error(verb):
    gate = GatedBackend(MemoryBackend())
    recorder = Recorder(gate)
    await seed(recorder, PROMPT)
    async with open_cache(recorder) as cache:
        gate.hold(verb)
        prefetch = cache.prefetch(PROMPT, request_id="a")

        async def read():
            await cache.read("a")

        waits = [asyncio.ensure_future(wait) for wait in (prefetch.load_done, cache.query_status("a"), read())]
        if verb == "lookup":
            waits += [asyncio.ensure_future(wait) for wait in (prefetch.lookup_done, cache.query_lookup_hits("a"))]
        await gate.reached(verb)
        await settle()
    assert [type(each) for each in await outcomes(*waits)] == [CacheClosedError] * len(waits)
    assert recorder.pinned == {}


async def test_futures_that_nobody_awaits_make_no_noise_when_the_cache_closes():
    gate = GatedBackend(MemoryBackend())
    await seed(gate, PROMPT)
    noise = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: noise.append(context))
    async with open_cache(gate) as cache:
        gate.hold("load")
        prefetch = cache.prefetch(PROMPT)
        await gate.reached("load")
        waiting = prefetch.load_done
    del prefetch, waiting
    await settle()
    assert noise == []


async def test_no_task_is_left():
    gate = GatedBackend(MemoryBackend())
    await seed(gate, PROMPT)
    async with open_cache(gate) as cache:
        gate.hold()
        for number in range(5):
            cache.prefetch(make_prompt(2, 1 + number % 2))
        await fill(cache, make_prompt(2, 9))
        await settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_the_backends_are_opened_and_closed_once():
    first, second = Recorder(MemoryBackend(name="first")), Recorder(MemoryBackend(name="second"))
    async with open_cache(first, second):
        assert first.calls["open"] == second.calls["open"] == 1
        assert first.calls["close"] == second.calls["close"] == 0
    assert first.calls["close"] == second.calls["close"] == 1


async def test_an_error_inside_closes_the_cache_and_goes_on():
    recorder = Recorder(MemoryBackend())

    async def engine():
        async with open_cache(recorder) as cache:
            cache.prefetch(PROMPT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await engine()
    assert recorder.calls["close"] == 1


async def test_a_dead_disk_does_not_hold_up_the_close():
    gate = GatedBackend(MemoryBackend(), stubborn=True)
    await seed(gate, PROMPT)
    async with open_cache(gate) as cache:
        gate.hold("load", "store")
        await fill(cache, make_prompt(2, 2))
        cache.prefetch(PROMPT)
        await gate.reached("load")
        started = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - started < 60
    gate.release("load", "store")
    await settle()


@pytest.mark.embedded
@pytest.mark.parametrize("fault", ["silent", "refuses", ""])
async def test_what_could_not_be_written_back_is_said_once(fault, caplog):
    backend = Scripted(MemoryBackend())
    backend.store_answer = fault != "refuses"
    gate = GatedBackend(backend)
    cache = AsyncCache(CacheConfig(l1_bytes=16 * PAGE, l2=[], close_timeout_seconds=2), backends=[gate])
    await cache.open()
    gate.hold("store")
    await fill(cache, PROMPT)
    if fault != "silent":
        gate.release("store")
    await cache.close()
    late = 2 if fault == "silent" else 0
    said = [record.getMessage() for record in caplog.records if record.name == "async_cache.core"]
    assert said == [
        f"chunks that were committed are not in L2 as the cache closes: 2, {late} of them for want of time "
        "(close_timeout_seconds = 2)"
    ] * bool(fault)


async def test_a_read_that_is_open_when_the_cache_closes_can_be_left():
    async with open_cache() as cache:
        await fill(cache, PROMPT)
        cache.prefetch(PROMPT, request_id="a")
        lease = await cache.read("a")
        view = lease[0].views[0]
    assert len(bytes(view)) == 16
    lease.release()


async def test_a_writer_that_is_open_when_the_cache_closes_publishes_nothing_and_can_be_left():
    backend = MemoryBackend()
    async with open_cache(backend) as cache:
        writer = await cache.store(PROMPT)
        chunk = writer[0]
    with pytest.raises((WriterClosedError, CacheClosedError)):
        chunk.commit()
    writer.close()
    assert backend.usage().objects == 0


async def test_a_prefetch_and_its_id_are_still_there_to_look_at():
    async with open_cache() as cache:
        prefetch = cache.prefetch(PROMPT, request_id="a")
        await prefetch.load_done
    assert prefetch.request_id == "a"
    assert (await prefetch.load_done).chunks == 0
    prefetch.cancel()


@pytest.mark.parametrize("turns", range(8))
@pytest.mark.parametrize("name", ["query_status", "read"])
async def test_who_was_about_to_get_a_result_is_told_that_the_cache_closed(name, turns):
    gate = GatedBackend(MemoryBackend())
    await seed(gate, PROMPT)
    async with open_cache(gate) as cache:
        gate.hold("load")
        cache.prefetch(PROMPT, request_id="a")
        wait = asyncio.ensure_future(attempt(lambda: CALLS[name](cache)))
        await gate.reached("load")
        gate.release("load")
        for _ in range(turns):
            await asyncio.sleep(0)
    (got,) = await outcomes(wait)
    assert not isinstance(got, Exception) or isinstance(got, CacheClosedError)


@pytest.mark.embedded
@pytest.mark.real_time
@pytest.mark.parametrize("name", ["lookup", "delete"])
async def test_a_call_whose_prompt_is_hashed_when_the_cache_closes_asks_no_backend(name):
    prompt = make_layout(chunk_tokens=16).prompt(range(40_000))
    recorder = Recorder(MemoryBackend())
    async with open_cache(recorder) as cache:
        wait = asyncio.ensure_future(getattr(cache, name)(prompt))
        await asyncio.sleep(0)
    with pytest.raises(CacheClosedError):
        await wait
    assert recorder.calls["lookup"] == 0
