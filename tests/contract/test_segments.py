"""Segments, and requests for several prompts at once: of each a prefix is promised, and they live and end together."""

import asyncio
from dataclasses import replace
from itertools import permutations

import pytest

from async_cache import (
    Deleted,
    LookupHits,
    Prefetch,
    ReadConflictError,
    RequestConflictError,
    SegmentHits,
    SegmentPrefetch,
    SegmentResult,
    Shortfall,
    UnknownRequestError,
)
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import GatedBackend, ThrottledBackend

from .support import (
    CHUNK_TOKENS,
    LAYOUT,
    PAGE,
    SMALL,
    TWO_RANKS,
    Recorder,
    Scripted,
    assert_nothing_held,
    count_hits,
    fill,
    fill_l2,
    make_layout,
    make_prompt,
    make_tokens,
    object_keys,
    open_cache,
    outcomes,
    pattern,
    seed,
    settle,
)

CONTEXT = [7, 8, 9]
LONG = make_layout(chunk_tokens=20_000)


def make_segment(chunks, number=1, layout=LAYOUT, context=CONTEXT, **options):
    return layout.segment(make_tokens(chunks, number), context=context, **options)


def verify_parts(lease, parts, lengths, rank=0):
    """Check the chunks of a read: which they are, and every byte."""
    places = [(part, index) for part, length in enumerate(lengths) for index in range(length)]
    assert [(chunk.part, chunk.index) for chunk in lease] == places
    for chunk in lease:
        assert bytes(chunk.views[0]) == pattern(parts[chunk.part], chunk.index, rank)


async def get(cache, parts, **options):
    """The hits and the result of a request, after reading all that it has loaded."""
    prefetch = cache.prefetch_segments(parts, **options)
    hits, result = await prefetch.lookup_done, await prefetch.load_done
    assert isinstance(hits, SegmentHits) and isinstance(result, SegmentResult)
    for told in (hits, result):
        assert {told.request_id} == {part.request_id for part in told.parts} == {prefetch.request_id}
        for name in ("chunks", "tokens", "l1_chunks", "l2_chunks"):
            assert getattr(told, name) == sum(getattr(part, name) for part in told.parts)
        assert told.l1_chunks + told.l2_chunks == told.chunks and told.tokens == told.chunks * CHUNK_TOKENS
        assert told.shortfall == next((part.shortfall for part in told.parts if part.shortfall), None)
        assert [part.base_tokens for part in told.parts] == [part.base_tokens for part in parts]
    assert hits.found_chunks == sum(part.found_chunks for part in hits.parts)
    for rank in range(parts[0].layout.world_size):
        async with cache.read(prefetch.request_id, rank=rank) as lease:
            verify_parts(lease, parts, lengths_of(result), rank)
    return hits, result


def lengths_of(told):
    return [part.chunks for part in told.parts]


# Identity.


async def test_a_segment_is_stored_and_found_as_a_prompt_is_and_by_nothing_else():
    segment, backend = make_segment(3), Recorder(MemoryBackend())
    others = [
        make_prompt(3),
        LAYOUT.prompt(CONTEXT + make_tokens(3)),
        make_segment(3, context=[]),
        make_segment(3, context=[*CONTEXT, 0]),
        make_segment(3, salt="a"),
        make_segment(3, adapter="a"),
    ]
    async with open_cache(backend) as cache:
        await fill(cache, segment)
        for _ in ("in memory", "in L2"):
            assert await count_hits(cache, make_segment(3)) == await count_hits(cache, segment) == 3
            assert [await count_hits(cache, other) for other in others] == [0] * len(others)
            assert [(await cache.explain(other)).elsewhere for other in others[:5]] == [()] * 5
            await cache.flush()
            await cache.clear("l1")
        assert await cache.delete(others[0]) == Deleted(0, 0)
        assert await cache.delete(make_segment(3)) == Deleted(3, 0)


async def test_the_same_segment_of_another_adapter_is_told_elsewhere():
    async with open_cache() as cache:
        await fill(cache, make_segment(2))
        (elsewhere,) = (await cache.explain(make_segment(3, adapter="a"))).elsewhere
        assert (elsewhere.chunks, elsewhere.differs) == (2, ("adapter",))


async def test_hits_and_results_of_a_segment_tell_where_its_positions_begin():
    async with open_cache() as cache:
        await fill(cache, make_segment(2))
        assert (await cache.lookup(make_segment(2))).base_tokens == len(CONTEXT)
        prefetch = cache.prefetch(make_segment(2))
        assert (await prefetch.lookup_done).base_tokens == (await prefetch.load_done).base_tokens == len(CONTEXT)
        assert (await cache.lookup(make_prompt(2))).base_tokens == 0


# One request of many parts.


async def test_parts_are_found_in_whatever_order_they_stand():
    parts = make_prompt(2), make_segment(3, 2), make_segment(1, 3)
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, parts[0], parts[2])
        await fill(cache, parts[1])
        for order in permutations(parts):
            hits, result = await get(cache, order)
            assert lengths_of(hits) == lengths_of(result) == [len(part) for part in order]
            assert hits.shortfall is result.shortfall is None
            await cache.clear("l1")
        await assert_nothing_held(cache)


async def test_of_each_part_a_prefix_is_promised_and_of_all_the_sum():
    in_l1, in_l2, half, none = make_segment(2), make_prompt(3, 2), make_segment(4, 3), make_segment(2, 4)
    async with open_cache(ThrottledBackend(MemoryBackend(), latency_seconds=0.1)) as cache:
        await fill_l2(cache, in_l2)
        await fill(cache, in_l1)
        await fill(cache, half, chunks=(0, 1, 3))
        parts = [in_l1, none, in_l2, half]
        counted = await cache.lookup_segments(parts)
        hits, result = await get(cache, parts)
        for told in (counted, hits):
            assert isinstance(told, SegmentHits) and (told.start_chunk, told.missed is not None) == (0, True)
            assert lengths_of(told) == [2, 0, 3, 2]
            assert [part.l2_chunks for part in told.parts] == [0, 0, 3, 0]
            assert [part.found_chunks for part in told.parts] == [2, 0, 3, 2]
            assert [part.missed is not None for part in told.parts] == [False, True, False, True]
            assert [part.load_bytes for part in told.parts] == [0, 0, 3 * SMALL.size_bytes, 0]
            assert told.load_bytes == 3 * SMALL.size_bytes
        assert lengths_of(result) == [2, 0, 3, 2]
        assert result.seconds == pytest.approx(0.2, abs=0.01)
        await assert_nothing_held(cache)


async def test_all_parts_are_looked_up_in_one_call():
    parts = [make_segment(3, number) for number in range(1, 9)]
    backend = Recorder(MemoryBackend())
    async with open_cache(backend) as cache:
        await fill_l2(cache, *parts[::2])
        backend.calls.clear()
        await cache.lookup_segments(parts)
        assert backend.calls["lookup"] == 1
        hits, _ = await get(cache, parts)
        assert (hits.chunks, backend.calls["lookup"], backend.calls["load"]) == (12, 2, 1)
        await assert_nothing_held(cache, backend)


async def test_what_is_all_in_memory_is_known_at_once():
    parts = [make_segment(2, number) for number in (1, 2)]
    async with open_cache(GatedBackend(MemoryBackend())) as cache:
        for part in parts:
            await fill(cache, part)
        prefetch = cache.prefetch_segments(parts)
        assert isinstance(prefetch, SegmentPrefetch) and isinstance(prefetch, Prefetch)
        assert (await prefetch.load_done).l1_chunks == 4
        assert asyncio.get_running_loop().time() == 0


async def test_the_count_comes_before_the_bytes():
    parts = [make_segment(2, number) for number in (1, 2)]
    backend = GatedBackend(MemoryBackend())
    async with open_cache(backend) as cache:
        await fill_l2(cache, *parts)
        backend.hold("load")
        prefetch = cache.prefetch_segments(parts)
        assert lengths_of(await prefetch.lookup_done) == [2, 2]
        await settle()
        assert not prefetch.load_done.done()
        backend.release()
        assert lengths_of(await prefetch.load_done) == [2, 2]


@pytest.mark.parametrize("where", ["L1", "L2"])
async def test_equal_parts_share_memory_and_loads(where):
    segment, head = make_segment(3), make_segment(2)
    backend = Recorder(MemoryBackend())
    async with open_cache(backend) as cache:
        await fill_l2(cache, segment)
        if where == "L1":
            await cache.warm(segment)
        backend.loaded.clear()
        hits, result = await get(cache, [segment, head, make_segment(3)])
        assert lengths_of(hits) == lengths_of(result) == [3, 2, 3]
        loaded = object_keys(segment) if where == "L2" else []
        assert dict(backend.loaded) == dict.fromkeys(loaded, 1)
        assert hits.load_bytes == len(loaded) * SMALL.size_bytes
        assert (await cache.stats()).l1_chunks == 3
        prefetch = cache.prefetch_segments([segment, head])
        await prefetch.load_done
        assert (await cache.stats()).leased_bytes == 3 * PAGE
        await cache.end_request(prefetch.request_id)
        await assert_nothing_held(cache, backend)


async def test_parts_that_begin_alike_share_what_they_have_in_common():
    one, other = LAYOUT.segment([1] * 8 + [2] * 4), LAYOUT.segment([1] * 8 + [3] * 8)
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, one, other)
        hits, result = await get(cache, [other, one, other])
        assert lengths_of(hits) == lengths_of(result) == [4, 3, 4]
        assert (await cache.stats()).l1_chunks == 5


async def test_ranks_of_all_parts_are_read_and_only_those_asked_for_are_loaded():
    parts = [make_segment(2, number, TWO_RANKS) for number in (1, 2)]
    backend = Recorder(MemoryBackend())
    async with open_cache(backend) as cache:
        await fill_l2(cache, *parts)
        prefetch = cache.prefetch_segments(parts, ranks=[1])
        assert lengths_of(await prefetch.load_done) == [2, 2]
        assert set(backend.loaded) == {key for part in parts for key in object_keys(part, ranks=[1])}
        async with cache.read(prefetch.request_id, rank=1) as lease:
            verify_parts(lease, parts, [2, 2], rank=1)
        await assert_nothing_held(cache, backend)
        _, result = await get(cache, parts)
        assert lengths_of(result) == [2, 2]


@pytest.mark.parametrize("where", ["L1", "L2"])
async def test_parts_with_windows_are_served_as_each_of_them_is(where):
    layout = make_layout(SMALL, replace(SMALL, window_chunks=1))
    parts = [make_prompt(3, number, layout) for number in (1, 2)]
    async with open_cache(MemoryBackend()) as cache:
        for part in parts:
            await (fill if where == "L1" else fill_l2)(cache, part)
        prefetch = cache.prefetch_segments([*parts, layout.prompt(make_tokens(2))])
        assert lengths_of(await prefetch.load_done) == [3, 3, 2]
        async with cache.read(prefetch.request_id) as lease:
            assert [chunk.views[1] is None for chunk in lease] == [True, False, False] + [True, True, False] + [
                True,
                False,
            ]
        await assert_nothing_held(cache)


async def test_what_learns_what_is_asked_for_is_told_of_every_part():
    class Learning(MemoryBackend):
        def asked(self, path, tokens, chunk_tokens, origin):
            told.append((list(path), tokens, chunk_tokens, origin.adapter))

    told = []
    backend = Learning()
    backend.learns = True
    parts = [make_segment(3), make_prompt(2, 2), make_segment(1, 3, adapter="a")]
    async with open_cache(backend) as cache:
        await fill(cache, parts[0])
        await get(cache, parts)
    assert told == [(part.chunk_hashes, part.tokens, CHUNK_TOKENS, part.adapter) for part in parts]


async def test_long_parts_are_hashed_when_they_are_asked_for():
    parts = [make_segment(0, 1, LONG), LONG.segment([1] * 40_000), LONG.segment([2] * 60_000, context=[1])]
    async with open_cache() as cache:
        for part in parts[1:]:
            async with cache.store(part) as writer:
                for chunk in writer:
                    chunk.commit()
        again = [LONG.segment([1] * 40_000), LONG.segment([2] * 60_000, context=[1])]
        assert not any(part.hashed for part in again)
        assert lengths_of(await cache.lookup_segments([parts[0], *again])) == [0, 2, 3]
        again = [LONG.segment([1] * 40_000), LONG.segment([2] * 60_000, context=[1])]
        assert lengths_of(await cache.prefetch_segments(again).load_done) == [2, 3]


# Room, and what comes short.


async def test_room_goes_to_earlier_parts_first():
    parts = [make_segment(6, number) for number in (1, 2, 3)]
    backend = Recorder(MemoryBackend())
    async with open_cache(backend, pages=16) as cache:
        for part in parts:
            await fill_l2(cache, part)
        hits, result = await get(cache, parts)
        assert lengths_of(hits) == lengths_of(result) == [6, 6, 0]
        assert [part.found_chunks for part in hits.parts] == [6, 6, 6]
        assert [part.shortfall for part in hits.parts] == [None, None, Shortfall.MEMORY]
        assert hits.shortfall is Shortfall.MEMORY and result.shortfall is None
        await assert_nothing_held(cache, backend)


async def test_a_part_that_is_in_memory_keeps_what_its_own_room_is_not_needed_for():
    first, second, third = (make_segment(6, number) for number in (1, 2, 3))
    async with open_cache(MemoryBackend(), pages=16, prefetch_share=0.25) as cache:
        await fill_l2(cache, first)
        await fill(cache, second)
        await fill(cache, third)
        hits, result = await get(cache, [first, second, third])
        assert lengths_of(hits) == lengths_of(result) == [4, 6, 6]  # loads have a share of 4 pages
        assert [part.shortfall for part in hits.parts] == [Shortfall.MEMORY, None, None]
        await assert_nothing_held(cache)


async def test_a_later_part_gives_its_room_to_an_earlier_one():
    first, second, third = (make_segment(6, number) for number in (1, 2, 3))
    async with open_cache(MemoryBackend(), pages=16) as cache:
        await fill_l2(cache, first)
        await fill(cache, second)
        await fill(cache, third)
        hits, result = await get(cache, [first, second, third])
        assert lengths_of(hits) == lengths_of(result) == [6, 6, 4]
        assert [part.shortfall for part in hits.parts] == [None, None, Shortfall.MEMORY]
        await assert_nothing_held(cache)


@pytest.mark.parametrize("outcome", [LoadOutcome.FAILED, LoadOutcome.GONE, LoadOutcome.CORRUPT])
async def test_what_falls_short_in_the_middle_shortens_its_own_part_only(outcome):
    parts = [make_segment(4, number) for number in (1, 2, 3)]
    backend = Scripted(MemoryBackend())
    for part in parts:
        await seed(backend, part)
    async with open_cache(backend) as cache:
        backend.load_answers = dict.fromkeys(object_keys(parts[1], [1]), outcome)
        hits, result = await get(cache, parts)
        assert (lengths_of(hits), lengths_of(result)) == ([4, 4, 4], [4, 1, 4])
        why = Shortfall.BACKEND_ERROR if outcome is LoadOutcome.FAILED else Shortfall(outcome.name.lower())
        assert [part.shortfall for part in result.parts] == [None, why, None]
        await assert_nothing_held(cache, backend)


async def test_what_several_parts_have_in_common_shortens_them_all():
    common = [1] * CHUNK_TOKENS * 2
    parts = [LAYOUT.segment(common + make_tokens(2, number)) for number in (1, 2)]
    backend = Scripted(MemoryBackend())
    for part in parts:
        await seed(backend, part)
    async with open_cache(backend) as cache:
        backend.load_answers = dict.fromkeys(object_keys(parts[0], [1]), LoadOutcome.GONE)
        _, result = await get(cache, [*parts, make_prompt(1)])
        assert lengths_of(result) == [1, 1, 0]
        assert [part.shortfall for part in result.parts] == [Shortfall.GONE, Shortfall.GONE, None]
        await assert_nothing_held(cache, backend)


async def test_a_lookup_that_fails_says_so_for_each_part_that_might_have_more():
    parts = [make_segment(2, number) for number in (1, 2)]
    backend = Scripted(MemoryBackend())
    async with open_cache(backend) as cache:
        await fill(cache, parts[0])
        await fill(cache, parts[1], chunks=[0])
        backend.lookup_error = OSError("dead")
        hits, _ = await get(cache, parts)
        assert [(part.chunks, part.shortfall) for part in hits.parts] == [(2, None), (1, Shortfall.BACKEND_ERROR)]


async def test_what_is_deleted_while_it_is_looked_up_is_not_promised():
    parts = [make_segment(2, number) for number in (1, 2, 3)]
    backend = Recorder(GatedBackend(MemoryBackend()))
    async with open_cache(backend) as cache:
        await fill_l2(cache, *parts)
        backend.inner.hold("lookup")
        prefetch = cache.prefetch_segments(parts)
        await backend.inner.reached("lookup")
        deleting = asyncio.create_task(cache.delete(parts[1]))
        await settle()
        backend.inner.release()
        assert lengths_of(await prefetch.lookup_done) == [2, 0, 2]
        await deleting
        assert lengths_of(await prefetch.load_done) == [2, 0, 2]
        await cache.end_request(prefetch.request_id)
        await assert_nothing_held(cache, backend)


# One life.


async def test_the_parts_are_claimed_and_read_once_together():
    parts = [make_segment(2, number) for number in (1, 2)]
    async with open_cache() as cache:
        for part in parts:
            await fill(cache, part)
        cache.prefetch_segments(parts, request_id="a")
        hits = await cache.query_lookup_hits("a")
        assert isinstance(hits, SegmentHits) and lengths_of(hits) == [2, 2]
        result = await cache.query_status("a")
        assert isinstance(result, SegmentResult) and lengths_of(result) == [2, 2]
        for query in (cache.query_lookup_hits, cache.query_status):
            with pytest.raises(UnknownRequestError):
                await query("a")
        lease = await cache.read("a")
        verify_parts(lease, parts, [2, 2])
        assert isinstance(lease.result, SegmentResult)
        with pytest.raises(ReadConflictError):
            await cache.read("a")
        lease.release()
        await assert_nothing_held(cache)


async def test_a_request_for_several_prompts_is_read_and_not_streamed():
    async with open_cache() as cache:
        await fill(cache, make_segment(2))
        prefetch = cache.prefetch_segments([make_segment(2)])
        with pytest.raises(ValueError, match="is for several prompts"):
            await cache.stream(prefetch.request_id)
        async with cache.read(prefetch.request_id) as lease:
            verify_parts(lease, [make_segment(2)], [2])
        await assert_nothing_held(cache)


async def test_an_id_is_that_of_the_same_parts_in_the_same_order():
    one, other = make_segment(2), make_segment(2, 2)
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, one, other)
        prefetch = cache.prefetch_segments([one, other], request_id="a")
        assert cache.prefetch_segments([make_segment(2), other], request_id="a") is prefetch
        for parts in ([other, one], [one], [one, other, one], [one, make_segment(1, 2)]):
            with pytest.raises(RequestConflictError):
                await cache.prefetch_segments(parts, request_id="a").load_done
        with pytest.raises(RequestConflictError):
            await cache.prefetch(one, request_id="a").load_done
        cache.prefetch(one, request_id="b")
        with pytest.raises(RequestConflictError):
            await cache.prefetch_segments([one], request_id="b").load_done
        await cache.end_request("b")
        assert lengths_of(await cache.prefetch_segments([one], request_id="b").load_done) == [2]
        for name in "ab":
            await cache.end_request(name)
        await assert_nothing_held(cache)


@pytest.mark.parametrize("verb", ["lookup", "load"])
@pytest.mark.parametrize("how", ["cancel", "end", "deadline"])
async def test_all_parts_end_together(verb, how):
    parts = [make_segment(2, number) for number in (1, 2)]
    backend = Recorder(GatedBackend(MemoryBackend()))
    async with open_cache(backend, lookup_timeout_seconds=50) as cache:
        await fill_l2(cache, *parts)
        await fill(cache, make_segment(1))
        backend.inner.hold(verb)
        prefetch = cache.prefetch_segments(parts, deadline_seconds=1 if how == "deadline" else None)
        await backend.inner.reached(verb)
        if how == "cancel":
            prefetch.cancel()
        elif how == "end":
            await cache.end_request(prefetch.request_id)
        hits, result = await prefetch.lookup_done, await prefetch.load_done
        why = Shortfall.DEADLINE if how == "deadline" else Shortfall.CANCELLED
        assert lengths_of(hits) == ([0, 0] if verb == "lookup" else [2, 2])
        assert lengths_of(result) == ([1, 0] if (how, verb) == ("deadline", "load") else [0, 0])
        assert [part.shortfall for part in result.parts] == [why, why]
        backend.inner.release()
        await cache.end_request(prefetch.request_id)
        await settle()
        await assert_nothing_held(cache, backend)


async def test_what_nobody_claims_is_swept_with_all_parts():
    parts = [make_segment(2, number) for number in (1, 2)]
    async with open_cache(MemoryBackend(), result_ttl_seconds=10) as cache:
        await fill_l2(cache, *parts)
        await cache.prefetch_segments(parts, request_id="a").load_done
        await asyncio.sleep(11)
        assert isinstance((await outcomes(cache.query_status("a")))[0], UnknownRequestError)
        assert (await cache.stats()).swept_results == 1
        await assert_nothing_held(cache)


async def test_counting_parts_holds_nothing():
    parts = [make_segment(2, number) for number in (1, 2)]
    backend = Recorder(MemoryBackend())
    async with open_cache(backend) as cache:
        await fill_l2(cache, *parts)
        assert lengths_of(await cache.lookup_segments(parts)) == [2, 2]
        assert not backend.loaded
        await assert_nothing_held(cache, backend)


# Misuse.


@pytest.mark.parametrize("call", ["prefetch_segments", "lookup_segments"])
async def test_what_can_be_no_request_of_parts_is_refused(call):
    one = make_segment(1)
    refused = [
        ([], ValueError, "1 to 256 parts, not 0"),
        ([one] * 257, ValueError, "1 to 256 parts, not 257"),
        ([one, make_segment(1, salt="a")], ValueError, "have one salt"),
        ([one, make_segment(1, layout=TWO_RANKS)], ValueError, "have one layout"),
        (one, TypeError, "a sequence of prompts, not a Prompt"),
        ([one, "text"], TypeError, "must come from ModelLayout.prompt"),
        (None, TypeError, "a sequence of prompts"),
    ]
    async with open_cache() as cache:
        for parts, error, words in refused:
            with pytest.raises(error, match=words):
                await getattr(cache, call)(parts)
        await assert_nothing_held(cache)


async def test_parts_of_several_adapters_are_loaded_as_those_of_each():
    parts = [make_segment(2, adapter=adapter) for adapter in ("", "a", "b", "a")]
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, *parts[:3])
        _, result = await get(cache, parts)
        assert lengths_of(result) == [2, 2, 2, 2]
        deleted = await cache.delete_model("model", adapter="a")
        assert deleted.chunks == 2
        assert [await count_hits(cache, part) for part in parts] == [2, 0, 2, 0]


async def test_256_parts_are_one_request():
    parts = [make_segment(1, number) for number in range(1, 257)]
    async with open_cache(pages=256) as cache:
        for part in parts[:3]:
            await fill(cache, part)
        hits, _ = await get(cache, parts)
        assert lengths_of(hits) == [1, 1, 1] + [0] * 253
        assert all(isinstance(part, LookupHits) for part in hits.parts)
