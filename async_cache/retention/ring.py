"""The order of use, as a ring through the things themselves.

Every operation is a few assignments, and two links are all the memory that it takes. What the garbage collector does
not know must be discarded, to be freed.
"""

from collections.abc import Iterator
from typing import Generic, Protocol, Self, TypeVar

from msgspec import Struct


class Linked(Protocol):
    """What can be in a ring, in one at a time."""

    older: Self | None
    newer: Self | None


class _End(Struct, gc=False, eq=False):
    """Between the most and the least recently used."""

    older: "_End | None" = None
    newer: "_End | None" = None


T = TypeVar("T", bound=Linked)


class Ring(Generic[T]):
    """The least recently used comes first."""

    def __init__(self) -> None:
        self._end: T = _End()  # type: ignore[assignment]  # it is never handed out
        self._end.older = self._end.newer = self._end

    def use(self, item: T, before: T | None = None) -> None:
        """It was used just now, unless it is to go right before another one. It may be in the ring or not."""
        if item.newer is not None:
            self.discard(item)
        newer = before if before is not None and before.newer is not None else self._end
        older = newer.older
        assert older is not None
        item.older, item.newer = older, newer
        older.newer = newer.older = item

    def discard(self, item: T) -> None:
        """Take it out, if it is in the ring."""
        older, newer = item.older, item.newer
        if older is not None and newer is not None:
            older.newer, newer.older = newer, older
            item.older = item.newer = None

    def oldest(self) -> T | None:
        """The least recently used."""
        return next(iter(self), None)

    def __iter__(self) -> Iterator[T]:
        """In the order of use. The last one that came may be discarded meanwhile."""
        item = self._end.newer
        while item is not self._end:
            assert item is not None
            newer = item.newer
            yield item
            item = newer
