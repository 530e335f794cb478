"""What is under way on a link: one object for each message that is answered, whichever answers it gets."""

import asyncio
import ctypes
import logging
import weakref
from abc import ABC, abstractmethod
from collections import deque
from enum import Enum
from typing import Any, Protocol

from async_cache.aio.promise import Promise
from async_cache.errors import ConnectionLostError, ProtocolError, WriterClosedError
from async_cache.handles.events import EventStream
from async_cache.handles.prefetch import Prefetch, SegmentPrefetch
from async_cache.handles.stream import Arrived
from async_cache.handles.writer import Writer
from async_cache.prompt.layout import ModelLayout, Prompt
from async_cache.prompt.parts import Parts
from async_cache.protocol import messages
from async_cache.protocol.messages import Message, error_of
from async_cache.protocol.parts import join_hits, join_result
from async_cache.protocol.prompts import describe, difference
from async_cache.values import LoadResult, LookupHits

log = logging.getLogger(__name__)

_warned: set[tuple[str, str]] = set()  # of layouts that differ, and how: once for all connections of the process
_MAX_WARNED = 100


class Call(ABC):
    """One message under way, kept by its number until its last answer has come."""

    __slots__ = ()

    @abstractmethod
    def on(self, answer: Any) -> bool:
        """Take an answer; whether it was the last."""

    @abstractmethod
    def lost(self, reason: Exception) -> None:
        """No more answers will come: the connection is lost, or being closed."""


class Line(Protocol):
    """What calls use of their link."""

    requests: "dict[str, PrefetchCall]"

    def next_number(self) -> int:
        """The number of the next message."""

    def send(self, message: Message) -> None:
        """Send a message whose answer does not matter."""

    def begin(self, message: Any, call: Call) -> None:
        """Send a message whose answers go to the call. Where the connection is not open, the call is lost at once."""

    def cancel(self, number: int) -> None:
        """Have the server give a call up; it answers all the same."""

    def check_knows(self, kind: type[Message]) -> None:
        """Check that the server knows what not every server does. Raises ServiceError."""


class Question(Call):
    """A message with one answer, which somebody waits for."""

    __slots__ = ("answer",)

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def on(self, answer: Any) -> bool:
        if type(answer) is messages.Failed:
            fail(self.answer, error_of(answer))
        elif not self.answer.done():
            self.answer.set_result(answer)
        return True

    def lost(self, reason: Exception) -> None:
        fail(self.answer, reason)


class ReadCall(Question):
    """The acquisition of a read. Where bytes have to come, the answer that announces them waits for the last."""

    __slots__ = ("_acquired", "_missing_bytes", "buffer")

    def __init__(self) -> None:
        super().__init__()
        self.buffer: memoryview | None = None
        """The bytes that have come, where any had to."""
        self._acquired: messages.ReadAcquired | None = None
        self._missing_bytes = 0

    def on(self, answer: Any) -> bool:
        if type(answer) is messages.ReadData:
            return self._take(answer)
        if type(answer) is messages.ReadAcquired and answer.data_bytes and not self.answer.done():
            self._acquired = answer
            self._missing_bytes = answer.data_bytes
            self.buffer = memoryview(bytearray(answer.buffer_bytes))
            return False
        return super().on(answer)

    def _take(self, answer: messages.ReadData) -> bool:
        put(answer, self.buffer)
        self._missing_bytes -= len(answer.data)
        return self._missing_bytes <= 0 and super().on(self._acquired)


class StreamCall(Question):
    """A stream: what has come of it and nobody has taken yet, until its result or its error."""

    __slots__ = ("_came", "_end", "_layout", "_rank", "_woken", "buffer")

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.buffer: memoryview | None = None
        """The bytes that have come, where any have to."""
        self._rank = rank
        self._layout: ModelLayout | None = None
        self._came: deque[messages.StreamArrived] = deque()
        self._end: LoadResult | Exception | None = None
        self._woken = asyncio.Event()

    def begin(self, layout: ModelLayout) -> None:
        """Know the layout of what comes."""
        self._layout = layout

    def on(self, answer: Any) -> bool:
        kind = type(answer)
        if kind is messages.StreamArrived:
            self._came.append(answer)
            self._woken.set()
            return False
        if kind is messages.ReadData:
            put(answer, self.buffer)
            return False
        if kind is messages.StreamAcquired and not self.answer.done():
            self.buffer = memoryview(bytearray(answer.buffer_bytes)) if answer.buffer_bytes else None
            super().on(answer)
            return False
        if not self.answer.done():
            return super().on(answer)
        self.end(answer.result if kind is messages.StreamEnded else error_of(answer))
        return True

    def lost(self, reason: Exception) -> None:
        super().lost(reason)
        self.end(reason)

    def end(self, end: LoadResult | Exception) -> None:
        """Nothing more will come, for this reason."""
        if self._end is None:
            self._end = end
        self._woken.set()

    async def more(self) -> Arrived | LoadResult:
        """The next chunks that have come, or the result. Raises what the stream has ended with."""
        while not self._came:
            if isinstance(self._end, Exception):
                raise self._end.with_traceback(None)
            if self._end is not None:
                return self._end
            self._woken.clear()
            await self._woken.wait()
        came = self._came.popleft()
        assert self._layout is not None
        return Arrived(came.begin, came.offsets, objects_of(self._layout, self._rank, came, came.begin))


def put(data: messages.ReadData, buffer: memoryview | None) -> None:
    """Put bytes of a read where they belong. Raises ProtocolError."""
    if buffer is None:
        raise ProtocolError("bytes of a read that was not acquired")
    begin, end = data.offset, data.offset + len(data.data)
    if end > len(buffer):
        raise ProtocolError("bytes of a read that do not fit into it")
    buffer[begin:end] = data.data


def objects_of(
    layout: ModelLayout, rank: int, told: messages.ReadAcquired | messages.StreamArrived, begin: int = 0
) -> list[int]:
    """The objects that can be read of each chunk that a server has told of, the first of which has this number."""
    objects = [layout.objects.rank_masks[rank]] * len(told.offsets)
    for n, groups in told.absent:
        objects[n - begin] &= ~sum(1 << layout.objects.bit(rank, group) for group in groups)
    return objects


class StoreState(Enum):
    """RESERVING -> OPEN -> CLOSED, by its writer, by the server, or with the connection."""

    RESERVING = "reserving"
    OPEN = "open"
    CLOSED = "closed"


class StoreCall(Question):
    """Room that is reserved for a writer, until either end closes it. See `StoreState`."""

    __slots__ = ("_writer", "state")

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self.state = StoreState.RESERVING
        self._writer: Writer | None = writer

    def on(self, answer: Any) -> bool:
        if type(answer) is messages.StoreClosed:
            self._expire()
            return True
        if type(answer) is messages.StoreReserved and not self.answer.done():
            self.state = StoreState.OPEN
            super().on(answer)
            return False
        return super().on(answer)

    def lost(self, reason: Exception) -> None:
        super().lost(reason)
        self._expire()

    def _expire(self) -> None:
        if (writer := self.close()) is not None:
            writer.expire()

    def close(self) -> Writer | None:
        """Let nothing more come of it; its writer, if it was open."""
        state, self.state = self.state, StoreState.CLOSED
        writer, self._writer = self._writer, None  # they know each other: without this, both would wait for the gc
        return writer if state is StoreState.OPEN else None


class Commit(Call):
    """A chunk that is to be published. Its block is kept until the server has copied it; a failure is logged.

    Until then `answered` is one of those that are `under_way`.
    """

    __slots__ = ("_block", "_under_way", "answered")

    def __init__(self, block: "ctypes.Array[ctypes.c_ubyte]", under_way: "set[asyncio.Future[None]]") -> None:
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._block = block
        self._under_way = under_way
        under_way.add(self.answered)

    def on(self, answer: Any) -> bool:
        if type(answer) is messages.Failed and not isinstance(error := error_of(answer), WriterClosedError):
            log.warning("a chunk could not be committed: %s", error)
        self._end()
        return True

    def lost(self, reason: Exception) -> None:
        self._end()

    def _end(self) -> None:
        self._under_way.discard(self.answered)
        self.answered.set_result(None)


class EventsCall(Call):
    """A stream of events, as long as somebody has it."""

    __slots__ = ("_stream",)

    def __init__(self, stream: EventStream) -> None:
        self._stream = weakref.ref(stream)

    def on(self, answer: Any) -> bool:
        stream = self._stream()
        if type(answer) is messages.Happened:
            if stream is not None:
                for event in answer.events:
                    stream.put(event)
            return False
        if type(answer) is messages.Failed:
            self.lost(error_of(answer))
        return True

    def lost(self, reason: Exception) -> None:
        if (stream := self._stream()) is not None:
            stream.break_with(reason)


class PrefetchState(Enum):
    """OPEN <-> CLAIMED, by whoever asks for the result, or returns it. Both -> LEFT, by a reader of this client.

    Whether it was the last reader, and the id is free, only the server knows.
    """

    OPEN = "open"
    CLAIMED = "claimed"
    LEFT = "left"


OPEN, CLAIMED, LEFT = PrefetchState  # each access to a member of an enum is a call, in Python 3.11


class PrefetchCall(Call):
    """A prefetch: what it asked for, and what the server says of it until its request is over. See `PrefetchState`."""

    __slots__ = (
        "_line", "hits", "number", "prefetch", "prompt", "ranks", "request_id", "result", "start_chunk", "state",
    )  # fmt: skip

    def __init__(
        self, line: Line | None, request_id: str, prompt: Prompt | Parts, start_chunk: int, ranks: tuple[int, ...]
    ) -> None:
        self._line = line
        self.number = line.next_number() if line is not None else 0
        self.request_id = request_id
        self.prompt = prompt
        self.start_chunk = start_chunk
        self.ranks = ranks
        self.state = OPEN
        self.hits: Promise[LookupHits] = Promise()
        self.result: Promise[LoadResult] = Promise()
        handle = SegmentPrefetch if isinstance(prompt, Parts) else Prefetch
        self.prefetch = handle(self, PrefetchCall._cancel)

    def asks_for(self, prompt: Prompt | Parts, start_chunk: int, ranks: tuple[int, ...]) -> bool:
        """Whether this is what it has asked for."""
        return self.start_chunk == start_chunk and self.ranks == ranks and self.prompt.same_as(prompt)

    def on(self, answer: Any) -> bool:
        kind = type(answer)
        if kind is messages.LookupDone:
            self.hits.resolve(join_hits(answer.hits, answer.parts))
        elif kind is messages.LoadDone:
            self.result.resolve(join_result(answer.result, answer.parts))
        elif kind is messages.RequestClaimed:
            if self.state is not LEFT:
                self.state = CLAIMED if answer.claimed else OPEN
        elif kind is messages.RequestOver:
            self._free_id()
            self.lost(ConnectionLostError("the request ended before its result had come"))  # where it did: a fault
            return True
        elif kind is messages.Failed:
            self._free_id()
            self.lost(error_of(answer))
            return True
        return False

    def lost(self, reason: Exception) -> None:
        self.hits.break_with(reason)
        self.result.break_with(reason)

    def _free_id(self) -> None:
        if self._line is not None and self._line.requests.get(self.request_id) is self:
            del self._line.requests[self.request_id]

    def _cancel(self) -> None:
        if self._line is not None and self.result.pending:
            self._line.cancel(self.number)

    def __repr__(self) -> str:
        return f"<PrefetchCall {self.number}, request {self.request_id!r}, {self.state.value}>"


class Registration(Call):
    """A layout, and the index by which prompts name it on this connection.

    `refusal`: why prompts cannot name it, if the server has refused it.
    """

    __slots__ = ("index", "layout", "refusal")

    def __init__(self, index: int, layout: ModelLayout) -> None:
        self.index = index
        self.layout = layout
        self.refusal: Exception | None = None

    def on(self, answer: Any) -> bool:
        if type(answer) is messages.Failed:
            self.refusal = error_of(answer)
        elif type(answer) is messages.LayoutRegistered:
            for other in answer.others:
                self._warn_of(other)
        return True

    def _warn_of(self, other: messages.Layout) -> None:
        what = self.layout.model, difference(describe(self.layout), other)
        if what not in _warned and len(_warned) < _MAX_WARNED:
            _warned.add(what)
            log.warning("model %r is cached in another layout too, which shares nothing with this one: %s", *what)

    def lost(self, reason: Exception) -> None:
        return


def fail(waiting: "asyncio.Future[Any]", error: BaseException) -> None:
    """Have a waiter get the error, if nothing has come for it yet."""
    if not waiting.done():
        waiting.set_exception(error)
        waiting.exception()  # looked at: the waiter hears of it all the same
