"""Objects as files of a local directory, bounded by size, verified at every load.

The loop decides, in an index that it alone changes; what blocks runs in threads: loads, which never queue behind
anything else; changes of the directory, in the order in which they were decided; searches for names; and the scan of
recovery. `record` has the format.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from heapq import merge
from itertools import islice
from threading import Event
from typing import Any, Literal, Self
from urllib.parse import quote, unquote

from aiofiles.os import makedirs, wrap

from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Backend, LoadOutcome, check_lengths
from async_cache.l2.filesystem.directory import Found, RecordDirectory, RecordFault
from async_cache.l2.filesystem.faults import Faults
from async_cache.l2.index import Chunk, Index
from async_cache.l2.urls.url import BackendURL, capacity, one_of, whole_number
from async_cache.l2.workers import DaemonExecutor, settle
from async_cache.prompt.keys import ObjectKey
from async_cache.retention.policy import EvictionPolicy
from async_cache.values import BackendUsage, Removal

logger = logging.getLogger(__name__)

CAPACITY_BYTES = 10 * 2**30
CLOSE_SECONDS = 2.0
SLICE = 256  # what the loop does with many objects, it does for so many at a time: a millisecond

_open_directory = wrap(RecordDirectory)
_sizes = wrap(RecordDirectory.sizes)
_next = wrap(next)
_take = wrap(lambda iterator, count: list(islice(iterator, count)))


class FileSystemBackend(Backend):
    """The directory `path`, made if it is not there; other processes may use it at the same time.

    `capacity_bytes` bounds the sum of the objects' sizes (a file has 64 bytes more; None: no bound): chunks without a
    pin make room, in the order of `policy`, the least recently used first by default. `durability="fsync"`: what was
    stored survives a power failure; otherwise it is written when the kernel likes to, and what was torn is found out
    by its checksum. `direct` keeps objects of whole pages in page-aligned memory out of the page cache, where the file
    system can. `threads` read at a time.

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
        policy: EvictionPolicy[Chunk] | None = None,
    ):
        if capacity_bytes is not None and capacity_bytes < 1:
            raise ConfigError(f"capacity_bytes must be at least 1, or None for no bound, not {capacity_bytes}")
        if durability not in ("none", "fsync"):
            raise ConfigError(f"durability must be 'none' or 'fsync', not {durability!r}")
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        self.path = os.fspath(path)
        self.name = f"fs://{self.path if self.path.isprintable() else quote(os.fsencode(self.path))}"
        self.capacity_bytes = capacity_bytes
        self._fsync, self._direct, self._threads = durability == "fsync", direct, threads
        self._index = Index(policy, lambda *removed: self.on_removed(*removed))
        self._faults = Faults()
        self._writing_bytes = 0
        self._unlinking: list[list[ObjectKey]] = []  # no longer in the index, perhaps still on the disk
        self._watches: dict[int, set[ObjectKey]] = {}
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

    async def open(self) -> None:
        self._loads = DaemonExecutor(self._threads, f"{self.name} load")
        self._changes = DaemonExecutor(1, f"{self.name} change")
        self._searches = DaemonExecutor(1, f"{self.name} search")
        self._scans = DaemonExecutor(1, f"{self.name} scan")
        executors = (self._loads, self._changes, self._searches, self._scans)
        self._given_up = asyncio.get_running_loop().create_future()
        try:
            await makedirs(self.path, 0o700, exist_ok=True, executor=self._changes)
            self._directory = await _open_directory(
                self.path, fsync=self._fsync, direct=self._direct, executor=self._changes
            )
            self._executors = executors
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"{self.name} cannot be used: {error}") from error
        except OSError as error:
            raise BackendError(f"{self.name} cannot be opened: {error}") from error
        finally:
            if not self._executors:
                _shutdown(executors)
        self._recovery = asyncio.create_task(self._recover(), name=f"{self.name} recovery")

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        return [True] * len(chunk_hashes) if self._index.pin_chunks(chunk_hashes, objects) else None

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        present = self._index.pin_present(keys)
        if all(present):
            return present
        unknown = [key for key, found in zip(keys, present, strict=True) if not found]
        known = [key for key, found in zip(keys, present, strict=True) if found]
        try:
            await self._look_on_disk(unknown)
        except BackendError:
            if not known:  # else it says what it knows
                raise
        except BaseException:
            self._index.unpin(known)
            raise
        discovered = iter(self._index.pin_present(unknown))
        found = [there or next(discovered) for there in present]
        self._index.touch(reversed([key.chunk_hash for key, there in zip(keys, found, strict=True) if there]))
        self._make_room(0)
        return found

    async def _look_on_disk(self, keys: Sequence[ObjectKey]) -> None:
        """Add to the index what another process has stored, or what recovery has not reached yet."""
        with self._watch() as removed:
            removed.update(*self._unlinking)  # the search may still see them
            sizes = await _sizes(self._directory, keys, executor=self._searches)
            for key, size_bytes in zip(keys, sizes, strict=True):
                if isinstance(size_bytes, int) and key not in removed and not self._faults.is_unreadable(key):
                    self._index.put(key, size_bytes)
        faults = [fault for fault in sizes if isinstance(fault, OSError)]
        if faults and len(faults) == len(sizes):
            raise BackendError(f"{self.name}: {faults[0]}") from faults[0]

    def pin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self._index.pin_prefix(chunk_hashes)

    def unpin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self._index.unpin_prefix(chunk_hashes)

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        self._index.unpin(keys)

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        return self._noted(keys, await self._read(self._directory.load, keys, buffers))

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[int | LoadOutcome]:
        sizes = await self._read(self._directory.load_sized, keys, buffers)
        told = self._noted(keys, [LoadOutcome.LOADED if isinstance(size, int) else size for size in sizes])
        return [size if isinstance(size, int) else outcome for size, outcome in zip(sizes, told, strict=True)]

    async def _read(
        self, load: Callable[..., None], keys: Sequence[ObjectKey], buffers: Sequence[memoryview]
    ) -> list[Any]:
        """What a `load` of the directory says of each object: its threads share the work."""
        check_lengths(keys, buffers)
        todo = zip(range(len(keys)), keys, buffers, strict=True)
        outcomes: list[Any] = [None] * len(keys)
        stop = Event()
        # Submitted without aiofiles: `settle` must know of each call whether it has begun.
        futures = [self._loads.submit(load, todo, outcomes, stop) for _ in range(min(self._threads, len(keys)))]
        await settle(futures, stop, self._given_up)
        return outcomes

    def _noted(self, keys: Sequence[ObjectKey], outcomes: list[Any]) -> list[LoadOutcome]:
        """What is told of each object, which the index and the faults hear of first."""
        if outcomes.count(LoadOutcome.LOADED) == len(outcomes):
            self._faults.over(keys)
            return outcomes
        return self._note_losses(keys, outcomes)

    def _note_losses(self, keys: Sequence[ObjectKey], outcomes: list[LoadOutcome | OSError]) -> list[LoadOutcome]:
        """What is told of each object, after a load that did not bring all of them."""
        told = [_told(outcome) if isinstance(outcome, OSError) else outcome for outcome in outcomes]
        failed = [key for key, outcome in zip(keys, told, strict=True) if outcome is LoadOutcome.FAILED]
        unreadable = self._faults.failed(failed, beside_others=len(failed) < len(keys))
        stuck = [key for key, outcome in zip(keys, outcomes, strict=True) if isinstance(outcome, RecordFault)]
        unreadable += self._faults.failed(stuck, beside_others=True)
        for lost, removal in ((LoadOutcome.GONE, Removal.LOST), (LoadOutcome.CORRUPT, Removal.DAMAGED)):
            self._drop([key for key, outcome in zip(keys, told, strict=True) if outcome is lost], removal)
        self._drop(unreadable, Removal.DAMAGED)
        faults = [outcome for outcome in outcomes if isinstance(outcome, OSError)]
        if unreadable:
            logger.warning("%s: %d objects cannot be read: %s", self.name, len(unreadable), faults[0])
        elif faults and len(faults) == len(keys):
            raise BackendError(f"{self.name}: {faults[0]}") from faults[0]
        return told

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        check_lengths(keys, buffers)
        chunk_hashes = [key.chunk_hash for key in keys]
        self._index.pin_prefix(chunk_hashes)  # none of them makes room for another one
        try:
            missing = [i for i, found in enumerate(self._index.present(keys)) if not found or keys[i] in self._faults]
            room = self._reserve([len(buffers[i]) for i in missing])
            todo = [i for i, fits in zip(missing, room, strict=True) if fits]
            faults = await self._write([keys[i] for i in todo], [buffers[i] for i in todo]) if todo else []
            stored = self._index.present(keys)  # without what was deleted meanwhile
        finally:
            self._index.unpin_prefix(chunk_hashes)
        if not any(stored) and (of_disk := [fault for fault in faults if not isinstance(fault, RecordFault)]):
            raise BackendError(f"{self.name}: {of_disk[0]}") from of_disk[0]
        return stored

    async def _write(self, keys: list[ObjectKey], buffers: list[memoryview]) -> list[OSError]:
        """Write objects for which there is room, and index them; returns the faults."""
        stop = Event()
        replaced = {key for key in keys if key in self._faults}
        future = self._changes.submit(self._directory.store, keys, buffers, replaced, stop)
        with self._watch() as removed:
            try:
                await settle([future], stop, self._given_up)
            finally:  # a cancelled call may have written some of them
                self._writing_bytes -= sum(map(len, buffers))
                errors = future.result() if future.done() and not future.cancelled() else []
                for key, buffer, error in zip(keys, buffers, errors, strict=False):
                    if error is None:
                        self._faults.over((key,))
                        if key not in removed:
                            self._index.put(key, len(buffer))
        if doubtful := [key for key in keys if key in removed]:
            with suppress(BackendError):  # a miss, then
                await self._look_on_disk(doubtful)  # deleted after it was stored, or missed by a load before
        return [error for error in errors if error is not None]

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        try:
            return await asyncio.shield(self._unlink(list(keys), Removal.DELETED))
        except OSError as error:
            raise BackendError(f"{self.name}: {error}") from error

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        await asyncio.wait([self._recovery])
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

    async def close(self) -> None:
        executors, self._executors = self._executors, ()
        if executors:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
            _shutdown(executors)
            try:
                ended = await asyncio.gather(*(executor.ended(CLOSE_SECONDS) for executor in executors))
            finally:  # also where the caller waits no longer: who waits for a thread that is stuck would do so for ever
                self._given_up.set_result(None)
            while self._index.clear(SLICE):  # noqa: ASYNC110 (nothing is waited for)
                await asyncio.sleep(0)
            if all(ended):  # a thread that is stuck could otherwise meet a number that means another file by then
                self._directory.close()

    def check_integrity(self) -> None:
        """Assert that the totals are those of the records."""
        self._index.check_integrity()
        assert self._writing_bytes >= 0

    # Room, and what is removed for it.

    def _reserve(self, sizes: list[int]) -> list[bool]:
        """For each size, whether there is room now for an object that will be written."""
        whole = self._make_room(sum(sizes))
        room = []
        for size_bytes in sizes:
            room.append(whole or self._make_room(size_bytes))
            self._writing_bytes += size_bytes if room[-1] else 0
        return room

    def _make_room(self, size_bytes: int) -> bool:
        """Evict until so many bytes fit; False, and nothing is evicted, if the pins do not allow it."""
        if self.capacity_bytes is None:
            return True
        evicted = self._index.evict(self._index.used_bytes + self._writing_bytes + size_bytes - self.capacity_bytes)
        if evicted:
            self._unlink(evicted, Removal.CAPACITY)
        return evicted is not None

    def _unlink(self, keys: list[ObjectKey], removal: Removal) -> "asyncio.Future[int]":
        """Drop objects and remove their files, after the changes that were submitted before."""
        self._drop(keys, removal)
        self._faults.over(keys)
        future = asyncio.wrap_future(self._changes.submit(self._directory.unlink, keys))
        self._unlinking.append(keys)
        future.add_done_callback(self._unlinked)
        return future

    def _drop(self, keys: Sequence[ObjectKey], removal: Removal) -> None:
        """Take objects out of the index, and tell those who wait for a thread."""
        for key in keys:
            self._index.drop(key, removal)
        for watch in self._watches.values():
            watch.update(keys)

    def _unlinked(self, future: "asyncio.Future[int]") -> None:
        self._unlinking.pop(0)  # one thread does them, in order
        if error := future.exception():
            logger.warning("%s: cannot remove: %s", self.name, error)

    @contextmanager
    def _watch(self) -> Iterator[set[ObjectKey]]:
        """The objects that were dropped while one waits for a thread: what it says of them is out of date."""
        removed: set[ObjectKey] = set()
        self._watches[id(removed)] = removed
        try:
            yield removed
        finally:
            del self._watches[id(removed)]

    async def _recover(self) -> None:
        """Index what is on the disk, the newest first, as older than all that was used since the start."""
        try:
            with self._watch() as removed:
                removed.update(*self._unlinking)
                scan = self._directory.scan()
                runs: list[list[Found]] = []
                while run := await _next(scan, None, executor=self._scans):
                    runs.append(run)
                records = merge(*map(_drain, runs), reverse=True)
                del runs
                while batch := await _take(records, SLICE, executor=self._scans):
                    for _, chunk_hash, rank, group, size_bytes in batch:
                        key = ObjectKey(chunk_hash, rank, group)
                        if key not in removed and not self._faults.is_unreadable(key):
                            self._index.put_oldest(key, size_bytes)
                    self._make_room(0)
        except Exception:  # the root of a task; what is not indexed is found by lookups
            logger.exception("%s: recovery failed", self.name)


def _drain(run: list[Found]) -> Iterator[Found]:
    """Iterate from the end, such that what was taken is freed at once, and not all together with the run."""
    while run:
        yield run.pop()


def _told(fault: OSError) -> LoadOutcome:
    return LoadOutcome.CORRUPT if isinstance(fault, RecordFault) else LoadOutcome.FAILED


def _shutdown(executors: Sequence[DaemonExecutor]) -> None:
    for executor in executors:
        executor.shutdown()
