"""A backend whose objects are encoded: threads encode what is stored, and decode what is loaded.

The store has objects of its own names (`names`) and of sizes that nobody knows before they are read, so it has to have
`load_sized`. What is encoded lies in scratch memory that is bounded: calls are cut into lots, which take turns.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from os import cpu_count
from threading import Event
from typing import Any

from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Backend, LoadOutcome, check_lengths
from async_cache.l2.codec.codec import Codec
from async_cache.l2.codec.scratch import Scratch, lots
from async_cache.l2.workers import DaemonExecutor, settle
from async_cache.prompt.keys import ObjectKey
from async_cache.values import BackendUsage, Removal

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0
SLABS = 2  # for loads, and as many for stores: while one lot is encoded or decoded, another one is on its way
THREADS = min(cpu_count() or 1, 4)

_Work = Iterator[tuple[int, ObjectKey, memoryview, memoryview]]


class CodecBackend(Backend):
    """The backend `inner`, in which every object is as `codec` encodes it; it opens and closes with this one.

    Room, sizes and what `keys` lists are those of the encoded objects. An object that cannot be decoded is CORRUPT and
    removed. Other objects of `inner` (plain ones, those of another codec, or under a key that is not here) are absent.
    Raises ConfigError for a backend that has no `load_sized`.
    """

    lists_sizes = False  # but those of what is stored

    def __init__(self, inner: Backend, codec: Codec, *, threads: int = THREADS):
        if type(inner).load_sized is Backend.load_sized:
            raise ConfigError(f"codec: {type(inner).__name__} loads only what it is told the size of (no load_sized)")
        self.inner, self.codec = inner, codec
        self.name = inner.name
        self.limits = inner.limits
        self.placement, self.shared, self.ttl_seconds = inner.placement, inner.shared, inner.ttl_seconds
        self._names, *self._older = codec.names
        self._found_older: Counter[ObjectKey] = Counter()  # pins of objects under older keys, by their names
        self._threads = threads
        self._executors: tuple[DaemonExecutor, ...] = ()

    @property
    def on_removed(self) -> Callable[[bytes, Removal], None]:
        """Whom the inner backend tells: the names of its objects have the chunk hashes of ours."""
        return self.inner.on_removed

    @on_removed.setter
    def on_removed(self, told: Callable[[bytes, Removal], None]) -> None:
        self.inner.on_removed = told

    async def open(self) -> None:
        await self.inner.open()
        self._given_up = asyncio.get_running_loop().create_future()
        self._encoders = DaemonExecutor(self._threads, f"{self.name} encode")
        self._decoders = DaemonExecutor(self._threads, f"{self.name} decode")
        self._executors = (self._encoders, self._decoders)
        self._store_scratch, self._load_scratch = Scratch(SLABS), Scratch(SLABS)

    # What is there.

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        found = self.inner.lookup_nowait(chunk_hashes, self._names.objects(objects))
        if found is None or not self._older or all(found):
            return found
        there = [chunk_hash for chunk_hash, is_there in zip(chunk_hashes, found, strict=True) if is_there]
        self.inner.unpin([self._names.name(ObjectKey(chunk_hash, *o)) for chunk_hash in there for o in objects])
        return None  # the older names have to be asked for

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        found = await self.inner.lookup(list(map(self._names.name, keys)))
        for names in self._older:
            missing = [n for n, is_there in enumerate(found) if not is_there]
            try:
                older = await self.inner.lookup([names.name(keys[n]) for n in missing]) if missing else []
            except BaseException:
                self.unpin([key for key, is_there in zip(keys, found, strict=True) if is_there])
                raise
            for n, is_there in zip(missing, older, strict=True):
                found[n] = is_there
                self._found_older.update([names.name(keys[n])] if is_there else [])
        return found

    def pin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self.inner.pin_prefix(chunk_hashes)

    def unpin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self.inner.unpin_prefix(chunk_hashes)

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        names = []
        for key in keys:
            name = self._name(key)
            names.append(name)
            if name in self._found_older:
                self._found_older[name] -= 1
                if not self._found_older[name]:
                    del self._found_older[name]
        self.inner.unpin(names)

    def _name(self, key: ObjectKey) -> ObjectKey:
        """What an object is called that was found, or is to be stored."""
        if self._found_older:
            for names in self._older:
                if (name := names.name(key)) in self._found_older:
                    return name
        return self._names.name(key)

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        return await self.inner.delete([names.name(key) for names in self.codec.names for key in keys])

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        async for name, size_bytes in self.inner.keys():
            for names in self.codec.names:
                if (key := names.key(name)) is not None:
                    yield key, size_bytes

    def usage(self) -> BackendUsage:
        return self.inner.usage()

    # Loads.

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        check_lengths(keys, buffers)
        bounds = [self.codec.bound_bytes(len(buffer)) for buffer in buffers]
        calls = [self._load(keys[lot], buffers[lot], bounds[lot]) for lot in lots(bounds)]
        if len(calls) == 1:
            told = [await calls[0]]
        else:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(call, name=f"{self.name} load") for call in calls]
            told = [task.result() for task in tasks]
        outcomes = list(chain.from_iterable(outcomes for outcomes, _ in told))
        faults = [fault for _, fault in told if fault is not None]
        if faults and outcomes.count(LoadOutcome.FAILED) == len(outcomes):
            raise faults[0]
        return outcomes

    async def _load(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], bounds: Sequence[int]
    ) -> tuple[list[LoadOutcome], BackendError | None]:
        """The outcomes of one lot, and why nothing was brought where that is so."""
        names = list(map(self._name, keys))
        async with self._load_scratch.borrow(bounds) as scratch:
            try:
                sizes = await self.inner.load_sized(names, scratch)
            except BackendError as error:
                return [LoadOutcome.FAILED] * len(keys), error
            todo = [
                (n, key, scratch[n][:size], buffers[n])
                for n, (key, size) in enumerate(zip(keys, sizes, strict=True))
                if isinstance(size, int)
            ]
            whole: list[bool | None] = [None] * len(keys)
            await self._in_threads(self._decoders, self.codec.decode, todo, whole)
        corrupt = [name for name, is_whole in zip(names, whole, strict=True) if is_whole is False]
        if corrupt:
            logger.warning("%s: %d objects cannot be decoded: they are damaged, or forged", self.name, len(corrupt))
            with suppress(BackendError):  # then it is found again, and removed the next time
                await self.inner.delete(corrupt)
        return [
            size if isinstance(size, LoadOutcome) else LoadOutcome.LOADED if is_whole else LoadOutcome.CORRUPT
            for size, is_whole in zip(sizes, whole, strict=True)
        ], None

    # Stores.

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        check_lengths(keys, buffers)
        bounds = [self.codec.bound_bytes(len(buffer)) for buffer in buffers]
        chunk_hashes = [key.chunk_hash for key in keys]
        stored: list[bool] = []
        self.inner.pin_prefix(chunk_hashes)  # none of them makes room for another lot
        try:
            for lot in lots(bounds):
                stored += await self._store(keys[lot], buffers[lot], bounds[lot])
        except BackendError:
            if not any(stored):
                raise
        finally:
            self.inner.unpin_prefix(chunk_hashes)
        return stored + [False] * (len(keys) - len(stored))

    async def _store(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], bounds: Sequence[int]
    ) -> list[bool]:
        """Store one lot."""
        async with self._store_scratch.borrow(bounds) as scratch:
            todo = list(zip(range(len(keys)), keys, buffers, scratch, strict=True))
            sizes: list[int | None] = [None] * len(keys)
            await self._in_threads(self._encoders, self.codec.encode, todo, sizes)
            encoded = [memory[:size] for memory, size in zip(scratch, sizes, strict=True)]
            return await self.inner.store(list(map(self._names.name, keys)), encoded)

    # Threads.

    async def _in_threads(
        self,
        executor: DaemonExecutor,
        step: Callable[[ObjectKey, memoryview, memoryview, Event], Any],
        todo: Sequence[tuple[int, ObjectKey, memoryview, memoryview]],
        results: list[Any],
    ) -> None:
        """Let threads take a step for each object, and put what it returns into the results.

        However it ends, no thread touches any of the memory then.
        """
        stop, work = Event(), iter(todo)
        futures = [executor.submit(_work, step, work, results, stop) for _ in range(min(self._threads, len(todo)))]
        await settle(futures, stop, self._given_up)

    async def close(self) -> None:
        executors, self._executors = self._executors, ()
        if executors:
            for executor in executors:
                executor.shutdown()
            try:
                await asyncio.gather(*(executor.ended(CLOSE_SECONDS) for executor in executors))
            finally:
                self._given_up.set_result(None)
                self._found_older.clear()
        await self.inner.close()

    def check_integrity(self) -> None:
        """Assert that what was unpinned is forgotten."""
        assert all(pins > 0 for pins in self._found_older.values())


def _work(
    step: Callable[[ObjectKey, memoryview, memoryview, Event], Any], work: _Work, results: list[Any], stop: Event
) -> None:
    """Take the step for each object until none is left, or the call was stopped."""
    with suppress(InterruptedError):
        for n, key, source, target in work:
            results[n] = step(key, source, target, stop)
