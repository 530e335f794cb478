"""One end of an open connection: messages in and out, with back-pressure."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, cast

from async_cache.errors import AsyncCacheError, ConnectionLostError
from async_cache.protocol.frames import FrameReader, frame
from async_cache.protocol.messages import Decoder, Message, encode, failed

log = logging.getLogger(__name__)


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
            self._transport.writelines(out)

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
        try:
            for payload in self._frames.feed(data):
                if self._closing:
                    return
                self.received_frames += 1
                self._received(self._decoder.decode(payload))
        except AsyncCacheError as error:
            self.fail(error)
        except Exception as error:
            log.exception("a message could not be handled")
            self.fail(error)

    def pause_writing(self) -> None:
        self._resumed = asyncio.Event()
        if self._stall_seconds is not None and self._transport is not None and not self._closing:
            self._transport.pause_reading()
            self._giving_up = self._loop.call_later(self._stall_seconds, self.abort)

    def resume_writing(self) -> None:
        self._end_pause()
        if self._stall_seconds is not None and self._transport is not None and not self._closing:
            self._transport.resume_reading()

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
        self._end_pause()
        if self._giving_up is not None:
            self._giving_up.cancel()
        lost = self._lost
        self._received = self._lost = _ignore  # they know it, and it knows them
        lost(error)


def _ignore(_: Any) -> None:
    return
