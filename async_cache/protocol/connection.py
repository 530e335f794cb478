"""One end of an open connection: messages in and out, with back-pressure."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

from async_cache.errors import AsyncCacheError, ConnectionLostError
from async_cache.protocol.frames import FrameReader, frame
from async_cache.protocol.messages import Decoder, Message, encode, failed

log = logging.getLogger(__name__)

_MESSAGES_AT_ONCE = 128


class Connection(asyncio.Protocol):
    """NEW -> OPEN -> CLOSING (nothing is received any more, what was sent goes out) -> LOST.

    `received` is called with each message, in order; `lost` once, with the reason if there is one. With
    `stall_seconds`, a peer that does not read what it is sent is not listened to either, and is given up after that.
    """

    def __init__(
        self,
        decoder: Decoder,
        received: Callable[[Any], None],
        lost: Callable[[Exception | None], None],
        *,
        stall_seconds: float | None = None,
    ):
        self._decoder = decoder
        self._received = received
        self._lost = lost
        self._stall_seconds = stall_seconds
        self._frames = FrameReader()
        self._arrived: deque[bytes] = deque()  # data that was not looked at yet
        self._payloads: Iterator[memoryview] = iter(())  # of the data that is looked at now
        self._reading = True
        self._held_up = False
        self._takes_turns = False  # what is left is taken in the loop's next turn
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._closing = False
        self._resumed: asyncio.Event | None = None  # while the peer does not read
        self._giving_up: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.received_frames = 0

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return self._transport is not None and not self._closing

    def descriptors(self) -> list[int]:
        """Of the socket, as long as it is open."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        return [sock.fileno()] if sock is not None else []

    def send(self, message: Message) -> None:
        """Send a message with the others of this step of the loop; nothing if the connection is not open."""
        if self.is_open:
            if not self._out:
                self._loop.call_soon(self.flush)
            self._out.append(frame(encode(message)))

    def flush(self) -> None:
        """Hand what was sent to the transport now."""
        if self._out and self._transport is not None:
            out, self._out = self._out, []
            self._transport.write(b"".join(out))

    async def drained(self) -> None:
        """Return when the peer has read enough for more to be sent. Raises ConnectionLostError."""
        self.flush()
        while self._resumed is not None and not self._closing:
            await self._resumed.wait()
        if not self.is_open:
            raise ConnectionLostError("the connection was closed")

    def close(self) -> None:
        """Close, after what was sent; a peer that does not take it is given up."""
        if self.is_open:
            self.flush()
            self._closing = True
            assert self._transport is not None
            self._transport.close()
            if self._stall_seconds is not None and self._giving_up is None:
                self._giving_up = self._loop.call_later(self._stall_seconds, self.abort)

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    def fail(self, error: Exception) -> None:
        """Tell the peer why, and close."""
        self.send(failed(0, error))
        self.close()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._arrived.append(data)
        if not self._takes_turns:
            self._take()

    def _take(self) -> None:
        """Hand on what has arrived: so much at a time that other connections have their turn."""
        self._takes_turns = False
        left = _MESSAGES_AT_ONCE
        try:
            while not self._closing and not self._held_up:
                if not left:
                    self._takes_turns = True
                    self._loop.call_soon(self._take)
                    break
                payload = next(self._payloads, None)
                if payload is not None:
                    left -= 1
                    self.received_frames += 1
                    self._received(self._decoder.decode(payload))
                elif self._arrived:
                    self._payloads = self._frames.feed(self._arrived.popleft())
                else:
                    break
        except AsyncCacheError as error:
            self.fail(error)
        except Exception as error:
            log.exception("a message could not be handled")
            self.fail(error)
        self._update_reading()

    def hold_up(self) -> None:
        """Receive nothing more until `go_on`."""
        self._held_up = True

    def go_on(self) -> None:
        """Receive again, beginning with what has arrived already."""
        if self._held_up:
            self._held_up = False
            if not self._takes_turns:
                self._take()

    def _update_reading(self) -> None:
        """Read from the peer only what can be handled, and only from one that reads: memory has a bound."""
        stalled = self._stall_seconds is not None and self._resumed is not None
        wanted = not (self._held_up or self._takes_turns or stalled)
        if wanted != self._reading and self._transport is not None and not self._closing:
            self._reading = wanted
            if wanted:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._resumed = asyncio.Event()
        if self._stall_seconds is not None and not self._closing:
            self._giving_up = self._loop.call_later(self._stall_seconds, self.abort)
        self._update_reading()

    def resume_writing(self) -> None:
        self._end_pause()
        self._update_reading()

    def _end_pause(self) -> None:
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            resumed.set()
        if self._giving_up is not None and not self._closing:
            self._giving_up.cancel()
            self._giving_up = None

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        self._transport = None
        self._out.clear()
        self._arrived.clear()
        self._payloads = iter(())
        self._end_pause()
        if self._giving_up is not None:
            self._giving_up.cancel()
        lost = self._lost
        self._received = self._lost = _ignore  # they know it, and it knows them
        lost(error)


def _ignore(_: Any) -> None:
    return
