"""The whole way of a prefetch: find in L1, ask L2, promise (`lookup_done`), load, hand over (`load_done`).

What is decided, is decided in one step of the loop: what is promised is leased in L1, or pinned in L2 with room
reserved for it, before anybody else gets a turn.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

from async_cache.aio.sweeper import Sweeper
from async_cache.config import CacheConfig
from async_cache.handles.prefetch import Prefetch
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guard.guards import Guards
from async_cache.l2.tombstones import Tombstones
from async_cache.observe import Observers, notify
from async_cache.prompt import coverage
from async_cache.prompt.layout import Prompt
from async_cache.read.load import ChunkLoad
from async_cache.read.loads import Arrival, Loader
from async_cache.read.lookup import Found, Sources, ask
from async_cache.read.plan import Plan, Planner
from async_cache.read.request import LOADED, LOADING, LOOKING_UP, Request
from async_cache.read.requests import Requests
from async_cache.read.search import Search
from async_cache.values import LoadResult, LookupHits, Shortfall

log = logging.getLogger(__name__)

_LOOKED_UP_AT_ONCE = 8192  # chunks in L1, or objects in L2, in a step of the loop: a millisecond or two
_CAUGHT_UP_AT_ONCE = 4096  # chunks
_Wait = Callable[[], Awaitable[object]]
"""What to wait for between two steps."""
_turn = partial(asyncio.sleep, 0)


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
        if not (prompt.hashed and self._is_all_in_l1(request)):
            self._look_up(request)
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

    def _is_all_in_l1(self, request: Request) -> bool:
        """Decide a request of which L1 has everything, in the shortest way; whether that is so."""
        hashes, find = request.hashes, self._l1.find
        if not hashes or find(hashes[-1]) is None or len(hashes) > _LOOKED_UP_AT_ONCE:
            return False
        try:
            layout = request.prompt.layout
            full = layout.objects.full_mask
            entries = [entry for entry in map(find, hashes) if entry is not None and entry.present == full]
            if len(entries) < len(hashes):
                return False
            self._l1.lease(entries)
            request.entries = [*entries]
            self._say_all(request)
        except Exception:
            self._fail(request)
        return True

    def _say_all(self, request: Request) -> None:
        """Promise and have loaded what L1 has."""
        request.needed = coverage.needed(request.prompt.layout, len(request.entries))
        self._say_hits(request, len(request.entries))
        self._finish(request)

    def _look_up(self, request: Request) -> None:
        steps = self._steps(request)
        wait = self._step(request, steps)
        if wait is not None:
            request.task = self._loop.create_task(self._go_on(request, steps, wait))
            self._tasks.add(request.task)
            request.task.add_done_callback(self._tasks.discard)

    async def _go_on(self, request: Request, steps: Iterator[_Wait], wait: _Wait | None) -> None:
        """Take a request from step to step until it is decided, and wait in between for what it says."""
        try:
            while wait is not None:
                await wait()
                wait = self._step(request, steps)
        except Exception:
            self._fail(request)

    def _step(self, request: Request, steps: Iterator[_Wait]) -> _Wait | None:
        """Take a request one step further; what to wait for before the next, or None if it is decided.

        Whatever raises on the way: the request ends with nothing, and nothing stays held.
        """
        try:
            wait = next(steps, None)
            if wait is not None and request.search is not None:
                request.search.wait()
            return wait
        except Exception:
            self._fail(request)
        return None

    def _fail(self, request: Request) -> None:
        log.exception("request %r failed", request.request_id)
        self._give_up(request, Shortfall.BACKEND_ERROR)

    def _steps(self, request: Request) -> Iterator[_Wait]:
        """Decide what is promised: in one step, unless something has to be waited for, or it is very much.

        All that is held between two steps is the request's, which may end at each of them.
        """
        if not request.prompt.hashed:
            yield partial(asyncio.to_thread, request.prompt.hash)
        layout, hashes = request.prompt.layout, request.hashes
        request.search = search = Search(layout, hashes, self._guards.current, self._tombstones)
        for _ in self._find(request, search):
            yield _turn
        if search.found is None:
            yield partial(self._ask, search)
        elif not (search.asked.masks or request.loads):
            self._close_search(request)
            self._say_all(request)
            return
        assert search.found is not None
        yield from self._promise(request, search, search.found)

    async def _ask(self, search: Search) -> None:
        search.found = await ask(self._guards.current, search.asked, self._tombstones)

    def _find(self, request: Request, search: Search) -> Iterator[None]:
        """Lease what L1 has, join what is on its way there, and ask what L2 has at hand; each step is bounded."""
        hashes, find, entries = request.hashes, self._l1.find, request.entries
        full, left = request.prompt.layout.objects.full_mask, _LOOKED_UP_AT_ONCE
        for begin, end in search.parts():
            if left <= 0:
                yield
                left = _LOOKED_UP_AT_ONCE
            some = list(map(find, hashes[begin:end]))
            self._l1.lease(filter(None, some))
            entries += some
            left -= end - begin
            incomplete = [n for n, entry in enumerate(some, begin) if entry is None or entry.present != full]
            if incomplete:
                search.ask(self._missing(request, hashes, incomplete))
                left -= len(incomplete) * full.bit_count()

    def _missing(self, request: Request, hashes: Sequence[bytes], incomplete: Sequence[int]) -> dict[int, int]:
        """The objects that are neither in L1 nor on their way there, by chunk; takes shares of what is on its way."""
        full, entries, table = request.prompt.layout.objects.full_mask, request.entries, self._loader.in_flight()
        if not (table or any(map(entries.__getitem__, incomplete))):
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

    def _catch_up(self, request: Request, search: Search, found: Found, numbers: Collection[int]) -> None:
        """Lease and join what has come of these chunks while others had their turn, and forget what was deleted.

        A hash that somebody made up may have come with another layout: what was found of it must not get a room beside
        that, and counts as not there.
        """
        hashes, find, table, layout = request.hashes, self._l1.find, self._loader.in_flight(), request.prompt.layout
        search.leave_out_removed(numbers)
        others = set()
        for number in numbers:
            chunk_hash = hashes[number]
            entry, load = find(chunk_hash), table.get(chunk_hash)
            if entry is not None and request.entries[number] is None:
                if entry.layout.same_bytes(layout):
                    self._l1.lease((entry,))
                    request.entries[number] = entry
                else:
                    others.add(number)
            if load is not None:
                if load.layout.same_bytes(layout):
                    _join(request, number, load)
                else:
                    others.add(number)
        if others:
            found.leave_out([hashes[number] for number in others], others)

    def _promise(self, request: Request, search: Search, found: Found) -> Iterator[_Wait]:
        """Promise a prefix: make sure of it, have the rest loaded, and then say so.

        Of very much, what has its room is handed to the loader while that of the rest is made.
        """
        for _ in found.touch_prefix(request.prompt.chunk_hashes, request.start_chunk):
            yield _turn
        if request.task is not None:
            asked = iter(list(search.asked.masks))
            while some := list(islice(asked, _CAUGHT_UP_AT_ONCE)):
                self._catch_up(request, search, found, some)
                if len(some) == _CAUGHT_UP_AT_ONCE:
                    yield _turn
        plan = self._planner.plan(request, found)
        joined, loaded = set(request.loads), dict[int, int]()
        while True:
            to_load = self._planner.reserve(request, plan)
            sources = found.sources(to_load)
            if not plan.to_load:
                break
            loaded |= to_load
            self._load(request, found, sources, to_load)
            yield _turn
            self._catch_up(request, search, found, self._planner.next(request, plan))
            self._planner.look_again(request, found, plan)
        self._decide(request, found, plan, to_load, sources, loaded)
        if loaded:
            _note_what_fell_short(request, joined.union(loaded))
        self._close_search(request)
        if not request.loads:
            self._finish(request)

    def _load(self, request: Request, found: Found, sources: Sources, to_load: Mapping[int, int]) -> None:
        """Hand what has its room to the loader."""
        if to_load:
            self._loader.add(request, request.hashes, found, sources)
            request.loads.update(to_load)
            self._loader.begin_soon()

    def _decide(
        self,
        request: Request,
        found: Found,
        plan: Plan,
        to_load: Mapping[int, int],
        sources: Sources,
        loaded: Mapping[int, int],
    ) -> None:
        """Say what is promised: all that is needed is in L1, on its way (`loaded`), or to be loaded from `sources`."""
        hashes, sizes = request.hashes, request.prompt.layout.objects.sizes
        waits = {n: mask for n in sorted(request.loads) if (mask := _waits_for(request, n, plan.needed))}
        self._loader.release(request, [hashes[n] for n in request.loads.difference(waits)])
        source_bytes = [(guard, sum([sizes[mask] for mask in masks.values()])) for guard, masks in sources if masks]
        load_bytes = sum(size for _, size in source_bytes)
        load_bytes += sum(sizes[mask] for number, mask in loaded.items() if number < plan.length)
        for number, waits_for in waits.items():
            shared = waits_for & ~to_load.get(number, 0) & ~loaded.get(number, 0)
            self._loader.shared_loads += shared.bit_count()
            load_bytes += sizes[shared]
        expected = self._loader.expected_seconds([hashes[n] for n in waits], source_bytes)
        request.release(self._l1, plan.needed)
        request.needed = plan.needed
        request.loads = set(waits)
        request.from_l2 = sorted(request.loads.union(to_load, [n for n in loaded if n < plan.length]))
        shortfall = None
        if plan.length < plan.found:
            shortfall = Shortfall.MEMORY
        elif plan.found < len(hashes):
            shortfall = request.reasons.get(plan.found, Shortfall.BACKEND_ERROR if found.failed else None)
        self._load(request, found, sources, to_load)
        self._say_hits(request, plan.found, shortfall, load_bytes, expected)

    def _close_search(self, request: Request) -> None:
        search, request.search = request.search, None
        if search is not None:
            search.close()

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
        if request.result.resolve(result) and self._observers.loaded:
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
        self._close_search(request)
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


def _note_what_fell_short(request: Request, loaded: Iterable[int]) -> None:
    """Of what has arrived before the promise was made, note what is not there as it was to be."""
    for number in set(loaded) - request.loads:
        if _waits_for(request, number, request.needed):
            request.reasons.setdefault(number, Shortfall.GONE)


def _waits_for(request: Request, number: int, needed: Sequence[int]) -> int:
    """The objects of a chunk that are needed and not in L1 yet."""
    entry = request.entries[number]
    mask = needed[number] & request.local_mask if number < len(needed) else 0
    return mask & ~entry.present if entry is not None else mask
