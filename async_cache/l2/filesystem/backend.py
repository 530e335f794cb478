"""Objects in the segments of a local directory, bounded by size, verified at every load.

The loop decides, in a catalog that it alone changes; what blocks runs in threads. `docs/disk.md` has the format.
"""

import asyncio
import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import compress
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote, unquote

from async_cache.aio.slices import InTurns
from async_cache.config import parse_bytes
from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import (
    Backend,
    Coming,
    Loaded,
    LoadOutcome,
    LookupNowait,
    Reader,
    Sealer,
    check_lengths,
    not_told,
    telling,
)
from async_cache.l2.chunks import Chunk
from async_cache.l2.filesystem.directory import Directory, Moved
from async_cache.l2.filesystem.format import MOST_PAGES, PAGE_BYTES
from async_cache.l2.filesystem.journal import GROWTH_BYTES
from async_cache.l2.filesystem.log import Log, Settings
from async_cache.l2.filesystem.marker import Foreign
from async_cache.l2.filesystem.work import Threads
from async_cache.l2.index import Index
from async_cache.l2.urls.url import BackendURL, a_policy, capacity, one_of, whole_number
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Origin, Selection
from async_cache.retention.policy import EvictionPolicy
from async_cache.retention.quotas import Bounds
from async_cache.retention.recall import seal, unseal
from async_cache.values import BackendUsage, Removal

T = TypeVar("T")

logger = logging.getLogger(__name__)

CAPACITY_BYTES = 10 * 2**30
LEAST_CAPACITY_BYTES = GROWTH_BYTES + 4 * PAGE_BYTES
"""An index file with a page to spare, a page for the marker, one for what tells of origins, and one for an object."""
SEGMENT_BYTES = 128 * 2**20
MOST_SEGMENT_BYTES = MOST_PAGES * PAGE_BYTES
CLOSE_SECONDS = 2.0
LEARNED = "learned"
"""The name of the note on what the policy has learned."""
NOTES_PART = 8
"""Of the capacity beyond the least one, notes may have this part: others are refused."""
TRIES = 3  # in a directory that has moved before one is done
SELECTED = 4096  # chunks that are looked at in one step, a millisecond or so
SLICE = 256  # what the loop does with many objects, it does for so many at a time: a millisecond


def _as_it_is(name: str, content: bytes) -> bytes:
    return content


class FileSystemBackend(Backend):
    """The directory `path`, made if it is not there; other processes may use it at the same time.

    `capacity_bytes` bounds the room that the whole directory takes on the disk (None: no bound): chunks without a pin
    make room, in the order of `policy`, the least recently used first by default. `durability="fsync"`: what was
    stored survives a power failure; otherwise it is written when the kernel likes to, and what was torn is found out
    by its checksum. `direct` keeps objects of whole pages in page-aligned memory out of the page cache, where the file
    system can. `threads` read at a time. Files grow to `segment_bytes`, or to the size of a longer object.

    Raises ConfigError for arguments, and in `open` for a path, that cannot be used.
    """

    retains = True
    follows = True
    unit_bytes = PAGE_BYTES

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
        if capacity_bytes is not None and capacity_bytes < LEAST_CAPACITY_BYTES:
            raise ConfigError(
                f"capacity_bytes must be at least {LEAST_CAPACITY_BYTES}, for the directory itself and a page of "
                f"{PAGE_BYTES} bytes for an object, or None for no bound, not {capacity_bytes}"
            )
        if durability not in ("none", "fsync"):
            raise ConfigError(f"durability must be 'none' or 'fsync', not {durability!r}")
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}")
        if not 1 <= segment_bytes <= MOST_SEGMENT_BYTES:
            raise ConfigError(f"segment_bytes must be from 1 to {MOST_SEGMENT_BYTES}, not {segment_bytes}")
        self.path = os.fspath(path)
        self.name = f"fs://{self.path if self.path.isprintable() else quote(os.fsencode(self.path))}"
        self.capacity_bytes = capacity_bytes
        self._fsync, self._direct = durability == "fsync", direct
        self.learns = policy is not None
        self._settings = Settings(capacity_bytes, segment_bytes, threads)
        self._index = Index(policy, telling(self), unit_bytes=PAGE_BYTES)
        self._seal: Sealer = _as_it_is
        self._read: Reader = _as_it_is
        self._is_open = False
        self._opening: asyncio.Task[None] | None = None  # of the directory that has the path by now

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
            segment_bytes=parse_bytes,
            policy=a_policy,
        )
        path = "/" + "/".join(part for part in path.split("/") if part not in ("", "."))  # one name for one directory
        capacity_bytes = parameters.pop("capacity", CAPACITY_BYTES)
        return cls(path, capacity_bytes=capacity_bytes, **parameters)

    # Opening and closing.

    async def open(self) -> None:
        self._threads = Threads(self.name, self._settings.readers)
        try:
            directory = await self._threads.run(self._threads.changes, self._open_directory)
        except (Foreign, FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"{self.name} cannot be used: {error}") from error
        except OSError as error:
            raise BackendError(f"{self.name} cannot be opened: {error}") from error
        else:
            await self._recall(directory)
            self._log = Log(directory, self._index, self._threads, self._settings)
            self._is_open = True
        finally:
            if not self._is_open:
                self._threads.shutdown()

    async def _recall(self, directory: Directory) -> None:
        """Have the policy go on from what it had learned when the directory was closed, before chunks are found."""
        try:
            note = await self._threads.run(self._threads.changes, directory.notes.read, LEARNED)
            for _ in self._index.recall(unseal(note)) if note is not None else ():
                await asyncio.sleep(0)
        except (OSError, ValueError) as error:
            logger.warning("%s: what the policy had learned cannot be read: %s", self.name, error)

    async def _note_learned(self) -> None:
        """Have what the policy has learned outlive a restart."""
        pieces = []
        for piece in self._index.learned():
            pieces.append(piece)
            await asyncio.sleep(0)
        if pieces and self._log.work.used:
            with suppress(BackendError):  # it learns anew
                await self.keep_note(LEARNED, seal(pieces))

    def _open_directory(self) -> Directory:
        os.makedirs(self.path, 0o700, exist_ok=True)
        return Directory(
            self.path, name=self.name, fsync=self._fsync, direct=self._direct, seal=self._seal, read=self._read
        )

    async def _in_place(self, call: Callable[[Log], Awaitable[T]]) -> T:
        """Do something in the directory that has the path. Raises BackendError, and what it raises."""
        try:
            for tries_left in reversed(range(TRIES)):
                log = self._log
                try:
                    return await call(log)
                except Moved:
                    if not self._is_open:
                        raise BackendError(f"{self.name} is closed") from None
                    if not tries_left:
                        raise
                    await self._open_anew(log)
            raise AssertionError
        except OSError as error:
            raise BackendError(f"{self.name}: {error}") from error

    async def _open_anew(self, moved: Log) -> None:
        """Go on in the directory that has the path now, unless that was seen to. Raises OSError."""
        if moved is self._log:
            if self._opening is None or self._opening.done():
                self._opening = asyncio.create_task(self._replace(moved), name=f"{self.name} opening")
            await asyncio.shield(self._opening)
        await self._log.following.recovery()

    async def _replace(self, moved: Log) -> None:
        try:
            directory = await self._threads.run(self._threads.changes, self._open_directory)
        except Foreign as error:
            raise OSError(errno.ENOTDIR, str(error), self.path) from error
        logger.warning("%s: another directory has the path now, or the old one was removed: opened anew", self.name)
        await moved.abandon()
        while chunks := self._index.some(SLICE):
            self._index.remove(chunks, Removal.LOST)
            await asyncio.sleep(0)
        self._log = Log(directory, self._index, self._threads, self._settings)

    async def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        try:
            if self._opening is not None:
                self._opening.cancel()
                await asyncio.wait([self._opening])
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._note_learned()
                    await self._log.put_in_order()
            await self._log.abandon()
            self._threads.shutdown()
            if await self._threads.ended(CLOSE_SECONDS):
                self._log.directory.release()
        finally:  # also where the caller waits no longer: who waits for a thread that is stuck would do so for ever
            self._log.work.over = True
            self._threads.shutdown()
            self._threads.given_up.set_result(None)
        while self._index.clear(SLICE):  # noqa: ASYNC110 (nothing is waited for)
            await asyncio.sleep(0)

    # Lookups.

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        self._log.work.used = True
        if self._index.pin_chunks(chunk_hashes, objects):
            self._log.ahead.found(chunk_hashes)
            return [True] * len(chunk_hashes)
        return self._lookup_known(chunk_hashes, objects) if self._log.following.knows_all() else None

    async def lookup_later(self) -> LookupNowait | None:
        with suppress(BackendError):  # `lookup` says what it knows
            await self._in_place(lambda log: log.following.catch_up())
            self._log.room.make(0)
            return self._lookup_known
        return None

    def _lookup_known(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        present = self._index.pin_whole(chunk_hashes, objects)
        if present is not None:
            self._log.ahead.found(compress(chunk_hashes, present))
        return present

    def present_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        self._log.work.used = True
        present = self._index.present_whole(chunk_hashes, objects)
        return present if present is not None and (all(present) or self._log.following.knows_all()) else None

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        self._log.work.used = True
        present = self._index.pin_present(keys)
        if all(present):
            self._log.ahead.found([key.chunk_hash for key in keys])
            return present
        unknown = [key for key, found in zip(keys, present, strict=True) if not found]
        known = [key for key, found in zip(keys, present, strict=True) if found]
        try:
            await self._in_place(lambda log: log.following.catch_up())
        except BackendError:
            if not known:  # else it says what it knows
                raise
        except BaseException:
            self._index.unpin(known)
            raise
        discovered = iter(self._index.pin_present(unknown))
        found = [there or next(discovered) for there in present]
        chunk_hashes = [key.chunk_hash for key, there in zip(keys, found, strict=True) if there]
        self._index.touch(reversed(chunk_hashes))
        self._log.ahead.found(chunk_hashes)
        self._log.room.make(0)
        return found

    def pin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self._index.pin_prefix(chunk_hashes)

    def unpin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self._index.unpin_prefix(chunk_hashes)

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        self._index.unpin(keys)

    # What is known of chunks and their owners, and what is kept.

    def bound(self, bounds: Bounds) -> None:
        self._index.bound(bounds)

    def asked(self, path: Sequence[bytes], tokens: int, chunk_tokens: int, origin: Origin) -> None:
        self._index.asked(path, tokens, chunk_tokens, origin)

    def hint(
        self, path: Sequence[bytes], output_tokens: int | None, returns: bool | None, within_seconds: float | None
    ) -> None:
        self._index.hint(path, output_tokens, returns, within_seconds)

    def coming(self, chunks: Sequence[Coming]) -> None:
        self._index.coming(chunks)

    def retain(self, chunk_hashes: Sequence[bytes]) -> None:
        self._index.pin_prefix(chunk_hashes)

    def unretain(self, chunk_hashes: Sequence[bytes]) -> None:
        self._index.unpin_chunks(chunk_hashes)

    async def notes(self) -> dict[str, bytes]:
        return await self._in_place(lambda log: self._changed(log.directory.notes.read_all))

    async def note(self, name: str) -> bytes | None:
        return await self._in_place(lambda log: self._changed(log.directory.notes.read, name))

    async def keep_note(self, name: str, note: bytes | None) -> None:
        await self._in_place(lambda log: self._keep_note(log, name, note))

    async def _keep_note(self, log: Log, name: str, note: bytes | None) -> None:
        """Have a note, for which chunks make room as they do for objects. Raises OSError, and Moved."""
        if note is not None and self.capacity_bytes is not None:
            most_bytes = (self.capacity_bytes - LEAST_CAPACITY_BYTES) // NOTES_PART
            room_bytes = log.directory.notes.room_with(name, len(note))
            growth_bytes = room_bytes - log.directory.notes.room_bytes
            if growth_bytes > 0 and (room_bytes > most_bytes or not log.room.make(growth_bytes)):
                raise OSError(errno.ENOSPC, f"no room for a note of {len(note)} bytes")
        await self._changed(log.directory.keep_note, name, note)

    def _changed(self, function: Callable[..., T], *arguments: Any) -> "asyncio.Future[T]":
        return self._threads.run(self._threads.changes, function, *arguments)

    # Loads, stores, and what leaves.

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        return await self.load_each(keys, buffers, not_told)

    async def load_each(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], loaded: Loaded
    ) -> list[LoadOutcome]:
        check_lengths(keys, buffers)
        return (await self._log.loading.load(keys, buffers, loaded, exact=True))[0]

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[int | LoadOutcome]:
        check_lengths(keys, buffers)
        outcomes, placed = await self._log.loading.load(keys, buffers, not_told, exact=False)
        return [
            found[0] if outcome is LoadOutcome.LOADED and found is not None else outcome
            for outcome, found in zip(outcomes, placed, strict=True)
        ]

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        check_lengths(keys, buffers)
        chunk_hashes = [key.chunk_hash for key in keys]
        self._index.pin_prefix(chunk_hashes)  # none of them makes room for another one
        try:
            return await self._in_place(lambda log: log.storing.store(keys, buffers))
        finally:
            self._index.unpin_prefix(chunk_hashes)

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        keys = list(dict.fromkeys(keys))
        return await self._in_place(lambda log: log.delete(keys))

    # All of it.

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        await self._log.following.recovery(None)
        with suppress(BackendError):
            await self._in_place(lambda log: log.following.look())
        chunk_hashes = self._index.chunk_hashes()
        for begin in range(0, len(chunk_hashes), SLICE):
            for chunk_hash in chunk_hashes[begin : begin + SLICE]:
                for item in self._index.objects_of(chunk_hash):
                    yield item
            await asyncio.sleep(0)

    async def keys_of(self, selection: Selection) -> AsyncIterator[tuple[ObjectKey, int]]:
        await self._log.following.recovery(None)
        await self._in_place(lambda log: log.following.look())
        async for part in InTurns(self._index.chunks(), SELECTED):
            for chunk in self._index.of(part, selection):
                for item in self._index.objects_of(chunk.chunk_hash):
                    yield item

    def chunks_without_origin(self) -> int:
        return self._index.without_origin

    def seal_names(self, seal: Sealer, read: Reader) -> None:
        self._seal, self._read = seal, read

    @property
    def pins(self) -> int:
        """The number of pins that were not given back yet."""
        return sum(self._index.pins.values())

    def usage(self) -> BackendUsage:
        return BackendUsage(self._index.objects, self._index.used_bytes, self.capacity_bytes)

    def check_integrity(self) -> None:
        """Assert that the totals are those of the objects, and of what is being written."""
        self._log.check_integrity()
