"""Time that counts only while a loop runs: who is silent because nobody could listen has not been silent."""

import asyncio
from collections.abc import Callable

_PARTS = 8
_MOST_PARTS = 2 * _PARTS  # every wait has an end, also in a loop that is held again and again


class Countdown:
    """Calls a function when a loop has run for so many seconds, and a turn later.

    The time is looked at in parts. For as long as a part is late, nobody ran; one that is late by its own length or
    more does not count at all, since what came meanwhile has to be handled first. So of what a hold lasts, at most one
    part counts.
    """

    __slots__ = ("_due", "_function", "_handle", "_left", "_loop", "_most", "_part")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, function: Callable[[], object]):
        self._loop, self._function = loop, function
        self._part = seconds / _PARTS
        self._left, self._most = _PARTS, _MOST_PARTS
        self._next(loop.time())

    def cancel(self) -> None:
        """Do not call."""
        self._handle.cancel()

    def _next(self, begin: float) -> None:
        self._due = begin + self._part
        self._handle: asyncio.Handle = self._loop.call_at(self._due, self._ended)

    def _ended(self) -> None:
        """A part has ended."""
        now = self._loop.time()
        self._most -= 1
        if now - self._due < self._part or self._most < self._left:
            self._left -= 1
        if self._left:
            self._next(max(now, self._due))
        else:
            self._handle = self._loop.call_soon(self._function)
