"""A TCP proxy before a server, for tests of what a client does when the network fails.

    async with Proxy("127.0.0.1", server_port) as proxy:
        client = await connect("127.0.0.1", proxy.port)
        proxy.stall()           # nothing passes any more, and nobody is told

It knows no protocol. What it does, it does to all its connections, those that are there and those that come.
"""

import asyncio
import socket
import struct
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

PIECE_BYTES = 64 * 1024
AHEAD_PIECES = 16  # on their way, in each direction of a connection: then the sender waits, as for a slow network
TURNS_PER_SECOND = 100  # of a throttled connection


class Proxy:
    """Passes bytes between its clients and a server, until it is told otherwise.

    `delay_seconds` is the latency of each direction, and `bytes_per_second` the bandwidth of each direction of a
    connection (None: no bound); both may be changed at any time. It listens on loopback, at `port`, while it is open.
    """

    def __init__(
        self, host: str, port: int, *, delay_seconds: float = 0.0, bytes_per_second: float | None = None
    ) -> None:
        self.delay_seconds = delay_seconds
        self.bytes_per_second = bytes_per_second
        self.port = 0
        self.connections = 0
        """How many were accepted so far."""
        self.passed_bytes = 0
        """How much went to clients so far."""
        self._target = (host, port)
        self._listener: socket.socket | None = None
        self._accepted: set[socket.socket] = set()  # of which the task has not begun
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()  # of both ends
        self._clients: set[asyncio.StreamWriter] = set()
        self._over: set[asyncio.StreamWriter] = set()  # clients that were told that this is the end
        self._flows = asyncio.Event()
        self._flows.set()
        self._cut_after: int | None = None

    async def open(self) -> None:
        """Listen; from the second time on, at the same port as before."""
        listener = self._listener = socket.create_server(("127.0.0.1", self.port))
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    async def close(self) -> None:
        """End all connections, and listen no more; idempotent."""
        await self.refuse()
        self.cut()
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for sock in self._accepted:  # as it closed: their tasks ended before they began
            sock.close()
        self._accepted.clear()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # What the network does.

    def stall(self) -> None:
        """Let nothing pass: connections stay, and new ones are made, but no byte arrives. `resume` ends it."""
        self._flows.clear()

    def resume(self) -> None:
        """Let pass what waits, and all that follows."""
        self._flows.set()

    def cut(self) -> None:
        """Let clients see the end of their connections (FIN), wherever these are; what they still send is dropped."""
        for writer in self._clients - self._over:
            self._over.add(writer)
            with suppress(OSError):
                writer.write_eof()

    def reset(self) -> None:
        """Break all connections (RST)."""
        for writer in list(self._writers):
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def cut_after(self, count: int) -> None:
        """Let so many more bytes of the server pass, over all connections, and then close them all, once."""
        self._cut_after = count

    async def refuse(self) -> None:
        """Refuse new connections until `open`; those that are there stay."""
        listener, self._listener = self._listener, None
        if listener is not None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()

    # Connections.

    def _accept(self, listener: socket.socket) -> None:
        """Accept a connection, in one step: asyncio's own server takes several, and may close amid them."""
        with suppress(OSError):  # it has gone already
            sock, _ = listener.accept()
            self.connections += 1
            self._accepted.add(sock)
            self._start(self._connect(sock))

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _connect(self, sock: socket.socket) -> None:
        """Connect to the server, and pass bytes both ways until either end closes."""
        self._accepted.discard(sock)
        reader, writer = await asyncio.open_connection(sock=sock)
        self._writers.add(writer)
        self._clients.add(writer)
        others = None
        try:
            await self._flows.wait()
            try:
                others = await asyncio.open_connection(*self._target)
            except OSError:
                return
            self._writers.add(others[1])
            ways = {
                self._start(self._pass(reader, others[1], is_down=False)),
                self._start(self._pass(others[0], writer, is_down=True)),
            }
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.wait(ways)
        finally:
            for end in (writer, others[1] if others else None):
                if end is not None:
                    end.close()
                    for ends in (self._writers, self._clients, self._over):
                        ends.discard(end)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_down: bool) -> None:
        """One direction of a connection: what was read is written when its time has come."""
        clock = asyncio.get_running_loop().time
        ahead: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(AHEAD_PIECES)

        async def read() -> None:
            data = b"any"
            while data:
                try:
                    data = await reader.read(self._piece_bytes())
                except OSError:
                    data = b""
                await ahead.put((clock() + self.delay_seconds, data))

        reading = self._start(read())
        try:
            while True:
                due, data = await ahead.get()
                if not data:
                    return
                await asyncio.sleep(due - clock())
                await self._flows.wait()
                if self.bytes_per_second is not None:
                    await asyncio.sleep(len(data) / self.bytes_per_second)
                data = self._counted(data) if is_down else data
                if writer not in self._over:
                    writer.write(data)
                    if self._cut_after == 0:
                        self._cut_after = None
                        self.cut()
                    await writer.drain()
        except OSError:
            return
        finally:
            reading.cancel()

    def _piece_bytes(self) -> int:
        """As much as passes at a time: little where the network is slow."""
        if self.bytes_per_second is None:
            return PIECE_BYTES
        return max(1, min(PIECE_BYTES, int(self.bytes_per_second / TURNS_PER_SECOND)))

    def _counted(self, data: bytes) -> bytes:
        """What of the server's bytes may still pass."""
        if self._cut_after is not None:
            data = data[: self._cut_after]
            self._cut_after -= len(data)
        self.passed_bytes += len(data)
        return data
