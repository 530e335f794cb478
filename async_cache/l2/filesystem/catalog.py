"""What is known of a directory: the objects, and the segments that they lie in. Each call is one step of the loop.

Records come from several index files and in any order: a place of which a DROP was read once is never believed again.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from struct import Struct as Packed

from msgspec import Struct

from async_cache.l2.filesystem.directory import Hole
from async_cache.l2.filesystem.format import PAGE_BYTES, Kind, Record, pages, record, segment_name
from async_cache.l2.filesystem.journal import Journal
from async_cache.l2.index import Chunk, Index, placed_of
from async_cache.prompt.keys import ObjectKey
from async_cache.retention.policy import EvictionPolicy
from async_cache.values import Removal

_PUT, _DROP = int(Kind.PUT), int(Kind.DROP)  # by name it would cost a tenth of a microsecond for each

PLACE = Packed("<IIQ")
"""A place in the index: the number of the segment here, the page, and the checksum of the body."""


class Segment(Struct, eq=False, gc=False):
    """A segment: how many objects it has, written or being written, and which of its pages were given up."""

    here: int
    name: str
    writer: int
    number: int
    owner: Journal | None = None
    end: int = 0
    pages: int = 0
    objects: int = 0
    dropped: bytearray | None = None  # a bit for each page
    told_by: list[str] = []  # the index files that have a PUT of one of its objects
    foreign_drops: dict[int, bytes] | None = None  # records of ours about objects that other index files tell of

    def is_dropped(self, page: int) -> bool:
        """Whether the object that begins at this page was given up."""
        dropped = self.dropped
        return dropped is not None and page >> 3 < len(dropped) and bool(dropped[page >> 3] >> (page & 7) & 1)

    def drop(self, page: int) -> None:
        """Never believe again that an object begins at this page."""
        if self.dropped is None:
            self.dropped = bytearray()
        if page >> 3 >= len(self.dropped):
            self.dropped.extend(bytes((page >> 3) + 1 - len(self.dropped)))
        self.dropped[page >> 3] |= 1 << (page & 7)


class Catalog:
    """The index of the objects, whose places name segments, and the segments."""

    def __init__(self, policy: EvictionPolicy[Chunk] | None, on_removed: Callable[[bytes, Removal], None]):
        self.index = Index(policy, on_removed, unit_bytes=PAGE_BYTES)
        self._current: Segment | None = None  # what is being written to
        self._next = 0
        self._by_name: dict[tuple[int, int], Segment] = {}
        self._here: dict[int, Segment] = {}
        self._count = 0
        self._doubles: dict[ObjectKey, list[tuple[int, bytes]]] = {}  # other bodies of objects: size and place
        self.pages = 0  # of all that is there, or is being written
        self._emptied: list[Segment] = []
        self.writers: set[int] = set()  # that we are, or answer for

    def segment(self, writer: int, number: int) -> Segment:
        """A segment, known or not."""
        segment = self._by_name.get((writer, number))
        if segment is None:
            segment = Segment(self._count, segment_name(writer, number), writer, number)
            self._by_name[writer, number] = self._here[self._count] = segment
            self._count += 1
        return segment

    def place(self, place: bytes) -> tuple[str, int, int]:
        """The segment, the page and the checksum that a place of the index says."""
        here, page, checksum = PLACE.unpack(place)
        return self._here[here].name, page, checksum

    def names(self) -> dict[str, int]:
        """All segments that were ever heard of, and how many objects each has."""
        return {segment.name: segment.objects for segment in self._by_name.values()}

    def forget(self) -> None:
        """Forget the segments: those of another directory come. The index is empty by then."""
        self._by_name.clear()
        self._here.clear()
        self._emptied.clear()
        self._doubles.clear()
        self._current = None
        self._next = 0
        self.pages = 0

    def left_by_the_dead(self, writer: int) -> dict[str, tuple[int, int]]:
        """The segments that are ours and were not begun by this writer: their ends, and how many pages they use."""
        return {
            each.name: (each.end, each.pages)
            for each in self._by_name.values()
            if each.objects and each.writer != writer and self._is_ours(each)
        }

    # What is read.

    def learn(self, journal: Journal, records: Iterable[Record], *, latest: bool) -> list[ObjectKey]:
        """Take over records, as of the latest use or of the oldest. Returns the objects that are there no more."""
        gone: list[ObjectKey] = []
        index, segment = self.index, None
        for kind, rank, group, number, writer, page, size_bytes, chunk_hash, checksum, _ in records:
            if segment is None or segment.number != number or segment.writer != writer:
                segment = self.segment(writer, number)
            key = ObjectKey(chunk_hash, rank, group)
            if kind == _PUT:
                if journal.owned or segment.owner is None or not segment.owner.owned:
                    segment.owner = journal  # what one of ours tells of is ours, whoever else tells of it
                if journal.name not in segment.told_by:
                    segment.told_by.append(journal.name)
                end = page + pages(size_bytes)
                if segment.end < end:
                    segment.end = end
                if segment.dropped is None or not segment.is_dropped(page):
                    place = PLACE.pack(segment.here, page, checksum)
                    known = index.place_of(key)
                    if known is None:
                        self._add(segment, size_bytes)
                        if latest:
                            index.put(key, size_bytes, place)
                        else:
                            index.put_oldest(key, size_bytes, place)
                    elif known[1] != place:
                        self._add_double(key, size_bytes, place)
            elif kind == _DROP:
                if not segment.is_dropped(page):
                    segment.drop(page)
                    if self._is_gone(key, segment, page):
                        gone.append(key)
                if journal.owned and segment.writer != journal.writer:  # what tells of the object may outlive this file
                    self._remember_drop(segment, page, self._drop_record(key, segment, page, size_bytes, checksum))
        return gone

    def _is_gone(self, key: ObjectKey, segment: Segment, page: int) -> bool:
        """Whether an object is there no more, when a body of it was given up by others."""
        known = self.index.place_of(key)
        if known is None:
            return False
        where = segment.here, page
        others = self._doubles.pop(key, [])
        if PLACE.unpack(known[1])[:2] == where:
            self._leave(segment, known[0])
            if not others:
                self.index.drop(key, Removal.LOST)
                return True
            self.index.put(key, *others.pop())
        else:
            for other in [other for other in others if PLACE.unpack(other[1])[:2] == where]:
                self._leave(segment, other[0])
                others.remove(other)
        if others:
            self._doubles[key] = others
        return False

    def _add_double(self, key: ObjectKey, size_bytes: int, place: bytes) -> None:
        others = self._doubles.setdefault(key, [])
        if (size_bytes, place) not in others:
            others.append((size_bytes, place))
            self._add(self._here[PLACE.unpack(place)[0]], size_bytes)

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
            ours = [each for each in rest if self._is_ours(self._here[PLACE.unpack(each[1])[0]])]
            holes += [self._give_up(key, *each) for each in ours]
            self._doubles[key] = [each for each in rest if each not in ours]
            if not self._doubles[key]:
                del self._doubles[key]
        return holes

    def _rank(self, placed: tuple[int, bytes]) -> tuple[int, int, int]:
        here, page, _ = PLACE.unpack(placed[1])
        return self._here[here].writer, self._here[here].number, page

    # What is written.

    def reserve(self, writer: int, size_bytes: int, segment_bytes: int, journal: Journal) -> tuple[Segment, int]:
        """The next place: behind what was written last, or in a new segment where that would become too long.

        `segment_bytes` 0 is for a new segment, however short the last one is.
        """
        count = pages(size_bytes)
        segment = self._current
        if segment is None or (segment.end + count) * PAGE_BYTES > segment_bytes:
            if segment is not None:
                self.turn_from(segment)
            segment = self._current = self.segment(writer, self._next)
            segment.owner = journal
            self._next += 1
        page = segment.end
        segment.end += count
        self._add(segment, size_bytes)
        return segment, page

    def turn_from(self, segment: Segment) -> None:
        """Write to another segment from now on."""
        if segment is self._current:
            self._current = None
            if not segment.objects:
                self._emptied.append(segment)

    def written(self, key: ObjectKey, size_bytes: int, segment: Segment, page: int, checksum: int) -> bytes:
        """The record of an object that lies at a reserved place."""
        return record(Kind.PUT, key, (segment.writer, segment.number, page), size_bytes, checksum)

    def put(self, key: ObjectKey, size_bytes: int, segment: Segment, page: int, checksum: int) -> None:
        """Index an object that was recorded at a reserved place."""
        place = PLACE.pack(segment.here, page, checksum)
        if self.index.place_of(key) is None:
            self.index.put(key, size_bytes, place)
        else:  # another process has stored it meanwhile, or knows that we have: all choose the same one
            self._leave(segment, size_bytes)
            self._add_double(key, size_bytes, place)

    def unreserve(self, size_bytes: int, segment: Segment) -> None:
        """A reserved place is not used."""
        self._leave(segment, size_bytes)

    # What leaves.

    def give_up(self, keys: Iterable[ObjectKey], removal: Removal) -> list[Hole]:
        """Take objects out; what is to be cleared."""
        keys = list(keys)
        holes = []
        for key, known in zip(keys, self.index.placed(keys), strict=True):
            if known is not None and self.index.placed([key])[0] is not None:  # a key may come twice
                self.index.drop(key, removal)
                holes.append(self._give_up(key, *known))
                if removal is Removal.DELETED:
                    holes += self._give_up_doubles(key)
                elif others := self._doubles.pop(key, None):  # only this body could not be read
                    self.index.put(key, *others.pop())
                    if others:
                        self._doubles[key] = others
        return holes

    def _give_up_doubles(self, key: ObjectKey) -> list[Hole]:
        return [self._give_up(key, *other) for other in self._doubles.pop(key, ())]

    def evict(self, size_bytes: int) -> list[Hole] | None:
        """Take chunks without a pin out to free so many bytes; None, and nothing leaves, if they do not suffice."""
        victims = self.index.victims(size_bytes)
        if victims is None:
            return None
        objects = [
            (ObjectKey(chunk.chunk_hash, *which), size, place)
            for chunk in victims
            for which, size, place in placed_of(chunk)
        ]
        self.index.remove(victims, Removal.CAPACITY)
        holes = [self._give_up(*each) for each in objects]
        if self._doubles:
            for key, _, _ in objects:
                holes += self._give_up_doubles(key)
        return holes

    def hole(self, key: ObjectKey, size_bytes: int, segment: Segment, page: int, checksum: int) -> Hole:
        """What is to be cleared where an object that was recorded is not wanted."""
        return self._give_up(key, size_bytes, PLACE.pack(segment.here, page, checksum))

    def _give_up(self, key: ObjectKey, size_bytes: int, place: bytes) -> Hole:
        here, page, checksum = PLACE.unpack(place)
        segment = self._here[here]
        segment.drop(page)
        self._leave(segment, size_bytes)
        data = self._drop_record(key, segment, page, size_bytes, checksum)
        if segment.told_by:
            self._remember_drop(segment, page, data)
        return Hole(segment.name, page, page + pages(size_bytes), data)

    @staticmethod
    def _drop_record(key: ObjectKey, segment: Segment, page: int, size_bytes: int, checksum: int) -> bytes:
        return record(Kind.DROP, key, (segment.writer, segment.number, page), size_bytes, checksum)

    @staticmethod
    def _remember_drop(segment: Segment, page: int, data: bytes) -> None:
        if segment.foreign_drops is None:
            segment.foreign_drops = {}
        segment.foreign_drops[page] = data

    def emptied(self) -> list[str]:
        """Segments of ours that have nothing any more, to be removed. They are forgotten."""
        names = []
        for segment in self._emptied:
            if not segment.objects and segment is not self._current and self._is_ours(segment):
                names.append(segment.name)
        self._emptied.clear()
        return names

    def is_dropped(self, place: bytes) -> bool:
        """Whether the object of this place was given up, by whomever."""
        here, page, _ = PLACE.unpack(place)
        segment = self._here.get(here)
        return segment is None or segment.is_dropped(page)

    # All of it.

    def forget_drops(self, existing: Collection[str]) -> bool:
        """Forget those drops of ours that nobody needs to be told of any more; whether there are others.

        They are needed as long as there is an index file with a PUT, besides our own: `existing` are the files of the
        directory, of which all that was recorded is known.
        """
        left = False
        for segment in self._by_name.values():
            if segment.told_by:
                segment.told_by = [name for name in segment.told_by if name in existing]
            if segment.foreign_drops:
                if segment.told_by:
                    left = True
                else:
                    segment.foreign_drops = None
        return left

    def records(self, chunks: Iterable[Chunk]) -> Iterator[bytes]:
        """What an index file of ours is to have: those objects of these chunks that we answer for, and drops.

        Each step looks at what is there at that time.
        """
        for segment in list(self._by_name.values()):
            if segment.foreign_drops:
                yield b"".join(segment.foreign_drops.values())
        for chunk in chunks:
            data = b""
            for which, size, place in placed_of(chunk):
                here, page, checksum = PLACE.unpack(place)
                segment = self._here[here]
                if self._is_ours(segment):
                    data += self.written(ObjectKey(chunk.chunk_hash, *which), size, segment, page, checksum)
            yield data

    def bodies_in(self, chunk: Chunk) -> Iterator[tuple[str, int, int]]:
        """The bodies of a chunk: segment, first page and end."""
        for _, size, place in placed_of(chunk):
            name, page, _ = self.place(place)
            yield name, page, page + pages(size)

    def count_owned(self) -> int:
        """How many objects we answer for."""
        return sum(segment.objects for segment in self._by_name.values() if self._is_ours(segment))

    def _add(self, segment: Segment, size_bytes: int) -> None:
        count = pages(size_bytes)
        segment.objects += 1
        segment.pages += count
        self.pages += count

    def _leave(self, segment: Segment, size_bytes: int) -> None:
        count = pages(size_bytes)
        segment.objects -= 1
        segment.pages -= count
        self.pages -= count
        if not segment.objects:
            self._emptied.append(segment)
            if segment is self._current:
                self._current = None

    def _is_ours(self, segment: Segment) -> bool:
        owner = segment.owner
        return (owner.owned and owner.known) if owner is not None else segment.writer in self.writers

    def check_integrity(self, being_written: int) -> None:
        """Assert that the totals are those of the objects, beside so many that are being written."""
        self.index.check_integrity()
        segments = self._by_name.values()
        doubles = sum(map(len, self._doubles.values()))
        assert sum(segment.objects for segment in segments) == self.index.objects + doubles + being_written
        assert sum(segment.pages for segment in segments) == self.pages
        rooms = sum(chunk.shape.room_bytes for chunk in self.index.chunks())
        assert being_written or doubles or self.pages * PAGE_BYTES == rooms
