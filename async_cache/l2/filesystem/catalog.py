"""What is known to be stored in a directory, and where. Each call is one step of the loop.

Records come from several index files and in any order: a place of which a DROP was read once is never believed again.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import compress, groupby, repeat
from operator import itemgetter

from async_cache.l2.chunks import Chunk, keys_of, placed_of
from async_cache.l2.filesystem.clearing import Hole
from async_cache.l2.filesystem.format import PAGE_BYTES, Kind, Record, pages
from async_cache.l2.filesystem.journal import Journal
from async_cache.l2.filesystem.origins import Origins
from async_cache.l2.filesystem.segments import PLACE, Segment, Segments, set_bits
from async_cache.l2.index import Index
from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Origin
from async_cache.values import Removal

_PUT, _DROP = int(Kind.PUT), int(Kind.DROP)  # by name it would cost a tenth of a microsecond for each
_ALIKE = itemgetter(0, 1, 2, 3, 4, 6, 7)  # what many records in a row have in common: all but page, hash and checksums


class Catalog:
    """The index of the objects, whose places name segments, and the segments.

    An object may have several bodies for a while: two processes have stored it at once, or one did before it had
    heard of what the other one has. All processes keep the same one, and whoever answers for another one gives that up.
    """

    def __init__(self, index: Index, origins: Origins) -> None:
        self.index, self.origins = index, origins
        self.segments = Segments()
        self._doubles: dict[ObjectKey, list[tuple[int, bytes]]] = {}  # other bodies of objects: size and place

    # What is read.

    def learn(self, journal: Journal, records: Iterable[Record], *, latest: bool) -> list[ObjectKey]:
        """Take over records, as of the latest use or of the oldest. Returns the objects that are there no more."""
        gone: list[ObjectKey] = []
        before = None if latest else self.index.oldest()
        for (kind, rank, group, number, writer, origin, size_bytes), run in groupby(records, _ALIKE):
            segment = self.segments.get(writer, number)
            if kind == _PUT:
                before = self._learn_puts(
                    journal,
                    segment,
                    (rank, group),
                    size_bytes,
                    self.origins.known.get(origin),
                    run,
                    before,
                    latest=latest,
                )
            elif kind == _DROP:
                for _, _, _, _, _, page, _, _, chunk_hash, checksum, _ in run:
                    key = ObjectKey(chunk_hash, rank, group)
                    if self._learn_drop(journal, segment, key, size_bytes, page, checksum):
                        gone.append(key)
                if not latest:
                    before = self.index.oldest()
        return gone

    def _learn_puts(
        self,
        journal: Journal,
        segment: Segment,
        which: tuple[int, int],
        size_bytes: int,
        origin: Origin | None,
        run: Iterable[Record],
        before: Chunk | None,
        *,
        latest: bool,
    ) -> Chunk | None:
        """Take over records of a segment that are alike; what the next ones are older than."""
        _, _, _, _, _, at, _, _, chunk_hashes, checksums, _ = zip(*run, strict=True)
        count = pages(size_bytes)
        set_bits(segment.told_by(journal), at)
        segment.end = max(segment.end, max(at) + count)
        first, second = segment.place_begin
        places = map(PLACE.pack, repeat(first), map(second.__or__, at), checksums)
        placed: Iterable[tuple[bytes, bytes]] = zip(chunk_hashes, places, strict=False)  # `repeat` has no end
        if segment.dropped is not None:
            placed = compress(placed, [not segment.is_dropped(page) for page in at])
        added, known, before = self.index.add_chunks(placed, which, size_bytes, origin, before, latest=latest)
        self.segments.enter(segment, count, added)
        for chunk_hash, place in known:
            self._learn_more(ObjectKey(chunk_hash, *which), segment, size_bytes, place, latest=latest)
        return before

    def _learn_drop(
        self, journal: Journal, segment: Segment, key: ObjectKey, size_bytes: int, page: int, checksum: int
    ) -> bool:
        """Take over that an object was given up; whether it is there no more for that."""
        is_news = not segment.is_dropped(page)
        segment.drop(page)
        if journal.owned and segment.writer != journal.writer:  # what tells of the object may outlive this file
            segment.remember_drop(page, segment.drop_record(key, size_bytes, page, checksum))
        return is_news and self._is_gone(key, segment, page)

    def _learn_more(self, key: ObjectKey, segment: Segment, size_bytes: int, place: bytes, *, latest: bool) -> None:
        """Take over an object of a chunk of which something is known."""
        known = self.index.place_of(key)
        if known is None:
            self.segments.enter(segment, pages(size_bytes))
            if latest:
                self.index.put(key, size_bytes, place)
            else:
                self.index.put_oldest(key, size_bytes, place)
        elif known[1] != place:
            self._add_double(key, size_bytes, place)

    def _is_gone(self, key: ObjectKey, segment: Segment, page: int) -> bool:
        """Whether an object is there no more, when a body of it was given up by others."""
        known = self.index.place_of(key)
        if known is None:
            return False
        others = self._doubles.pop(key, [])
        if self.segments.at(known[1])[:2] == (segment, page):
            self.segments.leave(segment, known[0])
            if not others:
                self.index.drop(key, Removal.LOST)
                return True
            self.index.put(key, *others.pop())
        else:
            for other in [each for each in others if self.segments.at(each[1])[:2] == (segment, page)]:
                self.segments.leave(segment, other[0])
                others.remove(other)
        if others:
            self._doubles[key] = others
        return False

    def lose(self, keys: Iterable[ObjectKey], is_lost: Callable[[Segment, int], bool]) -> None:
        """Take out those bodies of these objects that are there no more, by their segment and page."""
        for key in keys:
            known = self.index.place_of(key)
            for _, place in (*self._doubles.get(key, ()), *([known] if known is not None else ())):
                segment, page, _ = self.segments.at(place)
                if is_lost(segment, page):
                    self._is_gone(key, segment, page)

    # Several bodies of one object.

    def _add_double(self, key: ObjectKey, size_bytes: int, place: bytes) -> None:
        others = self._doubles.setdefault(key, [])
        if (size_bytes, place) not in others:
            others.append((size_bytes, place))
            self.segments.enter(self.segments.at(place)[0], pages(size_bytes))

    def doubles(self) -> list[ObjectKey]:
        """The objects that have several bodies."""
        return list(self._doubles)

    def choose(self, keys: Iterable[ObjectKey]) -> list[Hole]:
        """Of several bodies of one object keep the one that all processes keep; what of ours is to be cleared.

        That can be told only when all that was recorded is known: one of them may have been given up long ago. Those
        that others answer for are given up by them: until they say so, they count.
        """
        holes = []
        for key in keys:
            known, others = self.index.place_of(key), self._doubles.get(key)
            if known is None or others is None:
                continue
            best, *rest = sorted([known, *others], key=self._rank)
            if best is not known:
                self.index.put(key, *best)
            ours = [each for each in rest if self.segments.is_ours(self.segments.at(each[1])[0])]
            holes += [self.segments.give_up(key, *each) for each in ours]
            self._doubles[key] = [each for each in rest if each not in ours]
            if not self._doubles[key]:
                del self._doubles[key]
        return holes

    def _rank(self, placed: tuple[int, bytes]) -> tuple[int, int, int]:
        segment, page, _ = self.segments.at(placed[1])
        return segment.writer, segment.number, page

    def _give_up_doubles(self, key: ObjectKey) -> list[Hole]:
        return [self.segments.give_up(key, *other) for other in self._doubles.pop(key, ())]

    # What is stored, and what leaves.

    def put(self, key: ObjectKey, size_bytes: int, segment: Segment, page: int, checksum: int) -> None:
        """Index an object that was recorded at a reserved place."""
        place = segment.place(page, checksum)
        if self.index.place_of(key) is None:
            self.index.put(key, size_bytes, place)
        else:  # another process has stored it meanwhile, or knows that we have: all choose the same one
            self.segments.leave(segment, size_bytes)
            self._add_double(key, size_bytes, place)

    def hole(self, key: ObjectKey, size_bytes: int, segment: Segment, page: int, checksum: int) -> Hole:
        """What is to be cleared where an object that was recorded is not wanted."""
        return self.segments.give_up(key, size_bytes, segment.place(page, checksum))

    def give_up(self, keys: Iterable[ObjectKey], removal: Removal) -> list[Hole]:
        """Take objects out; what is to be cleared."""
        keys = list(keys)
        holes = []
        for key, known in zip(keys, self.index.placed(keys), strict=True):
            if known is not None and self.index.placed([key])[0] is not None:  # a key may come twice
                self.index.drop(key, removal)
                holes.append(self.segments.give_up(key, *known))
                if removal is Removal.DELETED:
                    holes += self._give_up_doubles(key)
                elif others := self._doubles.pop(key, None):  # only this body could not be read
                    self.index.put(key, *others.pop())
                    if others:
                        self._doubles[key] = others
        return holes

    def evict(self, size_bytes: int) -> list[Hole] | None:
        """Take chunks without a pin out to free so many bytes; None, and nothing leaves, if they do not suffice."""
        victims = self.index.victims(size_bytes)
        if victims is None:
            return None
        self.index.remove(victims, Removal.CAPACITY)
        return self.left(victims)

    def left(self, chunks: Iterable[Chunk]) -> list[Hole]:
        """Chunks have left the index; what is to be cleared."""
        holes = []
        for chunk in chunks:
            for which, size, place in placed_of(chunk):
                key = ObjectKey(chunk.chunk_hash, *which)
                holes.append(self.segments.give_up(key, size, place))
                if self._doubles:
                    holes += self._give_up_doubles(key)
        return holes

    def believes(self, key: ObjectKey, body: tuple[int, bytes]) -> bool:
        """Whether this is a body of the object, by all that was heard: it was not given up, by whomever."""
        return self.index.place_of(key) == body or body in self._doubles.get(key, ())

    # All of it.

    def records(self, chunks: Iterable[Chunk]) -> Iterator[bytes]:
        """What an index file of ours is to have: drops, and for each object of these chunks its record, if it is ours.

        Each step looks at what is there at that time.
        """
        yield from self.segments.drops()
        for chunk in chunks:
            origin = self.origins.number_of(chunk.shape.origin)
            for key in keys_of(chunk):
                yield self._put_record(key, origin)

    def _put_record(self, key: ObjectKey, origin: int) -> bytes:
        placed = self.index.place_of(key)
        if placed is None:
            return b""  # it has gone since the step before
        segment, page, checksum = self.segments.at(placed[1])
        return segment.put_record(key, placed[0], page, checksum, origin) if self.segments.is_ours(segment) else b""

    def bodies_in(self, chunk: Chunk) -> Iterator[tuple[str, int, int]]:
        """The bodies of a chunk: segment, first page and end."""
        for which, size, place in placed_of(chunk):
            others = self._doubles.get(ObjectKey(chunk.chunk_hash, *which), ()) if self._doubles else ()
            for each_size, each_place in ((size, place), *others):
                segment, page, _ = self.segments.at(each_place)
                yield segment.name, page, page + pages(each_size)

    def check_integrity(self, being_written: int) -> None:
        """Assert that the totals are those of the objects, beside so many that are being written."""
        self.index.check_integrity()
        doubles = sum(map(len, self._doubles.values()))
        self.segments.check_integrity(self.index.objects + doubles + being_written)
        rooms = sum(chunk.shape.room_bytes for chunk in self.index.chunks())
        assert being_written or doubles or self.segments.pages * PAGE_BYTES == rooms
