"""A backend whose objects are encoded: threads encode what is stored, and decode what is loaded.

The store has objects of its own names (`names`) and of sizes that nobody knows before they are read, so it has to have
`load_sized`. What is encoded lies in scratch memory that is bounded: calls are cut into lots, which take turns.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from os import cpu_count
from threading import Event
from typing import Any

from blake3 import blake3

from async_cache.errors import BackendError, ConfigError
from async_cache.l2.backend import Backend, Loaded, LoadOutcome, LookupNowait, Room, check_lengths, not_told
from async_cache.l2.codec.codec import Codec
from async_cache.l2.codec.header import HEADER_BYTES, Header
from async_cache.l2.codec.scratch import MemoryFile, Scratch, lots
from async_cache.l2.faults import Faults
from async_cache.l2.record import TRAILER_BYTES
from async_cache.l2.workers import DaemonExecutor, settle
from async_cache.l2.wrapper import Wrapper
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Selection

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 2.0
SLABS = 2  # for loads, and as many for stores: while one lot is encoded or decoded, another one is on its way
THREADS = min(cpu_count() or 1, 4)

_MOST_NOTE_BYTES = 2**24
_MOST_BYTES = 2**32  # of an object: what says that it is longer is none

_Work = Iterator[tuple[int, ObjectKey, memoryview, memoryview]]
_Place = Callable[[int, memoryview], memoryview | LoadOutcome]
"""Where the object of this number goes that is encoded in these bytes, or what is wrong with it."""


class CodecBackend(Wrapper):
    """The backend `inner`, in which every object is as `codec` encodes it; it opens and closes with this one.

    Room, sizes and what `keys` lists are those of the encoded objects. An object that cannot be decoded is CORRUPT and
    removed. Other objects of `inner` (plain ones, those of another codec, or under a key that is not here) are absent.
    Raises ConfigError for a backend that has no `load_sized`.
    """

    def __init__(self, inner: Backend, codec: Codec, *, threads: int = THREADS):
        if type(inner).load_sized is Backend.load_sized:
            raise ConfigError(f"codec: {type(inner).__name__} loads only what it is told the size of (no load_sized)")
        super().__init__(inner)  # whom it tells of removals hears of ours: names have their chunk hashes
        self.codec = codec
        inner.seal_names(self._sealed, self._read)
        self._names, *self._older = codec.names
        self.follows = inner.follows and not self._older  # what has an older name has to be asked for by that
        self._found_older: Counter[ObjectKey] = Counter()  # pins of objects under older keys, by their names
        self._faults = Faults()  # what cannot be decoded, and could not be removed
        self._threads = threads
        self._executors: tuple[DaemonExecutor, ...] = ()
        self._memory: MemoryFile | None = None

    def register(self, fd: int, memory: memoryview) -> None:
        """Nothing: what is encoded lies in memory of our own, which `inner` has."""

    async def open(self) -> None:
        self._memory = memory = MemoryFile(2 * SLABS)
        self.inner.register(memory.fd, memory.view)
        try:
            await self.inner.open()
        except BaseException:
            self._memory = None
            memory.close()
            raise
        self._given_up = asyncio.get_running_loop().create_future()
        self._encoders = DaemonExecutor(self._threads, f"{self.name} encode")
        self._decoders = DaemonExecutor(self._threads, f"{self.name} decode")
        self._executors = (self._encoders, self._decoders)
        slabs = memory.slabs()
        self._store_scratch, self._load_scratch = Scratch(slabs[:SLABS]), Scratch(slabs[SLABS:])

    # What is there.

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        return self._said(self.inner.lookup_nowait, chunk_hashes, objects)

    async def lookup_later(self) -> LookupNowait | None:
        lookup = await self.inner.lookup_later()
        return partial(self._said, lookup) if lookup is not None else None

    def _said(
        self, lookup: LookupNowait, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]
    ) -> list[bool] | None:
        """What is there by what the inner backend says at once; None if that does not tell."""
        found = lookup(chunk_hashes, self._names.objects(objects))
        if found is None or (not self._faults and (not self._older or all(found))):
            return found
        there = [chunk_hash for chunk_hash, is_there in zip(chunk_hashes, found, strict=True) if is_there]
        self.inner.unpin([self._names.name(ObjectKey(chunk_hash, *o)) for chunk_hash in there for o in objects])
        return None  # there may be others under older names, or such that are not to be found

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
        for n, key in enumerate(keys if self._faults else ()):
            if found[n] and self._faults.hides(key):
                self.unpin([key])
                found[n] = False
        return found

    async def notes(self) -> dict[str, bytes]:
        encoded = await self.inner.notes()
        decoded = await asyncio.gather(*(self._in_thread(self._read, name, note) for name, note in encoded.items()))
        return {name: note for name, note in zip(encoded, decoded, strict=True) if note is not None}

    async def note(self, name: str) -> bytes | None:
        encoded = await self.inner.note(name)
        return (await self._in_thread(self._read, name, encoded)) if encoded is not None else None

    async def keep_note(self, name: str, note: bytes | None) -> None:
        encoded = await self._in_thread(self._sealed, name, note) if note is not None else None
        await self.inner.keep_note(name, encoded)

    async def _in_thread(self, step: Callable[[str, bytes], Any], name: str, note: bytes) -> Any:
        return await asyncio.wrap_future(self._encoders.submit(step, name, note))

    def _sealed(self, name: str, note: bytes) -> bytes:
        """A note as it lies in the store: encoded like an object of a key that none has."""
        encoded = bytearray(self.codec.bound_bytes(len(note)))
        size = self.codec.encode(_key_of(name), memoryview(note), memoryview(encoded), Event())
        return bytes(encoded[:size])

    def _read(self, name: str, encoded: bytes) -> bytes | None:
        header = Header.parse(encoded[:HEADER_BYTES])
        if header is None or header.size_bytes > _MOST_NOTE_BYTES:
            return None
        note = bytearray(header.size_bytes)
        whole = self.codec.decode(_key_of(name), memoryview(bytearray(encoded)), memoryview(note), Event())
        return bytes(note) if whole else None

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
        deleted = await self.inner.delete([names.name(key) for names in self.codec.names for key in keys])
        self._faults.over(keys)
        return deleted

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        async for name, size_bytes in self.inner.keys():
            for names in self.codec.names:
                if (key := names.key(name)) is not None:
                    yield key, size_bytes

    async def keys_of(self, selection: Selection) -> AsyncIterator[tuple[ObjectKey, int]]:
        async for name, size_bytes in self.inner.keys_of(selection):
            for names in self.codec.names:
                if (key := names.key(name)) is not None:
                    yield key, size_bytes

    # Loads.

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        return await self.load_each(keys, buffers, not_told)

    async def load_each(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], loaded: Loaded
    ) -> list[LoadOutcome]:
        check_lengths(keys, buffers)
        # With room for what a store keeps behind an object, which it may read along with it.
        bounds = [self.codec.bound_bytes(len(buffer)) + TRAILER_BYTES for buffer in buffers]
        bodies = await self._load_all(keys, bounds, lambda n, encoded: buffers[n], loaded)
        return [found if isinstance(found, LoadOutcome) else LoadOutcome.LOADED for found in bodies]

    load_sized = Backend.load_sized  # there is none: the sizes of what is decoded are those of the keys

    async def load_listed(
        self, keys: Sequence[ObjectKey], sizes: Sequence[int], room: Room
    ) -> list[memoryview | LoadOutcome]:
        # What is stored under another key, or at another level, than what was listed may be longer.
        return await self._load_all(
            keys, [2 * size for size in sizes], lambda n, encoded: _room(encoded, room), not_told
        )

    async def _load_all(
        self, keys: Sequence[ObjectKey], bounds: Sequence[int], place: _Place, loaded: Loaded
    ) -> list[memoryview | LoadOutcome]:
        """Load objects that are encoded in so many bytes at most, in lots, and decode each to its place."""
        calls = [self._load(lot, keys[lot], bounds[lot], place, loaded) for lot in lots(bounds)]
        if len(calls) == 1:
            told = [await calls[0]]
        else:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(call, name=f"{self.name} load") for call in calls]
            told = [task.result() for task in tasks]
        bodies = list(chain.from_iterable(of_lot for of_lot, _ in told))
        faults = [fault for _, fault in told if fault is not None]
        if faults and bodies.count(LoadOutcome.FAILED) == len(bodies):
            raise faults[0]
        return bodies

    async def _load(
        self, lot: slice, keys: Sequence[ObjectKey], bounds: Sequence[int], place: _Place, loaded: Loaded
    ) -> tuple[list[memoryview | LoadOutcome], BackendError | None]:
        """What became of the objects of one lot, and why nothing was brought where that is so."""
        bodies: list[memoryview | LoadOutcome] = [LoadOutcome.FAILED] * len(keys)
        whole: list[bool | None] = [None] * len(keys)
        async with self._load_scratch.borrow(bounds) as scratch:
            try:
                sizes = await self.inner.load_sized(list(map(self._name, keys)), scratch)
                todo = []
                for n, size in enumerate(sizes):
                    if isinstance(size, LoadOutcome):
                        bodies[n] = size
                        continue
                    encoded = scratch[n][:size]
                    body = bodies[n] = place(lot.start + n, encoded)
                    if isinstance(body, memoryview):
                        todo.append((n, keys[n], encoded, body))
                    elif body is LoadOutcome.CORRUPT:
                        whole[n] = False
                await self._in_threads(
                    self._decoders,
                    self.codec.decode,
                    todo,
                    whole,
                    lambda n, is_whole: is_whole and loaded(lot.start + n),
                )
            except BackendError as error:
                return [LoadOutcome.FAILED] * len(keys), error
        corrupt = [n for n, is_whole in enumerate(whole) if is_whole is False]
        for n in corrupt:
            bodies[n] = LoadOutcome.CORRUPT
        if corrupt:
            logger.warning("%s: %d objects cannot be decoded: they are damaged, or forged", self.name, len(corrupt))
            await self._remove_corrupt([keys[n] for n in corrupt])
        return bodies, None

    async def _remove_corrupt(self, keys: Sequence[ObjectKey]) -> None:
        """Remove what cannot be decoded; where that fails, lookups do not find it, until it is stored anew."""
        self._faults.hide(keys)
        with suppress(BackendError):
            await self.delete(keys)

    # Stores.

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        check_lengths(keys, buffers)
        bounds = [self.codec.bound_bytes(len(buffer)) for buffer in buffers]
        chunk_hashes = [key.chunk_hash for key in keys]
        stored: list[bool] = []
        self.inner.pin_prefix(chunk_hashes)  # none of them makes room for another lot
        try:
            if corrupt := [key for key in keys if key in self._faults]:
                await self._remove_corrupt(corrupt)  # else it would count as stored
            for lot in lots(bounds):
                stored += await self._store(keys[lot], buffers[lot], bounds[lot])
        except BackendError:
            if not any(stored):
                raise
        finally:
            self.inner.unpin_prefix(chunk_hashes)
        stored += [False] * (len(keys) - len(stored))
        return [is_stored and key not in self._faults for key, is_stored in zip(keys, stored, strict=True)]

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
        done: Callable[[int, Any], object] = lambda n, result: None,
    ) -> None:
        """Let threads take a step for each object, put what it returns into the results, and say that it is done.

        However it ends, no thread touches any of the memory then. Raises BackendError where it was closed meanwhile.
        """
        if not self._executors:
            raise BackendError(f"{self.name} is closed")
        stop, work = Event(), iter(todo)
        futures = [
            executor.submit(_work, step, work, results, done, stop) for _ in range(min(self._threads, len(todo)))
        ]
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
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def check_integrity(self) -> None:
        """Assert that what was unpinned is forgotten."""
        assert all(pins > 0 for pins in self._found_older.values())


def _key_of(name: str) -> ObjectKey:
    return ObjectKey(blake3(b"async_cache note\n" + name.encode()).digest(), 0, 0)


def _work(
    step: Callable[[ObjectKey, memoryview, memoryview, Event], Any],
    work: _Work,
    results: list[Any],
    done: Callable[[int, Any], object],
    stop: Event,
) -> None:
    """Take the step for each object until none is left, or the call was stopped."""
    with suppress(InterruptedError):
        for n, key, source, target in work:
            results[n] = result = step(key, source, target, stop)
            done(n, result)


def _room(encoded: memoryview, room: Room) -> memoryview | LoadOutcome:
    """Memory for an object of the size that its header says."""
    header = Header.parse(bytes(encoded[:HEADER_BYTES]))
    if header is None or header.size_bytes > _MOST_BYTES:
        return LoadOutcome.CORRUPT
    try:
        return room([header.size_bytes])[0]
    except OSError:  # there is none now
        return LoadOutcome.FAILED
