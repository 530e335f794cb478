"""L1 -> L2: what was committed is stored in the backends, as the placement of each says, behind the requests.

Each backend has a queue of its own, so that a dead one holds up nothing else. A queue takes what waits longest, leaves
out what the backend has already, and tries again with back-off; what cannot be stored, or is evicted first, is dropped
and counted. Only writes in flight hold memory.
"""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

from async_cache.config import CacheConfig
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard
from async_cache.l2.guard.guards import Guards
from async_cache.l2.placement import Placing
from async_cache.observe import Observers
from async_cache.read.load import ChunkLoad
from async_cache.values import BackendState, FlushResult
from async_cache.write.admission import Admission
from async_cache.write.flushes import Flushes
from async_cache.write.pending import Outcome, Pending
from async_cache.write.queue import WriteQueue
from async_cache.write.tally import Tallies
from async_cache.write.wear import note_budget

_COMMITS_GO_FIRST_SECONDS = 0.025  # how long a write gives way to a burst of commits, which ends with ...
_PAUSE_SECONDS = 0.003  # ... so long a time without one
_EARLY_SECONDS = 0.001  # a timer may fire so early
_AGAIN = {2, 4, 8}  # times that a chunk was asked for: then a backend with a budget is asked once more to take it
_NOTED_SECONDS = 2.0  # for what is noted at the end


class Writeback:
    """The queues of all backends, and who waits for them to be empty."""

    def __init__(self, l1: L1Store, guards: Guards, observers: Observers, config: CacheConfig):
        self.dropped = 0
        """Chunks that no backend has stored, and none will be asked to."""
        self._written = 0
        self._reported = (0, 0)  # written and dropped, as of the last flush, ...
        self._refused = 0  # ... and refused
        self._l1 = l1
        self._guards = guards
        self._observers = observers
        self._share_bytes = int(config.l1_bytes * config.writeback_share)
        self._queues: dict[Guard, WriteQueue] = {}
        self._at_once: list[WriteQueue] = []  # by what is committed
        self._later: list[WriteQueue] = []
        self._promoting: list[WriteQueue] = []
        self._admission: Admission | None = None  # while a backend admits only what was asked for
        self._pending: dict[Entry, Pending] = {}
        self._offered: dict[Entry, Pending] = {}
        self._tallies = Tallies()
        self._flushes = Flushes()
        self._closed = False
        self._clock = asyncio.get_running_loop().time
        self._committed_at = 0.0  # when the last one was
        self._tasks: dict[WriteQueue, asyncio.Task[None]] = {}
        for guard in guards.current:
            self._begin(guard)
        self.arrange()

    # The queues: one for each backend, until it is closed.

    def add(self, guard: Guard) -> None:
        """Write to a backend from now on, as its placement says."""
        self._begin(guard)
        self.arrange()

    def _begin(self, guard: Guard) -> None:
        queue = WriteQueue(
            guard,
            self._l1,
            self._commits_paused,
            self._guards.others,
            self._left_queue,
            self._refused_by_a_backend,
            self._observers,
        )
        self._queues[guard] = queue
        self._tasks[queue] = asyncio.create_task(queue.run())

    def arrange(self) -> None:
        """Take note of which backends there are now, and what state they are in."""
        at_once, later = self._guards.stages()
        self._at_once = [self._queues[guard] for guard in at_once]
        self._later = [self._queues[guard] for guard in later]
        active = [guard for guard in self._guards.current if guard.state is BackendState.ACTIVE]
        self._promoting = [self._queues[guard] for guard in active if guard.backend.placement.promote]
        written = (*at_once, *later)
        thresholds = {guard.backend.placement.admit for guard in written} - {1}
        if any(guard.budget is not None for guard in written):
            thresholds |= _AGAIN
        if thresholds and self._admission is None:
            self._admission = Admission(self._asked_for)
            self._observers.add(self._admission)
        elif not thresholds and self._admission is not None:
            self._observers.discard(self._admission)
            self._admission = None
        if self._admission is not None:
            self._admission.thresholds = thresholds
        self._share()

    def reconfigure(self, config: CacheConfig) -> None:
        """Give writes in flight the share of L1 that the settings say now."""
        self._share_bytes = int(config.l1_bytes * config.writeback_share)
        self._share()

    def _share(self) -> None:
        for queue in self._queues.values():
            queue.share_bytes = max(1, self._share_bytes // len(self._queues))

    async def end(self, guard: Guard) -> None:
        """Write nothing more to a backend: what waits for it is dropped there, what is in flight ends."""
        self.arrange()
        await self._queues[guard].end()

    async def forget(self, guard: Guard) -> None:
        """End the queue of a backend that is about to be closed."""
        await self._end_tasks([self._queues[guard]])
        del self._queues[guard]
        self.arrange()

    def queue(self, guard: Guard) -> WriteQueue | None:
        """The queue of a backend; None where it has ended."""
        return self._queues.get(guard)

    @property
    def stores(self) -> bool:
        """Whether there is a backend that chunks are stored in."""
        return bool(self._at_once or self._later)

    @property
    def pending(self) -> int:
        """Chunks that some backend has not stored."""
        return len(self._pending)

    @property
    def refused(self) -> int:
        """How often a backend did not admit a chunk."""
        return sum(queue.refused.total() for queue in self._queues.values())

    def keeps(self, entry: Entry) -> bool:
        """Whether a chunk waits for a backend, and L1 may have all that there is of it."""
        return entry in self._pending

    # Chunks come.

    def enqueue(self, entry: Entry, hashes: Sequence[bytes] = (), number: int = 0) -> None:
        """Store a chunk: objects of it were committed, or it is stored anew after it was dropped.

        It is chunk `number` of a prompt with these hashes, if that is known: what lies in front of it is in use too.
        What no backend is to be given is not pending.
        """
        entry.dropped = False
        self._committed_at = self._clock()
        queues, later = self._at_once, self._later
        if self._admission is not None:
            asked, waits = self._admission.count(entry.chunk_hash), self._pending.get(entry)
            queues = [queue for queue in queues if queue.admits(entry, waits, asked)]
            later = [queue for queue in later if queue.admits(entry, waits, asked)]
        if not queues:
            queues, later = later[:1], later[1:]
        if queues:
            pending = self._pending.get(entry)
            if pending is None:
                pending = self._offered.pop(entry, None) or Pending(entry, 0, hashes or (entry.chunk_hash,), number)
                pending.epoch = self._flushes.began(entry.owner)
                self._pending[entry] = pending
                if (tally := self._tallies.find(entry.owner)) is not None:
                    tally.pending += 1
            pending.later = tuple(later)
            for queue in queues:
                if queue.add(pending):
                    entry.unwritten += 1

    def _asked_for(self, hashes: Sequence[bytes], number: int) -> None:
        """A chunk was asked for so often that a backend admits it now."""
        entry = self._l1.find(hashes[number])
        if entry is not None:
            self.enqueue(entry, hashes, number)

    def promote(self, loads: Iterable[tuple[ChunkLoad, Entry | None]]) -> None:
        """Offer what was loaded to the backends before the one that it came from, if they want that.

        Nobody waits for what is offered, and L1 may let go of it: it is neither pending nor dropped.
        """
        if not self._promoting:
            return
        faster: dict[Guard, list[WriteQueue]] = {}
        for load, entry in loads:
            if entry is None or entry.detached or not load.loaded:
                continue
            source = load.batches[-1].guard
            if source not in faster:
                before = self._guards.before(source)
                faster[source] = [queue for queue in self._promoting if queue.guard in before]
            for queue in faster[source]:
                if queue.has_room_for(entry):
                    self._offer(entry, queue)

    def _offer(self, entry: Entry, queue: WriteQueue) -> None:
        pending = self._pending.get(entry) or self._offered.get(entry)
        if pending is None:
            pending = self._offered[entry] = Pending(entry, 0, (entry.chunk_hash,), 0)
        if queue.offer(pending):
            entry.unwritten += 1

    # Chunks leave.

    def evicted(self, entry: Entry) -> None:
        """A chunk left L1 before it was stored: drop it."""
        self._leave_queues(entry, Outcome.DROPPED)

    def withdraw(self, entry: Entry) -> None:
        """A chunk was deleted, and need not be stored. A write that runs ends, see `writes_ended`."""
        self._leave_queues(entry, Outcome.WITHDRAWN)

    def _leave_queues(self, entry: Entry, outcome: Outcome) -> None:
        pending = self._pending.get(entry) or self._offered.get(entry)
        if pending is not None:
            pending.later = ()
            for queue in list(self._queues.values()):
                queue.discard(pending, outcome)

    def _left_queue(self, queue: WriteQueue, pending: Pending, outcome: Outcome, stored: int) -> None:
        """A chunk has left a queue: with the last one it is written, or dropped if no backend has stored all of it."""
        entry = pending.entry
        entry.unwritten -= 1
        if pending is self._offered.get(entry):
            if not entry.unwritten:
                del self._offered[entry]
            return
        entry.dropped |= outcome is Outcome.DROPPED
        pending.dropped |= outcome is Outcome.DROPPED
        pending.stored |= stored
        if pending.later and not entry.present & ~stored:
            pending.later = self._left_for(queue, pending.later)
        if entry.unwritten or self._take_turn(pending):
            return
        del self._pending[entry]
        written = not entry.present & ~pending.stored
        dropped = not written and outcome is not Outcome.WITHDRAWN and pending.dropped
        self._written += written
        self.dropped += dropped
        if (tally := self._tallies.find(entry.owner)) is not None:
            tally.pending -= 1
            tally.written += written
            tally.dropped += dropped
        self._flushes.ended(entry.owner, pending.epoch)

    def _refused_by_a_backend(self, entry: Entry) -> None:
        if (tally := self._tallies.find(entry.owner)) is not None:
            tally.refused += 1

    def _left_for(self, stored_by: WriteQueue, later: tuple[WriteQueue, ...]) -> tuple[WriteQueue, ...]:
        """Who still has a turn after a backend has stored a chunk: FIRST behind it has not."""
        behind = self._guards.behind(stored_by.guard)
        is_first = Placing.FIRST
        return tuple(q for q in later if q.guard not in behind or q.guard.backend.placement.write is not is_first)

    def _take_turn(self, pending: Pending) -> bool:
        """Let a chunk that is in no queue wait in the next one that has a turn; False if there is none."""
        while pending.later:
            queue, *others = pending.later
            pending.later = tuple(others)
            if queue.add(pending):
                pending.entry.unwritten += 1
                return True
        return False

    # Who waits.

    async def writes_ended(self, guard: Guard, chunk_hashes: Collection[bytes] | None) -> bool:
        """Whether the writes to a backend that run now, of these chunks or of any, ended in time."""
        queue = self._queues.get(guard)
        return queue is None or await queue.writes_ended(chunk_hashes)

    def tell_apart(self, owners: Iterable[str]) -> None:
        """Count for these owners what is pending, written and dropped of their own, from now on."""
        self._tallies.keep(owners, (entry.owner for entry in self._pending))

    def pending_of(self, owners: Collection[str]) -> int:
        """Chunks of owners who are told apart that some backend has not stored."""
        return self._tallies.pending(owners)

    def dropped_of(self, owners: Collection[str]) -> int:
        """Chunks of owners who are told apart that no backend has stored, and none will be asked to."""
        return self._tallies.dropped(owners)

    async def flush(self, deadline_seconds: float | None, owners: Collection[str] | None = None) -> FlushResult:
        """Wait until everything that waits now is stored or dropped, or the deadline has passed.

        What is to be committed when a load has ended is not waited for, and counts as pending. With `owners`, who are
        told apart, it is theirs that is waited for, and told.
        """
        flush = self._flushes.begin(owners)
        try:
            async with asyncio.timeout(deadline_seconds if not self._closed else 0):
                await flush.done.wait()
        except TimeoutError:
            pass
        finally:
            self._flushes.leave(flush)
        left = self._flushes.left(flush)
        if owners is not None:
            written, dropped, refused = self._tallies.take(owners)
            pending = left + sum(map(self._l1.deferred_by_owner.__getitem__, owners))
            return FlushResult(written, pending, dropped, refused)
        written, dropped = self._reported
        self._reported = self._written, self.dropped
        pending = left + self._l1.deferred
        refused, self._refused = self._refused, self.refused
        return FlushResult(self._written - written, pending, self.dropped - dropped, self.refused - refused)

    async def close(self) -> None:
        """Stop writing. Calls that are out belong to the guards."""
        self._closed = True
        for pending in self._pending.values():
            pending.later = ()  # a cycle that no collection would find: see `Pending`
        self._flushes.end_all()
        await self._end_tasks(list(self._tasks))

    async def _end_tasks(self, queues: Sequence[WriteQueue]) -> None:
        tasks = [self._tasks.pop(queue) for queue in queues]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        with suppress(TimeoutError):
            async with asyncio.timeout(_NOTED_SECONDS):
                await asyncio.gather(*(note_budget(queue.guard, idle=True) for queue in queues))

    async def _commits_paused(self) -> None:
        """Return when a burst of commits is over, or has lasted long.

        A writer that fills one chunk after the other has the memory's bandwidth to itself.
        """
        latest = self._clock() + _COMMITS_GO_FIRST_SECONDS
        while (left := min(self._committed_at + _PAUSE_SECONDS, latest) - self._clock()) > _EARLY_SECONDS:  # noqa: ASYNC110 (a deadline)
            await asyncio.sleep(left)

    def check_integrity(self) -> None:
        """An entry knows how many queues it is in, and pins are those of writes that run."""
        queues = self._queues.values()
        places = [pending for queue in queues for pending in (*queue.waiting, *queue.in_flight)]
        assert all(pending.entry.unwritten == places.count(pending) for pending in places[:256])
        assert {*self._pending.values(), *self._offered.values()} == set(places)
        assert self._pending.keys().isdisjoint(self._offered)
        assert self._flushes.chunks == len(self._pending)
        assert all(pending.entry.pins for queue in queues for pending in queue.in_flight)
        assert not any(pending.entry.detached for queue in queues for pending in queue.waiting)
        for queue in queues:
            queue.check_integrity()

    def __repr__(self) -> str:
        return f"<Writeback, {self.pending} pending, {self.dropped} dropped>"
