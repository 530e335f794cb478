"""Which chunk leaves first. A policy knows only the chunks that may go; the store decides how many do."""

from collections.abc import Iterator
from typing import Protocol

from async_cache.l1.entry import Entry
from async_cache.ring import Ring


class EvictionPolicy(Protocol):
    """The order in which chunks are evicted. What a request leases may be among them: it is passed over."""

    def use(self, entry: Entry, before: Entry | None = None) -> None:
        """The entry was used just now, unless it is to go right before another one. It may be known or not."""

    def discard(self, entry: Entry) -> None:
        """The entry may not be evicted any more. It may be known or not."""

    def victims(self) -> Iterator[Entry]:
        """All entries that are known, in the order in which they should go. The last one may be discarded meanwhile."""


class LeastRecentlyUsed(Ring[Entry]):
    """The default."""

    def victims(self) -> Iterator[Entry]:
        return iter(self)
