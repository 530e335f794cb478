"""What a backend knows to be stored: chunks in the order of their use, and pins. One step of the loop each."""

from collections import Counter, OrderedDict
from collections.abc import Sequence

from async_cache.keys import ObjectKey

SHARED_RECORDS = 4096

_Held = dict[tuple[int, int], int]  # the size of each (rank, group) of a chunk; never changed, since it is shared
_NOTHING: _Held = {}


class Index:
    """What the directory is known to hold, a record for each chunk, the least recently used first; and the pins.

    A record is shared by all chunks that hold the same: one costs about 90 bytes beside its hash. A pin outlives its
    chunk, so that an old unpin can not take a pin of one that is stored anew.
    """

    def __init__(self) -> None:
        self.objects = 0
        self.used_bytes = 0
        self.pins: Counter[bytes] = Counter()  # chunks without a pin are not in it
        self._chunks: OrderedDict[bytes, _Held] = OrderedDict()
        self._shared: dict[frozenset[tuple[tuple[int, int], int]], _Held] = {}

    def pin_chunks(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> bool:
        """Pin and touch these objects of every chunk, if all are there; if not, nothing."""
        chunks = self._chunks
        records = [chunks.get(chunk_hash, _NOTHING) for chunk_hash in chunk_hashes]
        alike = records.count(records[0]) == len(records)
        if not all(which in record for record in (records[:1] if alike else records) for which in objects):
            return False
        for chunk_hash in chunk_hashes:
            chunks.move_to_end(chunk_hash)
        for _ in objects:
            self.pins.update(chunk_hashes)
        return True

    def pin_present(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """Pin and touch what is there."""
        chunks, pins = self._chunks, self.pins
        present = []
        for chunk_hash, rank, group in keys:
            found = (rank, group) in chunks.get(chunk_hash, _NOTHING)
            if found:
                chunks.move_to_end(chunk_hash)
                pins[chunk_hash] += 1
            present.append(found)
        return present

    def present(self, keys: Sequence[ObjectKey]) -> list[bool]:
        return [key[1:] in self._chunks.get(key.chunk_hash, _NOTHING) for key in keys]

    def pin(self, keys: Sequence[ObjectKey]) -> None:
        """Pin the chunks of keys, there or not."""
        for key in keys:
            self.pins[key.chunk_hash] += 1

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        pins = self.pins
        for chunk_hash, _, _ in keys:
            left = pins.pop(chunk_hash, 0) - 1
            if left > 0:
                pins[chunk_hash] = left

    def put(self, key: ObjectKey, size_bytes: int) -> None:
        """Add an object; its chunk becomes the most recently used."""
        held = self._chunks.get(key.chunk_hash, _NOTHING)
        self._set(key.chunk_hash, held | {key[1:]: size_bytes})
        self._chunks.move_to_end(key.chunk_hash)

    def put_oldest(self, key: ObjectKey, size_bytes: int) -> None:
        """Add an object that is older than all others; what is known of it is not changed."""
        held = self._chunks.get(key.chunk_hash, _NOTHING)
        if key[1:] not in held:
            self._set(key.chunk_hash, held | {key[1:]: size_bytes})
            if not held:
                self._chunks.move_to_end(key.chunk_hash, last=False)

    def drop(self, key: ObjectKey) -> None:
        held = self._chunks.get(key.chunk_hash, _NOTHING)
        self._set(key.chunk_hash, {which: size for which, size in held.items() if which != key[1:]})

    def evict(self, size_bytes: int) -> list[ObjectKey] | None:
        """Drop the least recently used chunks without a pin to free so much; None, and none, if that is too much."""
        victims = []
        for chunk_hash, held in self._chunks.items():
            if size_bytes <= 0:
                break
            if chunk_hash not in self.pins:
                victims.append(chunk_hash)
                size_bytes -= sum(held.values())
        if size_bytes > 0:
            return None
        evicted = [key for chunk_hash in victims for key, _ in self.objects_of(chunk_hash)]
        for chunk_hash in victims:
            self._set(chunk_hash, _NOTHING)
        return evicted

    def chunk_hashes(self) -> list[bytes]:
        return list(dict.keys(self._chunks))  # in any order: in that of use, a million take half a second

    def objects_of(self, chunk_hash: bytes) -> list[tuple[ObjectKey, int]]:
        held = self._chunks.get(chunk_hash, _NOTHING)
        return [(ObjectKey(chunk_hash, rank, group), size) for (rank, group), size in held.items()]

    def _set(self, chunk_hash: bytes, held: _Held) -> None:
        """Change what a chunk holds, and the totals with it."""
        before = self._chunks.get(chunk_hash, _NOTHING)
        self.objects += len(held) - len(before)
        self.used_bytes += sum(held.values()) - sum(before.values())
        if held:
            if len(self._shared) > SHARED_RECORDS:
                self._shared.clear()  # costs nothing but that equal ones exist twice
            self._chunks[chunk_hash] = self._shared.setdefault(frozenset(held.items()), held)
        else:
            self._chunks.pop(chunk_hash, None)

    def check_integrity(self) -> None:
        """Assert that the totals are those of the records."""
        assert self.objects == sum(map(len, self._chunks.values()))
        assert self.used_bytes == sum(sum(held.values()) for held in self._chunks.values())
        assert all(self._chunks.values())
        assert all(count > 0 for count in self.pins.values())
