"""Adaptive replacement: a share for what was used once, another for what was used again, and a boundary that learns.

After Megiddo and Modha: "ARC: a self-tuning, low overhead replacement cache", FAST 2003.
"""

from collections.abc import Iterator
from typing import TypeVar

from async_cache.retention.ghosts import Ghosts
from async_cache.retention.leaves import Leafy, LeavesFirst
from async_cache.retention.ring import Ring
from async_cache.values import Removal

T = TypeVar("T", bound=Leafy)


class AdaptiveReplacement(LeavesFirst[T]):
    """Two queues in the order of use, and the digests of what left each of them."""

    def __init__(self) -> None:
        super().__init__()
        self._once: Ring[T] = Ring()
        self._again: Ring[T] = Ring()
        self._once_left = Ghosts()
        self._again_left = Ghosts()
        self._in_once = 0
        self._wanted_once = 0.0  # so many items should be in the queue of those used once

    def entered(self, item: T) -> Ring[T]:
        once, again = len(self._once_left), len(self._again_left)
        if self._once_left.take(item.chunk_hash):
            self._wanted_once = min(self._wanted_once + max(1.0, again / once), self.known)
            return self._again
        if self._again_left.take(item.chunk_hash):
            self._wanted_once = max(self._wanted_once - max(1.0, once / again), 0.0)
            return self._again
        self._in_once += 1
        return self._once

    def used(self, item: T) -> None:
        self._in_once -= item.node.queue is self._once
        self.move(item, self._again)

    def candidates(self) -> Iterator[T]:
        once_first = self._in_once > self._wanted_once
        for queue in (self._once, self._again) if once_first else (self._again, self._once):
            yield from queue

    def gone(self, item: T, removal: Removal) -> None:
        once = item.node.queue is self._once
        self._in_once -= once
        if removal is Removal.CAPACITY:
            (self._once_left if once else self._again_left).add(item.chunk_hash, self.known)
