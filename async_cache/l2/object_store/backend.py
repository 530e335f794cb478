"""Objects in a bucket that hosts share, each a record of its own under a name that its key says.

Nothing is kept of what a bucket holds: others store and delete there, and rules of the bucket let objects expire. So
each lookup asks, and there is no positive answer that could outlive its object. What this process removes, or finds
gone, while a lookup of it is out there, that lookup does not find.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import compress
from typing import Any, Self, TypeVar

from obstore import delete_async, head_async
from obstore import list as list_objects
from obstore.store import ObjectStore

from async_cache.config import CacheConfig
from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Backend, Loaded, LoadOutcome, check_lengths
from async_cache.l2.faults import Faults
from async_cache.l2.object_store.faults import is_absent, is_denied, is_of_settings, is_of_the_way, told
from async_cache.l2.object_store.holdings import Holdings
from async_cache.l2.object_store.location import CONCURRENCY, PART_BYTES, Location
from async_cache.l2.object_store.objects import PARTS_AT_A_TIME, Objects
from async_cache.l2.object_store.requests import Requests, side_by_side
from async_cache.l2.record import body_bytes, file_name, parse_name
from async_cache.l2.urls.url import BackendURL
from async_cache.prompt.keys import ObjectKey
from async_cache.values import BackendUsage

T = TypeVar("T")

logger = logging.getLogger(__name__)

FAN_OUT = 4  # digits of the hash that name the folder of an object: 65,536 of them
LOOKUPS_TO_ONE_LOAD = 4  # so many more requests may be under way at a time where they bring no bytes
PAGE = 1000  # objects of a listing, and of a deletion


class ObjectStoreBackend(Backend):
    """A prefix of a bucket. Any number of hosts may use it at the same time.

    `connect` makes a client of obstore, each of whose requests ends within so many seconds: for lookups, for loads and
    for the rest, after the limits of this backend. `concurrency` bounds the requests that carry bytes, of all calls
    together, in each direction, and so the memory that they take; `part_bytes` the size of one.

    There is no bound: a bucket has rules of its own by which objects expire. Nor are there pins: what a lookup has
    found, and somebody removes, is GONE when it is loaded.
    """

    shared = True

    def __init__(
        self,
        name: str,
        connect: Callable[[float], ObjectStore],
        *,
        prefix: str = "",
        concurrency: int = CONCURRENCY,
        part_bytes: int = PART_BYTES,
    ):
        self.name = name
        self._connect = connect
        self._folder = f"{prefix}/" if prefix else ""
        self._concurrency, self._part_bytes = concurrency, part_bytes
        self._holdings = Holdings()
        self._faults = Faults()
        self._changing: dict[ObjectKey, asyncio.Future[None]] = {}
        self._watches: dict[int, set[ObjectKey]] = {}
        self._requests: Requests | None = None
        self._counting: asyncio.Task[None] | None = None

    @classmethod
    def from_url(cls, url: BackendURL) -> Self:
        """The backend of a URL, whose parameters `Location` has. Raises ConfigError."""
        location = Location.of(url)
        return cls(
            location.name,
            location.connect,
            prefix=location.prefix,
            concurrency=location.concurrency,
            part_bytes=location.part_bytes,
        )

    async def open(self) -> None:
        """Raises ConfigError where the service says that there is no such bucket, or that it is not for us.

        A service that does not answer now is no reason not to open.
        """
        limits, defaults = self.limits, CacheConfig()
        self._lookups = self._connect(limits.lookup_timeout_seconds or defaults.lookup_timeout_seconds)
        self._changes = self._connect(limits.store_timeout_seconds or defaults.store_timeout_seconds)
        self._at_a_time = LOOKUPS_TO_ONE_LOAD * self._concurrency
        self._looking = asyncio.Semaphore(self._at_a_time)
        self._holdings, self._counting = Holdings(), None
        self._requests = Requests()
        self._objects = Objects(
            self._connect(limits.load_timeout_seconds or defaults.load_timeout_seconds),
            self._changes,
            asyncio.Semaphore(self._concurrency),
            asyncio.Semaphore(self._concurrency),
            asyncio.Semaphore(max(1, self._concurrency // PARTS_AT_A_TIME)),
            self._part_bytes,
            self._requests,
        )
        listing = self._list(self._lookups)
        try:
            more = await self._count_page(listing)
        except Exception as error:
            if is_of_settings(error):
                await self.close()
                raise ConfigError(f"{self.name} cannot be used: {told(error)}") from None
            logger.warning("%s cannot be listed now: %s", self.name, told(error))
            more = False
        if more:
            self._counting = asyncio.create_task(self._count(listing), name=f"{self.name} count")
        else:
            self._holdings.listing_ended()

    async def close(self) -> None:
        requests, self._requests = self._requests, None
        if requests is not None:
            if self._counting is not None:
                self._counting.cancel()
                await asyncio.wait((self._counting,))
            await requests.close()
            del self._lookups, self._changes, self._objects  # and their connections

    # What is there.

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        with self._watch() as removed:
            sizes = await side_by_side(self._at_a_time, self._size, keys)
        self._raise_if_nothing(sizes)
        return [
            isinstance(size_bytes, int) and key not in removed and not self._faults.hides(key)
            for key, size_bytes in zip(keys, sizes, strict=True)
        ]

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Nothing is pinned."""

    async def _size(self, key: ObjectKey) -> int | None:
        """How long the record of an object is; None where there is none."""
        async with self._looking:
            try:
                found = await head_async(self._lookups, self._path(key))
            except Exception as error:
                if is_absent(error):
                    return None
                raise
        size_bytes: int = found["size"]
        return size_bytes

    @contextmanager
    def _watch(self) -> Iterator[set[ObjectKey]]:
        """The objects that are removed, or found to be gone, meanwhile: what a lookup has heard of them is old."""
        removed: set[ObjectKey] = set()
        self._watches[id(removed)] = removed
        try:
            yield removed
        finally:
            del self._watches[id(removed)]

    def _removed(self, keys: Collection[ObjectKey]) -> None:
        for removed in self._watches.values():
            removed.update(keys)

    # Loads.

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        return await self._load_all(self._load, keys, buffers)

    async def load_each(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], loaded: Loaded
    ) -> list[LoadOutcome]:
        async def load(key: ObjectKey, buffer: memoryview, number: int) -> LoadOutcome:
            outcome = await self._load(key, buffer)
            if outcome is LoadOutcome.LOADED:
                loaded(number)
            return outcome

        return await self._load_all(load, keys, buffers, range(len(keys)))

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[int | LoadOutcome]:
        return await self._load_all(self._load_sized, keys, buffers)

    async def _load_all(
        self,
        load: Callable[..., Awaitable[T]],
        keys: Sequence[ObjectKey],
        buffers: Sequence[memoryview],
        *more: Sequence[int],
    ) -> list[T | LoadOutcome]:
        check_lengths(keys, buffers)
        loads = asyncio.ensure_future(side_by_side(self._at_a_time, load, keys, buffers, *more))
        outcomes = await self._objects.requests.result(loads)
        self._note_failures(keys, outcomes)
        self._raise_if_nothing(outcomes)
        return [LoadOutcome.FAILED if isinstance(outcome, BaseException) else outcome for outcome in outcomes]

    async def _load_sized(self, key: ObjectKey, buffer: memoryview) -> int | LoadOutcome:
        """Load an object that may be shorter than its buffer: ranges are asked for by its size."""
        size_bytes = await self._size(key)
        if size_bytes is None:
            return LoadOutcome.GONE
        body = buffer[: body_bytes(size_bytes) or 0]
        outcome = await self._load(key, body)
        return len(body) if outcome is LoadOutcome.LOADED else outcome

    async def _load(self, key: ObjectKey, buffer: memoryview) -> LoadOutcome:
        path = self._path(key)
        try:
            if await self._objects.read(path, key, buffer) or await self._objects.read(path, key, buffer):
                return LoadOutcome.LOADED  # the second time where it came to harm on its way
        except Exception as error:
            if not is_absent(error):
                raise
            self._removed((key,))
            return LoadOutcome.GONE
        await self._remove_corrupt(key)
        return LoadOutcome.CORRUPT

    async def _remove_corrupt(self, key: ObjectKey) -> None:
        """Remove what is no object, or let lookups not find it where that cannot be done."""
        self._removed((key,))
        try:
            await self.delete((key,))
        except BackendError as error:
            logger.warning("%s: what is corrupt stays: %s", self.name, error)
            self._faults.hide((key,))

    def _note_failures(self, keys: Sequence[ObjectKey], outcomes: Sequence[object]) -> None:
        """Take note of what is to be stored anew; of what is denied while others are not, it is the object's fault."""
        came = [outcome is LoadOutcome.LOADED or isinstance(outcome, int) for outcome in outcomes]
        others_came = any(came)
        for key, outcome in zip(keys, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                note = self._faults.hide if others_came and is_denied(outcome) else self._faults.suspect
                note((key,))
        self._faults.over(compress(keys, came))

    # Changes.

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        check_lengths(keys, buffers)
        stored = await side_by_side(self._at_a_time, self._store, keys, buffers)
        self._raise_if_nothing(stored)
        return [outcome is True for outcome in stored]

    async def _store(self, key: ObjectKey, buffer: memoryview) -> bool:
        async with self._change(key):
            there = await self._size(key)
            is_whole = there is not None and body_bytes(there) == len(buffer)
            if not is_whole or key in self._faults:
                await self._objects.write(self._path(key), key, buffer)
                self._faults.over((key,))
                if there is None:
                    self._holdings.stored(self._path(key), len(buffer))
        return True

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        unique = sorted(set(keys))
        return sum([await self._delete(unique[begin : begin + PAGE]) for begin in range(0, len(unique), PAGE)])

    async def _delete(self, keys: list[ObjectKey]) -> int:
        """Delete what is there of up to PAGE objects, after what is being stored of them. Raises BackendError."""
        async with AsyncExitStack() as changes:
            for key in keys:
                await changes.enter_async_context(self._change(key))
            self._removed(keys)
            sizes = await asyncio.gather(*map(self._size, keys), return_exceptions=True)
            failed = await self._delete_there([key for key, size in zip(keys, sizes, strict=True) if size is not None])
            self._removed(keys)
            self._faults.over(key for key in keys if key not in failed)
            there = 0
            for key, size in zip(keys, sizes, strict=True):
                if key not in failed and isinstance(size, int):
                    self._holdings.removed(self._path(key), body_bytes(size) or 0)
                    there += 1
        if failed:
            raise BackendError(
                f"{self.name}: {len(failed)} objects were not deleted: {told(next(iter(failed.values())))}"
            )
        return there

    async def _delete_there(self, keys: list[ObjectKey]) -> dict[ObjectKey, BaseException]:
        """Delete objects in one request, or, where one of them cannot be, each by its own; what was not, and why."""
        if not keys:
            return {}
        try:
            await delete_async(self._changes, list(map(self._path, keys)))
        except Exception as error:
            if is_of_the_way(error):
                return dict.fromkeys(keys, error)
            done = await asyncio.gather(*map(self._delete_one, keys), return_exceptions=True)
            return {key: error for key, error in zip(keys, done, strict=True) if error is not None}
        return {}

    async def _delete_one(self, key: ObjectKey) -> None:
        async with self._looking:
            try:
                await delete_async(self._changes, self._path(key))
            except Exception as error:
                if not is_absent(error):
                    raise

    @asynccontextmanager
    async def _change(self, key: ObjectKey) -> AsyncIterator[None]:
        """One change of an object at a time: a deletion comes after the store that it follows."""
        while (other := self._changing.get(key)) is not None:
            await asyncio.wait((other,))
        self._changing[key] = mine = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._changing[key]
            mine.set_result(None)

    # All that there is.

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        listing = self._list(self._changes)
        try:
            while page := await anext(listing, None):
                for found in page:
                    if (item := self._parse(found["path"], found["size"])) is not None:
                        yield item
        except Exception as error:
            raise BackendError(f"{self.name}: {told(error)}") from None

    def usage(self) -> BackendUsage:
        """What was listed when it was opened, up to a million objects, and what this process has changed since."""
        return self._holdings.usage()

    def _list(self, store: ObjectStore) -> Any:
        """All that lies under the prefix, in pages."""
        return list_objects(store, self._folder.rstrip("/") or None, chunk_size=PAGE)

    async def _count(self, listing: Any) -> None:
        try:
            while await self._count_page(listing):
                pass
        except Exception as error:  # the root of a task; what was not listed is not counted
            logger.warning("%s cannot be listed to its end: %s", self.name, told(error))
        self._holdings.listing_ended()

    async def _count_page(self, listing: Any) -> bool:
        """Add a page to what is known of the prefix; whether it was not the last one."""
        page: Any = await anext(listing, [])
        sizes = []
        for found in page:
            item = self._parse(found["path"], found["size"])
            sizes.append((found["path"], item and item[1]))
        return self._holdings.listed(sizes) and len(page) == PAGE

    # Names, and faults.

    def _path(self, key: ObjectKey) -> str:
        name = file_name(key)
        return f"{self._folder}{name[:FAN_OUT]}/{name}"

    def _parse(self, path: str, size_bytes: int) -> tuple[ObjectKey, int] | None:
        """The object that lies under a name, and its size; None if that is nothing of ours."""
        key, body = parse_name(path.rpartition("/")[2]), body_bytes(size_bytes)
        return (key, body) if key is not None and body is not None and self._path(key) == path else None

    def _raise_if_nothing(self, outcomes: Sequence[object]) -> None:
        """Raises BackendError if a call brought nothing but faults; logs what failed of one that did not."""
        faults = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if faults and len(faults) == len(outcomes):
            raise BackendError(f"{self.name}: {told(faults[0])}")
        if faults:
            logger.warning("%s: %d of %d objects: %s", self.name, len(faults), len(outcomes), told(faults[0]))
