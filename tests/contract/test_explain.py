"""Why a prompt is not cached: span by span, and in short with every lookup."""

import asyncio

import pytest

from async_cache import ChunkState, Elsewhere, Missed, ObjectGroup, Removal, Span
from async_cache.l2 import LoadOutcome
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import FailingBackend, GatedBackend
from async_cache.testing.backends import flip_bit

from .support import (
    LAYOUT,
    TWO_RANKS,
    Recorder,
    Scripted,
    advance,
    assert_nothing_held,
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
    write,
)

L1, L2, LOADING, WRITING, REMOVED, UNKNOWN = ChunkState


async def spans(cache, prompt):
    """The spans of an explanation, which cover the prompt."""
    explanation = await cache.explain(prompt)
    assert (explanation.chunks, explanation.tokens) == (len(prompt), len(prompt) * prompt.layout.chunk_tokens)
    ends = [span.start_chunk + span.chunks for span in explanation.spans]
    assert [span.start_chunk for span in explanation.spans] == [0, *ends][:-1]
    assert [0, *ends][-1] == len(prompt)
    return list(explanation.spans)


async def missed(cache, prompt):
    """What is told of the first missing chunk: the same in three ways."""
    told = (await cache.lookup(prompt)).missed
    prefetch = cache.prefetch(prompt)
    assert (await prefetch.lookup_done).missed == told
    assert (await cache.explain(prompt)).missed == told
    await prefetch.load_done
    await cache.end_request(prefetch.request_id)
    return told


# Where chunks are.


async def test_what_is_all_there_lacks_nothing():
    prompt = make_prompt(3)
    async with open_cache() as cache:
        await fill(cache, prompt)
        assert await spans(cache, prompt) == [Span(0, 3, L1)]
        assert await missed(cache, prompt) is None


async def test_a_prompt_without_a_chunk_has_no_spans():
    async with open_cache() as cache:
        explanation = await cache.explain(LAYOUT.prompt([1, 2, 3]))
        assert (explanation.chunks, explanation.spans, explanation.missed) == (0, (), None)


async def test_what_was_never_seen_is_unknown():
    prompt = make_prompt(3)
    async with open_cache(MemoryBackend()) as cache:
        assert await spans(cache, prompt) == [Span(0, 3, UNKNOWN)]
        assert await missed(cache, prompt) == Missed(UNKNOWN)


async def test_spans_tell_what_is_in_memory_and_in_which_backend():
    prompt = make_prompt(6)
    near, far = MemoryBackend("near"), MemoryBackend("far")
    await seed(near, prompt, chunks=[2])
    await seed(far, prompt, chunks=[2, 3, 4])
    async with open_cache(near, far) as cache:
        await fill(cache, prompt, chunks=[0, 1])
        assert await spans(cache, prompt) == [
            Span(0, 2, L1),
            Span(2, 1, L2, "near"),
            Span(3, 2, L2, "far"),
            Span(5, 1, UNKNOWN),
        ]


async def test_a_chunk_of_which_a_rank_is_missing_is_not_there():
    prompt = make_prompt(2, layout=TWO_RANKS)
    backend = MemoryBackend()
    await seed(backend, prompt, chunks=[0])
    async with open_cache(backend) as cache:
        await fill(cache, prompt, ranks=[0], chunks=[1])
        assert await spans(cache, prompt) == [Span(0, 1, L2, "memory"), Span(1, 1, UNKNOWN)]


async def test_ranks_in_memory_and_in_a_backend_make_a_chunk_together():
    prompt = make_prompt(1, layout=TWO_RANKS)
    backend = MemoryBackend()
    await seed(backend, prompt, ranks=[1])
    async with open_cache(backend) as cache:
        await fill(cache, prompt, ranks=[0])
        assert await spans(cache, prompt) == [Span(0, 1, L2, "memory")]


async def test_what_is_on_its_way_is_loading():
    prompt = make_prompt(3)
    inner = MemoryBackend()
    await seed(inner, prompt)
    gate = GatedBackend(inner, "load")
    async with open_cache(gate) as cache:
        prefetch = cache.prefetch(LAYOUT.prompt(make_tokens(2)))
        await prefetch.lookup_done
        await gate.reached("load")
        assert await spans(cache, prompt) == [Span(0, 2, LOADING, "memory"), Span(2, 1, L2, "memory")]
        gate.release("load")
        await prefetch.load_done
        assert await spans(cache, prompt) == [Span(0, 2, L1), Span(2, 1, L2, "memory")]


async def test_what_a_writer_fills_is_being_written():
    prompt = make_prompt(3)
    async with open_cache() as cache:
        async with cache.store(prompt) as writer:
            write(writer[0], prompt)
            writer[0].commit()
            await cache.explain(prompt)  # a commit over a wire is done
            assert await spans(cache, prompt) == [Span(0, 1, L1), Span(1, 2, WRITING)]
            assert await missed(cache, prompt) == Missed(WRITING)
        assert await spans(cache, prompt) == [Span(0, 1, L1), Span(1, 2, UNKNOWN)]
        assert await missed(cache, prompt) == Missed(UNKNOWN)


async def test_a_window_may_end_before_what_is_gone():
    layout = make_layout(ObjectGroup((16,), "uint8"), ObjectGroup((16,), "uint8", window_chunks=1))
    prompt = make_prompt(3, layout=layout)
    backend = MemoryBackend()
    await seed(backend, prompt, groups=[0])
    await seed(backend, prompt, groups=[1], chunks=[2])
    async with open_cache(backend) as cache:
        assert await spans(cache, prompt) == [Span(0, 3, L2, "memory")]
        assert await read_back(cache, prompt) == 3
        assert await spans(cache, prompt) == [Span(0, 3, L1)]


async def test_explaining_leases_pins_and_loads_nothing():
    prompt = make_prompt(3)
    recorder = Recorder(MemoryBackend())
    await seed(recorder, prompt)
    async with open_cache(recorder) as cache:
        before = await cache.stats()
        assert await spans(cache, prompt) == [Span(0, 3, L2, "memory")]
        assert await cache.stats() == before
        assert recorder.calls["load"] == 0
        await assert_nothing_held(cache, recorder)


async def test_to_be_explained_is_no_use_in_a_backend_that_keeps_an_order_of_use():
    first, second, third = make_prompt(1), make_prompt(1, 2), make_prompt(1, 3)
    async with open_cache(MemoryBackend("small", capacity_bytes=32)) as cache:
        await fill_l2(cache, first)
        await fill_l2(cache, second)
        assert await spans(cache, first) == [Span(0, 1, L2, "small")]
        await fill_l2(cache, third)
        assert [(await spans(cache, prompt))[0].state for prompt in (first, second, third)] == [REMOVED, L2, L2]


async def test_a_backend_that_cannot_be_asked_may_have_what_is_missing():
    prompt = make_prompt(2)
    backend = FailingBackend(MemoryBackend(), "lookup")
    async with open_cache(backend) as cache:
        await fill(cache, prompt, chunks=[0])
        assert await spans(cache, prompt) == [Span(0, 1, L1), Span(1, 1, UNKNOWN)]


# Why they are not there.


async def test_what_had_to_make_room_left_for_capacity():
    first, second = make_prompt(2), make_prompt(2, 2)
    async with open_cache(pages=3) as cache:
        await fill(cache, first)
        await advance(10)
        await fill(cache, second)  # the tail of the first makes room
        await advance(2.5)
        assert await spans(cache, first) == [
            Span(0, 1, L1),
            Span(1, 1, REMOVED, None, 2.5, Removal.CAPACITY),
        ]
        assert await missed(cache, first) == Missed(REMOVED, Removal.CAPACITY)


async def test_what_a_backend_has_evicted_left_it_for_capacity():
    first, second = make_prompt(2), make_prompt(2, 2)
    async with open_cache(MemoryBackend("small", capacity_bytes=48)) as cache:
        await fill_l2(cache, first)
        await fill_l2(cache, second)
        await advance(2)
        head, tail = await spans(cache, first)
        assert (head.state, head.backend) == (L2, "small")
        assert (tail.state, tail.backend, tail.removal) == (REMOVED, "small", Removal.CAPACITY)
        assert await missed(cache, first) == Missed(REMOVED, Removal.CAPACITY)


async def test_what_was_deleted_says_so():
    prompt = make_prompt(2)
    async with open_cache(MemoryBackend()) as cache:
        await fill(cache, prompt)
        await cache.flush()
        await cache.delete(prompt)
        await advance(3)
        (span,) = await spans(cache, prompt)
        assert (span.state, span.removal, span.backend) == (REMOVED, Removal.DELETED, "memory")
        assert span.seconds_ago == pytest.approx(3, abs=0.2)
        assert await missed(cache, prompt) == Missed(REMOVED, Removal.DELETED)


async def test_what_is_being_deleted_is_gone_already():
    prompt = make_prompt(2)
    inner = MemoryBackend()
    await seed(inner, prompt)
    gate = GatedBackend(inner, "delete")
    async with open_cache(gate) as cache:
        deleting = asyncio.create_task(cache.delete(prompt))
        await gate.reached("delete")
        assert await spans(cache, prompt) == [Span(0, 2, REMOVED, None, 0.0, Removal.DELETED)]
        assert await missed(cache, prompt) == Missed(REMOVED, Removal.DELETED)
        gate.release("delete")
        assert (await deleting).chunks == 2


async def test_what_was_cleared_was_deleted():
    prompt = make_prompt(2)
    async with open_cache(MemoryBackend()) as cache:
        await fill(cache, prompt)
        await cache.clear("all")
        assert await missed(cache, prompt) == Missed(REMOVED, Removal.DELETED)


async def test_what_fails_its_checksum_is_damaged():
    prompt = make_prompt(2)
    backend = MemoryBackend()
    await seed(backend, prompt)
    flip_bit(backend, object_keys(prompt)[1])
    async with open_cache(backend) as cache:
        assert await read_back(cache, prompt) == 1
        head, tail = await spans(cache, prompt)
        assert head == Span(0, 1, L1)
        assert (tail.state, tail.backend, tail.removal) == (REMOVED, "memory", Removal.DAMAGED)
        assert await missed(cache, prompt) == Missed(REMOVED, Removal.DAMAGED)


async def test_what_vanished_from_a_backend_that_tells_nothing_is_lost():
    prompt = make_prompt(2)
    inner = MemoryBackend()
    await seed(inner, prompt)
    backend = Scripted(inner)
    backend.load_answers[object_keys(prompt)[1]] = LoadOutcome.GONE
    async with open_cache(backend) as cache:
        assert await read_back(cache, prompt) == 1
        await inner.delete(object_keys(prompt)[1:])
        assert await missed(cache, prompt) == Missed(REMOVED, Removal.LOST)


async def test_what_has_expired_in_a_backend_has_expired():
    prompt = make_prompt(1)
    backend = MemoryBackend()
    backend.ttl_seconds = 60.0  # as a Valkey with `ttl=60`
    async with open_cache(backend) as cache:
        await fill_l2(cache, prompt)
        await advance(50)
        assert await spans(cache, prompt) == [Span(0, 1, L2, "memory")]
        await advance(15)
        del backend._objects[object_keys(prompt)[0]]
        backend._index.clear(1)  # by itself, and nobody is told
        (span,) = await spans(cache, prompt)
        assert (span.state, span.backend, span.removal) == (REMOVED, "memory", Removal.EXPIRED)
        assert span.seconds_ago == pytest.approx(5, abs=0.2)
        assert await missed(cache, prompt) == Missed(REMOVED, Removal.EXPIRED)


@pytest.mark.parametrize("removal", Removal)
async def test_a_backend_may_tell_any_reason(removal):
    prompt = make_prompt(1)
    backend = MemoryBackend()
    async with open_cache(backend) as cache:
        await fill_l2(cache, prompt)
        for key in object_keys(prompt):
            backend._remove(key, removal)
        assert await missed(cache, prompt) == Missed(REMOVED, removal)


async def test_what_is_stored_again_is_there_again_and_may_leave_for_another_reason():
    prompt = make_prompt(1)
    backend = MemoryBackend()
    async with open_cache(backend) as cache:
        await fill(cache, prompt)
        await cache.flush()
        await cache.delete(prompt)
        await fill_l2(cache, prompt)
        assert await missed(cache, prompt) is None
        await cache.clear("l1")
        flip_bit(backend, object_keys(prompt)[0])
        await read_back(cache, prompt)
        assert await missed(cache, prompt) == Missed(REMOVED, Removal.DAMAGED)


async def test_chunks_that_left_long_after_each_other_are_two_spans():
    prompt = make_prompt(4)
    async with open_cache() as cache:
        await fill(cache, prompt)
        await cache.delete(LAYOUT.prompt(make_tokens(2)))
        await advance(5)
        await cache.delete(prompt)
        assert await spans(cache, prompt) == [
            Span(0, 2, REMOVED, None, 5.0, Removal.DELETED),
            Span(2, 2, REMOVED, None, 0.0, Removal.DELETED),
        ]


@pytest.mark.parametrize(("explain_chunks", "remembered"), [(1, 1), (3, 3), (8, 8), (9, 8)])
async def test_no_more_is_remembered_than_the_setting_says(explain_chunks, remembered):
    prompt = make_prompt(8)
    async with open_cache(explain_chunks=explain_chunks) as cache:
        await fill(cache, prompt)
        await cache.delete(prompt)
        states = [span.state for span in await spans(cache, prompt) for _ in range(span.chunks)]
        assert states == [UNKNOWN] * (8 - remembered) + [REMOVED] * remembered


# Where a prompt leaves what is stored.


async def test_a_prompt_that_leaves_a_stored_conversation_says_so():
    tokens = make_tokens(4)
    stored, other = LAYOUT.prompt(tokens), LAYOUT.prompt(tokens[:8] + [7] * 8)
    async with open_cache() as cache:
        await fill(cache, stored)
        assert await missed(cache, other) == Missed(UNKNOWN, None, diverges=True)
        assert await missed(cache, LAYOUT.prompt(tokens + [1] * 4)) == Missed(UNKNOWN)  # it goes on where that ends
        assert await missed(cache, make_prompt(2, 9)) == Missed(UNKNOWN)  # it has nothing in common


async def test_what_left_diverges_only_if_something_else_was_there_too():
    tokens = make_tokens(4)
    stored, other = LAYOUT.prompt(tokens), LAYOUT.prompt(tokens[:8] + [7] * 8)
    async with open_cache() as cache:
        await fill(cache, stored)
        await cache.delete(stored)
        await fill(cache, stored, chunks=[0, 1])
        assert await missed(cache, stored) == Missed(REMOVED, Removal.DELETED, diverges=False)
        await fill(cache, other)
        assert await missed(cache, stored) == Missed(REMOVED, Removal.DELETED, diverges=True)


async def test_what_was_evicted_diverges_from_what_was_built_beside_it_later():
    tokens = make_tokens(4)
    first, second = LAYOUT.prompt(tokens), LAYOUT.prompt(tokens[:8] + [7] * 8)
    async with open_cache(pages=6) as cache:
        await fill(cache, first)
        await fill(cache, second)
        await fill(cache, make_prompt(2, 9))  # the tail of the first makes room
        assert await spans(cache, first) == [Span(0, 2, L1), Span(2, 2, REMOVED, None, 0.0, Removal.CAPACITY)]
        assert await missed(cache, first) == Missed(REMOVED, Removal.CAPACITY, diverges=True)


async def test_it_diverges_from_what_is_only_in_a_backend():
    tokens = make_tokens(3)
    stored, other = LAYOUT.prompt(tokens), LAYOUT.prompt(tokens[:8] + [7] * 4)
    async with open_cache(MemoryBackend()) as cache:
        await fill_l2(cache, stored)
        assert await missed(cache, other) == Missed(UNKNOWN, None, diverges=True)


async def test_it_diverges_from_what_was_loaded_after_a_restart():
    tokens = make_tokens(3)
    stored, other = LAYOUT.prompt(tokens), LAYOUT.prompt(tokens[:8] + [7] * 4)
    backend = MemoryBackend()
    await seed(backend, stored)
    async with open_cache(backend) as cache:
        assert await missed(cache, other) == Missed(UNKNOWN)  # nobody has said yet what belongs to what
        assert await read_back(cache, stored) == 3
        assert await missed(cache, other) == Missed(UNKNOWN, None, diverges=True)


async def test_a_prefetch_that_skips_knows_what_lies_before_it():
    tokens = make_tokens(2)
    stored, other = LAYOUT.prompt(tokens), LAYOUT.prompt(tokens[:4] + [7] * 4)
    async with open_cache() as cache:
        await fill(cache, stored)
        prefetch = cache.prefetch(other, skip_tokens=4)
        hits = await prefetch.lookup_done
        assert (hits.start_chunk, hits.found_chunks, hits.missed) == (1, 0, Missed(UNKNOWN, None, diverges=True))
        await cache.end_request(prefetch.request_id)


# The same tokens elsewhere.


LORA = Elsewhere("model", "", "lora", ("adapter",), 3)
ELSEWHERE = {
    "revision": make_layout(revision="r2"),
    "chunk_tokens": make_layout(chunk_tokens=2),
    "world_size": TWO_RANKS,
    "dtype": make_layout(ObjectGroup((16,), "int8")),
    "shape": make_layout(ObjectGroup((8,), "uint8")),
    "window_chunks": make_layout(ObjectGroup((16,), "uint8", window_chunks=2)),
    "groups": make_layout(ObjectGroup((16,), "uint8"), ObjectGroup((16,), "uint8")),
}


@pytest.mark.parametrize("differs", ELSEWHERE)
async def test_the_same_tokens_in_another_layout_are_told_with_what_differs(differs):
    layout = ELSEWHERE[differs]
    tokens = make_tokens(3)
    async with open_cache(MemoryBackend()) as cache:
        await fill(cache, layout.prompt(tokens))
        explanation = await cache.explain(LAYOUT.prompt(tokens + [1] * 4))
        chunks = len(layout.prompt(tokens))
        assert explanation.elsewhere == (Elsewhere("model", layout.revision, "", (differs,), chunks),)
        assert [span.state for span in explanation.spans] == [UNKNOWN]


@pytest.mark.parametrize("place", ["l1", "l2"])
async def test_the_same_tokens_with_another_adapter_are_told_wherever_they_are(place):
    tokens = make_tokens(3)
    async with open_cache(MemoryBackend()) as cache:
        await (fill_l2 if place == "l2" else fill)(cache, LAYOUT.prompt(tokens, adapter="lora"))
        assert (await cache.explain(LAYOUT.prompt(tokens))).elsewhere == (
            Elsewhere("model", "", "lora", ("adapter",), 3),
        )
        assert (await cache.explain(LAYOUT.prompt(tokens, adapter="lora"))).elsewhere == ()


async def test_other_tokens_another_model_and_another_salt_are_not_elsewhere():
    tokens = make_tokens(3)
    async with open_cache(MemoryBackend()) as cache:
        await fill(cache, LAYOUT.prompt(tokens, salt="b"))
        await fill(cache, make_layout(model="another").prompt(tokens, salt="a"))
        await fill(cache, make_layout(revision="r2").prompt(make_tokens(3, 5), salt="a"))
        assert (await cache.explain(LAYOUT.prompt(tokens, salt="a"))).elsewhere == ()


async def test_an_engines_block_hashes_are_found_elsewhere_as_well():
    blocks = [bytes([n]) * 16 for n in range(6)]
    async with open_cache() as cache:
        await fill(cache, LAYOUT.prompt_from_hashes(blocks, 2, adapter="lora"))
        explanation = await cache.explain(LAYOUT.prompt_from_hashes(blocks, 2))
        assert explanation.elsewhere == (LORA,)
        assert (await cache.explain(LAYOUT.prompt(make_tokens(3)))).elsewhere == ()


async def test_an_engines_digests_are_found_elsewhere_as_well():
    digests = [bytes([n]) * 16 for n in range(3)]
    async with open_cache() as cache:
        await fill(cache, LAYOUT.prompt_from_digests(digests, adapter="lora"))
        explanation = await cache.explain(LAYOUT.prompt_from_digests(digests))
        assert explanation.elsewhere == (LORA,)


async def test_what_is_loaded_after_a_restart_is_known_elsewhere():
    tokens = make_tokens(3)
    stored = LAYOUT.prompt(tokens, adapter="lora")
    backend = MemoryBackend()
    await seed(backend, stored)
    async with open_cache(backend) as cache:
        assert await read_back(cache, stored) == 3
        assert (await cache.explain(LAYOUT.prompt(tokens))).elsewhere == (
            Elsewhere("model", "", "lora", ("adapter",), 3),
        )


async def test_what_is_no_prompt_is_refused():
    async with open_cache() as cache:
        with pytest.raises(TypeError):
            await cache.explain("a prompt")
    await settle()
