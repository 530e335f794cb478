"""Very many items in slices, so that work on them does not hold the loop for long, however many do such work."""

import asyncio
import weakref
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Generic, Self, TypeVar

T = TypeVar("T")

Wait = Callable[[], Awaitable[object]]
"""What to wait for between two steps."""

working_for: ContextVar[str] = ContextVar("working_for", default="")
"""For whom a task works, if somebody has said so: of the turns for slices, each has as many as any other."""


class _Pace:
    """Who works in slices in one loop: a slice or two in each of its turns, for one after the other."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()  # by whom they work for
        self._is_taken = False  # the loop's next turn

    async def turn(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._is_taken:
            self._is_taken = True
            loop.call_soon(self._next, loop)
            await asyncio.sleep(0)
            return
        waiter = loop.create_future()
        self._waiting.setdefault(working_for.get(), deque()).append(waiter)
        await waiter

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            whose, waiters = self._waiting.popitem(last=False)
            waiter = waiters.popleft()
            if waiters:
                self._waiting[whose] = waiters  # behind the others
            if not waiter.done():
                waiter.set_result(None)
                loop.call_soon(self._next, loop)
                return
        self._is_taken = False


_paces: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Pace]" = weakref.WeakKeyDictionary()


async def turn() -> None:
    """Wait for a turn of the loop to do the next slice in: those who do so much have one after the other."""
    loop = asyncio.get_running_loop()
    pace = _paces.get(loop)
    if pace is None:
        pace = _paces[loop] = _Pace()
    await pace.turn(loop)


def slices(items: Sequence[T], count: int) -> Iterator[Sequence[T]]:
    """The items in their order, so many at a time."""
    return (items[begin : begin + count] for begin in range(0, len(items), count))


class InTurns(Generic[T]):
    """The slices of items, to iterate over with `async for`: between two of them, the loop has its turn.

    It may be left in the middle, and nothing of it stays behind, as would of an asynchronous generator.
    """

    def __init__(self, items: Sequence[T], count: int):
        self._slices = slices(items, count)
        self._begun = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[T]:
        some = next(self._slices, None)
        if some is None:
            raise StopAsyncIteration
        if self._begun:
            await turn()
        self._begun = True
        return some
