"""What a backend knows to be stored, what of it is pinned, and what leaves first. Each call is one step of the loop.

The tail of a prefix leaves before its head, without which it serves nobody: the chunks of a call are taken for used
from its last one to its first, and what lies in front of them, which only the caller knows, after them.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from msgspec import Struct

from async_cache.prompt.keys import ObjectKey
from async_cache.retention.lru import LeastRecentlyUsed
from async_cache.retention.policy import EvictionPolicy
from async_cache.values import Removal

SHARED_OBJECTS = 32_768  # in the records that chunks share: a few megabytes, however many a chunk has

_Sizes = dict[tuple[int, int], int]  # the size of each (rank, group) of a chunk; never changed, since it is shared
_NOTHING: _Sizes = {}


class Chunk(Struct, gc=False, eq=False):
    """A chunk of which something is stored. The links are for a policy that keeps an order through its items."""

    chunk_hash: bytes
    sizes: _Sizes
    older: "Chunk | None" = None
    newer: "Chunk | None" = None


class Index:
    """A record for each chunk that is known to be stored, the pins, and the policy that says what leaves first.

    The sizes of a chunk are shared by all that have the same, and the records are of no interest to the garbage
    collector: with a million of them, each of its visits would take a tenth of a second. A pin outlives its chunk, so
    that a late unpin cannot take a pin of one that was stored anew.
    """

    def __init__(self, policy: EvictionPolicy[Chunk] | None = None) -> None:
        self.objects = 0
        self.used_bytes = 0
        self.pins: Counter[bytes] = Counter()  # chunks without a pin are not in it
        self._chunks: dict[bytes, Chunk] = {}
        self._policy: EvictionPolicy[Chunk] = policy if policy is not None else LeastRecentlyUsed()
        self._shared: dict[frozenset[tuple[tuple[int, int], int]], _Sizes] = {}
        self._shared_objects = 0

    def pin_chunks(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> bool:
        """Pin and touch these objects of every chunk, if all are there; if not, nothing."""
        sizes = list(map(self._sizes_of, chunk_hashes))
        alike = sizes.count(sizes[0] if sizes else _NOTHING) == len(sizes)
        if not all(which in record for record in (sizes[:1] if alike else sizes) for which in objects):
            return False
        self.touch(reversed(chunk_hashes))
        for _ in objects:
            self.pins.update(chunk_hashes)
        return True

    def pin_present(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """For each key, whether its object is there; if so its chunk is pinned and touched."""
        present = self.present(keys)
        found = [key.chunk_hash for key, there in zip(keys, present, strict=True) if there]
        self.touch(reversed(dict.fromkeys(found)))
        self.pins.update(found)
        return present

    def pin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        """Pin chunks, there or not: more of their prefix is about to come."""
        self.pins.update(chunk_hashes)

    def unpin_prefix(self, chunk_hashes: Sequence[bytes]) -> None:
        """Take one pin off each of these chunks; those that are there were used just now, the first one last."""
        pins, chunks, use = self.pins, self._chunks, self._policy.use
        for chunk_hash in reversed(chunk_hashes):
            left = pins.pop(chunk_hash, 0) - 1
            if left > 0:
                pins[chunk_hash] = left
            if (chunk := chunks.get(chunk_hash)) is not None:
                use(chunk)

    def touch(self, chunk_hashes: Iterable[bytes]) -> None:
        """Mark chunks that are there as used just now, the last one most recently."""
        use = self._policy.use
        for chunk in map(self._chunks.get, chunk_hashes):
            if chunk is not None:
                use(chunk)

    def _sizes_of(self, chunk_hash: bytes) -> _Sizes:
        chunk = self._chunks.get(chunk_hash)
        return chunk.sizes if chunk is not None else _NOTHING

    def present(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """For each key, whether its object is there."""
        get = self._chunks.get
        return [
            (chunk := get(chunk_hash)) is not None and (rank, group) in chunk.sizes for chunk_hash, rank, group in keys
        ]

    def pin(self, keys: Sequence[ObjectKey]) -> None:
        """Pin the chunk of each key, there or not."""
        self.pins.update([key.chunk_hash for key in keys])

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Take one pin off the chunk of each key, if it has any."""
        pins = self.pins
        for chunk_hash, _, _ in keys:
            left = pins.pop(chunk_hash, 0) - 1
            if left > 0:
                pins[chunk_hash] = left

    def put(self, key: ObjectKey, size_bytes: int) -> None:
        """Add an object; its chunk becomes the most recently used."""
        self._policy.use(self._set(key.chunk_hash, self._sizes_of(key.chunk_hash) | {key[1:]: size_bytes}))

    def put_oldest(self, key: ObjectKey, size_bytes: int) -> None:
        """Add an object that is to leave before all others; what is known of it already stays as it is."""
        sizes = self._sizes_of(key.chunk_hash)
        if key[1:] not in sizes:
            chunk = self._set(key.chunk_hash, sizes | {key[1:]: size_bytes})
            if not sizes:
                self._policy.use(chunk, next(self._policy.victims(), None))

    def drop(self, key: ObjectKey, removal: Removal) -> None:
        """Remove an object, if it is there."""
        sizes = self._sizes_of(key.chunk_hash)
        if key[1:] in sizes:
            self._set(key.chunk_hash, {which: size for which, size in sizes.items() if which != key[1:]}, removal)

    def evict(self, size_bytes: int) -> list[ObjectKey] | None:
        """Remove chunks without a pin to free so many bytes; None, and nothing leaves, if they do not suffice."""
        victims = []
        for chunk in self._policy.victims() if size_bytes > 0 else ():
            if chunk.chunk_hash not in self.pins:
                victims.append(chunk.chunk_hash)
                size_bytes -= sum(chunk.sizes.values())
                if size_bytes <= 0:
                    break
        if size_bytes > 0:
            return None
        evicted = [key for chunk_hash in victims for key, _ in self.objects_of(chunk_hash)]
        removal = Removal.CAPACITY  # by name it would cost a tenth of a microsecond for each
        for chunk_hash in victims:
            self._set(chunk_hash, _NOTHING, removal)
        return evicted

    def clear(self, count: int) -> bool:
        """Remove so many chunks, pinned or not, and say whether there were any.

        It is for the end: the links between records that the garbage collector does not know keep them alive.
        """
        chunks = list(islice(self._policy.victims(), count))
        for chunk in chunks:
            self._set(chunk.chunk_hash, _NOTHING, Removal.LOST)
        return bool(chunks)

    def chunk_hashes(self) -> list[bytes]:
        """The hashes of all chunks, in any order."""
        return list(self._chunks)

    def objects_of(self, chunk_hash: bytes) -> list[tuple[ObjectKey, int]]:
        """The objects of a chunk, each with its size in bytes."""
        return [(ObjectKey(chunk_hash, *which), size) for which, size in self._sizes_of(chunk_hash).items()]

    def _set(self, chunk_hash: bytes, sizes: _Sizes, removal: Removal = Removal.LOST) -> Chunk:
        """Change what a chunk has, and the totals with it; `removal` says why, where nothing is left of it."""
        chunk = self._chunks.get(chunk_hash) or Chunk(chunk_hash, _NOTHING)
        self.objects += len(sizes) - len(chunk.sizes)
        self.used_bytes += sum(sizes.values()) - sum(chunk.sizes.values())
        if sizes:
            chunk.sizes = shared = self._shared.setdefault(frozenset(sizes.items()), sizes)
            if shared is sizes:
                self._shared_objects += len(sizes)
                if self._shared_objects > SHARED_OBJECTS:
                    self._shared.clear()  # costs nothing but that equal ones exist twice
                    self._shared_objects = 0
            self._chunks[chunk_hash] = chunk
        elif self._chunks.pop(chunk_hash, None) is not None:
            self._policy.left(chunk, removal)
        return chunk

    def check_integrity(self) -> None:
        """Assert that the totals are those of the records, and that the policy knows these and no others."""
        chunks = self._chunks.values()
        assert self.objects == sum(len(chunk.sizes) for chunk in chunks)
        assert self.used_bytes == sum(sum(chunk.sizes.values()) for chunk in chunks)
        assert all(chunk.sizes for chunk in chunks)
        assert {id(chunk) for chunk in self._policy.victims()} == {id(chunk) for chunk in chunks}
        assert all(count > 0 for count in self.pins.values())
