"""The reads of one connection: leases, and their bytes in frames where the client does not map the arena."""

import asyncio
from collections.abc import Iterator
from itertools import islice

from async_cache.handles.lease import ReadChunk, ReadLease
from async_cache.prompt.layout import ModelLayout
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.frames import DATA_BYTES
from async_cache.server import costs
from async_cache.server.access import Scope
from async_cache.server.accounts import Account
from async_cache.server.held import Held
from async_cache.server.layouts import Layouts
from async_cache.server.prefetches import Holders, Holding
from async_cache.server.turns import LIGHT, Turn

_AT_ONCE = 2 * LIGHT  # objects that may be looked at
_ANSWER_BYTES = 8  # for each chunk, or each object that cannot be read of it


class Read(Held):
    """A lease that a connection has entered, held until it is released. `answering` tells of it, and sends it."""

    __slots__ = ("_answering", "_expiry", "_holding", "_lease")

    def __init__(
        self,
        number: int,
        held: dict[int, Held],
        connection: Connection,
        lease: ReadLease,
        answering: Held,
        holding: Holding | None,
    ):
        super().__init__(number, held, connection)
        self._lease = lease
        self._answering = answering
        self._expiry: asyncio.TimerHandle | None = None
        self._holding = holding

    def expires_after(self, seconds: float) -> None:
        """Have its bytes come no more once its request is over, and so many seconds have passed."""
        self._expiry = asyncio.get_running_loop().call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        if self._holding is not None and self._holding.held:
            self.expires_after(seconds)  # its request is not over
        else:
            self.release()
            error = "lease_ttl_seconds: the request is over, and the read was not left"
            self._connection.send(messages.Failed(self._number, "limit", error))

    def _end(self) -> None:
        self._gone()
        if self._expiry is not None:
            self._expiry.cancel()

    def undo(self) -> None:
        """Leave it, so that it may be entered again."""
        self._end()
        self._lease.undo()
        self._answering.undo()

    def release(self) -> None:
        """Leave it."""
        self._end()
        self._lease.release()
        self._answering.release()


class Reads:
    """The reads of one connection, from `memory`: the arena, which the client sees itself if it is `mapped`."""

    def __init__(
        self,
        held: dict[int, Held],
        connection: Connection,
        memory: memoryview,
        layouts: Layouts,
        scope: Scope,
        turn: Turn,
        holders: Holders,
        account: Account,
        *,
        lease_seconds: float | None,
        mapped: bool,
    ):
        self._held = held
        self._connection = connection
        self._memory = memory
        self._layouts = layouts
        self._scope = scope
        self._turn = turn
        self._holders = holders
        self._account = account
        self._lease_seconds = lease_seconds
        self._mapped = mapped
        self._order = asyncio.Lock()  # to send a piece: all others that wait need not wake for each

    async def acquire(self, message: messages.AcquireRead, lease: ReadLease) -> None:
        """Wait for the load, say what there is to read, and send it if it must be sent."""
        await lease
        holding = self._holders.find(self._scope.inner(message.request_id))
        read = Read(message.number, self._held, self._connection, lease, self._held[message.number], holding)
        if self._lease_seconds is not None:
            read.expires_after(self._lease_seconds)
        if len(lease) * len(lease.layout.groups) <= _AT_ONCE:
            answer = self._answer(message, lease)
            self._add(answer, message.rank, lease, 0, len(lease))
            self._connection.send(answer)
        else:
            await self._tell(message, lease)
        if not self._mapped:
            await self._send(message, read, lease)

    async def _tell(self, message: messages.AcquireRead, lease: ReadLease) -> None:
        """Say what there is to read, where that is much: a part in each turn, and not before others are read."""
        answer = self._answer(message, lease)
        step = max(1, _AT_ONCE // len(lease.layout.groups))
        for begin in range(0, len(lease), step):
            await self._turn.comes(LIGHT)
            self._add(answer, message.rank, lease, begin, min(begin + step, len(lease)))
        size_bytes = _ANSWER_BYTES * (len(lease) + sum(len(groups) for _, groups in answer.absent))
        async with self._order:
            await self._connection.drained()
            self._account.take("unread_bytes", size_bytes)
            try:
                self._connection.send(answer)
                await self._connection.drained()
            finally:
                self._account.give_unread(size_bytes)

    def _answer(self, message: messages.AcquireRead, lease: ReadLease) -> messages.ReadAcquired:
        layout = self._layouts.describe(lease.layout)
        return messages.ReadAcquired(message.number, self._scope.outer(lease.result), layout, [], [])

    def _add(self, answer: messages.ReadAcquired, rank: int, lease: ReadLease, begin: int, end: int) -> None:
        """Say where chunks can be read, and what of them cannot."""
        held, chunks = lease.layout.objects.rank_masks[rank], list(islice(lease, begin, end))
        answer.absent += [
            (n, _absent(chunk))
            for n, chunk in enumerate(chunks, begin)
            if chunk.offset is not None and held & ~chunk.objects
        ]
        if self._mapped:
            answer.offsets += [chunk.offset for chunk in chunks]
            return
        block_bytes = lease.layout.block_bytes[rank]
        answer.offsets += [n * block_bytes if c.offset is not None else None for n, c in enumerate(chunks, begin)]
        answer.data_bytes += sum(end - begin for chunk in chunks for begin, end in _runs(chunk, lease.layout, rank))
        answer.buffer_bytes = len(lease) * block_bytes if answer.data_bytes else 0

    async def _send(self, message: messages.AcquireRead, read: Read, lease: ReadLease) -> None:
        for to, begin, end in _pieces(lease, message.rank):
            size_bytes = end - begin
            async with self._order:
                await self._connection.drained()
                await self._turn.comes(costs.of_sending(size_bytes))
                await self._account.take_unread(size_bytes)
                try:
                    if not read.is_held:
                        return
                    self._connection.send(messages.ReadData(message.number, to, self._memory[begin:end]))
                    await self._connection.drained()
                finally:
                    self._account.give_unread(size_bytes)

    def release(self, number: int) -> None:
        """Release the read of this number, if there is one that was entered."""
        read = self._held.get(number)
        if isinstance(read, Read):
            read.release()

    def close(self) -> None:
        """Look at the arena no more: all reads were released."""
        self._memory.release()


def _absent(chunk: ReadChunk) -> list[int]:
    """The groups that cannot be read of a chunk whose block is there."""
    return [group for group, span in enumerate(chunk.spans()) if span is None]


def _runs(chunk: ReadChunk, layout: ModelLayout, rank: int) -> Iterator[tuple[int, int]]:
    """Where the bytes of a chunk are in memory, as (begin, end): what lies side by side is one run."""
    if chunk.offset is None:
        return
    if not layout.objects.rank_masks[rank] & ~chunk.objects:
        yield chunk.offset, chunk.offset + layout.block_bytes[rank]
        return
    begin = end = 0
    for span in chunk.spans():
        if span is not None:
            if span[0] != end:
                if begin < end:
                    yield begin, end
                begin = span[0]
            end = span[1]
    if begin < end:
        yield begin, end


def _pieces(lease: ReadLease, rank: int) -> Iterator[tuple[int, int, int]]:
    """(where it goes in the client's buffer, begin and end in memory) of bounded pieces of what can be read."""
    block_bytes = lease.layout.block_bytes[rank]
    for n, chunk in enumerate(lease):
        to = n * block_bytes - (chunk.offset or 0)
        for begin, end in _runs(chunk, lease.layout, rank):
            for first in range(begin, end, DATA_BYTES):
                yield to + first, first, min(first + DATA_BYTES, end)
