"""Which chunk leaves first. A policy knows only the chunks that may go; the store decides how many do."""

from collections.abc import Iterator
from typing import Protocol

from async_cache.l1.entry import Entry
from async_cache.layout import ModelLayout, ObjectGroup


class EvictionPolicy(Protocol):
    """The order in which chunks are evicted. What a request leases may be among them: it is passed over."""

    def use(self, entry: Entry, before: Entry | None = None) -> None:
        """The entry was used just now, unless it is to go right before another one. It may be known or not."""

    def discard(self, entry: Entry) -> None:
        """The entry may not be evicted any more. It may be known or not."""

    def victims(self) -> Iterator[Entry]:
        """All entries that are known, in the order in which they should go. The last one may be discarded meanwhile."""


class LeastRecentlyUsed:
    """A ring through the entries themselves: every operation is a few assignments, and no memory but two links."""

    def __init__(self) -> None:
        self._ring = Entry(b"", ModelLayout("ring", (ObjectGroup((1,), "uint8"),)))
        self._ring.older = self._ring.newer = self._ring  # newer: the least recently used; older: the most recently

    def use(self, entry: Entry, before: Entry | None = None) -> None:
        if entry.newer is not None:
            self.discard(entry)
        newer = before if before is not None and before.newer is not None else self._ring
        older = newer.older
        assert older is not None
        entry.older, entry.newer = older, newer
        older.newer = newer.older = entry

    def discard(self, entry: Entry) -> None:
        older, newer = entry.older, entry.newer
        if older is not None and newer is not None:
            older.newer, newer.older = newer, older
            entry.older = entry.newer = None

    def victims(self) -> Iterator[Entry]:
        entry = self._ring.newer
        while entry is not self._ring:
            assert entry is not None
            newer = entry.newer
            yield entry
            entry = newer
