"""One end of an open connection: messages in and out, with back-pressure."""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from itertools import chain
from typing import Any, cast

from async_cache.errors import AsyncCacheError, ConnectionLostError
from async_cache.protocol.descriptors import above_standard, moved_above_standard
from async_cache.protocol.frames import FrameReader, frame
from async_cache.protocol.messages import Decoder, Message, encode, failed
from async_cache.protocol.partials import KeepsPartials
from async_cache.protocol.secured import Secured

log = logging.getLogger(__name__)

_MESSAGES_AT_ONCE = 128
_MESSAGE_COST = 10  # of a message, before it is known what it asks for
_HEARS_SECONDS = 1.0  # for a peer to hear why it has to leave
_LAST_WORDS_BYTES = 2**20  # that it may send meanwhile: beyond that, nobody listens
_FREE_BYTES = 4096  # of a piece that arrives: the messages in it are paid for


class ConnectionState(Enum):
    """NEW -> OPEN, once there is a transport, -> CLOSING -> LOST. A new one may be aborted or lost at once.

    While it is CLOSING, nothing that arrives is looked at any more, and what was sent goes out.
    """

    NEW = "new"
    OPEN = "open"
    CLOSING = "closing"
    LOST = "lost"


_OPEN = ConnectionState.OPEN  # looked up for every message, and a name in an enum is slow


class Pause(Enum):
    """Why nothing is received for a while."""

    TURN = "other connections have their turn"
    OWNER = "the owner is busy with what it has received"
    STALL = "the peer does not read what it is sent"


class Connection(asyncio.Protocol):
    """A connection to a peer, with the states of `ConnectionState`.

    `received` is called with each message, in order; `lost` once, with the reason if there is one. With
    `stall_seconds`, a peer that does not read what it is sent is not listened to either, and is given up after that.
    What is there of a frame that is not complete is bounded by `partials`. `name` is for the log.

    `admits` is asked before each message, and before a large piece, with what looking at it costs; where it says no,
    nothing is received until `resume_turn`. Without it, a connection gives way to others after some messages.
    """

    def __init__(
        self,
        decoder: Decoder,
        received: Callable[[Any], None],
        lost: Callable[[Exception | None], None],
        *,
        stall_seconds: float | None = None,
        partials: KeepsPartials | None = None,
        admits: Callable[[int], bool] | None = None,
        name: str = "the peer",
    ):
        self._state = ConnectionState.NEW
        self._decoder = decoder
        self._received = received
        self._lost = lost
        self._stall_seconds = stall_seconds
        self._partials = partials
        self._has_partial = False
        self._messages_left = _MESSAGES_AT_ONCE
        self._admits = admits if admits is not None else self._gives_way
        self._name = name
        self._frames = FrameReader()
        self._arrived: deque[bytes] = deque()  # data that was not looked at yet
        self._payloads: Iterator[memoryview] = iter(())  # of the data that is looked at now
        self._pauses: set[Pause] = set()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._is_taking = False
        self._writable: asyncio.Event | None = None  # set again when the peer has read; None while it does
        self._giving_up: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Future[None] = self._loop.create_future()
        self.received_frames = 0

    @property
    def is_open(self) -> bool:
        """Whether messages can be sent."""
        return self._state is _OPEN

    def descriptors(self) -> list[int]:
        """The descriptor of the socket, as long as it is open."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None else None
        return [sock.fileno()] if sock is not None else []

    def __repr__(self) -> str:
        pauses = "".join(f", {pause.value}" for pause in self._pauses)
        return f"<Connection, {self._state.value}, {self.received_frames} frames received{pauses}>"

    # Sending.

    def send(self, message: Message) -> None:
        """Send a message with the others of this step of the loop; nothing if the connection is not open."""
        if self._state is _OPEN:  # as `send_payload`, which would be a call more for each message
            if not (self._out or self._is_taking):
                self._loop.call_soon(self.flush)
            self._out.append(frame(encode(message)))

    def send_payload(self, payload: bytes) -> None:
        """Send a message that is encoded already."""
        if self._state is _OPEN:
            if not (self._out or self._is_taking):
                self._loop.call_soon(self.flush)
            self._out.append(frame(payload))

    def flush(self) -> None:
        """Hand what was sent to the transport now."""
        if self._out and self._transport is not None:
            out, self._out = self._out, []
            self._transport.write(b"".join(out))

    async def drained(self) -> None:
        """Return when the peer has read enough for more to be sent. Raises ConnectionLostError."""
        self.flush()
        while self._writable is not None and self.is_open:
            await self._writable.wait()
        if not self.is_open:
            raise ConnectionLostError("the connection was closed")

    def pause_writing(self) -> None:
        """Wait until the peer reads; the transport calls this."""
        self._writable = asyncio.Event()
        if self._stall_seconds is not None and self.is_open:
            self._giving_up = self._loop.call_later(self._stall_seconds, self.abort)
            self._pause(Pause.STALL)

    def resume_writing(self) -> None:
        """Send again, and receive; the transport calls this."""
        self._wake_senders()
        if self._giving_up is not None and self.is_open:
            self._giving_up.cancel()
            self._giving_up = None
        self._resume(Pause.STALL)

    def _wake_senders(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None:
            writable.set()

    # Receiving.

    async def take(self, sock: socket.socket | Secured) -> None:
        """Begin with a connected socket, which is the connection's from here on, whatever comes.

        Where the caller is cancelled the connection is aborted: neither closes what a transport is just made of.
        """
        if isinstance(sock, Secured):
            sock.hand_to(self)
            return
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock = moved_above_standard(sock)
            making = self._loop.create_task(self._make_transport(sock))
            making.add_done_callback(self._transport_failed)
            await self._made  # and not the task: what has arrived by its end may have closed the connection
        except asyncio.CancelledError:
            self.abort()
            await asyncio.wait([making])
            raise
        except OSError as error:
            sock.close()
            self.connection_lost(error)
            raise

    def _transport_failed(self, making: "asyncio.Task[None]") -> None:
        if making.cancelled():
            self._made.cancel()
        elif (error := making.exception()) is not None and not self._made.done():
            self._made.set_exception(error)

    async def _make_transport(self, sock: socket.socket) -> None:
        with above_standard():
            await self._loop.connect_accepted_socket(lambda: self, sock)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin; the transport calls this."""
        self._transport = cast(asyncio.Transport, transport)
        if not self._made.done():
            self._made.set_result(None)
        if self._state is ConnectionState.NEW:
            self._state = _OPEN
        else:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take what has arrived, or keep it while there is a pause; the transport calls this."""
        self._arrived.append(data)
        if not self._pauses:
            self._take()

    def _take(self) -> None:
        """Hand on what has arrived: so much at a time that other connections have their turn."""
        admits = self._admits
        self._is_taking = True  # what is sent meanwhile goes out at its end, and not a turn later
        try:
            while self._state is _OPEN and not self._pauses:
                payload = next(self._payloads, None)
                if payload is not None:
                    if not admits(_MESSAGE_COST):
                        self._payloads = chain((payload,), self._payloads)
                        self._pause(Pause.TURN)
                        break
                    self.received_frames += 1
                    self._received(self._decoder.decode(payload))
                elif self._arrived:
                    size = len(self._arrived[0])
                    if size > _FREE_BYTES and not admits(size >> 10):
                        self._pause(Pause.TURN)
                        break
                    self._payloads = self._frames.feed(self._arrived.popleft())
                else:
                    self._keep_partial()
                    break
        except AsyncCacheError as error:
            log.warning("%s is sent away: %s", self._name, error)
            self.fail(error)
        except Exception as error:
            log.exception("a message could not be handled")
            self.fail(error)
        finally:
            self._is_taking = False
            self.flush()

    def _gives_way(self, cost: int) -> bool:
        """Admit so many messages, and then wait for the loop's next turn."""
        if self._messages_left:
            self._messages_left -= 1
            return True
        self._messages_left = _MESSAGES_AT_ONCE
        self._loop.call_soon(self.resume_turn)
        return False

    def _keep_partial(self) -> None:
        """Tell of what there is of a frame that is not complete."""
        kept_bytes = self._frames.kept_bytes
        if self._partials is None or not (kept_bytes or self._has_partial):
            return
        self._has_partial = bool(kept_bytes)
        if kept_bytes:
            self._partials.keep(self, self.received_frames, kept_bytes)
        else:
            self._partials.drop(self)

    @property
    def is_paused(self) -> bool:
        """Whether nothing is received for a while, which is no fault of the peer."""
        return bool(self._pauses)

    def pause_reading(self) -> None:
        """Receive nothing more until `resume_reading`."""
        self._pause(Pause.OWNER)

    def resume_reading(self) -> None:
        """Receive again, beginning with what has arrived already."""
        self._resume(Pause.OWNER)

    def resume_turn(self) -> None:
        """Go on where `admits` has said no."""
        self._resume(Pause.TURN)

    def _pause(self, reason: Pause) -> None:
        """Receive nothing more: what is not read from the peer takes no memory here."""
        self._pauses.add(reason)
        if self.is_open:
            assert self._transport is not None
            if self._transport.is_reading():
                self._transport.pause_reading()

    def _resume(self, reason: Pause) -> None:
        """Receive again, if that was the last reason not to."""
        self._pauses.discard(reason)
        self._take()
        if self.is_open and not self._pauses:
            assert self._transport is not None
            if not self._transport.is_reading():
                self._transport.resume_reading()

    # The end.

    def close(self) -> None:
        """Close, after what was sent; a peer that does not take it is given up."""
        if self.is_open:
            self.flush()
            self._state = ConnectionState.CLOSING
            self._forget_received()
            assert self._transport is not None
            self._transport.close()
            if self._stall_seconds is not None and self._giving_up is None:
                self._giving_up = self._loop.call_later(self._stall_seconds, self.abort)

    def _forget_received(self) -> None:
        """Nothing is received any more."""
        self._arrived.clear()
        self._payloads = iter(())
        self._frames = FrameReader()
        if self._partials is not None:
            self._partials.drop(self)

    def abort(self) -> None:
        """Close at once."""
        if self._state is not ConnectionState.LOST:
            self._state = ConnectionState.CLOSING
            if self._transport is not None:
                self._transport.abort()

    def fail(self, error: Exception) -> None:
        """Tell the peer why, and close when it has heard that, or after a second.

        It may be sending: where nobody listens any more, that is an error to it before it reads what it was told.
        """
        self.send(failed(0, error))
        if self.is_open and (transport := self._transport) is not None and transport.can_write_eof():
            self.flush()
            self._state = ConnectionState.CLOSING
            self._forget_received()
            seconds = self._stall_seconds if transport.get_write_buffer_size() else None
            if self._giving_up is None:
                self._giving_up = self._loop.call_later(seconds or _HEARS_SECONDS, self.abort)
            transport.set_protocol(_LastWords(transport, self.connection_lost))
            transport.write_eof()
            if not transport.is_reading():
                transport.resume_reading()
        else:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """End; the transport calls this."""
        if self._state is ConnectionState.LOST:
            return
        self._state = ConnectionState.LOST
        self._transport = None
        self._out.clear()
        self._forget_received()
        self._wake_senders()
        if self._giving_up is not None:
            self._giving_up.cancel()
        lost = self._lost
        self._received = self._lost = _ignore  # they know it, and it knows them
        self._admits = _admits_nothing
        lost(error)


class _LastWords(asyncio.Protocol):
    """Waits for a peer that was told why it has to leave. What it still sends is let go, and not without end."""

    def __init__(self, transport: asyncio.Transport, lost: Callable[[Exception | None], None]):
        self._transport, self._lost = transport, lost
        self._left_bytes = _LAST_WORDS_BYTES

    def data_received(self, data: bytes) -> None:
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            self._transport.pause_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(error)


def _ignore(_: Any) -> None:
    return


def _admits_nothing(_: int) -> bool:
    return False
