"""L1 -> L2: what was committed is stored in every backend, behind the requests.

Each backend has a queue of its own, so that a dead one holds up nothing else. A queue takes what waits longest, leaves
out what the backend has already, and tries again with back-off; what cannot be stored, or is evicted first, is dropped
and counted. Only writes in flight hold memory.
"""

import asyncio
from collections.abc import Collection, Sequence

from async_cache.config import CacheConfig
from async_cache.l1.entry import Entry
from async_cache.l1.store import L1Store
from async_cache.l2.guard import Guard
from async_cache.values import FlushResult
from async_cache.write.queue import Outcome, Pending, WriteQueue

_COMMITS_GO_FIRST_SECONDS = 0.025  # how long a write gives way to a burst of commits, which ends with ...
_PAUSE_SECONDS = 0.003  # ... so long a time without one
_EARLY_SECONDS = 0.001  # a timer may fire so early


class Flush:
    """Somebody waits for `left` chunks: those that began to wait in its epoch or before."""

    def __init__(self, epoch: int, left: int):
        self.epoch = epoch
        self.left = left
        self.done = asyncio.Event()


class Writeback:
    """The queues of all backends, and who waits for them to be empty."""

    def __init__(self, l1: L1Store, guards: Sequence[Guard], config: CacheConfig):
        self.dropped = 0
        """Chunks that no backend has stored, and none will be asked to."""
        self._written = 0
        self._reported = (0, 0)  # written and dropped, as of the last flush
        share_bytes = int(config.l1_bytes * config.writeback_share) // max(1, len(guards))
        self._queues = [
            WriteQueue(guard, l1, max(1, share_bytes), self._commits_paused, self._left_queue) for guard in guards
        ]
        self._pending: dict[Entry, Pending] = {}
        self._flushes: set[Flush] = set()
        self._epoch = 0  # how many flushes there have been
        self._closed = False
        self._clock = asyncio.get_running_loop().time
        self._committed_at = 0.0  # when the last one was
        self._tasks = [asyncio.create_task(queue.run()) for queue in self._queues]

    @property
    def stores(self) -> bool:
        """Whether there is a backend that chunks are stored in."""
        return bool(self._queues)

    @property
    def pending(self) -> int:
        """Chunks that some backend has not stored."""
        return len(self._pending)

    def enqueue(self, entry: Entry, hashes: Sequence[bytes] = (), number: int = 0) -> None:
        """Store a chunk: objects of it were committed, or it is stored anew after it was dropped.

        It is chunk `number` of a prompt with these hashes, if that is known: what lies in front of it is in use too.
        """
        entry.dropped = False
        self._committed_at = self._clock()
        queues = self._queues  # every chunk goes to every backend: this is where another choice would be made
        if queues:
            pending = self._pending.get(entry)
            if pending is None:
                pending = self._pending[entry] = Pending(entry, self._epoch, hashes or (entry.chunk_hash,), number)
            for queue in queues:
                if queue.add(pending):
                    entry.unwritten += 1

    def evicted(self, entry: Entry) -> None:
        """A chunk left L1 before it was stored: drop it."""
        self._leave_queues(entry, Outcome.DROPPED)

    def withdraw(self, entry: Entry) -> None:
        """A chunk was deleted, and need not be stored. A write that runs ends, see `writes_ended`."""
        self._leave_queues(entry, Outcome.WITHDRAWN)

    def _leave_queues(self, entry: Entry, outcome: Outcome) -> None:
        pending = self._pending.get(entry)
        if pending is not None:
            for queue in self._queues:
                queue.discard(pending, outcome)

    def _left_queue(self, pending: Pending, outcome: Outcome, stored: int) -> None:
        """A chunk has left a queue: with the last one it is written, or dropped if no backend has stored all of it."""
        entry = pending.entry
        entry.unwritten -= 1
        entry.dropped |= outcome is Outcome.DROPPED
        pending.stored |= stored
        if not entry.unwritten:
            del self._pending[entry]
            if not entry.present & ~pending.stored:
                self._written += 1
            elif outcome is Outcome.DROPPED:
                self.dropped += 1
            for flush in self._flushes:
                if pending.epoch <= flush.epoch:
                    flush.left -= 1
                    if not flush.left:
                        flush.done.set()

    async def writes_ended(self, guard: Guard, chunk_hashes: Collection[bytes] | None) -> bool:
        """Whether the writes to a backend that run now, of these chunks or of any, ended in time."""
        queue = next(queue for queue in self._queues if queue.guard is guard)
        return await queue.writes_ended(chunk_hashes)

    async def flush(self, deadline_seconds: float | None) -> FlushResult:
        """Wait until everything that waits now is stored or dropped, or the deadline has passed."""
        flush = Flush(self._epoch, len(self._pending))
        self._epoch += 1
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

    async def _commits_paused(self) -> None:
        """Return when a burst of commits is over, or has lasted long.

        A writer that fills one chunk after the other has the memory's bandwidth to itself.
        """
        latest = self._clock() + _COMMITS_GO_FIRST_SECONDS
        while (left := min(self._committed_at + _PAUSE_SECONDS, latest) - self._clock()) > _EARLY_SECONDS:  # noqa: ASYNC110 (a deadline)
            await asyncio.sleep(left)

    def check_integrity(self) -> None:
        """An entry knows how many queues it is in, and pins are those of writes that run."""
        places = [pending for queue in self._queues for pending in (*queue.waiting, *queue.in_flight)]
        assert all(pending.entry.unwritten == places.count(pending) for pending in places[:256])
        assert set(self._pending.values()) == set(places)
        assert all(self._pending[pending.entry] is pending for pending in places)
        assert all(pending.entry.pins for queue in self._queues for pending in queue.in_flight)
        assert not any(pending.entry.detached for queue in self._queues for pending in queue.waiting)

    def __repr__(self) -> str:
        return f"<Writeback, {self.pending} pending, {self.dropped} dropped>"
