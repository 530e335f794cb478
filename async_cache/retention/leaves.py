"""Leaves first: what policies that know nothing of trees need, so that no chunk leaves before those that build on it.

Items are in queues, by which a policy says in which order it would let them go. One on which others build is passed
over, and taken out of its queue until the last of these has left: then it comes first. So nothing is looked at twice.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

from msgspec import Struct

from async_cache.retention.ring import Ring
from async_cache.values import Removal


class Leafy(Protocol):
    """An item in a queue, with room for what is known of it."""

    chunk_hash: bytes
    older: Self | None
    newer: Self | None
    node: Any


T = TypeVar("T", bound=Leafy)


class Node(Struct, gc=False, eq=False):
    """What is known of an item."""

    parent: Any  # the item that it builds on, if that is there
    queue: Any  # the ring that it is in, or would be in if it were no longer passed over
    children: int = 0
    uses: int = 0  # since it came into its queue
    passed: bool = False  # others build on it: it is in no queue, or came back to one when they had left
    suspended: bool = False  # it is in no queue


class LeavesFirst(Generic[T]):
    """A policy over queues: subclasses say into which an item comes, and from which one leaves first."""

    def __init__(self) -> None:
        self.known = 0
        """The number of items."""
        self._suspended: dict[bytes, T] = {}

    def entered(self, item: T) -> Ring[T]:
        """Say which queue a new item comes into, as the last one to leave."""
        raise NotImplementedError

    def used(self, item: T) -> None:
        """An item was used again."""

    def candidates(self) -> Iterator[T]:
        """Iterate over what is in the queues, in the order in which it should go; what came may come again."""
        raise NotImplementedError

    def gone(self, item: T, removal: Removal) -> None:
        """An item has left its queue, for good."""

    def move(self, item: T, queue: Ring[T]) -> None:
        """Put an item into a queue, as the last one to leave it."""
        node = item.node
        if node.queue is not None:
            node.queue.discard(item)
        node.queue, node.passed = queue, False
        queue.use(item)

    def asked(self, path: object, tokens: int, chunk_tokens: int, output_tokens: int | None = None) -> None:
        """Paths say nothing to a policy without trees."""

    def hint(
        self,
        path: object,
        output_tokens: int | None = None,
        returns: bool | None = None,
        within_seconds: float | None = None,
    ) -> None:
        """Nothing, neither."""

    def admits(self, chunk_hash: bytes) -> bool:
        """Whether a chunk that is not there should be taken in."""
        return True

    def learned(self) -> Iterator[bytes]:
        """Nothing: what is counted is counted anew."""
        return iter(())

    def recall(self, pieces: Iterable[bytes]) -> Iterator[None]:
        """Nothing, neither."""
        return iter(())

    def enter(self, item: T, parent: T | None, kept: bool = False) -> None:
        """An item came, which builds on another one, if that is there."""
        if parent is not None and parent.node is not None:
            parent.node.children += 1
        else:
            parent = None
        item.node = Node(parent, None)
        self.known += 1
        self.move(item, self.entered(item))

    def use(self, item: T, before: T | None = None) -> None:
        """An item, known or not, was used just now."""
        if item.node is None:
            self.enter(item, None)
        elif before is None:
            self.resume(item)
            self.used(item)

    def use_all(self, items: Iterable[T]) -> None:
        """Use each of these."""
        for item in items:
            self.use(item)

    def suspend(self, item: T) -> None:
        """Take an item out of its queue, where it is in one."""
        node = item.node
        if node is not None and not node.suspended:
            node.passed = item.older is None
            node.queue.discard(item)
            node.suspended = True
            self._suspended[item.chunk_hash] = item

    def resume(self, item: T) -> None:
        """Let an item that was suspended be the first of its queue, unless others build on it."""
        node = item.node
        if node is not None and node.suspended:
            node.suspended = False
            del self._suspended[item.chunk_hash]
            if not node.passed:
                node.queue.use(item, node.queue.oldest())

    def left(self, item: T, removal: Removal) -> None:
        """An item, known or not, has gone."""
        node = item.node
        if node is None:
            return
        self.resume(item)
        node.queue.discard(item)
        self.known -= 1
        self.gone(item, removal)
        item.node = None
        parent = node.parent
        if parent is not None and parent.node is not None:
            parent.node.children -= 1
            if not parent.node.children and parent.older is None:
                if parent.node.suspended:
                    parent.node.passed = False
                else:
                    parent.node.queue.use(parent, parent.node.queue.oldest())

    def victims(self) -> Iterator[T]:
        """Iterate over all items in the order in which they should go. Those that came may leave."""
        stayed: dict[int, int] = {}  # by the id of an item, how many that build on it have come, but did not leave
        came: set[int] = set()

        def upward(item: T) -> Iterator[T]:
            """The item, and what it builds on that was passed over for it."""
            while id(item) not in came:
                came.add(id(item))
                parent = item.node.parent
                yield item
                if parent is None or parent.node is None:
                    return
                stayed[id(parent)] = stayed.get(id(parent), 0) + (item.node is not None)
                waits = parent.node.passed or parent.node.suspended
                if not waits or parent.node.children > stayed[id(parent)]:
                    return
                item = parent

        for item in self.candidates():
            if item.node.children > stayed.get(id(item), 0):
                item.node.queue.discard(item)
                item.node.passed = True
            else:
                yield from upward(item)
        for item in list(self._suspended.values()):
            if item.node is not None and item.node.children <= stayed.get(id(item), 0):
                yield from upward(item)
