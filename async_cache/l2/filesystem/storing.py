"""Stores: places are reserved in the loop, threads write the bodies there, and a record makes each of them known."""

import asyncio
import errno
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from threading import Event

from msgspec import Struct

from async_cache.l2.faults import Faults
from async_cache.l2.filesystem.bodies import Body
from async_cache.l2.filesystem.catalog import Catalog
from async_cache.l2.filesystem.directory import Commit, Directory, Moved
from async_cache.l2.filesystem.files import FULL
from async_cache.l2.filesystem.following import Following
from async_cache.l2.filesystem.format import check_key
from async_cache.l2.filesystem.rewriting import Rewriting
from async_cache.l2.filesystem.room import Room
from async_cache.l2.filesystem.segments import Segment
from async_cache.l2.filesystem.work import Work
from async_cache.l2.index import Reserved
from async_cache.l2.workers import settle
from async_cache.prompt.keys import ObjectKey
from async_cache.values import Removal

STORE_SECONDS = 5.0  # for which a store of what is known already waits for recovery: it may have been given up
TRIES = 4  # to write on a disk that is full
_NOTHING = memoryview(b"")


class Write(Struct, eq=False):
    """A write that is under way: its bodies, each with its segment, and which of them were deleted meanwhile."""

    bodies: list[tuple[Body, Segment]]
    done: "asyncio.Future[None]"
    removed: set[ObjectKey]


class Storing:
    """Stores into one directory, whose files grow to `segment_bytes`, or to the size of a longer object."""

    def __init__(
        self,
        directory: Directory,
        catalog: Catalog,
        work: Work,
        room: Room,
        following: Following,
        rewriting: Rewriting,
        faults: Faults,
        *,
        segment_bytes: int,
    ):
        self._directory, self._catalog, self._work, self._room = directory, catalog, work, room
        self._following, self._rewriting, self._faults = following, rewriting, faults
        self._index, self._threads, self._segment_bytes = catalog.index, work.threads, segment_bytes
        self._writes: list[Write] = []
        self._writing: dict[ObjectKey, Write] = {}

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        """Which objects are there now. Raises OSError if none is, and Moved."""
        for key in keys:
            check_key(key)
        if not self._following.knows_all():
            if any(self._index.present(keys)):
                await self._following.recovery(STORE_SECONDS)
            try:
                await self._following.look(lists=False)  # also of what was deleted and is to be stored anew
            except Moved:
                raise
            except OSError:
                pass  # it is written, then, and one of the two is given up later
        if self._work.over:
            raise Moved(self._directory.path)
        self._room.clear(self._catalog.give_up([key for key in keys if key in self._faults], Removal.DAMAGED))
        bodies = dict(zip(keys, buffers, strict=True))
        faults: list[OSError] = []
        tried: set[ObjectKey] = set()
        while missing := [key for key in self._missing(bodies) if key not in tried]:
            if mine := [key for key in missing if key not in self._writing]:
                tried.update(mine)
                await self._give_origins(mine)
                faults = await self._write_within_quotas(mine, [bodies[key] for key in mine])
            else:  # one of several that store the same writes it
                await self._threads.wait(*(self._writing[key].done for key in missing))
        stored = self._index.present(keys)  # without what was deleted meanwhile
        if faults and not any(stored):
            raise faults[0]
        return stored

    async def _give_origins(self, keys: Iterable[ObjectKey]) -> None:
        """Have the records say what these chunks are of, where that is known and can be kept."""
        if new := self._catalog.origins.lacks({self._index.origin_of(key.chunk_hash) for key in keys}):
            with suppress(OSError):
                await self._threads.run(self._threads.changes, self._catalog.origins.give, new)

    def _origin_of(self, key: ObjectKey) -> int:
        return self._catalog.origins.number_of(self._index.origin_of(key.chunk_hash))

    async def _write_within_quotas(self, keys: list[ObjectKey], buffers: list[memoryview]) -> list[OSError]:
        """Write those objects that their owners may have, for which others of their own leave; returns the faults."""
        reserved: list[Reserved] = []
        allowed: list[tuple[ObjectKey, memoryview]] = []
        try:
            for key, buffer in zip(keys, buffers, strict=True):
                made = self._index.reserve(key.chunk_hash, len(buffer))
                if made is not None:
                    reserved.append(made)
                    allowed.append((key, buffer))
                    if made.evicted:
                        self._room.clear(self._catalog.left(made.evicted))
            return await self._write_fitting([key for key, _ in allowed], [buffer for _, buffer in allowed])
        finally:
            for each in reserved:
                self._index.unreserve(each)

    async def _write_fitting(self, keys: list[ObjectKey], buffers: list[memoryview]) -> list[OSError]:
        """Write those objects for which there is room, or can be made; returns the faults of the last try."""
        faults: list[OSError | None] = []
        for _ in range(TRIES if keys else 0):
            faults = await self._write(keys, buffers)
            full = [number for number, fault in enumerate(faults) if fault is not None and fault.errno in FULL]
            keys, buffers = [keys[number] for number in full], [buffers[number] for number in full]
            if not full or not self._room.make_on_disk(list(map(len, buffers))):
                break
        return [fault for fault in faults if fault is not None]

    async def _write(self, keys: list[ObjectKey], buffers: list[memoryview]) -> list[OSError | None]:
        """Write and index objects as far as there is room; for each None, or why it could not be written."""
        if self._work.over:
            raise Moved(self._directory.path)
        write, numbers = self._reserve(keys, buffers)
        if not write.bodies:
            return [None] * len(keys)
        self._begin(write)
        stop, future = Event(), None
        try:
            await self._room.cleared()  # what left for it is gone: the directory takes no more than it may
            future = self._threads.stores.submit(self._directory.write, [body for body, _ in write.bodies], stop)
            await settle([future], stop, self._threads.given_up)
        except Moved:
            raise
        except OSError:
            pass  # it is the fault of each
        finally:
            self._publish(write, future)  # a cancelled call may have written some of them
        await self._threads.wait(write.done)
        if self._work.over:
            raise Moved(self._directory.path)
        faults: list[OSError | None] = [None] * len(keys)
        for number, (body, _) in zip(numbers, write.bodies, strict=True):
            faults[number] = body.fault
        return faults

    def _reserve(self, keys: list[ObjectKey], buffers: list[memoryview]) -> tuple[Write, list[int]]:
        """Places for objects as far as there is room, and which of them have one."""
        directory, segments = self._directory, self._catalog.segments
        write, numbers = Write([], asyncio.get_running_loop().create_future(), set()), []
        growth_bytes = directory.journal.growth_bytes(2 * len(keys))  # and as many leave, perhaps
        whole = self._room.make(sum(map(self._index.room_bytes, map(len, buffers))) + growth_bytes)
        for number, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            if whole or self._room.make(self._index.room_bytes(len(buffer)) + growth_bytes):
                begins_chunk = not write.bodies or write.bodies[-1][0].key.chunk_hash != key.chunk_hash
                # Where files have no holes, a chunk has one of its own: it leaves as a whole.
                segment_bytes = 0 if begins_chunk and not directory.makes_holes else self._segment_bytes
                segment, page = segments.reserve(directory.writer, len(buffer), segment_bytes, directory.journal)
                write.bodies.append((Body(key, buffer, len(buffer), segment.name, page), segment))
                numbers.append(number)
        return write, numbers

    def _missing(self, keys: Iterable[ObjectKey]) -> list[ObjectKey]:
        keys = list(keys)
        return [key for key, there in zip(keys, self._index.present(keys), strict=True) if not there]

    def _begin(self, write: Write) -> None:
        self._writes.append(write)
        self._writing.update((body.key, write) for body, _ in write.bodies)

    def _end(self, write: Write) -> None:
        self._writes.remove(write)
        for body, _ in write.bodies:
            del self._writing[body.key]
        write.done.set_result(None)

    def _publish(self, write: Write, future: "Future[None] | None") -> None:
        """Have records written of the bodies that were; they are indexed then, whoever still waits for it."""
        if future is not None and not future.done():
            self._end(write)  # a thread is stuck, and was given up: it is never known
            return
        fault = _fault_of(future)
        for body, _ in write.bodies:
            body.buffer = _NOTHING
            if body.fault is None:
                body.fault = fault
        if self._work.over:
            self._end(write)
            return
        commit = Commit({segment: b"".join(data) for segment, data in self._records(write).items()})
        self._directory.waiting.append(commit)
        committing = self._threads.run(self._threads.changes, self._directory.commit)
        committing.add_done_callback(partial(self._published, write, commit))

    def _records(self, write: Write) -> dict[str, list[bytes]]:
        """Those of the bodies that were written, by segment, such that the tail of a prefix is older than its head."""
        data: dict[str, list[bytes]] = {}
        for body, segment in reversed(write.bodies):
            if body.fault is None:
                put = segment.put_record(body.key, body.size_bytes, body.page, body.checksum, self._origin_of(body.key))
                data.setdefault(body.segment, []).append(put)
        return data

    def _published(self, write: Write, commit: Commit, committing: "asyncio.Future[None]") -> None:
        if not committing.cancelled():
            committing.exception()  # looked at: the commit has all faults
        self._end(write)
        if self._work.over:
            return
        self._work.used = True
        holes = []
        segments = self._catalog.segments
        for body, segment in reversed(write.bodies):
            recorded = body.fault is None  # or perhaps, if the commit failed
            if recorded and (fault := commit.faults.get(body.segment)) is not None:
                body.fault = _os_error(fault)
            if body.segment in self._directory.doubtful:
                segments.turn_from(segment)
            if not recorded:
                segments.leave(segment, body.size_bytes)
            elif body.fault is not None or body.key in write.removed:
                holes.append(self._catalog.hole(body.key, body.size_bytes, segment, body.page, body.checksum))
            else:
                self._catalog.put(body.key, body.size_bytes, segment, body.page, body.checksum)
        if self._following.complete:
            holes += self._catalog.choose([body.key for body, _ in write.bodies])
        self._room.clear(holes)
        self._room.make(0)  # for what the index has grown by
        self._rewriting.begin_if_long()

    def deleting(self, keys: Sequence[ObjectKey]) -> list["asyncio.Future[None]"]:
        """Have objects that are being written not be there; what is done when they are not."""
        wanted = set(keys)
        writing = [write for write in self._writes if any(body.key in wanted for body, _ in write.bodies)]
        for write in writing:
            write.removed |= wanted
        return [write.done for write in writing]

    async def end(self) -> None:
        """Wait until nothing is being written."""
        while self._writes:
            await asyncio.wait([write.done for write in self._writes])

    @property
    def objects(self) -> int:
        """How many are being written."""
        return sum(len(write.bodies) for write in self._writes)


def _fault_of(future: "Future[None] | None") -> OSError | None:
    """Why a call was not done, or failed."""
    if future is None or future.cancelled():
        return InterruptedError(errno.EINTR, "it was not written")
    error = future.exception()
    return _os_error(error) if error is not None else None


def _os_error(error: BaseException) -> OSError:
    """As which a fault is told, whatever it was."""
    return error if isinstance(error, OSError) else OSError(errno.EIO, repr(error))
