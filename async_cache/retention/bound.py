"""What one quota bounds: bytes, and the chunks of an owner in the order in which they leave for one another."""

from collections.abc import Iterator

from msgspec import Struct

from async_cache.retention.ring import Ring


class Place(Struct, gc=False, eq=False):
    """The place of a chunk in the order in which an owner's chunks leave for one another."""

    chunk_hash: bytes
    older: "Place | None" = None
    newer: "Place | None" = None


class Bound:
    """What one quota bounds: bytes that are there or reserved, and the chunks, the least recently used first."""

    __slots__ = ("_places", "_ring", "model", "most_bytes", "salt", "used_bytes")

    def __init__(self, salt: str, model: str | None, most_bytes: int, used_bytes: int = 0):
        self.salt, self.model, self.most_bytes = salt, model, most_bytes
        self.used_bytes = used_bytes
        self._ring: Ring[Place] = Ring()
        self._places: dict[bytes, Place] = {}

    def __iter__(self) -> Iterator[bytes]:
        """The chunks, in the order in which they should leave."""
        return (place.chunk_hash for place in self._ring)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, chunk_hash: bytes) -> bool:
        return chunk_hash in self._places

    def enter(self, chunk_hash: bytes, parent: bytes | None, *, is_oldest: bool = False) -> None:
        """A chunk came: it leaves before the one that it builds on, or before all others."""
        place = self._places[chunk_hash] = Place(chunk_hash)
        before = self._places.get(parent) if parent is not None else None
        self._ring.use(place, self._ring.oldest() if is_oldest else before)

    def use(self, chunk_hash: bytes) -> None:
        """A chunk was used just now."""
        place = self._places.get(chunk_hash)
        if place is not None:
            self._ring.use(place)

    def left(self, chunk_hash: bytes) -> None:
        """A chunk has gone."""
        place = self._places.pop(chunk_hash, None)
        if place is not None:
            self._ring.discard(place)
