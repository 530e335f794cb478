"""The reads of one connection: leases, and their bytes in frames where the client does not map the arena."""

import asyncio
from collections.abc import Iterator, Sequence

from async_cache.core import Core
from async_cache.errors import LimitError
from async_cache.handles.lease import Entered, spans_of
from async_cache.handles.stream import Arrived, Streamed
from async_cache.prompt.layout import ModelLayout
from async_cache.protocol import messages
from async_cache.protocol.connection import Connection
from async_cache.protocol.frames import DATA_BYTES
from async_cache.protocol.parts import split_result
from async_cache.server import costs
from async_cache.server.access import Scope
from async_cache.server.accounts import Account
from async_cache.server.held import Held, Table
from async_cache.server.layouts import Layouts
from async_cache.server.prefetches import Holders, Holding
from async_cache.server.turns import LIGHT, Turn

_AT_ONCE = 2 * LIGHT  # objects that may be looked at
_ANSWER_BYTES = 8  # for each chunk, or each object that cannot be read of it


class Read(Held):
    """What a connection has entered, held until it is released. `answering` sends it, where that takes its time."""

    __slots__ = ("_answering", "_entered", "_expiry", "_holding")

    def __init__(
        self,
        number: int,
        held: Table,
        connection: Connection,
        entered: Entered | Streamed,
        answering: Held | None,
    ):
        super().__init__(number, held, connection)
        self._entered: Entered | Streamed | None = entered
        self._answering = answering
        self._expiry: asyncio.TimerHandle | None = None
        self._holding: Holding | None = None

    def expires_after(self, seconds: float, holding: Holding | None) -> None:
        """Have its bytes come no more once its request is over, and so many seconds have passed."""
        self._holding = holding
        self._expiry = asyncio.get_running_loop().call_later(seconds, self._expire, seconds)

    def _expire(self, seconds: float) -> None:
        if self._holding is not None and self._holding.held:
            self.expires_after(seconds, self._holding)  # its request is not over
        else:
            self.release()
            error = "lease_ttl_seconds: the request is over, and the read was not left"
            self._connection.send(messages.Failed(self._number, "limit", error))

    def _end(self) -> Entered | Streamed | None:
        self._gone()
        if self._expiry is not None:
            self._expiry.cancel()
        entered, self._entered = self._entered, None
        if entered is not None:
            entered.memory.view = None
        return entered

    def undo(self) -> None:
        """Leave it, so that it may be entered again."""
        entered = self._end()
        if entered is not None:
            entered.undo()
        if self._answering is not None:
            self._answering.undo()

    def refuse(self) -> None:
        """Leave it as if it had not been entered: its client hears of an error in place of the answer."""
        self._answering = None
        self.undo()

    def release(self) -> None:
        """Leave it."""
        entered = self._end()
        if entered is not None:
            entered.release()
        if self._answering is not None:
            self._answering.release()


class Reads:
    """The reads of one connection, from `memory`: the arena, which the client sees itself if it is `mapped`."""

    def __init__(
        self,
        held: Table,
        connection: Connection,
        core: Core,
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
        self._requests, self._streams = core.requests, core.streams
        self._memory = memoryview(core.arena.view)
        self._layouts = layouts
        self._scope = scope
        self._turn = turn
        self._holders = holders
        self._account = account
        self._lease_seconds = lease_seconds
        self._mapped = mapped
        self._order = asyncio.Lock()  # to send a piece: all others that wait need not wake for each

    def acquire_nowait(self, message: messages.AcquireRead) -> bool:
        """Say what there is to read, where nothing has to be waited for or sent; whether that is so."""
        if not self._mapped:
            return False
        request_id = self._scope.inner(message.request_id)
        entered = self._requests.enter_nowait(request_id, message.rank, message.reader, _AT_ONCE)
        if entered is None:
            return False
        self._turn.charge(costs.of_reading(len(entered.offsets)))
        self._hold(message, request_id, entered, None)
        self._tell_at_once(message, entered)
        return True

    async def acquire(self, message: messages.AcquireRead) -> None:
        """Wait for the load, say what there is to read, and send it if it must be sent."""
        request_id = self._scope.inner(message.request_id)
        entered = await self._requests.enter(request_id, message.rank, message.reader)
        read = self._hold(message, request_id, entered, self._held[message.number])
        if len(entered.offsets) * len(entered.layout.groups) <= _AT_ONCE:
            self._tell_at_once(message, entered)
        else:
            try:
                await self._tell(message, entered)
            except LimitError:
                read.refuse()
                raise
        if not self._mapped:
            await self._send(read, entered, Arrived(0, entered.offsets, entered.objects))

    async def stream(self, message: messages.AcquireStream) -> None:
        """Wait for the lookup, and say of each chunk that it is there when it is, behind its bytes if they are sent."""
        request_id = self._scope.inner(message.request_id)
        streamed = await self._streams.enter(request_id, message.rank, message.reader)
        read = self._hold(message, request_id, streamed, self._held[message.number])
        number, layout, rank = message.number, streamed.layout, streamed.rank
        buffer_bytes = streamed.chunks * layout.block_bytes[rank] if not self._mapped else 0
        described = self._layouts.describe(layout)
        acquired = messages.StreamAcquired(number, described, streamed.start_chunk, streamed.chunks, buffer_bytes)
        self._connection.send(acquired)
        while isinstance(more := await streamed.more(), Arrived):
            if not self._mapped:
                await self._send(read, streamed, more)
            looked_at = len(more.offsets) * len(layout.groups)
            await self._turn.comes(costs.of_reading(looked_at) + costs.of_sending(_ANSWER_BYTES * looked_at))
            absent = _absent(layout, rank, more)
            offsets = list(self._offsets(layout, rank, more))
            arrived = messages.StreamArrived(number, more.begin, offsets, absent)
            await self._send_in_order(arrived, _ANSWER_BYTES * (len(more.offsets) + len(absent)))
        self._connection.send(messages.StreamEnded(number, self._scope.outer(more)))

    def _hold(
        self,
        message: messages.AcquireRead | messages.AcquireStream,
        request_id: str,
        entered: Entered | Streamed,
        answering: Held | None,
    ) -> Read:
        read = Read(message.number, self._held, self._connection, entered, answering)
        if self._lease_seconds is not None:
            read.expires_after(self._lease_seconds, self._holders.find(request_id))
        return read

    def _tell_at_once(self, message: messages.AcquireRead, entered: Entered) -> None:
        answer = self._answer(message, entered)
        self._add(answer, entered, 0, len(entered.offsets))
        self._connection.send(answer)

    async def _tell(self, message: messages.AcquireRead, entered: Entered) -> None:
        """Say what there is to read, where that is much: a part in each turn, and not before others are read."""
        answer, count = self._answer(message, entered), len(entered.offsets)
        step = max(1, _AT_ONCE // len(entered.layout.groups))
        for begin in range(0, count, step):
            await self._turn.comes(LIGHT)
            self._add(answer, entered, begin, min(begin + step, count))
        size_bytes = _ANSWER_BYTES * (count + sum(len(groups) for _, groups in answer.absent))
        await self._send_in_order(answer, size_bytes)

    async def _send_in_order(self, answer: messages.Message, size_bytes: int) -> None:
        """Send an answer of so many bytes when the client has read what was sent before, and wait until it has it."""
        async with self._order:
            await self._connection.drained()
            self._account.take("unread_bytes", size_bytes)
            try:
                self._connection.send(answer)
                await self._connection.drained()
            finally:
                self._account.give_unread(size_bytes)

    def _answer(self, message: messages.AcquireRead, entered: Entered) -> messages.ReadAcquired:
        layout = self._layouts.describe(entered.layout)
        result, parts = split_result(self._scope.outer(entered.result))
        return messages.ReadAcquired(message.number, result, layout, [], [], parts=parts)

    def _add(self, answer: messages.ReadAcquired, entered: Entered, begin: int, end: int) -> None:
        """Say where chunks can be read, and what of them cannot."""
        layout, rank = entered.layout, entered.rank
        some = Arrived(begin, entered.offsets[begin:end], entered.objects[begin:end])
        answer.absent += _absent(layout, rank, some)
        answer.offsets += self._offsets(layout, rank, some)
        if not self._mapped:
            answer.data_bytes += sum(end - begin for _, begin, end in _runs(layout, rank, some))
            answer.buffer_bytes = len(entered.offsets) * layout.block_bytes[rank] if answer.data_bytes else 0

    def _offsets(self, layout: ModelLayout, rank: int, some: Arrived) -> Sequence[int | None]:
        """Where the client finds chunks: in the arena, or in a buffer of its own in which each has its place."""
        if self._mapped:
            return some.offsets
        block_bytes = layout.block_bytes[rank]
        return [n * block_bytes if offset is not None else None for n, offset in enumerate(some.offsets, some.begin)]

    async def _send(self, read: Read, of: Entered | Streamed, some: Arrived) -> None:
        """Send the bytes of chunks, in bounded pieces, as long as the read is held."""
        for to, begin, end in _pieces(of.layout, of.rank, some):
            size_bytes = end - begin
            async with self._order:
                await self._connection.drained()
                await self._turn.comes(costs.of_sending(size_bytes))
                await self._account.take_unread(size_bytes)
                try:
                    if not read.is_held:
                        return
                    self._connection.send(messages.ReadData(read.number, to, self._memory[begin:end]))
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


def _absent(layout: ModelLayout, rank: int, some: Arrived) -> list[tuple[int, list[int]]]:
    """What of chunks cannot be read though their blocks are there: (number, groups)."""
    begin, offsets, objects = some
    if objects.count(layout.objects.full_mask) == len(objects):
        return []
    held = layout.objects.rank_masks[rank]
    return [
        (n, [group for group, span in enumerate(spans_of(layout, rank, offset, there)) if span is None])
        for n, (offset, there) in enumerate(zip(offsets, objects, strict=True), begin)
        if offset is not None and held & ~there
    ]


def _runs(layout: ModelLayout, rank: int, some: Arrived) -> Iterator[tuple[int, int, int]]:
    """Where the bytes of chunks are in memory, as (number, begin, end): what lies side by side is one run."""
    held = layout.objects.rank_masks[rank]
    for n, (offset, objects) in enumerate(zip(some.offsets, some.objects, strict=True), some.begin):
        if offset is None:
            continue
        if not held & ~objects:
            yield n, offset, offset + layout.block_bytes[rank]
            continue
        begin = end = 0
        for span in spans_of(layout, rank, offset, objects):
            if span is not None:
                if span[0] != end:
                    if begin < end:
                        yield n, begin, end
                    begin = span[0]
                end = span[1]
        if begin < end:
            yield n, begin, end


def _pieces(layout: ModelLayout, rank: int, some: Arrived) -> Iterator[tuple[int, int, int]]:
    """(where it goes in the client's buffer, begin and end in memory) of bounded pieces of what can be read."""
    block_bytes = layout.block_bytes[rank]
    for n, begin, end in _runs(layout, rank, some):
        to = n * block_bytes - (some.offsets[n - some.begin] or 0)
        for first in range(begin, end, DATA_BYTES):
            yield to + first, first, min(first + DATA_BYTES, end)
