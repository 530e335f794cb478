"""The whole way of a prefetch: find in L1, ask L2, promise (`lookup_done`), load, hand over (`load_done`).

What is decided, is decided in one step of the loop: what is promised is leased in L1, or pinned in L2 with room
reserved for it, before anybody else gets a turn.
"""

import asyncio
import logging
from collections.abc import Sequence
from functools import partial

from async_cache.aio.sweeper import Sweeper
from async_cache.config import CacheConfig
from async_cache.handles.prefetch import Prefetch
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guards import Guards
from async_cache.l2.tombstones import Tombstones
from async_cache.observe import Observers, notify
from async_cache.prompt import coverage
from async_cache.prompt.layout import Prompt
from async_cache.read.load import ChunkLoad
from async_cache.read.loads import Arrival, Loader
from async_cache.read.lookup import Asked, Found, ask, ask_nowait
from async_cache.read.plan import Planner
from async_cache.read.request import LOADED, LOADING, LOOKING_UP, Request
from async_cache.read.requests import Requests
from async_cache.values import LoadResult, LookupHits, Shortfall

log = logging.getLogger(__name__)


class PrefetchController:
    """Takes requests on their way, from `start` until they are loaded. `requests` knows them until they are over."""

    def __init__(
        self,
        l1: L1Store,
        guards: Guards,
        loader: Loader,
        sweeper: Sweeper,
        tombstones: Tombstones,
        observers: Observers,
        config: CacheConfig,
    ):
        self.requests = Requests(l1, sweeper, observers, config, self._give_up)
        self._l1 = l1
        self._guards = guards
        self._loader = loader
        self._tombstones = tombstones
        self._observers = observers
        self._planner = Planner(l1, loader, config)
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        prompt: Prompt,
        request_id: str | None,
        start_chunk: int,
        ranks: Sequence[int],
        deadline_seconds: float | None,
    ) -> Prefetch:
        """Begin a request, or return the one that runs under this id. What needs no waiting is known on return.

        Raises RequestConflictError if the id is in use for something else.
        """
        requests = self.requests
        if request_id is None:
            request_id = requests.new_id()
        elif (known := requests.same(request_id, prompt, start_chunk, ranks)) is not None:
            return known.prefetch
        request = Request(request_id, prompt, start_chunk, ranks, self._loop.time())
        request.prefetch = prefetch = Prefetch(request, partial(self.cancel, request))
        requests.add(request)
        asked = self._advance(request) if prompt.hashed else None
        if request.state is LOOKING_UP:
            request.task = self._loop.create_task(self._look_up(request, asked))
            self._tasks.add(request.task)
            request.task.add_done_callback(self._tasks.discard)
        if deadline_seconds is not None and request.pending:
            request.deadline = self._loop.call_later(deadline_seconds, self._deadline_passed, request)
        return prefetch

    def cancel(self, request: Request) -> None:
        """Give up what is pending of a request; what has loaded stays."""
        self._give_up(request, Shortfall.CANCELLED)

    async def close(self) -> None:
        """End all requests: whoever waits for one gets CacheClosedError."""
        self.requests.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    # From the lookup to the promise.

    async def _look_up(self, request: Request, asked: Asked | None) -> None:
        """Wait for what the deciding step lacks: the hashes of a long prompt, and the answers of L2."""
        try:
            if asked is None:
                await asyncio.to_thread(request.prompt.hash)
                asked = self._advance(request)
            if asked is not None:
                self._advance(request, await ask(self._guards.current, asked, self._tombstones))
        except Exception:
            self._fail(request)

    def _advance(self, request: Request, found: Found | None = None) -> Asked | None:
        """Take a request as far as it goes in one step. Returns what L2 must be asked first, or None if it is decided.

        `found` is the answer of L2. Whatever raises on the way: the request ends with nothing, and nothing stays held.
        """
        try:
            if found is None:
                asked = self._find(request)
                if asked is None:
                    return None
                found = ask_nowait(self._guards.current, asked, self._tombstones)
                if found is None:
                    return asked
            with found:
                if request.task is not None:
                    self._catch_up(request, found)
                self._promise(request, found)
        except Exception:
            self._fail(request)
        return None

    def _fail(self, request: Request) -> None:
        log.exception("request %r failed", request.request_id)
        self._give_up(request, Shortfall.BACKEND_ERROR)

    def _find(self, request: Request) -> Asked | None:
        """Lease what L1 has, and join what is on its way there. Returns what to ask of L2, or None if L1 has it all."""
        layout, hashes = request.prompt.layout, request.hashes
        full = layout.objects.full_mask
        entries = list(map(self._l1.find, hashes))
        self._l1.lease(filter(None, entries))
        request.entries = entries
        incomplete = [n for n, entry in enumerate(entries) if entry is None or entry.present != full]
        if incomplete:
            return Asked(layout, hashes, self._missing(request, hashes, incomplete))
        request.needed = coverage.needed(layout, len(entries))
        self._say_hits(request, len(entries))
        self._finish(request)
        return None

    def _missing(self, request: Request, hashes: Sequence[bytes], incomplete: Sequence[int]) -> dict[int, int]:
        """The objects that are neither in L1 nor on their way there, by chunk; takes shares of what is on its way."""
        full, entries, table = request.prompt.layout.objects.full_mask, request.entries, self._loader.in_flight()
        if not (any(entries) or table):
            return dict.fromkeys(incomplete, full)
        missing = {}
        for number in incomplete:
            lacks, entry, load = full, entries[number], table.get(hashes[number])
            if entry is not None:
                lacks &= ~entry.present
            if load is not None:
                _join(request, number, load)
                lacks &= ~load.wanted
            if lacks:
                missing[number] = lacks
        return missing

    def _catch_up(self, request: Request, found: Found) -> None:
        """Lease and join what has come while L2 was asked.

        A hash that somebody made up may have come with another layout: what was found of it must not get a room beside
        that, and counts as not there.
        """
        hashes, find, table, layout = request.hashes, self._l1.find, self._loader.in_flight(), request.prompt.layout
        others = set()
        for number in found.numbers:
            chunk_hash = hashes[number]
            entry, load = find(chunk_hash), table.get(chunk_hash)
            if entry is not None and request.entries[number] is None:
                if entry.layout.same_bytes(layout):
                    self._l1.lease((entry,))
                    request.entries[number] = entry
                else:
                    others.add(chunk_hash)
            if load is not None:
                if load.layout.same_bytes(layout):
                    _join(request, number, load)
                else:
                    others.add(chunk_hash)
        if others:
            found.leave_out(others)

    def _promise(self, request: Request, found: Found) -> None:
        """Promise a prefix: make sure of it, have the rest loaded, and then say so."""
        hashes, sizes = request.hashes, request.prompt.layout.objects.sizes
        found.touch_prefix(request.prompt.chunk_hashes, request.start_chunk)
        plan = self._planner.plan(request, found)
        joined = {n: mask for n in sorted(request.loads) if (mask := _waits_for(request, n, plan.needed))}
        self._loader.release(request, [hashes[n] for n in request.loads.difference(joined)])
        load_bytes = 0
        for number, waits_for in joined.items():
            shared = waits_for & ~plan.to_load.get(number, 0)
            self._loader.shared_loads += shared.bit_count()
            load_bytes += sizes[shared]
        sources = found.sources(plan.to_load)
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
            shortfall = request.reasons.get(plan.found, Shortfall.BACKEND_ERROR if found.failed else None)
        if plan.to_load:
            self._loader.add(request, hashes, found, sources)
        self._say_hits(request, plan.found, shortfall, load_bytes, expected)
        self._loader.begin_soon()
        if not request.loads:
            self._finish(request)

    # From the promise to the result.

    def arrived(self, request: Request, arrivals: Sequence[Arrival]) -> None:
        """Take note that chunks have arrived, or have not; the last one ends the load.

        Whatever raises here is a fault of this request, and of no other that waits for the same chunks.
        """
        try:
            self._take_note(request, arrivals)
        except Exception:
            self._fail(request)

    def _take_note(self, request: Request, arrivals: Sequence[Arrival]) -> None:
        entries, needed, local = request.entries, request.needed, request.local_mask
        looking_up = request.state is LOOKING_UP
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
        """End the load: keep what can be read, and say how much that is."""
        layout = request.prompt.layout
        shortfall = None
        if request.reasons:
            elsewhere = layout.objects.full_mask & ~request.local_mask
            exists = [(e.present if e is not None else 0) | elsewhere for e in request.entries[: request.length]]
            length = coverage.lengths(layout, exists)[-1]
            if length < request.length:
                shortfall = next((r for n, r in sorted(request.reasons.items()) if n >= length), Shortfall.GONE)
                request.needed = coverage.needed(layout, length)
                request.from_l2 = [number for number in request.from_l2 if number < length]
        if request.reasons or not layout.objects.prefix_mask:
            request.release(self._l1, request.needed)
        self._say_result(request, shortfall)

    def _say_hits(
        self,
        request: Request,
        found: int,
        shortfall: Shortfall | None = None,
        load_bytes: int = 0,
        expected_load_seconds: float | None = 0.0,
    ) -> None:
        length, from_l2 = request.length, len(request.from_l2)
        request.state = LOADING
        request.promised_at = self._loop.time()
        hits = LookupHits(
            request_id=request.request_id,
            start_chunk=request.start_chunk,
            chunks=length,
            tokens=length * request.prompt.layout.chunk_tokens,
            l1_chunks=length - from_l2,
            l2_chunks=from_l2,
            found_chunks=found,
            shortfall=shortfall,
            load_bytes=load_bytes,
            expected_load_seconds=expected_load_seconds,
        )
        if request.hits.resolve(hits) and self._observers.promised:
            notify(self._observers.promised, request.prefetch, hits)

    def _say_result(self, request: Request, shortfall: Shortfall | None) -> None:
        length, from_l2 = request.length, len(request.from_l2)
        request.state = LOADED
        if request.deadline is not None:
            request.deadline.cancel()
        self.requests.loaded(request)
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
        if request.result.resolve(result):
            for count in self._observers.counting:
                count(request.prefetch, result)
            if self._observers.loaded:
                notify(self._observers.loaded, request.prefetch, result)

    # What ends a request before it has loaded.

    def _deadline_passed(self, request: Request) -> None:
        if request.state is LOOKING_UP:
            self._give_up(request, Shortfall.DEADLINE)
        elif request.state is LOADING:
            request.reasons |= dict.fromkeys(request.loads, Shortfall.DEADLINE)
            self._release_loads(request)
            self._finish(request)

    def _give_up(self, request: Request, reason: Shortfall) -> None:
        """Resolve what is pending of a request, with nothing, and let nothing stay held for it."""
        if not request.pending:
            return
        if request.task is not None and request.task is not asyncio.current_task():
            request.task.cancel()
        self._release_loads(request)
        rooms, request.rooms = request.rooms, ()
        self._l1.discard([reservation for _, reservation in rooms])
        request.needed = request.from_l2 = ()
        request.release(self._l1)
        if request.state is LOOKING_UP:
            self._say_hits(request, 0, reason)
        self._say_result(request, reason)

    def _release_loads(self, request: Request) -> None:
        numbers, request.loads = request.loads, set()
        if numbers:
            hashes = request.hashes
            self._loader.release(request, [hashes[number] for number in numbers])

    def check_integrity(self) -> None:
        """Assert that the shares of loads are those of the requests."""
        self.requests.check_integrity()
        table = self._loader.in_flight()
        for request in self.requests:
            hashes = request.hashes
            assert all(request in table[hashes[number]].shares for number in request.loads)


def _join(request: Request, number: int, load: ChunkLoad) -> None:
    request.loads.add(number)
    load.shares[request] = number


def _waits_for(request: Request, number: int, needed: Sequence[int]) -> int:
    """The objects of a chunk that are needed and not in L1 yet."""
    entry = request.entries[number]
    mask = needed[number] & request.local_mask if number < len(needed) else 0
    return mask & ~entry.present if entry is not None else mask
