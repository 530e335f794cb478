"""Three queues, first in, first out: most of what comes is asked for once, and leaves soon.

After Yang, Zhang, Qiu, Yue and Vinayak: "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from collections.abc import Iterator
from typing import TypeVar

from async_cache.retention.ghosts import Ghosts
from async_cache.retention.leaves import Leafy, LeavesFirst
from async_cache.retention.ring import Ring
from async_cache.values import Removal

SMALL_SHARE = 0.1
_MOST_USES = 3
_USES_TO_STAY = 2

T = TypeVar("T", bound=Leafy)


class S3FIFO(LeavesFirst[T]):
    """A small queue for what is new, a main one for what was used since, and the digests of what left the small one."""

    def __init__(self) -> None:
        super().__init__()
        self._small: Ring[T] = Ring()
        self._main: Ring[T] = Ring()
        self._in_small = 0
        self._ghosts = Ghosts()

    def entered(self, item: T) -> Ring[T]:
        if self._ghosts.take(item.chunk_hash):
            return self._main
        self._in_small += 1
        return self._small

    def used(self, item: T) -> None:
        item.node.uses = min(item.node.uses + 1, _MOST_USES)

    def candidates(self) -> Iterator[T]:
        if self._in_small < SMALL_SHARE * self.known:
            yield from self._least_used()
            yield from self._small
            return
        for item in self._small:
            if item.node.uses < _USES_TO_STAY:
                yield item
            else:
                self._in_small -= 1
                item.node.uses = 0
                self.move(item, self._main)
        yield from self._least_used()

    def _least_used(self) -> Iterator[T]:
        """What is in the main queue. An item that was used since it came there comes to its end once more."""
        again = True
        while again:
            again = False
            for item in self._main:
                if item.node.uses:
                    item.node.uses -= 1
                    self.move(item, self._main)
                    again = True
                else:
                    yield item

    def gone(self, item: T, removal: Removal) -> None:
        if item.node.queue is self._small:
            self._in_small -= 1
            if removal is Removal.CAPACITY:
                self._ghosts.add(item.chunk_hash, self.known)
