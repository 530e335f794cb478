"""What a backend knows to be stored, what of it is pinned, and what leaves first. Each call is one step of the loop.

The tail of a prefix leaves before its head, without which it serves nobody: the chunks of a call are taken for used
from its last one to its first, and what lies in front of them, which only the caller knows, after them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress, islice
from typing import NamedTuple

from async_cache.aio.backlog import Backlog
from async_cache.l2.backend import Coming
from async_cache.l2.chunks import Chunk, Shape, Table, keys_of
from async_cache.l2.leaving import Leaving
from async_cache.l2.tables import Tables
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Origin, Selection
from async_cache.retention.bound import Bound
from async_cache.retention.lru import LeastRecentlyUsed
from async_cache.retention.policy import EvictionPolicy
from async_cache.retention.quotas import Bounds
from async_cache.values import Removal

_ADOPTED_AT_ONCE = 1024  # chunks that turn out to be within a quota: a millisecond or two
_MOST_COMING = 65_536


class Reserved(NamedTuple):
    """What an owner may have within its quota, and what has left for that."""

    owner: str | None
    model: str
    size_bytes: int
    evicted: list[Chunk]


class Index:
    """A record for each chunk that is known to be stored, the pins, and the policy that says what leaves first.

    Chunks share their shapes, and the records are of no interest to the garbage collector: with a million of them, each
    of its visits would take a tenth of a second. A pin outlives its chunk, so
    that a late unpin cannot take a pin of one that was stored anew. `on_removed` hears of each chunk that has left, or
    lost one of its objects: it is to call the backend's own `on_removed`. What is cleared at the end is not told.
    The room of an object is its size, in whole units, or the least that one takes.
    """

    def __init__(
        self,
        policy: EvictionPolicy[Chunk] | None = None,
        on_removed: Callable[[bytes, Removal], None] = lambda chunk_hash, removal: None,
        *,
        unit_bytes: int = 1,
        least_object_bytes: int = 1,
    ) -> None:
        self.objects = 0
        self.used_bytes = 0
        self.origins: Counter[Origin | None] = Counter()
        """How many chunks are of what; None: that is not known."""
        self.pins: Counter[bytes] = Counter()  # chunks without a pin are not in it
        self._chunks: dict[bytes, Chunk] = {}
        self._policy: EvictionPolicy[Chunk] = policy if policy is not None else LeastRecentlyUsed()
        self._on_removed = on_removed
        self.bounds = Bounds()
        """What owners may have at most."""
        self._adopting = Backlog(_ADOPTED_AT_ONCE)
        self._coming: dict[bytes, Coming] = {}  # of chunks that are about to be stored
        self._tables = Tables(unit_bytes, least_object_bytes)
        self._leaving = Leaving(self._chunks, self.pins, self._policy)
        self._suspended = self._leaving.suspended

    def __del__(self) -> None:
        """Break the links between records: the collector does not know them, and nobody else would."""
        for chunk in self._chunks.values():
            chunk.older = chunk.newer = chunk.node = None

    def pin_chunks(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> bool:
        """Pin and touch these objects of every chunk, if all are there; if not, nothing."""
        chunks = list(filter(None, map(self._chunks.get, chunk_hashes)))
        if len(chunks) < len(chunk_hashes):
            return False
        if any(which not in table.shape.sizes for table in {chunk.table for chunk in chunks} for which in objects):
            return False
        self._use(reversed(chunks))
        for _ in objects:
            self.pins.update(chunk_hashes)
        return True

    def pin_whole(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        """For each chunk, whether it is there with all of these objects, and then pinned and touched.

        None, and nothing is pinned, if some of them are there without others.
        """
        chunks = list(map(self._chunks.get, chunk_hashes))
        for shape in {chunk.table.shape for chunk in chunks if chunk is not None}:
            held = [which in shape.sizes for which in objects]
            if not all(held):
                if any(held):
                    return None
                chunks = [chunk if chunk is None or chunk.table.shape is not shape else None for chunk in chunks]
        found = [chunk is not None for chunk in chunks]
        self._use(reversed(chunks))
        there = list(compress(chunk_hashes, found))
        for _ in objects if there else ():
            self.pins.update(there)
        return found

    def present_whole(self, chunk_hashes: Sequence[bytes], objects: Sequence[tuple[int, int]]) -> list[bool] | None:
        """For each chunk, whether it is there with all of these objects; None if some are there without others."""
        tables = [chunk.table if chunk is not None else None for chunk in map(self._chunks.get, chunk_hashes)]
        partial = set()
        for table in set(tables):
            held = [which in table.shape.sizes for which in objects] if table is not None else ()
            if not all(held):
                if any(held):
                    return None
                partial.add(table)
        return [table is not None and table not in partial for table in tables]

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
        self.unpin_chunks(chunk_hashes)
        self.touch(reversed(chunk_hashes))

    def unpin_chunks(self, chunk_hashes: Iterable[bytes]) -> None:
        """Take one pin off each of these chunks, if it has any; the first one of a prefix comes first."""
        pins = self.pins
        for chunk_hash in chunk_hashes:
            left = pins.pop(chunk_hash, 0) - 1
            if left > 0:
                pins[chunk_hash] = left
            elif self._suspended and (chunk := self._suspended.pop(chunk_hash, None)) is not None:
                self._policy.resume(chunk)

    def unpin_all(self) -> None:
        """Take all pins off."""
        self.pins.clear()
        self.unpin_chunks(list(self._suspended))

    def touch(self, chunk_hashes: Iterable[bytes]) -> None:
        """Mark chunks that are there as used just now, the last one most recently."""
        self._use(map(self._chunks.get, chunk_hashes))

    def _use(self, chunks: Iterable[Chunk | None]) -> None:
        used = list(filter(None, chunks))
        self._policy.use_all(used)
        if self.bounds:
            for chunk in used:
                if (origin := chunk.table.shape.origin) is not None:
                    self.bounds.use(chunk.chunk_hash, *origin[:2])
        if self._suspended:
            for chunk in used:
                self._suspended.pop(chunk.chunk_hash, None)

    def _shape_of(self, chunk_hash: bytes) -> Shape:
        chunk = self._chunks.get(chunk_hash)
        return chunk.table.shape if chunk is not None else self._tables.nothing(None)

    def present(self, keys: Sequence[ObjectKey]) -> list[bool]:
        """For each key, whether its object is there."""
        get = self._chunks.get
        return [
            (chunk := get(chunk_hash)) is not None and (rank, group) in chunk.table.shape.sizes
            for chunk_hash, rank, group in keys
        ]

    def pin(self, keys: Sequence[ObjectKey]) -> None:
        """Pin the chunk of each key, there or not."""
        self.pins.update([key.chunk_hash for key in keys])

    def unpin(self, keys: Sequence[ObjectKey]) -> None:
        """Take one pin off the chunk of each key, if it has any."""
        self.unpin_chunks([key.chunk_hash for key in keys])

    def bound(self, bounds: Bounds) -> None:
        """Keep owners within these quotas from now on; they may be the ones that are known, and have changed."""
        if bounds is not self.bounds:
            self.bounds = bounds
            for chunk in self._chunks.values():
                if chunk.shape.origin is not None:
                    bounds.add(*chunk.shape.origin[:2], chunk.shape.size_bytes)
        self._adopting.do(self._count_for_quotas, self.chunks() if bounds else ())

    def _count_for_quotas(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            if chunk.shape.origin is not None and self._chunks.get(chunk.chunk_hash) is chunk:
                self.bounds.adopt(chunk.chunk_hash, *chunk.shape.origin[:2])

    def coming(self, chunks: Iterable[Coming]) -> None:
        """Take note of chunks that are about to be stored."""
        if len(self._coming) > _MOST_COMING:
            self._coming.clear()  # what was not stored after all
        for coming in chunks:
            chunk = self._chunks.get(coming.chunk_hash)
            if chunk is None:
                self._coming[coming.chunk_hash] = coming
            elif chunk.shape.origin is None:
                self._adopt(chunk, coming.origin)

    def asked(self, path: Sequence[bytes], tokens: int, chunk_tokens: int, origin: Origin) -> None:
        """A request asked for all chunks on a path, which are its owner's. After a restart, that was not known."""
        self._policy.asked(path, tokens, chunk_tokens)
        if self.bounds:
            for chunk in filter(None, map(self._chunks.get, path)):
                if chunk.shape.origin is None:
                    self._adopt(chunk, origin)

    def _adopt(self, chunk: Chunk, origin: Origin) -> None:
        """Know what a chunk is of: it counts for its owner from now on."""
        self._left(chunk.shape.origin)
        self.origins[origin] += 1
        self._tables.adopt(chunk, origin)
        self.bounds.enter(chunk.chunk_hash, *origin[:2], None)
        self.bounds.add(*origin[:2], chunk.shape.size_bytes)

    def reserve(self, chunk_hash: bytes, size_bytes: int) -> "Reserved | None":
        """Let the owner of a chunk have so much more, until `unreserve`, and evict of its own what that takes.

        None, and nothing leaves, where it would be over its quota all the same.
        """
        origin = self.origin_of(chunk_hash)
        owner, model = origin[:2] if origin is not None else (None, "")
        victims = self.bounds.victims(owner, model, size_bytes, self._evictable_bytes_of)
        if victims is None:
            return None
        chunks = [self._chunks[victim] for victim in victims]
        self.remove(chunks, Removal.QUOTA)
        self.bounds.add(owner, model, size_bytes)
        return Reserved(owner, model, size_bytes, chunks)

    def _evictable_bytes_of(self, chunk_hash: bytes) -> int:
        return self._shape_of(chunk_hash).size_bytes if chunk_hash not in self.pins else 0

    def unreserve(self, reserved: "Reserved") -> None:
        """What was reserved is there by now, or did not come."""
        self.bounds.add(reserved.owner, reserved.model, -reserved.size_bytes)

    def origin_of(self, chunk_hash: bytes) -> Origin | None:
        """What a chunk is of that is there, or about to be stored, where that is known."""
        chunk, coming = self._chunks.get(chunk_hash), self._coming.get(chunk_hash)
        if chunk is not None:
            return chunk.shape.origin
        return coming.origin if coming is not None else None

    def hint(
        self, path: Sequence[bytes], output_tokens: int | None, returns: bool | None, within_seconds: float | None
    ) -> None:
        """An engine tells of the future of a path."""
        self._policy.hint(path, output_tokens, returns, within_seconds)

    def learned(self) -> Iterator[bytes]:
        """What the policy has learned beside the order, in pieces of a step each."""
        return self._policy.learned()

    def recall(self, pieces: Iterable[bytes]) -> Iterator[None]:
        """Go on from what a policy has learned before, each piece in a step. Raises ValueError for others."""
        return self._policy.recall(pieces)

    def placed(self, keys: Iterable[ObjectKey]) -> list[tuple[int, bytes] | None]:
        """For each key, the size and the place of its object; None if it is not there."""
        get = self._chunks.get
        found: list[tuple[int, bytes] | None] = []
        for chunk_hash, rank, group in keys:
            chunk = get(chunk_hash)
            if chunk is None or (size := (shape := (table := chunk.table).shape).sizes.get((rank, group))) is None:
                found.append(None)
            else:
                numbers, width = shape.numbers, table.width
                if len(numbers) > 1:
                    width //= len(numbers)
                begin = chunk.row * table.width + numbers[rank, group] * width
                found.append((size, bytes(table.places[begin : begin + width])))
        return found

    def place_of(self, key: ObjectKey) -> tuple[int, bytes] | None:
        """The size and the place of an object; None if it is not there."""
        return self.placed((key,))[0] if key.chunk_hash in self._chunks else None

    def put(self, key: ObjectKey, size_bytes: int, place: bytes = b"") -> None:
        """Add an object; its chunk becomes the most recently used."""
        coming = self._coming.get(key.chunk_hash)
        is_new = key.chunk_hash not in self._chunks
        chunk = self._add(key, size_bytes, place)
        if is_new:
            parent = self._chunks.get(coming.parent) if coming is not None and coming.parent is not None else None
            self._policy.enter(chunk, parent, kept=True)
        else:
            self._use((chunk,))

    def get(self, chunk_hash: bytes) -> Chunk | None:
        """What is known of a chunk; None if nothing is."""
        return self._chunks.get(chunk_hash)

    def oldest(self) -> Chunk | None:
        """The chunk that is to leave first."""
        return next(self._policy.victims(), None)

    def some(self, count: int) -> list[Chunk]:
        """So many chunks, in any order."""
        return list(islice(self._chunks.values(), count))

    def add_chunks(
        self,
        placed: Iterable[tuple[bytes, bytes]],
        which: tuple[int, int],
        size_bytes: int,
        origin: Origin | None,
        before: Chunk | None,
        *,
        latest: bool,
    ) -> tuple[int, list[tuple[bytes, bytes]], Chunk | None]:
        """Add the first objects of chunks, alike in rank, group and size, given the hash and the place of each.

        Each is the `latest` when it comes, or goes right before the one in front of it, the first one before another
        chunk. Returns how many were added, those of which something was there, which are not, and the last one.
        """
        chunks, use = self._chunks, self._policy.use
        fresh: dict[bytes, bytes] = {}
        known = []
        for item in placed:
            if item[0] in chunks or item[0] in fresh:
                known.append(item)
            else:
                fresh[item[0]] = item[1]
        for shape, some in self._by_shape(fresh, which, size_bytes, origin, latest=latest):
            for chunk_hash, (table, row) in zip(some, self._tables.rows(shape, list(some.values())), strict=True):
                chunk = chunks[chunk_hash] = Chunk(chunk_hash, table, row)
                use(chunk, before)
                if not latest:
                    before = chunk
            self._count(shape, len(some), len(some) * size_bytes)
        return len(fresh), known, before

    def _by_shape(
        self,
        fresh: dict[bytes, bytes],
        which: tuple[int, int],
        size_bytes: int,
        origin: Origin | None,
        *,
        latest: bool,
    ) -> Iterator[tuple[Shape, dict[bytes, bytes]]]:
        """Chunks of which nothing was there, by the shape that they have with their first object."""
        if fresh and (origin is None or not self.bounds) and self._coming.keys().isdisjoint(fresh):
            self.origins[origin] += len(fresh)
            yield self._tables.grown(self._tables.nothing(origin), *which, size_bytes), fresh
        else:
            for chunk_hash, place in fresh.items():
                came = self._came(chunk_hash, origin, is_oldest=not latest)
                yield self._tables.grown(came, *which, size_bytes), {chunk_hash: place}

    def put_oldest(self, key: ObjectKey, size_bytes: int, place: bytes = b"") -> None:
        """Add an object that is to leave before all others; what is known of it already stays as it is."""
        sizes = self._shape_of(key.chunk_hash).sizes
        if key[1:] not in sizes:
            chunk = self._add(key, size_bytes, place)
            if not sizes:
                self._policy.use(chunk, self.oldest())

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
        size_bytes = chunk.shape.sizes[dropped]
        self._tables.drop(chunk, dropped)
        self._count(chunk.shape, -1, -size_bytes)
        self._on_removed(key.chunk_hash, removal)

    def evict(self, size_bytes: int) -> list[ObjectKey] | None:
        """Remove chunks without a pin to free so many bytes; None, and nothing leaves, if they do not suffice."""
        victims = self.victims(size_bytes)
        if victims is None:
            return None
        self.remove(victims, Removal.CAPACITY)
        return [key for chunk in victims for key in keys_of(chunk)]

    def victims(self, size_bytes: int) -> list[Chunk] | None:
        """Chunks without a pin with so much room, those that should leave first; None if all do not suffice.

        Where there are quotas, whoever has filled most of his own gives way.
        """
        return self._leaving.victims(size_bytes, self.bounds, self.used_bytes)

    def remove(self, chunks: Iterable[Chunk], removal: Removal) -> None:
        """Remove chunks that are there, and all their objects."""
        for chunk in chunks:
            self._remove(chunk.chunk_hash, removal)
            self._on_removed(chunk.chunk_hash, removal)

    def in_order(self) -> list[Chunk]:
        """All chunks in the order in which they should leave; those whose turn it was while they were pinned first."""
        return [*self._suspended.values(), *self._policy.victims()]

    def clear(self, count: int) -> bool:
        """Remove so many chunks, pinned or not, and say whether there were any.

        It is for the end: the links between records that the garbage collector does not know keep them alive.
        """
        chunks = self.some(count)
        for chunk in chunks:
            self._remove(chunk.chunk_hash, Removal.LOST)
        return bool(chunks)

    def chunk_hashes(self) -> list[bytes]:
        """The hashes of all chunks, in any order."""
        return list(self._chunks)

    def chunks(self) -> list[Chunk]:
        """All chunks, in any order."""
        return list(self._chunks.values())

    def of(self, chunks: Sequence[Chunk], selection: Selection) -> list[Chunk]:
        """Those of these chunks that are there, and are of what is selected."""
        get, origins = self._chunks.get, {chunk.shape.origin for chunk in chunks}
        selected = {origin for origin in origins if origin is not None and origin in selection}
        return [it for it in chunks if it.shape.origin in selected and get(it.chunk_hash) is it] if selected else []

    def objects_of(self, chunk_hash: bytes) -> list[tuple[ObjectKey, int]]:
        """The objects of a chunk, each with its size in bytes."""
        return [(ObjectKey(chunk_hash, *which), size) for which, size in self._shape_of(chunk_hash).sizes.items()]

    def room_bytes(self, size_bytes: int) -> int:
        """What an object of so many bytes takes."""
        return self._tables.room_bytes(size_bytes)

    def _add(self, key: ObjectKey, size_bytes: int, place: bytes = b"") -> Chunk:
        chunk_hash, rank, group = key
        chunk = self._chunks.get(chunk_hash)
        if chunk is None:
            shape = self._tables.grown(self._came(chunk_hash), rank, group, size_bytes)
            chunk = self._chunks[chunk_hash] = Chunk(chunk_hash, *self._tables.row(shape, place))
            self._count(shape, 1, size_bytes)
        else:
            before_bytes = chunk.shape.sizes.get((rank, group))
            self._tables.put(chunk, rank, group, size_bytes, place)
            self._count(chunk.shape, before_bytes is None, size_bytes - (before_bytes or 0))
        return chunk

    def _came(self, chunk_hash: bytes, origin: Origin | None = None, *, is_oldest: bool = False) -> Shape:
        """The shape of a chunk of which nothing was there, and which may have been about to be stored."""
        coming = self._coming.pop(chunk_hash, None) if self._coming else None
        if coming is not None:
            origin = coming.origin
        self.origins[origin] += 1
        if origin is not None and self.bounds:
            parent = coming.parent if coming is not None else None
            self.bounds.enter(chunk_hash, *origin[:2], parent, is_oldest=is_oldest)
        return self._tables.nothing(origin)

    def _count(self, shape: Shape, objects: int, size_bytes: int) -> None:
        """There are so many more, which belong to whom the shape says."""
        self.objects += objects
        self.used_bytes += size_bytes
        if shape.origin is not None:
            self.bounds.add(*shape.origin[:2], size_bytes)

    def _left(self, origin: Origin | None) -> None:
        """A chunk less is of that."""
        self.origins[origin] -= 1
        if not self.origins[origin]:
            del self.origins[origin]

    @property
    def without_origin(self) -> int:
        """How many chunks there are of which the model is not known."""
        return sum(count for origin, count in self.origins.items() if origin is None or not origin.model)

    def _remove(self, chunk_hash: bytes, removal: Removal) -> None:
        """Remove a chunk and all its objects, if it is there."""
        chunk = self._chunks.pop(chunk_hash, None)
        if chunk is not None:
            shape = chunk.shape
            self._suspended.pop(chunk_hash, None)
            self._policy.left(chunk, removal)
            self._left(shape.origin)
            if shape.origin is not None:
                self.bounds.left(chunk_hash, *shape.origin[:2])
            self._count(shape, -len(shape.sizes), -shape.size_bytes)
            table, row = chunk.table, chunk.row
            places = table.places[row * table.width : row * table.width + table.width]
            chunk.table, chunk.row = Table(shape, table.width, places, 1), 0  # it keeps what it had
            self._tables.give_back(table, row)

    def check_integrity(self) -> None:
        """Assert that the totals are those of the records, and that the policy knows these and no others."""
        chunks = self._chunks.values()
        assert self.objects == sum(len(chunk.shape.sizes) for chunk in chunks)
        assert self.used_bytes == sum(sum(chunk.shape.sizes.values()) for chunk in chunks)
        assert all(chunk.shape.sizes for chunk in chunks)
        assert len({(id(chunk.table), chunk.row) for chunk in chunks}) == len(chunks)
        assert self.origins == Counter(chunk.shape.origin for chunk in chunks)
        suspended = {id(chunk) for chunk in self._suspended.values()}
        assert suspended <= {id(chunk) for chunk in chunks if chunk.chunk_hash in self.pins}
        assert {id(chunk) for chunk in self._policy.victims()} | suspended == {id(chunk) for chunk in chunks}
        assert all(count > 0 for count in self.pins.values())
        self._adopting.do_all()
        for bound in self.bounds:
            own = [c for c in chunks if _counts_for(c.shape.origin, bound)]
            assert bound.used_bytes >= sum(chunk.shape.size_bytes for chunk in own)
            assert set(bound) == {chunk.chunk_hash for chunk in own}


def _counts_for(origin: Origin | None, bound: Bound) -> bool:
    return origin is not None and origin.salt == bound.salt and bound.model in (None, origin.model)
