"""Objects in the segments of a local directory, bounded by size, verified at every load.

The loop decides, in a catalog that it alone changes; what blocks runs in threads: loads, which never queue behind
anything else; changes of the directory, in the order in which they were decided; looks at what others recorded; and
the reading of recovery. `docs/disk.md` has the format.
"""

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import islice
from threading import Event
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote, unquote

from msgspec import Struct

from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Backend, LoadOutcome, check_lengths
from async_cache.l2.filesystem.bodies import Body, Groups, Wanted, grouped
from async_cache.l2.filesystem.catalog import Catalog, Segment
from async_cache.l2.filesystem.directory import Commit, Directory, Hole, Moved
from async_cache.l2.filesystem.faults import Faults
from async_cache.l2.filesystem.files import FULL
from async_cache.l2.filesystem.format import PAGE_BYTES, RECORD_BYTES, Record
from async_cache.l2.filesystem.journal import BEAT_SECONDS, Journal
from async_cache.l2.filesystem.marker import Foreign
from async_cache.l2.filesystem.sweep import clear_gaps, sweep
from async_cache.l2.index import Chunk
from async_cache.l2.urls.url import BackendURL, capacity, one_of, whole_number
from async_cache.l2.workers import DaemonExecutor, settle
from async_cache.prompt.keys import ObjectKey
from async_cache.retention.policy import EvictionPolicy
from async_cache.values import BackendUsage, Removal

T = TypeVar("T")

logger = logging.getLogger(__name__)

CAPACITY_BYTES = 10 * 2**30
SEGMENT_BYTES = 128 * 2**20
CLOSE_SECONDS = 2.0
RECOVERY_SECONDS = 0.25  # for which a lookup of what is not known waits for recovery
STORE_SECONDS = 5.0  # for which a store waits for it
SEEN_SECONDS = 0.1  # for which nobody is taken to have come to a directory in which we were alone
ADOPT_SECONDS = 5.0
THREAD_BYTES = 8 * 2**20  # for which another thread is woken: two that take turns at the interpreter's lock are slower
SLICE = 256  # what the loop does with many objects, it does for so many at a time: a millisecond
ORDERED_OBJECTS = 100_000  # whose order is kept when the index is written anew: it is listed in one step
SPARE_BYTES = 65_536  # of index files that say what nobody needs, before they are written anew
TRIES = 4  # to write on a disk that is full
_NOTHING = memoryview(b"")


_LOADED = LoadOutcome.LOADED
_REMOVALS = {LoadOutcome.GONE: Removal.LOST, LoadOutcome.CORRUPT: Removal.DAMAGED}


class Look:
    """A look at what others have recorded, for all who asked for it before it began."""

    def __init__(self) -> None:
        self.begun = False
        self.task: asyncio.Task[None]

    def step(self, news: Iterator[T]) -> T | None:
        """The next piece of news, in a thread."""
        self.begun = True
        return next(news, None)


class Write(Struct, eq=False):
    """A store that is under way: its bodies, each with its segment, and which of them were deleted meanwhile."""

    directory: Directory
    bodies: list[tuple[Body, Segment]]
    done: "asyncio.Future[None]"
    removed: set[ObjectKey]


class FileSystemBackend(Backend):
    """The directory `path`, made if it is not there; other processes may use it at the same time.

    `capacity_bytes` bounds the room that the whole directory takes on the disk (None: no bound): chunks without a pin
    make room, in the order of `policy`, the least recently used first by default. `durability="fsync"`: what was
    stored survives a power failure; otherwise it is written when the kernel likes to, and what was torn is found out
    by its checksum. `direct` keeps objects of whole pages in page-aligned memory out of the page cache, where the file
    system can. `threads` read at a time. Files grow to `segment_bytes`, or to the size of a longer object.

    Raises ConfigError for arguments, and in `open` for a path, that cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        capacity_bytes: int | None = CAPACITY_BYTES,
        durability: Literal["none", "fsync"] = "none",
        direct: bool = False,
        threads: int = 4,
        segment_bytes: int = SEGMENT_BYTES,
        policy: EvictionPolicy[Chunk] | None = None,
    ):
        if capacity_bytes is not None and capacity_bytes < 1:
            raise ConfigError(f"capacity_bytes must be at least 1, or None for no bound, not {capacity_bytes}")
        if durability not in ("none", "fsync"):
            raise ConfigError(f"durability must be 'none' or 'fsync', not {durability!r}")
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        if segment_bytes < 1:
            raise ConfigError(f"segment_bytes must be at least 1, not {segment_bytes}")
        self.path = os.fspath(path)
        self.name = f"fs://{self.path if self.path.isprintable() else quote(os.fsencode(self.path))}"
        self.capacity_bytes, self._segment_bytes = capacity_bytes, segment_bytes
        self._fsync, self._direct, self._threads = durability == "fsync", direct, threads
        self._catalog = Catalog(policy, lambda *removed: self.on_removed(*removed))
        self._index = self._catalog.index
        self._faults = Faults()
        self._writes: list[Write] = []
        self._look: Look | None = None
        self._looked_at = -SEEN_SECONDS
        self._adopted_at = 0.0
        self._rewriting = self._used = self._over = False
        self._knows: Directory | None = None  # of which all records have been read
        self._tasks: set[asyncio.Task[None]] = set()
        self._executors: tuple[DaemonExecutor, ...] = ()

    @classmethod
    def from_url(cls, url: BackendURL) -> Self:
        """The backend of a URL `fs:///path`, whose parameters are the arguments. Raises ConfigError."""
        if url.netloc:
            raise ConfigError("a directory has no host")
        path = unquote(url.path, errors="surrogateescape")
        if not path.startswith("/"):
            raise ConfigError(f"the path {path!r} is not absolute")
        if "\0" in path or not os.path.normpath(path).strip("/"):
            raise ConfigError(f"{path!r} cannot be the path of a directory of its own")
        parameters = url.parameters(
            capacity=capacity,
            durability=one_of(none="none", fsync="fsync"),
            direct=one_of(true=True, false=False),
            threads=whole_number(most=9999),
        )
        path = "/" + "/".join(part for part in path.split("/") if part not in ("", "."))  # one name for one directory
        capacity_bytes = parameters.pop("capacity", CAPACITY_BYTES)
        return cls(path, capacity_bytes=capacity_bytes, **parameters)

    # Opening and closing.

    async def open(self) -> None:
        self._loads = DaemonExecutor(self._threads, f"{self.name} load")
        self._changes = DaemonExecutor(1, f"{self.name} change")
        self._searches = DaemonExecutor(1, f"{self.name} search")
        self._scans = DaemonExecutor(1, f"{self.name} scan")
        executors = (self._loads, self._changes, self._searches, self._scans)
        self._rewriting = self._used = self._over = False  # it may have been closed before
        self._look, self._looked_at = None, -SEEN_SECONDS
        self._writes.clear()
        self._loop = asyncio.get_running_loop()
        self._given_up = self._loop.create_future()
        try:
            self._directory = await self._in(self._changes, self._open_directory)
            self._executors = executors
        except (Foreign, FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"{self.name} cannot be used: {error}") from error
        except OSError as error:
            raise BackendError(f"{self.name} cannot be opened: {error}") from error
        finally:
            if not self._executors:
                _shutdown(executors)
        self._start()

    def _open_directory(self) -> Directory:
        os.makedirs(self.path, 0o700, exist_ok=True)
        return Directory(self.path, fsync=self._fsync, direct=self._direct)

    def _start(self) -> None:
        """Begin with a directory that was just opened."""
        self._catalog.writers = {self._directory.writer}
        self._recovery = asyncio.create_task(self._recover(self._directory), name=f"{self.name} recovery")

        if self._directory.beats:
            self._spawn(self._beat(self._directory))

    async def _beat(self, directory: Directory) -> None:
        while directory is self._directory:
            await asyncio.sleep(BEAT_SECONDS)
            with suppress(OSError):
                await self._in(self._searches, directory.beat)

    def _in(self, executor: DaemonExecutor, function: Callable[..., T], *arguments: Any) -> "asyncio.Future[T]":
        """Call a function in a thread. A caller that is cancelled does not keep it from being done."""
        return asyncio.wrap_future(executor.submit(function, *arguments), loop=self._loop)

    async def close(self) -> None:
        executors, self._executors = self._executors, ()
        if not executors:
            return
        await self._end_tasks()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._put_in_order()
            self._over = True
            await self._end_tasks()
            _shutdown(executors)
            if all(await asyncio.gather(*(executor.ended(CLOSE_SECONDS) for executor in executors))):
                self._directory.release()
        finally:  # also where the caller waits no longer: who waits for a thread that is stuck would do so for ever
            self._over = True
            _shutdown(executors)
            self._given_up.set_result(None)
        while self._index.clear(SLICE):  # noqa: ASYNC110 (nothing is waited for)
            await asyncio.sleep(0)
        self._catalog.forget()

    async def _end_tasks(self) -> None:
        ending = {self._recovery, *self._tasks}
        for task in ending:
            task.cancel()
        await asyncio.wait(ending)
        self._look = None

    # Lookups.

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        self._used = True
        if self._index.pin_chunks(chunk_hashes, objects):
            return [True] * len(chunk_hashes)
        if not self._knows_all():
            return None
        return self._index.pin_whole(chunk_hashes, objects)

    def _knows_all(self) -> bool:
        """Whether what is not known is not there: nobody else is here, or was a moment ago."""
        return (
            self._recovery.done()
            and self._loop.time() - self._looked_at < SEEN_SECONDS
            and not self._directory.has_others
        )

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        self._used = True
        present = self._index.pin_present(keys)
        if all(present):
            return present
        unknown = [key for key, found in zip(keys, present, strict=True) if not found]
        known = [key for key, found in zip(keys, present, strict=True) if found]
        try:
            await self._catch_up()
        except OSError as error:
            if not known:  # else it says what it knows
                raise BackendError(f"{self.name}: {error}") from error
        except BaseException:
            self._index.unpin(known)
            raise
        discovered = iter(self._index.pin_present(unknown))
        found = [there or next(discovered) for there in present]
        self._index.touch(reversed([key.chunk_hash for key, there in zip(keys, found, strict=True) if there]))
        self._make_room(0)
        return found

    async def _catch_up(self) -> None:
        """Hear of what others stored, and wait a little for recovery. Raises OSError."""
        await self._wait_for_recovery()
        await self._look_for_news()

    async def _wait_for_recovery(self) -> None:
        if not self._recovery.done():
            await asyncio.wait([self._recovery], timeout=RECOVERY_SECONDS)

    async def _look_for_news(self) -> None:
        """Hear of all that others have recorded by now. Raises OSError."""
        look = self._look
        if look is None or look.begun:  # one that has begun may have missed it; one that has not serves all who wait
            self._look = Look()
            self._look.task = self._spawn(self._run(self._look, after=look))
            look = self._look
        await asyncio.wait([look.task])
        if look.task.cancelled():
            raise OSError(errno.ESHUTDOWN, "it was closed")
        look.task.result()

    async def _run(self, look: "Look", *, after: "Look | None") -> None:
        if after is not None and not after.task.done():
            await asyncio.wait([after.task])  # what it has read and not told yet is no news
        directory, began = self._directory, self._loop.time()
        is_open, knows_all = bool(self._executors), self._knows is directory
        adopt = is_open and knows_all and began - self._adopted_at > ADOPT_SECONDS
        if adopt:
            self._adopted_at = began
        news = directory.look(adopt=adopt)
        try:
            while (step := await self._in(self._searches, look.step, news)) is not None:
                await self._learn(*step, latest=True)
            self._looked_at = began
            if knows_all:
                await self._take_over(directory)
                await self._choose(self._catalog.doubles())
        except Moved:
            if not is_open:
                raise FileNotFoundError(errno.ENOENT, "it was removed", self.path) from None
            await self._open_anew(directory)

    async def _choose(self, keys: list[ObjectKey]) -> None:
        """Give up what others have, too, in slices."""
        for begin in range(0, len(keys), SLICE):
            self._clear(self._catalog.choose(keys[begin : begin + SLICE]))
            await asyncio.sleep(0)

    async def _take_over(self, directory: Directory) -> None:
        """Answer for what index files tell that were adopted: they are read once more, as ours."""
        adopted = [journal for journal in directory.journals.values() if journal.owned and not journal.known]
        for journal in adopted:
            await self._learn_all(journal)
            journal.known = True
            self._catalog.writers.add(journal.writer)
        if adopted:
            self._spawn(self._sweep(directory))

    async def _learn_all(self, journal: Journal) -> None:
        """Take over all that an index file says, the latest first."""
        steps = journal.backward()
        while (records := await self._in(self._scans, next, steps, None)) is not None:
            await self._learn(journal, records, latest=False)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it has it

    async def _learn(self, journal: Journal, records: list[Record], *, latest: bool) -> None:
        """Take over what an index file says, in slices."""
        for begin in range(0, len(records), SLICE):
            self._faults.over(self._catalog.learn(journal, records[begin : begin + SLICE], latest=latest))
            self._make_room(0)
            await asyncio.sleep(0)

    def pin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self._index.pin_prefix(chunk_hashes)

    def unpin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self._index.unpin_prefix(chunk_hashes)

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        self._index.unpin(keys)

    # Loads.

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        return (await self._load(keys, buffers, exact=True))[0]

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[int | LoadOutcome]:
        outcomes, placed = await self._load(keys, buffers, exact=False)
        return [
            found[0] if outcome is _LOADED and found is not None else outcome
            for outcome, found in zip(outcomes, placed, strict=True)
        ]

    async def _load(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], *, exact: bool
    ) -> tuple[list[LoadOutcome], list[tuple[int, bytes] | None]]:
        """What became of each object, and its size and place in the catalog when the load began."""
        check_lengths(keys, buffers)
        placed = self._index.placed(keys)
        if None in placed and not self._knows_all():
            with suppress(OSError):
                await self._catch_up()
            placed = self._index.placed(keys)
        place = self._catalog.place
        outcomes: list[Any] = [LoadOutcome.GONE] * len(keys)
        wanted = []
        for number, found in enumerate(placed):
            if found is not None:
                size_bytes, where = found
                length = len(buffers[number])
                if size_bytes == length or (size_bytes < length and not exact):
                    segment, page, checksum = place(where)
                    wanted.append(Wanted(segment, page, number, size_bytes, checksum))
                else:
                    outcomes[number] = LoadOutcome.CORRUPT
        wanted.sort()
        groups = list(grouped(wanted))
        size_bytes = sum([each.size_bytes for each in wanted])
        todo, stop = Groups(groups), Event()
        bodies = self._directory.bodies
        # Submitted without aiofiles: `settle` must know of each call whether it has begun.
        futures = [
            self._loads.submit(bodies.read, todo, buffers, outcomes, stop)
            for _ in range(min(self._threads, len(groups), 1 + size_bytes // THREAD_BYTES))
        ]
        await settle(futures, stop, self._given_up)
        if outcomes.count(_LOADED) == len(outcomes):
            self._faults.over(keys)
            return outcomes, placed
        return await self._note_losses(keys, placed, outcomes), placed

    async def _note_losses(
        self, keys: Sequence[ObjectKey], placed: list[tuple[int, bytes] | None], outcomes: list[LoadOutcome | OSError]
    ) -> list[LoadOutcome]:
        """What is told of each object, after a load that did not bring all of them."""
        if LoadOutcome.CORRUPT in outcomes:  # it may have been given up by others
            with suppress(OSError):
                await self._look_for_news()
        told: list[LoadOutcome] = []
        lost: dict[Removal, list[tuple[ObjectKey, tuple[int, bytes]]]] = {Removal.LOST: [], Removal.DAMAGED: []}
        for number, (key, found, outcome) in enumerate(zip(keys, placed, outcomes, strict=True)):
            if isinstance(outcome, OSError):
                outcome = LoadOutcome.FAILED
            if outcome is not _LOADED and (found is None or self._catalog.is_dropped(found[1])):
                outcome = LoadOutcome.GONE
            if outcome in _REMOVALS and found is not None:
                lost[_REMOVALS[outcome]].append((key, found))
            told.append(outcome)
            if number % SLICE == 0:
                await asyncio.sleep(0)
        failed = [key for key, outcome in zip(keys, told, strict=True) if outcome is LoadOutcome.FAILED]
        faults = [outcome for outcome in outcomes if isinstance(outcome, OSError)]
        unreadable = set(self._faults.failed(failed, beside_others=len(failed) < len(keys)))
        if unreadable:
            lost[Removal.DAMAGED] += [
                (key, at) for key, at in zip(keys, placed, strict=True) if at and key in unreadable
            ]
            logger.warning("%s: %d objects cannot be read: %s", self.name, len(unreadable), faults[0])
        for removal, objects in lost.items():
            await self._give_up_as_read(objects, removal)
        if failed and not unreadable and len(failed) == len(keys):
            raise BackendError(f"{self.name}: {faults[0]}") from faults[0]
        return told

    async def _give_up_as_read(self, lost: list[tuple[ObjectKey, tuple[int, bytes]]], removal: Removal) -> None:
        """Take those objects out that still lie where they were read."""
        for begin in range(0, len(lost), SLICE):
            batch = lost[begin : begin + SLICE]
            now = self._index.placed([key for key, _ in batch])
            still = [key for (key, found), at in zip(batch, now, strict=True) if at == found]
            self._clear(self._catalog.give_up(still, removal))
            await asyncio.sleep(0)

    # Stores.

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        check_lengths(keys, buffers)
        chunk_hashes = [key.chunk_hash for key in keys]
        self._index.pin_prefix(chunk_hashes)  # none of them makes room for another one
        try:
            if not self._knows_all():
                # What is known until then may have been given up long ago; but it must not wait for ever.
                await asyncio.wait([self._recovery], timeout=STORE_SECONDS)
                with suppress(OSError):  # it is written, then, and one of the two is given up later
                    await self._look_for_news()  # also of what was deleted and is to be stored anew
            self._clear(self._catalog.give_up([key for key in keys if key in self._faults], Removal.DAMAGED))
            bodies = dict(zip(keys, buffers, strict=True))
            missing = [key for key, there in zip(bodies, self._index.present(list(bodies)), strict=True) if not there]
            faults = await self._write_fitting(missing, [bodies[key] for key in missing]) if missing else []
            stored = self._index.present(keys)  # without what was deleted meanwhile
        except OSError as error:
            raise BackendError(f"{self.name}: {error}") from error
        finally:
            self._index.unpin_prefix(chunk_hashes)
        if faults and not any(stored):
            raise BackendError(f"{self.name}: {faults[0]}") from faults[0]
        return stored

    async def _write_fitting(self, keys: list[ObjectKey], buffers: list[memoryview]) -> list[OSError]:
        """Write those objects for which there is room, or can be made; returns the faults of the last try."""
        faults: list[OSError | None] = []
        for _ in range(TRIES):
            faults = await self._write(keys, buffers)
            full = [number for number, fault in enumerate(faults) if fault is not None and fault.errno in FULL]
            keys, buffers = [keys[number] for number in full], [buffers[number] for number in full]
            if not full or not self._make_room_on_disk(list(map(len, buffers))):
                break
        return [fault for fault in faults if fault is not None]

    def _make_room_on_disk(self, sizes: list[int]) -> bool:
        """Evict as much as was not taken by a full disk, if that can be; or as the first object needs."""
        for count in (len(sizes), 1):
            holes = self._catalog.evict(sum(map(self._index.room_bytes, sizes[:count])) + PAGE_BYTES)
            if holes:
                self._clear(holes)
                return True
        return False

    async def _write(self, keys: list[ObjectKey], buffers: list[memoryview]) -> list[OSError | None]:
        """Write and index objects as far as there is room; for each None, or why it could not be written."""
        directory = self._directory
        write = Write(directory, [], self._loop.create_future(), set())
        growth_bytes = directory.journal.growth_bytes(2 * len(keys))  # and as many leave, perhaps
        whole = self._make_room(sum(map(self._index.room_bytes, map(len, buffers))) + growth_bytes)
        numbers = []
        for number, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            if whole or self._make_room(self._index.room_bytes(len(buffer)) + growth_bytes):
                begins_chunk = not write.bodies or write.bodies[-1][0].key.chunk_hash != key.chunk_hash
                # Where files have no holes, a chunk has one of its own: it leaves as a whole.
                segment_bytes = 0 if begins_chunk and not directory.makes_holes else self._segment_bytes
                segment, page = self._catalog.reserve(directory.writer, len(buffer), segment_bytes, directory.journal)
                write.bodies.append((Body(key, buffer, len(buffer), segment.name, page), segment))
                numbers.append(number)
        if not write.bodies:
            return [None] * len(keys)
        self._writes.append(write)
        stop = Event()
        future = self._changes.submit(directory.write, [body for body, _ in write.bodies], stop)
        try:
            await settle([future], stop, self._given_up)
        except OSError:
            pass  # it is the fault of each
        except Moved:
            await self._open_anew(directory)
            return await self._write(keys, buffers)
        finally:
            self._publish(write, future)  # a cancelled call may have written some of them
        await asyncio.wait([write.done])
        faults: list[OSError | None] = [None] * len(keys)
        for number, (body, _) in zip(numbers, write.bodies, strict=True):
            faults[number] = body.fault
        return faults

    def _publish(self, write: Write, future: "Future[None]") -> None:
        """Have records written of the bodies that were; they are indexed then, whoever still waits for it."""
        if not future.done() or self._over:
            return  # given up: it is never known
        fault = InterruptedError(errno.EINTR, "it was not written") if future.cancelled() else future.exception()
        for body, _ in write.bodies:
            body.buffer = _NOTHING
            if fault is not None and body.fault is None:
                body.fault = fault if isinstance(fault, OSError) else OSError(errno.EIO, str(fault))
        written = [(body, segment) for body, segment in write.bodies if body.fault is None]
        data = [
            self._catalog.written(body.key, body.size_bytes, segment, body.page, body.checksum)
            for body, segment in reversed(written)  # such that the tail of a prefix is older than its head
        ]
        commit = Commit({body.segment for body, _ in written}, b"".join(data))
        write.directory.waiting.append(commit)
        committing = self._in(self._changes, write.directory.commit, commit)
        committing.add_done_callback(partial(self._published, write))

    def _published(self, write: Write, committing: "asyncio.Future[None]") -> None:
        fault = None if committing.cancelled() else committing.exception()
        self._writes.remove(write)
        self._used = True
        holes = []
        for body, segment in reversed(write.bodies):
            recorded = body.fault is None  # or perhaps, if the commit failed
            if recorded and isinstance(fault, OSError):
                body.fault = fault
            if write.directory is not self._directory:
                continue  # it is in a directory that was removed
            if body.segment in write.directory.doubtful:
                self._catalog.turn_from(segment)
            if not recorded:
                self._catalog.unreserve(body.size_bytes, segment)
            elif body.fault is not None or body.key in write.removed:
                holes.append(self._catalog.hole(body.key, body.size_bytes, segment, body.page, body.checksum))
            else:
                self._catalog.put(body.key, body.size_bytes, segment, body.page, body.checksum)
        if write.directory is self._directory:
            if self._knows is self._directory:
                holes += self._catalog.choose([body.key for body, _ in write.bodies])
            self._clear(holes)
            if not self._over:
                self._make_room(0)  # for what the index has grown by
        write.done.set_result(None)
        self._rewrite_if_long()

    # What leaves.

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        keys = list(dict.fromkeys(keys))
        self._used = True
        writing = [write for write in self._writes if any(body.key in keys for body, _ in write.bodies)]
        for write in writing:
            write.removed.update(keys)
        await asyncio.wait([self._recovery, *(write.done for write in writing)])  # what they know would come back
        if not self._knows_all():
            with suppress(OSError):
                await self._look_for_news()  # what others have deleted is not counted
        deleted = sum(self._index.present(keys))
        self._faults.over(keys)
        clearing = self._clear(self._catalog.give_up(keys, Removal.DELETED))
        try:
            for each in (clearing, self._in(self._changes, int)):  # after all that was given up before
                if each is not None:
                    await asyncio.shield(each)
        except OSError as error:
            raise BackendError(f"{self.name}: {error}") from error
        return deleted

    def _make_room(self, size_bytes: int) -> bool:
        """Evict until so many bytes fit; False, and nothing is evicted, if the pins do not allow it."""
        if self.capacity_bytes is None:
            return True
        used = self._catalog.pages * PAGE_BYTES + self._directory.room_bytes
        holes = self._catalog.evict(used + size_bytes - self.capacity_bytes)
        if holes:
            self._clear(holes)
        return holes is not None

    def _clear(self, holes: list[Hole]) -> "asyncio.Future[None] | None":
        """Record what was given up, and give its room back, after the changes that were submitted before."""
        emptied = self._catalog.emptied()
        if self._over or not (holes or emptied):
            return None
        future = self._in(self._changes, self._directory.drop, holes, emptied)
        future.add_done_callback(self._cleared)
        return future

    def _cleared(self, future: "asyncio.Future[None]") -> None:
        if not future.cancelled() and (error := future.exception()):
            logger.warning("%s: cannot remove: %s", self.name, error)

    # All of it.

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        await asyncio.wait([self._recovery])
        with suppress(OSError):
            await self._look_for_news()
        chunk_hashes = self._index.chunk_hashes()
        for begin in range(0, len(chunk_hashes), SLICE):
            for chunk_hash in chunk_hashes[begin : begin + SLICE]:
                for item in self._index.objects_of(chunk_hash):
                    yield item
            await asyncio.sleep(0)

    @property
    def pins(self) -> int:
        """The number of pins that were not given back yet."""
        return sum(self._index.pins.values())

    def usage(self) -> BackendUsage:
        return BackendUsage(self._index.objects, self._index.used_bytes, self.capacity_bytes)

    def check_integrity(self) -> None:
        """Assert that the totals are those of the objects, and of what is being written."""
        self._catalog.check_integrity(sum(len(write.bodies) for write in self._writes))

    async def _recover(self, directory: Directory) -> None:
        """Learn what is in the directory, the latest first, as older than all that was used since the start."""
        try:
            for journal in sorted(directory.journals.values(), key=lambda each: each.changed_ns, reverse=True):
                await self._learn_all(journal)
            for journal in directory.journals.values():
                if journal.owned:
                    journal.known = True
                    self._catalog.writers.add(journal.writer)
            self._knows = directory
            with suppress(OSError):
                await self._look_for_news()
            await self._sweep(directory)
            self._looked_at = self._loop.time() - SEEN_SECONDS
        except Exception:  # the root of a task; what is not indexed is stored anew
            logger.exception("%s: recovery failed", self.name)

    async def _sweep(self, directory: Directory) -> None:
        """Have cleared away what dead writers left, when all that they recorded is known."""
        catalog = self._catalog
        known = [journal for journal in directory.journals.values() if journal.owned and journal.known]
        used = catalog.left_by_the_dead(directory.writer)
        allocated = await self._in(self._scans, sweep, directory, used, catalog.names())
        if allocated:
            bodies: dict[str, list[tuple[int, int]]] = {name: [] for name in allocated}
            chunks = self._index.chunks()
            for begin in range(0, len(chunks), SLICE):
                for chunk in chunks[begin : begin + SLICE]:
                    for name, page, end in catalog.bodies_in(chunk):
                        if name in bodies:
                            bodies[name].append((page, end))
                await asyncio.sleep(0)
            for name in allocated:
                await self._in(self._scans, clear_gaps, directory, name, sorted(bodies[name]))
        for journal in known:
            journal.swept = True

    async def _open_anew(self, directory: Directory) -> None:
        """Go on in the directory that has the path now, unless another task has seen to it. Raises OSError."""
        if directory is not self._directory:
            return
        try:
            fresh = await self._in(self._changes, self._open_directory)
        except Foreign as error:
            raise OSError(errno.ENOTDIR, str(error), self.path) from error
        if directory is not self._directory:
            return  # another task was faster; what it has opened stays
        logger.warning("%s: another directory has the path now, or the old one was removed: opened anew", self.name)
        self._directory = fresh
        self._recovery.cancel()
        while self._index.clear(SLICE):
            pass
        self._catalog.forget()
        self._start()
        await asyncio.wait([self._recovery], timeout=RECOVERY_SECONDS)

    # The index file, written anew.

    def _rewrite_if_long(self) -> None:
        """Write our index files anew when most of what they say is of things that are gone."""
        if self._rewriting or not self._executors or self._knows is not self._directory:
            return
        size_bytes = sum(journal.size_bytes for journal in self._directory.journals.values() if journal.owned)
        if size_bytes > SPARE_BYTES and size_bytes > 2 * RECORD_BYTES * self._catalog.count_owned() + SPARE_BYTES:
            self._rewriting = True
            self._spawn(self._rewrite(self._directory))

    async def _rewrite(self, directory: Directory) -> None:
        try:
            await self._forget_drops(directory)
            directory.promised_bytes = directory.rewriting_bytes(self._catalog.count_owned())
            self._make_room(0)
            await self._in(self._changes, directory.rewrite)
            chunks = list(self._index.in_order()) if self._index.objects <= ORDERED_OBJECTS else self._index.chunks()
            data = self._catalog.records(chunks)
            while batch := list(islice(data, SLICE)):
                await self._in(self._changes, directory.append, b"".join(batch))
            await self._in(self._changes, directory.end_rewrite)
        except OSError as error:
            logger.warning("%s: the index cannot be written anew: %s", self.name, error)
        finally:
            directory.promised_bytes = 0
            self._rewriting = False

    async def _forget_drops(self, directory: Directory) -> bool:
        """Forget the drops that no other index file needs any more; whether there are some that one needs."""
        existing = set(await self._in(self._changes, directory.names))
        await self._look_for_news()  # so that what is told by those that exist is known
        return self._catalog.forget_drops(existing)

    async def _put_in_order(self) -> None:
        """Have the order of use survive, and leave nothing behind that says nothing."""
        knows_all = self._knows is self._directory
        try:
            if knows_all and not all(each.swept for each in self._directory.journals.values() if each.owned):
                await self._sweep(self._directory)
            if self._index.objects <= ORDERED_OBJECTS and self._used and knows_all:
                await self._rewrite(self._directory)
            tells = await self._forget_drops(self._directory)
            keeps = tells or not knows_all or self._catalog.count_owned() > 0
            emptied = self._catalog.emptied()
            await self._in(self._changes, partial(self._directory.close, emptied=emptied, keeps=keeps))
        except OSError as error:
            logger.warning("%s: cannot be left in order: %s", self.name, error)


def _shutdown(executors: Sequence[DaemonExecutor]) -> None:
    for executor in executors:
        executor.shutdown()
