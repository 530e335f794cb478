"""L2 -> L1: each object is loaded once, however many requests want it.

Requests hold shares of the loads that they want (see `load.ChunkLoad`). A failed object tries the next holder before
its chunk falls short. The room of a chunk is freed only when no call touches it any more.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

from async_cache.aio.backlog import Backlog
from async_cache.config import CacheConfig
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.guard import Guard
from async_cache.l2.guard.guards import Guards
from async_cache.l2.guard.meter import expected_load_seconds
from async_cache.l2.tombstones import Tombstones
from async_cache.read.batches import Batch, Batches, Objects
from async_cache.read.load import ChunkLoad, LoadState
from async_cache.read.lookup import Asked, Found, Sources, ask
from async_cache.read.request import Request
from async_cache.values import Shortfall

_RELEASED_AT_ONCE = 512  # loads, in a few milliseconds; then the loop gets its turn
_SETTLED_AT_ONCE = 512  # loads that are committed, or ...
_TOLD_AT_ONCE = 4096  # ... shares, in two milliseconds; then the loop gets its turn
Arrival = tuple[int, Entry | None, Shortfall | None]
"""The number of a chunk, what can be found of it, and why that may be less than was wanted."""
Settled = tuple[ChunkLoad, Entry | None]
"""A load, and where what it brought can be found."""
_Rooms = Sequence[tuple[int, Reservation]]
_NOTHING_LOST: tuple[int, Shortfall | None] = (0, None)
_REASONS = {LoadOutcome.GONE: Shortfall.GONE, LoadOutcome.CORRUPT: Shortfall.CORRUPT}
_WAITING, _SETTLED, _DROPPED, _REPLACED = LoadState  # each access to a member by its enum is a call, in Python 3.11


class Loader:
    """Everything that is on its way from L2 to L1.

    `arrived` hears of what has come for a request, and what has not, and `settled` of each load that has ended.
    """

    def __init__(
        self,
        l1: L1Store,
        guards: Guards,
        tombstones: Tombstones,
        config: CacheConfig,
        arrived: Callable[[Request, Sequence[Arrival]], None],
        settled: Callable[[Iterable[Settled]], None] = lambda loads: None,
    ):
        self.shared_loads = 0
        """Objects that a request did not have to load because another one did."""
        self.occupied: set[tuple[Entry, int]] = set()
        """(entry, rank) of the blocks in L1 to which a call that was given up may still write."""
        self._l1 = l1
        self._guards = guards
        self._tombstones = tombstones
        self._arrived = arrived
        self._settled = settled
        self._batches = Batches(
            l1.arena.view,
            config.load_inflight_bytes,
            transferred=self._transferred,
            failed=self._failed,
            call_ended=self._discard_untouched,
            loaded=self._loaded,
        )
        self._table: dict[bytes, ChunkLoad] = {}
        self._reserved_bytes = 0
        self._added: list[tuple[Request, Sequence[bytes], _Rooms, Sources]] = []
        self._backlog = Backlog(_RELEASED_AT_ONCE)
        l1.rooms.add_backlog(self._backlog)
        self._loop = asyncio.get_running_loop()

    @property
    def loads(self) -> int:
        """Objects that were asked of backends so far."""
        return self._batches.objects

    # What a request does: look at what is on its way, add to it, join, release.

    def in_flight(self) -> dict[bytes, ChunkLoad]:
        """Begin what was added, and return what is on its way, by chunk hash."""
        if self._added:
            self._begin_added()
        return self._table

    def reserved_bytes(self) -> int:
        """The part of L1 that is reserved for what is on its way."""
        self.in_flight()
        return self._reserved_bytes

    def add(self, request: Request, hashes: Sequence[bytes], found: Found, sources: Sources) -> None:
        """Load objects for a request from sources that were found; takes over their pins, and the request's rooms.

        The work begins when somebody looks at what is on its way, or after `begin_soon`.
        """
        found.take(sources)
        rooms, request.rooms = request.rooms, ()
        self._added.append((request, hashes, rooms, sources))

    def begin_soon(self) -> None:
        """Begin what was added in the loop's next turn, after those who wait for the answer have theirs."""
        if self._added:
            self._loop.call_soon(self.in_flight)

    def _begin_added(self) -> None:
        added, self._added = self._added, []
        table = self._table
        for request, hashes, rooms, sources in added:
            layout, first_parent = request.prompt.layout, request.before(0)
            for number, reservation in rooms:
                chunk_hash, size = hashes[number], reservation.size_bytes
                load = table.get(chunk_hash)
                if load is None:
                    parent = hashes[number - 1] if number else first_parent
                    table[chunk_hash] = ChunkLoad(chunk_hash, layout, [reservation], {request: number}, size, parent)
                else:
                    load.reservations.append(reservation)
                    load.room_bytes += size
                    load.shares[request] = number
                self._reserved_bytes += size
            for guard, masks in sources:
                parts = [(table[hashes[number]], mask) for number, mask in masks.items()]
                self._batches.enqueue(guard, parts, frozenset())

    def release(self, request: Request, chunk_hashes: Sequence[bytes]) -> None:
        """Release a request's shares of loads, of very many in turns; what nobody wants any more is dropped.

        What arrives of them meanwhile is not for the request any more.
        """
        self._backlog.do_ahead(partial(self._release, request), chunk_hashes)

    def _release(self, request: Request, chunk_hashes: Sequence[bytes]) -> None:
        table, dead = self.in_flight(), []
        for chunk_hash in chunk_hashes:
            load = table.get(chunk_hash)
            number = load.shares.get(request) if load is not None else None
            if load is None or number is None or number in request.loads:  # it may have taken its share again meanwhile
                continue
            del load.shares[request]
            if not load.shares:
                dead.append(load)
        self._drop(dead)

    def watch(self) -> None:
        """Deliver each chunk as soon as its last object is there, until `unwatch`: else those of a call, at its end."""
        self._batches.watch()

    def unwatch(self) -> None:
        """Deliver chunks call by call, unless somebody else watches."""
        self._batches.unwatch()

    def delete(self, chunk_hashes: Iterable[bytes]) -> None:
        """Let what is on its way of deleted chunks fall short: it is not published any more."""
        dead = [load for load in map(self.in_flight().get, chunk_hashes) if load is not None]
        self._drop(dead)
        for load in dead:
            load.failure = Shortfall.GONE
        self._deliver([(load, None) for load in dead])

    def expected_seconds(self, more_bytes: Mapping[Guard, int]) -> float | None:
        """How long so many bytes from each of these backends should take, with what is queued before them.

        None if a backend was not measured yet.
        """
        self.in_flight()
        return expected_load_seconds((guard.meter, size) for guard, size in more_bytes.items())

    def reconfigure(self, config: CacheConfig) -> None:
        """Ask as much of a backend at a time as the settings say now."""
        self._batches.inflight_bytes = config.load_inflight_bytes

    def forget(self, guard: Guard) -> None:
        """Forget a backend that nobody uses any more."""
        self._batches.forget(guard)

    async def close(self) -> None:
        """Return when nothing is on its way: all requests have left, and all calls have ended or were given up."""
        self._backlog.do_all()
        await self._batches.close()

    # What a batch has brought.

    async def _transferred(
        self, batch: Batch, parts: Mapping[ChunkLoad, int], outcomes: Sequence[LoadOutcome], failure: Shortfall
    ) -> None:
        self.in_flight()  # what is to come with these loads must be known before they end
        if failure is Shortfall.DEADLINE:
            self._quarantine(parts)
        lost = await self._publish(parts, outcomes, failure)
        if lost:
            await self._try_next_holder(lost, batch.tried)

    def _loaded(self, objects: Objects) -> None:
        """Settle the chunks that are complete by now, though a batch of theirs goes on."""
        self.in_flight()
        complete = []
        for load, bit in objects:
            if load.state is _WAITING and not load.abandoned and load.waiting & bit:
                load.loaded |= bit
                load.waiting &= ~bit
                if not load.waiting:
                    complete.append(load)
        self._batches.unpin(complete)
        self._settle(complete)

    async def _publish(
        self, parts: Mapping[ChunkLoad, int], outcomes: Sequence[LoadOutcome], failure: Shortfall
    ) -> dict[ChunkLoad, int]:
        """Settle the chunks that are complete; return what was lost of the others, by chunk."""
        if outcomes.count(LoadOutcome.LOADED) < len(outcomes):
            reasons = dict(_losses(parts, outcomes))
        else:
            reasons = {} if outcomes else {load: (mask, failure) for load, mask in parts.items()}
        lost_of: dict[ChunkLoad, int] = {}
        complete: list[ChunkLoad] = []
        told = 0
        for load, mask in parts.items():
            if load.state is not _WAITING or (outcomes and load.abandoned):
                continue  # dropped, or to be started again
            lost, reason = reasons.get(load, _NOTHING_LOST)
            lost &= ~load.loaded  # as was said before: see `Backend.load_each`
            load.loaded |= mask & ~lost
            load.waiting &= ~mask | lost
            if lost:
                load.failure = load.failure or reason
                lost_of[load] = lost
            elif not load.waiting:
                complete.append(load)
                told += len(load.shares)
                if told >= _TOLD_AT_ONCE or len(complete) >= _SETTLED_AT_ONCE:
                    self._settle(complete)
                    complete, told = [], 0
                    await asyncio.sleep(0)
                    self.in_flight()
        self._settle(complete)
        return lost_of

    async def _try_next_holder(self, lost: Mapping[ChunkLoad, int], tried: frozenset[Guard]) -> None:
        """Load what was lost from elsewhere; where a call still owns the room, all of the chunk, to elsewhere."""
        loads = list(lost)
        to_load = {n: load.wanted if load.abandoned else lost[load] for n, load in enumerate(loads)}
        others = [guard for guard in self._guards.current if guard not in tried]
        asked = Asked(loads[0].layout, [load.chunk_hash for load in loads], dict(to_load), loads[0].owner)
        with await ask(others, asked, self._tombstones) as found:
            held = found.masks()
            self.in_flight()
            for n, load in enumerate(loads):
                if load.state is not _WAITING:
                    del to_load[n]
                    continue
                again = self._with_room(load) if to_load[n] & ~held.get(n, 0) == 0 else None
                if again is not None:
                    loads[n] = again
                    continue
                if load.state is _WAITING:
                    load.waiting &= 0 if load.abandoned else ~to_load[n]
                    if not load.waiting:
                        self._settle((load,))
                del to_load[n]
            sources = found.sources(to_load)
            found.take(sources)
            for guard, masks in sources:
                self._batches.enqueue(guard, [(loads[n], mask) for n, mask in masks.items()], tried)

    def _with_room(self, load: ChunkLoad) -> ChunkLoad | None:
        """The load, or where a call owns its room, another one in its place; None if there is no room for that."""
        if not load.abandoned:
            return load
        blocks = [(load.chunk_hash, reservation.rank) for reservation in load.reservations]
        before = load.reservations[0]
        made = self._l1.reserve(load.layout, blocks, before.owner, before.adapter)
        if len(made) < len(blocks) or load.state is not _WAITING:  # what was to be released gave its room, this one too
            self._l1.discard(made)
            return None
        size = sum(reservation.size_bytes for reservation in made)
        again = ChunkLoad(load.chunk_hash, load.layout, made, load.shares, size, load.parent, load.wanted, load.wanted)
        again.failure = load.failure
        load.shares, load.state = {}, _REPLACED
        self._reserved_bytes += size
        self._table[load.chunk_hash] = again
        return again

    def _failed(self, parts: Iterable[ChunkLoad]) -> None:
        """Let chunks fall short of which nothing is known: another backend may be writing to their rooms."""
        self.in_flight()
        dead = [load for load in parts if load.state is _WAITING]
        self._drop(dead)
        for load in dead:
            load.failure = load.failure or Shortfall.BACKEND_ERROR
        self._deliver([(load, self._l1.find(load.chunk_hash)) for load in dead])

    # The end of a load, and of its room.

    def _settle(self, loads: Sequence[ChunkLoad]) -> None:
        """Publish what was loaded, and deliver it to those who wait."""
        l1, committed, commits, room_bytes = self._l1, [], [], 0
        for load in loads:
            load.state = _SETTLED
            del self._table[load.chunk_hash]
            if not load.abandoned:
                room_bytes += load.room_bytes
                load.room_bytes = 0
                loaded, rank_masks, parent = load.loaded, load.layout.objects.rank_masks, load.parent
                for reservation in load.reservations:
                    mask = loaded & rank_masks[reservation.rank]
                    if mask:
                        committed.append(load)
                        commits.append((reservation, mask, parent))
                    else:
                        l1.discard((reservation,))
        self._reserved_bytes -= room_bytes
        entries = dict(zip(committed, l1.commit_all(commits), strict=True))
        settled = [(load, entries.get(load) or l1.find(load.chunk_hash)) for load in loads]
        self._deliver(settled)
        self._settled(settled)

    def _deliver(self, settled: Iterable[Settled]) -> None:
        arrivals: dict[Request, list[Arrival]] = {}
        for load, entry in settled:
            for request, number in load.shares.items():
                if request in arrivals:
                    arrivals[request].append((number, entry, load.failure))
                else:
                    arrivals[request] = [(number, entry, load.failure)]
            load.shares.clear()
        for request, arrived in arrivals.items():
            self._arrived(request, arrived)

    def _drop(self, dead: Sequence[ChunkLoad]) -> None:
        """Drop what nobody wants: its pins go at once, its memory when no call touches it."""
        for load in dead:
            load.state = _DROPPED
            del self._table[load.chunk_hash]
            load.abandoned = True
        self._discard_untouched(dead)
        self._batches.drop(dead)

    def _quarantine(self, loads: Iterable[ChunkLoad]) -> None:
        """Set the rooms of a call aside that should have ended, and may still write there: it holds up nothing else."""
        late = [load for load in loads if load.state is not _SETTLED]  # others came before
        for load in late:
            self._uncount(load)
            for reservation in load.reservations:
                self._l1.quarantine(reservation)
            load.abandoned = True
        self._discard_untouched(late)

    def _discard_untouched(self, loads: Iterable[ChunkLoad]) -> None:
        """Discard the rooms of those that are abandoned, unless a call may still write there: it comes back here."""
        free: list[Reservation] = []
        for load in loads:
            if load.abandoned:
                within = {(r.within, r.rank) for r in load.reservations if r.within is not None}
                if load.touched:
                    self.occupied |= within
                else:
                    self.occupied -= within
                    self._uncount(load)
                    free += load.reservations
        self._l1.discard(free)

    def _uncount(self, load: ChunkLoad) -> None:
        self._reserved_bytes -= load.room_bytes
        load.room_bytes = 0

    def check_integrity(self) -> None:
        """Assert that what is on its way is wanted by somebody, has room, and is counted."""
        table = self.in_flight()
        for chunk_hash, load in table.items():
            assert load.chunk_hash == chunk_hash and load.state is _WAITING and load.shares and load.waiting
            assert load.waiting & ~load.wanted == 0 and load.loaded & load.waiting == 0
        assert self._reserved_bytes >= sum(load.room_bytes for load in table.values()) >= 0
        self._batches.check_integrity()


def _losses(
    parts: Mapping[ChunkLoad, int], outcomes: Sequence[LoadOutcome]
) -> Iterator[tuple[ChunkLoad, tuple[int, Shortfall]]]:
    """The chunks that lost objects: which, and why the first of them."""
    answers = iter(outcomes)
    for load, mask in parts.items():
        lost = {
            1 << load.layout.objects.bit(*which): _REASONS.get(outcome, Shortfall.BACKEND_ERROR)
            for which, outcome in zip(load.layout.objects.members[mask], answers, strict=False)
            if outcome is not LoadOutcome.LOADED
        }
        if lost:
            yield load, (sum(lost), next(iter(lost.values())))
