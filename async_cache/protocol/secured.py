"""TLS below a connection: the handshake, and the greeting that goes over it."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Self, cast

from async_cache.errors import ConnectionLostError, ProtocolError
from async_cache.protocol.certificates import reason
from async_cache.protocol.descriptors import above_standard, moved_above_standard
from async_cache.protocol.frames import HEADER_BYTES, MAX_GREETING_BYTES, check_size

_HANDSHAKE = b"\x16\x03"  # begins every connection by TLS, and the third byte is not 0
_RECORD_BYTES = 5  # of the header of a record, of which the last two are its length
_MOST_RECORD_BYTES = 2**14
_CLOSED = "the other end closed the connection after the handshake, as one does that wants another certificate"
_SHUTDOWN_SECONDS = 1.0  # for the other end to say that it closes, too


def looks_like_tls(data: bytes) -> bool:
    """Whether the first bytes of a connection begin a handshake, and not a frame of a greeting, which is short."""
    return data[:2] == _HANDSHAKE[: len(data)] and data[2:3] != b"\0"


class Secured(asyncio.Protocol):
    """A connection by TLS on which one frame has been said by each end at most.

    It stands where a socket would: a greeting goes over it, and then it is a `Connection`'s, or it is closed.
    """

    family = socket.AF_INET

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._lost: Exception | None = None
        self._came = asyncio.Event()

    @classmethod
    async def accept(cls, sock: socket.socket, context: ssl.SSLContext, turn: Callable[[], Awaitable[None]]) -> Self:
        """Shake hands with a client. Raises ProtocolError; one that speaks no TLS may still be told so by the socket.

        The caller sees to an end of the wait. What takes long begins in its `turn`, when the client's hello is there.
        The socket is this one's from the handshake on, and closed if that fails.
        """
        await readable(sock)
        if not looks_like_tls(sock.recv(_RECORD_BYTES, socket.MSG_PEEK)):
            raise ProtocolError("this address speaks TLS: connect to tls://host:port")
        await readable(sock, _RECORD_BYTES)
        length = int.from_bytes(sock.recv(_RECORD_BYTES, socket.MSG_PEEK)[3:], "big")
        await readable(sock, min(_RECORD_BYTES + length, _MOST_RECORD_BYTES))
        await turn()
        made = cls()
        loop = asyncio.get_running_loop()
        try:
            await made._shake(
                sock,
                lambda sock: loop.connect_accepted_socket(
                    lambda: made, sock, ssl=context, ssl_shutdown_timeout=_SHUTDOWN_SECONDS
                ),
            )
        except OSError as error:
            raise ProtocolError(f"no TLS with this client: {reason(error)}") from error
        return made

    @classmethod
    async def connect(cls, sock: socket.socket, context: ssl.SSLContext, host: str) -> Self:
        """Shake hands with a server that has to be this host. Raises OSError, such as `ssl.SSLError`."""
        made = cls()
        loop = asyncio.get_running_loop()
        await made._shake(
            sock,
            lambda sock: loop.create_connection(
                lambda: made, sock=sock, ssl=context, server_hostname=host, ssl_shutdown_timeout=_SHUTDOWN_SECONDS
            ),
        )
        return made

    async def _shake(
        self,
        sock: socket.socket,
        begin: "Callable[[socket.socket], Coroutine[Any, Any, tuple[asyncio.Transport, Self]]]",
    ) -> None:
        sock = moved_above_standard(sock)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with above_standard():
                await begin(sock)
        except BaseException:
            if self._transport is not None:
                self._transport.abort()
            sock.close()  # the same object as the transport's, if there was one: it is closed once
            raise

    # What a transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin: hands are shaken."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Keep what comes, of no more than one frame and what came with it."""
        self._received += data
        if self._is_complete() and self._transport is not None:
            self._transport.pause_reading()
        self._came.set()

    def connection_lost(self, error: Exception | None) -> None:
        """End."""
        self._lost = error if isinstance(error, ssl.SSLError) else ConnectionLostError(_CLOSED)
        self._came.set()

    # The greeting.

    async def receive(self) -> bytes:
        """The payload of the first frame. Raises ProtocolError, and where the other end is gone ConnectionLostError or
        what TLS says of it.
        """
        while not self._is_complete():
            if self._lost is not None:
                raise self._lost
            self._came.clear()
            await self._came.wait()
            if len(self._received) >= HEADER_BYTES:
                check_size(self._length(), MAX_GREETING_BYTES)
        end = HEADER_BYTES + self._length()
        payload = bytes(self._received[HEADER_BYTES:end])
        del self._received[:end]
        return payload

    def _length(self) -> int:
        return int.from_bytes(self._received[:HEADER_BYTES], "little")

    def _is_complete(self) -> bool:
        return len(self._received) >= HEADER_BYTES and len(self._received) >= HEADER_BYTES + self._length()

    def send(self, data: bytes) -> None:
        """Send a frame; it is short."""
        if self._transport is not None:
            self._transport.write(data)

    def hand_to(self, connection: asyncio.Protocol) -> None:
        """Be a connection's from here on, with all that has come."""
        transport, self._transport = self._transport, None
        if transport is None or self._lost is not None:
            connection.connection_lost(self._lost)
            return
        transport.resume_reading()
        transport.set_protocol(connection)
        connection.connection_made(transport)
        if self._received:
            connection.data_received(bytes(self._received))

    def close(self) -> None:
        """Close, after what was sent; nothing where it is a connection's."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once: to wait until the other end closes, too, would take a second that its loop may not have."""
        if self._transport is not None:
            self._transport.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def readable(sock: socket.socket, size_bytes: int = 1) -> None:
    """Return when there is so much to receive, or the other end is gone."""
    if size_bytes > 1:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)
        if size_bytes > 1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
