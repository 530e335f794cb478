"""What the contract tests share: small layouts, bytes that tell whose they are, a recording backend, and the check
that nothing is held."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from inspect import isawaitable
from typing import Any

from async_cache import AsyncCache, CacheConfig, ModelLayout, ObjectGroup, Shortfall
from async_cache.l2 import Backend
from async_cache.l2.backend import LoadOutcome
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import Prompt
from async_cache.values import BackendUsage

from .served import serve

KINDS = ("embedded", "mapped", "framed", "bound")
SEE_MEMORY = ("embedded", "mapped")
kind = "embedded"
"""What `open_cache` opens, set for each test."""

PAGE = 4096
CHUNK_TOKENS = 4
OBJECT_BYTES = 16
SMALL = ObjectGroup((OBJECT_BYTES,), "uint8")


def make_layout(*groups: ObjectGroup, model: str = "model", **options: Any) -> ModelLayout:
    """A layout of small objects: of one chunk and rank, L1 holds one page."""
    return ModelLayout(model, groups or (SMALL,), **{"chunk_tokens": CHUNK_TOKENS} | options)


LAYOUT = make_layout()
TWO_RANKS = make_layout(world_size=2)


def make_tokens(chunks: int, number: int = 1) -> list[int]:
    """Whole chunks of tokens; a shorter one of the same number is a prefix, another number has nothing in common."""
    return list(range(number * 100_000, number * 100_000 + chunks * CHUNK_TOKENS))


def make_prompt(chunks: int, number: int = 1, layout: ModelLayout = LAYOUT, **options: Any) -> Prompt:
    return layout.prompt(make_tokens(chunks, number), **options)


def pattern(prompt: Prompt, index: int, rank: int = 0, group: int = 0, version: int = 0) -> bytes:
    """The bytes of one object: no other object has them."""
    identity = prompt.chunk_hashes[index] + bytes([rank, group, version])
    return hashlib.shake_128(identity).digest(prompt.layout.groups[group].size_bytes)


def write(chunk: Any, prompt: Prompt, rank: int = 0, version: int = 0) -> None:
    """Fill a chunk of a writer; not committed."""
    for group, view in enumerate(chunk.views):
        if view is not None:
            view[:] = pattern(prompt, chunk.index, rank, group, version)


async def fill(
    cache: AsyncCache,
    prompt: Prompt,
    *,
    ranks: Iterable[int] | None = None,
    chunks: Iterable[int] | None = None,
    version: int = 0,
) -> None:
    """Store chunks of a prompt, all of them by default, through writers."""
    wanted = range(len(prompt)) if chunks is None else set(chunks)
    for rank in range(prompt.layout.world_size) if ranks is None else ranks:
        async with cache.store(prompt, rank=rank) as writer:
            for chunk in writer:
                if chunk.index in wanted:
                    write(chunk, prompt, rank, version)
                    chunk.commit()


async def fill_l2(cache: AsyncCache, *prompts: Prompt) -> None:
    """Store prompts, and leave them only in L2."""
    for prompt in prompts:
        await fill(cache, prompt)
        flushed = await cache.flush()
        assert (flushed.pending, flushed.dropped) == (0, 0)
    await cache.clear(tier="l1")
    assert (await cache.stats()).l1_chunks == 0


def object_keys(
    prompt: Prompt,
    chunks: Iterable[int] | None = None,
    ranks: Iterable[int] | None = None,
    groups: Iterable[int] | None = None,
) -> list[ObjectKey]:
    layout = prompt.layout
    return [
        ObjectKey(prompt.chunk_hashes[index], rank, group)
        for index in (range(len(prompt)) if chunks is None else chunks)
        for rank in (range(layout.world_size) if ranks is None else ranks)
        for group in (range(len(layout.groups)) if groups is None else groups)
        if layout.groups[group].ranks is None or rank in layout.groups[group].ranks
    ]


async def seed(backend: Backend, prompt: Prompt, **which: Any) -> None:
    """Put objects into a backend behind the cache's back, before the cache opens it. `which`: see `object_keys`."""
    index_of = {digest: index for index, digest in enumerate(prompt.chunk_hashes)}
    keys = object_keys(prompt, **which)
    bodies = [memoryview(bytearray(pattern(prompt, index_of[k.chunk_hash], k.rank, k.group))) for k in keys]
    await backend.open()
    assert await backend.store(keys, bodies) == [True] * len(keys)
    await backend.close()


def verify(lease: Any, prompt: Prompt, rank: int = 0, version: int = 0) -> list[int]:
    """Check all bytes of a read, and return the indices of its chunks."""
    for chunk in lease:
        assert len(chunk.views) == len(prompt.layout.groups)
        for group, view in enumerate(chunk.views):
            if view is not None:
                assert bytes(view) == pattern(prompt, chunk.index, rank, group, version)
    return [chunk.index for chunk in lease]


async def read_back(cache: AsyncCache, prompt: Prompt, **options: Any) -> int:
    """Prefetch, read and check every rank; the number of chunks."""
    prefetch = cache.prefetch(prompt, **options)
    result = await prefetch.load_done
    indices = list(range(result.start_chunk, result.start_chunk + result.chunks))
    for rank in range(prompt.layout.world_size):
        for reader in range(prompt.layout.readers_per_rank):
            async with cache.read(prefetch.request_id, rank=rank, reader=reader) as lease:
                assert verify(lease, prompt, rank) == indices
    return result.chunks


async def assert_fails_alone(cache: AsyncCache, bad: Prompt, sound: Prompt) -> None:
    """What cannot be read of one prompt is no reason to leave its backend alone, however often it is asked for."""
    for _ in range(2 * CacheConfig().breaker_failures):
        prefetch = cache.prefetch(bad)
        result = await prefetch.load_done
        assert (result.chunks, result.shortfall) == (0, Shortfall.BACKEND_ERROR)
        await cache.end_request(prefetch.request_id)
    assert {backend.breaker for backend in await cache.backends()} == {"closed"}
    assert await read_back(cache, sound) == len(sound)


async def count_hits(cache: AsyncCache, prompt: Prompt) -> int:
    return (await cache.lookup(prompt)).chunks


async def settle() -> None:
    """Let everything happen that waits for nothing but its turn."""
    await asyncio.sleep(0.01)


async def advance(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def assert_nothing_held(cache: AsyncCache, *recorders: "Recorder") -> None:
    stats = await cache.stats()
    held = {
        name: getattr(stats, name)
        for name in ("requests", "leases", "leased_bytes", "reserved_bytes", "quarantined_bytes")
    }
    assert held == dict.fromkeys(held, 0)
    for recorder in recorders:
        assert recorder.pinned == {}
    cache.check_integrity()


async def attempt(call: Callable[[], Any]) -> Any:
    """Make a call, and wait for it if it can be waited for: an error may come at either time."""
    outcome = call()
    return await outcome if isawaitable(outcome) else outcome


async def outcomes(*waits: Awaitable[Any]) -> list[Any]:
    """What each wait returned or raised."""
    return await asyncio.gather(*waits, return_exceptions=True)


@asynccontextmanager
async def open_cache(*backends: Backend, pages: int = 64, **settings: Any) -> AsyncIterator[AsyncCache]:
    """A cache with `pages` of L1, each for one small object; without backends it has no L2."""
    async with make_cache(CacheConfig(l1_bytes=pages * PAGE, l2=[], **settings), backends=list(backends)) as cache:
        yield cache
        cache.check_integrity()


def make_cache(config: CacheConfig, backends: Sequence[Backend]) -> Any:
    """A cache of the kind that the test is run for, to be entered."""
    return AsyncCache(config, backends) if kind == "embedded" else serve(config, backends, kind)


class Recorder(Backend):
    """Counts what passes through: calls by verb, objects by key, pins not given back, bytes in flight."""

    def __init__(self, inner: Backend) -> None:
        self.inner, self.name = inner, inner.name
        self.calls: Counter[str] = Counter()
        self.looked_up: Counter[ObjectKey] = Counter()
        self.loaded: Counter[ObjectKey] = Counter()
        self.stored: Counter[ObjectKey] = Counter()
        self.pins: Counter[ObjectKey] = Counter()
        self.pins_taken = 0
        self.loads_cancelled = 0
        self.storing_bytes = self.most_storing_bytes = 0

    @property
    def pinned(self) -> dict[ObjectKey, int]:
        return {key: count for key, count in self.pins.items() if count}

    async def open(self) -> None:
        self.calls["open"] += 1
        await self.inner.open()

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        self.calls["lookup"] += 1
        self.looked_up.update(keys)
        found = await self.inner.lookup(keys)
        held = [key for key, present in zip(keys, found, strict=True) if present]
        self.pins.update(held)
        self.pins_taken += len(held)
        return found

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        self.calls["unpin"] += 1
        self.pins.subtract(keys)
        self.inner.unpin(keys)

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        self.calls["load"] += 1
        self.loaded.update(keys)
        try:
            return await self.inner.load(keys, buffers)
        except asyncio.CancelledError:
            self.loads_cancelled += 1
            raise

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        self.calls["store"] += 1
        self.stored.update(keys)
        size = sum(len(buffer) for buffer in buffers)
        self.storing_bytes += size
        self.most_storing_bytes = max(self.most_storing_bytes, self.storing_bytes)
        try:
            return await self.inner.store(keys, buffers)
        finally:
            self.storing_bytes -= size

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        self.calls["delete"] += 1
        return await self.inner.delete(keys)

    def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        return self.inner.keys()

    def usage(self) -> BackendUsage:
        return self.inner.usage()

    async def close(self) -> None:
        self.calls["close"] += 1
        await self.inner.close()


class Scripted(Recorder):
    """Answers loads of the given objects as told, with an outcome or an exception, and passes the rest on."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.load_answers: dict[ObjectKey, LoadOutcome | Exception] = {}
        self.lookup_error: Exception | None = None
        self.store_answer: bool | Exception = True

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        if self.lookup_error is not None:
            self.calls["lookup"] += 1
            self.looked_up.update(keys)
            raise self.lookup_error
        return await super().lookup(keys)

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        results = await super().load(keys, buffers)
        for number, key in enumerate(keys):
            answer = self.load_answers.get(key, results[number])
            if isinstance(answer, Exception):
                raise answer
            results[number] = answer
        return results

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        if self.store_answer is True:
            return await super().store(keys, buffers)
        self.calls["store"] += 1
        if isinstance(self.store_answer, Exception):
            raise self.store_answer
        return [False] * len(keys)
