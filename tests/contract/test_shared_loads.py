"""One load per object, whoever wants it; it lives as long as its last share."""

import asyncio

import pytest

from async_cache import Shortfall
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import FailingBackend, GatedBackend

from .support import (
    TWO_RANKS,
    Recorder,
    assert_nothing_held,
    make_prompt,
    object_keys,
    open_cache,
    seed,
    settle,
    verify,
)


async def gated(prompt, *, stubborn=False):
    gate = GatedBackend(MemoryBackend(), stubborn=stubborn)
    recorder = Recorder(gate)
    await seed(recorder, prompt)
    gate.hold("load")
    return gate, recorder


async def read_and_end(cache, request_id, prompt, count):
    async with cache.read(request_id) as lease:
        assert verify(lease, prompt) == list(range(count))


async def test_an_object_that_several_requests_want_is_loaded_once():
    prompt = make_prompt(4)
    gate, recorder = await gated(prompt)
    async with open_cache(recorder) as cache:
        ids = ["a", "b", "c"]
        for request_id in ids:
            assert (await cache.prefetch(prompt, request_id=request_id).lookup_done).chunks == 4
        gate.release("load")
        for request_id in ids:
            assert (await cache.query_status(request_id)).chunks == 4
        for request_id in ids:
            await read_and_end(cache, request_id, prompt, 4)
        assert set(recorder.loaded) == set(object_keys(prompt))
        assert set(recorder.loaded.values()) == {1}
        stats = await cache.stats()
        assert (stats.loads, stats.shared_loads) == (4, 8)
        await assert_nothing_held(cache, recorder)


async def test_prompts_with_the_same_head_share_its_load():
    long, short = make_prompt(5), make_prompt(2)
    gate, recorder = await gated(long)
    async with open_cache(recorder) as cache:
        cache.prefetch(short, request_id="short")
        await gate.reached("load")
        assert (await cache.prefetch(long, request_id="long").lookup_done).chunks == 5
        gate.release("load")
        await read_and_end(cache, "short", short, 2)
        await read_and_end(cache, "long", long, 5)
        assert recorder.loaded.total() == 5
        await assert_nothing_held(cache, recorder)


async def test_a_shared_load_goes_on_when_the_first_request_is_cancelled():
    prompt = make_prompt(4)
    gate, recorder = await gated(prompt)
    async with open_cache(recorder) as cache:
        first = cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        await cache.prefetch(prompt, request_id="b").lookup_done
        first.cancel()
        await settle()
        assert recorder.loads_cancelled == 0
        gate.release("load")
        assert (await first.load_done).shortfall is Shortfall.CANCELLED
        assert (await cache.query_status("b")).chunks == 4
        await read_and_end(cache, "b", prompt, 4)
        assert set(recorder.loaded.values()) == {1}


async def test_a_load_is_cancelled_when_its_last_share_goes():
    prompt = make_prompt(4)
    gate, recorder = await gated(prompt)
    async with open_cache(recorder) as cache:
        first = cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        await cache.prefetch(prompt, request_id="b").lookup_done
        first.cancel()
        await cache.end_request("b")
        await settle()
        assert recorder.loads_cancelled == recorder.calls["load"] > 0
        await cache.end_request("a")
        await assert_nothing_held(cache, recorder)


async def test_a_deadline_ends_one_share():
    prompt = make_prompt(4)
    gate, recorder = await gated(prompt)
    async with open_cache(recorder) as cache:
        hurried = cache.prefetch(prompt, request_id="hurried", deadline_seconds=2)
        await gate.reached("load")
        patient = cache.prefetch(prompt, request_id="patient")
        await patient.lookup_done
        result = await hurried.load_done
        assert (result.chunks, result.shortfall) == (0, Shortfall.DEADLINE)
        assert asyncio.get_running_loop().time() == pytest.approx(2, abs=0.1)
        assert not patient.load_done.done()
        gate.release("load")
        assert (await patient.load_done).chunks == 4
        assert set(recorder.loaded.values()) == {1}


async def test_a_failed_load_tries_the_next_holder_for_all_that_share_it():
    prompt = make_prompt(3)
    first = GatedBackend(FailingBackend(MemoryBackend(name="first"), "load", times=None))
    second = Recorder(MemoryBackend(name="second"))
    await seed(first, prompt)
    await seed(second, prompt)
    first.hold("load")
    async with open_cache(first, second) as cache:
        for request_id in ("a", "b"):
            await cache.prefetch(prompt, request_id=request_id).lookup_done
        first.release("load")
        for request_id in ("a", "b"):
            result = await cache.query_status(request_id)
            assert (result.chunks, result.shortfall) == (3, None)
            await read_and_end(cache, request_id, prompt, 3)
        assert set(second.loaded.values()) == {1}
        await assert_nothing_held(cache, second)


async def test_a_failed_load_without_another_holder_shortens_all_that_share_it():
    prompt = make_prompt(3)
    gate = GatedBackend(FailingBackend(MemoryBackend(), "load", times=None))
    recorder = Recorder(gate)
    await seed(recorder, prompt)
    gate.hold("load")
    async with open_cache(recorder) as cache:
        for request_id in ("a", "b"):
            assert (await cache.prefetch(prompt, request_id=request_id).lookup_done).chunks == 3
        gate.release("load")
        for request_id in ("a", "b"):
            result = await cache.query_status(request_id)
            assert (result.chunks, result.shortfall) == (0, Shortfall.BACKEND_ERROR)
        await assert_nothing_held(cache, recorder)


async def test_a_request_gets_what_a_cancelled_load_with_a_stubborn_disk_was_to_bring():
    prompt = make_prompt(3)
    gate, recorder = await gated(prompt, stubborn=True)
    async with open_cache(recorder) as cache:
        cache.prefetch(prompt, request_id="a")
        await gate.reached("load")
        await cache.end_request("a")
        await settle()
        hits = await cache.prefetch(prompt, request_id="b").lookup_done
        gate.release("load")
        result = await cache.query_status("b")
        assert result.chunks == hits.chunks == 3
        await read_and_end(cache, "b", prompt, 3)
        await settle()
        await assert_nothing_held(cache, recorder)


async def test_requests_for_different_ranks_share_nothing_but_the_chunk():
    prompt = make_prompt(3, layout=TWO_RANKS)
    gate, recorder = await gated(prompt)
    async with open_cache(recorder) as cache:
        cache.prefetch(prompt, request_id="a", ranks=(0,))
        await gate.reached("load")
        cache.prefetch(prompt, request_id="b", ranks=(0, 1))
        assert (await cache.query_lookup_hits("b")).chunks == 3
        gate.release("load")
        async with cache.read("a", rank=0) as lease:
            assert verify(lease, prompt, 0) == [0, 1, 2]
        for rank in (0, 1):
            async with cache.read("b", rank=rank) as lease:
                assert verify(lease, prompt, rank) == [0, 1, 2]
        assert set(recorder.loaded) == set(object_keys(prompt))
        assert set(recorder.loaded.values()) == {1}
        await assert_nothing_held(cache, recorder)


async def test_a_later_request_finds_the_loaded_chunks_in_l1():
    prompt = make_prompt(3)
    gate, recorder = await gated(prompt)
    gate.release("load")
    async with open_cache(recorder) as cache:
        await cache.prefetch(prompt).load_done
        hits = await cache.prefetch(prompt).lookup_done
        assert (hits.l1_chunks, hits.l2_chunks) == (3, 0)
        assert recorder.loaded.total() == 3
        assert (await cache.stats()).shared_loads == 0
