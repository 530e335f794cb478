"""`ValkeyBackend`: objects in the memory of a Valkey or Redis server, or of a cluster, which other hosts share."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Self, TypeVar

from async_cache.aio.slices import slices
from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Backend, Loaded, LoadOutcome, check_lengths
from async_cache.l2.faults import Faults
from async_cache.l2.record import TRAILER_BYTES
from async_cache.l2.urls.url import BackendURL
from async_cache.l2.valkey.items import Item, ask
from async_cache.l2.valkey.listing import list_node
from async_cache.l2.valkey.names import Names
from async_cache.l2.valkey.node import Node
from async_cache.l2.valkey.replies import number_of
from async_cache.l2.valkey.router import Router, Work, all_of
from async_cache.l2.valkey.settings import Settings
from async_cache.l2.valkey.usage import Usage
from async_cache.l2.valkey.values import Values, store
from async_cache.prompt.keys import ObjectKey
from async_cache.values import BackendUsage

log = logging.getLogger(__name__)

FIRST_COUNT_SECONDS = 0.25  # that opening waits for: what holds little is known at once
PAGE_SECONDS = 5.0  # for a page of a count; what is silent for longer is counted when it is back
SLICE_KEYS = 1024  # in one go: to make more questions would hold the loop
STREAM_BYTES = 2**20  # for which one more connection is worth its while
MAX_VALUE_BYTES = 512 * 2**20  # that a server takes

_LOADED, _GONE, _CORRUPT, _FAILED = LoadOutcome
T = TypeVar("T")


class ValkeyBackend(Backend):
    """One string for each object: a record, so that its checksum and its identity come and go with its bytes.

    A server that needs room evicts by its own rules, and others may remove anything: a pin holds nothing here. What
    vanished after its lookup is GONE.
    """

    shared = True

    def __init__(self, settings: Settings):
        self.name = settings.name
        self._settings = settings
        self._names = Names(settings.namespace)
        self.ttl_seconds = settings.ttl_seconds
        self._ttl = None if settings.ttl_seconds is None else max(1, round(settings.ttl_seconds * 1000))
        self._usage = Usage()
        self._faults = Faults()
        self._router: Router | None = None
        self._counting: asyncio.Task[None] | None = None
        self._counted = asyncio.Event()
        self._recount = asyncio.Event()
        self._was_away = False

    @classmethod
    def from_url(cls, url: BackendURL) -> Self:
        """The backend of a URL such as `valkey://host:6379/0?namespace=akv`. Raises ConfigError."""
        return cls(Settings.from_url(url))

    async def open(self) -> None:
        """Connect. A server that is not there may come later; one that refuses us raises ConfigError."""
        self._router = router = Router(self._settings)
        self._counted, self._recount = asyncio.Event(), asyncio.Event()
        try:
            await router.open()
        except ConfigError:
            await self.close()
            raise
        except BackendError as error:
            log.warning("%s; it is tried again when it is needed", error, extra={"backend": self.name})
        except BaseException:
            await self.close()
            raise
        self._counting = asyncio.create_task(self._count_now_and_then(router), name=f"{self.name} count")
        first = asyncio.ensure_future(self._counted.wait())
        await asyncio.wait((first,), timeout=FIRST_COUNT_SECONDS)
        first.cancel()

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        found: list[bool] = []
        for some in slices(keys, SLICE_KEYS):
            found += await self._look_up(some)
        if self._faults:
            found = [there and not self._faults.hides(key) for key, there in zip(keys, found, strict=True)]
        return found

    async def _look_up(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """Whether there is something under each name that may be a record."""
        only = self._open_router().only
        if only is not None and not self._was_away:  # without an item for each key, unless one has an error
            try:
                lines = await only.ask((b"STRLEN",), list(map(self._names.of, keys)))
            except BackendError:
                self._was_away = True
                raise
            sizes = [size_bytes for size_bytes in map(number_of, lines) if size_bytes is not None]
            if len(sizes) == len(keys):
                return [size_bytes >= TRAILER_BYTES for size_bytes in sizes]
        items = [Item(key, self._names.of(key)) for key in keys]
        await self._run(items, partial(ask, (b"STRLEN",)))
        self._raise_if_all_failed(items)
        return [item.number(0) >= TRAILER_BYTES for item in items]

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Nothing: there are no pins."""

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        return await self._in_slices(keys, buffers, self._load_some, _FAILED)

    async def load_each(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], loaded: Loaded
    ) -> list[LoadOutcome]:
        numbers = count()  # the slices come one after the other

        async def load(items: Sequence[Item]) -> list[LoadOutcome]:
            for item, number in zip(items, numbers, strict=False):
                item.told = partial(loaded, number)
            return await self._load_some(items)

        return await self._in_slices(keys, buffers, load, _FAILED)

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[int | LoadOutcome]:
        async def load(items: Sequence[Item]) -> list[int | LoadOutcome]:
            for item in items:
                item.may_be_shorter = True
            outcomes = await self._load_some(items)
            sizes = (len(item.buffer) for item in items)
            return [size if of is _LOADED else of for size, of in zip(sizes, outcomes, strict=True)]

        return await self._in_slices(keys, buffers, load, _FAILED)

    async def _load_some(self, items: Sequence[Item]) -> list[LoadOutcome]:
        await self._run(items, self._load)
        for item in items:
            item.outcome = item.outcome or _FAILED
        self._faults.suspect(item.key for item in items if item.outcome is _FAILED)
        if any(item.outcome is not _FAILED for item in items):
            await self._remove_corrupt([item.key for item in items if item.outcome is _CORRUPT])
        else:
            self._raise_if_all_failed(items)
        return [item.outcome or _FAILED for item in items]

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        return await self._in_slices(keys, buffers, self._store_some, False)

    async def _store_some(self, items: Sequence[Item]) -> list[bool]:
        await self._replace(items)
        fit = [item for item in items if len(item.buffer) <= MAX_VALUE_BYTES - TRAILER_BYTES]
        await self._run([item for item in fit if item.error is None], self._store)
        if not any(item.stored for item in items):
            self._raise_if_all_failed(items)
        return [item.stored for item in items]

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        items = await self._unlink(keys)
        failed = next((item.error for item in items if item.error is not None), None)
        if failed is not None:
            raise BackendError(f"{self.name}: {failed}") from failed
        return sum(item.number(1) for item in items)

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        """All objects, each with its size in bytes; twice, perhaps, while the server's tables or slots are moved."""
        for node in await self._open_router().masters():
            async for page in list_node(node, self._names):
                for entry in page:
                    yield entry

    def usage(self) -> BackendUsage:
        """What the namespace holds, records with their trailers, as `Usage` knows it; a bound is the server's own."""
        return self._usage.now()

    async def close(self) -> None:
        counting, self._counting = self._counting, None
        router, self._router = self._router, None
        try:
            if counting is not None:
                counting.cancel()
                await asyncio.wait((counting,))
        finally:  # also where the caller waits no longer
            if router is not None:
                await router.close()

    # Calls.

    async def _in_slices(
        self,
        keys: Sequence[ObjectKey],
        buffers: Sequence[memoryview],
        work: Callable[[Sequence[Item]], Awaitable[list[T]]],
        failed: T,
    ) -> list[T]:
        """Do work about objects, so many at a time, and return what became of each.

        It raises BackendError where it fails for all of a slice. That is raised here if it is the first, and else ends
        the work: the rest has failed, too.
        """
        check_lengths(keys, buffers)
        of, outcomes = self._names.of, list[T]()
        for some in slices(range(len(keys)), SLICE_KEYS):
            try:
                outcomes += await work([Item(keys[n], of(keys[n]), buffers[n]) for n in some])
            except BackendError as error:
                if not outcomes:
                    raise
                log.warning("%s: %d of %d objects are given up: %s", self.name, len(keys) - some[0], len(keys), error)
                break
        return outcomes + [failed] * (len(keys) - len(outcomes))

    def _open_router(self) -> Router:
        if self._router is None:
            raise BackendError(f"{self.name} is not open")
        return self._router

    async def _run(self, items: Sequence[Item], work: Work) -> None:
        router = self._open_router()
        if items:
            try:
                await router.run(items, work)
            finally:
                self._hear(items)

    def _hear(self, items: Sequence[Item]) -> None:
        """After a server was away it may hold other things: they are counted anew."""
        if any(item.error is not None for item in items):
            self._was_away = True
        elif self._was_away:
            self._was_away = False
            self._recount.set()

    def _raise_if_all_failed(self, items: Sequence[Item]) -> None:
        if items and all(item.error is not None for item in items):
            error = items[0].error
            text = str(error)
            raise BackendError(text if text.startswith(self.name) else f"{self.name}: {text}") from error

    # Values.

    async def _load(self, node: Node, items: list[Item], asking: bool) -> None:
        for item in items:
            item.outcome = None

        async def stream(todo: Iterator[Item]) -> None:
            async with node.bulk.wire() as wire:
                await Values(wire, todo, asking).run()

        await self._side_by_side(node, items, stream)

    async def _store(self, node: Node, items: list[Item], asking: bool) -> None:
        async def stream(todo: Iterator[Item]) -> None:
            async with node.bulk.wire() as wire:
                for item in todo:
                    self._note_store(item, await store(wire, item, self._ttl, asking))

        await self._side_by_side(node, items, stream)

    async def _side_by_side(
        self, node: Node, items: list[Item], stream: Callable[[Iterator[Item]], Awaitable[None]]
    ) -> None:
        """Share the work among connections: one waits for its turn, others help if they are free."""
        todo = iter(items)
        useful = min(len(items), 1 + sum(len(item.buffer) for item in items) // STREAM_BYTES)
        await all_of([stream(todo) for _ in range(max(1, min(useful, node.bulk.free)))])

    def _note_store(self, item: Item, line: bytes) -> None:
        item.stored = line in (b"+OK", b"$-1")  # new, or there already
        if line == b"+OK":
            self._usage.stored(item.key, len(item.buffer) + TRAILER_BYTES)
        elif not item.stored and not line.startswith(b"-OOM"):  # which is no fault: the server is full
            item.fail(line)

    # What could not be read.

    async def _replace(self, items: Sequence[Item]) -> None:
        """Remove what is there of objects that could not be read, and are stored anew now; else they have an error."""
        replaced = [item for item in items if item.key in self._faults]
        if replaced:
            for item, removed in zip(replaced, await self._unlink([item.key for item in replaced]), strict=True):
                item.error = removed.error

    async def _remove_corrupt(self, keys: Sequence[ObjectKey]) -> None:
        """Remove damaged objects; what cannot be removed is not found by us any more."""
        if keys:
            self._faults.hide(keys)
            await self._unlink(keys)

    async def _unlink(self, keys: Sequence[ObjectKey]) -> list[Item]:
        """Remove objects, whose sizes are the first answer about each, whether they were there the second."""
        items = []
        for part in slices(keys, SLICE_KEYS):
            some = [Item(key, self._names.of(key)) for key in part]
            await self._run(some, partial(ask, (b"STRLEN", b"UNLINK")))
            items += some
        for item in items:
            if item.error is None and item.number(1):
                self._usage.removed(item.key, item.number(0))
        self._faults.over(item.key for item in items if item.error is None)
        return items

    # Counting.

    async def _count_now_and_then(self, router: Router) -> None:
        while True:
            self._recount.clear()
            try:
                await self._count(router)
            except (BackendError, TimeoutError) as error:  # the latter of a server that is silent
                self._was_away = True
                log.debug("%s: what it holds could not be counted: %s", self.name, error, extra={"backend": self.name})
            except Exception:  # the root of a task
                log.exception("%s: what it holds could not be counted", self.name, extra={"backend": self.name})
            self._counted.set()
            with suppress(TimeoutError):  # not wait_for: in Python 3.11, it loses a cancel that comes with the event
                async with asyncio.timeout(self._settings.usage_seconds):
                    await self._recount.wait()

    async def _count(self, router: Router) -> None:
        self._usage.begin_count()
        complete = False
        try:
            async with asyncio.timeout(PAGE_SECONDS) as patience:
                for node in await router.masters():
                    async for page in list_node(node, self._names):
                        for key, size_bytes in page:
                            self._usage.see(key, size_bytes + TRAILER_BYTES)
                        patience.reschedule(asyncio.get_running_loop().time() + PAGE_SECONDS)
            complete = True
        finally:
            self._usage.end_count(complete=complete)
