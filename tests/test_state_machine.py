"""Hypothesis drives the cache as no caller would: in whatever order things are done, its records agree after each step,
every byte that is read is right, and in the end nothing is held. SOAK=1 in the environment runs many more examples.
"""

import asyncio
import hashlib
import os
from collections.abc import Coroutine
from typing import Any

import async_solipsism
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from async_cache import (
    AsyncCache,
    BackendError,
    CacheConfig,
    ModelLayout,
    ObjectGroup,
    Prefetch,
    Prompt,
    ReadLease,
    RequestError,
    Writer,
    WriterClosedError,
)
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import GatedBackend

SOAK = "SOAK" in os.environ
PAGE = 4096
PLAIN = ModelLayout("plain", (ObjectGroup((24,), "uint8"),), chunk_tokens=2)
SPLIT = ModelLayout(
    "split",
    (ObjectGroup((16,), "uint8"), ObjectGroup((8,), "uint8", window_chunks=2)),
    chunk_tokens=2,
    world_size=2,
)


def make_prompts(layout: ModelLayout) -> list[Prompt]:
    """Two that share a head, one of them longer, and one apart."""
    head = list(range(6))
    return [layout.prompt(tokens) for tokens in (head, head + [7, 7, 8, 8], head + [9, 9], list(range(50, 62)))]


PROMPTS = make_prompts(PLAIN) + make_prompts(SPLIT)
prompts = st.sampled_from(PROMPTS)
request_ids = st.sampled_from(["a", "b", "c", "d"])
verbs = st.sampled_from(["lookup", "load", "store"])


def content(prompt: Prompt, index: int, rank: int, group: int) -> bytes:
    identity = prompt.chunk_hashes[index] + bytes((rank, group))
    return hashlib.shake_128(identity).digest(prompt.layout.groups[group].size_bytes)


class Moody(GatedBackend):
    """Waits at gates, and fails the next call if it is told to."""

    failing = False

    async def before(self, *call: Any) -> None:
        await super().before(*call)
        if self.failing:
            self.failing = False
            raise OSError("injected")


class CacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = async_solipsism.EventLoop()
        self.memories = [MemoryBackend("first", capacity_bytes=400), MemoryBackend("second")]
        self.backends = [Moody(memory) for memory in self.memories]
        config = CacheConfig(l1_bytes=10 * PAGE, load_timeout_seconds=20, store_timeout_seconds=20)
        self.cache = AsyncCache(config, backends=self.backends)
        self.do(self.cache.open())
        self.prefetches: dict[str, tuple[Prefetch, Prompt]] = {}
        self.leases: list[tuple[ReadLease, Prompt, int]] = []
        self.writers: list[tuple[Writer, Prompt, int]] = []

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    # What callers do.

    @rule(prompt=prompts, request_id=request_ids, skip=st.integers(0, 5), rank=st.sampled_from([None, 0, 1]))
    def prefetch(self, prompt: Prompt, request_id: str, skip: int, rank: int | None) -> None:
        ranks = None if rank is None or rank >= prompt.layout.world_size else [rank]

        async def begin() -> None:
            try:
                begun = self.cache.prefetch(prompt, request_id=request_id, skip_tokens=skip, ranks=ranks)
            except RequestError:
                return
            self.prefetches[request_id] = begun, prompt

        self.do(begin())

    @rule(prompt=prompts, seconds=st.sampled_from([0, 0.5, 3]))
    def prefetch_with_deadline(self, prompt: Prompt, seconds: float) -> None:
        async def run() -> None:
            prefetch = self.cache.prefetch(prompt, deadline_seconds=seconds)
            result = await prefetch.load_done
            assert result.seconds <= seconds + 0.01
            assert result.chunks <= (await prefetch.lookup_done).chunks
            await self.cache.end_request(prefetch.request_id)

        self.do(run())

    @rule(request_id=request_ids, query=st.sampled_from(["query_lookup_hits", "query_status"]))
    def query(self, request_id: str, query: str) -> None:
        async def ask() -> None:
            try:
                async with asyncio.timeout(0.1):
                    await getattr(self.cache, query)(request_id)
            except (RequestError, TimeoutError):
                return

        self.do(ask())

    @rule(request_id=request_ids, rank=st.integers(0, 1))
    def enter(self, request_id: str, rank: int) -> None:
        async def enter() -> None:
            try:
                async with asyncio.timeout(0.1):
                    lease = await self.cache.read(request_id, rank=rank)
            except (RequestError, TimeoutError, ValueError):
                return
            self.leases.append((lease, self.prefetches[request_id][1], rank))

        self.do(enter())

    @rule(which=st.integers(0, 3))
    def leave(self, which: int) -> None:
        if which < len(self.leases):
            lease, prompt, rank = self.leases.pop(which)
            self.check(lease, prompt, rank)
            lease.release()

    @rule(prompt=prompts, rank=st.integers(0, 1), committed=st.integers(0, 6), close=st.booleans())
    def store(self, prompt: Prompt, rank: int, committed: int, close: bool) -> None:
        rank = min(rank, prompt.layout.world_size - 1)

        async def write() -> None:
            writer = await self.cache.store(prompt, rank=rank)
            for chunk in writer.chunks[:committed]:
                self.fill(chunk, prompt, rank)
            if close:
                writer.close()
            else:
                self.writers.append((writer, prompt, rank))

        self.do(write())

    @rule(which=st.integers(0, 2), close=st.booleans())
    def go_on_writing(self, which: int, close: bool) -> None:
        if which < len(self.writers):
            writer, prompt, rank = self.writers.pop(which)
            try:
                for chunk in writer:
                    self.fill(chunk, prompt, rank)
            except WriterClosedError:
                return
            if close:
                writer.close()

    @rule(request_id=request_ids)
    def end(self, request_id: str) -> None:
        self.do(self.cache.end_request(request_id))

    @rule(request_id=request_ids)
    def cancel(self, request_id: str) -> None:
        async def cancel() -> None:
            if request_id in self.prefetches:
                self.prefetches[request_id][0].cancel()

        self.do(cancel())

    @rule(request_id=request_ids)
    def renew(self, request_id: str) -> None:
        async def renew() -> None:
            try:
                await self.cache.renew(request_id)
            except RequestError:
                return

        self.do(renew())

    @rule(prompt=prompts)
    def delete(self, prompt: Prompt) -> None:
        self.do(self.or_fail(self.cache.delete(prompt)))

    @rule(tier=st.sampled_from(["l1", "all"]))
    def clear(self, tier: Any) -> None:
        self.do(self.or_fail(self.cache.clear(tier)))

    @rule(prompt=prompts)
    def count(self, prompt: Prompt) -> None:
        assert 0 <= self.do(self.cache.lookup(prompt)).chunks <= len(prompt)

    @rule()
    def flush(self) -> None:
        self.do(self.cache.flush(1))

    # What happens to it.

    @rule(seconds=st.sampled_from([0.001, 1, 25, 70, 400]))
    def pass_time(self, seconds: float) -> None:
        self.do(asyncio.sleep(seconds))

    @rule(which=st.integers(0, 1), verb=verbs)
    def hold(self, which: int, verb: Any) -> None:
        self.backends[which].hold(verb)

    @rule(which=st.integers(0, 1))
    def open_gates(self, which: int) -> None:
        self.backends[which].release()
        self.do(asyncio.sleep(0))

    @rule(which=st.integers(0, 1))
    def fail_next(self, which: int) -> None:
        self.backends[which].failing = True

    @rule(which=st.integers(0, 1), prompt=prompts, bit=st.integers(0, 63))
    def damage(self, which: int, prompt: Prompt, bit: int) -> None:
        for key in prompt.layout.object_keys([(prompt.chunk_hashes[0], prompt.layout.full_mask)]):
            self.memories[which].damage(key, bit)

    # What must be true.

    @invariant()
    def records_agree(self) -> None:
        self.cache.check_integrity()
        for lease in self.leases:
            self.check(*lease)

    def check(self, lease: ReadLease, prompt: Prompt, rank: int) -> None:
        for chunk in lease:
            for group, view in enumerate(chunk.views):
                assert view is None or bytes(view) == content(prompt, chunk.index, rank, group)

    def fill(self, chunk: Any, prompt: Prompt, rank: int) -> None:
        if not chunk.committed:
            for group, view in enumerate(chunk.views):
                view[:] = content(prompt, chunk.index, rank, group)
            chunk.commit()

    async def or_fail(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await work
        except BackendError:
            return

    def teardown(self) -> None:
        self.do(self.end_all())
        self.loop.close()

    async def end_all(self) -> None:
        for backend in self.backends:
            backend.failing = False
            backend.release()
        for request_id in self.prefetches:
            await self.cache.end_request(request_id)
        for lease, _, _ in self.leases:
            lease.release()
        for writer, _, _ in self.writers:
            writer.close()
        await asyncio.sleep(1000)
        await self.cache.flush()
        stats = await self.cache.stats()
        assert (stats.requests, stats.leases, stats.leased_bytes) == (0, 0, 0)
        assert (stats.reserved_bytes, stats.quarantined_bytes, stats.writebacks_pending) == (0, 0, 0)
        assert [memory.pins for memory in self.memories] == [0, 0]
        await self.cache.clear("all")
        assert (await self.cache.stats()).l1_used_bytes == 0
        await self.cache.close()


TestCacheMachine = pytest.mark.filterwarnings("ignore::async_solipsism.ResolutionWarning")(CacheMachine.TestCase)
TestCacheMachine.settings = settings(
    max_examples=20_000 if SOAK else 100,
    stateful_step_count=50,
    deadline=None,
    derandomize=not SOAK,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink) if SOAK else (Phase.generate,),
)
