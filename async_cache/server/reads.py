"""The reads of one connection: leases, and their bytes in frames where the client does not map the arena."""

import asyncio
from collections.abc import Callable, Iterator

from async_cache.handles.lease import ReadLease
from async_cache.prompt.layout import ModelLayout
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.frames import DATA_BYTES
from async_cache.values import LoadResult


class Reads:
    """By the number of the message that acquired them."""

    def __init__(self, connection: Connection, memory: memoryview, *, mapped: bool):
        self.leases: dict[int, ReadLease] = {}
        self._connection = connection
        self._memory = memory
        self._mapped = mapped
        self._turn = asyncio.Lock()  # to send a piece: all others that wait need not wake for each

    async def acquire(
        self,
        message: messages.AcquireRead,
        lease: ReadLease,
        describe: Callable[[ModelLayout], int | messages.Layout],
        unscoped: Callable[[LoadResult], LoadResult],
    ) -> None:
        """Wait for the load, say what there is to read, and send it if it must be sent."""
        await lease
        self.leases[message.number] = lease
        block_bytes = lease.layout.block_bytes[message.rank]
        data_bytes = 0 if self._mapped else sum(end - begin for _, begin, end in _spans(lease))
        offsets = [chunk.offset for chunk in lease]
        if not self._mapped:
            offsets = [n * block_bytes if offset is not None else None for n, offset in enumerate(offsets)]
        self._connection.send(
            messages.ReadAcquired(
                message.number,
                unscoped(lease.result),
                describe(lease.layout),
                offsets,
                _absent(lease, message.rank),
                buffer_bytes=len(lease) * block_bytes if data_bytes else 0,
                data_bytes=data_bytes,
            )
        )
        if not data_bytes:
            return
        for to, begin, end in _pieces(lease, block_bytes):
            async with self._turn:
                await self._connection.drained()
                if self.leases.get(message.number) is not lease:
                    return
                self._connection.send(messages.ReadData(message.number, to, self._memory[begin:end]))

    def release(self, number: int) -> None:
        """Leave."""
        lease = self.leases.pop(number, None)
        if lease is not None:
            lease.release()

    def undo(self, number: int) -> None:
        """Leave as if it had not been acquired."""
        lease = self.leases.pop(number, None)
        if lease is not None:
            lease.undo()

    def release_all(self) -> None:
        """The connection is gone."""
        for number in list(self.leases):
            self.release(number)
        self._memory.release()


def _absent(lease: ReadLease, rank: int) -> list[tuple[int, list[int]]]:
    """By position, the groups that can not be read of a chunk whose block is there."""
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
