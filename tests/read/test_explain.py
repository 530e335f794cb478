"""Explanations against a model of the cache, for very long prompts, and for every reason, made for real."""

import asyncio
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import async_solipsism
import pytest
from contract.support import (
    LAYOUT,
    PAGE,
    fill,
    fill_l2,
    make_layout,
    make_prompt,
    make_tokens,
    object_keys,
    open_cache,
    read_back,
)
from faults.disk import place_of
from hypothesis import given, settings
from hypothesis import strategies as st

from async_cache import AsyncCache, CacheConfig, ChunkState, Missed, Removal
from async_cache.l2.filesystem.backend import FileSystemBackend
from async_cache.l2.filesystem.files import PAGE_BYTES, Puncher
from async_cache.l2.memory import MemoryBackend
from async_cache.read.explain import Spans

CHUNKS = 6
TOKENS = {name: make_tokens(CHUNKS // 2) + make_tokens(CHUNKS // 2, number) for number, name in enumerate("abc", 2)}
PROMPTS = {name: LAYOUT.prompt(tokens) for name, tokens in TOKENS.items()}  # with the first half in common
BACKENDS = ("near", "far")

names, chunk_sets = st.sampled_from("abc"), st.sets(st.integers(0, CHUNKS - 1), min_size=1)
STEPS = st.one_of(
    st.tuples(st.just("store"), names, chunk_sets),
    st.tuples(st.just("delete"), names, st.integers(1, CHUNKS)),
    st.tuples(st.just("clear"), st.sampled_from(["l1", "all"])),
    st.tuples(st.just("leave"), names, st.integers(0, CHUNKS - 1), st.sampled_from(BACKENDS), st.sampled_from(Removal)),
    st.tuples(st.just("wait"), st.integers(1, 5)),
)


class Model:
    """What is where, and how it left: what an explanation has to say."""

    def __init__(self):
        self.now = 0.0
        self.l1: set[bytes] = set()
        self.l2: dict[str, set[bytes]] = {name: set() for name in BACKENDS}
        self.left: dict[bytes, tuple[str | None, float, Removal]] = {}

    def store(self, hashes):
        new = [h for h in hashes if h not in self.l1]
        self.l1.update(new)
        for there in self.l2.values():
            there.update(new)

    def leave(self, chunk_hash, backend, removal):
        there = self.l2[backend] if backend is not None else self.l1
        if chunk_hash in there:
            there.discard(chunk_hash)
            self.left[chunk_hash] = (backend, self.now, removal)

    def tell(self, chunk_hash):
        if chunk_hash in self.l1:
            return (ChunkState.L1, None, None, None)
        for name, there in self.l2.items():
            if chunk_hash in there:
                return (ChunkState.L2, name, None, None)
        if chunk_hash in self.left:
            backend, then, removal = self.left[chunk_hash]
            return (ChunkState.REMOVED, backend, self.now - then, removal)
        return (ChunkState.UNKNOWN, None, None, None)


async def take(step, cache, backends, model):
    match step:
        case ("store", name, chunks):
            await fill(cache, PROMPTS[name], chunks=chunks)
            await cache.flush()
            model.store([PROMPTS[name].chunk_hashes[n] for n in sorted(chunks)])
        case ("delete", name, length):
            await cache.delete(LAYOUT.prompt(TOKENS[name][: length * LAYOUT.chunk_tokens]))
            for chunk_hash in PROMPTS[name].chunk_hashes[:length]:
                for place in (None, *BACKENDS):
                    model.leave(chunk_hash, place, Removal.DELETED)
        case ("clear", tier):
            await cache.clear(tier)
            for place in (None,) if tier == "l1" else (None, *BACKENDS):
                for chunk_hash in list(model.l1 if place is None else model.l2[place]):
                    model.leave(chunk_hash, place, Removal.DELETED)
        case ("leave", name, number, backend, removal):
            (key,) = object_keys(PROMPTS[name], chunks=[number])
            if key in backends[backend]._objects:
                backends[backend]._remove(key, removal)
                model.leave(key.chunk_hash, backend, removal)
        case ("wait", seconds):
            await asyncio.sleep(seconds)
            model.now += seconds


def in_order(told):
    """What is said of a chunk, but how long ago, and which backend was the last of those that delete side by side."""
    state, backend, _, removal = told
    return state, None if removal is Removal.DELETED else backend, removal


async def check(steps):
    backends = {name: MemoryBackend(name) for name in BACKENDS}
    model = Model()
    loop = asyncio.get_running_loop()
    async with AsyncCache(CacheConfig(l1_bytes=64 * PAGE, l2=[]), backends=backends.values()) as cache:
        for step in steps:
            await take(step, cache, backends, model)
            model.now = loop.time()
            for prompt in PROMPTS.values():
                explanation = await cache.explain(prompt)
                wanted = [model.tell(chunk_hash) for chunk_hash in prompt.chunk_hashes]
                told = [
                    (span.state, span.backend, span.seconds_ago, span.removal)
                    for span in explanation.spans
                    for _ in range(span.chunks)
                ]
                assert list(map(in_order, told)) == list(map(in_order, wanted))
                for (_, _, seconds, _), (_, _, ago, _) in zip(told, wanted, strict=True):
                    assert seconds is ago is None or abs(seconds - ago) <= 1.2
                first = next((n for n, (state, *_) in enumerate(wanted) if state.value not in ("l1", "l2")), None)
                missed = (await cache.lookup(prompt)).missed
                assert missed == explanation.missed
                if first is None:
                    assert missed is None
                else:
                    assert (missed.state, missed.removal) == (wanted[first][0], wanted[first][3])


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=12))
def test_an_explanation_is_what_a_model_of_the_cache_says(steps):
    with asyncio.Runner(loop_factory=async_solipsism.EventLoop) as runner:
        runner.run(check(steps))


TOLD = st.sampled_from(
    [
        (ChunkState.L1, None, None, None),
        (ChunkState.L2, "a", None, None),
        (ChunkState.L2, "b", None, None),
        *((ChunkState.REMOVED, "a", seconds, Removal.CAPACITY) for seconds in (1.0, 1.5, 2.5, 9.0)),
    ]
)


@given(st.lists(TOLD, max_size=30))
def test_spans_cover_all_chunks_each_with_its_own(told):
    spans = Spans()
    for begin in range(0, len(told), 3):
        spans.add(told[begin : begin + 3])
    made = spans.end()
    assert sum(span.chunks for span in made) == len(told)
    at = 0
    for span in made:
        assert span.start_chunk == at and span.chunks > 0
        for state, backend, seconds, removal in told[at : at + span.chunks]:
            assert (state, backend, removal) == (span.state, span.backend, span.removal)
            assert seconds is span.seconds_ago or abs(seconds - span.seconds_ago) <= 1.0
        at += span.chunks
    for one, other in pairwise(made):
        same = (one.state, one.backend, one.removal) == (other.state, other.backend, other.removal)
        assert not same or abs(one.seconds_ago - other.seconds_ago) > 1.0


# Every reason, made for real, by the store that is used by default.


async def test_what_is_damaged_lost_deleted_or_evicted_on_a_disk_says_so(tmp_path: Path):
    prompt = make_prompt(4)
    backend = FileSystemBackend(tmp_path, capacity_bytes=48 * PAGE_BYTES)
    async with open_cache(backend, pages=256) as cache:
        await fill_l2(cache, prompt)
        damaged, lost = (place_of(tmp_path, key) for key in object_keys(prompt, chunks=[2, 3]))
        damaged.write(bytes(damaged.size_bytes))
        assert await read_back(cache, prompt) == 2
        assert (await cache.lookup(prompt)).missed == Missed(ChunkState.REMOVED, Removal.DAMAGED)
        await cache.clear("l1")
        last = cache.prefetch(prompt, skip_tokens=12)
        with lost.path.open("r+b") as segment:
            Puncher().clear(segment.fileno(), lost.offset, lost.offset + PAGE_BYTES)
        await last.load_done
        assert (await cache.explain(prompt)).spans[-1].removal is Removal.LOST
        await cache.delete(LAYOUT.prompt(make_tokens(1)))
        assert (await cache.lookup(prompt)).missed == Missed(ChunkState.REMOVED, Removal.DELETED)
        for number in (2, 3, 4):
            await fill_l2(cache, make_prompt(20, number))
        evicted = (await cache.explain(prompt)).spans[1]
        assert (evicted.removal, evicted.backend) == (Removal.CAPACITY, backend.name)


# Long prompts.


async def test_a_very_long_prompt_is_explained_in_slices():
    """The loop has its turn every thousand chunks or so: of 100,000, about 100 times."""
    prompt = make_layout(chunk_tokens=1).prompt(range(100_000))
    async with open_cache(MemoryBackend()) as cache:
        turns = 0

        def turn():
            nonlocal turns
            turns += 1
            asyncio.get_running_loop().call_soon(turn)

        explaining = asyncio.create_task(cache.explain(prompt))
        asyncio.get_running_loop().call_soon(turn)
        assert (await explaining).spans[0].chunks == 100_000
        assert turns >= 90


@pytest.mark.parametrize("there", ["nowhere", "l1", "l2"])
async def test_4096_chunks_take_little(there):
    """Counted, as time says nothing on a busy machine; the times are in `docs/explain.md`."""
    prompt = make_layout(chunk_tokens=1).prompt(range(4096))
    async with open_cache(MemoryBackend(), pages=4200) as cache:
        if there != "nowhere":
            await (fill if there == "l1" else fill_l2)(cache, prompt)
        calls = Counter()
        sys.setprofile(lambda frame, event, _: calls.update((event,)))
        await cache.explain(prompt)
        sys.setprofile(None)
        assert calls["call"] + calls["c_call"] < 6 * 4096


def test_the_document_runs_as_it_stands():
    text = (Path(__file__).parents[2] / "docs" / "explain.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    names: dict[str, Any] = {}
    exec(code, names)
    asyncio.run(names["why"](list(range(64))))
