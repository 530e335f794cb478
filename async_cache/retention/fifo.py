"""First in, first out: what came first leaves first, however often it is used."""

from collections.abc import Iterator
from typing import TypeVar

from async_cache.retention.leaves import Leafy, LeavesFirst
from async_cache.retention.ring import Ring

T = TypeVar("T", bound=Leafy)


class FirstInFirstOut(LeavesFirst[T]):
    """One queue, in the order in which items came."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: Ring[T] = Ring()

    def entered(self, item: T) -> Ring[T]:
        return self._queue

    def candidates(self) -> Iterator[T]:
        return iter(self._queue)
