"""A random program over a cache: actors that do, side by side, whatever a caller may do, over backends that do whatever
a backend may do; and a model of what must be true whatever the order."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from contract.support import PAGE, Prompt, make_layout, pattern

from async_cache import (
    AsyncCache,
    BackendError,
    CacheClosedError,
    CacheConfig,
    LoadResult,
    LookupHits,
    ObjectGroup,
    ObjectKey,
    Prefetch,
    ReadConflictError,
    ReadLease,
    RequestConflictError,
    Shortfall,
    UnknownRequestError,
    WriteChunk,
    WriterClosedError,
)
from async_cache.l2 import Backend
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.memory import MemoryBackend
from async_cache.retention.policies import make_policy
from async_cache.testing import WrappedBackend, flip_bit

from .interleaving import ShuffledLoop

PLAIN = make_layout(ObjectGroup((PAGE + 5,), "uint8"), model="plain", chunk_tokens=2, readers_per_rank=2)
WINDOW = ObjectGroup((8,), "uint8", window_chunks=2)
SPLIT = make_layout(ObjectGroup((16,), "uint8"), WINDOW, model="split", chunk_tokens=2, world_size=2)
SLIDING = make_layout(WINDOW, ObjectGroup((8,), "uint8", window_chunks=1), model="sliding", chunk_tokens=2)
HEAD = [1, 2, 3, 4, 5, 6]
PROMPTS = [layout.prompt(HEAD + tail) for layout in (PLAIN, SPLIT, SLIDING) for tail in ([7, 8, 9, 10], [11, 12])]
CONTENT = {
    ObjectKey(chunk_hash, rank, group): pattern(prompt, index, rank, group)
    for prompt in PROMPTS
    for index, chunk_hash in enumerate(prompt.chunk_hashes)
    for rank in range(prompt.layout.world_size)
    for group in range(len(prompt.layout.groups))
}
IDS = ["a", "b", "c"]
TIMEOUT, TTL = 0.5, 2  # of a backend's call; of a result, and of a lease
RESERVATION_TTL = 0.3


class Broken(BaseException):
    """The cache broke its word. No `except Exception` on the way may swallow it."""


def must(true: bool, *what: object) -> None:
    if not true:
        raise Broken(*what)


@dataclass(eq=False)
class Record:
    """A prefetch as its caller knows it."""

    prefetch: Prefetch
    prompt: Prompt
    start: int
    ranks: Sequence[int]
    deadline: float | None  # when it passes
    began: int  # the tick
    gone: frozenset[bytes]  # was deleted before
    safe: int  # so many chunks were known to be in L2
    hits: "asyncio.Future[LookupHits]" = field(init=False)
    result: "asyncio.Future[LoadResult]" = field(init=False)
    given_up: bool = False  # cancelled or ended
    ended: bool = False
    claims: int = 0
    read_by: set[tuple[int, int]] = field(default_factory=set)
    done_at: float | None = None

    def __post_init__(self) -> None:
        self.hits, self.result = self.prefetch.lookup_done, self.prefetch.load_done


class Rough(WrappedBackend):
    """Slow by chance. In a rough program it also fails, hangs, rots, and goes on with what was cancelled, as a thread
    does: the call ends, and is cancelled, only after it has done its work."""

    def __init__(self, inner: MemoryBackend, program: "Program"):
        super().__init__(inner)
        self.memory = inner
        self.program = program
        self.random = program.random
        self.at_hand = self.random.random() < 0.5  # it knows what it holds
        self.stubborn = self.random.random() < 0.5
        self.pins: Counter[ObjectKey] = Counter()

    async def before(self, verb: str, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> None:
        await asyncio.sleep(self.random.choice((0, 0, 0.01, 0.1)))
        if self.program.rough and self.random.random() < (0.25 if buffers else 0.1):
            fault = self.random.choice(("fail", "fail", "hang", "rot"))
            self.program.faults[fault] += 1
            if fault == "fail":
                raise self.random.choice((BackendError, OSError))("injected")
            if fault == "hang":
                await asyncio.sleep(3 * TIMEOUT)
            elif verb == "load":
                flip_bit(self.memory, self.random.choice(keys))

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        found = self.memory.lookup_nowait(chunk_hashes, objects) if self.at_hand else None
        for chunk_hash, there in zip(chunk_hashes, found or (), strict=False):
            self.pins.update(ObjectKey(chunk_hash, *which) for which in objects if there)
        return found

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        return self._pinned(keys, await super().lookup(keys))

    def _pinned(self, keys: Sequence[ObjectKey], found: list[bool]) -> list[bool]:
        self.pins.update(key for key, there in zip(keys, found, strict=True) if there)
        return found

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        self.pins.subtract(keys)
        super().unpin(keys)

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        self.program.load_begins(keys)
        return await self._carry(super().load(keys, buffers))

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        return await self._carry(super().store(keys, buffers))

    async def _carry(self, work: Coroutine[Any, Any, Any]) -> Any:
        if not self.stubborn:
            return await work
        task = asyncio.create_task(work)
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.wait((task,))
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            task.exception()
            raise cancelled
        return task.result()


class Program:
    """One run: make it, then `await main()`. `reached` counts what happened at all. `policy`: of all tiers."""

    def __init__(
        self,
        loop: ShuffledLoop,
        reached: Counter[str],
        wrap: Callable[["Rough"], Backend] = lambda b: b,
        policy: str = "lru",
    ):
        self.loop = loop
        self.random: random.Random = loop.random
        self.reached = reached
        self.rough = self.random.random() < 0.5
        self.closing = self.random.random() < 0.2
        self.faults: Counter[str] = Counter()
        self.ticks = count(1)
        self.requests: dict[str, Record] = {}
        self.records: list[Record] = []
        self.running: list[Record] = []
        self.leases: list[tuple[ReadLease, Record, int]] = []
        self.filling: list[tuple[memoryview, ...]] = []  # of writers, not committed
        self.loading: dict[ObjectKey, list[asyncio.Task[Any]]] = {}
        self.left = 0  # the last step in which somebody ceased to want what is loaded
        self.committed: dict[bytes, dict[int, int]] = {}  # the last tick, by chunk and rank
        self.removed: set[bytes] = set()
        self.removals = 0
        self.removing = 0
        self.last_removal = 0
        self.safe: set[bytes] = set()
        self.delivered: set[bytes] = set()
        self.cleared = False
        self.closed = False
        self.broken: Broken | None = None  # found where the cache would take it for a fault of the backend
        bounded = self.random.random() < 0.3
        self.unbounded = not bounded
        capacities = self.random.choice(([None], [None], [None, None])) if not bounded else [8 * PAGE, None]
        self.backends = [
            Rough(MemoryBackend(f"backend {n}", capacity_bytes=capacity, policy=make_policy(policy, loop.time)), self)
            for n, capacity in enumerate(capacities)
        ]
        config = CacheConfig(
            l1_bytes=self.random.choice((9, 14, 24)) * PAGE,
            lookup_timeout_seconds=TIMEOUT,
            load_timeout_seconds=TIMEOUT,
            store_timeout_seconds=TIMEOUT,
            breaker_reset_seconds=1,
            result_ttl_seconds=TTL,
            lease_ttl_seconds=TTL,
            reservation_ttl_seconds=RESERVATION_TTL,
            load_inflight_bytes=self.random.choice((PAGE, 2**20)),
            writeback_share=self.random.choice((0.25, 0.5)),
            policy=policy,
        )
        self.cache = AsyncCache(config, backends=[wrap(backend) for backend in self.backends])
        self.check_every = self.random.choice((1,) + (25,) * 9)

    # The run.

    async def main(self) -> None:
        stalling, self.loop.stalling = self.loop.stalling, False  # an open that takes too long has failed
        await self.cache.open()
        self.loop.stalling = stalling
        self.loop.between = self.between
        for prompt in self.random.sample(PROMPTS, 3):
            await self.store_in_l2(prompt)
        actors = [asyncio.create_task(self.act()) for _ in range(self.random.choice((2, 3, 5)))]
        if self.closing:
            actors.append(asyncio.create_task(self.close()))
        await asyncio.gather(*actors)
        await (self.check_closed() if self.closing else self.end())
        self.loop.between = lambda: None

    async def store_in_l2(self, prompt: Prompt) -> None:
        """It was there before the cache was opened."""
        keys = [key for key in CONTENT if key.chunk_hash in prompt.chunk_hashes]
        await self.backends[-1].memory.store(keys, [memoryview(CONTENT[key]) for key in keys])
        for key in keys:
            self.committed.setdefault(key.chunk_hash, {})[key.rank] = next(self.ticks)
        self.safe |= set(prompt.chunk_hashes)

    async def act(self) -> None:
        for _ in range(self.random.choice((3, 6, 10))):
            if self.closed:
                return
            (do,) = self.random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
            work = do(self)
            try:
                await (work if self.random.random() < 0.85 else self.until_cancelled(work))
            except CacheClosedError:
                must(self.closed, "closed too early")

    async def until_cancelled(self, work: Coroutine[Any, Any, None]) -> None:
        """Its caller loses patience."""
        task = asyncio.create_task(work)
        await self.pause()
        task.cancel()
        await asyncio.wait((task,))
        self.reached["waits cancelled"] += task.cancelled()
        if not task.cancelled():
            task.result()

    async def pause(self) -> None:
        delay = self.random.choice((0, 0, 0, 0.005, 0.05, 0.2))
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)
        await asyncio.sleep(delay)

    async def close(self) -> None:
        for _ in range(self.random.randrange(8)):
            await self.pause()
        self.closed = True
        for record in self.running:
            record.given_up = True
        await self.cache.close()
        self.reached["closed"] += 1

    async def end(self) -> None:
        """Everything is given back."""
        self.rough = self.loop.stalling = False
        for request_id in self.requests:
            await self.end_request(request_id)
        self.look()
        must(not self.running, "a request was ended, and its futures are pending")
        stats = await self.cache.stats()
        must((stats.requests, stats.leases, stats.leased_bytes) == (0, 0, 0), stats)
        await asyncio.sleep(1000)
        self.cache.check_integrity()
        stats = await self.cache.stats()
        must((stats.reserved_bytes, stats.quarantined_bytes, stats.writebacks_pending) == (0, 0, 0), stats)
        self.check_pins()
        self.reached["loads shared"] += stats.shared_loads
        self.reached["objects loaded"] += stats.loads
        self.reached["requests swept"] += stats.swept_results + stats.swept_leases
        self.reached["writers swept"] += stats.swept_reservations
        self.reached["write-backs dropped"] += stats.writebacks_dropped
        await self.cache.clear("all")
        must((await self.cache.stats()).l1_used_bytes == 0, "an empty L1 has no room")
        self.closed = True
        await self.cache.close()
        await self.check_tasks()

    async def check_closed(self) -> None:
        await self.cache.close()
        self.look()
        must(not self.running, "the cache was closed, and futures are pending")
        await asyncio.sleep(1000)
        self.check_pins()
        await self.check_tasks()

    async def check_tasks(self) -> None:
        await asyncio.sleep(0.01)
        must(len(asyncio.all_tasks()) == 1, "tasks are left", asyncio.all_tasks())

    def check_pins(self) -> None:
        for backend in self.backends:
            must(not any(backend.pins.values()) and not backend.memory.pins, "pins are left", backend.pins)
            backend.memory.check_integrity()

    # What an actor does.

    async def prefetch(self) -> None:
        self.begin(self.random.choice(IDS))

    async def use(self) -> None:
        """The whole way of a request, as an engine goes it."""
        record = self.begin(None)
        if record is None:
            return
        try:
            await record.prefetch.lookup_done
            await record.prefetch.load_done
            for rank in record.ranks:
                for reader in range(record.prompt.layout.readers_per_rank):
                    await self.read_one(record, rank, reader)
        except asyncio.CancelledError:
            await self.end_request(record.prefetch.request_id)
            raise

    def begin(self, request_id: str | None) -> Record | None:
        prompt = self.random.choice(PROMPTS)
        skip = self.random.choice((0, 0, 0, 2, 5))
        ranks = self.random.choice((None, None, [0]))
        deadline = self.random.choice((None,) * 9 + (0, 0.05, 0.3))
        safe = next((n for n, h in enumerate(prompt.chunk_hashes) if h not in self.safe), len(prompt))
        gone, tick = frozenset(self.removed.intersection(prompt.chunk_hashes)), next(self.ticks)
        try:
            prefetch = self.cache.prefetch(
                prompt, request_id=request_id, skip_tokens=skip, ranks=ranks, deadline_seconds=deadline
            )
        except RequestConflictError:
            must(not self.requests[str(request_id)].ended, "an ended request keeps its id")
            return None
        known = self.requests.get(prefetch.request_id)
        if known is not None and known.prefetch is prefetch:
            must(not known.claims, "a claimed request was handed out again")
            return None
        must(known is None or self.over(known) or known.claims > 0, "two requests have one id", request_id)
        record = Record(
            prefetch,
            prompt,
            skip // prompt.layout.chunk_tokens,
            ranks or range(prompt.layout.world_size),
            None if deadline is None else self.loop.time() + deadline,
            tick,
            gone,
            safe,
        )
        self.requests[prefetch.request_id] = record
        self.records.append(record)
        self.running.append(record)
        self.reached["prefetches"] += 1
        self.look()
        return record

    def some(self) -> Record | None:
        return self.random.choice(list(self.requests.values())) if self.requests else None

    async def query(self) -> None:
        if record := self.some():
            request_id = record.prefetch.request_id
            query = self.random.choice((self.cache.query_lookup_hits, self.cache.query_status))
            try:
                answer = await query(request_id)
            except UnknownRequestError:
                must(record.claims > 0 or self.over(record), "forgotten", record)
                self.reached["queries refused"] += 1
                return
            if isinstance(answer, LookupHits):
                must(answer == record.hits.result(), "another answer")
            else:
                record.claims += 1
                must(answer == record.result.result(), "another answer")
                must(record.claims == 1, "a result was claimed twice")
                record.ended |= not answer.chunks
                self.reached["results claimed"] += 1

    async def read(self) -> None:
        if record := self.some():
            layout = record.prompt.layout
            rank, reader = self.random.choice(record.ranks), self.random.randrange(layout.readers_per_rank)
            await self.read_one(record, rank, reader)

    async def read_one(self, record: Record, rank: int, reader: int) -> None:
        try:
            lease = await self.cache.read(record.prefetch.request_id, rank=rank, reader=reader)
        except ReadConflictError:
            must((rank, reader) in record.read_by, "nobody has read it")
            return
        except UnknownRequestError:
            must(self.over(record), "forgotten", record)
            return
        must((rank, reader) not in record.read_by, "read twice")
        record.read_by.add((rank, reader))
        must(lease.result == record.result.result(), "another result")
        held = (lease, record, rank)
        self.leases.append(held)
        try:
            self.check_bytes(*held)
            await self.pause()
            self.check_bytes(*held)
            self.reached["reads across a close"] += self.closed and len(lease) > 0
        finally:
            self.leases.remove(held)
            lease.release()

    async def give_up(self) -> None:
        if record := self.some():
            if self.random.random() < 0.5:
                await self.end_request(record.prefetch.request_id)
            else:
                running = not record.result.done()
                record.given_up |= running
                record.prefetch.cancel()
                must(record.result.done(), "cancelled, and pending")
                self.reached["loads cancelled"] += running and record.result.result().shortfall is Shortfall.CANCELLED

    async def end_request(self, request_id: str) -> None:
        record = self.requests[request_id]
        record.given_up |= not record.result.done()
        record.ended = True
        await self.cache.end_request(request_id)

    async def renew(self) -> None:
        if record := self.some():
            try:
                await self.cache.renew(record.prefetch.request_id)
            except UnknownRequestError:
                must(record.claims > 0 or self.over(record), "forgotten", record)
            else:
                if record.done_at is not None:
                    record.done_at = self.loop.time()

    async def store(self) -> None:
        prompt = self.random.choice(PROMPTS)
        patient = self.random.random() < 0.05
        try:
            for rank in range(prompt.layout.world_size):
                async with self.cache.store(prompt, rank=rank) as writer:
                    for chunk in writer:
                        await self.fill(chunk, prompt, rank, patient)
        except WriterClosedError:
            must(patient or self.closed or self.loop.stalls > 0, "a writer was closed")

    async def fill(self, chunk: WriteChunk, prompt: Prompt, rank: int, patient: bool) -> None:
        chunk_hash, views = prompt.chunk_hashes[chunk.index], chunk.views
        self.filling.append(views)
        try:
            for group, view in enumerate(views):
                view[:] = CONTENT[ObjectKey(chunk_hash, rank, group)]
            if self.random.random() < 0.3:
                await self.pause()
            if patient:
                await asyncio.sleep(4 * RESERVATION_TTL)
            chunk.commit()
            self.committed.setdefault(chunk_hash, {})[rank] = next(self.ticks)
            self.removed.discard(chunk_hash)
        finally:
            self.filling = [others for others in self.filling if others is not views]

    async def flush(self) -> None:
        began = next(self.ticks)
        flushed = await self.cache.flush(self.random.choice((None, 0.05, 500)))
        dropped = (await self.cache.stats()).writebacks_dropped
        if self.unbounded and not self.removing and began > self.last_removal and not (flushed.pending or dropped):
            self.safe |= {
                h
                for prompt in PROMPTS
                for h in prompt.chunk_hashes
                if h not in self.removed
                and len(ticks := self.committed.get(h, {})) == prompt.layout.world_size
                and self.last_removal < min(ticks.values())
                and max(ticks.values()) < began
            }

    async def delete(self) -> None:
        prompt = self.random.choice(PROMPTS)
        await self.remove(lambda: self.cache.delete(prompt), set(prompt.chunk_hashes))

    async def clear_all(self) -> None:
        await self.remove(lambda: self.cache.clear("all"), {h for prompt in PROMPTS for h in prompt.chunk_hashes})

    async def remove(self, call: Callable[[], Awaitable[Any]], hashes: set[bytes]) -> None:
        began = next(self.ticks)
        self.safe -= hashes
        self.removing += 1
        self.removals += 1
        self.left = self.loop.step
        try:
            await call()
        except BackendError:
            must(bool(self.faults) or self.loop.stalls > 0, "nothing had failed")
        else:
            # A chunk of which no object was committed since is gone.
            self.removed |= {h for h in hashes if max(self.committed.get(h, {0: 0}).values()) < began}
            self.reached["removals"] += 1
        finally:
            self.removing -= 1
            self.last_removal = next(self.ticks)

    async def clear(self) -> None:
        self.cleared = True
        await self.cache.clear("l1")

    async def count(self) -> None:
        prompt = self.random.choice(PROMPTS)
        gone, tick = frozenset(self.removed.intersection(prompt.chunk_hashes)), next(self.ticks)
        hits = await self.cache.lookup(prompt)
        must(0 <= hits.chunks == hits.l1_chunks + hits.l2_chunks <= len(prompt), hits)
        if not self.saw_removals(tick):
            self.check_not_gone(prompt, range(hits.chunks), gone, tick)

    async def wait(self) -> None:
        await asyncio.sleep(self.random.choice((0.1, 0.1, 0.5, 1, 3)))

    # What must be true.

    def between(self) -> None:
        """Between any two steps of the loop."""
        if self.broken is not None:
            raise self.broken
        self.look()
        if not self.closed:
            core = self.cache.core
            must(core.loader._reserved_bytes <= 0.75 * core.arena.size_bytes, "loads have more than their share")
        if self.loop.step % self.check_every == 0:
            if not self.closed:
                self.cache.check_integrity()
            for lease in self.leases:
                self.check_bytes(*lease)

    def look(self) -> None:
        for record in list(self.running):
            if record.result.done():
                self.running.remove(record)
                must(record.hits.done(), "loaded before it was looked up")
                if record.result.exception() is None:
                    record.done_at = self.loop.time()
                    if record.result.result().shortfall in (Shortfall.CANCELLED, Shortfall.DEADLINE):
                        self.left = self.loop.step
                    self.check(record, record.hits.result(), record.result.result())
                else:
                    must(self.closed, "closed too early", record.result.exception())

    def check(self, record: Record, hits: LookupHits, result: LoadResult) -> None:
        must(hits.start_chunk == result.start_chunk == record.start, hits, result)
        must(0 <= hits.chunks <= hits.found_chunks <= len(record.prompt) - record.start, hits)
        must(hits.chunks == hits.l1_chunks + hits.l2_chunks and min(hits.l1_chunks, hits.l2_chunks) >= 0, hits)
        must(hits.chunks == hits.found_chunks or hits.shortfall is not None, hits)
        must(result.chunks == result.l1_chunks + result.l2_chunks, result)
        must(min(result.l1_chunks, result.l2_chunks) >= 0 and result.chunks <= hits.chunks, hits, result)
        excuses = self.excuses(record)
        must(hits.shortfall in excuses | {None, Shortfall.MEMORY}, "no reason for", hits, record)
        if result.chunks < hits.chunks or result.shortfall is not None:
            must(result.shortfall in excuses, "no reason for", result, record)
        seen = result if self.saw_removals(record.began) else hits
        self.check_not_gone(record.prompt, range(record.start, record.start + seen.chunks), record.gone, record.began)
        if not self.faults and not self.removals and hits.shortfall in (None, Shortfall.MEMORY):
            must(record.start + hits.found_chunks >= record.safe, "what is in L2 was not found", hits, record.safe)
            self.reached["found what is safe"] += record.safe > record.start
        self.reached["promises of what is in L2"] += hits.l2_chunks > 0
        self.reached["promises kept"] += hits.l2_chunks > 0 and result.chunks == hits.chunks
        promised = set(record.prompt.chunk_hashes[record.start : record.start + hits.chunks])
        again = hits.l2_chunks > 0 and promised <= self.delivered and record.prompt.layout is PLAIN
        self.reached["loaded again after an eviction"] += again and not self.cleared and not self.removals
        self.delivered.update(record.prompt.chunk_hashes[record.start : record.start + result.chunks])
        self.reached[f"hits {hits.shortfall}"] += 1
        self.reached[f"result {result.shortfall}"] += 1

    def over(self, record: Record) -> bool:
        """Whether it may be unknown by now."""
        everybody = len(record.ranks) * record.prompt.layout.readers_per_rank
        swept = record.done_at is not None and (self.loop.stalls or self.loop.time() >= record.done_at + TTL - 0.01)
        return self.closed or record.ended or bool(swept) or len(record.read_by) == everybody

    def excuses(self, record: Record) -> set[Shortfall]:
        """The reasons for which this one may get less than there is."""
        excuses = set()
        if record.given_up:
            excuses.add(Shortfall.CANCELLED)
        if (record.deadline is not None and self.loop.time() >= record.deadline - 1e-4) or self.faults["hang"]:
            excuses.add(Shortfall.DEADLINE)
        if self.faults["fail"] or self.faults["hang"]:
            excuses.add(Shortfall.BACKEND_ERROR)
        if self.faults["rot"]:
            excuses |= {Shortfall.CORRUPT, Shortfall.GONE}
        if self.saw_removals(record.began):
            excuses.add(Shortfall.GONE)
        if self.loop.stalls:
            excuses |= {Shortfall.DEADLINE, Shortfall.BACKEND_ERROR}
        return excuses

    def saw_removals(self, since: int) -> bool:
        """Whether what was found may have been removed meanwhile."""
        return self.removing > 0 or self.last_removal > since

    def check_not_gone(self, prompt: Prompt, promised: range, gone: frozenset[bytes], since: int) -> None:
        needed = promised[-2:] if prompt.layout is SLIDING else promised  # what lies before may be missing
        for index in needed:
            h = prompt.chunk_hashes[index]
            must(h not in gone or max(self.committed[h].values()) > since, "deleted, and served")

    def check_bytes(self, lease: ReadLease, record: Record, rank: int) -> None:
        prompt, result = record.prompt, lease.result
        begin, end = result.start_chunk, result.start_chunk + result.chunks
        must([chunk.index for chunk in lease] == list(range(begin, end)), "other chunks than promised")
        for chunk in lease:
            for group, view in enumerate(chunk.views):
                window = prompt.layout.groups[group].window_chunks
                must((view is None) == (window is not None and chunk.index < end - window), "outside a window")
                key = ObjectKey(prompt.chunk_hashes[chunk.index], rank, group)
                must(view is None or bytes(view) == CONTENT[key], "wrong bytes", chunk.index, rank, group)
                self.reached["objects read"] += view is not None

    def load_begins(self, keys: Sequence[ObjectKey]) -> None:
        """An object is loaded once at a time, unless those who wanted it had left."""
        call = asyncio.current_task()
        assert call is not None
        for key in keys:
            calls = [c for c in self.loading.get(key, ()) if not c.done() and not c.cancelling()]
            if any(self.left < self.loop.made[c] for c in calls):
                self.broken = Broken("loaded twice at a time", key)
            self.loading[key] = [*calls, call]


_WEIGHTS: dict[Callable[[Program], Coroutine[Any, Any, None]], float] = {
    Program.use: 5,
    Program.prefetch: 5,
    Program.query: 4,
    Program.read: 4,
    Program.give_up: 2,
    Program.renew: 0.5,
    Program.store: 4,
    Program.flush: 1,
    Program.delete: 0.6,
    Program.clear_all: 0.2,
    Program.clear: 1,
    Program.count: 1,
    Program.wait: 3,
}
