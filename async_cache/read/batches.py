"""Calls that load: objects are cut into batches, one backend each, and called for by the bytes in flight."""

import asyncio
import logging
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial
from itertools import accumulate, groupby
from operator import attrgetter

from async_cache.aio.slices import turn
from async_cache.errors import BackendError
from async_cache.l2.backend import LoadOutcome
from async_cache.l2.guard import Call, CallTimeoutError, Guard
from async_cache.l2.guard.fair import FairQueue
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.objects import PAGE_BYTES
from async_cache.read.load import ChunkLoad
from async_cache.read.progress import Progress, Watchers
from async_cache.values import Shortfall

log = logging.getLogger(__name__)

_BATCH_BYTES = 64 * 2**20  # of one call to a backend: enough to keep its threads busy, little enough to have an end
_BATCH_CHUNKS = 1024  # what the loop prepares in a millisecond or two, ...
_BATCH_OBJECTS = 2048  # ... of so many objects
_FEW_OBJECTS = 256  # more have a turn of the loop to themselves
_FIRST_CHUNKS = 4  # of the first call, where somebody watches, ...
_MANY_CHUNKS = 32  # ... and more than so many are to be loaded: they take a while to prepare, ...
_FIRST_SECONDS = 0.002  # ... which begins when the first ones come, or after this
_PLACE = attrgetter("rank", "offset")


class BatchState(Enum):
    """QUEUED -> RUNNING, when its bytes are in flight, -> ENDED. QUEUED -> ENDED when nobody wants it any more."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


class Batch:
    """The objects of one call to a backend, by chunk.

    `parts` are pinned, until they are unpinned or the batch ends. `touches` are those whose room was given to the call,
    until the call has ended, which may be later. `came` is set when the first of it has come, where others wait for
    that: it is their `after`.
    """

    __slots__ = ("after", "call", "came", "guard", "objects", "parts", "size_bytes", "state", "touches", "tried")

    def __init__(self, guard: Guard, tried: frozenset[Guard], after: asyncio.Event | None = None):
        self.guard = guard
        self.after = after
        self.came: asyncio.Event | None = None
        self.tried = tried | {guard}  # the holders that need not be asked if this one fails
        self.state = BatchState.QUEUED
        self.parts: dict[ChunkLoad, int] = {}
        self.touches: Mapping[ChunkLoad, int] = {}
        self.size_bytes = self.objects = 0
        self.call: Call[list[LoadOutcome]] | None = None

    @property
    def cost(self) -> int:
        """Its bytes, but at least a page for each object: so much does a small one cost."""
        return max(self.size_bytes, self.objects * PAGE_BYTES)

    def unpin(self, loads: Iterable[ChunkLoad]) -> None:
        """Unpin these parts: they are no longer asked for."""
        for layout, same in groupby(loads, key=lambda load: load.layout):
            self.guard.unpin(layout.objects.keys([(load.chunk_hash, self.parts.pop(load, 0)) for load in same]))


Transferred = Callable[[Batch, Mapping[ChunkLoad, int], Sequence[LoadOutcome], Shortfall], Awaitable[None]]
"""Told what came of the parts of a batch: an outcome for each object, or none at all and why."""
Objects = Sequence[tuple[ChunkLoad, int]]
"""Single objects, each as a bit of its chunk."""


class Batches:
    """The queues of all backends, and the calls that are out.

    `transferred` takes over when a batch has ended, `failed` when something raised that should not have, and
    `call_ended` is told of the rooms that a call does not touch any more. `loaded` hears of objects of a batch that
    goes on, as long as there are watchers.
    """

    def __init__(
        self,
        memory: memoryview,
        inflight_bytes: int,
        *,
        transferred: Transferred,
        failed: Callable[[Iterable[ChunkLoad]], None],
        call_ended: Callable[[Iterable[ChunkLoad]], None],
        loaded: Callable[[Objects], None],
    ):
        self.objects = 0
        """Objects that were asked of backends so far."""
        self._memory = memory
        self.inflight_bytes = inflight_bytes
        """What is asked of one backend at a time."""
        self._transferred, self._failed, self._call_ended, self._loaded = transferred, failed, call_ended, loaded
        self._watchers = Watchers()
        self._out: set[Progress] = set()  # that of calls that are out
        self._queues: dict[Guard, FairQueue[Batch]] = {}
        self._running_bytes: dict[Guard, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def enqueue(self, guard: Guard, parts: Sequence[tuple[ChunkLoad, int]], tried: frozenset[Guard]) -> None:
        """Cut objects, which are pinned, into batches, and start those that the bytes in flight allow."""
        queue, batch = self._queue_of(guard), Batch(guard, tried)
        before, layout, objects, size_bytes = 0, None, 0, 0
        most_chunks = _BATCH_CHUNKS
        if self._watchers.count and len(parts) > _MANY_CHUNKS:
            most_chunks, batch.came = _FIRST_CHUNKS, asyncio.Event()
            self._loop.call_later(_FIRST_SECONDS, batch.came.set)
        for load, mask in parts:
            if mask != before or load.layout is not layout:  # most often all are alike
                before, layout = mask, load.layout
                objects, size_bytes = mask.bit_count(), layout.objects.sizes[mask]
            is_full = batch.size_bytes >= _BATCH_BYTES or len(batch.parts) >= most_chunks
            if is_full or batch.objects + objects > _BATCH_OBJECTS:
                self._queue(queue, batch)
                batch, most_chunks = Batch(guard, tried, batch.came or batch.after), _BATCH_CHUNKS
            batch.objects += objects
            load.wanted |= mask
            load.waiting |= mask
            load.batches += (batch,)
            batch.parts[load] = mask
            batch.size_bytes += size_bytes
        self._queue(queue, batch)
        self._pump(guard)

    def drop(self, loads: Iterable[ChunkLoad]) -> None:
        """Unpin what nobody wants any more, and cancel the calls of batches in which nothing else is left."""
        by_batch: dict[Batch, list[ChunkLoad]] = {}
        for load in loads:
            for batch in load.batches:
                by_batch.setdefault(batch, []).append(load)
        for batch, dropped in by_batch.items():
            batch.unpin(dropped)
            if batch.parts:
                continue
            if batch.call is not None:
                batch.call.cancel()
            elif batch.state is BatchState.QUEUED:
                batch.state = BatchState.ENDED
                self._queues[batch.guard].remove(batch)
                batch.guard.meter.ended(batch.size_bytes)

    def watch(self) -> None:
        """Hear of objects before their batch has ended, until `unwatch`."""
        self._watchers.count += 1
        if self._watchers.count == 1:
            for progress in list(self._out):
                progress.tell()

    def unwatch(self) -> None:
        """Hear of them no more, unless somebody else does."""
        self._watchers.count -= 1

    def unpin(self, loads: Iterable[ChunkLoad]) -> None:
        """Unpin what has come before its batch has ended."""
        for load in loads:
            for batch in load.batches:
                if load in batch.parts:
                    batch.unpin((load,))

    def _queue_of(self, guard: Guard) -> FairQueue[Batch]:
        queue = self._queues.get(guard)
        if queue is None:
            queue = self._queues[guard] = FairQueue()
            self._running_bytes[guard] = 0
        return queue

    def forget(self, guard: Guard) -> None:
        """Forget a backend from which nothing is loaded any more."""
        self._queues.pop(guard, None)
        self._running_bytes.pop(guard, None)

    async def close(self) -> None:
        """Return when no batch runs any more: all requests have left, and all calls have ended or were given up."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _queue(self, queue: FairQueue[Batch], batch: Batch) -> None:
        if not batch.parts:
            return
        queue.push(next(iter(batch.parts)).owner, batch.cost, batch)
        batch.guard.meter.queued(batch.size_bytes)

    def _pump(self, guard: Guard) -> None:
        queue = self._queues[guard]
        while queue and self._running_bytes[guard] < self.inflight_bytes:
            batch = queue.pop()
            batch.state = BatchState.RUNNING
            self._running_bytes[guard] += batch.cost
            task = self._loop.create_task(self._run(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, batch: Batch) -> None:
        if batch.after is not None:
            await batch.after.wait()
        if batch.objects > _FEW_OBJECTS:
            await turn()  # many may run at once
        # What was abandoned in the queue starts again elsewhere: its room here may be freed at any time.
        parts = {load: mask for load, mask in batch.parts.items() if not load.abandoned}
        try:
            outcomes, failure = await self._call(batch, parts)
            await self._transferred(batch, parts, outcomes, failure)
        except Exception:
            log.exception("a batch of loads from %s failed", batch.guard.name, extra=batch.guard.about)
            self._end(batch)
            self._failed(parts)
        finally:
            if batch.came is not None:
                batch.came.set()

    async def _call(self, batch: Batch, parts: Mapping[ChunkLoad, int]) -> tuple[Sequence[LoadOutcome], Shortfall]:
        """What one call to a backend brings: an outcome for each object, or none and the reason."""
        keys, buffers = self._objects(parts)
        progress = Progress(self._watchers, partial(self._progressed, batch, parts))
        call = batch.call = batch.guard.begin_load(keys, buffers, progress.loaded) if keys else None
        outcomes: list[LoadOutcome] = []
        failure = Shortfall.BACKEND_ERROR
        began = self._loop.time()
        if call is not None:
            self.objects += len(keys)
            batch.touches = parts
            call.when_ended(lambda: self._let_rooms_go(batch))
            self._out.add(progress)
            try:
                outcomes = await call.result()
                if LoadOutcome.FAILED in outcomes:
                    failed = [key for key, of in zip(keys, outcomes, strict=True) if of is LoadOutcome.FAILED]
                    batch.guard.faults.suspect(failed)
            except CallTimeoutError:
                failure = Shortfall.DEADLINE
            except BackendError:
                batch.guard.faults.suspect(keys)  # nothing was loaded
            finally:
                self._out.discard(progress)
        seconds = self._loop.time() - began
        self._end(batch, seconds if outcomes else None, keys=keys if parts.keys() == batch.parts.keys() else None)
        return outcomes, failure

    def _end(self, batch: Batch, seconds: float | None = None, *, keys: Sequence[ObjectKey] | None = None) -> None:
        """Take the bytes of a batch out of flight, and unpin its parts; more than once does no harm.

        `seconds` is what its call took, if it loaded anything; `keys` are those of its parts, where they are at hand.
        """
        if batch.state is not BatchState.RUNNING:
            return
        batch.state = BatchState.ENDED
        batch.guard.meter.ended(batch.size_bytes, seconds)
        self._running_bytes[batch.guard] -= batch.cost
        if keys is None:
            batch.unpin(list(batch.parts))
        else:
            batch.parts.clear()
            batch.guard.unpin(keys)
        self._pump(batch.guard)

    def _progressed(self, batch: Batch, parts: Mapping[ChunkLoad, int], numbers: Sequence[int]) -> None:
        """Tell of objects of a call, by their numbers in it; a backend may say any."""
        ends = list(accumulate(mask.bit_count() for mask in parts.values()))
        loads = list(parts.items())
        loaded = []
        for number in numbers:
            if 0 <= number < ends[-1]:
                at = bisect_right(ends, number)
                load, mask = loads[at]
                which = load.layout.objects.members[mask][number - ends[at]]  # from the end of its chunk on backwards
                loaded.append((load, 1 << load.layout.objects.bit(*which)))
        self._loaded(loaded)
        if batch.came is not None:
            batch.came.set()  # behind those who watch

    def _let_rooms_go(self, batch: Batch) -> None:
        batch.call = None  # of one that was cancelled or failed, the task keeps the frames, and they keep its loads
        touched, batch.touches = batch.touches, {}
        self._call_ended(touched)

    def _objects(self, parts: Mapping[ChunkLoad, int]) -> tuple[list[ObjectKey], list[memoryview]]:
        """The keys of objects, and the memory that they are loaded into."""
        memory, new = self._memory, tuple.__new__
        keys: list[ObjectKey] = []
        buffers = []
        for load, mask in parts.items():
            chunk_hash, reservations = load.chunk_hash, load.reservations
            offset = reservations[0].offset
            offsets = dict(map(_PLACE, reservations)) if len(reservations) > 1 else None
            for rank, group, begin, end in load.layout.objects.places[mask]:
                if offsets is not None:
                    offset = offsets[rank]
                keys.append(new(ObjectKey, (chunk_hash, rank, group)))
                buffers.append(memory[offset + begin : offset + end])
        return keys, buffers

    def check_integrity(self) -> None:
        """Assert that what is in flight is counted."""
        assert all(size >= 0 for size in self._running_bytes.values())
        assert all(batch.state is BatchState.QUEUED for queue in self._queues.values() for batch in queue)
