"""First in, first out: what came first leaves first, however often it is used, and whatever builds on it.

It is a yardstick, and the one policy that knows nothing of trees: so simulators of caches have it.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from async_cache.retention.ring import Linked, Ring
from async_cache.values import Removal

T = TypeVar("T", bound=Linked)


class FirstInFirstOut(Ring[T]):
    """A policy whose order is that in which items came."""

    def asked(self, path: Sequence[bytes], tokens: int, chunk_tokens: int, output_tokens: int | None = None) -> None:
        """Nothing: being asked for changes no place in a queue."""

    def enter(self, item: T, parent: T | None, kept: bool = False) -> None:
        """Place the item at the end of the queue."""
        super().use(item)

    def use(self, item: T, before: T | None = None) -> None:
        """Place an item that is not known at the end, or before another one; else nothing, for the same reason."""
        if item.older is None:
            super().use(item, before)

    def suspend(self, item: T) -> None:
        """Nothing: whoever passes over an item does so each time."""

    def left(self, item: T, removal: Removal) -> None:
        """Take the item out of the queue."""
        self.discard(item)

    def admits(self, chunk_hash: bytes) -> bool:
        """Yes: it comes last."""
        return True

    def victims(self) -> Iterator[T]:
        """All items, the one that came first first."""
        return iter(self)
