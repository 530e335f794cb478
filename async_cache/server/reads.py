"""The reads of one connection: leases, and their bytes in frames where the client does not map the arena."""

from collections.abc import Callable

from async_cache.layout import ModelLayout
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.frames import DATA_BYTES
from async_cache.reading import ReadLease
from async_cache.values import LoadResult


class Reads:
    """By the number of the message that acquired them."""

    def __init__(self, connection: Connection, memory: memoryview, *, mapped: bool):
        self.leases: dict[int, ReadLease] = {}
        self._connection = connection
        self._memory = memory
        self._mapped = mapped

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
        pieces = [] if self._mapped else _pieces(lease, block_bytes)
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
                buffer_bytes=len(lease) * block_bytes if pieces else 0,
                data_bytes=sum(end - begin for _, begin, end in pieces),
            )
        )
        for to, begin, end in pieces:
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
    held = lease.layout.rank_masks[rank]
    return [
        (n, [group for group, span in enumerate(chunk.spans()) if span is None])
        for n, chunk in enumerate(lease)
        if chunk.offset is not None and held & ~chunk.objects
    ]


def _pieces(lease: ReadLease, block_bytes: int) -> list[tuple[int, int, int]]:
    """(where it goes in the client's buffer, begin and end in memory) of bounded pieces of what can be read."""
    return [
        (n * block_bytes + first - chunk.offset, first, min(first + DATA_BYTES, end))
        for n, chunk in enumerate(lease)
        if chunk.offset is not None
        for begin, end in filter(None, chunk.spans())
        for first in range(begin, end, DATA_BYTES)
    ]
