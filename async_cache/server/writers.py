"""The writers of one connection: what its client fills, in its segment or by frames, and commits."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial

from async_cache.errors import ProtocolError, WriterClosedError
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.server.segment import ClientSegment
from async_cache.write.writer import WriteChunk, Writer

_COPIED_AT_ONCE = 8 * 2**20  # bytes that are copied in a step of the loop, in a millisecond; the rest by threads


class Stores:
    """By the number of the message that opened them. `copying` is there while a thread copies a chunk.

    Until it has, nothing more is received from the client: whoever commits a chunk and then asks for it finds it.
    """

    def __init__(self, segment: ClientSegment | None, copiers: Executor, connection: Connection):
        self.writers: dict[int, Writer] = {}
        self.copying: asyncio.Future[None] | None = None
        self._segment = segment
        self._copiers = copiers
        self._connection = connection
        self._closed = False
        self._received_bytes: dict[WriteChunk, int] = {}
        self._copied_bytes = 0  # in this step of the loop
        self._loop = asyncio.get_running_loop()

    async def open(self, number: int, writer: Writer) -> messages.StoreReserved:
        """Reserve."""
        await writer
        self.writers[number] = writer
        writer.on_expired = partial(self._expired, number)
        return messages.StoreReserved(number, [chunk.index for chunk in writer], writer.shortfall)

    def _expired(self, number: int) -> None:
        if self._forget(number) is not None:
            self._connection.send(messages.StoreClosed(number))

    def data(self, message: messages.StoreData) -> None:
        """Take bytes of a chunk, one piece behind the other. For a store that has expired they are too late.

        This is not answered: what is missing is told by the commit. Raises ProtocolError.
        """
        if message.store not in self.writers:
            return
        chunk = self._chunk(message.store, message.position)
        data, begin = message.data, message.offset
        views = _views(chunk)
        in_order = begin == self._received_bytes.get(chunk, 0)
        if chunk.committed or not in_order or begin + len(data) > _size(views):
            raise ProtocolError("these bytes do not continue those of the chunk")
        self._received_bytes[chunk] = begin + len(data)
        for view in views:
            part = data[: max(len(view) - begin, 0)]
            view[begin : begin + len(part)] = part
            data, begin = data[len(part) :], max(begin - len(view), 0)

    def commit(self, message: messages.CommitStore, done: Callable[[Exception | None], None]) -> None:
        """Publish a chunk, now or when a thread has copied it, and say so. What was there before is never published."""
        chunk = self._chunk(message.store, message.position)
        if not chunk.committed:
            views = _views(chunk)
            if message.offset is None:
                if self._received_bytes.pop(chunk, 0) < _size(views):
                    raise ValueError(f"bytes of the chunk at position {message.position} are missing")
            elif self._segment is None:
                raise ValueError("the connection has no segment to copy from")
            elif self._has_time_for(_size(views)):
                self._segment.copy(message.offset, views)
            else:
                self.copying = self._loop.run_in_executor(self._copiers, self._segment.copy, message.offset, views)
                self.copying.add_done_callback(partial(self._copied, chunk, done))
                self._connection.hold_up()
                return
        chunk.commit()
        done(None)

    def _has_time_for(self, size_bytes: int) -> bool:
        if not self._copied_bytes:
            self._loop.call_soon(self._forget_copied)
        self._copied_bytes += size_bytes
        return self._copied_bytes <= _COPIED_AT_ONCE

    def _forget_copied(self) -> None:
        self._copied_bytes = 0

    def _copied(
        self, chunk: WriteChunk, done: Callable[[Exception | None], None], copying: "asyncio.Future[None]"
    ) -> None:
        self.copying = None
        error: Exception | None = None
        try:
            copying.result()
            chunk.commit()
        except Exception as failure:
            error = failure
        self._close_segment()
        done(error)
        self._connection.go_on()

    def _chunk(self, store: int, position: int) -> WriteChunk:
        writer = self.writers.get(store)
        if writer is None:
            raise WriterClosedError("the writer is closed")
        if position >= len(writer):
            raise ValueError(f"position {position} of a store of {len(writer)} chunks")
        return writer[position]

    def close(self, number: int) -> None:
        """Discard what was not committed."""
        writer = self._forget(number)
        if writer is not None:
            writer.close()

    def _forget(self, number: int) -> Writer | None:
        writer = self.writers.pop(number, None)
        if writer is not None and self._received_bytes:
            for chunk in writer:
                self._received_bytes.pop(chunk, None)
        return writer

    def close_all(self) -> None:
        """The connection is gone: give back all room that no copy writes to, and the segment when no copy reads it."""
        for number in list(self.writers):
            writer = self._forget(number)
            assert writer is not None
            writer.expire()  # and not `close`: a copy may still write to its room
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
