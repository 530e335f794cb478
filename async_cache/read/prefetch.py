"""The whole way of a prefetch: find in L1, ask L2, promise (`lookup_done`), load, hand over (`load_done`).

`PrefetchController` owns the requests. What it decides, it decides in one step of the loop: what is promised is leased
in L1, or pinned in L2 with room reserved for it, before anybody else gets a turn.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from itertools import count

from async_cache.aio.sweeper import Sweeper
from async_cache.config import CacheConfig
from async_cache.errors import (
    AsyncCacheError,
    CacheClosedError,
    ReadConflictError,
    RequestConflictError,
    UnknownRequestError,
)
from async_cache.handles.prefetch import Prefetch
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard
from async_cache.l2.tombstones import Tombstones
from async_cache.observe import Observers, tell
from async_cache.prompt import coverage
from async_cache.prompt.layout import Prompt, check_index
from async_cache.read.loads import Arrival, ChunkLoad, Loader
from async_cache.read.lookup import Asked, Found, ask, ask_nowait
from async_cache.read.plan import Planner, release_unneeded
from async_cache.read.request import Request, RequestState
from async_cache.values import LoadResult, LookupHits, Shortfall

log = logging.getLogger(__name__)

_PENDING = (RequestState.LOOKING_UP, RequestState.LOADING)


class PrefetchController:
    """All requests, from `start` until they are over."""

    def __init__(
        self,
        l1: L1Store,
        guards: Sequence[Guard],
        loader: Loader,
        sweeper: Sweeper,
        tombstones: Tombstones,
        config: CacheConfig,
        observers: Observers,
    ):
        self.requests: dict[str, Request] = {}
        self.results = sweeper.expiry(config.result_ttl_seconds, self._end)
        self.leases = sweeper.expiry(config.lease_ttl_seconds, self._end)
        self._observers = observers
        self._l1 = l1
        self._guards = guards
        self._loader = loader
        self._tombstones = tombstones
        self._planner = Planner(l1, loader, tombstones, config)
        self._loop = asyncio.get_running_loop()
        self._ids = count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    # The way of a request.

    def start(
        self,
        prompt: Prompt,
        request_id: str | None,
        start_chunk: int,
        ranks: Sequence[int],
        deadline_seconds: float | None,
    ) -> Prefetch:
        """Begin, or return the one that runs under this id. What can be known without waiting is known on return."""
        if request_id is None:
            request_id = next(i for n in self._ids if (i := f"prefetch-{n}") not in self.requests)
        known = self.requests.get(request_id)
        if known is not None:
            same = known.start_chunk == start_chunk and known.ranks == ranks and known.prompt.same_as(prompt)
            if same and not known.claimed:
                return known.prefetch
            raise RequestConflictError(f"request {request_id!r} is in use{'' if same else ' for another prompt'}")
        request = Request(request_id, prompt, start_chunk, ranks, self._loop.time(), self._arrived, self.cancel)
        self.requests[request_id] = request
        asked = self._look_into_l1(request) if prompt.hashed else None
        if asked is not None or not prompt.hashed:
            request.task = self._loop.create_task(self._look_up(request, asked))
            self._tasks.add(request.task)
            request.task.add_done_callback(self._tasks.discard)
        if deadline_seconds is not None and request.state in _PENDING:
            request.deadline = self._loop.call_later(deadline_seconds, self._deadline_passed, request)
        return request.prefetch

    def _look_into_l1(self, request: Request) -> Asked | None:
        """Lease what L1 has. None if that, and what needs no waiting in L2, decides the request; else what to ask."""
        layout, hashes = request.prompt.layout, request.hashes
        full = layout.objects.full_mask
        request.entries = entries = list(map(self._l1.index.get, hashes))
        self._l1.lease(filter(None, entries))
        incomplete = [n for n, entry in enumerate(entries) if entry is None or entry.present != full]
        if not incomplete:
            request.needed = coverage.needed(layout, len(entries))
            self._say_hits(request, len(entries), len(entries))
            self._finish(request)
            return None
        missing = self._missing(request, hashes, incomplete)
        found = None
        if missing and self._guards:
            asked = Asked(layout, hashes, missing)
            found = ask_nowait(self._guards, asked)
            if found is None:
                return asked
        self._decide(request, found)
        return None

    async def _look_up(self, request: Request, asked: Asked | None) -> None:
        try:
            if asked is None:
                await asyncio.to_thread(request.prompt.hash)
                asked = self._look_into_l1(request)
                if asked is None:
                    return
            with self._tombstones.watch() as removed:
                found = await ask(self._guards, asked)
            found.forget(removed)
            self._catch_up(request, asked.masks)
            self._decide(request, found)
        except Exception:
            log.exception("request %r failed", request.request_id)
            self._give_up(request, Shortfall.BACKEND_ERROR)

    def _missing(self, request: Request, hashes: Sequence[bytes], incomplete: Sequence[int]) -> dict[int, int]:
        """The objects that are neither in L1 nor on their way there, by chunk; takes shares of what is on its way."""
        full, entries, table = request.prompt.layout.objects.full_mask, request.entries, self._loader.table
        if not (any(entries) or table):
            return dict.fromkeys(incomplete, full)
        missing = {}
        for number in incomplete:
            lacks, entry, load = full, entries[number], table.get(hashes[number])
            if entry is not None:
                lacks &= ~entry.present
            if load is not None:
                self._join(request, number, load)
                lacks &= ~load.wanted
            if lacks:
                missing[number] = lacks
        return missing

    def _catch_up(self, request: Request, numbers: Iterable[int]) -> None:
        """Lease and join what has come while L2 was asked."""
        hashes, index, table, layout = request.hashes, self._l1.index, self._loader.table, request.prompt.layout
        for number in numbers:
            entry, load = index.get(hashes[number]), table.get(hashes[number])
            if entry is not None and request.entries[number] is None and entry.layout.same_bytes(layout):
                self._l1.lease((entry,))
                request.entries[number] = entry
            if load is not None and load.layout.same_bytes(layout):
                self._join(request, number, load)

    @staticmethod
    def _join(request: Request, number: int, load: ChunkLoad) -> None:
        request.loads.add(number)
        load.shares[request] = number

    def _decide(self, request: Request, found: Found | None) -> None:
        """Promise a prefix, make sure of it, say so, and have the rest loaded: one step."""
        hashes = request.hashes
        plan = self._planner.plan(request, found)
        joined = {n: mask for n in sorted(request.loads) if (mask := self._waits_for(request, n, plan.needed))}
        self._loader.leave(request, [hashes[n] for n in request.loads.difference(joined)])
        sizes = request.prompt.layout.objects.sizes
        load_bytes = 0
        for number, waits_for in joined.items():
            shared = waits_for & ~plan.to_load.get(number, 0)
            self._loader.shared_loads += shared.bit_count()
            load_bytes += sizes[shared]
        sources = found.take(plan.to_load) if found is not None else []
        source_bytes = [(guard, sum([sizes[mask] for mask in masks.values()])) for guard, masks in sources if masks]
        load_bytes += sum(size for _, size in source_bytes)
        expected = self._loader.expected_seconds([hashes[n] for n in joined], source_bytes)
        request.loads = set(plan.to_load).union(joined)
        request.from_l2 = sorted(request.loads)
        request.needed = plan.needed
        shortfall = None
        if plan.length < plan.found:
            shortfall = Shortfall.MEMORY
        elif plan.found < len(hashes):
            failed = found is not None and found.failed
            shortfall = request.reasons.get(plan.found, Shortfall.BACKEND_ERROR if failed else None)
        self._say_hits(request, plan.length, plan.found, shortfall, load_bytes, expected)
        if plan.to_load:
            self._loader.add(request, request.prompt.layout, hashes, plan.rooms, sources)
        if found is not None:
            found.close()
        if not request.loads:
            self._finish(request)

    @staticmethod
    def _waits_for(request: Request, number: int, needed: Sequence[int]) -> int:
        """The objects of a chunk that are needed and not in L1 yet."""
        entry = request.entries[number]
        mask = needed[number] & request.local_mask if number < len(needed) else 0
        return mask & ~entry.present if entry is not None else mask

    def _arrived(self, request: Request, arrivals: Sequence[Arrival]) -> None:
        """Chunks have arrived, or not; the last one ends the load."""
        entries, needed, local = request.entries, request.needed, request.local_mask
        looking_up = request.state is RequestState.LOOKING_UP
        new: list[Entry] = []
        old: list[Entry] = []
        for number, entry, failure in arrivals:
            request.loads.discard(number)
            held = entries[number]
            if held is None or (entry is not None and entry is not held and not held.present & ~entry.present):
                if entry is not None:
                    new.append(entry)
                    entries[number] = entry
                if held is not None:
                    old.append(held)
            else:  # also where it left L1, and what has come in its place has less
                entry = held
            if looking_up:
                if failure is not None:
                    request.reasons[number] = failure
            elif needed[number] & local & ~(entry.present if entry is not None else 0):
                request.reasons[number] = failure or Shortfall.GONE
        self._l1.lease(new)
        self._l1.release(old)
        if not looking_up and not request.loads:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        """The load is over: keep what can be read, say how much."""
        layout, length = request.prompt.layout, request.length
        shortfall = None
        if request.reasons:
            elsewhere = layout.objects.full_mask & ~request.local_mask
            exists = [(e.present if e is not None else 0) | elsewhere for e in request.entries[:length]]
            length = coverage.lengths(layout, exists)[-1]
            if length < request.length:
                shortfall = next((r for n, r in sorted(request.reasons.items()) if n >= length), Shortfall.GONE)
                request.needed = coverage.needed(layout, length)
        if request.reasons or not layout.objects.prefix_mask:
            release_unneeded(self._l1, request, request.needed)
        self._say_result(request, length, shortfall)

    # Saying it.

    def _say_hits(
        self,
        request: Request,
        length: int,
        found: int,
        shortfall: Shortfall | None = None,
        load_bytes: int = 0,
        expected_load_seconds: float | None = 0.0,
    ) -> None:
        request.state = RequestState.LOADING
        request.length = length
        hits = LookupHits(
            request_id=request.request_id,
            start_chunk=request.start_chunk,
            chunks=length,
            tokens=length * request.prompt.layout.chunk_tokens,
            l1_chunks=length - len(request.from_l2),
            l2_chunks=len(request.from_l2),
            found_chunks=found,
            shortfall=shortfall,
            load_bytes=load_bytes,
            expected_load_seconds=expected_load_seconds,
        )
        request.hits.resolve(hits)
        if self._observers.promised:
            tell(self._observers.promised, request.prefetch, hits)

    def _say_result(self, request: Request, length: int, shortfall: Shortfall | None) -> None:
        from_l2 = len(request.from_l2)
        if length < request.length:
            from_l2 = sum(number < length for number in request.from_l2)
        request.state = RequestState.LOADED
        request.length = length
        if request.deadline is not None:
            request.deadline.cancel()
        self.results.add(request)
        result = LoadResult(
            request_id=request.request_id,
            start_chunk=request.start_chunk,
            chunks=length,
            tokens=length * request.prompt.layout.chunk_tokens,
            l1_chunks=length - from_l2,
            l2_chunks=from_l2,
            shortfall=shortfall,
            seconds=self._loop.time() - request.began,
        )
        request.result.resolve(result)
        if self._observers.loaded:
            tell(self._observers.loaded, request.prefetch, result)

    # What its caller does with a request.

    async def query_lookup_hits(self, request_id: str) -> LookupHits:
        """The promise, once it is made."""
        request = self._unclaimed(request_id)
        hits = await request.hits.wait()
        if hits.shortfall is Shortfall.CANCELLED and request.state is RequestState.OVER:
            raise self._ended(request)
        return hits

    async def query_status(self, request_id: str) -> LoadResult:
        """The result, once it is there, to the first who asks."""
        request = self._unclaimed(request_id)
        result = await request.result.wait()
        if request.claimed or request.state is RequestState.OVER:
            raise self._ended(request)
        request.claimed = True
        if result.chunks:
            self._use(request)
        else:
            self._end(request)
        return result

    def find(self, request_id: str) -> Request | None:
        """The request of an id, or None."""
        return self.requests.get(request_id)

    def unclaim(self, request_id: str) -> None:
        """Who has claimed it never came to know of it: it may be claimed again. One that is over stays so."""
        request = self.requests.get(request_id)
        if request is not None:
            request.claimed = False

    async def enter(self, request_id: str, rank: int, reader: int) -> Request:
        """Begin to read, once the load is done."""
        request = self._known(request_id)
        layout = request.prompt.layout
        check_index("rank", rank, layout.world_size)
        check_index("reader", reader, layout.readers_per_rank)
        if rank not in request.ranks:
            raise ValueError(f"rank {rank} is not among the ranks {request.ranks} of request {request_id!r}")
        await request.result.wait()
        if request.state is RequestState.OVER:
            raise self._ended(request)
        if (rank, reader) in request.readers:
            raise ReadConflictError(f"rank {rank}, reader {reader} has read request {request_id!r} already")
        request.readers.add((rank, reader))
        request.inside += 1
        self._use(request)
        return request

    def unenter(self, request: Request, rank: int, reader: int) -> None:
        """One who has entered never came to know of it: it may enter again."""
        request.readers.discard((rank, reader))
        request.inside -= 1
        if request.state is RequestState.OVER:
            self._release_if_left(request)

    def leave(self, request: Request) -> None:
        """One reader has left; the last of all ends the request."""
        request.inside -= 1
        everybody = len(request.ranks) * request.prompt.layout.readers_per_rank
        if request.state is RequestState.OVER:
            self._release_if_left(request)
        elif not request.inside and len(request.readers) == everybody:
            self._end(request)

    def renew(self, request_id: str) -> None:
        """Its time begins anew."""
        request = self._known(request_id)
        if request in self.results:
            self.results.add(request)
        elif request in self.leases:
            self.leases.add(request)

    def cancel(self, request: Request) -> None:
        """Give up what is pending; what has loaded stays."""
        self._give_up(request, Shortfall.CANCELLED)

    def end(self, request_id: str) -> None:
        """Give back all that a request holds, and its id."""
        request = self.requests.get(request_id)
        if request is not None:
            self._end(request)

    async def close(self) -> None:
        """End all requests: whoever waits is told that the cache closes."""
        error = CacheClosedError("the cache was closed")
        for request in list(self.requests.values()):
            request.hits.break_with(error)
            request.result.break_with(error)
            self._end(request)
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _known(self, request_id: str) -> Request:
        request = self.requests.get(request_id)
        if request is None:
            raise UnknownRequestError(f"there is no request {request_id!r}")
        return request

    def _unclaimed(self, request_id: str) -> Request:
        request = self._known(request_id)
        if request.claimed:
            raise UnknownRequestError(f"request {request_id!r} was claimed")
        return request

    def _ended(self, request: Request) -> AsyncCacheError:
        """What is told to who has waited for it."""
        if self._l1.closed:
            return CacheClosedError("the cache was closed")
        return UnknownRequestError(f"request {request.request_id!r} was claimed or ended")

    # How requests end.

    def _use(self, request: Request) -> None:
        request.state = RequestState.IN_USE
        self.results.discard(request)
        self.leases.add(request)

    def _deadline_passed(self, request: Request) -> None:
        if request.state is RequestState.LOOKING_UP:
            self._give_up(request, Shortfall.DEADLINE)
        elif request.state is RequestState.LOADING:
            request.reasons |= dict.fromkeys(request.loads, Shortfall.DEADLINE)
            self._leave_loads(request)
            self._finish(request)

    def _give_up(self, request: Request, reason: Shortfall) -> None:
        """Resolve what is pending with nothing."""
        if request.state not in _PENDING:
            return
        if request.task is not None and request.task is not asyncio.current_task():
            request.task.cancel()
        self._leave_loads(request)
        request.needed = request.from_l2 = ()
        release_unneeded(self._l1, request, ())
        if request.state is RequestState.LOOKING_UP:
            self._say_hits(request, 0, 0, reason)
        self._say_result(request, 0, reason)

    def _end(self, request: Request) -> None:
        self._give_up(request, Shortfall.CANCELLED)
        if request.state is not RequestState.OVER:
            request.state = RequestState.OVER
            del self.requests[request.request_id]
            prefetch = request.prefetch
            del request.prefetch  # they know each other, and would wait for a collection of garbage
            self.results.discard(request)
            self.leases.discard(request)
            self._release_if_left(request)
            if self._observers.over:
                tell(self._observers.over, prefetch)

    def _release_if_left(self, request: Request) -> None:
        if not request.inside:
            release_unneeded(self._l1, request, ())
            # What the engine held comes before what it asked for, and is to stay longer.
            if request.start_chunk and request.prompt.hashed:
                self._l1.touch(reversed(request.prompt.chunk_hashes[: request.start_chunk]))

    def _leave_loads(self, request: Request) -> None:
        numbers, request.loads = request.loads, set()
        if numbers:
            hashes = request.hashes
            self._loader.leave(request, [hashes[number] for number in numbers])

    def check_integrity(self) -> None:
        """Leases, shares and expiries are those of the requests."""
        for request in self.requests.values():
            state = request.state
            assert state is not RequestState.OVER
            assert (request in self.results) == (state is RequestState.LOADED)
            assert (request in self.leases) == (state is RequestState.IN_USE)
            assert state in _PENDING or not request.loads
            hashes = request.hashes
            assert all(request in self._loader.table[hashes[number]].shares for number in request.loads)
