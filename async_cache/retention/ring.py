"""An order of use, as a ring through the items themselves.

Every operation is a few assignments, and two links are all the memory that it takes. The links keep items alive that
the garbage collector does not know: they are freed when they are discarded, or when their ring is gone.
"""

from collections.abc import Iterable, Iterator
from typing import Generic, Protocol, Self, TypeVar

from msgspec import Struct


class Linked(Protocol):
    """An item that can be in a ring, in one at a time."""

    older: Self | None
    newer: Self | None


class _End(Struct, gc=False, eq=False):
    """The place between the most and the least recently used item."""

    older: "_End | None" = None
    newer: "_End | None" = None


T = TypeVar("T", bound=Linked)


class Ring(Generic[T]):
    """Items in the order of their use, the least recently used first."""

    def __init__(self) -> None:
        self._end: T = _End()  # type: ignore[assignment]  # it is never handed out
        self._end.older = self._end.newer = self._end

    def use(self, item: T, before: T | None = None) -> None:
        """Make an item, in the ring or not, the most recently used one; or place it right before another one."""
        older, newer = item.older, item.newer
        if older is not None and newer is not None:  # `discard`, without a call: this is where the time goes
            older.newer, newer.older = newer, older
        newer = before if before is not None and before.newer is not None else self._end
        older = newer.older
        assert older is not None
        item.older, item.newer = older, newer
        older.newer = newer.older = item

    def use_all(self, items: Iterable[T]) -> None:
        """Make each of these the most recently used one, as `use` does, and without a call for each.

        Those that follow each other in the ring, as after the last time, move together.
        """
        first: T | None = None
        last: T | None = None
        for item in items:
            if last is None or last.newer is not item:
                if first is not None and last is not None:
                    self._move(first, last)
                first = item
            last = item
        if first is not None and last is not None:
            self._move(first, last)

    def _move(self, first: T, last: T) -> None:
        """Make a run of the ring, or one item that may not be in it, the most recently used."""
        end, older, newer = self._end, first.older, last.newer
        if older is not None and newer is not None:
            older.newer, newer.older = newer, older
        older = end.older
        assert older is not None
        first.older, last.newer = older, end
        older.newer, end.older = first, last

    def __del__(self) -> None:
        """Break all links: nobody else would."""
        item: T | None = self._end
        while item is not None:
            newer, item.older, item.newer = item.newer, None, None
            item = newer

    def discard(self, item: T) -> None:
        """Take an item out, if it is in the ring."""
        older, newer = item.older, item.newer
        if older is not None and newer is not None:
            older.newer, newer.older = newer, older
            item.older = item.newer = None

    def oldest(self) -> T | None:
        """The least recently used item."""
        oldest = self._end.newer
        return oldest if oldest is not self._end else None

    def __iter__(self) -> Iterator[T]:
        """Iterate in the order of use. The item that came last may be discarded meanwhile."""
        item = self._end.newer
        while item is not self._end:
            assert item is not None
            newer = item.newer
            yield item
            item = newer
