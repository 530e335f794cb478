"""Least recently used first: the default policy."""

from collections.abc import Iterator
from typing import TypeVar

from async_cache.retention.ring import Linked, Ring
from async_cache.values import Removal

T = TypeVar("T", bound=Linked)


class LeastRecentlyUsed(Ring[T]):
    """A policy that evicts what was not used for the longest time: its order is that of the ring."""

    def suspend(self, item: T) -> None:
        """Leave the item out until its next use."""
        self.discard(item)

    def left(self, item: T, removal: Removal) -> None:
        """Take the item out of the order, whatever it left for."""
        self.discard(item)

    def victims(self) -> Iterator[T]:
        """All items, the least recently used first."""
        return iter(self)
