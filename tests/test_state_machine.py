"""Hypothesis drives the cache as no caller would: in whatever order things are done, its records agree after each step,
every byte that is read is right, promises are kept, and in the end nothing is held. With SOAK=300 in the environment,
others are tried for so many seconds.
"""

import asyncio
import hashlib
import random
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import async_solipsism
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from soak import SOAK_SECONDS

from async_cache import (
    AsyncCache,
    BackendError,
    BackendState,
    CacheConfig,
    ConfigError,
    LoadResult,
    LookupHits,
    ModelLayout,
    ObjectGroup,
    Prefetch,
    Prompt,
    ReadChunk,
    ReadLease,
    RequestError,
    SegmentHits,
    SegmentResult,
    Shortfall,
    WriteChunk,
    Writer,
    WriterClosedError,
)
from async_cache.l2 import Placement, Placing
from async_cache.l2.memory import MemoryBackend
from async_cache.testing import GatedBackend, ThrottledBackend, Verb, flip_bit

PAGE = 4096
PLAIN = ModelLayout("plain", (ObjectGroup((PAGE + 5,), "uint8"),), chunk_tokens=2, readers_per_rank=2)
SPLIT = ModelLayout(
    "split",
    (ObjectGroup((16,), "uint8"), ObjectGroup((8,), "uint8", window_chunks=2)),
    chunk_tokens=2,
    world_size=2,
)
HEAD = [1, 2, 3, 4, 5, 6]
PROMPTS = [layout.prompt(HEAD + tail) for layout in (PLAIN, SPLIT) for tail in ([7, 8, 9, 10], [11, 12])]
PROMPTS += [PLAIN.segment(HEAD + tail, context=[1, 2]) for tail in ([7, 8], [11, 12])]
ALIKE = [[prompt for prompt in PROMPTS if prompt.layout is layout] for layout in (PLAIN, SPLIT)]

prompts = st.sampled_from(PROMPTS)
parts_of_one = st.one_of([st.lists(st.sampled_from(alike), min_size=1, max_size=4) for alike in ALIKE])
request_ids = st.sampled_from(["a", "b", "c", "d"])
some = st.sampled_from([[0], [1], [0, 1]])  # of the backends


def content(prompt: Prompt, index: int, rank: int, group: int) -> bytes:
    """The bytes of one object: no other object has them."""
    identity = prompt.chunk_hashes[index] + bytes((rank, group))
    return hashlib.shake_128(identity).digest(prompt.layout.groups[group].size_bytes)


class Moody(GatedBackend):
    """Far away; waits at gates, and fails the next call if it is told to."""

    failing = False

    def __init__(self, inner: MemoryBackend, *, stubborn: bool):
        super().__init__(ThrottledBackend(inner, latency_seconds=0.1), stubborn=stubborn)

    async def before(self, *call: Any) -> None:
        await super().before(*call)
        if self.failing:
            self.failing = False
            raise OSError("injected")


@dataclass
class Request:
    """What was asked for, and what was answered so far."""

    prefetch: Prefetch
    parts: list[Prompt]
    start_chunk: int
    hits: LookupHits | None = None
    result: LoadResult | None = None


def each(told: Any) -> Any:
    """What is told of each prompt."""
    return told.parts if isinstance(told, SegmentHits | SegmentResult) else (told,)


class CacheMachine(RuleBasedStateMachine):
    reached: ClassVar[Counter[str]] = Counter()  # what happened at all, over all examples

    def __init__(self) -> None:
        super().__init__()
        self.loop = async_solipsism.EventLoop()
        self.memories = [MemoryBackend("first", capacity_bytes=6 * PAGE), MemoryBackend("second")]
        self.backends = [Moody(self.memories[0], stubborn=True), Moody(self.memories[1], stubborn=False)]
        config = CacheConfig(
            l1_bytes=13 * PAGE,
            load_timeout_seconds=20,
            store_timeout_seconds=20,
            lease_ttl_seconds=60,
            reservation_ttl_seconds=60,
        )
        self.cache = AsyncCache(config, backends=self.backends)
        self.requests: dict[str, Request] = {}
        self.waiting: list[asyncio.Task[None]] = []
        self.leases: list[tuple[ReadLease, list[Prompt], int]] = []
        self.writers: list[tuple[Writer, Prompt, int]] = []
        self.removed: set[bytes] = set()
        self.calm = True  # nothing has happened that may break a promise
        self.do(self.cache.open())

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do one thing; the rest of the loop goes on only while it is being done."""
        return self.loop.run_until_complete(work)

    # Requests.

    @initialize(stored=st.lists(prompts, min_size=1, max_size=3))
    def begin(self, stored: list[Prompt]) -> None:
        for prompt in stored:
            self.store_in_l2(prompt)

    @rule(
        prompt=prompts,
        ids=st.lists(request_ids, min_size=1, max_size=3, unique=True),
        skip=st.sampled_from([0, 0, 0, 2, 5]),
        rank=st.sampled_from([None, None, 0, 1]),
        deadline=st.sampled_from([None] * 6 + [0, 0.5, 3]),
        turns=st.integers(0, 5),
    )
    def prefetch(
        self, prompt: Prompt, ids: list[str], skip: int, rank: int | None, deadline: float | None, turns: int
    ) -> None:
        ranks = None if rank is None else [rank % prompt.layout.world_size]

        async def prefetch(request_id: str) -> None:
            before = self.requests.get(request_id)
            if before is not None and before.result is not None:
                await self.cache.end_request(request_id)
            try:
                begun = self.cache.prefetch(
                    prompt, request_id=request_id, skip_tokens=skip, ranks=ranks, deadline_seconds=deadline
                )
            except RequestError:
                return
            self.calm &= deadline is None
            self.requests[request_id] = Request(begun, [prompt], skip // prompt.layout.chunk_tokens)
            for _ in range(turns):
                await asyncio.sleep(0)

        for request_id in ids:
            self.do(prefetch(request_id))

    @rule(
        parts=parts_of_one,
        request_id=request_ids,
        rank=st.sampled_from([None, None, 0, 1]),
        deadline=st.sampled_from([None] * 6 + [0, 0.5, 3]),
        turns=st.integers(0, 5),
    )
    def prefetch_segments(
        self, parts: list[Prompt], request_id: str, rank: int | None, deadline: float | None, turns: int
    ) -> None:
        ranks = None if rank is None else [rank % parts[0].layout.world_size]

        async def prefetch() -> None:
            before = self.requests.get(request_id)
            if before is not None and before.result is not None:
                await self.cache.end_request(request_id)
            try:
                begun = self.cache.prefetch_segments(
                    parts, request_id=request_id, ranks=ranks, deadline_seconds=deadline
                )
            except RequestError:
                return
            self.calm &= deadline is None
            self.requests[request_id] = Request(begun, parts, 0)
            for _ in range(turns):
                await asyncio.sleep(0)

        self.do(prefetch())

    @rule(parts=parts_of_one)
    def use_segments(self, parts: list[Prompt]) -> None:
        """The whole way of a request for several prompts."""

        async def use() -> None:
            request = Request(begun := self.cache.prefetch_segments(parts), parts, 0)
            self.check_hits(request, hits := await begun.lookup_done)
            self.check_result(hits, await begun.load_done)
            for rank in range(parts[0].layout.world_size):
                for reader in range(parts[0].layout.readers_per_rank):
                    async with self.cache.read(begun.request_id, rank=rank, reader=reader) as lease:
                        self.check_bytes(lease, parts, rank)

        self.do(use())

    @rule(request_id=request_ids, query=st.sampled_from(["query_lookup_hits", "query_status"]))
    def query(self, request_id: str, query: str) -> None:
        async def ask() -> None:
            request = self.requests.get(request_id)
            try:
                answer = await getattr(self.cache, query)(request_id)
            except RequestError:
                return
            assert request is not None
            self.reached["queries answered"] += 1
            futures = request.prefetch.lookup_done, request.prefetch.load_done
            assert answer == await futures[query == "query_status"]

        self.wait_for(ask())

    @rule(request_id=request_ids, rank=st.integers(0, 1), reader=st.integers(0, 1))
    def read(self, request_id: str, rank: int, reader: int) -> None:
        async def enter() -> None:
            request = self.requests.get(request_id)
            try:
                lease = await self.cache.read(request_id, rank=rank, reader=reader)
            except (RequestError, ValueError):
                return
            assert request is not None
            self.leases.append((lease, request.parts, rank))

        self.wait_for(enter())

    @rule(prompt=prompts, skip=st.sampled_from([0, 0, 2]))
    def use(self, prompt: Prompt, skip: int) -> None:
        """The whole way of a request, as an engine goes it."""

        async def use() -> None:
            begun = self.cache.prefetch(prompt, skip_tokens=skip)
            request = Request(begun, [prompt], skip // prompt.layout.chunk_tokens)
            self.check_hits(request, hits := await begun.lookup_done)
            self.check_result(hits, await begun.load_done)
            for rank in range(prompt.layout.world_size):
                for reader in range(prompt.layout.readers_per_rank):
                    async with self.cache.read(begun.request_id, rank=rank, reader=reader) as lease:
                        self.check_bytes(lease, [prompt], rank)

        self.do(use())

    def wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        async def begin() -> None:
            self.waiting.append(asyncio.create_task(work))
            await asyncio.sleep(0)

        self.do(begin())

    @rule(number=st.integers(0, 5))
    def leave(self, number: int) -> None:
        async def leave() -> None:
            lease, _, _ = self.leases.pop(number)
            lease.release()

        if number < len(self.leases):
            self.do(leave())

    @rule(request_id=request_ids, how=st.sampled_from(["end", "cancel", "renew", "stop waiting"]))
    def interfere(self, request_id: str, how: str) -> None:
        async def interfere() -> None:
            request = self.requests.get(request_id)
            if how == "end":
                await self.cache.end_request(request_id)
            elif how == "cancel" and request is not None:
                request.prefetch.cancel()
            elif how == "renew" and request is not None:
                try:
                    await self.cache.renew(request_id)
                except RequestError:
                    return
            elif how == "stop waiting" and self.waiting:
                self.waiting.pop().cancel()

        self.calm &= how not in ("end", "cancel")
        self.do(interfere())

    # Writing and removing.

    @rule(prompt=prompts)
    def store_in_l2(self, prompt: Prompt) -> None:
        async def store() -> None:
            for rank in range(prompt.layout.world_size):
                async with self.cache.store(prompt, rank=rank) as writer:
                    self.fill(writer, prompt, rank, len(prompt))
            await self.cache.flush(1)
            await self.cache.clear("l1")

        self.do(store())

    @rule(prompt=prompts, rank=st.integers(0, 1), start=st.integers(0, 2), count=st.integers(0, 5))
    def write(self, prompt: Prompt, rank: int, start: int, count: int) -> None:
        rank %= prompt.layout.world_size

        async def write() -> None:
            writer = await self.cache.store(prompt, rank=rank, start_chunk=start)
            self.fill(writer, prompt, rank, count)
            self.writers.append((writer, prompt, rank))

        self.do(write())

    @rule(number=st.integers(0, 2), count=st.integers(0, 5), close=st.booleans())
    def go_on_writing(self, number: int, count: int, close: bool) -> None:
        async def write() -> None:
            writer, prompt, rank = self.writers[number]
            try:
                self.fill(writer, prompt, rank, count)
            except WriterClosedError:
                self.reached["writers swept"] += 1
                del self.writers[number]
                return
            if close:
                writer.close()
                del self.writers[number]

        if number < len(self.writers):
            self.do(write())

    def fill(self, writer: Writer, prompt: Prompt, rank: int, count: int) -> None:
        """Commit the first so many of its chunks."""
        chunk: WriteChunk
        for chunk in writer.chunks[:count]:
            if not chunk.committed:
                for group, view in enumerate(chunk.views):
                    assert view is not None
                    view[:] = content(prompt, chunk.index, rank, group)
                chunk.commit()
                self.removed.discard(prompt.chunk_hashes[chunk.index])

    @rule(prompt=prompts, how=st.sampled_from(["delete", "clear l1", "clear all"]))
    def remove(self, prompt: Prompt, how: Literal["delete", "clear l1", "clear all"]) -> None:
        async def remove() -> None:
            if how == "clear l1":
                await self.cache.clear("l1")
                return
            self.calm = False
            try:
                await (self.cache.delete(prompt) if how == "delete" else self.cache.clear("all"))
            except BackendError:
                return
            self.removed |= {h for p in ([prompt] if how == "delete" else PROMPTS) for h in p.chunk_hashes}

        self.do(remove())

    @rule(prompt=prompts)
    def count(self, prompt: Prompt) -> None:
        hits = self.do(self.cache.lookup(prompt))
        assert 0 <= hits.chunks == hits.l1_chunks + hits.l2_chunks <= len(prompt)
        assert self.removed.isdisjoint(prompt.chunk_hashes[: hits.chunks])

    # Backends come and go: a third one, new each time.

    @rule(
        position=st.sampled_from([None, 0, 1]),
        write=st.sampled_from(Placing),
        promote=st.booleans(),
        admit=st.sampled_from([1, 2]),
    )
    def add_backend(self, position: int | None, write: Placing, promote: bool, admit: int) -> None:
        async def add() -> None:
            memory = MemoryBackend("third", capacity_bytes=20 * PAGE)
            third = Moody(memory, stubborn=False)
            third.placement = Placement(write=write, promote=promote, admit=admit)
            try:
                await self.cache.add_backend(third, position=position)
            except ConfigError:
                return
            self.memories.append(memory)
            self.reached["added"] += 1

        self.do(add())

    @rule(name=st.sampled_from(["third", "third", "first"]))
    def drain_backend(self, name: str) -> None:
        async def drain() -> None:
            try:
                status = await self.cache.drain_backend(name)
            except (ConfigError, BackendError):
                return
            self.reached["drained"] += status.state is BackendState.DRAINED

        self.wait_for(drain())

    @rule()
    def remove_backend(self) -> None:
        async def remove() -> None:
            try:
                await self.cache.remove_backend("third")
            except ConfigError:
                return
            self.reached["backends removed"] += 1

        self.wait_for(remove())

    # What happens to it.

    @rule(seconds=st.sampled_from([0, 0.001, 0.1, 0.3, 1, 25, 70]))
    def pass_time(self, seconds: float) -> None:
        self.do(asyncio.sleep(seconds))

    @rule(
        some=some, verb=st.sampled_from(["load", "load", "store", "lookup", "delete"]), seconds=st.sampled_from([0, 25])
    )
    def hold(self, some: list[int], verb: Verb, seconds: float) -> None:
        self.calm = False
        for which in some:
            self.backends[which].hold(verb)
        self.do(asyncio.sleep(seconds))

    @rule(some=some)
    def open_gates(self, some: list[int]) -> None:
        for which in some:
            self.backends[which].release()
        self.do(asyncio.sleep(0))

    @rule(some=some)
    def fail_next(self, some: list[int]) -> None:
        self.calm = False
        for which in some:
            self.backends[which].failing = True

    @rule(some=some, prompt=prompts, index=st.integers(0, 3), bit=st.integers(0, 63))
    def damage(self, some: list[int], prompt: Prompt, index: int, bit: int) -> None:
        self.calm = False
        for which in some:
            for key in prompt.layout.objects.keys([(prompt.chunk_hashes[index], prompt.layout.objects.full_mask)]):
                flip_bit(self.memories[which], key, bit)

    # What must be true.

    @invariant()
    def records_agree(self) -> None:
        self.cache.check_integrity()
        for memory in self.memories:
            memory.check_integrity()

    @invariant()
    def bytes_are_right(self) -> None:
        for lease in self.leases:
            self.check_bytes(*lease)

    def check_bytes(self, lease: ReadLease, parts: list[Prompt], rank: int) -> None:
        chunks = iter(lease)
        for part, (prompt, loaded) in enumerate(zip(parts, each(lease.result), strict=True)):
            begin, end = loaded.start_chunk, loaded.start_chunk + loaded.chunks
            for index, chunk in zip(range(begin, end), chunks, strict=False):
                assert (chunk.part, chunk.index) == (part, index)
                self.check_chunk(chunk, prompt, rank, end, shared=len(parts) > 1)
                self.reached["chunks of parts read"] += len(parts) > 1
        assert next(chunks, None) is None

    def check_chunk(self, chunk: ReadChunk, prompt: Prompt, rank: int, end: int, *, shared: bool) -> None:
        """Check its bytes. One that several parts have in common may be within the window of another one of them."""
        for group, view in enumerate(chunk.views):
            window = prompt.layout.groups[group].window_chunks
            outside = window is not None and chunk.index < end - window
            assert (view is None) == outside or (shared and outside)
            assert view is None or bytes(view) == content(prompt, chunk.index, rank, group)
            self.reached["objects read"] += view is not None

    @invariant()
    def promises_are_kept(self) -> None:
        async def look() -> None:
            for request in self.requests.values():
                hits, result = request.prefetch.lookup_done, request.prefetch.load_done
                if request.hits is None and hits.done():
                    request.hits = hits.result()
                    self.check_hits(request, request.hits)
                if request.result is None and result.done():
                    assert request.hits is not None
                    request.result = result.result()
                    self.check_result(request.hits, request.result)

            stats = await self.cache.stats()
            self.reached["quarantined"] += stats.quarantined_bytes > 0
            assert stats.l1_used_bytes <= stats.l1_capacity_bytes

        self.do(look())

    def check_hits(self, request: Request, hits: LookupHits) -> None:
        self.reached[f"hits {hits.shortfall}"] += 1
        assert hits.start_chunk == request.start_chunk
        for part, prompt in zip(each(hits), request.parts, strict=True):
            assert 0 <= part.chunks <= part.found_chunks <= len(prompt) - request.start_chunk
            assert part.chunks == part.l1_chunks + part.l2_chunks and min(part.l1_chunks, part.l2_chunks) >= 0
            assert (part.chunks == part.found_chunks) or part.shortfall is not None
        assert hits.chunks == sum(part.chunks for part in each(hits)) == hits.l1_chunks + hits.l2_chunks

    def check_result(self, hits: LookupHits, result: LoadResult) -> None:
        if isinstance(hits, SegmentHits):
            assert result.chunks == sum(part.chunks for part in each(result))
            for promised, loaded in zip(each(hits), each(result), strict=True):
                self.check_result(promised, loaded)
            return
        self.reached[f"result {result.shortfall}"] += 1
        self.reached["loaded"] += result.l2_chunks > 0
        assert 0 <= result.chunks <= hits.chunks and (result.chunks < hits.chunks) <= (result.shortfall is not None)
        assert result.chunks == result.l1_chunks + result.l2_chunks and min(result.l1_chunks, result.l2_chunks) >= 0
        assert result.shortfall is not Shortfall.MEMORY
        assert result.chunks == hits.chunks or not self.calm

    def teardown(self) -> None:
        try:
            self.do(self.end_all())
        finally:
            self.loop.close()

    async def end_all(self) -> None:
        for backend in self.backends:
            backend.failing = False
            backend.release()
        for request_id in self.requests:
            await self.cache.end_request(request_id)
        await asyncio.gather(*self.waiting)
        for lease, _, _ in self.leases:
            lease.release()
        for writer, _, _ in self.writers:
            writer.close()
        stats = await self.cache.stats()
        self.reached["loads shared"] += stats.shared_loads
        self.reached["swept"] += stats.swept_results + stats.swept_leases
        assert (stats.requests, stats.leases, stats.leased_bytes) == (0, 0, 0)
        await asyncio.sleep(1000)
        stats = await self.cache.stats()
        assert (stats.reserved_bytes, stats.quarantined_bytes, stats.writebacks_pending) == (0, 0, 0)
        assert not any(memory.pins for memory in self.memories)
        assert not any(guard.uses for guard in self.cache.core.guards)
        await self.cache.clear("all")
        assert (await self.cache.stats()).l1_used_bytes == 0
        self.cache.check_integrity()
        await self.cache.close()


SETTINGS = settings(
    max_examples=250,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.filterwarnings("ignore::async_solipsism.ResolutionWarning")
@pytest.mark.timeout(240)
def test_in_whatever_order_things_are_done_promises_are_kept_and_nothing_leaks() -> None:
    CacheMachine.reached.clear()
    run_state_machine_as_test(CacheMachine, settings=SETTINGS)
    reached = CacheMachine.reached
    many = "objects read", "loaded", "loads shared", "queries answered", "quarantined", "swept"
    for what in (*many, "chunks of parts read", "added", "drained", "backends removed"):
        assert reached[what] >= 10, f"{what} too seldom to prove anything: {dict(reached)}"


@pytest.mark.skipif(not SOAK_SECONDS, reason="SOAK=<seconds> runs it")
@pytest.mark.filterwarnings("ignore::async_solipsism.ResolutionWarning")
@pytest.mark.timeout(0)
def test_soak() -> None:
    end = time.monotonic() + SOAK_SECONDS
    more = settings(SETTINGS, max_examples=500, derandomize=False, phases=(Phase.generate, Phase.shrink))
    while time.monotonic() < end:
        run_state_machine_as_test(seed(random.randrange(2**32))(CacheMachine), settings=more)
