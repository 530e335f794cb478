"""How much of a prompt is cached: ranks, groups, windows, skips, tenants, tiers, several backends."""

import pytest

from async_cache import ObjectGroup, Shortfall
from async_cache.l2.memory import MemoryBackend
from async_cache.testing.backends import GatedBackend

from .support import (
    CHUNK_TOKENS,
    LAYOUT,
    OBJECT_BYTES,
    SMALL,
    TWO_RANKS,
    Recorder,
    assert_nothing_held,
    count_hits,
    fill,
    fill_l2,
    make_layout,
    make_prompt,
    make_tokens,
    object_keys,
    open_cache,
    read_back,
    seed,
    settle,
    verify,
)

WINDOWED = make_layout(SMALL, ObjectGroup((8,), "float32", window_chunks=1))


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_chunk_that_one_rank_lacks_is_no_hit_whichever_rank_it_is(rank):
    prompt = make_prompt(3, layout=TWO_RANKS)
    async with open_cache() as cache:
        await fill(cache, prompt, ranks=[rank])
        assert await count_hits(cache, prompt) == 0
        await fill(cache, prompt, ranks=[1 - rank], chunks=[0, 1])
        assert await count_hits(cache, prompt) == 2
        await fill(cache, prompt)
        assert await read_back(cache, prompt) == 3


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_chunk_that_one_rank_lacks_in_l2_is_no_hit(rank):
    prompt = make_prompt(3, layout=TWO_RANKS)
    backend = MemoryBackend()
    await seed(backend, prompt, ranks=[rank])
    await seed(backend, prompt, ranks=[1 - rank], chunks=[0, 2])
    async with open_cache(backend) as cache:
        assert await read_back(cache, prompt) == 1


async def test_ranks_of_a_chunk_may_lie_in_different_tiers():
    prompt = make_prompt(3, layout=TWO_RANKS)
    backend = MemoryBackend()
    await seed(backend, prompt, ranks=[0])
    async with open_cache(backend) as cache:
        await fill(cache, prompt, ranks=[1])
        assert await read_back(cache, prompt) == 3


async def test_a_chunk_that_lacks_one_group_is_no_hit():
    layout = make_layout(SMALL, ObjectGroup((4, 2), "float16"))
    prompt = make_prompt(3, layout=layout)
    backend = MemoryBackend()
    await seed(backend, prompt, groups=[0])
    await seed(backend, prompt, groups=[1], chunks=[0, 1])
    async with open_cache(backend) as cache:
        assert await read_back(cache, prompt) == 2


async def test_a_group_that_only_some_ranks_hold_is_asked_only_of_them():
    layout = make_layout(SMALL, ObjectGroup((3,), "int64", ranks=(1,)), world_size=2)
    prompt = make_prompt(2, layout=layout)
    recorder = Recorder(MemoryBackend())
    async with open_cache(recorder) as cache:
        await fill_l2(cache, prompt)
        assert await read_back(cache, prompt) == 2
        assert set(recorder.stored) == set(recorder.looked_up) == set(object_keys(prompt))


async def test_a_gap_ends_the_prefix():
    prompt = make_prompt(5)
    async with open_cache() as cache:
        await fill(cache, prompt, chunks=[0, 1, 3, 4])
        hits = await cache.prefetch(prompt).lookup_done
        assert (hits.chunks, hits.found_chunks, hits.shortfall) == (2, 2, None)


async def test_a_windowed_group_needs_only_the_last_chunks():
    prompt = make_prompt(6, layout=WINDOWED)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt, groups=[0])
    await seed(recorder, prompt, groups=[1], chunks=[5])
    async with open_cache(recorder) as cache:
        prefetch = cache.prefetch(prompt, request_id="a")
        hits = await prefetch.lookup_done
        assert (hits.chunks, hits.l2_chunks) == (6, 6)
        assert hits.load_bytes == 6 * OBJECT_BYTES + 32
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == list(range(6))
            assert [chunk.views[1] is None for chunk in lease] == [True] * 5 + [False]
        assert sum(recorder.loaded.values()) == 7


async def test_of_the_lengths_that_windows_allow_the_largest_is_taken():
    prompt = make_prompt(8, layout=WINDOWED)
    backend = MemoryBackend()
    await seed(backend, prompt, groups=[0])
    await seed(backend, prompt, groups=[1], chunks=[2, 5])
    async with open_cache(backend) as cache:
        assert await read_back(cache, prompt) == 6
        assert await read_back(cache, make_prompt(5, layout=WINDOWED)) == 3
        assert await read_back(cache, make_prompt(2, layout=WINDOWED)) == 0


async def test_a_wider_window_needs_as_many_chunks_without_a_gap():
    layout = make_layout(SMALL, ObjectGroup((8,), "uint8", window_chunks=2))
    prompt = make_prompt(7, layout=layout)
    backend = MemoryBackend()
    await seed(backend, prompt, groups=[0])
    await seed(backend, prompt, groups=[1], chunks=[0, 2, 3, 6])
    async with open_cache(backend) as cache:
        assert await read_back(cache, prompt) == 4
        assert await read_back(cache, make_prompt(3, layout=layout)) == 1


async def test_skipped_chunks_are_neither_looked_up_nor_counted():
    prompt = make_prompt(6)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt, chunks=range(2, 6))
    async with open_cache(recorder) as cache:
        assert await count_hits(cache, prompt) == 0
        recorder.looked_up.clear()
        prefetch = cache.prefetch(prompt, skip_tokens=2 * CHUNK_TOKENS, request_id="a")
        for counts in (await prefetch.lookup_done, await prefetch.load_done):
            assert (counts.start_chunk, counts.chunks, counts.l2_chunks) == (2, 4, 4)
            assert counts.tokens == 4 * CHUNK_TOKENS
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == [2, 3, 4, 5]
        assert set(recorder.looked_up) == set(object_keys(prompt, range(2, 6)))


async def test_only_whole_chunks_are_skipped():
    prompt = make_prompt(4)
    async with open_cache() as cache:
        await fill(cache, prompt)
        for skip, start in ((0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (16, 4)):
            result = await cache.prefetch(prompt, skip_tokens=skip).load_done
            assert (result.start_chunk, result.chunks) == (start, 4 - start)


async def test_a_window_that_reaches_into_the_skipped_part_is_held_by_the_engine():
    layout = make_layout(SMALL, ObjectGroup((8,), "uint8", window_chunks=3))
    prompt = make_prompt(4, layout=layout)
    backend = MemoryBackend()
    await seed(backend, prompt, chunks=[2, 3])
    async with open_cache(backend) as cache:
        assert await read_back(cache, prompt) == 0
        assert await read_back(cache, prompt, skip_tokens=2 * CHUNK_TOKENS) == 2


async def test_salts_and_adapters_never_meet():
    backend = MemoryBackend()
    options = [{}, {"salt": "a"}, {"salt": "b"}, {"adapter": "a"}, {"salt": "a", "adapter": "b"}]
    async with open_cache(backend) as cache:
        for number, option in enumerate(options):
            for other in options[number:]:
                assert await count_hits(cache, make_prompt(2, **other)) == 0
            await fill(cache, make_prompt(2, **option), version=0)
            await cache.flush()
        await cache.clear(tier="l1")
        for option in options:
            assert await read_back(cache, make_prompt(2, **option)) == 2


@pytest.mark.parametrize(
    "other",
    [
        make_layout(model="other"),
        make_layout(revision="2"),
        make_layout(world_size=2),
        make_layout(ObjectGroup((16,), "int8")),
        make_layout(ObjectGroup((4, 4), "uint8")),
        make_layout(chunk_tokens=2),
    ],
    ids=["model", "revision", "world_size", "dtype", "shape", "chunk_tokens"],
)
async def test_layouts_never_meet(other):
    async with open_cache(MemoryBackend()) as cache:
        await fill(cache, make_prompt(2))
        assert await count_hits(cache, make_prompt(2, layout=other)) == 0
        await fill_l2(cache, make_prompt(2))
        assert await count_hits(cache, make_prompt(2, layout=other)) == 0


async def test_another_image_is_another_prompt_from_its_chunk_on():
    first = make_prompt(3, media=[(5, b"one image")])
    second = make_prompt(3, media=[(5, b"another image")])
    async with open_cache() as cache:
        await fill(cache, first)
        assert await count_hits(cache, first) == 3
        assert await count_hits(cache, second) == 1


async def test_prompts_from_an_engines_hashes_are_stored_and_found():
    blocks = [bytes([number]) * 32 for number in range(6)]
    prompt = LAYOUT.prompt_from_hashes(blocks, 2)
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, prompt)
        assert await read_back(cache, prompt) == 3
        assert await count_hits(cache, LAYOUT.prompt_from_hashes(blocks, 4)) == 0
        assert await count_hits(cache, LAYOUT.prompt_from_hashes(blocks, 2, salt="x")) == 0


async def test_a_run_of_an_engines_digests_is_found_wherever_it_begins():
    digests = [bytes([number]) * 32 for number in range(6)]
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, LAYOUT.prompt_from_digests(digests[:4]))
        assert await read_back(cache, LAYOUT.prompt_from_digests(digests[2:])) == 2
        assert await count_hits(cache, LAYOUT.prompt_from_digests(digests[1:])) == 3
        assert await count_hits(cache, LAYOUT.prompt_from_digests(digests, salt="x")) == 0


async def test_a_tail_shorter_than_a_chunk_is_not_cached():
    prompt = LAYOUT.prompt(make_tokens(2) + [1, 2, 3])
    async with open_cache() as cache:
        await fill(cache, prompt)
        hits = await cache.prefetch(prompt).lookup_done
        assert (hits.chunks, hits.tokens) == (2, 2 * CHUNK_TOKENS)


async def test_l2_is_asked_only_for_what_l1_lacks_at_the_end():
    prompt = make_prompt(6)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        assert await read_back(cache, make_prompt(2)) == 2
        recorder.looked_up.clear()
        recorder.loaded.clear()
        hits = await cache.prefetch(prompt, request_id="a").lookup_done
        assert (hits.l1_chunks, hits.l2_chunks) == (2, 4)
        await cache.query_status("a")
        rest = object_keys(prompt, range(2, 6))
        assert set(recorder.looked_up) == set(recorder.loaded) == set(rest)
        assert set(recorder.loaded.values()) == {1}


async def test_l2_is_asked_only_for_what_l1_lacks_at_the_head():
    prompt = make_prompt(5)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        await fill(cache, prompt, chunks=[1, 3, 4])
        await cache.flush()
        recorder.looked_up.clear()
        hits = await cache.prefetch(prompt, request_id="a").lookup_done
        assert (hits.chunks, hits.l1_chunks, hits.l2_chunks) == (5, 3, 2)
        async with cache.read("a") as lease:
            assert verify(lease, prompt) == list(range(5))
        assert set(recorder.looked_up) == set(recorder.loaded) == set(object_keys(prompt, [0, 2]))


async def test_the_count_alone_leases_loads_and_pins_nothing():
    prompt = make_prompt(6)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        await read_back(cache, make_prompt(2))
        recorder.loaded.clear()
        hits = await cache.lookup(prompt)
        assert (hits.chunks, hits.tokens, hits.l1_chunks, hits.l2_chunks) == (6, 6 * CHUNK_TOKENS, 2, 4)
        assert hits.found_chunks == 6
        assert not recorder.loaded
        await assert_nothing_held(cache, recorder)


async def test_the_count_alone_needs_no_l2_when_l1_has_all():
    recorder = Recorder(GatedBackend(MemoryBackend(), "lookup"))
    async with open_cache(recorder) as cache:
        await fill(cache, make_prompt(3))
        await settle()
        recorder.calls.clear()
        assert await count_hits(cache, make_prompt(3)) == 3
        assert recorder.calls["lookup"] == 0


async def test_several_backends_serve_one_prefix_together():
    fast, slow = Recorder(MemoryBackend(name="fast")), Recorder(MemoryBackend(name="slow"))
    prompt = make_prompt(6)
    await seed(fast, prompt, chunks=[0, 3, 5])
    await seed(slow, prompt, chunks=[1, 2, 4])
    async with open_cache(fast, slow) as cache:
        assert await read_back(cache, prompt) == 6
        await assert_nothing_held(cache, fast, slow)
        assert set(fast.loaded) == set(object_keys(prompt, [0, 3, 5]))
        assert set(slow.loaded) == set(object_keys(prompt, [1, 2, 4]))


async def test_what_several_backends_hold_is_loaded_once_from_the_fastest():
    fast, slow = Recorder(MemoryBackend(name="fast")), Recorder(MemoryBackend(name="slow"))
    prompt = make_prompt(4)
    await seed(fast, prompt)
    await seed(slow, prompt)
    async with open_cache(fast, slow) as cache:
        assert await read_back(cache, prompt) == 4
        assert set(fast.loaded.values()) == {1}
        assert not slow.loaded
        await assert_nothing_held(cache, fast, slow)


async def test_ranks_to_load_here_are_loaded_and_the_others_only_checked():
    prompt = make_prompt(3, layout=TWO_RANKS)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt, ranks=[0])
    await seed(recorder, prompt, ranks=[1], chunks=[0, 1])
    async with open_cache(recorder) as cache:
        prefetch = cache.prefetch(prompt, request_id="a", ranks=(0,))
        hits = await prefetch.lookup_done
        assert (hits.chunks, hits.load_bytes) == (2, 2 * OBJECT_BYTES)
        async with cache.read("a", rank=0) as lease:
            assert verify(lease, prompt, 0) == [0, 1]
        assert set(recorder.loaded) == set(object_keys(prompt, [0, 1], ranks=[0]))
        await assert_nothing_held(cache, recorder)


async def test_only_the_ranks_to_load_here_read_and_the_request_ends_with_them():
    prompt = make_prompt(2, layout=TWO_RANKS)
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, prompt)
        cache.prefetch(prompt, request_id="a", ranks=(1,))
        with pytest.raises(ValueError, match="rank"):
            async with cache.read("a", rank=0):
                pass
        assert (await cache.stats()).requests == 1
        async with cache.read("a", rank=1) as lease:
            assert verify(lease, prompt, 1) == [0, 1]
        await assert_nothing_held(cache)


async def test_a_promise_that_is_whole_has_no_shortfall():
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, make_prompt(3))
        hits = await cache.prefetch(make_prompt(5)).lookup_done
        assert (hits.chunks, hits.found_chunks, hits.shortfall) == (3, 3, None)


async def test_the_prefix_that_ends_at_a_silent_backend_says_so():
    backend = GatedBackend(MemoryBackend())
    await seed(backend, make_prompt(3))
    async with open_cache(backend) as cache:
        backend.hold("lookup")
        await fill(cache, make_prompt(1))
        hits = await cache.prefetch(make_prompt(3)).lookup_done
        assert (hits.chunks, hits.l1_chunks, hits.shortfall) == (1, 1, Shortfall.BACKEND_ERROR)
        backend.release("lookup")
