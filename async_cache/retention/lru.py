"""Least recently used first."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from async_cache.retention.ring import Linked, Ring
from async_cache.values import Removal

T = TypeVar("T", bound=Linked)


class LeastRecentlyUsed(Ring[T]):
    """A policy that evicts what was not used for the longest time: its order is that of the ring."""

    def asked(self, path: Sequence[bytes], tokens: int, chunk_tokens: int, output_tokens: int | None = None) -> None:
        """Nothing: what is used is told by `use`."""

    def hint(
        self,
        path: Sequence[bytes],
        output_tokens: int | None = None,
        returns: bool | None = None,
        within_seconds: float | None = None,
    ) -> None:
        """Nothing: what counts is what has happened."""

    def enter(self, item: T, parent: T | None, kept: bool = False) -> None:
        """Place the item right before the one that it builds on: that is used again at the end of its lease."""
        self.use(item, None if kept else parent)

    def suspend(self, item: T) -> None:
        """Leave the item out until its next use."""
        self.discard(item)

    def resume(self, item: T) -> None:
        """Let the item be the first to go, if it was left out."""
        if item.older is None:
            self.use(item, self.oldest())

    def left(self, item: T, removal: Removal) -> None:
        """Take the item out of the order, whatever it left for."""
        self.discard(item)

    def admits(self, chunk_hash: bytes) -> bool:
        """Yes: it is used just now."""
        return True

    def learned(self) -> Iterator[bytes]:
        """Nothing: it is all in the order."""
        return iter(())

    def recall(self, pieces: Iterable[bytes]) -> Iterator[None]:
        """Nothing, neither."""
        return iter(())

    def victims(self) -> Iterator[T]:
        """All items, the least recently used first."""
        return iter(self)
