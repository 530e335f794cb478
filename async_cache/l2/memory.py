"""The reference backend: objects in this process's own memory, with everything that the contract asks for.

It uses no threads, so that it runs under a virtual clock as well.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from xxhash import xxh3_64

from async_cache.aio.slices import InTurns
from async_cache.errors import ConfigError
from async_cache.l2.backend import Backend, Coming, Loaded, LoadOutcome, check_lengths, not_told, telling
from async_cache.l2.chunks import Chunk, keys_of
from async_cache.l2.index import Index
from async_cache.l2.urls.url import BackendURL, a_policy, capacity
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Origin, Selection
from async_cache.retention.policy import EvictionPolicy
from async_cache.retention.quotas import Bounds
from async_cache.values import BackendUsage, Removal

_SELECTED_AT_ONCE = 4096  # chunks: a millisecond or so
STEP_BYTES = 4 * 2**20  # copied in one step of the loop: a millisecond or two
_KNOWN_BYTES = 512  # what is known of an object takes so much, however little it has


@dataclass(slots=True)
class _Object:
    """One object: its bytes in pieces of STEP_BYTES, since to allocate it in one would hold the loop."""

    pieces: list[bytearray]
    size_bytes: int
    checksum: int


class MemoryBackend(Backend):
    """Private copies of objects, with a checksum that every load verifies.

    `capacity_bytes` bounds the sum of the objects' sizes (None: no bound), where each counts as `least_object_bytes` if
    it has less: 512 in a backend of a URL, as much as is known of it. Where it is reached, chunks without a pin make
    room, in the order of `policy`, by default the least recently looked up or stored first: the objects of a chunk are
    of use together, so a pin on one protects all, and all leave together. The contents outlive `close`: whoever opens
    this backend next finds them.
    """

    retains = True

    def __init__(
        self,
        name: str = "memory",
        *,
        capacity_bytes: int | None = None,
        policy: EvictionPolicy[Chunk] | None = None,
        least_object_bytes: int = 1,
    ):
        if capacity_bytes is not None and capacity_bytes < 1:
            raise ValueError(f"capacity_bytes must be at least 1, or None for no bound, not {capacity_bytes}")
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.learns = policy is not None
        self.least_object_bytes = least_object_bytes
        self._index = Index(policy, telling(self), least_object_bytes=least_object_bytes)
        self._objects: dict[ObjectKey, _Object] = {}
        self._used_bytes = 0
        self._notes: dict[str, bytes] = {}
        self._turn = asyncio.Lock()

    @classmethod
    def from_url(cls, url: BackendURL) -> Self:
        """The backend of a URL `memory://[name]?capacity=1GiB`. Raises ConfigError."""
        if url.path:
            raise ConfigError("memory has no path")
        if "@" in url.netloc:
            raise ConfigError("memory has no user and no password, only a name")
        parameters = url.parameters(capacity=capacity, policy=a_policy)
        return cls(
            url.netloc or "memory",
            capacity_bytes=parameters.get("capacity"),
            policy=parameters.get("policy"),
            least_object_bytes=_KNOWN_BYTES,
        )

    @property
    def pins(self) -> int:
        """The number of pins that were not given back yet."""
        return sum(self._index.pins.values())

    async def open(self) -> None:
        self._turn = asyncio.Lock()  # a lock belongs to the loop that it was first waited for in

    def lookup_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        return self._index.pin_whole(chunk_hashes, objects)

    def present_nowait(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        return self._index.present_whole(chunk_hashes, objects)

    async def lookup(self, keys: Sequence[ObjectKey]) -> list[bool]:
        return self._index.pin_present(keys)

    def pin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self._index.pin_prefix(chunk_hashes)

    def unpin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        self._index.unpin_prefix(chunk_hashes)

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
        return dict(self._notes)

    async def keep_note(self, name: str, note: bytes | None) -> None:
        if note is None:
            self._notes.pop(name, None)
        else:
            self._notes[name] = note

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        self._index.unpin(keys)

    async def load(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[LoadOutcome]:
        return await self.load_each(keys, buffers, not_told)

    async def load_each(
        self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview], loaded: Loaded
    ) -> list[LoadOutcome]:
        check_lengths(keys, buffers)
        outcomes = []
        for number, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            outcome = await self._load(key, buffer)
            outcomes.append(outcome)
            if outcome is LoadOutcome.LOADED:
                loaded(number)
        return outcomes

    async def load_sized(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[int | LoadOutcome]:
        check_lengths(keys, buffers)
        return [await self._load_sized(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    async def store(self, keys: Sequence[ObjectKey], buffers: Sequence[memoryview]) -> list[bool]:
        check_lengths(keys, buffers)
        chunk_hashes = [key.chunk_hash for key in keys]
        self._index.pin_prefix(chunk_hashes)  # none of them makes room for another one
        try:
            return [await self._store(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]
        finally:
            self._index.unpin_prefix(chunk_hashes)

    async def delete(self, keys: Sequence[ObjectKey]) -> int:
        deleted = 0
        for key in keys:
            if key in self._objects:
                self._remove(key, Removal.DELETED)
                deleted += 1
                await asyncio.sleep(0)  # to free memory takes time, too
        return deleted

    async def keys(self) -> AsyncIterator[tuple[ObjectKey, int]]:
        for chunk_hash in self._index.chunk_hashes():
            for item in self._index.objects_of(chunk_hash):
                yield item
            await asyncio.sleep(0)

    async def keys_of(self, selection: Selection) -> AsyncIterator[tuple[ObjectKey, int]]:
        async for part in InTurns(self._index.chunks(), _SELECTED_AT_ONCE):
            for chunk in self._index.of(part, selection):
                for item in self._index.objects_of(chunk.chunk_hash):
                    yield item

    def chunks_without_origin(self) -> int:
        return self._index.without_origin

    def usage(self) -> BackendUsage:
        return BackendUsage(self._index.objects, self._used_bytes, self.capacity_bytes)

    async def close(self) -> None:
        """Drop the pins: they belong to those who leave. The objects stay."""
        self._index.unpin_all()

    def check_integrity(self) -> None:
        """Assert that the totals are those of the objects."""
        self._index.check_integrity()
        assert self._index.objects == len(self._objects)
        assert self._index.used_bytes == sum(stored.size_bytes for stored in self._objects.values())
        assert all(self._index.present(list(self._objects)))
        assert self._used_bytes == sum(self._index.room_bytes(stored.size_bytes) for stored in self._objects.values())
        assert self.capacity_bytes is None or self._used_bytes <= self.capacity_bytes
        for stored in self._objects.values():
            assert stored.size_bytes == sum(map(len, stored.pieces))

    # One object.

    async def _load(self, key: ObjectKey, buffer: memoryview) -> LoadOutcome:
        stored = self._objects.get(key)
        if stored is None:
            return LoadOutcome.GONE
        if len(buffer) == stored.size_bytes and await self._fill(buffer, stored):
            return LoadOutcome.LOADED
        if self._objects.get(key) is stored:  # it may have been deleted and stored anew meanwhile
            self._remove(key, Removal.DAMAGED)
        return LoadOutcome.CORRUPT

    async def _load_sized(self, key: ObjectKey, buffer: memoryview) -> int | LoadOutcome:
        stored = self._objects.get(key)
        size_bytes = stored.size_bytes if stored is not None else 0
        outcome = await self._load(key, buffer[:size_bytes])
        return size_bytes if outcome is LoadOutcome.LOADED else outcome

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
        if key in self._objects:
            return True
        if self.capacity_bytes is not None and self._index.room_bytes(len(buffer)) > self.capacity_bytes:
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
        if key in self._objects:  # another call was faster
            return True
        reserved = self._index.reserve(key.chunk_hash, stored.size_bytes)
        if reserved is None:
            return False
        for victim in reserved.evicted:
            self._forget(keys_of(victim))
        fits = self._make_room(self._index.room_bytes(stored.size_bytes))
        self._index.unreserve(reserved)
        if fits:
            self._objects[key] = stored
            self._used_bytes += self._index.room_bytes(stored.size_bytes)
            self._index.put(key, stored.size_bytes)
        return fits

    def _make_room(self, room_bytes: int) -> bool:
        """Evict until so many bytes fit; False, and nothing leaves, if they never will."""
        if self.capacity_bytes is None:
            return True
        evicted = self._index.evict(self._used_bytes + room_bytes - self.capacity_bytes)
        self._forget(evicted or ())
        return evicted is not None

    def _forget(self, keys: Iterable[ObjectKey]) -> None:
        """Drop objects that the index has no more."""
        for key in keys:
            self._used_bytes -= self._index.room_bytes(self._objects.pop(key).size_bytes)

    def _remove(self, key: ObjectKey, removal: Removal) -> None:
        self._forget((key,))
        self._index.drop(key, removal)


def _parts(buffer: memoryview) -> Iterator[memoryview]:
    """The buffer in slices of STEP_BYTES."""
    return (buffer[begin : begin + STEP_BYTES] for begin in range(0, len(buffer), STEP_BYTES))
