"""What a backend knows to be stored: chunks in the order of their use, and pins. One step of the loop each."""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from msgspec import Struct

from async_cache.prompt.keys import ObjectKey
from async_cache.retention.ring import Ring

SHARED_RECORDS = 4096

_Held = dict[tuple[int, int], int]  # the size of each (rank, group) of a chunk; never changed, since it is shared
_NOTHING: _Held = {}


class Chunk(Struct, gc=False, eq=False):
    """A chunk of which something is stored."""

    chunk_hash: bytes
    held: _Held
    older: "Chunk | None" = None
    newer: "Chunk | None" = None


class Index:
    """What the directory is known to hold, a record for each chunk, in the order of use; and the pins.

    What a chunk holds is shared by all that hold the same, and the records are of no interest to the garbage collector:
    with a million of them, each of its visits would take a tenth of a second. A pin outlives its chunk, so that an old
    unpin can not take a pin of one that is stored anew.
    """

    def __init__(self) -> None:
        self.objects = 0
        self.used_bytes = 0
        self.pins: Counter[bytes] = Counter()  # chunks without a pin are not in it
        self._chunks: dict[bytes, Chunk] = {}
        self._order: Ring[Chunk] = Ring()
        self._shared: dict[frozenset[tuple[tuple[int, int], int]], _Held] = {}

    def pin_chunks(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> bool:
        """Pin and touch these objects of every chunk, if all are there; if not, nothing."""
        held = list(map(self._held, chunk_hashes))
        alike = held.count(held[0] if held else _NOTHING) == len(held)
        if not all(which in record for record in (held[:1] if alike else held) for which in objects):
            return False
        self._touch(chunk_hashes)
        for _ in objects:
            self.pins.update(chunk_hashes)
        return True

    def pin_present(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """Pin and touch what is there."""
        present = self.present(keys)
        found = [key.chunk_hash for key, there in zip(keys, present, strict=True) if there]
        self._touch(dict.fromkeys(found))
        self.pins.update(found)
        return present

    def _touch(self, chunk_hashes: Iterable[bytes]) -> None:
        use, chunks = self._order.use, self._chunks
        for chunk_hash in chunk_hashes:
            use(chunks[chunk_hash])

    def _held(self, chunk_hash: bytes) -> _Held:
        chunk = self._chunks.get(chunk_hash)
        return chunk.held if chunk is not None else _NOTHING

    def present(self, keys: Sequence[ObjectKey]) -> list[bool]:
        get = self._chunks.get
        return [
            (chunk := get(chunk_hash)) is not None and (rank, group) in chunk.held for chunk_hash, rank, group in keys
        ]

    def pin(self, keys: Sequence[ObjectKey]) -> None:
        """Pin the chunks of keys, there or not."""
        self.pins.update([key.chunk_hash for key in keys])

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        pins = self.pins
        for chunk_hash, _, _ in keys:
            left = pins.pop(chunk_hash, 0) - 1
            if left > 0:
                pins[chunk_hash] = left

    def put(self, key: ObjectKey, size_bytes: int) -> None:
        """Add an object; its chunk becomes the most recently used."""
        self._order.use(self._set(key.chunk_hash, self._held(key.chunk_hash) | {key[1:]: size_bytes}))

    def put_oldest(self, key: ObjectKey, size_bytes: int) -> None:
        """Add an object that is older than all others; what is known of it is not changed."""
        held = self._held(key.chunk_hash)
        if key[1:] not in held:
            chunk = self._set(key.chunk_hash, held | {key[1:]: size_bytes})
            if not held:
                self._order.use(chunk, self._order.oldest())

    def drop(self, key: ObjectKey) -> None:
        """Forget an object."""
        held = self._held(key.chunk_hash)
        if key[1:] in held:
            self._set(key.chunk_hash, {which: size for which, size in held.items() if which != key[1:]})

    def evict(self, size_bytes: int) -> list[ObjectKey] | None:
        """Drop the least recently used chunks without a pin to free so much; None, and none, if that is too much."""
        victims = []
        for chunk in self._order if size_bytes > 0 else ():
            if chunk.chunk_hash not in self.pins:
                victims.append(chunk.chunk_hash)
                size_bytes -= sum(chunk.held.values())
                if size_bytes <= 0:
                    break
        if size_bytes > 0:
            return None
        evicted = [key for chunk_hash in victims for key, _ in self.objects_of(chunk_hash)]
        for chunk_hash in victims:
            self._set(chunk_hash, _NOTHING)
        return evicted

    def chunk_hashes(self) -> list[bytes]:
        """Of all chunks, in any order."""
        return list(self._chunks)

    def objects_of(self, chunk_hash: bytes) -> list[tuple[ObjectKey, int]]:
        """The objects of a chunk, and their sizes."""
        return [(ObjectKey(chunk_hash, *which), size) for which, size in self._held(chunk_hash).items()]

    def forget(self, count: int) -> bool:
        """Let go of so many records, at the end; whether that were any. The links between them keep them alive."""
        chunks = list(islice(self._order, count))
        for chunk in chunks:
            self._set(chunk.chunk_hash, _NOTHING)
        return bool(chunks)

    def _set(self, chunk_hash: bytes, held: _Held) -> Chunk:
        """Change what a chunk holds, and the totals with it."""
        chunk = self._chunks.get(chunk_hash) or Chunk(chunk_hash, _NOTHING)
        self.objects += len(held) - len(chunk.held)
        self.used_bytes += sum(held.values()) - sum(chunk.held.values())
        if held:
            if len(self._shared) > SHARED_RECORDS:
                self._shared.clear()  # costs nothing but that equal ones exist twice
            chunk.held = self._shared.setdefault(frozenset(held.items()), held)
            self._chunks[chunk_hash] = chunk
        elif self._chunks.pop(chunk_hash, None) is not None:
            self._order.discard(chunk)
        return chunk

    def check_integrity(self) -> None:
        """Assert that the totals are those of the records."""
        chunks = self._chunks.values()
        assert self.objects == sum(len(chunk.held) for chunk in chunks)
        assert self.used_bytes == sum(sum(chunk.held.values()) for chunk in chunks)
        assert all(chunk.held for chunk in chunks)
        assert {id(chunk) for chunk in self._order} == {id(chunk) for chunk in chunks}
        assert all(count > 0 for count in self.pins.values())
