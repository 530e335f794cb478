"""`EventStream`: what a caller holds of the events of a cache."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from enum import Enum
from typing import Self

from async_cache.values import Event, Skipped

EVENTS_CAPACITY = 65_536
_BATCH = 256


class StreamState(Enum):
    """OPEN -> CLOSED, by its owner; OPEN -> BROKEN, with the cache or the connection."""

    OPEN = "open"
    CLOSED = "closed"
    BROKEN = "broken"


class EventStream(AsyncIterator[Event]):
    """Events in their order, from when it was made: iterate with `async for`, in one task.

    What its reader has not taken is kept, up to `capacity` events; what comes beyond that is missed, and counted by a
    `Skipped` in its place. It ends with `aclose`, or when nobody has it any more. Iterating raises CacheClosedError or
    ConnectionLostError once all that came before has been taken.
    """

    def __init__(self, capacity: int, closed: "Callable[[EventStream], object]" = lambda stream: None):
        self._capacity = capacity
        self._closed = closed
        self._events: deque[Event] = deque()
        self._state = StreamState.OPEN
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    # For who makes the events.

    def put(self, event: Event) -> None:
        """Add an event, or count it as missed; nothing once it has ended."""
        if self._state is not StreamState.OPEN:
            return
        if len(self._events) < self._capacity:
            self._events.append(event)
        else:
            self._skip(event.count if isinstance(event, Skipped) else 1)
        self._wake()

    def _skip(self, count: int) -> None:
        try:
            last = self._events[-1]
            if isinstance(last, Skipped):
                self._events[-1] = Skipped(last.count + count)
                return
        except IndexError:  # another thread has just taken all
            pass
        self._events.append(Skipped(count))

    def break_with(self, error: Exception) -> None:
        """Raise this once what has come is taken: there will be no more."""
        if self._state is StreamState.OPEN:
            self._state, self._error = StreamState.BROKEN, error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # For who reads them.

    async def __anext__(self) -> Event:
        await self.arrived()
        return self._events.popleft()

    async def batch(self, most: int = _BATCH) -> list[Event]:
        """The next events, at least one, as many as have come, up to `most`. Raises StopAsyncIteration at the end."""
        await self.arrived()
        return self.take(most)

    def take(self, most: int = _BATCH) -> list[Event]:
        """Those of the next events that have come, up to `most`, without waiting; from any thread, one at a time.

        Raises CacheClosedError or ConnectionLostError once all that came before has been taken.
        """
        events = self._events
        if not events and self._error is not None:
            raise self._error.with_traceback(None)
        return [events.popleft() for _ in range(min(most, len(events)))]

    async def arrived(self) -> None:
        """Return when there is an event to take. Raises StopAsyncIteration at the end, and as iterating does."""
        while not self._events:
            if self._error is not None:
                raise self._error.with_traceback(None)
            if self._state is StreamState.CLOSED:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def aclose(self) -> None:
        """Read nothing more: what has come and was not taken is dropped. May be called more than once."""
        self.close()

    def close(self) -> None:
        """What `aclose` does, without a loop."""
        if self._state is not StreamState.CLOSED:
            self._state, self._error = StreamState.CLOSED, None
            self._events.clear()
            self._wake()
            self._closed(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exit: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EventStream, {self._state.value}, {len(self._events)} events>"
