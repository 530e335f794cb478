"""Streams: each chunk as soon as it and those before it are there, and what a load that falls short means to them."""

import asyncio

import pytest

from async_cache import (
    CacheClosedError,
    CacheConfig,
    ObjectGroup,
    ReadConflictError,
    Shortfall,
    UnknownRequestError,
)
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import FailingBackend, GatedBackend, ThrottledBackend, WrappedBackend

from .support import (
    OBJECT_BYTES,
    PAGE,
    SMALL,
    TWO_RANKS,
    Scripted,
    assert_nothing_held,
    count_hits,
    fill,
    make_cache,
    make_layout,
    make_prompt,
    object_keys,
    open_cache,
    pattern,
    seed,
    settle,
    verify,
)

PROMPT = make_prompt(8)
SECONDS = 1.0  # that a chunk takes
WINDOWS = make_layout(SMALL, ObjectGroup((8,), "uint8", window_chunks=2))


async def slow(prompt=PROMPT, *, wrap=lambda inner: inner):
    """A backend that holds a prompt, and needs a second for each of its chunks."""
    memory = MemoryBackend()
    await seed(memory, prompt)
    chunk_bytes = len(object_keys(prompt, chunks=[0])) * OBJECT_BYTES
    return ThrottledBackend(wrap(memory), lookup_latency_seconds=0, bytes_per_second=chunk_bytes / SECONDS)


def check(chunk, prompt, rank=0):
    for group, view in enumerate(chunk.views):
        if view is not None:
            assert bytes(view) == pattern(prompt, chunk.index, rank, group)


async def arrivals(stream, prompt, rank=0):
    """When each chunk came, in seconds; their bytes are checked as they come."""
    loop, began, times = asyncio.get_running_loop(), asyncio.get_running_loop().time(), []
    async for chunk in stream:
        assert chunk.index == len(times)
        check(chunk, prompt, rank)
        times.append(loop.time() - began)
    return times


async def nothing_held(cache):
    await settle()  # a call that is cancelled gives its room back when it has ended
    await assert_nothing_held(cache)


async def test_each_chunk_comes_as_soon_as_it_and_those_before_it_are_there():
    async with open_cache(backend := await slow(), load_timeout_seconds=1000.0) as cache:
        prefetch = cache.prefetch(PROMPT, request_id="a")
        async with cache.stream("a") as stream:
            assert (len(stream), stream.ended, stream.held) == (0, False, True)
            with pytest.raises(RuntimeError, match="when its iteration has ended"):
                _ = stream.result
            assert await arrivals(stream, PROMPT) == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8], abs=0.01)
            assert stream.result == await prefetch.load_done
            assert stream.result.chunks == len(stream) == 8
            assert verify(stream, PROMPT) == list(range(8))  # it is a sequence of what has come
            assert len([chunk async for chunk in stream]) == 8
        await nothing_held(cache)
    assert backend.calls["load"] == 1


async def test_copying_on_while_the_rest_loads_takes_as_long_as_the_longer_of_both():
    """The number that streams are for: load, then copy, takes the sum of both."""
    for copy_seconds in (0.5, 1.0, 2.0):
        async with open_cache(await slow(), load_timeout_seconds=1000.0) as cache:
            loop = asyncio.get_running_loop()
            began = loop.time()
            cache.prefetch(PROMPT, request_id="a")
            async with cache.stream("a") as stream:
                async for _ in stream:
                    await asyncio.sleep(copy_seconds)
            took = loop.time() - began
            assert took <= 1.15 * 8 * max(SECONDS, copy_seconds)


class Noted(WrappedBackend):
    """Notes how many objects each load asks for, in the order of what else is noted."""

    def __init__(self, inner):
        super().__init__(inner)
        self.notes = []

    async def before(self, verb, keys, buffers):
        if verb == "load":
            self.notes.append(f"{len(keys)} asked for")


@pytest.mark.embedded
async def test_the_first_chunks_of_a_long_stream_are_there_before_the_rest_is_asked_for():
    prompt = make_prompt(40)
    await seed(backend := Noted(MemoryBackend()), prompt)
    async with open_cache(backend) as cache:
        prefetch = cache.prefetch(prompt)
        async with cache.stream(prefetch.request_id) as stream:
            async for chunk in stream:
                check(chunk, prompt)
                if chunk.index in (0, 39):
                    backend.notes.append(f"chunk {chunk.index}")
        assert backend.notes == ["4 asked for", "chunk 0", "36 asked for", "chunk 39"]
        await cache.clear("l1")
        await cache.prefetch(prompt).load_done  # nobody watches
        assert backend.notes[4:] == ["40 asked for"]


@pytest.mark.embedded
async def test_first_chunks_that_take_long_do_not_hold_up_the_rest_of_a_stream():
    prompt = make_prompt(40)
    await seed(gate := GatedBackend(MemoryBackend(), "load"), prompt)
    async with open_cache(gate) as cache:
        prefetch = cache.prefetch(prompt)
        async with cache.stream(prefetch.request_id) as stream:
            await gate.reached("load", 2)
            assert len(stream) == 0
            gate.release()
            assert len(await arrivals(stream, prompt)) == 40


async def test_what_is_in_memory_comes_at_once_and_the_rest_as_it_loads():
    gate = GatedBackend(MemoryBackend(), "load")
    await seed(gate, PROMPT)
    async with open_cache(gate) as cache:
        await fill(cache, make_prompt(3))
        prefetch = cache.prefetch(PROMPT, request_id="a")
        assert (await prefetch.lookup_done).l1_chunks == 3
        async with cache.stream("a") as stream:
            assert await stream.arrived(3)
            waiting = asyncio.create_task(stream.arrived(4))
            await gate.reached("load")
            assert not waiting.done()
            gate.release()
            assert await waiting
            assert len(await asyncio.wait_for(arrivals(stream, PROMPT), 1)) == 8


async def test_a_stream_of_what_is_loaded_is_a_read():
    async with open_cache() as cache:
        await fill(cache, PROMPT)
        prefetch = cache.prefetch(PROMPT, request_id="a")
        result = await prefetch.load_done
        stream = await cache.stream("a")
        assert await arrivals(stream, PROMPT) == [0] * 8
        assert stream.result == result
        with pytest.raises(ReadConflictError):
            await cache.read("a")
        stream.release()
        stream.release()
        with pytest.raises(RuntimeError, match="released"):
            _ = stream[0].views
        with pytest.raises(RuntimeError, match="released"):
            await stream.arrived(1)
        await nothing_held(cache)


@pytest.mark.parametrize("number", range(8))
async def test_where_the_load_falls_short_the_stream_ends_with_the_result(number):
    """Whichever object cannot be read, for every one: those before it came, and no other."""
    bad = object_keys(PROMPT, chunks=[number])
    backend = await slow(wrap=lambda inner: FailingBackend(inner, "load", keys=bad))
    async with open_cache(backend, load_timeout_seconds=1000.0) as cache:
        prefetch = cache.prefetch(PROMPT, request_id="a")
        async with cache.stream("a") as stream:
            assert await arrivals(stream, PROMPT) == pytest.approx(list(range(1, number + 1)), abs=0.01)
            assert (stream.result.chunks, stream.result.shortfall) == (number, Shortfall.BACKEND_ERROR)
            assert stream.result == await prefetch.load_done
        await nothing_held(cache)


async def test_what_came_before_a_deadline_stays_readable_until_the_stream_is_left():
    async with open_cache(await slow(), load_timeout_seconds=1000.0) as cache:
        cache.prefetch(PROMPT, request_id="a", deadline_seconds=3.5)
        async with cache.stream("a") as stream:
            assert len(await arrivals(stream, PROMPT)) == 3
            assert (stream.result.chunks, stream.result.shortfall) == (3, Shortfall.DEADLINE)
            assert verify(stream, PROMPT) == [0, 1, 2]
        await nothing_held(cache)


@pytest.mark.parametrize("how", ["cancel", "end"])
async def test_a_request_that_ends_ends_its_stream_and_what_came_stays_until_it_is_left(how):
    async with open_cache(await slow(), load_timeout_seconds=1000.0, pages=8) as cache:
        prefetch = cache.prefetch(PROMPT, request_id="a")
        async with cache.stream("a") as stream:
            assert await stream.arrived(3)
            if how == "end":
                await cache.end_request("a")
            else:
                prefetch.cancel()
            assert len(await arrivals(stream, PROMPT)) == 3
            assert (stream.result.chunks, stream.result.shortfall) == (0, Shortfall.CANCELLED)
            other = make_prompt(8, 2)
            await fill(cache, other)  # there is no room for what would take that of the stream
            assert verify(stream, PROMPT) == [0, 1, 2]
            assert await count_hits(cache, other) <= 5
        await cache.end_request("a")
        await nothing_held(cache)


async def test_to_leave_before_the_load_has_ended_ends_it():
    async with open_cache(backend := await slow(), load_timeout_seconds=1000.0) as cache:
        prefetch = cache.prefetch(PROMPT, request_id="a")
        async with cache.stream("a") as stream:
            async for chunk in stream:
                if chunk.index == 2:
                    break
        assert (await prefetch.load_done).shortfall is Shortfall.CANCELLED
        with pytest.raises(UnknownRequestError):
            await cache.query_status("a")
        await nothing_held(cache)
    assert backend.calls["load"] == 1


async def test_all_ranks_stream_and_the_request_is_over_when_all_have_left():
    prompt = make_prompt(4, layout=TWO_RANKS)
    async with open_cache(await slow(prompt), load_timeout_seconds=1000.0) as cache:
        cache.prefetch(prompt, request_id="a")

        async def read(rank):
            async with cache.stream("a", rank=rank) as stream:
                return await arrivals(stream, prompt, rank)

        assert await asyncio.gather(read(0), read(1)) == [pytest.approx([1, 2, 3, 4], abs=0.01)] * 2
        with pytest.raises(UnknownRequestError):
            await cache.stream("a")
        await nothing_held(cache)


async def test_a_rank_that_left_early_leaves_the_load_to_the_others():
    prompt = make_prompt(4, layout=TWO_RANKS)
    async with open_cache(await slow(prompt), load_timeout_seconds=1000.0) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        async with cache.stream("a", rank=1) as stream:
            assert await stream.arrived(1)
        assert (await prefetch.load_done).chunks == 4
        async with cache.read("a", rank=0) as lease:
            assert verify(lease, prompt, 0) == [0, 1, 2, 3]
        await nothing_held(cache)


async def test_where_windows_move_back_the_chunks_have_what_the_shorter_prefix_needs():
    """The end of a prefix needs what its middle does not: a chunk that came may be read anew then."""
    prompt = make_prompt(6, layout=WINDOWS)
    backend = Scripted(MemoryBackend())
    await seed(backend, prompt)
    async with open_cache(backend) as cache:
        await fill(cache, make_prompt(4, layout=WINDOWS))  # so memory has the windows of 4 chunks
        gone = object_keys(prompt, chunks=[4])[0]
        backend.load_answers[gone] = OSError("injected")
        prefetch = cache.prefetch(prompt, request_id="a")
        async with cache.stream("a") as stream:
            came = [tuple(view is not None for view in chunk.views) async for chunk in stream]
            assert came == [(True, False)] * 4
            assert (stream.result.chunks, stream.result.shortfall) == (4, Shortfall.BACKEND_ERROR)
            assert stream.result == await prefetch.load_done
            there = [tuple(view is not None for view in chunk.views) for chunk in stream]
            assert there == [(True, False)] * 2 + [(True, True)] * 2
            assert verify(stream, prompt) == [0, 1, 2, 3]
        await nothing_held(cache)


async def test_a_stream_is_entered_when_the_lookup_is_done_and_not_before():
    gate = GatedBackend(MemoryBackend(), "lookup")
    await seed(gate, PROMPT)
    async with open_cache(gate) as cache:
        cache.prefetch(PROMPT, request_id="a")
        entering = asyncio.ensure_future(entered(cache.stream("a")))
        await gate.reached("lookup")
        await asyncio.sleep(0.1)
        assert not entering.done()
        gate.release()
        stream = await entering
        assert len(await arrivals(stream, PROMPT)) == 8
        stream.release()
        await nothing_held(cache)


async def entered(stream):
    return await stream


async def test_a_stream_that_is_given_up_while_it_waits_may_be_gone_on_with():
    async with open_cache(await slow(), load_timeout_seconds=1000.0) as cache:
        cache.prefetch(PROMPT, request_id="a")
        async with cache.stream("a") as stream:
            for count in (1, 2, 5):
                waiting = asyncio.create_task(stream.arrived(count))
                await asyncio.sleep(0.3)
                waiting.cancel()
                await asyncio.wait([waiting])
            assert len(await arrivals(stream, PROMPT)) == 8
        await nothing_held(cache)


async def test_an_undone_stream_can_be_entered_again():
    async with open_cache(await slow(), load_timeout_seconds=1000.0) as cache:
        cache.prefetch(PROMPT, request_id="a")
        stream = await cache.stream("a")
        assert await stream.arrived(2)
        stream.undo()
        async with cache.stream("a") as again:
            assert len(await arrivals(again, PROMPT)) == 8
        await nothing_held(cache)


async def test_a_stream_that_is_released_while_it_is_waited_for_says_so():
    async with open_cache(await slow(), load_timeout_seconds=1000.0) as cache:
        cache.prefetch(PROMPT, request_id="a")
        stream = await cache.stream("a")
        waiting = asyncio.create_task(stream.arrived(2))
        await asyncio.sleep(0.1)
        stream.release()
        with pytest.raises(RuntimeError, match="released"):
            await waiting
        await nothing_held(cache)


async def test_closing_ends_streams_that_wait():
    config = CacheConfig(l1_bytes=64 * PAGE, l2=[], load_timeout_seconds=1000.0)
    async with make_cache(config, [await slow()]) as cache:
        cache.prefetch(PROMPT, request_id="a")
        stream = await cache.stream("a")
        assert await stream.arrived(1)
        waiting = asyncio.create_task(stream.arrived(8))
        await asyncio.sleep(0.1)
        await cache.close()
        with pytest.raises(CacheClosedError):
            await waiting
        stream.release()


async def test_what_cannot_be_streamed_is_refused():
    async with open_cache(await slow(), load_timeout_seconds=1000.0) as cache:
        with pytest.raises(UnknownRequestError):
            await cache.stream("nobody")
        cache.prefetch(PROMPT, request_id="a")
        for wrong in ({"rank": 1}, {"reader": 1}):
            with pytest.raises(ValueError, match=r"rank|reader"):
                await cache.stream("a", **wrong)
        async with cache.stream("a"):
            with pytest.raises(ReadConflictError):
                await cache.stream("a")


async def test_a_stream_that_nobody_leaves_is_swept_and_keeps_its_memory():
    async with open_cache(await slow(), load_timeout_seconds=1000.0, lease_ttl_seconds=10.0) as cache:
        cache.prefetch(PROMPT, request_id="a")
        async with cache.stream("a") as stream:
            assert len(await arrivals(stream, PROMPT)) == 8
            await asyncio.sleep(30)
            assert (await cache.stats()).requests == 0
            assert verify(stream, PROMPT) == list(range(8))
        await nothing_held(cache)


async def test_a_prompt_that_is_not_cached_streams_nothing():
    async with open_cache() as cache:
        cache.prefetch(PROMPT, request_id="a")
        async with cache.stream("a") as stream:
            assert [chunk async for chunk in stream] == []
            assert (stream.result.chunks, stream.result.shortfall) == (0, None)
        await nothing_held(cache)


async def test_the_requests_that_wait_for_the_same_chunks_get_them_as_they_come():
    """One of them streams, and the other two, longer and shorter, have what they were promised all the same."""
    async with open_cache(await slow(), load_timeout_seconds=1000.0) as cache:
        short, long = cache.prefetch(make_prompt(4), request_id="s"), cache.prefetch(PROMPT, request_id="l")
        async with cache.stream("l") as stream:
            assert (await short.load_done).chunks == 4
            assert len(stream) < 8
            assert len(await arrivals(stream, PROMPT)) == 8
        assert (await long.load_done).chunks == 8
        async with cache.read("s") as lease:
            assert verify(lease, PROMPT) == [0, 1, 2, 3]
        await nothing_held(cache)
