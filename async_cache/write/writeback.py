"""L1 -> L2: what was committed is stored in every backend, behind the requests.

Each backend has a lane of its own, so that a dead one holds up nothing else. A lane takes what waits longest, leaves
out what the backend has already, and tries again with back-off; what can not be stored, or is evicted first, is dropped
and counted. Only writes in flight hold memory.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Collection, Sequence
from enum import Enum

from async_cache.config import CacheConfig
from async_cache.errors import BackendError
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Call, Guard
from async_cache.prompt.keys import ObjectKey
from async_cache.values import FlushResult

log = logging.getLogger(__name__)

_BATCH_BYTES = 32 * 2**20
_BATCH_OBJECTS = 256  # of a call: the loop handles so many in a millisecond or two, and a disk has time for their names
_ATTEMPTS = 5
_FIRST_BACKOFF_SECONDS = 0.1
_LOADS_GO_FIRST_SECONDS = 1.0  # how long a write gives way to loads
_COMMITS_GO_FIRST_SECONDS = 0.025  # how long it gives way to a burst of commits, which ends with ...
_PAUSE_SECONDS = 0.003  # ... so long a time without one


class Fate(Enum):
    """What became of an entry in a lane."""

    STORED = "stored"
    DROPPED = "dropped"
    FORGOTTEN = "forgotten"


class Lane:
    """The way to one backend. An entry is WAITING -> IN FLIGHT -> stored, or WAITING again, or dropped."""

    def __init__(self, guard: Guard):
        self.guard = guard
        self.waiting: OrderedDict[Entry, int] = OrderedDict()  # -> attempts so far
        self.in_flight: dict[Entry, int] = {}
        self.writes: list[list[Entry]] = []  # batches of which a call is out, also one that was given up
        self.held_bytes = 0
        self.wake = asyncio.Event()
        self.landed = asyncio.Event()  # set whenever a write has ended


class Flush:
    """Somebody waits for `left` chunks: those that began to wait before it did."""

    def __init__(self, number: int, left: int):
        self.number = number
        self.left = left
        self.done = asyncio.Event()


class Writeback:
    """The lanes, and who waits for them to be empty."""

    def __init__(self, l1: L1Store, guards: Sequence[Guard], config: CacheConfig):
        self.dropped = 0
        self._l1 = l1
        self._config = config
        self._lanes = [Lane(guard) for guard in guards]
        self._share_bytes = int(config.l1_bytes * config.writeback_share) // max(1, len(guards))
        self._written = 0
        self._pending: dict[Entry, int] = {}  # what some backend has not stored -> how many flushes came before it
        self._stored: dict[Entry, int] = {}  # of those that are pending, the objects that some backend has stored
        self._flushes: set[Flush] = set()
        self._flushed = 0
        self._closed = False
        self._clock = asyncio.get_running_loop().time
        self._committed = 0.0  # when the last one was
        self._reported = (0, 0)  # written and dropped, as of the last flush
        self._tasks = [asyncio.create_task(self._run(lane)) for lane in self._lanes]

    @property
    def pending(self) -> int:
        """Chunks that some backend has not stored."""
        return len(self._pending)

    def enqueue(self, entry: Entry) -> None:
        """Objects of this chunk were committed, or it is stored anew after it was dropped."""
        entry.dropped = False
        self._committed = self._clock()
        for lane in self._lanes:
            if entry not in lane.waiting:
                lane.waiting[entry] = 0
                self._began(entry)
                lane.wake.set()

    def evicted(self, entry: Entry) -> None:
        """It left L1 unwritten."""
        self._leave_lanes(entry, Fate.DROPPED)

    def forget(self, entry: Entry) -> None:
        """It was deleted, and need not be written any more. A write in flight ends, see `landed`."""
        self._leave_lanes(entry, Fate.FORGOTTEN)

    def _leave_lanes(self, entry: Entry, fate: "Fate") -> None:
        for lane in self._lanes:
            if lane.waiting.pop(entry, None) is not None:
                self._ended(entry, fate)

    async def landed(self, guard: Guard, chunk_hashes: Collection[bytes] | None, timeout_seconds: float) -> bool:
        """Until the writes to this backend that are out now, of these chunks or of any, have ended; False if not."""
        lane = next(lane for lane in self._lanes if lane.guard is guard)
        mine = [b for b in lane.writes if chunk_hashes is None or any(e.chunk_hash in chunk_hashes for e in b)]
        try:
            async with asyncio.timeout(timeout_seconds):
                while any(batch in lane.writes for batch in mine):
                    lane.landed.clear()
                    await lane.landed.wait()
        except TimeoutError:
            return False
        return True

    async def flush(self, deadline_seconds: float | None) -> FlushResult:
        """Wait until everything that waits now is stored or dropped, or the deadline has passed."""
        flush = Flush(self._flushed, len(self._pending))
        self._flushed += 1
        self._flushes.add(flush)
        if self._closed or not flush.left:
            flush.done.set()
        try:
            async with asyncio.timeout(deadline_seconds):
                await flush.done.wait()
        except TimeoutError:
            pass
        finally:
            self._flushes.discard(flush)
        written, dropped = self._reported
        self._reported = self._written, self.dropped
        return FlushResult(self._written - written, flush.left, self.dropped - dropped)

    async def close(self) -> None:
        """Stop writing. Calls that are out belong to the guards."""
        self._closed = True
        for flush in self._flushes:
            flush.done.set()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def check_integrity(self) -> None:
        """An entry knows how many lanes it is in, and holds are those of writes in flight."""
        places = [entry for lane in self._lanes for entry in (*lane.waiting, *lane.in_flight)]
        assert all(entry.unwritten == places.count(entry) for entry in places[:256])
        assert self._pending.keys() == set(places)
        assert all(entry.holds for lane in self._lanes for entry in lane.in_flight)
        assert not any(entry.detached for lane in self._lanes for entry in lane.waiting)

    def _began(self, entry: Entry) -> None:
        entry.unwritten += 1
        self._pending.setdefault(entry, self._flushed)

    def _ended(self, entry: Entry, fate: "Fate", mask: int = 0) -> None:
        """One lane has done with it, having stored `mask`. It counts as dropped if no backend has stored all of it."""
        entry.unwritten -= 1
        entry.dropped |= fate is Fate.DROPPED
        self._stored[entry] = self._stored.get(entry, 0) | mask
        if not entry.unwritten:
            stored = not entry.present & ~self._stored.pop(entry)
            began = self._pending.pop(entry)
            self._written += stored
            self.dropped += fate is Fate.DROPPED and not stored
            for flush in self._flushes:
                if began <= flush.number:
                    flush.left -= 1
                    if not flush.left:
                        flush.done.set()

    async def _run(self, lane: Lane) -> None:
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            while not lane.waiting:
                lane.wake.clear()
                await lane.wake.wait()
            await lane.guard.meter.wait_until_idle(_LOADS_GO_FIRST_SECONDS)
            await self._wait_for_commits()
            if lane.held_bytes >= self._share_bytes:
                await self._wait_for_stuck(lane)
                continue
            batch = self._pick(lane)
            if not batch:  # what waited was evicted
                continue
            try:
                answered = await self._write(lane, batch)
            except Exception:
                log.exception("write-back to %s failed", lane.guard.backend.name)
                answered = False
            if answered:
                backoff = _FIRST_BACKOFF_SECONDS
            else:
                await self._pause(lane, backoff)
                backoff *= 2

    async def _wait_for_commits(self) -> None:
        """A writer that fills one chunk after the other has the memory's bandwidth to itself."""
        end = self._clock() + _COMMITS_GO_FIRST_SECONDS
        while self._clock() < end:
            committed = self._committed
            await asyncio.sleep(_PAUSE_SECONDS)
            if self._committed == committed:
                return

    async def _pause(self, lane: Lane, backoff: float) -> None:
        if not lane.guard.allows():
            backoff = max(backoff, lane.guard.breaker.retry_at - asyncio.get_running_loop().time())
        await asyncio.sleep(min(backoff, self._config.breaker_reset_seconds))

    async def _wait_for_stuck(self, lane: Lane) -> None:
        """Calls that timed out hold all that writes may hold. If they never end, what waits is dropped."""
        lane.landed.clear()
        try:
            async with asyncio.timeout(lane.guard.timeouts.store_seconds):
                await lane.landed.wait()
        except TimeoutError:
            for entry in list(lane.waiting):
                del lane.waiting[entry]
                self._ended(entry, Fate.DROPPED)

    def _pick(self, lane: Lane) -> list[Entry]:
        """What goes next: as much as one call should carry, and writes in flight may hold."""
        batch: list[Entry] = []
        limit = min(_BATCH_BYTES, self._share_bytes)
        size = objects = 0
        for entry in lane.waiting:
            size += entry.room_bytes
            objects += entry.present.bit_count()
            if batch and (size > limit or objects > _BATCH_OBJECTS):
                break
            batch.append(entry)
        for entry in batch:
            lane.in_flight[entry] = lane.waiting.pop(entry)
        return batch

    async def _write(self, lane: Lane, batch: list[Entry]) -> bool:
        """Store a batch; whether the backend did its part."""
        masks = {entry: entry.present for entry in batch}
        keys = {key: e for e, mask in masks.items() for key in e.layout.objects.keys([(e.chunk_hash, mask)])}
        stored: set[ObjectKey] = set()
        try:
            await self._store(lane, batch, keys, stored)
        finally:
            unstored = {entry for key, entry in keys.items() if key not in stored}
            for entry, mask in masks.items():
                self._landed(lane, entry, 0 if entry in unstored else mask)
            lane.landed.set()
        return not unstored

    async def _store(
        self, lane: Lane, batch: list[Entry], keys: dict[ObjectKey, Entry], stored: set[ObjectKey]
    ) -> None:
        """Store what the backend lacks, and note what it has then. The memory is held until the call has ended."""
        guard = lane.guard
        call: Call[list[bool]] | None = None
        size = sum(entry.room_bytes for entry in batch)
        lane.held_bytes += size
        lane.writes.append(batch)
        for entry in batch:
            self._l1.hold(entry)
        try:
            there = await guard.lookup(list(keys))
            if there is None:
                return
            guard.unpin_found(list(keys), there)
            stored.update(key for key, found in zip(keys, there, strict=True) if found)
            missing = [key for key in keys if key not in stored]
            if missing:
                call = guard.begin_store(missing, [self._buffer(keys[key], key) for key in missing])
            if call is not None:
                done = await call.result()
                stored.update(key for key, ok in zip(missing, done, strict=True) if ok)
        except BackendError:
            return
        finally:
            if call is not None:
                call.cancel()
            self._release(lane, batch, size, call)

    def _landed(self, lane: Lane, entry: Entry, stored: int) -> None:
        attempts = lane.in_flight.pop(entry) + 1
        if entry.detached:
            self._ended(entry, Fate.FORGOTTEN)
        elif stored:
            self._ended(entry, Fate.STORED, stored)
        elif attempts < _ATTEMPTS and entry not in lane.waiting:
            lane.waiting[entry] = attempts
        else:
            self._ended(entry, Fate.DROPPED)

    def _release(self, lane: Lane, batch: list[Entry], size: int, call: Call[list[bool]] | None) -> None:
        def release() -> None:
            lane.held_bytes -= size
            lane.writes.remove(batch)
            lane.landed.set()
            for entry in reversed(batch):
                self._l1.unhold(entry)

        if call is None or call.has_ended:
            release()
        else:
            call.when_ended(release)

    def _buffer(self, entry: Entry, key: ObjectKey) -> memoryview:
        span = entry.layout.objects.spans[key.rank][key.group]
        assert span is not None
        offset = entry.offset(key.rank)
        return self._l1.arena.view[offset + span[0] : offset + span[1]].toreadonly()
