"""The shapes of chunks, and the tables that have the places of their objects: chunks that are alike share both."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat

from async_cache.l2.chunks import ROWS, Chunk, Shape, Table, placed_of
from async_cache.prompt.origin import Origin

SHARED_OBJECTS = 16_384  # in the shapes that chunks share: a few megabytes, however many a chunk has
ALIKE_OBJECTS = 128  # of a chunk that shares its shape: each step to it is another shape, which takes as long as it has
LEFT_ALIKE_OBJECTS = 8  # of a chunk that shares its shape after it has lost one: it is made anew, step by step


class Tables:
    """Shapes, of which there is one for all chunks that came by it alike, and rows for the chunks that have them.

    The room of an object is its size, in whole units, or the least that one takes.
    """

    def __init__(self, unit_bytes: int, least_object_bytes: int):
        self._unit_bytes, self._least_object_bytes = unit_bytes, least_object_bytes
        self._empty: dict[Origin | None, Shape] = {}  # by what it is of
        self._numbers: dict[tuple[tuple[int, int], ...], dict[tuple[int, int], int]] = {}  # of shapes, by their objects
        self._shared_objects = 0
        self._roomy: dict[Shape, Table] = {}  # the tables that have room: the first of each shape

    # Shapes.

    def room_bytes(self, size_bytes: int) -> int:
        """What an object of so many bytes takes, in whole units, and the least at least."""
        size_bytes = -(-size_bytes // self._unit_bytes) * self._unit_bytes
        return max(size_bytes, self._least_object_bytes) if size_bytes else 0

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

    def _numbered(self, sizes: Iterable[tuple[int, int]]) -> dict[tuple[int, int], int]:
        """The numbers of these objects, shared by all shapes that have the same."""
        which = tuple(sizes)
        numbers = self._numbers.get(which)
        if numbers is None:
            numbers = self._numbers[which] = {each: number for number, each in enumerate(which)}
        return numbers

    # Chunks.

    def put(self, chunk: Chunk, rank: int, group: int, size_bytes: int, place: bytes) -> None:
        """Have a chunk have one object more, or another size and place of one that it has."""
        shape, which = chunk.table.shape, (rank, group)
        if shape.alone or (len(shape.sizes) >= ALIKE_OBJECTS and shape.sizes.get(which) != size_bytes):
            self._put_alone(self._alone(chunk), which, size_bytes, place)
        else:
            grown = self.grown(shape, rank, group, size_bytes)
            places, begin = chunk.table.places_in(chunk.row), grown.numbers[which] * len(place)
            self._move(chunk, grown, places[:begin] + place + places[begin + len(place) :])

    def drop(self, chunk: Chunk, which: tuple[int, int]) -> None:
        """Have a chunk have an object less, of the several that it has."""
        shape = chunk.table.shape
        if shape.alone or len(shape.sizes) > LEFT_ALIKE_OBJECTS:
            shape = self._alone(chunk).shape
            size_bytes = shape.sizes.pop(which)
            shape.size_bytes -= size_bytes
            shape.room_bytes -= self.room_bytes(size_bytes)
        else:
            self._make_anew(chunk, [placed for placed in placed_of(chunk) if placed[0] != which], shape.origin)

    def adopt(self, chunk: Chunk, origin: Origin) -> None:
        """Have a chunk be of that."""
        if chunk.table.shape.alone:
            chunk.table.shape.origin = origin
        else:
            self._make_anew(chunk, placed_of(chunk), origin)

    def _make_anew(
        self, chunk: Chunk, placed: Sequence[tuple[tuple[int, int], int, bytes]], origin: Origin | None
    ) -> None:
        """Have a chunk share the shape of all that came by these objects in this order."""
        shape = self.nothing(origin)
        for (rank, group), size_bytes, _ in placed:
            shape = self.grown(shape, rank, group, size_bytes)
        self._move(chunk, shape, b"".join(place for _, _, place in placed))

    def _move(self, chunk: Chunk, shape: Shape, places: bytes) -> None:
        table, row = chunk.table, chunk.row
        chunk.table, chunk.row = self.row(shape, places)
        self.give_back(table, row)

    def _alone(self, chunk: Chunk) -> Table:
        """The table of a chunk that is alone from now on."""
        table, row, shape = chunk.table, chunk.row, chunk.table.shape
        if not shape.alone:
            alone = Shape(
                dict(shape.sizes), dict(shape.numbers), shape.size_bytes, shape.room_bytes, {}, shape.origin, alone=True
            )
            chunk.table, chunk.row = Table(alone, table.width, bytearray(table.places_in(row)), 1), 0
            self.give_back(table, row)
        return chunk.table

    def _put_alone(self, table: Table, which: tuple[int, int], size_bytes: int, place: bytes) -> None:
        shape = table.shape
        before_bytes = shape.sizes.get(which, 0)
        begin = shape.numbers.setdefault(which, len(shape.numbers)) * len(place)
        table.places[begin : begin + len(place)] = place
        table.width = len(table.places)
        shape.sizes[which] = size_bytes
        shape.size_bytes += size_bytes - before_bytes
        shape.room_bytes += self.room_bytes(size_bytes) - self.room_bytes(before_bytes)

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
