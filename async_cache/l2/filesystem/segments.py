"""What is known of the segments of a directory: what they hold, who answers for them, what was given up of them.

Each call is one step of the loop.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from struct import Struct as Packed

from msgspec import Struct

from async_cache.l2.filesystem.clearing import Hole
from async_cache.l2.filesystem.format import MOST_PAGES, PAGE_BYTES, Kind, pages, record, segment_name
from async_cache.l2.filesystem.journal import Journal
from async_cache.prompt.keys import ObjectKey

PLACE = Packed("<HIQ")
"""A place in the index: the number of the segment here, whose upper bits are before those of the page, the page, and
the checksum of the body."""
_PAGE_BITS = MOST_PAGES.bit_length() - 1
_MOST_SEGMENTS = 2 ** (48 - _PAGE_BITS)  # at a time


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
    is_set_aside: bool = False
    dropped: bytearray | None = None  # a bit for each page
    told: dict[str, bytearray] = {}  # the index files that have a PUT of one of its objects: a bit for each page
    foreign_drops: dict[int, bytes] | None = None  # records of ours about objects that other index files tell of

    @property
    def place_begin(self) -> tuple[int, int]:
        """What its places begin with; the page is added to the second one."""
        return self.here & 0xFFFF, self.here >> 16 << _PAGE_BITS

    def place(self, page: int, checksum: int) -> bytes:
        """The place of a body that begins at this page."""
        first, second = self.place_begin
        return PLACE.pack(first, second | page, checksum)

    def is_dropped(self, page: int) -> bool:
        """Whether the object that begins at this page was given up."""
        dropped = self.dropped
        return dropped is not None and page >> 3 < len(dropped) and bool(dropped[page >> 3] >> (page & 7) & 1)

    def drop(self, page: int) -> None:
        """Never believe again that an object begins at this page."""
        if self.dropped is None:
            self.dropped = bytearray()
        set_bits(self.dropped, (page,))

    def told_by(self, journal: Journal) -> bytearray:
        """The pages of which this index file has a PUT, to be added to."""
        if journal.owned or self.owner is None or not self.owner.owned:
            self.owner = journal  # what one of ours tells of is ours, whoever else tells of it
        return self.told.setdefault(journal.name, bytearray())

    def told_only_by(self, name: str) -> Iterator[int]:
        """The pages of which no other index file has a PUT, and none a DROP. It is told by this one no more."""
        left = int.from_bytes(self.told.pop(name, b""), "little")
        for bits in (*self.told.values(), self.dropped or b""):
            left &= ~int.from_bytes(bits, "little")
        for at, bits_of_byte in enumerate(left.to_bytes(-(-left.bit_length() // 8), "little")):
            if bits_of_byte:
                yield from (8 * at + bit for bit in range(8) if bits_of_byte >> bit & 1)

    def put_record(self, key: ObjectKey, size_bytes: int, page: int, checksum: int, origin: int) -> bytes:
        """The record of an object that lies at this page, and whose chunk is of what this number stands for."""
        return record(Kind.PUT, key, (self.writer, self.number, page), size_bytes, checksum, origin)

    def drop_record(self, key: ObjectKey, size_bytes: int, page: int, checksum: int) -> bytes:
        """The record of an object that lies at this page no more."""
        return record(Kind.DROP, key, (self.writer, self.number, page), size_bytes, checksum)

    def remember_drop(self, page: int, data: bytes) -> None:
        """Tell those of it who hear of the object from another index file than ours."""
        if self.foreign_drops is None:
            self.foreign_drops = {}
        self.foreign_drops[page] = data


def set_bits(bits: bytearray, numbers: Sequence[int]) -> None:
    """Set bits of a set that grows with its largest number."""
    end = (max(numbers) >> 3) + 1
    if end > len(bits):
        bits.extend(bytes(end - len(bits)))
    for number in numbers:
        bits[number >> 3] |= 1 << (number & 7)


class Segments:
    """All segments that were ever heard of. `pages` is the sum of those that are used, or are being written."""

    def __init__(self) -> None:
        self.pages = 0
        self.writers: set[int] = set()  # that we are, or answer for
        self._current: Segment | None = None  # what is being written to
        self._next = 0
        self._by_name: dict[tuple[int, int], Segment] = {}
        self._here: dict[int, Segment] = {}
        self._next_here = 0
        self._emptied: list[Segment] = []

    def get(self, writer: int, number: int) -> Segment:
        """A segment, known or not."""
        segment = self._by_name.get((writer, number))
        if segment is None:
            while self._next_here in self._here:
                self._next_here = (self._next_here + 1) % _MOST_SEGMENTS
            segment = Segment(self._next_here, segment_name(writer, number), writer, number)
            self._by_name[writer, number] = self._here[self._next_here] = segment
            self._next_here = (self._next_here + 1) % _MOST_SEGMENTS  # none of the last is used anew
        return segment

    def at(self, place: bytes) -> tuple[Segment, int, int]:
        """The segment, the page and the checksum that a place of the index says."""
        first, second, checksum = PLACE.unpack(place)
        return self._here[first | second >> _PAGE_BITS << 16], second & (MOST_PAGES - 1), checksum

    def reserve(self, writer: int, size_bytes: int, segment_bytes: int, journal: Journal) -> tuple[Segment, int]:
        """The next place: behind what was written last, or in a new segment where that would become too long.

        `segment_bytes` 0 is for a new segment, however short the last one is.
        """
        count = pages(size_bytes)
        segment = self._current
        if segment is None or (segment.end + count) * PAGE_BYTES > segment_bytes:
            if segment is not None:
                self.turn_from(segment)
            segment = self._current = self.get(writer, self._next)
            segment.owner = journal
            self._next += 1
        page = segment.end
        segment.end += count
        self.enter(segment, count)
        return segment, page

    def turn_from(self, segment: Segment) -> None:
        """Write to another segment from now on."""
        if segment is self._current:
            self._current = None
            if not segment.objects:
                self._emptied.append(segment)

    def set_aside(self, segment: Segment) -> None:
        """Write to it no more, and never remove it."""
        segment.is_set_aside = True
        self.turn_from(segment)

    def enter(self, segment: Segment, count: int, objects: int = 1) -> None:
        """It has so many objects more, of so many pages each, or will have them."""
        segment.objects += objects
        segment.pages += objects * count
        self.pages += objects * count

    def leave(self, segment: Segment, size_bytes: int) -> None:
        """It has an object less."""
        count = pages(size_bytes)
        segment.objects -= 1
        segment.pages -= count
        self.pages -= count
        if not segment.objects:
            self._emptied.append(segment)
            if segment is self._current:
                self._current = None

    def give_up(self, key: ObjectKey, size_bytes: int, place: bytes) -> Hole:
        """It has an object less, and never again one there; what is to be cleared."""
        segment, page, checksum = self.at(place)
        segment.drop(page)
        self.leave(segment, size_bytes)
        data = segment.drop_record(key, size_bytes, page, checksum)
        if segment.told:
            segment.remember_drop(page, data)
        is_last = not (segment.objects or segment.is_set_aside)
        return Hole(segment.name, page, page + pages(size_bytes), data, is_last)

    def emptied(self) -> list[str]:
        """Segments of ours that have nothing any more, and that were not told before: they are to be removed."""
        names = []
        for segment in self._emptied:
            is_empty = not (segment.objects or segment.is_set_aside or segment is self._current)
            if is_empty and self.is_ours(segment):
                names.append(segment.name)
                self._forget(segment)
        self._emptied.clear()
        return names

    def _forget(self, segment: Segment) -> None:
        """Forget a segment of which nobody tells any more."""
        if not (segment.objects or segment.told or segment.foreign_drops or segment is self._current):
            self._by_name.pop((segment.writer, segment.number), None)
            self._here.pop(segment.here, None)

    def is_ours(self, segment: Segment) -> bool:
        """Whether we answer for a segment."""
        owner = segment.owner
        return (owner.owned and owner.known) if owner is not None else segment.writer in self.writers

    def count_owned(self) -> int:
        """How many objects we answer for."""
        return sum(segment.objects for segment in self._here.values() if self.is_ours(segment))

    def names(self) -> dict[str, int]:
        """All segments, and how many objects each has."""
        return {segment.name: segment.objects for segment in self._here.values()}

    def left_by_the_dead(self, writer: int) -> dict[str, tuple[int, int]]:
        """The segments that are ours and were not begun by this writer: their ends, and how many pages they use."""
        return {
            each.name: (each.end, each.pages)
            for each in self._here.values()
            if each.objects and each.writer != writer and self.is_ours(each)
        }

    def drops(self) -> Iterator[bytes]:
        """The records of drops that an index file of ours is to have."""
        for segment in list(self._here.values()):
            if segment.foreign_drops:
                yield b"".join(segment.foreign_drops.values())

    def all(self) -> list[Segment]:
        """All that are known."""
        return list(self._here.values())

    def forget_drops(self, segments: Iterable[Segment], existing: Collection[str]) -> bool:
        """Forget those drops of ours in these segments that nobody needs to be told of; whether there are others.

        They are needed as long as there is an index file with a PUT, besides our own: `existing` are the files of the
        directory, of which all that was recorded is known.
        """
        left = False
        for segment in segments:
            segment.told = {name: pages for name, pages in segment.told.items() if name in existing}
            self._told_less(segment)
            left |= segment.foreign_drops is not None
        return left

    def told_only_by(self, segments: Iterable[Segment], name: str) -> set[tuple[int, int]]:
        """The places, (segment here, page), of others' objects of which no index file but this one tells.

        It is there no more, and tells of nothing from now on.
        """
        places: set[tuple[int, int]] = set()
        for segment in segments:
            if name in segment.told:
                pages = list(segment.told_only_by(name))
                if not self.is_ours(segment):
                    places.update((segment.here, page) for page in pages)
                self._told_less(segment)
        return places

    def _told_less(self, segment: Segment) -> None:
        if not segment.told:
            segment.foreign_drops = None
            self._forget(segment)

    def check_integrity(self, objects: int) -> None:
        """Assert that the totals are those of so many objects."""
        assert sum(segment.objects for segment in self._here.values()) == objects
        assert sum(segment.pages for segment in self._here.values()) == self.pages
