"""L2 -> L1: each object is loaded once, however many requests want it.

A `ChunkLoad` is all that is on its way for one chunk; the requests that want it hold shares of it. Its objects travel
in batches, one backend each, admitted by the bytes in flight. A failed object tries the next holder before its chunk
falls short. The room of a chunk is freed only when no call touches it any more.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Protocol

from msgspec import Struct

from async_cache.config import CacheConfig
from async_cache.errors import BackendError
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.guard import Call, CallTimeoutError, Guard
from async_cache.l2.meter import expected_load_seconds
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.layout import ModelLayout
from async_cache.read.lookup import Asked, ask
from async_cache.values import Shortfall

log = logging.getLogger(__name__)

_BATCH_BYTES = 64 * 2**20  # of one call to a backend: enough to keep its threads busy, little enough to have an end
_BATCH_CHUNKS = 1024  # what the loop prepares in a millisecond or two
_TOLD_AT_ONCE = 4096  # shares, in two milliseconds; then the loop gets its turn
Arrival = tuple[int, Entry | None, Shortfall | None]
"""The number of a chunk, what can be found of it, and why that may be less than was wanted."""
_Rooms = Sequence[tuple[int, Reservation]]
_Sources = Sequence[tuple[Guard, Mapping[int, int]]]
_PLACE = attrgetter("rank", "offset")
_NOTHING_LOST: tuple[int, Shortfall | None] = (0, None)
_REASONS = {LoadOutcome.GONE: Shortfall.GONE, LoadOutcome.CORRUPT: Shortfall.CORRUPT}


class Share(Protocol):
    """Who wants chunks."""

    def loads_settled(self, arrivals: Sequence[Arrival]) -> None:
        """These loads are over; the numbers are those that the share joined them with."""


class ChunkLoad(Struct, eq=False):
    """WAITING while any object is, then SETTLED; DROPPED when the last share goes; STARTED AGAIN as another one.

    It is in the loader's table while it is WAITING. Its room is `abandoned` when it is dropped, or a call that should
    have ended may still write to it; it is then freed with the end of the last call of its batches.
    """

    chunk_hash: bytes
    layout: ModelLayout
    reservations: list[Reservation]
    shares: dict[Share, int]
    room_bytes: int
    wanted: int = 0  # objects, by bit
    waiting: int = 0
    loaded: int = 0
    failure: Shortfall | None = None
    batches: "tuple[Batch, ...]" = ()
    abandoned: bool = False

    @property
    def touched(self) -> bool:
        """Whether a call may write to its room."""
        return any(self in batch.given for batch in self.batches)


class Batch:
    """The objects of one call to a backend, by chunk: QUEUED -> RUNNING (has a call) -> ended.

    `parts` are pinned. `given` are those whose room was given to the call, until it ends.
    """

    __slots__ = ("call", "given", "guard", "parts", "size_bytes", "tried")

    def __init__(self, guard: Guard, tried: frozenset[Guard]):
        self.guard = guard
        self.tried = tried | {guard}
        self.parts: dict[ChunkLoad, int] = {}
        self.given: Mapping[ChunkLoad, int] = {}
        self.size_bytes = 0
        self.call: Call[list[LoadOutcome]] | None = None

    def unpin(self, loads: Iterable[ChunkLoad]) -> None:
        """These are no longer asked for."""
        for layout, same in groupby(loads, key=lambda load: load.layout):
            self.guard.unpin(layout.objects.keys([(load.chunk_hash, self.parts.pop(load, 0)) for load in same]))


class Loader:
    """Everything that is on its way from L2 to L1."""

    def __init__(self, l1: L1Store, guards: Sequence[Guard], config: CacheConfig):
        self.loads = 0
        self.shared_loads = 0
        self.occupied: set[tuple[Entry, int]] = set()  # (entry, rank): an abandoned call may still write to its block
        self._room_bytes = 0
        self._table: dict[bytes, ChunkLoad] = {}
        self._added: list[tuple[Share, ModelLayout, Sequence[bytes], _Rooms, _Sources]] = []
        self._loop = asyncio.get_running_loop()
        self._l1 = l1
        self._guards = guards
        self._config = config
        self._queues: dict[Guard, deque[Batch]] = {guard: deque() for guard in guards}
        self._running_bytes = dict.fromkeys(guards, 0)
        self._tasks: set[asyncio.Task[None]] = set()

    # What a request does: find in the table, or add; join; leave.

    @property
    def table(self) -> dict[bytes, ChunkLoad]:
        """What is on its way, by chunk hash."""
        if self._added:
            self._enter_added()
        return self._table

    @property
    def room_bytes(self) -> int:
        """The part of L1 that is reserved for what is on its way."""
        if self._added:
            self._enter_added()
        return self._room_bytes

    def add(self, share: Share, layout: ModelLayout, hashes: Sequence[bytes], rooms: _Rooms, sources: _Sources) -> None:
        """Load objects, by chunk number, from these sources. Takes over their rooms, and the sources' pins.

        The share has its answer, and is what the loop should turn to next: the work begins when somebody looks at
        what is on its way, or with the loop's next turn.
        """
        if not self._added:
            self._loop.call_soon(self._enter_added)
        self._added.append((share, layout, hashes, rooms, sources))

    def _enter_added(self) -> None:
        added, self._added = self._added, []
        table = self._table
        for share, layout, hashes, rooms, sources in added:
            for number, reservation in rooms:
                chunk_hash, size = hashes[number], reservation.size_bytes
                load = table.get(chunk_hash)
                if load is None:
                    table[chunk_hash] = ChunkLoad(chunk_hash, layout, [reservation], {share: number}, size)
                else:
                    load.reservations.append(reservation)
                    load.room_bytes += size
                    load.shares[share] = number
                self._room_bytes += size
            for guard, masks in sources:
                self._enqueue(guard, [(table[hashes[number]], mask) for number, mask in masks.items()], frozenset())

    def leave(self, share: Share, chunk_hashes: Iterable[bytes]) -> None:
        """Give shares back; what nobody wants any more is dropped."""
        dead = []
        for chunk_hash in chunk_hashes:
            load = self.table.get(chunk_hash)
            if load is not None and load.shares.pop(share, None) is not None and not load.shares:
                dead.append(load)
        self._drop(dead)

    def forget(self, chunk_hashes: Iterable[bytes]) -> None:
        """These were deleted: what is on its way falls short, and will not be published."""
        dead = [load for load in map(self.table.get, chunk_hashes) if load is not None]
        self._drop(dead)
        for load in dead:
            load.failure = Shortfall.GONE
        self._tell([(load, None) for load in dead])

    def expected_seconds(self, chunk_hashes: Iterable[bytes], sources: Iterable[tuple[Guard, int]]) -> float | None:
        """How long what is on its way of these chunks, and so many bytes more, should take with what is queued before.

        None if a backend was not measured yet.
        """
        more = dict(sources)
        table = self.table
        for batches in {table[chunk_hash].batches for chunk_hash in chunk_hashes}:
            for batch in batches:
                more.setdefault(batch.guard, 0)
        return expected_load_seconds([(guard.meter, size) for guard, size in more.items()])

    async def close(self) -> None:
        """After all requests have left and all calls have ended or were given up."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def check_integrity(self) -> None:
        """What is on its way is wanted by somebody, has room, and is counted."""
        for chunk_hash, load in self.table.items():
            assert load.chunk_hash == chunk_hash and load.shares and load.waiting
            assert load.waiting & ~load.wanted == 0 and load.loaded & load.waiting == 0
        assert self.room_bytes >= sum(load.room_bytes for load in self.table.values()) >= 0
        assert all(size >= 0 for size in self._running_bytes.values())

    # Batches.

    def _enqueue(self, guard: Guard, parts: Iterable[tuple[ChunkLoad, int]], tried: frozenset[Guard]) -> None:
        """Cut objects into batches, and start those that the bytes in flight allow."""
        queue, batch = self._queues[guard], Batch(guard, tried)
        for load, mask in parts:
            if batch.size_bytes >= _BATCH_BYTES or len(batch.parts) >= _BATCH_CHUNKS:
                self._queue(queue, batch)
                batch = Batch(guard, tried)
            load.wanted |= mask
            load.waiting |= mask
            load.batches += (batch,)
            batch.parts[load] = mask
            batch.size_bytes += load.layout.objects.sizes[mask]
        if batch.parts:
            self._queue(queue, batch)
        self._pump(guard)

    def _queue(self, queue: deque[Batch], batch: Batch) -> None:
        queue.append(batch)
        batch.guard.meter.queued(batch.size_bytes)

    def _pump(self, guard: Guard) -> None:
        queue = self._queues[guard]
        while queue and self._running_bytes[guard] < self._config.load_inflight_bytes:
            batch = queue.popleft()
            self._running_bytes[guard] += batch.size_bytes
            task = self._loop.create_task(self._run(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, batch: Batch) -> None:
        # What became abandoned in the queue starts again elsewhere: its room here may be freed at any time.
        parts = {load: mask for load, mask in batch.parts.items() if not load.abandoned}
        try:
            failed = await self._transfer(batch, parts)
            if failed:
                await self._try_next_holder(failed, batch.tried)
        except Exception:
            log.exception("a batch of loads from %s failed", batch.guard.backend.name)
            self._end(batch)
            dead = [load for load in parts if self.table.get(load.chunk_hash) is load]
            self._drop(dead)  # another backend may be writing to their memory
            for load in dead:
                load.failure = load.failure or Shortfall.BACKEND_ERROR
            self._tell([(load, self._l1.index.get(load.chunk_hash)) for load in dead])

    async def _transfer(self, batch: Batch, parts: Mapping[ChunkLoad, int]) -> dict[ChunkLoad, int]:
        """One call to a backend; what failed of it."""
        guard = batch.guard
        keys, buffers = self._objects(parts)
        outcomes: list[LoadOutcome] = []
        failure = Shortfall.BACKEND_ERROR
        began = self._loop.time()
        if keys:
            batch.call = guard.begin_load(keys, buffers)
        if batch.call is not None:
            self.loads += len(keys)
            batch.given = parts
            batch.call.when_ended(lambda: self._call_ended(batch))
            try:
                outcomes = await batch.call.result()
            except CallTimeoutError:
                failure = Shortfall.DEADLINE
                self._quarantine(parts.keys())
            except BackendError:
                pass  # nothing was loaded
        seconds = self._loop.time() - began
        self._end(batch, seconds if outcomes else None, keys=keys if parts.keys() == batch.parts.keys() else None)
        return await self._publish(parts, outcomes, failure)

    def _end(self, batch: Batch, seconds: float | None = None, *, keys: Sequence[ObjectKey] | None = None) -> None:
        """Its bytes are in flight no more, and its pins go; once is enough. `keys`: of its parts, if they are known.

        `seconds`: what its call took, if it loaded.
        """
        size, batch.size_bytes = batch.size_bytes, 0
        batch.guard.meter.ended(size, seconds)
        self._running_bytes[batch.guard] -= size
        if keys is None:
            batch.unpin(list(batch.parts))
        else:
            batch.parts.clear()
            batch.guard.unpin(keys)
        self._pump(batch.guard)

    def _objects(self, parts: Mapping[ChunkLoad, int]) -> tuple[list[ObjectKey], list[memoryview]]:
        """Their keys, and where they go."""
        view, new = self._l1.arena.view, tuple.__new__
        keys: list[ObjectKey] = []
        buffers = []
        for load, mask in parts.items():
            chunk_hash, offsets = load.chunk_hash, dict(map(_PLACE, load.reservations))
            for rank, group, begin, end in load.layout.objects.places[mask]:
                offset = offsets[rank]
                keys.append(new(ObjectKey, (chunk_hash, rank, group)))
                buffers.append(view[offset + begin : offset + end])
        return keys, buffers

    async def _publish(
        self, parts: Mapping[ChunkLoad, int], outcomes: Sequence[LoadOutcome], failure: Shortfall
    ) -> dict[ChunkLoad, int]:
        """Settle the chunks that are complete; of the others, the objects that failed."""
        if outcomes.count(LoadOutcome.LOADED) < len(outcomes):
            reasons = dict(self._failures(parts, outcomes))
        else:
            reasons = {} if outcomes else {load: (mask, failure) for load, mask in parts.items()}
        failed: dict[ChunkLoad, int] = {}
        complete: list[ChunkLoad] = []
        told, table = 0, self.table
        for load, mask in parts.items():
            if table.get(load.chunk_hash) is not load or (outcomes and load.abandoned):
                continue  # dropped, or to be started again
            lost, reason = reasons.get(load, _NOTHING_LOST)
            load.loaded |= mask & ~lost
            load.waiting &= ~mask | lost
            if lost:
                load.failure = load.failure or reason
                failed[load] = lost
            elif not load.waiting:
                complete.append(load)
                told += len(load.shares)
                if told >= _TOLD_AT_ONCE:
                    self._settle(complete)
                    complete, told = [], 0
                    await asyncio.sleep(0)
                    table = self.table
        self._settle(complete)
        return failed

    @staticmethod
    def _failures(
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

    async def _try_next_holder(self, failed: Mapping[ChunkLoad, int], tried: frozenset[Guard]) -> None:
        """Load what failed from elsewhere; where a call still owns the room, all of the chunk, elsewhere in memory."""
        loads = list(failed)
        to_load = {n: load.wanted if load.abandoned else failed[load] for n, load in enumerate(loads)}
        others = [guard for guard in self._guards if guard not in tried]
        asked = Asked(loads[0].layout, [load.chunk_hash for load in loads], dict(to_load))
        found = await ask(others, asked)
        held = found.masks()
        try:
            for n, load in enumerate(loads):
                if self.table.get(load.chunk_hash) is not load:
                    del to_load[n]
                    continue
                again = self._with_room(load) if to_load[n] & ~held.get(n, 0) == 0 else None
                if again is not None:
                    loads[n] = again
                    continue
                load.waiting &= 0 if load.abandoned else ~to_load[n]
                del to_load[n]
                if not load.waiting:
                    self._settle((load,))
            for guard, masks in found.take(to_load):
                self._enqueue(guard, [(loads[n], mask) for n, mask in masks.items()], tried)
        finally:
            found.close()

    def _with_room(self, load: ChunkLoad) -> ChunkLoad | None:
        """The load, or where a call owns its room, another one in its place; None if there is no room."""
        if not load.abandoned:
            return load
        ranks = [reservation.rank for reservation in load.reservations]
        made = self._l1.reserve(load.layout, [(load.chunk_hash, rank) for rank in ranks])
        if len(made) < len(ranks):
            self._l1.discard(made)
            return None
        size = sum(reservation.size_bytes for reservation in made)
        again = ChunkLoad(load.chunk_hash, load.layout, made, load.shares, size, load.wanted, load.wanted)
        again.failure = load.failure
        load.shares = {}
        self._room_bytes += size
        self._table[load.chunk_hash] = again
        return again

    # The end of a load, and of its room.

    def _settle(self, loads: Iterable[ChunkLoad]) -> None:
        """Publish what was loaded, and tell those who wait."""
        l1, settled = self._l1, []
        for load in loads:
            del self._table[load.chunk_hash]
            entry = None
            if not load.abandoned:
                self._room_bytes -= load.room_bytes
                load.room_bytes = 0
                for reservation in load.reservations:
                    mask = load.loaded & load.layout.objects.rank_masks[reservation.rank]
                    if mask:
                        entry = l1.commit(reservation, mask)
                    else:
                        l1.discard((reservation,))
            settled.append((load, entry or l1.index.get(load.chunk_hash)))
        self._tell(settled)

    @staticmethod
    def _tell(settled: Iterable[tuple[ChunkLoad, Entry | None]]) -> None:
        arrivals: dict[Share, list[Arrival]] = {}
        for load, entry in settled:
            for share, number in load.shares.items():
                if share in arrivals:
                    arrivals[share].append((number, entry, load.failure))
                else:
                    arrivals[share] = [(number, entry, load.failure)]
            load.shares = {}
        for share, arrived in arrivals.items():
            share.loads_settled(arrived)

    def _drop(self, dead: Sequence[ChunkLoad]) -> None:
        """Nobody wants these: pins go at once, memory when no call touches it."""
        by_batch: dict[Batch, list[ChunkLoad]] = {}
        for load in dead:
            del self._table[load.chunk_hash]
            load.abandoned = True
            for batch in load.batches:
                by_batch.setdefault(batch, []).append(load)
        self._discard_untouched(dead)
        for batch, loads in by_batch.items():
            batch.unpin(loads)
            if batch.parts:
                continue
            if batch.call is not None:
                batch.call.cancel()
            elif batch in self._queues[batch.guard]:
                self._queues[batch.guard].remove(batch)
                batch.guard.meter.ended(batch.size_bytes)

    def _quarantine(self, loads: Collection[ChunkLoad]) -> None:
        """A call that should have ended may still write there: it holds up nothing else."""
        if self._added:  # what was promised to come with these loads must be known first
            self._enter_added()
        for load in loads:
            self._uncount(load)
            for reservation in load.reservations:
                self._l1.quarantine(reservation)
            load.abandoned = True
        self._discard_untouched(loads)

    def _call_ended(self, batch: Batch) -> None:
        given, batch.given = batch.given, {}
        self._discard_untouched(given)

    def _discard_untouched(self, loads: Iterable[ChunkLoad]) -> None:
        """Free the rooms of those that are abandoned, unless a call may still write there: it comes back here."""
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
        self._room_bytes -= load.room_bytes
        load.room_bytes = 0
