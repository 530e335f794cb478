"""Queues that owners share: who has had least of late comes first, however much the others have put in."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")

_REMEMBERED = 4096  # owners of whom nothing waits, and who have had more than their turn


class _Line(Generic[T]):
    """What one owner waits with, each with its cost, and what he has had, by the queue's count."""

    __slots__ = ("had", "items", "owner")

    def __init__(self, owner: str, had: float):
        self.owner = owner
        self.had = had
        self.items: OrderedDict[T, float] = OrderedDict()


class FairQueue(Generic[T]):
    """Items of owners, each with a cost; those of one owner come in order (start-time fair queueing).

    Each step takes a time that grows with the logarithm of the number of owners at most.
    """

    def __init__(self) -> None:
        self._lines: dict[str, _Line[T]] = {}
        self._line_of: dict[T, _Line[T]] = {}
        self._order: list[tuple[float, int, _Line[T]]] = []  # a heap; a line that has gone is passed over
        self._numbers = count()
        self._had = 0.0  # by the owner who came last: who was away has had as much, ...
        self._ahead: dict[str, float] = {}  # ... or more, if that was not long ago

    def __bool__(self) -> bool:
        return bool(self._line_of)

    def __len__(self) -> int:
        return len(self._line_of)

    def __contains__(self, item: object) -> bool:
        return item in self._line_of

    def __iter__(self) -> Iterator[T]:
        """All items, owner by owner."""
        return (item for line in self._lines.values() for item in line.items)

    def push(self, owner: str, cost: float, item: T) -> None:
        """Put an item in that is not there."""
        line = self._lines.get(owner)
        if line is None:
            line = self._lines[owner] = _Line(owner, max(self._had, self._ahead.pop(owner, 0.0)))
            heappush(self._order, (line.had, next(self._numbers), line))
        line.items[item] = cost
        self._line_of[item] = line

    def first(self) -> T | None:
        """The item that comes next."""
        return next(iter(self._next().items)) if self._lines else None

    def pop(self) -> T:
        """Take the next item out; there must be one."""
        line = self._next()
        item, cost = line.items.popitem(last=False)
        del self._line_of[item]
        self._had = line.had
        line.had += cost
        if line.items:
            heapreplace(self._order, (line.had, next(self._numbers), line))
        else:
            heappop(self._order)
            self._end(line)
        return item

    def remove(self, item: T) -> None:
        """Take an item out before it comes, if it is there."""
        line = self._line_of.pop(item, None)
        if line is not None:
            del line.items[item]
            if not line.items:
                self._end(line)

    def _next(self) -> _Line[T]:
        while (line := self._order[0][2]) is not self._lines.get(line.owner):
            heappop(self._order)
        return line

    def _end(self, line: _Line[T]) -> None:
        del self._lines[line.owner]
        if not self._lines or len(self._ahead) >= _REMEMBERED:
            self._ahead.clear()
        if not self._lines:
            self._order.clear()
        elif line.had > self._had:
            self._ahead[line.owner] = line.had


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

    @asynccontextmanager
    async def entered(self, owner: str, cost: int) -> AsyncIterator[None]:
        """Be inside within the block."""
        await self.enter(owner, cost)
        try:
            yield
        finally:
            self.leave(cost)

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
