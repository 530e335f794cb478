"""What a backend knows to be stored, what of it is pinned, and what leaves first. Each call is one step of the loop.

The tail of a prefix leaves before its head, without which it serves nobody: the chunks of a call are taken for used
from its last one to its first, and what lies in front of them, which only the caller knows, after them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress, islice

from msgspec import Struct

from async_cache.prompt.keys import ObjectKey
from async_cache.retention.lru import LeastRecentlyUsed
from async_cache.retention.policy import EvictionPolicy
from async_cache.values import Removal

SHARED_OBJECTS = 16_384  # in the shapes that chunks share: a few megabytes, however many a chunk has


class Shape(Struct, gc=False, eq=False):
    """What a chunk has: the size of each of its objects, by (rank, group). All chunks that came by it alike share it.

    It never changes: a chunk that gets an object more gets the shape that `grown` has for that. `numbers` counts the
    objects, in the order of the places of a chunk.
    """

    sizes: dict[tuple[int, int], int]
    numbers: dict[tuple[int, int], int]
    size_bytes: int
    room_bytes: int
    grown: dict[tuple[int, int, int], "Shape"]  # by the rank, the group and the size of what is added


class Chunk(Struct, gc=False, eq=False):
    """A chunk of which something is stored. The links are for a policy that keeps an order through its items."""

    chunk_hash: bytes
    shape: Shape
    places: bytes = b""  # of its objects, one behind the other, all of one length: what they mean is the backend's
    older: "Chunk | None" = None
    newer: "Chunk | None" = None


class Index:
    """A record for each chunk that is known to be stored, the pins, and the policy that says what leaves first.

    Chunks share their shapes, and the records are of no interest to the garbage collector: with a million of them, each
    of its visits would take a tenth of a second. A pin outlives its chunk, so
    that a late unpin cannot take a pin of one that was stored anew. `on_removed` hears of each chunk that has left, or
    lost one of its objects: it is to call the backend's own `on_removed`. What is cleared at the end is not told.
    The room of an object is its size, in whole units.
    """

    def __init__(
        self,
        policy: EvictionPolicy[Chunk] | None = None,
        on_removed: Callable[[bytes, Removal], None] = lambda chunk_hash, removal: None,
        *,
        unit_bytes: int = 1,
    ) -> None:
        self.objects = 0
        self.used_bytes = 0
        self.pins: Counter[bytes] = Counter()  # chunks without a pin are not in it
        self._chunks: dict[bytes, Chunk] = {}
        self._policy: EvictionPolicy[Chunk] = policy if policy is not None else LeastRecentlyUsed()
        self._on_removed = on_removed
        self._unit_bytes = unit_bytes
        self._nothing = Shape({}, {}, 0, 0, {})
        self._shared_objects = 0

    def pin_chunks(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> bool:
        """Pin and touch these objects of every chunk, if all are there; if not, nothing."""
        shapes = set(map(self._shape_of, chunk_hashes))
        if not all(which in shape.sizes for shape in shapes for which in objects):
            return False
        self.touch(reversed(chunk_hashes))
        for _ in objects:
            self.pins.update(chunk_hashes)
        return True

    def pin_whole(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        """For each chunk, whether it is there with all of these objects, and then pinned and touched.

        None, and nothing is pinned, if some of them are there without others.
        """
        chunks = list(map(self._chunks.get, chunk_hashes))
        for shape in {chunk.shape for chunk in chunks if chunk is not None}:
            held = [which in shape.sizes for which in objects]
            if not all(held):
                if any(held):
                    return None
                chunks = [chunk if chunk is None or chunk.shape is not shape else None for chunk in chunks]
        found = [chunk is not None for chunk in chunks]
        self._use(reversed(chunks))
        there = list(compress(chunk_hashes, found))
        for _ in objects if there else ():
            self.pins.update(there)
        return found

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
        self._use(map(self._chunks.get, chunk_hashes))

    def _use(self, chunks: Iterable[Chunk | None]) -> None:
        use = self._policy.use
        for chunk in filter(None, chunks):
            use(chunk)

    def _shape_of(self, chunk_hash: bytes) -> Shape:
        chunk = self._chunks.get(chunk_hash)
        return chunk.shape if chunk is not None else self._nothing

    def present(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """For each key, whether its object is there."""
        get = self._chunks.get
        return [
            (chunk := get(chunk_hash)) is not None and (rank, group) in chunk.shape.sizes
            for chunk_hash, rank, group in keys
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

    def placed(self, keys: Iterable[ObjectKey]) -> list[tuple[int, bytes] | None]:
        """For each key, the size and the place of its object; None if it is not there."""
        get = self._chunks.get
        found: list[tuple[int, bytes] | None] = []
        for chunk_hash, rank, group in keys:
            chunk = get(chunk_hash)
            if chunk is None or (number := chunk.shape.numbers.get((rank, group))) is None:
                found.append(None)
            else:
                sizes, places = chunk.shape.sizes, chunk.places
                width = len(places) // len(sizes)
                found.append((sizes[rank, group], places[number * width : number * width + width]))
        return found

    def place_of(self, key: ObjectKey) -> tuple[int, bytes] | None:
        """The size and the place of an object; None if it is not there."""
        return self.placed((key,))[0] if key.chunk_hash in self._chunks else None

    def put(self, key: ObjectKey, size_bytes: int, place: bytes = b"") -> None:
        """Add an object; its chunk becomes the most recently used."""
        self._policy.use(self._add(key, size_bytes, place))

    def put_oldest(self, key: ObjectKey, size_bytes: int, place: bytes = b"") -> None:
        """Add an object that is to leave before all others; what is known of it already stays as it is."""
        sizes = self._shape_of(key.chunk_hash).sizes
        if key[1:] not in sizes:
            chunk = self._add(key, size_bytes, place)
            if not sizes:
                self._policy.use(chunk, next(self._policy.victims(), None))

    def drop(self, key: ObjectKey, removal: Removal) -> None:
        """Remove an object, if it is there."""
        chunk = self._chunks.get(key.chunk_hash)
        dropped = key[1:]
        if chunk is None or dropped not in chunk.shape.sizes:
            return
        if len(chunk.shape.sizes) == 1:
            self._remove(key.chunk_hash, removal)
            self._on_removed(key.chunk_hash, removal)
            return
        left = [(which, size, place) for which, size, place in placed_of(chunk) if which != dropped]
        self._reshape(chunk, self._nothing)
        chunk.places = b""
        for which, size, place in left:
            self._add(ObjectKey(key.chunk_hash, *which), size, place)
        self._on_removed(key.chunk_hash, removal)

    def evict(self, size_bytes: int) -> list[ObjectKey] | None:
        """Remove chunks without a pin to free so many bytes; None, and nothing leaves, if they do not suffice."""
        victims = self.victims(size_bytes)
        if victims is None:
            return None
        evicted = [key for chunk in victims for key, _ in self.objects_of(chunk.chunk_hash)]
        self.remove(victims, Removal.CAPACITY)
        return evicted

    def victims(self, size_bytes: int) -> list[Chunk] | None:
        """Chunks without a pin with so much room, those that should leave first; None if all do not suffice."""
        victims = []
        for chunk in self._policy.victims() if size_bytes > 0 else ():
            if chunk.chunk_hash not in self.pins:
                victims.append(chunk)
                size_bytes -= chunk.shape.room_bytes
                if size_bytes <= 0:
                    break
        return None if size_bytes > 0 else victims

    def remove(self, chunks: Iterable[Chunk], removal: Removal) -> None:
        """Remove chunks that are there, and all their objects."""
        for chunk in chunks:
            self._remove(chunk.chunk_hash, removal)
            self._on_removed(chunk.chunk_hash, removal)

    def in_order(self) -> Iterator[Chunk]:
        """Iterate over all chunks in the order in which they should leave. The one that came last may."""
        return self._policy.victims()

    def clear(self, count: int) -> bool:
        """Remove so many chunks, pinned or not, and say whether there were any.

        It is for the end: the links between records that the garbage collector does not know keep them alive.
        """
        chunks = list(islice(self._policy.victims(), count))
        for chunk in chunks:
            self._remove(chunk.chunk_hash, Removal.LOST)
        return bool(chunks)

    def chunk_hashes(self) -> list[bytes]:
        """The hashes of all chunks, in any order."""
        return list(self._chunks)

    def chunks(self) -> list[Chunk]:
        """All chunks, in any order."""
        return list(self._chunks.values())

    def objects_of(self, chunk_hash: bytes) -> list[tuple[ObjectKey, int]]:
        """The objects of a chunk, each with its size in bytes."""
        return [(ObjectKey(chunk_hash, *which), size) for which, size in self._shape_of(chunk_hash).sizes.items()]

    def room_bytes(self, size_bytes: int) -> int:
        """What an object of so many bytes takes, in whole units."""
        return -(-size_bytes // self._unit_bytes) * self._unit_bytes

    def _add(self, key: ObjectKey, size_bytes: int, place: bytes = b"") -> Chunk:
        chunk_hash, rank, group = key
        chunk = self._chunks.get(chunk_hash)
        if chunk is None:
            chunk = self._chunks[chunk_hash] = Chunk(chunk_hash, self._nothing)
        shape = chunk.shape.grown.get((rank, group, size_bytes))
        if shape is None:
            shape = self._grow(chunk.shape, rank, group, size_bytes)
        self._reshape(chunk, shape)
        at = shape.numbers[rank, group] * len(place)
        chunk.places = chunk.places[:at] + place + chunk.places[at + len(place) :]
        return chunk

    def _reshape(self, chunk: Chunk, shape: Shape) -> None:
        before, chunk.shape = chunk.shape, shape
        self.objects += len(shape.sizes) - len(before.sizes)
        self.used_bytes += shape.size_bytes - before.size_bytes

    def _grow(self, shape: Shape, rank: int, group: int, size_bytes: int) -> Shape:
        """Make the shape with one object more, or with another size of one."""
        which = rank, group
        sizes, numbers = {**shape.sizes, which: size_bytes}, {**shape.numbers}
        numbers.setdefault(which, len(numbers))
        before_bytes = shape.sizes.get(which, 0)
        whole_bytes = shape.size_bytes + size_bytes - before_bytes
        room_bytes = shape.room_bytes + self.room_bytes(size_bytes) - self.room_bytes(before_bytes)
        grown = shape.grown[rank, group, size_bytes] = Shape(sizes, numbers, whole_bytes, room_bytes, {})
        self._shared_objects += len(sizes)
        if self._shared_objects > SHARED_OBJECTS:
            self._nothing = Shape({}, {}, 0, 0, {})  # costs nothing but that equal ones exist twice
            self._shared_objects = 0
        return grown

    def _remove(self, chunk_hash: bytes, removal: Removal) -> None:
        """Remove a chunk and all its objects, if it is there."""
        chunk = self._chunks.pop(chunk_hash, None)
        if chunk is not None:
            self.objects -= len(chunk.shape.sizes)
            self.used_bytes -= chunk.shape.size_bytes
            self._policy.left(chunk, removal)

    def check_integrity(self) -> None:
        """Assert that the totals are those of the records, and that the policy knows these and no others."""
        chunks = self._chunks.values()
        assert self.objects == sum(len(chunk.shape.sizes) for chunk in chunks)
        assert self.used_bytes == sum(sum(chunk.shape.sizes.values()) for chunk in chunks)
        assert all(chunk.shape.sizes for chunk in chunks)
        assert {id(chunk) for chunk in self._policy.victims()} == {id(chunk) for chunk in chunks}
        assert all(count > 0 for count in self.pins.values())


def placed_of(chunk: Chunk) -> list[tuple[tuple[int, int], int, bytes]]:
    """The objects of a chunk: (rank, group), size in bytes and place of each."""
    sizes, places = chunk.shape.sizes, chunk.places
    width = len(places) // len(sizes)
    return [
        (which, size, places[number * width : number * width + width])
        for number, (which, size) in enumerate(sizes.items())
    ]
