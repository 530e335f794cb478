"""L2 -> L1: each object is loaded once, however many requests want it.

A `ChunkLoad` is all that is on its way for one chunk; the requests that want it hold shares of it. Its objects travel in
batches, one backend each, admitted by the bytes in flight. A failed object tries the next holder before its chunk falls
short. The room of an attempt is freed only when no call touches it any more.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from async_cache.config import CacheConfig
from async_cache.errors import BackendError
from async_cache.keys import ObjectKey
from async_cache.l1.entry import Entry, Reservation
from async_cache.l1.store import L1Store
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.guard import CallTimeoutError, Guard
from async_cache.layout import ModelLayout
from async_cache.lookup import Asked, Found, ask
from async_cache.values import Shortfall

_TOLD_AT_ONCE = 256  # shares of a prefix that many requests want; then the loop gets its turn
_BATCH_BYTES = 32 * 2**20  # of one call to a backend: enough to keep its threads busy, little enough to have an end
_REASONS = {LoadOutcome.GONE: Shortfall.GONE, LoadOutcome.CORRUPT: Shortfall.CORRUPT}


class Share(Protocol):
    """Who wants a chunk."""

    def load_settled(self, load: "ChunkLoad", number: int, entry: Entry | None) -> None:
        """The load is over; `number` is the one it was joined with, `entry` what can be found of the chunk."""


class Room:
    """The memory of one attempt to load a chunk. ABANDONED rooms are freed when the last call that fills them ends."""

    __slots__ = ("abandoned", "calls", "reservations", "size_bytes")

    def __init__(self) -> None:
        self.reservations: dict[int, Reservation] = {}  # by rank
        self.size_bytes = 0
        self.calls = 0
        self.abandoned = False


class ChunkLoad:
    """WAITING while any object is -> SETTLED when all are loaded or failed -> or DROPPED when the last share goes."""

    __slots__ = ("batches", "chunk_hash", "failure", "layout", "loaded", "room", "shares", "waiting", "wanted")

    def __init__(self, chunk_hash: bytes, layout: ModelLayout):
        self.chunk_hash = chunk_hash
        self.layout = layout
        self.wanted = self.waiting = self.loaded = 0  # objects, by bit
        self.failure: Shortfall | None = None
        self.shares: dict[Share, int] = {}
        self.room = Room()
        self.batches: list[Batch] = []


class Item:
    """One object on its way."""

    __slots__ = ("bit", "buffer", "key", "load", "pinned", "room")

    def __init__(self, load: ChunkLoad, bit: int, key: ObjectKey, buffer: memoryview):
        self.load, self.bit, self.key, self.buffer = load, bit, key, buffer
        self.room = load.room
        self.pinned = True

    @property
    def live(self) -> bool:
        """Whether anybody still wants it, in this room."""
        return self.room is self.load.room and not self.room.abandoned


class Batch:
    """The objects of one call to a backend: QUEUED -> RUNNING (has a call) -> ended."""

    __slots__ = ("call", "guard", "items", "size_bytes", "tried")

    def __init__(self, guard: Guard, tried: frozenset[Guard]):
        self.guard = guard
        self.tried = tried | {guard}
        self.items: list[Item] = []
        self.size_bytes = 0
        self.call: asyncio.Task[list[LoadOutcome]] | None = None


class Loader:
    """Everything that is on its way from L2 to L1."""

    def __init__(self, l1: L1Store, guards: Sequence[Guard], config: CacheConfig):
        self.loads = 0
        self.shared_loads = 0
        self.room_bytes = 0
        self._l1 = l1
        self._guards = guards
        self._config = config
        self._table: dict[bytes, ChunkLoad] = {}
        self._forming: dict[Guard, Batch] = {}
        self._queues: dict[Guard, deque[Batch]] = {guard: deque() for guard in guards}
        self._running_bytes = dict.fromkeys(guards, 0)
        self._tasks: set[asyncio.Task[None]] = set()

    # What a request does: find or add, join, submit; leave.

    def find(self, chunk_hash: bytes) -> ChunkLoad | None:
        """What is on its way for a chunk."""
        return self._table.get(chunk_hash)

    def add(
        self,
        chunk_hash: bytes,
        layout: ModelLayout,
        reservations: Iterable[Reservation],
        sources: Iterable[tuple[Guard, int]],
    ) -> ChunkLoad:
        """Load more objects of a chunk. Takes over the reservations, and the pins that the sources hold."""
        load = self._table.get(chunk_hash)
        if load is None:
            load = self._table[chunk_hash] = ChunkLoad(chunk_hash, layout)
        self._furnish(load, reservations)
        for guard, mask in sources:
            load.wanted |= mask
            load.waiting |= mask
            self._enqueue(load, guard, mask, frozenset())
        return load

    def join(self, load: ChunkLoad, share: Share, number: int) -> None:
        """Take a share: `share` is told, with its number, when the load has settled."""
        load.shares[share] = number

    def submit(self) -> None:
        """Start what was added, as far as the bytes in flight allow."""
        for guard, batch in self._forming.items():
            self._queues[guard].append(batch)
            self._pump(guard)
        self._forming.clear()

    def leave(self, share: Share, loads: Iterable[ChunkLoad]) -> None:
        """Give shares back; what nobody wants any more is dropped."""
        dead = []
        for load in loads:
            load.shares.pop(share, None)
            if not load.shares:
                dead.append(load)
        self._drop(dead)

    def forget(self, chunk_hashes: Iterable[bytes]) -> None:
        """These were deleted: what is on its way falls short, and will not be published."""
        dead = [load for load in map(self._table.get, chunk_hashes) if load is not None]
        self._drop(dead)
        for load in dead:
            load.failure = Shortfall.GONE
            self._tell(load, None)

    def forget_all(self) -> None:
        """Everything was deleted."""
        self.forget(list(self._table))

    def expected_seconds(self, loads: Iterable[ChunkLoad]) -> float | None:
        """How long these should take, with what is queued before them; None if a backend was not measured yet."""
        guards = {batch.guard for load in loads for batch in load.batches}
        expected = [guard.expected_load_seconds(0) for guard in guards]
        known = [seconds for seconds in expected if seconds is not None]
        return max(known, default=0.0) if len(known) == len(expected) else None

    async def close(self) -> None:
        """After all requests have left and all calls have ended or were given up."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def check_integrity(self) -> None:
        """What is on its way is wanted by somebody, has room, and is counted."""
        for chunk_hash, load in self._table.items():
            assert load.chunk_hash == chunk_hash and load.shares and load.waiting
            assert load.waiting & ~load.wanted == 0 and load.loaded & load.waiting == 0
        assert self.room_bytes >= sum(load.room.size_bytes for load in self._table.values()) >= 0
        assert all(size >= 0 for size in self._running_bytes.values())
        assert self._forming == {}

    # Rooms.

    def _furnish(self, load: ChunkLoad, reservations: Iterable[Reservation]) -> None:
        for reservation in reservations:
            load.room.reservations[reservation.rank] = reservation
            load.room.size_bytes += reservation.room_bytes
            self.room_bytes += reservation.room_bytes

    def _abandon(self, room: Room) -> None:
        room.abandoned = True
        if not room.calls:
            self._discard(room)

    def _discard(self, room: Room) -> None:
        self._uncount(room)
        for reservation in room.reservations.values():
            self._l1.discard(reservation)

    def _quarantine(self, room: Room) -> None:
        """A call that should have ended may still write here: it holds up nothing else."""
        self._uncount(room)
        for reservation in room.reservations.values():
            self._l1.quarantine(reservation)
        self._abandon(room)

    def _uncount(self, room: Room) -> None:
        self.room_bytes -= room.size_bytes
        room.size_bytes = 0

    def _call_ended(self, rooms: Iterable[Room]) -> None:
        for room in rooms:
            room.calls -= 1
            if room.abandoned and not room.calls:
                self._discard(room)

    # Batches.

    def _enqueue(self, load: ChunkLoad, guard: Guard, mask: int, tried: frozenset[Guard]) -> None:
        layout, view = load.layout, self._l1.arena.view
        for rank, group in layout.objects(mask):
            batch = self._forming.get(guard)
            if batch is None or batch.size_bytes >= _BATCH_BYTES or batch.tried != tried | {guard}:
                if batch is not None:
                    self._queues[guard].append(batch)
                batch = self._forming[guard] = Batch(guard, tried)
            span = layout.spans[rank][group]
            assert span is not None
            offset = load.room.reservations[rank].offset
            buffer = view[offset + span[0] : offset + span[1]]
            batch.items.append(Item(load, 1 << layout.bit(rank, group), ObjectKey(load.chunk_hash, rank, group), buffer))
            batch.size_bytes += len(buffer)
            guard.load_queued(len(buffer))
            if not load.batches or load.batches[-1] is not batch:
                load.batches.append(batch)

    def _pump(self, guard: Guard) -> None:
        queue = self._queues[guard]
        while queue and self._running_bytes[guard] < self._config.load_inflight_bytes:
            batch = queue.popleft()
            self._running_bytes[guard] += batch.size_bytes
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, batch: Batch) -> None:
        guard = batch.guard
        items = [item for item in batch.items if item.live]
        rooms = {item.room for item in items}
        outcomes: Sequence[LoadOutcome] = ()
        failure = Shortfall.BACKEND_ERROR
        if items and guard.allows():
            self.loads += len(items)
            call = guard.backend.load([item.key for item in items], [item.buffer for item in items])
            batch.call = guard.start(call)
            for room in rooms:
                room.calls += 1
            try:
                outcomes = await guard.finish(batch.call, self._config.load_timeout_seconds, len(items))
                self._call_ended(rooms)
            except CallTimeoutError as error:
                failure = Shortfall.DEADLINE
                for room in rooms:
                    self._quarantine(room)
                error.call.add_done_callback(lambda _: self._call_ended(rooms))
            except BackendError:
                self._call_ended(rooms)
            except asyncio.CancelledError:
                batch.call.add_done_callback(lambda _: self._call_ended(rooms))
                raise
        guard.load_ended(batch.size_bytes, loaded=bool(outcomes))
        self._running_bytes[guard] -= batch.size_bytes
        self._pump(guard)
        self._unpin(batch, items)
        failed = await self._publish(items, outcomes, failure)
        if failed:
            await self._try_next_holder(failed, batch.tried)

    async def _publish(
        self, items: Sequence[Item], outcomes: Sequence[LoadOutcome], failure: Shortfall
    ) -> dict[ChunkLoad, tuple[Room, int]]:
        """Settle the chunks that are complete; of the others, what failed and in which room."""
        failed: dict[ChunkLoad, tuple[Room, int]] = {}
        told = 0
        for i, item in enumerate(items):
            load, room = item.load, item.room
            if self._table.get(load.chunk_hash) is not load or load.room is not room or (outcomes and room.abandoned):
                continue  # dropped, or started again
            outcome = outcomes[i] if outcomes else None
            if outcome is LoadOutcome.LOADED:
                load.loaded |= item.bit
                load.waiting &= ~item.bit
                if not load.waiting:
                    told += len(load.shares)
                    self._settle(load)
            else:
                load.failure = load.failure or (failure if outcome is None else _REASONS[outcome])
                failed[load] = room, failed.get(load, (room, 0))[1] | item.bit
            if told >= _TOLD_AT_ONCE:
                told = 0
                await asyncio.sleep(0)
        return failed

    async def _try_next_holder(self, failed: dict[ChunkLoad, tuple[Room, int]], tried: frozenset[Guard]) -> None:
        others = [guard for guard in self._guards if guard not in tried]
        # Where the failed call still owns the room, all objects of the chunk start again, elsewhere in memory.
        again = [(load, room, load.wanted if room.abandoned else mask) for load, (room, mask) in failed.items()]
        missing = [(number, load.chunk_hash, mask) for number, (load, _, mask) in enumerate(again)]
        asked = Asked(again[0][0].layout, missing)
        found = await ask(others, asked, self._config.lookup_timeout_seconds) if others else Found(asked, (), failed=False)
        try:
            for number, (load, room, mask) in enumerate(again):
                if self._table.get(load.chunk_hash) is not load or load.room is not room:
                    continue
                if mask & ~found.mask(number) == 0 and self._has_room(load):
                    load.waiting |= mask
                    for guard, part in found.take(number, mask):
                        self._enqueue(load, guard, part, tried)
                else:
                    load.waiting &= ~mask
                    if not load.waiting:
                        self._settle(load)
        finally:
            found.close()
        self.submit()

    def _has_room(self, load: ChunkLoad) -> bool:
        """The load's room, or a new one where a call still owns it."""
        if not load.room.abandoned:
            return True
        ranks = list(load.room.reservations)
        made = self._l1.reserve(load.layout, [(load.chunk_hash, rank) for rank in ranks])
        if len(made) < len(ranks):
            for reservation in made:
                self._l1.discard(reservation)
            return False
        load.room, load.loaded = Room(), 0
        self._furnish(load, made)
        return True

    def _settle(self, load: ChunkLoad) -> None:
        """Publish what was loaded, and tell those who wait."""
        del self._table[load.chunk_hash]
        self._uncount(load.room)
        entry = None
        for rank, reservation in load.room.reservations.items():
            mask = load.loaded & load.layout.rank_masks[rank]
            if mask and not load.room.abandoned:
                entry = self._l1.commit(reservation, mask)
            elif not load.room.abandoned:
                self._l1.discard(reservation)
        self._tell(load, entry or self._l1.index.get(load.chunk_hash))

    def _tell(self, load: ChunkLoad, entry: Entry | None) -> None:
        shares, load.shares = load.shares, {}
        for share, number in shares.items():
            share.load_settled(load, number, entry)

    def _drop(self, dead: Sequence[ChunkLoad]) -> None:
        """Nobody wants these: pins go at once, memory when no call touches it."""
        for load in dead:
            del self._table[load.chunk_hash]
            self._abandon(load.room)
        for batch in {batch for load in dead for batch in load.batches}:
            self._unpin(batch, [item for item in batch.items if not item.live])
            if any(item.live for item in batch.items):
                continue
            if batch.call is not None:
                batch.call.cancel()
            elif batch in self._queues[batch.guard]:
                self._queues[batch.guard].remove(batch)
                batch.guard.load_ended(batch.size_bytes, loaded=False)

    @staticmethod
    def _unpin(batch: Batch, items: Iterable[Item]) -> None:
        pinned = [item for item in items if item.pinned]
        for item in pinned:
            item.pinned = False
        batch.guard.unpin([item.key for item in pinned])
