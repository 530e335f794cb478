"""The shapes of chunks, and the tables that have the places of their objects: chunks that are alike share both."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

from async_cache.l2.chunks import ROWS, Shape, Table
from async_cache.prompt.origin import Origin

SHARED_OBJECTS = 16_384  # in the shapes that chunks share: a few megabytes, however many a chunk has
ALIKE_OBJECTS = 64  # of a chunk whose shape is shared after it has lost one: each step to it is another shape


class Tables:
    """Shapes, of which there is one for all chunks that came by it alike, and rows for the chunks that have them.

    The room of an object is its size, in whole units.
    """

    def __init__(self, unit_bytes: int):
        self._unit_bytes = unit_bytes
        self._empty: dict[Origin | None, Shape] = {}  # by what it is of
        self._numbers: dict[tuple[tuple[int, int], ...], dict[tuple[int, int], int]] = {}  # of shapes, by their objects
        self._shared_objects = 0
        self._roomy: dict[Shape, Table] = {}  # the tables that have room: the first of each shape

    # Shapes.

    def room_bytes(self, size_bytes: int) -> int:
        """What an object of so many bytes takes, in whole units."""
        return -(-size_bytes // self._unit_bytes) * self._unit_bytes

    def nothing(self, origin: Origin | None) -> Shape:
        """The shape of a chunk that has nothing yet."""
        shape = self._empty.get(origin)
        if shape is None:
            shape = self._empty[origin] = Shape({}, {}, 0, 0, {}, origin)
        return shape

    def grown(self, shape: Shape, rank: int, group: int, size_bytes: int) -> Shape:
        """The shape with one object more, or with another size of one."""
        grown = shape.grown.get((rank, group, size_bytes))
        return grown if grown is not None else self._grow(shape, rank, group, size_bytes)

    def _grow(self, shape: Shape, rank: int, group: int, size_bytes: int) -> Shape:
        """Make the shape with one object more, or with another size of one."""
        which = rank, group
        sizes = {**shape.sizes, which: size_bytes}
        numbers = self._numbered(sizes)
        before_bytes = shape.sizes.get(which, 0)
        whole_bytes = shape.size_bytes + size_bytes - before_bytes
        room_bytes = shape.room_bytes + self.room_bytes(size_bytes) - self.room_bytes(before_bytes)
        grown = shape.grown[rank, group, size_bytes] = Shape(sizes, numbers, whole_bytes, room_bytes, {}, shape.origin)
        self._shared_objects += len(sizes)
        if self._shared_objects > SHARED_OBJECTS:
            self._empty.clear()  # costs nothing but that equal ones exist twice
            self._numbers.clear()
            self._roomy.clear()
            self._shared_objects = 0
        return grown

    def without(self, shape: Shape, dropped: tuple[int, int]) -> Shape:
        """The shape with one object less."""
        sizes = {which: size for which, size in shape.sizes.items() if which != dropped}
        if len(sizes) <= ALIKE_OBJECTS:
            without = self.nothing(shape.origin)
            for (rank, group), size in sizes.items():
                without = self.grown(without, rank, group, size)
            return without
        size = shape.sizes[dropped]
        room_bytes = shape.room_bytes - self.room_bytes(size)
        numbers = {which: number for number, which in enumerate(sizes)}
        return Shape(sizes, numbers, shape.size_bytes - size, room_bytes, {}, shape.origin)

    def _numbered(self, sizes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
        """The numbers of these objects, shared by all shapes that have the same."""
        which = tuple(sizes)
        numbers = self._numbers.get(which)
        if numbers is None:
            numbers = self._numbers[which] = {each: number for number, each in enumerate(which)}
        return numbers

    # Rows.

    def row(self, shape: Shape, places: bytes) -> tuple[Table, int]:
        """A row for a chunk of this shape, whose objects lie at these places."""
        table = self._roomy.get(shape)
        if table is None:
            table = self._roomy[shape] = Table(shape, len(places), bytearray())
        row = table.enter(places)
        if table.rows == ROWS and not table.free:
            self._is_roomy_no_more(table)
        return table, row

    def rows(self, shape: Shape, places: Sequence[bytes]) -> Iterator[tuple[Table, int]]:
        """A row for each of several chunks of this shape, whose objects lie at these places."""
        at = 0
        while at < len(places):
            table = self._roomy.get(shape)
            if table is None or table.free:
                yield self.row(shape, places[at])
                at += 1
            else:
                rows = table.enter_all(places[at:])
                at += len(rows)
                if table.rows == ROWS:
                    self._is_roomy_no_more(table)
                yield from zip(repeat(table), rows, strict=False)

    def give_back(self, table: Table, row: int) -> None:
        """A row is free."""
        was_full = table.rows == ROWS and not table.free
        table.leave(row)
        if was_full:
            table.next = self._roomy.get(table.shape)
            self._roomy[table.shape] = table
        elif not table.rows and self._roomy.get(table.shape) is table:
            self._is_roomy_no_more(table)

    def _is_roomy_no_more(self, table: Table) -> None:
        """The first table of its shape is full, or empty."""
        if table.next is None:
            del self._roomy[table.shape]
        else:
            self._roomy[table.shape], table.next = table.next, None
