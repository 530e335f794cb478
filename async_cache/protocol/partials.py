"""Frames that have begun: over all connections of a server they are bounded, in bytes and in time."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol

from async_cache.errors import LimitError, ProtocolError

LIMIT_BYTES = 128 * 2**20
"""What all frames that have begun may have together."""


class Receiver(Protocol):
    """A connection, as this module knows it."""

    @property
    def is_paused(self) -> bool:
        """Whether it is this end that does not go on."""

    def fail(self, error: Exception) -> None:
        """Tell the peer why, and close."""


class KeepsPartials(Protocol):
    """What knows of the frames that have begun, as a connection tells it."""

    def keep(self, receiver: Receiver, number: int, size_bytes: int) -> None:
        """Know that so much is there of a frame; the one that its connection had before is complete."""

    def drop(self, receiver: Receiver) -> None:
        """Know that nothing is there of a frame."""


class Partial(NamedTuple):
    """A frame that has begun: its number on its connection, the bytes that are there, and since when.

    `dropped` is called where it is given up.
    """

    number: int
    size_bytes: int
    since: float
    dropped: Callable[[Receiver], None] | None


class Partials:
    """The frames that have begun, the oldest first: one that takes too long, or that there is no room for, is given up.

    The oldest makes room for others, since who sends in earnest is soon done.
    """

    def __init__(self, seconds: float, limit_bytes: int = LIMIT_BYTES):
        self.size_bytes = 0
        self._seconds = seconds
        self._limit_bytes = limit_bytes
        self._frames: dict[Receiver, Partial] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def keep(
        self,
        receiver: Receiver,
        number: int,
        size_bytes: int,
        dropped: Callable[[Receiver], None] | None = None,
    ) -> None:
        """Know that so much is there of a frame; the one that its connection had before is complete.

        `dropped` is called if it is given up.
        """
        before = self._frames.get(receiver)
        if before is not None and before.number == number:
            self._frames[receiver] = before._replace(size_bytes=size_bytes)
            self.size_bytes += size_bytes - before.size_bytes
        else:
            self.drop(receiver)
            self._frames[receiver] = Partial(number, size_bytes, self._loop.time(), dropped)
            self.size_bytes += size_bytes
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._give_up_late)
        while self.size_bytes > self._limit_bytes:
            oldest = next(iter(self._frames))
            self._give_up(oldest)
            oldest.fail(LimitError("frames that have begun take too much memory, and this is the oldest"))

    def drop(self, receiver: Receiver) -> None:
        """Know that nothing is there of a frame."""
        frame = self._frames.pop(receiver, None)
        if frame is not None:
            self.size_bytes -= frame.size_bytes

    def _give_up(self, receiver: Receiver) -> None:
        dropped = self._frames[receiver].dropped
        self.drop(receiver)
        if dropped is not None:
            dropped(receiver)

    def close(self) -> None:
        """Wait for none any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _give_up_late(self) -> None:
        """Give up what has taken too long, and come again when the next would have."""
        now = self._loop.time()
        self._timer = None
        for receiver, frame in list(self._frames.items()):
            if frame.since + self._seconds > now:
                break
            self.drop(receiver)
            if receiver.is_paused:
                self.keep(receiver, frame.number, frame.size_bytes, frame.dropped)
            else:
                if frame.dropped is not None:
                    frame.dropped(receiver)
                receiver.fail(ProtocolError(f"a frame was begun, and not complete within {self._seconds:.3g} s"))
        if self._frames and self._timer is None:
            next_since = next(iter(self._frames.values())).since
            self._timer = self._loop.call_at(next_since + self._seconds, self._give_up_late)
