"""First in, first out: what came first leaves first, however often it is used, and whatever builds on it.

It is a yardstick, and the one policy that knows nothing of trees: so simulators of caches have it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from async_cache.retention.ring import Linked, Ring
from async_cache.values import Removal


class Queued(Linked, Protocol):
    """An item with room for whether it was taken out of its queue for a while."""

    node: Any


T = TypeVar("T", bound=Queued)


class FirstInFirstOut(Ring[T]):
    """A policy whose order is that in which items came."""

    def asked(self, path: Sequence[bytes], tokens: int, chunk_tokens: int, output_tokens: int | None = None) -> None:
        """Nothing: being asked for changes no place in a queue."""

    def hint(
        self,
        path: Sequence[bytes],
        output_tokens: int | None = None,
        returns: bool | None = None,
        within_seconds: float | None = None,
    ) -> None:
        """Nothing: what counts is what has happened."""

    def enter(self, item: T, parent: T | None, kept: bool = False) -> None:
        """Place the item at the end of the queue."""
        super().use(item)

    def use(self, item: T, before: T | None = None) -> None:
        """Place an item that is not known at the end, or before another one; else nothing, for the same reason."""
        if item.node is self:
            self.resume(item)
        elif item.older is None:
            super().use(item, before)

    def use_all(self, items: Iterable[T]) -> None:
        """Use each of these."""
        for item in items:
            self.use(item)

    def suspend(self, item: T) -> None:
        """Take the item out of the queue, of which it was the first."""
        self.discard(item)
        item.node = self

    def resume(self, item: T) -> None:
        """Let the item be the first of the queue again."""
        if item.node is self:
            item.node = None
            super().use(item, self.oldest())

    def left(self, item: T, removal: Removal) -> None:
        """Take the item out of the queue."""
        item.node = None
        self.discard(item)

    def admits(self, chunk_hash: bytes) -> bool:
        """Yes: it comes last."""
        return True

    def learned(self) -> Iterator[bytes]:
        """Nothing: it is all in the order."""
        return iter(())

    def recall(self, pieces: Iterable[bytes]) -> Iterator[None]:
        """Nothing, neither."""
        return iter(())

    def victims(self) -> Iterator[T]:
        """All items, the one that came first first."""
        return iter(self)
