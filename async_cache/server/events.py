"""The events that a connection reads: pushed in batches, as fast as its client takes them."""

import asyncio

from async_cache.errors import AsyncCacheError, ConnectionLostError
from async_cache.handles.events import EventStream
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.server.held import Held, Table

MAX_STREAMS = 16  # of a connection: half a megabyte each, where nobody reads


class HeldEvents(Held):
    """A stream of events, held until the client gives it up, the cache closes or the connection ends.

    What a slow client leaves untaken waits in the stream, which is bounded, and not in the connection.
    """

    __slots__ = ("_stream", "task")

    def __init__(self, number: int, held: Table, connection: Connection, stream: EventStream):
        super().__init__(number, held, connection)
        self._stream = stream
        held.streams += 1
        connection.send(messages.Happened(number, []))
        self.task = asyncio.get_running_loop().create_task(self._push())
        self.task.add_done_callback(lambda _: self._end())

    async def _push(self) -> None:
        try:
            while True:
                self._connection.send(messages.Happened(self._number, await self._stream.batch()))
                await self._connection.drained()
        except (StopAsyncIteration, ConnectionLostError, asyncio.CancelledError):
            return  # as the root of its task, which else would keep where it was cancelled, and that this
        except AsyncCacheError as error:
            self._connection.send(messages.failed(self._number, error))

    def _gone(self) -> None:
        if self.is_held:
            self._held.streams -= 1
            super()._gone()

    def _end(self) -> None:
        self._gone()
        self._stream.close()

    def undo(self) -> None:
        """Push nothing more, and say so."""
        self.task.cancel()
        self._connection.send(messages.Failed(self._number, "cancelled", "the client gave it up"))
        self._gone()

    def release(self) -> None:
        """Push nothing more: the connection is gone."""
        self.task.cancel()
