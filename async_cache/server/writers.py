"""The writers of one connection: what its client fills, in its segment or by frames, and commits."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from operator import attrgetter

from async_cache.errors import ProtocolError, WriterClosedError
from async_cache.handles.writer import WriteChunk, Writer
from async_cache.prompt.layout import Prompt
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.server import costs
from async_cache.server.accounts import Account
from async_cache.server.held import Held, Table
from async_cache.server.segment import ClientSegment
from async_cache.server.turns import Turn

_COPIED_AT_ONCE = 8 * 2**20  # bytes that are copied in a step of the loop, in a millisecond; the rest by threads

_INDEX = attrgetter("index")

Committed = Callable[[Exception | None], None]


class HeldWriter(Held):
    """A writer of a connection, held until it is closed: by its client, from outside, or with the connection."""

    __slots__ = ("_account", "_received_bytes", "_reserved_bytes", "_room_bytes", "_writer")

    def __init__(
        self,
        number: int,
        held: Table,
        connection: Connection,
        writer: Writer,
        account: Account,
        room_bytes: int,
    ):
        super().__init__(number, held, connection)
        self._writer = writer
        self._account = account
        self._room_bytes = room_bytes  # of a chunk
        self._reserved_bytes = len(writer) * room_bytes
        self._received_bytes: dict[int, int] = {}  # by position, of chunks that come in frames

    def chunk(self, position: int) -> WriteChunk:
        """The chunk at a position. Raises ValueError."""
        if position >= len(self._writer):
            raise ValueError(f"position {position} of a store of {len(self._writer)} chunks")
        return self._writer[position]

    def receive(self, position: int, begin: int, data: memoryview) -> None:
        """Fill a chunk from `begin` on, which is where the bytes before these end. Raises ProtocolError."""
        chunk = self.chunk(position)
        views = _views(chunk)
        end = begin + len(data)
        if chunk.committed or begin != self._received_bytes.get(position, 0) or end > _size(views):
            raise ProtocolError("these bytes do not continue those of the chunk")
        self._received_bytes[position] = end
        for view in views:
            part = data[: max(len(view) - begin, 0)]
            view[begin : begin + len(part)] = part
            data, begin = data[len(part) :], max(begin - len(view), 0)
        chunk.let_go()

    def check_received(self, position: int, size_bytes: int) -> None:
        """Check that all bytes of a chunk have come in frames. Raises ValueError; then all have to come again."""
        if self._received_bytes.pop(position, 0) < size_bytes:
            raise ValueError(f"bytes of the chunk at position {position} are missing")

    def committed(self) -> None:
        """A chunk of it is published."""
        size_bytes = min(self._room_bytes, self._reserved_bytes)
        self._reserved_bytes -= size_bytes
        self._account.give("reserved_share", size_bytes)

    def _end(self) -> None:
        self._gone()
        self._account.give("reserved_share", self._reserved_bytes)
        self._reserved_bytes = 0

    def undo(self) -> None:
        """Close it: what was not committed is discarded."""
        self._end()
        self._writer.close()

    def release(self) -> None:
        """Close it from outside: a copy may still write to its room."""
        self._end()
        self._writer.expire()

    def expired(self) -> None:
        """Tell the client that it was closed from outside."""
        self._end()
        self._connection.send(messages.StoreClosed(self._number))


class Writers:
    """The writers of one connection. `copying` is there while a thread copies a chunk.

    Until it has, nothing more is received from the client: one who commits a chunk and then asks for it finds it.
    """

    def __init__(
        self,
        held: Table,
        connection: Connection,
        segment: ClientSegment | None,
        copiers: Executor,
        turn: Turn,
        account: Account,
    ):
        self.copying: asyncio.Future[None] | None = None
        self._held = held
        self._connection = connection
        self._segment = segment
        self._copiers = copiers
        self._turn = turn
        self._account = account
        self._closed = False
        self._copied_bytes = 0  # in this step of the loop
        self._loop = asyncio.get_running_loop()

    async def open(
        self, message: messages.ReserveStore, prompt: Prompt, make: Callable[[int], Writer]
    ) -> messages.StoreReserved:
        """Reserve room for what L1 lacks, as far as the tenant may have it. Raises LimitError where that is nothing.

        `make` makes the writer, of so many chunks at the most.
        """
        account, rooms = self._account, prompt.layout.objects.room_bytes
        room_bytes = rooms[message.rank] if message.rank < len(rooms) else 0
        chunks = max(len(prompt) - message.start_chunk, 0)
        if room_bytes:
            most = account.left("reserved_share") // room_bytes
            if chunks and not most:
                raise account.over("reserved_share", f"which is {account.most['reserved_share']} bytes")
            chunks = min(chunks, most)
        account.store(0)
        writer = make(chunks)
        account.take("reserved_share", chunks * room_bytes)
        try:
            await writer
            account.store(len(writer) * room_bytes)  # others may have stored too much meanwhile
        except BaseException:
            writer.close()
            account.give("reserved_share", chunks * room_bytes)
            raise
        account.give("reserved_share", (chunks - len(writer)) * room_bytes)
        HeldWriter(message.number, self._held, self._connection, writer, account, room_bytes)
        return messages.StoreReserved(message.number, list(map(_INDEX, writer[:])), writer.shortfall)

    def expired(self, number: int) -> None:
        """Tell the client that the writer of this number was closed from outside."""
        held = self._find(number)
        if held is not None:
            held.expired()

    def _find(self, number: int) -> HeldWriter | None:
        held = self._held.get(number)
        return held if isinstance(held, HeldWriter) else None

    def receive(self, message: messages.StoreData) -> None:
        """Take bytes of a chunk, one piece behind the other. For a writer that has expired they are too late.

        This is not answered: what is missing is told by the commit. Raises ProtocolError.
        """
        held = self._find(message.store)
        if held is not None:
            try:
                held.receive(message.position, message.offset, message.data)
            except ValueError as error:
                raise ProtocolError(str(error)) from error

    def commit(self, message: messages.CommitStore, committed: Committed) -> None:
        """Publish a chunk, now or when a thread has copied it, and say so. What was there before is never published.

        Raises WriterClosedError, and ValueError for bytes that are not there.
        """
        held = self._find(message.store)
        if held is None:
            raise WriterClosedError("the writer is closed")
        chunk = held.chunk(message.position)
        if not chunk.committed:
            views = _views(chunk)
            self._turn.charge(costs.of_bytes(_size(views)) + len(views))
            if message.offset is None:
                held.check_received(message.position, _size(views))
            elif self._segment is None:
                raise ValueError("the connection has no segment to copy from")
            elif self._has_time_for(_size(views)):
                self._segment.copy(message.offset, views)
            else:
                self.copying = self._loop.run_in_executor(self._copiers, self._segment.copy, message.offset, views)
                self.copying.add_done_callback(partial(self._copied, held, chunk, committed))
                self._connection.pause_reading()
                return
            chunk.commit()
            chunk.let_go()
            held.committed()
        committed(None)

    def _has_time_for(self, size_bytes: int) -> bool:
        """Whether so much is copied in this step of the loop, without a thread."""
        if not self._copied_bytes:
            self._loop.call_soon(self._begin_step)
        self._copied_bytes += size_bytes
        return self._copied_bytes <= _COPIED_AT_ONCE

    def _begin_step(self) -> None:
        self._copied_bytes = 0

    def _copied(
        self, held: HeldWriter, chunk: WriteChunk, committed: Committed, copying: "asyncio.Future[None]"
    ) -> None:
        self.copying = None
        error: Exception | None = None
        try:
            copying.result()
            chunk.commit()
            chunk.let_go()
            held.committed()
        except Exception as failure:
            error = failure
        self._close_segment()
        committed(error)
        self._connection.resume_reading()

    def discard(self, number: int) -> None:
        """Close the writer of this number, if there is one that is open: what was not committed is discarded."""
        held = self._find(number)
        if held is not None:
            held.undo()

    def close(self) -> None:
        """Give up the segment, when no copy reads it any more: all writers were released."""
        self._closed = True
        self._close_segment()

    def _close_segment(self) -> None:
        if self._closed and self.copying is None and self._segment is not None:
            self._segment.close()
            self._segment = None


def _views(chunk: WriteChunk) -> Sequence[memoryview]:
    return [view for view in chunk.views if view is not None]


def _size(views: Sequence[memoryview]) -> int:
    return sum(map(len, views))
