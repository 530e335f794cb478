"""The chunks that wait to be stored in one backend: batches of them, the calls that are out, back-off."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import compress, islice
from operator import not_

from async_cache.aio.slices import slices
from async_cache.errors import BackendError
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.backend import Coming
from async_cache.l2.guard import Call, Guard
from async_cache.l2.guard.breaker import BreakerState
from async_cache.l2.guard.fair import FairQueue
from async_cache.l2.guard.guards import held_by
from async_cache.l2.placement import Placing
from async_cache.observe import Observers, notify
from async_cache.prompt.keys import ObjectKey
from async_cache.write.pending import NEW, Outcome, Pending, Tried, Write, prefixes_of
from async_cache.write.wear import note_budget, recall_budget

log = logging.getLogger(__name__)

_BATCH_BYTES = 32 * 2**20
_OBJECT_BYTES = 4096  # that an object costs beside its own: a name, a record, a page
_BATCH_OBJECTS = 256  # of a call: the loop handles so many in a millisecond or two, and a disk has time for their names
_OWNER = "\0write-back"  # of what it looks up; no salt has a control character
_ATTEMPTS = 5
_FEWER_BITS = 2  # a quarter as many chunks with each call that raised: one in the last attempt
_FIRST_BACKOFF_SECONDS = 0.1
_ENDED_AT_ONCE = 1024
_LOADS_GO_FIRST_SECONDS = 1.0  # how long a write gives way to loads


class WriteQueue:
    """The queue of one backend. A chunk is WAITING -> IN FLIGHT -> gone, with its outcome, or WAITING again.

    A chunk may wait while it is in flight: more of it was committed after its write began.
    """

    REFUSALS = ("admit", "write_budget", "capacity")
    """Why a backend may not be given a chunk; `capacity`: it is larger than all of the backend."""

    def __init__(
        self,
        guard: Guard,
        l1: L1Store,
        commits_paused: Callable[[], Awaitable[None]],
        others: Callable[[Guard], Sequence[Guard]],
        left: "Callable[[WriteQueue, Pending, Outcome, int], None]",
        refused: Callable[[Entry], None],
        observers: Observers,
    ):
        self.guard = guard
        self.share_bytes = 1
        """What its writes in flight may hold of L1, and what is promoted may take that waits or is in flight."""
        self.promoted = self.unpromoted = 0
        """Chunks that were offered, and stored or not."""
        self.waiting: FairQueue[Pending] = FairQueue()
        """Those of one owner wait for each other, and not for all of another's."""
        self._tried: dict[Pending, Tried] = {}  # of those that wait again
        self.in_flight: dict[Pending, Tried] = {}
        self._l1 = l1
        self._commits_paused = commits_paused
        self._others = others
        self._tell_left, self._tell_refused = left, refused
        self._observers = observers
        self.refused: Counter[str] = Counter()
        """Chunks that were not admitted, by the parameter of the backend's URL that was against it.

        `capacity`: they are larger than all that it has room for.
        """
        self._promised: dict[Pending, int] = {}  # of the budget, by what was admitted
        self._offered: dict[Pending, int] = {}  # what is promoted, each with its bytes
        self._offered_bytes = 0
        self._ending = False
        self._told_too_large = False
        self._writes: set[Write] = set()
        self._held_bytes = 0
        self._wake = asyncio.Event()

    @property
    def pending(self) -> int:
        """Chunks that wait, or are being written."""
        return len(self.waiting) + sum(pending not in self.waiting for pending in self.in_flight)

    def add(self, pending: Pending) -> bool:
        """Let a chunk wait for its turn; False if it does already."""
        if pending in self.waiting or self._ending:
            return False
        self._push(pending)
        if self.guard.budget is not None and pending not in self._promised:
            self._promised[pending] = pending.entry.room_bytes
            self.guard.budget.promise(pending.entry.owner, pending.entry.room_bytes)
        return True

    def _push(self, pending: Pending) -> None:
        if not self.waiting:
            self._wake.set()
        entry = pending.entry
        self.waiting.push(entry.owner, entry.room_bytes + _OBJECT_BYTES * entry.present.bit_count(), pending)

    def admits(self, entry: Entry, pending: Pending | None, asked: int) -> bool:
        """Whether a chunk that was asked for so often is to be stored here; if not, that is counted, and remembered."""
        if pending is not None and (pending in self.waiting or pending in self.in_flight):
            return True  # it was admitted
        placement, budget = self.guard.backend.placement, self.guard.budget
        if placement.admit > max(asked, 1):
            why = "admit"
        elif budget is not None and not budget.admits(entry.owner, entry.room_bytes, asked):
            why = "write_budget"
        else:
            return True
        self._refuse(entry, why)
        return False

    def _refuse(self, entry: Entry, why: str) -> None:
        self.refused[why] += 1
        self.guard.refused(entry.chunk_hash)
        self._tell_refused(entry)

    def _first_that_fits(self) -> Pending | None:
        """What waits longest; what is larger than all that the backend has room for is refused, and waits no longer.

        Others' chunks would make room for it, in vain.
        """
        while (pending := self.waiting.first()) is not None:
            size_bytes = self.guard.room_bytes(pending.entry.layout.objects)
            usage = self.guard.usage()
            if usage is None or usage.capacity_bytes is None or size_bytes <= usage.capacity_bytes:
                break
            self._tell_too_large(size_bytes, usage.capacity_bytes)
            self._refuse(pending.entry, "capacity")
            self.discard(pending, Outcome.REFUSED)
        return pending

    def has_room_for(self, entry: Entry) -> bool:
        """Whether a chunk may be offered; if not, that is counted."""
        budget = self.guard.budget
        fits = self._offered_bytes + entry.room_bytes <= self.share_bytes
        fits = fits and (budget is None or budget.admits(entry.owner, entry.room_bytes, asked=2))  # it was found
        self.unpromoted += not fits
        return fits

    def offer(self, pending: Pending) -> bool:
        """Let a chunk wait that was found behind this backend; False if it does already."""
        if not self.add(pending):
            return False
        if pending not in self._offered:
            self._offered[pending] = pending.entry.room_bytes
            self._offered_bytes += pending.entry.room_bytes
        return True

    async def end(self) -> None:
        """Take nothing more, drop what waits, and return when what is in flight has ended, or its time is over."""
        self._ending = True
        while self.waiting:
            for pending in list(islice(self.waiting, _ENDED_AT_ONCE)):
                self.discard(pending, Outcome.DROPPED)
            await asyncio.sleep(0)
        await self.writes_ended(None)

    def _left(self, pending: Pending, outcome: Outcome, stored: int) -> None:
        size = self._offered.pop(pending, None) if pending not in self.waiting else None
        if size is not None:
            self._offered_bytes -= size
            self.promoted += outcome is Outcome.STORED
            self.unpromoted += outcome is not Outcome.STORED
        if pending not in self.waiting and (promised := self._promised.pop(pending, 0)) and self.guard.budget:
            self.guard.budget.release(promised)
        self._tell_left(self, pending, outcome, stored)

    def discard(self, pending: Pending, outcome: Outcome) -> None:
        """Let a chunk wait no longer. Where it is in flight, that goes on."""
        if pending in self.waiting:
            self.waiting.remove(pending)
            self._tried.pop(pending, None)
            self._left(pending, outcome, 0)

    async def writes_ended(self, chunk_hashes: Collection[bytes] | None) -> bool:
        """Whether the writes that run now, of these chunks or of any, ended, none in silence for `store_timeout`."""
        running = [
            write
            for write in self._writes
            if chunk_hashes is None or any(pending.entry.chunk_hash in chunk_hashes for pending in write.batch)
        ]
        while running:
            calls = [write.calls for write in running]
            await asyncio.wait([write.ended for write in running], timeout=self.guard.timeouts.store_seconds)
            if any(n == write.calls and not write.ended.done() for n, write in zip(calls, running, strict=True)):
                return False
            running = [write for write in running if not write.ended.done()]
        return True

    async def run(self) -> None:
        """Write what waits, a batch at a time, until cancelled."""
        await recall_budget(self.guard)
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            while not self.waiting:
                backoff = _FIRST_BACKOFF_SECONDS
                self._wake.clear()
                await self._wake.wait()
            await recall_budget(self.guard)
            try:
                answered = await self._write_next()
            except Exception:  # it must end neither the queue nor the hope of those who wait for a flush
                log.exception("write-back to %s failed", self.guard.name, extra=self.guard.about)
                for pending in list(self.in_flight):
                    self._settle(pending, 0, raised=True)
                answered = False
            await note_budget(self.guard, idle=not self.waiting)
            if answered:
                backoff = _FIRST_BACKOFF_SECONDS
            elif self.waiting:
                await self._back_off(backoff)
                backoff = min(2 * backoff, self.guard.breaker.reset_seconds)

    async def _back_off(self, seconds: float) -> None:
        if not self.guard.allows():
            seconds = max(seconds, self.guard.breaker.retry_at - asyncio.get_running_loop().time())
        await asyncio.sleep(seconds)

    async def _write_next(self) -> bool:
        """Write a batch when its time has come; whether the next one may follow at once."""
        await self.guard.meter.wait_until_idle(_LOADS_GO_FIRST_SECONDS)
        await self._commits_paused()
        if self._held_bytes >= self.share_bytes:
            await self._wait_for_stuck()
            return True
        batch = self._pick()
        return not batch or await self._write(batch)  # what waited may have been evicted

    async def _wait_for_stuck(self) -> None:
        """Calls that timed out hold all that writes may hold. If none ever ends, what waits is dropped."""
        stuck = [write.ended for write in self._writes]
        timeout = self.guard.timeouts.store_seconds
        ended, _ = await asyncio.wait(stuck, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not ended:
            for pending in list(self.waiting):
                self.discard(pending, Outcome.DROPPED)

    def _pick(self) -> list[Pending]:
        """What goes next: as much as one call should carry, and writes in flight may hold.

        After a call that raised, its chunks go in ever fewer a call, and alone in the end: the fault may be that of
        one of them. Where the backend is left alone after failures, it is that of none.
        """
        batch: list[Pending] = []
        limit = min(_BATCH_BYTES, self.share_bytes)
        size = objects = 0
        together = _BATCH_OBJECTS
        is_well = self.guard.breaker.state is BreakerState.CLOSED
        while (pending := self._first_that_fits()) is not None:
            size += pending.entry.room_bytes
            objects += pending.entry.present.bit_count()
            tried = self._tried.get(pending, NEW)
            if tried.raised and is_well:
                together = min(together, _BATCH_OBJECTS >> _FEWER_BITS * tried.raised)
            if batch and (size > limit or objects > _BATCH_OBJECTS or len(batch) >= together):
                break
            batch.append(self.waiting.pop())
            self.in_flight[pending] = self._tried.pop(pending, NEW)
        return batch

    async def _write(self, batch: list[Pending]) -> bool:
        """Store a batch; whether the next one may follow at once.

        It waits where nothing was stored, or where it would be what was not stored.
        """
        masks = {pending: pending.entry.present for pending in batch}
        keys = {
            key: pending
            for pending, mask in masks.items()
            for key in pending.entry.layout.objects.keys([(pending.entry.chunk_hash, mask)])
        }
        stored: set[ObjectKey] = set()
        answered = False
        try:
            with self.guard.in_use(prefixes_of(batch)):
                answered = await self._store(batch, keys, stored)
        finally:
            unstored = {pending for key, pending in keys.items() if key not in stored}
            for pending, mask in masks.items():
                self._settle(pending, 0 if pending in unstored else mask, raised=not answered)
        follows = self.waiting.first()
        return not unstored or (bool(stored) and follows is not None and follows not in self._tried)

    async def _store(self, batch: list[Pending], keys: dict[ObjectKey, Pending], stored: set[ObjectKey]) -> bool:
        """Store what the backend lacks, and add to `stored` what it has then; whether it spoke of each object."""
        guard = self.guard
        call: Call[list[bool]] | None = None
        write = self._hold(batch)
        try:
            there = await guard.lookup(list(keys), _OWNER)
            if there is None:
                return False
            guard.unpin_found(list(keys), there)
            faults = guard.faults
            stored.update(key for key, found in zip(keys, there, strict=True) if found and key not in faults)
            missing = [key for key in keys if key not in stored]
            if guard.backend.placement.write is Placing.SKIP_IF_PRESENT:
                unsolicited = [key for key in missing if keys[key] not in self._offered]
                stored.update(await held_by(self._others(guard), unsolicited))
                missing = [key for key in missing if key not in stored]
            if missing:
                entries = dict.fromkeys([keys[key].entry for key in missing])
                guard.coming([Coming(entry.chunk_hash, entry.parent, entry.origin) for entry in entries])
            new: list[ObjectKey] = []
            for part in slices(missing, _BATCH_OBJECTS):  # a chunk may have more of them than a call
                if new and all(keys[key].entry.detached for key in part):
                    return True  # it was removed since the call before: whoever did waits for no further one
                call = guard.begin_store(part, [self._buffer(keys[key].entry, key) for key in part])
                if call is None:
                    return False
                write.calls += 1
                done = list(compress(part, await call.result()))
                faults.over(done)
                stored.update(done)
                new += done
            if new and self._observers.stored:
                await self._tell_stored(keys, dict.fromkeys(keys[key] for key in new), stored)
            return True
        except BackendError:
            return False
        finally:
            if call is None or call.has_ended:
                self._release(write)
            else:
                call.cancel()
                call.when_ended(partial(self._release, write))

    def _tell_too_large(self, size_bytes: int, capacity_bytes: int) -> None:
        """Say once of a backend that it can never store chunks of such a size."""
        if not self._told_too_large:
            self._told_too_large = True
            log.warning(
                "backend %s stores no chunk of %d bytes: its capacity is %d",
                self.guard.name,
                size_bytes,
                capacity_bytes,
                extra=self.guard.about,
            )

    async def _tell_stored(
        self, keys: dict[ObjectKey, Pending], chunks: Iterable[Pending], stored: Collection[ObjectKey]
    ) -> None:
        """Tell observers of those chunks that the backend has all of; L1 need not have all of them."""
        parts = {pending for key, pending in keys.items() if key not in stored}
        asked = {
            key: pending
            for pending in chunks
            for key in pending.entry.layout.objects.keys([(pending.entry.chunk_hash, pending.entry.lacks)])
        }
        if asked:
            there = await self.guard.lookup(list(asked), _OWNER)
            if there is not None:
                self.guard.unpin_found(list(asked), there)
            parts.update(compress(asked.values(), map(not_, there)) if there is not None else asked.values())
        for pending in chunks:
            if pending not in parts:
                notify(self._observers.stored, self.guard.name, pending.entry.observed())

    def _hold(self, batch: list[Pending]) -> Write:
        """Keep the memory of a batch until its write has ended."""
        write = Write(batch)
        self._held_bytes += write.size_bytes
        self._writes.add(write)
        for pending in batch:
            self._l1.uses.pin(pending.entry)
        return write

    def _release(self, write: Write) -> None:
        self._held_bytes -= write.size_bytes
        self._writes.discard(write)
        write.ended.set_result(None)
        for pending in reversed(write.batch):
            self._l1.uses.unpin(pending.entry)

    def _settle(self, pending: Pending, stored: int, *, raised: bool) -> None:
        """A write is over for one of its chunks, of which the backend has the objects in `stored` now."""
        before = self.in_flight.pop(pending)
        tried = Tried(before.attempts + 1, before.raised + raised)
        if pending.entry.detached or (pending in self.waiting and not stored):
            self._left(pending, Outcome.WITHDRAWN, 0)
        elif stored:
            self._left(pending, Outcome.STORED, stored)
        elif tried.attempts < _ATTEMPTS and not self._ending:
            self._tried[pending] = tried
            self._push(pending)
        else:
            self._left(pending, Outcome.DROPPED, 0)

    def _buffer(self, entry: Entry, key: ObjectKey) -> memoryview:
        span = entry.layout.objects.spans[key.rank][key.group]
        assert span is not None
        offset = entry.offset(key.rank)
        return self._l1.arena.view[offset + span[0] : offset + span[1]].toreadonly()

    def check_integrity(self) -> None:
        """Assert that the bytes that are offered are counted."""
        assert self._offered_bytes == sum(self._offered.values())
        assert all(pending in self.waiting or pending in self.in_flight for pending in self._promised)
        assert all(pending in self.waiting or pending in self.in_flight for pending in self._offered)

    def __repr__(self) -> str:
        return f"<WriteQueue of {self.guard.name}, {len(self.waiting)} waiting, {len(self.in_flight)} in flight>"
