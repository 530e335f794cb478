"""The whole way of a prefetch: find in L1, ask L2, promise (`lookup_done`), load, hand over (`load_done`).

`PrefetchController` owns the requests. What it decides, it decides in one step of the loop: what is promised is leased
in L1, or pinned in L2 with room reserved for it, before anybody else gets a turn.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from itertools import count
from typing import NamedTuple

from async_cache import coverage
from async_cache.config import CacheConfig
from async_cache.errors import CacheClosedError, ReadConflictError, RequestConflictError, UnknownRequestError
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard
from async_cache.layout import Prompt, check_index
from async_cache.loads import ChunkLoad, Loader
from async_cache.lookup import Asked, Found, ask
from async_cache.promise import Promise
from async_cache.removal import Hidden
from async_cache.sweeper import Sweeper
from async_cache.values import LoadResult, LookupHits, Shortfall

log = logging.getLogger(__name__)


class RequestState(Enum):
    """LOOKING_UP -> LOADING -> LOADED -> CLAIMED (by a query or a read) -> OVER; each may go to OVER at once.

    LOOKING_UP and LOADING go to LOADED, with nothing, when the request is cancelled.
    """

    LOOKING_UP = "looking up"
    LOADING = "loading"
    LOADED = "loaded"
    CLAIMED = "claimed"
    OVER = "over"


class Prefetch:
    """One request: a lookup and a load, each with its future."""

    def __init__(
        self, controller: "PrefetchController", request_id: str, prompt: Prompt, start_chunk: int, ranks: Sequence[int]
    ):
        self.request_id = request_id
        self._controller = controller
        self._prompt = prompt
        self._start_chunk = start_chunk
        self._ranks = ranks
        self._local_mask = sum(prompt.layout.rank_masks[rank] for rank in ranks)  # the objects to load here
        self._began = controller.loop.time()
        self._state = RequestState.LOOKING_UP
        self._hits: Promise[LookupHits] = Promise()
        self._result: Promise[LoadResult] = Promise()
        self._task: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._entries: list[Entry | None] = []  # leased, by chunk
        self._loads: dict[int, ChunkLoad] = {}  # shares, by chunk
        self._from_l2: list[int] = []  # chunks, ascending
        self._reasons: dict[int, Shortfall] = {}  # by chunk
        self._length = 0  # chunks promised, and once loaded, readable
        self._needed: Sequence[int] = ()  # by chunk, the objects that can be read
        self._claimed = False
        self._readers: set[tuple[int, int]] = set()  # entered at some time
        self._inside = 0  # entered and not left

    @property
    def lookup_done(self) -> "asyncio.Future[LookupHits]":
        """How much is cached. Each access gives a future of the caller's own."""
        return self._hits.future()

    @property
    def load_done(self) -> "asyncio.Future[LoadResult]":
        """That it is in memory. Each access gives a future of the caller's own."""
        return self._result.future()

    def cancel(self) -> None:
        """Stop looking up and loading; both futures resolve. Does nothing once it has loaded."""
        self._controller.cancel(self)

    def load_settled(self, load: ChunkLoad, number: int, entry: Entry | None) -> None:
        """A chunk has arrived, or not."""
        self._controller.load_settled(self, load, number, entry)

    def _hashes(self) -> list[bytes]:
        return self._prompt.chunk_hashes[self._start_chunk :]

    def __repr__(self) -> str:
        return f"<Prefetch {self.request_id!r}, {self._state.value}>"


class Plan(NamedTuple):
    """A prefix that can be promised: what it needs of each chunk, and what must be loaded for it, in which room."""

    length: int
    needed: Sequence[int]
    to_load: dict[int, int]
    reservations: dict[int, list[Reservation]]


class PrefetchController:
    """All requests, from `start` until they are over."""

    def __init__(
        self, l1: L1Store, guards: Sequence[Guard], loader: Loader, sweeper: Sweeper, hidden: Hidden, config: CacheConfig
    ):
        self.loop = asyncio.get_running_loop()
        self.requests: dict[str, Prefetch] = {}
        self.results = sweeper.expiry(config.result_ttl_seconds, self._end)
        self.leases = sweeper.expiry(config.lease_ttl_seconds, self._end)
        self._l1 = l1
        self._guards = guards
        self._loader = loader
        self._hidden = hidden
        self._config = config
        self._ids = count(1)
        self._tasks: set[asyncio.Task[None]] = set()

    # The way of a request.

    def start(
        self, prompt: Prompt, request_id: str | None, start_chunk: int, ranks: Sequence[int], deadline_seconds: float | None
    ) -> Prefetch:
        """Begin, or return the one that runs under this id. What needs no I/O is done on return."""
        if request_id is None:
            request_id = next(i for n in self._ids if (i := f"prefetch-{n}") not in self.requests)
        known = self.requests.get(request_id)
        if known is not None:
            same = known._start_chunk == start_chunk and known._ranks == ranks and known._prompt.same_as(prompt)
            if same and not known._claimed:
                return known
            raise RequestConflictError(f"request {request_id!r} is in use{'' if same else ' for another prompt'}")
        request = Prefetch(self, request_id, prompt, start_chunk, ranks)
        self.requests[request_id] = request
        if prompt.hashed and self._find_in_l1(request):
            return request
        if deadline_seconds is not None:
            request._deadline = self.loop.call_later(deadline_seconds, self._deadline_passed, request)
        request._task = self.loop.create_task(self._look_up(request))
        self._tasks.add(request._task)
        request._task.add_done_callback(self._tasks.discard)
        return request

    def _find_in_l1(self, request: Prefetch) -> bool:
        """Lease what L1 has; if that is all there can be, the request is done."""
        get, lease = self._l1.index.get, self._l1.lease
        full = request._prompt.layout.full_mask
        entries, incomplete = request._entries, []
        for number, chunk_hash in enumerate(request._hashes()):
            entry = get(chunk_hash)
            if entry is not None:
                lease(entry)
            if entry is None or entry.present != full:
                incomplete.append((number, chunk_hash))
            entries.append(entry)
        for number, chunk_hash in incomplete:
            load = self._loader.find(chunk_hash)
            if load is not None:
                self._join(request, number, load)
        if incomplete and self._guards and self._missing(request):
            return False
        if incomplete:
            self._decide(request, None)
        else:
            self._say_hits(request, len(entries), len(entries), None, 0)
            self._finish(request)
        return True

    async def _look_up(self, request: Prefetch) -> None:
        try:
            if not request._prompt.hashed:
                await asyncio.to_thread(request._prompt.hash)
                if self._find_in_l1(request):
                    return
            asked = Asked(request._prompt.layout, self._missing(request))
            found = await ask(self._guards, asked, self._config.lookup_timeout_seconds)
            try:
                self._decide(request, found)
            finally:
                found.close()
        except Exception:
            log.exception("request %r failed", request.request_id)
            self._give_up(request, Shortfall.BACKEND_ERROR)

    def _missing(self, request: Prefetch) -> list[tuple[int, bytes, int]]:
        """(number, chunk hash, objects) of what is neither in L1 nor on its way there."""
        full, loads = request._prompt.layout.full_mask, request._loads
        missing = []
        for number, (chunk_hash, entry) in enumerate(zip(request._hashes(), request._entries, strict=True)):
            lacks = full if entry is None else full & ~entry.present
            if lacks and number in loads:
                lacks &= ~loads[number].wanted
            if lacks:
                missing.append((number, chunk_hash, lacks))
        return missing

    def _decide(self, request: Prefetch, found: Found | None) -> None:
        """Promise a prefix, make sure of it, say so, and have the rest loaded: one step."""
        layout, hashes = request._prompt.layout, request._hashes()
        have = self._have(request, hashes, found)
        served = coverage.lengths(layout, have)
        plan = self._plan(request, hashes, served)
        self._release(request, plan.needed)
        for number, mask in plan.to_load.items():
            sources = found.take(number, mask) if found is not None else ()
            load = self._loader.add(hashes[number], layout, plan.reservations.get(number, ()), sources)
            self._join(request, number, load)
        shortfall = None
        if plan.length < served[-1]:
            shortfall = Shortfall.MEMORY
        elif served[-1] < len(hashes):
            failed = found is not None and found.failed
            shortfall = request._reasons.get(served[-1], Shortfall.BACKEND_ERROR if failed else None)
        load_bytes = self._keep_loads(request, plan)
        self._say_hits(request, plan.length, served[-1], shortfall, load_bytes)
        self._loader.submit()
        if not request._loads:
            self._finish(request)

    def _have(self, request: Prefetch, hashes: Sequence[bytes], found: Found | None) -> list[int]:
        """By chunk, the objects that are in L1, on their way there, or found in L2."""
        full, have = request._prompt.layout.full_mask, []
        for number, chunk_hash in enumerate(hashes):
            entry = request._entries[number]
            if entry is None and found is not None and (entry := self._l1.index.get(chunk_hash)) is not None:
                self._l1.lease(entry)  # it came while L2 was asked
                request._entries[number] = entry
            objects = entry.present if entry is not None else 0
            if objects != full:
                load = self._loader.find(chunk_hash)
                if load is not None:
                    self._join(request, number, load)
                    objects |= load.wanted
                if found is not None and chunk_hash not in self._hidden:
                    objects |= found.mask(number)
            have.append(objects)
        return have

    def _join(self, request: Prefetch, number: int, load: ChunkLoad) -> None:
        request._loads[number] = load
        self._loader.join(load, request, number)

    def _plan(self, request: Prefetch, hashes: Sequence[bytes], served: Sequence[int]) -> Plan:
        """The longest prefix for which L1 can make room, and that room."""
        layout = request._prompt.layout
        share = int(self._l1.arena.size_bytes * self._config.prefetch_share)
        length = served[-1]
        while True:
            needed = coverage.needed(layout, length)
            to_load = {n: lacks for n in range(length) if (lacks := self._lacks(request, n, needed[n]))}
            blocks = [(n, rank) for n, lacks in to_load.items() for rank in self._ranks_without_room(request, n, lacks)]
            room = min(self._l1.available_bytes, share - self._loader.room_bytes)
            fitting = 0
            for _, rank in blocks:
                room -= layout.room_bytes[rank]
                if room < 0:
                    break
                fitting += 1
            if fitting == len(blocks):
                made = self._l1.reserve(layout, [(hashes[n], rank) for n, rank in blocks])
                if len(made) == len(blocks):
                    break
                fitting = len(made)  # memory is fragmented
                for reservation in made:
                    self._l1.discard(reservation)
            length = coverage.largest(served, blocks[fitting][0])
        reservations: dict[int, list[Reservation]] = {}
        for (number, _), reservation in zip(blocks, made, strict=True):
            reservations.setdefault(number, []).append(reservation)
        for number, lacks in to_load.items():
            entry = request._entries[number]
            if entry is not None:
                within = [r for r in self._ranks(request, lacks) if entry.ranks >> r & 1]
                reservations.setdefault(number, []).extend(self._l1.reserve_within(entry, r) for r in within)
        return Plan(length, needed, to_load, reservations)

    @staticmethod
    def _lacks(request: Prefetch, number: int, needed: int) -> int:
        """The needed objects of a chunk that are neither in L1 nor on their way there."""
        entry, load = request._entries[number], request._loads.get(number)
        lacks = needed & request._local_mask
        if entry is not None:
            lacks &= ~entry.present
        if load is not None:
            lacks &= ~load.wanted
        return lacks

    def _ranks_without_room(self, request: Prefetch, number: int, mask: int) -> list[int]:
        entry, load = request._entries[number], request._loads.get(number)
        ranks = self._ranks(request, mask)
        if entry is not None:
            ranks = [rank for rank in ranks if not entry.ranks >> rank & 1]
        if load is not None:
            ranks = [rank for rank in ranks if rank not in load.room.reservations]
        return ranks

    @staticmethod
    def _ranks(request: Prefetch, mask: int) -> list[int]:
        return sorted({rank for rank, _ in request._prompt.layout.objects(mask)})

    def _keep_loads(self, request: Prefetch, plan: Plan) -> int:
        """Keep the shares that the promise needs, give back the others; the bytes of those kept."""
        layout, load_bytes, spare = request._prompt.layout, 0, []
        for number, load in list(request._loads.items()):
            waits = plan.needed[number] & request._local_mask if number < plan.length else 0
            entry = request._entries[number]
            if entry is not None:
                waits &= ~entry.present
            if waits:
                self._loader.shared_loads += (waits & ~plan.to_load.get(number, 0)).bit_count()
                load_bytes += layout.mask_bytes(waits)
                request._from_l2.append(number)
            else:
                spare.append(request._loads.pop(number))
        self._loader.leave(request, spare)
        return load_bytes

    async def count(self, prompt: Prompt) -> LookupHits:
        """How much of a prompt is cached; nothing is leased, pinned or loaded."""
        if not prompt.hashed:
            await asyncio.to_thread(prompt.hash)
        layout, hashes, index = prompt.layout, prompt.chunk_hashes, self._l1.index
        resident = [entry.present if (entry := index.get(h)) is not None else 0 for h in hashes]
        coming = [0 if (load := self._loader.find(h)) is None else load.wanted for h in hashes]
        lacks = [layout.full_mask & ~(r | c) for r, c in zip(resident, coming, strict=True)]
        missing = [(number, hashes[number], mask) for number, mask in enumerate(lacks) if mask]
        if not missing or not self._guards:
            found = Found(Asked(layout, ()), (), failed=False)
        else:
            found = await ask(self._guards, Asked(layout, missing), self._config.lookup_timeout_seconds)
        try:
            lent = [0 if h in self._hidden else found.mask(number) for number, h in enumerate(hashes)]
            have = [r | c | f for r, c, f in zip(resident, coming, lent, strict=True)]
            length = coverage.lengths(layout, have)[-1]
            needed = coverage.needed(layout, length)
            to_load = {n: mask for n in range(length) if (mask := needed[n] & ~resident[n])}
            from_guard: Counter[Guard] = Counter()
            for number, mask in to_load.items():
                for guard, part in found.sources(number, mask):
                    from_guard[guard] += layout.mask_bytes(part)
        finally:
            found.close()
        expected = [guard.expected_load_seconds(size) for guard, size in from_guard.items()]
        known = [seconds for seconds in expected if seconds is not None]
        return LookupHits(
            request_id="",
            start_chunk=0,
            chunks=length,
            tokens=length * layout.chunk_tokens,
            l1_chunks=length - len(to_load),
            l2_chunks=len(to_load),
            found_chunks=length,
            shortfall=Shortfall.BACKEND_ERROR if length < len(hashes) and found.failed else None,
            load_bytes=sum(map(layout.mask_bytes, to_load.values())),
            expected_load_seconds=max(known, default=0.0) if len(known) == len(expected) else None,
        )

    def load_settled(self, request: Prefetch, load: ChunkLoad, number: int, entry: Entry | None) -> None:
        """A chunk has arrived, or not; the last one ends the load."""
        del request._loads[number]
        held = request._entries[number]
        if entry is not None and entry is not held:
            self._l1.lease(entry)
            request._entries[number] = entry
            if held is not None:
                self._l1.release(held)
        if load.failure is not None:
            request._reasons[number] = load.failure
        if not request._loads and request._state is RequestState.LOADING:
            self._finish(request)

    def _finish(self, request: Prefetch) -> None:
        """The load is over: keep what can be read, say how much."""
        layout, local = request._prompt.layout, request._local_mask
        length = request._length
        shortfall = None
        if request._reasons:
            have = [(e.present if e is not None else 0) | layout.full_mask & ~local for e in request._entries[:length]]
            length = coverage.lengths(layout, have)[-1]
            if length < request._length:
                shortfall = next((r for n, r in sorted(request._reasons.items()) if n >= length), Shortfall.GONE)
        request._needed = coverage.needed(layout, length)
        self._release(request, request._needed)
        self._say_result(request, length, shortfall)

    # Saying it.

    def _say_hits(self, request: Prefetch, length: int, found: int, shortfall: Shortfall | None, load_bytes: int) -> None:
        request._state = RequestState.LOADING
        request._length = length
        request._hits.resolve(
            LookupHits(
                request_id=request.request_id,
                start_chunk=request._start_chunk,
                chunks=length,
                tokens=length * request._prompt.layout.chunk_tokens,
                l1_chunks=length - len(request._from_l2),
                l2_chunks=len(request._from_l2),
                found_chunks=found,
                shortfall=shortfall,
                load_bytes=load_bytes,
                expected_load_seconds=self._loader.expected_seconds(request._loads.values()),
            )
        )

    def _say_result(self, request: Prefetch, length: int, shortfall: Shortfall | None) -> None:
        from_l2 = sum(number < length for number in request._from_l2)
        request._state = RequestState.LOADED
        request._length = length
        if request._deadline is not None:
            request._deadline.cancel()
        self.results.add(request)
        request._result.resolve(
            LoadResult(
                request_id=request.request_id,
                start_chunk=request._start_chunk,
                chunks=length,
                tokens=length * request._prompt.layout.chunk_tokens,
                l1_chunks=length - from_l2,
                l2_chunks=from_l2,
                shortfall=shortfall,
                seconds=self.loop.time() - request._began,
            )
        )

    # What its caller does with a request.

    async def query_lookup_hits(self, request_id: str) -> LookupHits:
        """The promise, once it is made."""
        request = self._unclaimed(request_id)
        hits = await request._hits.wait()
        if hits.shortfall is Shortfall.CANCELLED and request._state is RequestState.OVER:
            raise UnknownRequestError(f"request {request_id!r} was ended")
        return hits

    async def query_status(self, request_id: str) -> LoadResult:
        """The result, once it is there, to the first who asks."""
        request = self._unclaimed(request_id)
        result = await request._result.wait()
        if request._claimed or request._state is RequestState.OVER:
            raise UnknownRequestError(f"request {request_id!r} was claimed or ended")
        request._claimed = True
        if result.chunks:
            self._use(request)
        else:
            self._end(request)
        return result

    async def enter(self, request_id: str, rank: int, reader: int) -> Prefetch:
        """Begin to read, once the load is done."""
        request = self._known(request_id)
        layout = request._prompt.layout
        check_index("rank", rank, layout.world_size)
        check_index("reader", reader, layout.readers_per_rank)
        if rank not in request._ranks:
            raise ValueError(f"rank {rank} is not among the ranks {request._ranks} of request {request_id!r}")
        await request._result.wait()
        if request._state is RequestState.OVER:
            raise UnknownRequestError(f"request {request_id!r} was ended")
        if (rank, reader) in request._readers:
            raise ReadConflictError(f"rank {rank}, reader {reader} has read request {request_id!r} already")
        request._readers.add((rank, reader))
        request._inside += 1
        self._use(request)
        return request

    def leave(self, request: Prefetch) -> None:
        """One reader has left; the last of all ends the request."""
        request._inside -= 1
        everybody = len(request._ranks) * request._prompt.layout.readers_per_rank
        if request._state is RequestState.OVER:
            self._release_if_left(request)
        elif not request._inside and len(request._readers) == everybody:
            self._end(request)

    def renew(self, request_id: str) -> None:
        """Its time begins anew."""
        request = self._known(request_id)
        if request in self.results:
            self.results.add(request)
        elif request in self.leases:
            self.leases.add(request)

    def cancel(self, request: Prefetch) -> None:
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
            request._hits.break_with(error)
            request._result.break_with(error)
            self._end(request)
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _known(self, request_id: str) -> Prefetch:
        request = self.requests.get(request_id)
        if request is None:
            raise UnknownRequestError(f"there is no request {request_id!r}")
        return request

    def _unclaimed(self, request_id: str) -> Prefetch:
        request = self._known(request_id)
        if request._claimed:
            raise UnknownRequestError(f"request {request_id!r} was claimed")
        return request

    # How requests end.

    def _use(self, request: Prefetch) -> None:
        request._state = RequestState.CLAIMED
        self.results.discard(request)
        self.leases.add(request)

    def _deadline_passed(self, request: Prefetch) -> None:
        if request._state is RequestState.LOOKING_UP:
            self._give_up(request, Shortfall.DEADLINE)
        elif request._state is RequestState.LOADING:
            request._reasons |= dict.fromkeys(request._loads, Shortfall.DEADLINE)
            self._leave_loads(request)
            self._finish(request)

    def _give_up(self, request: Prefetch, reason: Shortfall) -> None:
        """Resolve what is pending with nothing."""
        if request._state not in (RequestState.LOOKING_UP, RequestState.LOADING):
            return
        if request._task is not None and request._task is not asyncio.current_task():
            request._task.cancel()
        self._leave_loads(request)
        self._release(request, ())
        if request._state is RequestState.LOOKING_UP:
            request._from_l2.clear()
            self._say_hits(request, 0, 0, reason, 0)
        self._say_result(request, 0, reason)

    def _end(self, request: Prefetch) -> None:
        self._give_up(request, Shortfall.CANCELLED)
        if request._state is not RequestState.OVER:
            request._state = RequestState.OVER
            del self.requests[request.request_id]
            self.results.discard(request)
            self.leases.discard(request)
            self._release_if_left(request)

    def _release_if_left(self, request: Prefetch) -> None:
        if not request._inside:
            self._release(request, ())

    def _leave_loads(self, request: Prefetch) -> None:
        loads = list(request._loads.values())
        request._loads.clear()
        self._loader.leave(request, loads)

    def _release(self, request: Prefetch, needed: Sequence[int]) -> None:
        """Give back the leases of chunks of which nothing is needed: the tail first, to be evicted first."""
        entries = request._entries
        for number in range(len(entries) - 1, -1, -1):
            entry = entries[number]
            if entry is not None and not (number < len(needed) and needed[number]):
                entries[number] = None
                self._l1.release(entry)
        if not needed and request._start_chunk:  # what the engine holds comes before what it asked for
            self._l1.touch(reversed(request._prompt.chunk_hashes[: request._start_chunk]))

    def check_integrity(self) -> None:
        """Leases, shares and expiries are those of the requests."""
        for request in self.requests.values():
            state = request._state
            assert state is not RequestState.OVER
            assert (request in self.results) == (state is RequestState.LOADED)
            assert (request in self.leases) == (state is RequestState.CLAIMED)
            assert state in (RequestState.LOOKING_UP, RequestState.LOADING) or not request._loads
            assert all(request in load.shares for load in request._loads.values())
