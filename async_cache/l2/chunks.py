"""What an index holds of a chunk: its hash, what it has of objects, and where these lie.

A million of them are to take little memory. Chunks that have the same share a shape, and 256 of these a table with
their places: a record for each of them would take half as much again.
"""

from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from async_cache.prompt.keys import ObjectKey
from async_cache.prompt.origin import Origin

ROWS = 256  # of a table: CPython has the integers up to that once and for all
_SURE_ROWS = 16  # from which on a table has the memory of all its rows


class Shape(Struct, gc=False, eq=False):
    """What a chunk has: the size of each of its objects, by (rank, group). All chunks that came by it alike share it.

    It never changes: a chunk that gets an object more gets the shape that `grown` has for that. `numbers` counts the
    objects, in the order of their places. `origin` is what the chunk is of, where that is known.

    A shape that is `alone` belongs to one chunk, has a table of its own, and changes with it. An object that it loses
    keeps its number and its place.
    """

    sizes: dict[tuple[int, int], int]
    numbers: dict[tuple[int, int], int]
    size_bytes: int
    room_bytes: int
    grown: dict[tuple[int, int, int], "Shape"]  # by the rank, the group and the size of what is added
    origin: Origin | None = None
    alone: bool = False


class Table(Struct, gc=False, eq=False):
    """Chunks of one shape: a row for each, `width` bytes, with the places of its objects one behind the other.

    These are all of one length; what they mean is the backend's. `free` are the rows that were given back, and `next`
    is another table of the shape that has room.
    """

    shape: Shape
    width: int
    places: bytearray
    rows: int = 0
    free: bytearray | None = None
    next: "Table | None" = None

    def enter(self, places: bytes) -> int:
        """The row of one more chunk, for which there is room, whose objects lie at these places."""
        if not self.free:
            return self.enter_all((places,))[0]
        row = self.free.pop()
        self.places[row * self.width : row * self.width + self.width] = places
        return row

    def enter_all(self, places: Sequence[bytes]) -> range:
        """New rows for as many more chunks as there is room for."""
        begin, self.rows = self.rows, min(ROWS, self.rows + len(places))
        if begin < _SURE_ROWS <= self.rows:
            self.places.extend(bytes(ROWS * self.width - len(self.places)))
        entered = range(begin, self.rows)
        self.places[begin * self.width : self.rows * self.width] = b"".join(places[: len(entered)])
        return entered

    def leave(self, row: int) -> None:
        """A chunk has gone."""
        if self.free is None:
            self.free = bytearray()
        self.free.append(row)
        if len(self.free) == self.rows:
            self.places, self.rows, self.free = bytearray(), 0, None

    def places_in(self, row: int) -> bytes:
        """The places of the objects of one chunk; nothing if they have none."""
        return bytes(self.places[row * self.width : row * self.width + self.width])


class Chunk(Struct, gc=False, eq=False):
    """A chunk of which something is stored: a row of a table. The links and the node are for the policy."""

    chunk_hash: bytes
    table: Table
    row: int
    older: "Chunk | None" = None
    newer: "Chunk | None" = None
    node: Any = None

    @property
    def shape(self) -> Shape:
        """What it has."""
        return self.table.shape


def placed_of(chunk: Chunk) -> list[tuple[tuple[int, int], int, bytes]]:
    """The objects of a chunk: (rank, group), size in bytes and place of each."""
    shape, places = chunk.table.shape, chunk.table.places_in(chunk.row)
    numbers = shape.numbers
    width = len(places) // len(numbers)
    return [
        (which, size, places[(begin := numbers[which] * width) : begin + width]) for which, size in shape.sizes.items()
    ]


def keys_of(chunk: Chunk) -> list[ObjectKey]:
    """The objects of a chunk, also of one that has left."""
    return [ObjectKey(chunk.chunk_hash, *which) for which in chunk.table.shape.sizes]
