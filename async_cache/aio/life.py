"""The life of what is opened once, in one event loop, and closed once, to its end."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from enum import Enum
from typing import Any, Generic, TypeVar

from async_cache.aio.home import Home
from async_cache.errors import CacheClosedError

T = TypeVar("T")


class LifeState(Enum):
    """NEW -> OPENING -> OPEN -> CLOSED; what could not be opened is CLOSED, and `close` leads there from everywhere."""

    NEW = "new"
    OPENING = "opening"
    OPEN = "open"
    CLOSED = "closed"


class Life(Generic[T]):
    """Has what `make` opens, until `end` has closed it. See `LifeState`. `what` is its name in errors."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, T]], end: Callable[[T], Awaitable[None]], what: str):
        self._make, self._end, self._what = make, end, what
        self.state = LifeState.NEW
        self._made: T | None = None
        self.opening: asyncio.Task[T] | None = None
        """What opens it, until it is closed."""
        self._closing: asyncio.Task[None] | None = None
        self._home: Home | None = None

    async def open(self) -> None:
        """Open it. Raises what that fails with, and CacheClosedError where it was opened before, or is closed now."""
        if self.state is not LifeState.NEW:
            raise CacheClosedError(f"a {self._what} is opened once")
        self.state, self._home = LifeState.OPENING, Home()
        opening = self.opening = asyncio.create_task(self._make())
        try:
            made = await opening
        except BaseException as error:
            by_close = self._is_closed and isinstance(error, asyncio.CancelledError) and not _is_cancelled()
            await self.close()  # also of what has opened in the step in which its caller was cancelled
            if by_close:
                raise CacheClosedError(f"the {self._what} was closed") from None
            raise
        if self._is_closed:
            raise CacheClosedError(f"the {self._what} was closed")
        self._made, self.state = made, LifeState.OPEN

    async def close(self) -> None:
        """Close it, also while it opens; idempotent. Whoever is cancelled meanwhile does not cancel that.

        Raises RuntimeError in a loop that is not the one that opened it, or after a fork: nothing is changed then.
        """
        if self._home is not None and not self._is_closed and self._home.is_elsewhere():
            raise self._home.refusal(self._what)
        self.state, self._made = LifeState.CLOSED, None
        if self.opening is not None:
            opening, self.opening = self.opening, None  # it would keep what it has made
            self._closing = asyncio.create_task(self._close(opening))
            del opening
        if self._closing is not None:
            await asyncio.shield(self._closing)  # to the end, also where the caller is cancelled

    async def _close(self, opening: "asyncio.Task[T]") -> None:
        opening.cancel()
        await asyncio.wait([opening])
        if not opening.cancelled() and opening.exception() is None:
            await self._end(opening.result())

    @property
    def _is_closed(self) -> bool:
        return self.state is LifeState.CLOSED

    def opened(self) -> T:
        """What is open. Raises CacheClosedError, and RuntimeError elsewhere than where it was opened."""
        made = self._made
        if made is None:
            closed = f"the {self._what} is {'closed' if self._is_closed else 'not open: use `async with`'}"
            raise CacheClosedError(closed)
        if self._home is not None and self._home.is_elsewhere():
            raise self._home.refusal(self._what)
        return made


def _is_cancelled() -> bool:
    """Whether somebody cancels the task that runs, and not what it waits for alone."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
