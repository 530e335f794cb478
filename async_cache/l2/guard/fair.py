"""Queues that owners share: who has had least of late comes first, however much the others have put in."""

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _Line(Generic[T]):
    """What one owner waits with, and what he has had, by the queue's count."""

    __slots__ = ("had", "items")

    def __init__(self, had: float):
        self.had = had
        self.items: deque[tuple[float, T]] = deque()


class FairQueue(Generic[T]):
    """Items of owners, each with a cost; those of one owner come in order (start-time fair queueing)."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._had = 0.0  # by the owner who came last: who was away has had as much

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __iter__(self) -> Iterator[T]:
        return (item for line in self._lines.values() for _, item in line.items)

    def push(self, owner: str, cost: float, item: T) -> None:
        """Put an item in."""
        line = self._lines.get(owner)
        if line is None:
            line = self._lines[owner] = _Line(self._had)
        line.items.append((cost, item))

    def pop(self) -> T:
        """Take the next item out; there must be one."""
        owner, line = min(self._lines.items(), key=lambda pair: pair[1].had)
        cost, item = line.items.popleft()
        self._had = line.had
        line.had += cost
        if not line.items:
            del self._lines[owner]
        return item

    def remove(self, item: T) -> None:
        """Take an item out before it comes."""
        for owner, line in self._lines.items():
            rest = deque(pair for pair in line.items if pair[1] is not item)
            if len(rest) < len(line.items):
                line.items = rest
                if not rest:
                    del self._lines[owner]
                return


class Gate:
    """Lets in calls of `most` together, or one that is larger, and the others in fair order as those leave."""

    def __init__(self, most: int):
        self.inside = 0
        self._most = most
        self._waiting: FairQueue[tuple[int, asyncio.Future[None]]] = FairQueue()

    async def enter(self, owner: str, cost: int) -> None:
        """Wait to be let in; whoever was has to `leave`. Cancelled, nothing is left of it."""
        if not self._waiting and self._has_room(cost):
            self.inside += cost
            return
        waiter = asyncio.get_running_loop().create_future()
        waiting = (cost, waiter)
        self._waiting.push(owner, cost, waiting)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.leave(cost)
            else:
                self._waiting.remove(waiting)
            raise

    def leave(self, cost: int) -> None:
        """Make room for others."""
        self.inside -= cost
        while self._waiting and self.inside < self._most:
            cost, waiter = self._waiting.pop()
            if not waiter.done():
                self.inside += cost
                waiter.set_result(None)

    def _has_room(self, cost: int) -> bool:
        return not self.inside or self.inside + cost <= self._most
