"""Tombstones: what is being deleted is not found, wherever it still lies."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager


class Tombstones:
    """Chunks that are being deleted: a backend may still hold them, but they must not be found there.

    A tombstone stands from the call of the deletion until every backend has done its part.
    """

    def __init__(self) -> None:
        self._hashes: Counter[bytes] = Counter()
        self._all = 0
        self._watchers: list[Tombstones] = []

    def watcher(self) -> "Tombstones":
        """All that has a tombstone at any time from now on, until it is dismissed."""
        seen = Tombstones()
        seen._hashes, seen._all = self._hashes.copy(), self._all
        self._watchers.append(seen)
        return seen

    def dismiss(self, watcher: "Tombstones") -> None:
        """Let a watcher see no more."""
        self._watchers.remove(watcher)

    @contextmanager
    def watch(self) -> "Iterator[Tombstones]":
        """All that has a tombstone at any time within the block: what a lookup that is out there must not find."""
        seen = self.watcher()
        try:
            yield seen
        finally:
            self.dismiss(seen)

    def bury(self, chunk_hashes: Collection[bytes] | None) -> None:
        """Set a tombstone for these chunks, or for all if None."""
        for watcher in self._watchers:
            watcher.bury(chunk_hashes)
        if chunk_hashes is None:
            self._all += 1
        else:
            self._hashes.update(chunk_hashes)

    def lift(self, chunk_hashes: Iterable[bytes] | None) -> None:
        """Take the tombstones away: these chunks, or all if None, are gone from the backends."""
        if chunk_hashes is None:
            self._all -= 1
        else:
            for chunk_hash in chunk_hashes:
                left = self._hashes.pop(chunk_hash) - 1
                if left:
                    self._hashes[chunk_hash] = left

    def __bool__(self) -> bool:
        return self._all > 0 or bool(self._hashes)

    def __contains__(self, chunk_hash: object) -> bool:
        return self._all > 0 or chunk_hash in self._hashes
