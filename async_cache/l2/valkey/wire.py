"""One connection to a server: commands out, replies in, and who reads them decides where their bytes land."""

import asyncio
import socket
from collections.abc import Iterable
from typing import Protocol, cast

from async_cache.errors import BackendError
from async_cache.l2.valkey.replies import Lines, Reply, Tree

TURN_BYTES = 4 * 2**20  # read in one go, though more is there (uvloop reads 32 times): a millisecond, with hashing
HIGH_WATER_BYTES = 512 * 1024  # unsent, after which a writer waits


class Reader(Protocol):
    """What becomes of the bytes that arrive."""

    done: "asyncio.Future[object]"

    def buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""

    def received(self, count: int) -> None:
        """So many bytes have arrived there. Raises BackendError for what is no reply to what was asked."""


class Wire(asyncio.BufferedProtocol):
    """A connection that one call has at a time: the call reads its replies, or else the connection ends with it.

    Bytes arrive in the buffer of the reader, and nowhere after `abort`, which takes effect at once. A connection that
    is lost ends the call with BackendError.
    """

    def __init__(self, name: str):
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader: Reader | None = None
        self._resumed: asyncio.Future[None] | None = None  # while the other end is too slow
        self._error: BackendError | None = None
        self._turn_bytes = 0
        self._nowhere = memoryview(bytearray(256))
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done when the socket is closed."""

    @property
    def is_open(self) -> bool:
        """Whether it can be asked."""
        return self._error is None and self._transport is not None

    async def ask(self, commands: bytes, count: int) -> list[bytes]:
        """Send commands, and return as many replies; each must be of one line. Raises BackendError."""
        lines = Lines(count)
        await self.exchange(lines, (commands,))
        return lines.lines

    async def ask_tree(self, command: bytes) -> Reply:
        """Send a command, and return its reply, of any shape. Raises BackendError."""
        tree = Tree()
        await self.exchange(tree, (command,))
        return tree.reply

    async def exchange(self, reader: Reader, parts: Iterable[bytes] = ()) -> None:
        """Send something, and let the reader read until it is done. Raises BackendError."""
        self.read_with(reader)
        self.send(parts)
        await self.finish()

    def read_with(self, reader: Reader) -> None:
        """Let a reader have what arrives from now on. Raises BackendError where the connection is lost."""
        self.check()
        assert self._reader is None, "a connection has one call at a time"
        self._reader = reader

    async def finish(self) -> None:
        """Wait until the reader is done, and let it go."""
        assert self._reader is not None
        try:
            await self._reader.done
        finally:
            self._reader = None

    def send(self, parts: Iterable[bytes | memoryview]) -> None:
        """Send bytes, which must not change until the reader is done or the connection ended."""
        if self._transport is not None and self._error is None:
            for part in parts:
                self._transport.write(part)

    def expect(self, size_bytes: int) -> None:
        """Say how much may be on its way to us at most: what a sender of values has to be told.

        The kernel would find a window by itself, of up to 32 MiB, and a reader that hashes never comes near half of it.
        Then it acknowledges late, and a sender waits for that: a third of a load. It forgets what it is told here.
        """
        if self._transport is not None and self._error is None:
            sock = self._transport.get_extra_info("socket")
            if sock is not None and sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, size_bytes)

    async def drained(self) -> None:
        """Wait until the other end has taken most of what was sent. Raises BackendError."""
        if self._resumed is not None:
            await self._resumed
        else:
            await asyncio.sleep(0)
        self.check()

    def check(self) -> None:
        """Raises BackendError where the connection is lost."""
        if self._error is not None:
            raise self._error

    def abort(self, why: str = "the connection was given up") -> None:
        """Close the connection, and let go of every buffer before this returns; idempotent."""
        if self._error is None:
            self._error = BackendError(f"{self._name}: {why}")
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done.done():
            reader.done.set_exception(self._error)
            reader.done.exception()  # looked at: who was cancelled does not
        if self._transport is not None:
            self._transport.abort()
        self.resume_writing()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._nowhere if self._reader is None else self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._reader is None:
            self.abort("the server said something that it was not asked")
            return
        if self._reader.done.cancelled():  # in this turn: who waited has not had his own yet
            self.abort()
            return
        try:
            self._reader.received(nbytes)
        except BackendError as error:
            self.abort(str(error))
            return
        self._turn_bytes += nbytes
        if self._turn_bytes >= TURN_BYTES and self._transport is not None:
            self._transport.pause_reading()
            self._loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        """Read on, after others had their turn."""
        self._turn_bytes = 0
        if self.is_open and self._transport is not None:
            self._transport.resume_reading()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.abort(f"the connection was lost: {exc}" if exc is not None else "the server closed the connection")
        self._transport = None
        if not self.ended.done():
            self.ended.set_result(None)

    def pause_writing(self) -> None:
        self._resumed = self._loop.create_future()

    def resume_writing(self) -> None:
        resumed, self._resumed = self._resumed, None
        if resumed is not None and not resumed.done():
            resumed.set_result(None)

    def __repr__(self) -> str:
        return f"<Wire to {self._name}, {'open' if self.is_open else 'closed'}>"
