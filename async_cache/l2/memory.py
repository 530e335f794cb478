"""The reference backend: objects in this process's own memory, with everything that the contract asks for.

It uses no threads, so that it runs under a virtual clock as well.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from xxhash import xxh3_64

from async_cache.l2.backend import Backend, LoadOutcome
from async_cache.prompt.keys import ObjectKey
from async_cache.values import BackendUsage

STEP_BYTES = 4 * 2**20  # copied in one step of the loop: a millisecond or two


@dataclass(slots=True)
class _Object:
    """One object: its bytes in pieces of STEP_BYTES, since to allocate it in one would hold the loop."""

    pieces: list[bytearray]
    size_bytes: int
    checksum: int


@dataclass(slots=True)
class _Chunk:
    """The objects of a chunk. They are of use together: a pin on one protects all, eviction takes all.

    A deleted chunk stays, empty, until its pins are given back: its late unpin must not free a new object.
    """

    objects: dict[ObjectKey, _Object] = field(default_factory=dict)
    pins: int = 0

    @property
    def size_bytes(self) -> int:
        return sum(stored.size_bytes for stored in self.objects.values())


class MemoryBackend(Backend):
    """Private copies of objects, with a checksum that every load verifies.

    `capacity_bytes` bounds the sum of the objects' sizes (None: no bound); the least recently used chunks
    that are not pinned make room. The contents outlive `close`: whoever opens this object next finds them.
    """

    def __init__(self, name: str = "memory", *, capacity_bytes: int | None = None):
        if capacity_bytes is not None and capacity_bytes < 1:
            raise ValueError(f"capacity_bytes must be at least 1, or None for no bound, not {capacity_bytes}")
        self.name = name
        self.capacity_bytes = capacity_bytes
        self._chunks: OrderedDict[bytes, _Chunk] = OrderedDict()  # the least recently used first
        self._objects = 0
        self._used_bytes = 0
        self._turn = asyncio.Lock()

    @property
    def pins(self) -> int:
        """Pins that were not given back yet."""
        return sum(chunk.pins for chunk in self._chunks.values())

    async def open(self) -> None:
        self._turn = asyncio.Lock()  # a lock belongs to the loop that it was first waited for in

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        keys = [[ObjectKey(chunk_hash, *which) for which in objects] for chunk_hash in chunk_hashes]
        found = [sum(self._find(key) is not None for key in of_chunk) for of_chunk in keys]
        if any(0 < count < len(objects) for count in found):
            return None
        for of_chunk, count in zip(keys, found, strict=True):
            for key in of_chunk if count else ():
                self._pin(key)
        return [count > 0 for count in found]

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        return [self._pin(key) for key in keys]

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        for key in keys:
            chunk = self._chunks.get(key.chunk_hash)
            if chunk is not None and chunk.pins:  # `close` may have dropped them
                chunk.pins -= 1
                self._forget_if_empty(key.chunk_hash, chunk)

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        _check_lengths(keys, buffers)
        return [await self._load(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        _check_lengths(keys, buffers)
        return [await self._store(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        deleted = 0
        for key in keys:
            if self._find(key) is not None:
                self._remove(key)
                deleted += 1
                await asyncio.sleep(0)  # to free memory takes time, too
        return deleted

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        for chunk_hash in list(self._chunks):
            chunk = self._chunks.get(chunk_hash)
            for key, stored in list(chunk.objects.items()) if chunk is not None else ():
                yield key, stored.size_bytes
            await asyncio.sleep(0)

    def usage(self) -> BackendUsage:
        return BackendUsage(self._objects, self._used_bytes, self.capacity_bytes)

    async def close(self) -> None:
        """Drop the pins: they belong to those who leave. The objects stay."""
        for chunk_hash, chunk in list(self._chunks.items()):
            chunk.pins = 0
            self._forget_if_empty(chunk_hash, chunk)

    def damage(self, key: ObjectKey, bit: int = 0) -> bool:
        """For tests: flip a bit of a stored object, as failing memory would; False if there is none."""
        stored = self._find(key)
        if stored is None:
            return False
        piece, index = divmod(bit // 8, STEP_BYTES)
        stored.pieces[piece][index] ^= 1 << bit % 8
        return True

    def check_integrity(self) -> None:
        """Assert that the totals are those of the records."""
        objects = [stored for chunk in self._chunks.values() for stored in chunk.objects.values()]
        assert self._objects == len(objects)
        assert self._used_bytes == sum(stored.size_bytes for stored in objects)
        assert self.capacity_bytes is None or self._used_bytes <= self.capacity_bytes
        for stored in objects:
            assert stored.size_bytes == sum(map(len, stored.pieces))
        for chunk in self._chunks.values():
            assert chunk.pins >= 0
            assert chunk.objects or chunk.pins

    # One object.

    def _find(self, key: ObjectKey) -> _Object | None:
        chunk = self._chunks.get(key.chunk_hash)
        return None if chunk is None else chunk.objects.get(key)

    def _touch(self, key: ObjectKey) -> _Object | None:
        """The object, whose chunk is now the most recently used."""
        stored = self._find(key)
        if stored is not None:
            self._chunks.move_to_end(key.chunk_hash)
        return stored

    def _pin(self, key: ObjectKey) -> bool:
        found = self._touch(key) is not None
        if found:
            self._chunks[key.chunk_hash].pins += 1
        return found

    async def _load(self, key: ObjectKey, buffer: memoryview) -> LoadOutcome:
        stored = self._touch(key)
        if stored is None:
            return LoadOutcome.GONE
        if len(buffer) == stored.size_bytes and await self._fill(buffer, stored):
            return LoadOutcome.LOADED
        if self._find(key) is stored:  # it may have been deleted and stored anew meanwhile
            self._remove(key)
        return LoadOutcome.CORRUPT

    async def _fill(self, buffer: memoryview, stored: _Object) -> bool:
        """Copy the object into the buffer; whether what was delivered has the right checksum."""
        digest = xxh3_64()
        for part, piece in zip(_parts(buffer), stored.pieces, strict=True):
            async with self._turn:  # one step at a time, however many calls there are
                part[:] = piece
                digest.update(part)
                await asyncio.sleep(0)
        return digest.intdigest() == stored.checksum

    async def _store(self, key: ObjectKey, buffer: memoryview) -> bool:
        if self._touch(key) is not None:
            return True
        if self.capacity_bytes is not None and len(buffer) > self.capacity_bytes:
            return False
        pieces = []
        digest = xxh3_64()
        for part in _parts(buffer):
            async with self._turn:
                pieces.append(bytearray(part))
                digest.update(pieces[-1])
                await asyncio.sleep(0)
        return self._insert(key, _Object(pieces, len(buffer), digest.intdigest()))

    def _insert(self, key: ObjectKey, stored: _Object) -> bool:
        if self._touch(key) is not None:  # another call was faster
            return True
        if not self._make_room(stored.size_bytes, key.chunk_hash):
            return False
        self._chunks.setdefault(key.chunk_hash, _Chunk()).objects[key] = stored
        self._chunks.move_to_end(key.chunk_hash)
        self._objects += 1
        self._used_bytes += stored.size_bytes
        return True

    def _make_room(self, size_bytes: int, kept_chunk: bytes) -> bool:
        """Evict as much as is needed, or nothing if that would not do."""
        if self.capacity_bytes is None:
            return True
        missing = self._used_bytes + size_bytes - self.capacity_bytes
        victims: list[ObjectKey] = []
        for chunk_hash, chunk in self._chunks.items():
            if missing <= 0:
                break
            if not chunk.pins and chunk_hash != kept_chunk:
                victims += chunk.objects
                missing -= chunk.size_bytes
        if missing > 0:
            return False
        for key in victims:
            self._remove(key)
        return True

    def _remove(self, key: ObjectKey) -> None:
        chunk = self._chunks[key.chunk_hash]
        stored = chunk.objects.pop(key)
        self._objects -= 1
        self._used_bytes -= stored.size_bytes
        self._forget_if_empty(key.chunk_hash, chunk)

    def _forget_if_empty(self, chunk_hash: bytes, chunk: _Chunk) -> None:
        if not chunk.objects and not chunk.pins:
            del self._chunks[chunk_hash]


def _parts(buffer: memoryview) -> Iterator[memoryview]:
    """The buffer in slices of STEP_BYTES."""
    return (buffer[begin : begin + STEP_BYTES] for begin in range(0, len(buffer), STEP_BYTES))


def _check_lengths(keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> None:
    if len(keys) != len(buffers):
        raise ValueError(f"{len(keys)} keys with {len(buffers)} buffers")
