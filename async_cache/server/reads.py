"""The reads of one connection: leases, and their bytes in frames where the client does not map the arena."""

import asyncio
from collections.abc import Iterator

from async_cache.handles.lease import ReadLease
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.frames import DATA_BYTES
from async_cache.server.access import Scope
from async_cache.server.held import Held
from async_cache.server.layouts import Layouts


class Read(Held):
    """A lease that a connection has entered, held until it is released."""

    __slots__ = ("_lease", "sending")

    def __init__(self, number: int, held: dict[int, Held], connection: Connection, lease: ReadLease):
        super().__init__(number, held, connection)
        self._lease = lease
        self.sending: Held | None = None
        """What sends its bytes, where they have to be sent."""

    def undo(self) -> None:
        """Leave it, so that it may be entered again."""
        self._gone()
        self._lease.undo()
        if self.sending is not None:
            self.sending.undo()

    def release(self) -> None:
        """Leave it."""
        self._gone()
        self._lease.release()
        if self.sending is not None:
            self.sending.release()


class Reads:
    """The reads of one connection, from `memory`: the arena, which the client sees itself if it is `mapped`."""

    def __init__(
        self,
        held: dict[int, Held],
        connection: Connection,
        memory: memoryview,
        layouts: Layouts,
        scope: Scope,
        *,
        mapped: bool,
    ):
        self._held = held
        self._connection = connection
        self._memory = memory
        self._layouts = layouts
        self._scope = scope
        self._mapped = mapped
        self._turn = asyncio.Lock()  # to send a piece: all others that wait need not wake for each

    async def acquire(self, message: messages.AcquireRead, lease: ReadLease) -> None:
        """Wait for the load, say what there is to read, and send it if it must be sent."""
        await lease
        wait = self._held[message.number]
        read = Read(message.number, self._held, self._connection, lease)
        block_bytes = lease.layout.block_bytes[message.rank]
        data_bytes = 0 if self._mapped else sum(end - begin for _, begin, end in _spans(lease))
        offsets = [chunk.offset for chunk in lease]
        if not self._mapped:
            offsets = [n * block_bytes if offset is not None else None for n, offset in enumerate(offsets)]
        self._connection.send(
            messages.ReadAcquired(
                message.number,
                self._scope.outer(lease.result),
                self._layouts.describe(lease.layout),
                offsets,
                _absent(lease, message.rank),
                buffer_bytes=len(lease) * block_bytes if data_bytes else 0,
                data_bytes=data_bytes,
            )
        )
        if data_bytes:
            read.sending = wait
            await self._send(message.number, read, lease, block_bytes)

    async def _send(self, number: int, read: Read, lease: ReadLease, block_bytes: int) -> None:
        for to, begin, end in _pieces(lease, block_bytes):
            async with self._turn:
                await self._connection.drained()
                if not read.is_held:
                    return
                self._connection.send(messages.ReadData(number, to, self._memory[begin:end]))

    def release(self, number: int) -> None:
        """Release the read of this number, if there is one that was entered."""
        read = self._held.get(number)
        if isinstance(read, Read):
            read.release()

    def close(self) -> None:
        """Look at the arena no more: all reads were released."""
        self._memory.release()


def _absent(lease: ReadLease, rank: int) -> list[tuple[int, list[int]]]:
    """By position, the groups that cannot be read of a chunk whose block is there."""
    held = lease.layout.objects.rank_masks[rank]
    return [
        (n, [group for group, span in enumerate(chunk.spans()) if span is None])
        for n, chunk in enumerate(lease)
        if chunk.offset is not None and held & ~chunk.objects
    ]


def _spans(lease: ReadLease) -> Iterator[tuple[int, int, int]]:
    """(position of the chunk, begin and end in memory) of what can be read."""
    for n, chunk in enumerate(lease):
        for span in chunk.spans():
            if span is not None:
                yield n, *span


def _pieces(lease: ReadLease, block_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(where it goes in the client's buffer, begin and end in memory) of bounded pieces of what can be read."""
    for n, begin, end in _spans(lease):
        to = n * block_bytes - (lease[n].offset or 0)
        for first in range(begin, end, DATA_BYTES):
            yield to + first, first, min(first + DATA_BYTES, end)
